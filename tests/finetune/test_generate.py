"""What is written for files of sources: in order, once, whole, and the same however it came about."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import tiny_model
from ranks import Ranks

from data_prep.files import read_json, sha256_of_file
from data_prep.tokenizer import Tokenizer
from finetune import Writer, generate
from finetune.__main__ import main
from finetune.convert import ConvertSettings, convert
from finetune.huggingface import register
from finetune.processes import Processes
from finetune.score import score_files
from finetune.search_settings import SearchSettings
from finetune.seq2seq_data import Seq2SeqSettings
from finetune.seq2seq_model import Seq2SeqModel, save_seq2seq

TEXTS = [
    "the truth", "a man in want of a wife", "good", "of the good man, and the wife", "woman", "the", "truth and truth",
    "in want of good", "and", "wife of the man; truth of the woman",
]  # fmt: skip
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(word_piece: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, and its targets end now and then."""
    pmlm = tiny_model(word_piece.vocab_size, max_positions=60)
    with torch.no_grad():
        pmlm.cls.predictions.bias.zero_()
        pmlm.cls.predictions.bias[word_piece.eos_id] = 2.5
    folder = tmp_path_factory.mktemp("seq2seq")
    save_seq2seq(folder, Seq2SeqModel(pmlm), word_piece, Seq2SeqSettings(40, 12, num_beams=3))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources") / "test.jsonl"
    path.write_text("".join(json.dumps({"src": text, "tgt": "the truth"}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def command(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`python -m finetune generate --model MODEL ...` in this process: status, stdout and stderr. Chunks of four sources."""
    monkeypatch.setattr(generate, "_CHUNK", 4)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["finetune", "generate", "--model", str(model), *map(str, words)])
        status = main()
        return status, *capsys.readouterr()

    return run


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_line_for_each_source_in_order(model: Path, sources: Path, command: Command, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.jsonl"
    status, _, told = command("--input", sources, "--output", output, "--batch_size", 3)
    assert status == 0
    assert f"{output}: 10 texts" in told
    rows = rows_of(output)
    assert [row["text"] for row in rows] == Writer.load(model).write(TEXTS)
    assert len({row["text"] for row in rows}) > 3
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.jsonl", "out.jsonl.settings.json"]
    settings = read_json(tmp_path / "new" / "out.jsonl.settings.json")
    assert settings["search"] == vars(SearchSettings(num_beams=3, max_length_tokens=12))
    assert settings["model_sha256"] == sha256_of_file(model / "model.safetensors")
    scored = score_files(output, [sources], prediction_column="text", reference_column="tgt", ignore_case=False)
    assert scored["decoding"] == settings
    whole = output.stat()
    status, _, told = command("--input", sources, "--output", output, "--batch_size", 3)
    assert (status, output.stat()) == (0, whole)
    assert "is complete already" in told


def test_forms_of_files_are_the_same(sources: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    (tmp_path / "a.tsv").write_text("n\tquery\n" + "".join(f"1\t{text}\n" for text in TEXTS))
    outputs = []
    for path, words in ((sources, ()), (tmp_path / "a.txt", ()), (tmp_path / "a.tsv", ("--source_column", "query"))):
        output = tmp_path / f"{path.suffix}.jsonl"
        assert command("--input", path, "--output", output, *words)[0] == 0
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def test_settings_are_the_models_unless_told_otherwise(sources: Path, command: Command, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = [
        "--num_beams",
        "4",
        "--num_best",
        "3",
        "--length_penalty",
        "0",
        "--min_length_tokens",
        "2",
        "--max_length_tokens",
        "9",
    ]
    assert command("--input", sources, "--output", output, *words)[0] == 0
    for row in rows_of(output):
        assert (row["text"], row["score"]) == (row["n_best"][0]["text"], row["n_best"][0]["score"])
        assert len(row["n_best"]) == 3
        scores = [one["score"] for one in row["n_best"]]
        assert scores == sorted(scores, reverse=True)
        assert all(one["score"] == pytest.approx(one["log_probability"], abs=1e-4) for one in row["n_best"])
        assert all(3 <= one["tokens"] <= 9 for one in row["n_best"])


class Stopped(Exception):
    """As if the machine had failed."""


@pytest.mark.parametrize("traces", [(), ("--traces",)])
def test_an_interrupted_run_goes_on(
    traces: tuple[str, ...], sources: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, output = tmp_path / "expected.jsonl", tmp_path / "out.jsonl"
    words = ("--batch_size", 3, *traces)
    assert command("--input", sources, "--output", expected, *words)[0] == 0
    decode, decoded = generate.decode, []

    def failing(*arguments: Any, samples: list[int], **others: Any) -> Any:
        decoded.extend(samples)
        if len(decoded) > 4 and max(decoded) < 8:
            raise Stopped
        return decode(*arguments, samples=samples, **others)

    monkeypatch.setattr(generate, "decode", failing)
    with pytest.raises(Stopped):
        command("--input", sources, "--output", output, *words)
    assert not output.exists()
    with open(tmp_path / ".out.jsonl.partial", "ab") as file:
        file.write(b'{"text": "half a li')
    status, _, told = command("--input", sources, "--output", output, *words, "--num_beams", 2)
    assert status == 2
    assert "search.num_beams 3, now 2" in told
    decoded.clear()
    monkeypatch.setattr(
        generate, "decode", lambda *a, samples, **o: (decoded.extend(samples), decode(*a, samples=samples, **o))[1]
    )
    assert command("--input", sources, "--output", output, *words)[0] == 0
    assert sorted(decoded) == [*range(4, 10)]
    for name in ("", ".settings.json", *([".traces.jsonl"] if traces else [])):
        assert (tmp_path / f"out.jsonl{name}").read_bytes() == (tmp_path / f"expected.jsonl{name}").read_bytes()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def write_as_rank(rank: int, model: str, sources: str, output: str) -> None:
    """In each of two processes."""
    torch.set_num_threads(1)
    generate._CHUNK = 4
    processes = Processes(rank, 2)
    writer = Writer.load(model, processes, num_beams=2)
    generate.write_file(Path(model), writer, Path(sources), "src", Path(output), batch_size=1, processes=processes)
    assert rank == 1 or len(rows_of(Path(output))) == len(TEXTS)


@pytest.mark.slow
def test_processes_write_the_same_bytes(
    model: Path, sources: Path, command: Command, two_ranks: Ranks, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert command("--input", sources, "--output", one, "--batch_size", 1, "--num_beams", 2)[0] == 0
    two_ranks(write_as_rank, str(model), str(sources), str(two))
    assert one.read_bytes() == two.read_bytes()
    assert read_json(tmp_path / "one.jsonl.settings.json") == read_json(tmp_path / "two.jsonl.settings.json")


def test_traces_ranked_again_are_what_decoding_again_gives(sources: Path, command: Command, tmp_path: Path) -> None:
    first, again, ranked = tmp_path / "first.jsonl", tmp_path / "again.jsonl", tmp_path / "ranked.jsonl"
    assert command("--input", sources, "--output", first, "--traces")[0] == 0
    words = ("--length_penalty", -1, "--num_best", 2)
    assert command("--input", sources, "--output", again, *words)[0] == 0
    status, _, told = command("--rerank", f"{first}.traces.jsonl", "--output", ranked, *words)
    assert status == 0, told
    for found, expected in zip(rows_of(ranked), rows_of(again), strict=True):  # other batches: scores but for rounding
        for one, other in zip([found, *found["n_best"]], [expected, *expected["n_best"]], strict=True):
            assert (one.keys(), one["text"]) == (other.keys(), other["text"])
            assert one["score"] == pytest.approx(other["score"], rel=1e-4)
    assert [row["text"] for row in rows_of(ranked)] != [row["text"] for row in rows_of(first)]
    settings = read_json(tmp_path / "ranked.jsonl.settings.json")
    assert (settings["search"]["length_penalty"], settings["reranked"]) == (-1.0, "first.jsonl.traces.jsonl")
    for words, part in (
        (("--num_beams", 2), "--num_beams: changes the search"),
        (("--num_best", 4), "num_best is 4"),
        (("--length_penalty", 1), f"{ranked}: exists"),
    ):
        status, _, told = command("--rerank", f"{first}.traces.jsonl", "--output", ranked, *words)
        assert (status, part in told) == (2, True), told
    with open(f"{first}.traces.jsonl", "a") as file:
        file.write('{"parents": [[0]]}\n{"ends": [[[0, 1]]]}\n')
    status, _, told = command("--rerank", f"{first}.traces.jsonl", "--output", tmp_path / "x.jsonl")
    assert (status, "line 12: not a line that --traces writes" in told) == (2, True), told
    assert not (tmp_path / "x.jsonl").exists()


def test_one_text(model: Path, command: Command) -> None:
    writer = Writer.load(model)
    assert command("--text", TEXTS[1])[:2] == (0, writer.write(TEXTS[1:2])[0] + "\n")
    lines = command("--text", TEXTS[1], "--num_best", 3)[1].splitlines()
    assert len(lines) == 3
    assert lines[0].split("\t")[1] == writer.write(TEXTS[1:2])[0]
    greedy = Writer.load(model, num_beams=1).write(TEXTS)
    assert [command("--text", text, "--stream")[1] for text in TEXTS] == [f"{text}\n" for text in greedy]


def test_draws(sources: Path, command: Command, tmp_path: Path) -> None:
    words = ["--sampling", "--num_best", "5", "--top_p", "0.9", "--top_k", "20", "--temperature", "0.8"]
    outputs = []
    for name, seed, batch_size in (("a", 1, 1), ("b", 1, 4), ("c", 2, 4)):
        output = tmp_path / name
        assert (
            command("--input", sources, "--output", output, "--seed", seed, "--batch_size", batch_size, *words)[0] == 0
        )
        outputs.append([[one["text"] for one in row["n_best"]] for row in rows_of(output)])
    assert outputs[0] == outputs[1] != outputs[2]
    assert len(outputs[0][0]) == 5


def test_what_is_cut_or_empty_is_told(command: Command, tmp_path: Path) -> None:
    path, output = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"src": "good"}\n\n{"src": " "}\n{"src": "' + "man of " * 60 + '"}\n{"src": ["the", "truth"]}\n')
    status, _, told = command("--input", path, "--output", output)
    assert status == 0
    assert "4 sources; 1 are cut to the model's 40 tokens" in told
    assert "1 sources are empty" in told
    assert f"{path}: line 3" in told
    rows = rows_of(output)
    assert rows[1] == {"text": "", "score": None}
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("content", "words", "parts"),
    [
        ('{"src": "a"}\n{"src": \n', [], ["a.jsonl: line 2: not valid JSON"]),
        ('{"src": "a"}\n\n{"text": "b"}\n', [], ["a.jsonl: line 3", "'src'", "text"]),
        ("", [], ["a.jsonl: has no rows"]),
        ('{"src": "a"}\n', ["--num_beams", 500], ["--num_beams 500: more than the", "entries of the vocabulary"]),
        ('{"src": "a"}\n', ["--max_length_tokens", 58], ["--max_length_tokens 58", "57 positions of 60"]),
        ('{"src": "a"}\n', ["--num_best", 4], ["num_best is 4, expected at most num_beams, which is 3"]),
        ('{"src": "a"}\n', ["--stream"], ["--stream goes with --text"]),
        ('{"src": "a"}\n', ["--text", "a"], ["one of --input, --text and --rerank"]),
        ('{"src": "a"}\n', ["--traces", "--sampling"], ["--traces"]),
        ('{"src": "a"}\n', ["--forbidden_words", "a|龘"], ["--forbidden_words '龘'"]),
        ('{"src": "a"}\n', ["--batch_size", 0], ["--batch_size 0"]),
    ],
)
def test_errors(content: str, words: list[object], parts: list[str], command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    status, _, told = command("--input", tmp_path / "a.jsonl", "--output", tmp_path / "out.jsonl", *words)
    assert status == 2
    assert told.count("error:") == 1
    for part in parts:
        assert part in told
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_an_output_of_other_settings_is_left_alone(sources: Path, command: Command, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert command("--input", sources, "--output", output)[0] == 0
    content = output.read_bytes()
    status, _, told = command("--input", sources, "--output", output, "--length_penalty", 2)
    assert (status, "search.length_penalty 1.0, now 2.0" in told) == (2, True), told
    (tmp_path / "mine.jsonl").write_text("mine")
    status, _, told = command("--input", sources, "--output", tmp_path / "mine.jsonl")
    assert (status, "mine.jsonl: exists" in told) == (2, True), told
    assert (output.read_bytes(), (tmp_path / "mine.jsonl").read_text()) == (content, "mine")


def test_a_fine_tuned_model_goes_to_transformers(model: Path, tmp_path: Path) -> None:
    convert(ConvertSettings(model, tmp_path / "hf", "huggingface"))
    register()
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    written = theirs.generate(**batch, num_beams=3, max_new_tokens=12)
    ours = Writer.load(model).write(TEXTS)
    assert [tokenizer.decode(row, skip_special_tokens=True).split() for row in written] == [
        text.split() for text in ours
    ]


def test_one_text_is_not_taken_for_many(model: Path) -> None:
    writer = Writer.load(model)
    assert len(writer.write(["the truth"])) == 1
    for sources, fault in (
        ("the truth", r"sources is one text, expected a list of texts"), (["the truth", " "], "source 2: expected one text, none of it empty"),
        ([("the truth", "truth")], "source 1: expected one text, none of it empty, found 2 of them"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=fault):
            writer.write(sources)  # type: ignore[arg-type]
