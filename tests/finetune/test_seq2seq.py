"""Sequence-to-sequence fine-tuning: the loss against a plain model, what is drawn, files of every form, and a model that learns."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from models import stored, tiny_model
from ranks import Ranks
from safetensors.torch import load_file
from support import REPOSITORY, free_port, run_command
from torch.nn import functional as F

from data_prep.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from finetune.__main__ import main, parse
from finetune.processes import Processes
from finetune.search import decode
from finetune.search_settings import Rules
from finetune.seq2seq import Seq2SeqTask, TargetNoise, TargetSettings, ValidationSettings
from finetune.seq2seq_data import (
    Examples,
    PairColumns,
    Seq2SeqSettings,
    TextEncoder,
    make_examples,
    read_pairs,
    source_ids,
    target_ids,
)
from finetune.seq2seq_model import Seq2SeqModel, load_seq2seq
from finetune.tokens import TokenLists, TokenListsBuilder
from pretrain.attention import relative_position_bucket
from pretrain.export import write_export
from pretrain.model import PMLM

Command = Callable[..., tuple[int, str, str]]
PAIRS = [("a good man", "good"), ("a truth of fortune", "truth, and"), ("the man in want of a wife", "wife")]


# ---- the loss, against a model written down once more, every pair of slots in a matrix


def plain_losses(
    model: PMLM,
    source: list[int],
    target: list[int],
    turns: list[int],
    given: list[int],
    mask_id: int,
    smoothing: float,
) -> torch.Tensor:
    """Of each target token: source, originals and pseudo masks in a row, and who sees whom from the paper's sentences."""
    weights, config = dict(model.named_parameters()), model.config
    length, count = len(source), len(target)
    ids = torch.tensor([*source, *given, *[mask_id] * count])
    positions = torch.tensor([*range(length), *[*range(length, length + count)] * 2])
    segments = torch.tensor([0] * length + [1] * 2 * count)
    sees = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    sees[:, :length] = True
    for i in range(count):
        for j in range(count):
            sees[length + i, length + j] = turns[j] <= turns[i]  # originals of turns up to its own
            sees[length + count + i, length + j] = turns[j] < turns[i]  # originals of earlier turns
            sees[length + count + i, length + count + j] = turns[j] == turns[i]  # the pseudo masks of its turn

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(
            x, x.shape[-1:], weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"], 1e-12
        )

    tables = [weights[f"bert.embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")]
    x = norm(tables[0][ids] + tables[1][positions] + tables[2][segments], "bert.embeddings")
    buckets = relative_position_bucket(
        positions - positions[:, None], config.relative_buckets, config.relative_max_distance
    )
    bias = weights["bert.encoder.rel_pos_bias.weight"][:, buckets].masked_fill(~sees, -math.inf)
    for layer in range(config.num_layers):
        name = f"bert.encoder.layer.{layer}"
        q, k, v = (x @ weights[f"{name}.attention.self.qkv_linear.weight"].T).chunk(3, dim=-1)
        q, v = q + weights[f"{name}.attention.self.q_bias"], v + weights[f"{name}.attention.self.v_bias"]
        q, k, v = (part.unflatten(-1, (config.num_heads, -1)).transpose(0, 1) for part in (q, k, v))
        attended = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5 + bias, dim=-1) @ v
        attended = dense(attended.transpose(0, 1).flatten(1), f"{name}.attention.output.dense")
        x = norm(attended + x, f"{name}.attention.output")
        x = norm(dense(F.gelu(dense(x, f"{name}.intermediate.dense")), f"{name}.output.dense") + x, f"{name}.output")
    head = norm(F.gelu(dense(x[length + count :], "cls.predictions.transform.dense")), "cls.predictions.transform")
    logits = head @ tables[0].T + weights["cls.predictions.bias"]
    return F.cross_entropy(logits, torch.tensor(target), reduction="none", label_smoothing=smoothing)


def examples_of(tokenizer: Tokenizer) -> Examples:
    settings = Seq2SeqSettings(max_source_tokens=24, max_target_tokens=16)
    texts = [*PAIRS, ("it is", "it is a truth of the good man")]
    sources = [source_ids(tokenizer, [tokenizer.encode([source]).tolist()], 24)[0] for source, _ in texts]
    targets = [target_ids(tokenizer, tokenizer.encode([target]).tolist(), 16)[0] for _, target in texts]
    assert settings.max_positions == 40
    made = []
    for lists in (sources, targets):
        builder = TokenListsBuilder(tokenizer.vocab_size)
        builder.add(lists)
        made.append(builder.build())
    return Examples(*made, np.ones(len(texts), dtype=bool))


def task_of(
    model: Seq2SeqModel, tokenizer: Tokenizer, examples: Examples, of_targets: TargetSettings, seed: int = 0
) -> Seq2SeqTask:
    settings = Seq2SeqSettings(max_source_tokens=24, max_target_tokens=16, num_beams=2)
    of_validation = ValidationSettings(generated_pairs=0)
    return Seq2SeqTask(model, tokenizer, settings, of_targets, of_validation, examples, examples, Processes(), seed)


@pytest.mark.parametrize(
    "of_targets",
    [TargetSettings(), TargetSettings(label_smoothing=0.0, target_mask_prob=0.4), TargetSettings(target_blocks=True)],
    ids=["as in the paper", "masked", "blocks"],
)
def test_the_loss_is_that_of_a_plain_dense_model(of_targets: TargetSettings, word_piece: Tokenizer) -> None:
    model = Seq2SeqModel(tiny_model(word_piece.vocab_size)).double().eval()
    examples, mask_id, seed, epoch = examples_of(word_piece), word_piece.mask_id, 5, 3
    task = task_of(model, word_piece, examples, of_targets, seed)
    noise = TargetNoise(of_targets, word_piece, 16, seed)
    expected = []
    for sample in (3, 1, 2):
        turns, given = (values.tolist() for values in noise(examples.targets, sample, epoch))
        source, target = examples.sources[sample].tolist(), examples.targets[sample].tolist()
        assert (given != target) == bool(of_targets.target_mask_prob)
        assert sample != 3 or (turns[-1] < len(target)) == of_targets.target_blocks
        expected.append(plain_losses(model, source, target, turns, given, mask_id, of_targets.label_smoothing).sum())
    mean_tokens = sum(map(len, examples.targets)) / 4
    plain = torch.stack(expected).sum() / mean_tokens
    plain_gradients = torch.autograd.grad(plain, [*model.parameters()])
    loss = task.loss([3, 1, 2], epoch)
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=1e-9)
    for (name, parameter), g in zip(model.named_parameters(), plain_gradients, strict=True):
        found = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
        torch.testing.assert_close(found, g, rtol=1e-7, atol=1e-9, msg=name)


def test_validation_is_the_mean_over_tokens(word_piece: Tokenizer) -> None:
    model = Seq2SeqModel(tiny_model(word_piece.vocab_size)).eval()
    examples = examples_of(word_piece)
    values = task_of(model, word_piece, examples, TargetSettings(target_mask_prob=0.5)).validate()
    losses = torch.cat([
        plain_losses(model, source.tolist(), target.tolist(), [*range(1, len(target) + 1)], target.tolist(), word_piece.mask_id, 0.0)
        for source, target in zip(examples.sources, examples.targets, strict=True)
    ])  # fmt: skip
    assert values["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert values["score"] == -values["loss"]
    assert 0 <= values["token_accuracy"] <= 1


def writing_task(tokenizer: Tokenizer, processes: Processes) -> Seq2SeqTask:
    model, examples = Seq2SeqModel(tiny_model(tokenizer.vocab_size)).eval(), examples_of(tokenizer)
    of_validation = ValidationSettings("rouge_l", generated_pairs=3)
    settings = Seq2SeqSettings(24, 16, num_beams=2)
    return Seq2SeqTask(model, tokenizer, settings, TargetSettings(), of_validation, examples, examples, processes, 0)


def validate_as_rank(rank: int, folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "t.json")
    task = writing_task(tokenizer, Processes(rank, 2))
    with torch.no_grad():
        values = task.validate()
    task.save(folder / str(rank))
    (folder / f"{rank}.json").write_text(json.dumps(values))


@pytest.mark.slow
def test_two_processes_share_a_validation(word_piece: Tokenizer, two_ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(word_piece.path.read_bytes())
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    two_ranks(validate_as_rank, tmp_path)
    task = writing_task(word_piece, Processes())
    with torch.no_grad():
        expected = task.validate()
    task.save(tmp_path)
    written = (tmp_path / "written.jsonl").read_text("utf-8")
    assert len(written.splitlines()) == 3
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(expected, rel=1e-5)
        assert (tmp_path / str(rank) / "written.jsonl").read_text("utf-8") == written


# ---- what is drawn


def test_what_is_drawn_of_targets(word_piece: Tokenizer) -> None:
    settings = TargetSettings(target_mask_prob=0.3, target_blocks=True)
    targets = [[*range(6, 46), 3]] * 150
    noise = TargetNoise(settings, word_piece, 41, seed=1)
    of_epochs = [[[v.tolist() for v in noise(targets, sample, epoch)] for sample in range(150)] for epoch in (0, 1)]
    assert of_epochs[0] == [[v.tolist() for v in noise(targets, sample, 0)] for sample in range(150)]
    drawn = [one for of_epoch in of_epochs for one in of_epoch]
    assert len({json.dumps(one) for one in drawn}) == 300  # another sample, another epoch: other draws
    assert TargetNoise(settings, word_piece, 41, seed=2)(targets, 0, 0)[1].tolist() != drawn[0][1]
    num_tokens = 300 * 41
    masked = sum(i == word_piece.mask_id for _, given in drawn for i in given)
    assert abs(masked / num_tokens - 0.3) < 4 * math.sqrt(0.3 * 0.7 / num_tokens)
    assert all(i in (word_piece.mask_id, t) for _, given in drawn for i, t in zip(given, targets[0], strict=True))
    lengths = Counter(n for turns, _ in drawn for n in [*Counter(turns).values()][:6])  # the last may be cut
    total = lengths.total()
    for length in range(1, 7):
        share = 0.6 if length == 1 else 0.4 / 5
        assert abs(lengths[length] / total - share) < 4 * math.sqrt(share * (1 - share) / total)
    plain = TargetNoise(TargetSettings(), word_piece, 41, seed=1)(targets, 0, 0)
    assert [v.tolist() for v in plain] == [[*range(1, 42)], targets[0]]


# ---- files


def lists(of_tokens: TokenLists) -> list[list[int]]:
    return [ids.tolist() for ids in of_tokens]


def write_forms(folder: Path, tokenizer: Tokenizer) -> list[Path]:
    """The same pairs in every form."""
    pieces = [[[tokenizer.piece(i) for i in tokenizer.encode([text])] for text in pair] for pair in PAIRS]
    rows = [{"src": source, "tgt": target} for source, target in PAIRS]
    lists = [{"src": source, "tgt": target} for source, target in pieces]
    for name, of_file in (("text.jsonl", rows), ("lists.json", lists), ("mixed.jsonl", [rows[0], *lists[1:]])):
        (folder / name).write_text("\n\n".join(map(json.dumps, of_file)) + "\n", "utf-8")
    (folder / "x.tsv").write_text("".join(f"{b}\tx\t{a}\n" for a, b in [("src", "tgt"), *PAIRS]), "utf-8")
    with open(folder / "x.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("src", "tgt"), *PAIRS])
    pq.write_table(pa.Table.from_pylist(rows), folder / "text.parquet")
    pq.write_table(pa.Table.from_pylist(lists), folder / "lists.parquet")
    return sorted(folder.iterdir())


def test_every_form_of_file_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = write_forms(tmp_path, tokenizer)
    assert len(files) == 7
    settings = Seq2SeqSettings(max_source_tokens=30, max_target_tokens=20)
    of_files = [make_examples(tokenizer, read_pairs(path, PairColumns()), settings) for path in files]
    sos, eos = tokenizer.sos_id, tokenizer.eos_id
    for found in of_files:
        assert lists(found.sources) == [[sos, *tokenizer.encode([source]), eos] for source, _ in PAIRS]
        assert lists(found.targets) == [[*tokenizer.encode([target]), eos] for _, target in PAIRS]
        assert found.lengths.tolist() == [
            len(s) + 2 * len(t) - 1 for s, t in zip(found.sources, found.targets, strict=True)
        ]


def test_questions_are_generated_from_paragraph_and_answer(word_piece: Tokenizer, tmp_path: Path) -> None:
    entries = [("a good man in want", "good", "what man?"), ("a truth", "truth", "a what?")]
    (tmp_path / "lines.jsonl").write_text(
        "".join(json.dumps({"paragraph": p, "answer": a, "question": q}) + "\n" for p, a, q in entries), "utf-8"
    )
    qas = [
        {"context": p, "qas": [{"id": q, "question": q, "answers": [{"text": a, "answer_start": p.index(a)}]},
                               {"id": f"no {q}", "question": q, "answers": [], "is_impossible": True}]}
        for p, a, q in entries
    ]  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": qas}]}), "utf-8")
    settings = Seq2SeqSettings(max_source_tokens=40, max_target_tokens=20, question_generation=True)
    found = [
        read_pairs(tmp_path / name, PairColumns(), question_generation=True) for name in ("lines.jsonl", "squad.json")
    ]
    assert [pairs.num_without_answer for pairs in found] == [0, 2]
    sos, eos = word_piece.sos_id, word_piece.eos_id
    for pairs in found:
        examples = make_examples(word_piece, pairs, settings)
        assert lists(examples.sources) == [
            [sos, *word_piece.encode([p]), eos, *word_piece.encode([a]), eos] for p, a, _ in entries
        ]
        assert lists(examples.targets) == [[*word_piece.encode([q]), eos] for _, _, q in entries]


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [((9,), 9, (9,)), ((10,), 9, (9,)), ((10, 2), 9, (7, 2)), ((2, 10), 9, (2, 7)), ((10, 10), 9, (5, 4)), ((4, 5), 9, (4, 5)), ((0, 12), 9, (0, 9))],
)  # fmt: skip
def test_the_longest_part_of_a_source_is_cut(
    lengths: tuple[int, ...], room: int, kept: tuple[int, ...], word_piece: Tokenizer
) -> None:
    parts = [[100 * number + i for i in range(length)] for number, length in enumerate(lengths, start=1)]
    ids, num_cut = source_ids(word_piece, parts, room + 1 + len(parts))
    expected = [word_piece.sos_id]
    for part, number in zip(parts, kept, strict=True):
        expected += [*part[:number], word_piece.eos_id]
    assert sorted(map(len, "".join("e" if i == word_piece.eos_id else "x" for i in ids[1:]).split("e")[:-1])) == sorted(
        kept
    )
    assert num_cut == sum(lengths) - sum(kept)
    assert kept == (5, 4) or ids == expected
    assert target_ids(word_piece, [7, 8, 9], 3) == ([7, 8, word_piece.eos_id], 1)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.jsonl", '{"src": "a", "tgt": "b"}\n{"src": "a"', ["t.jsonl: line 2: not valid JSON"]),
        ("t.jsonl", '{"src": "a", "tgt": "b"}\n\n{"src": "a", "target": "b"}', ["t.jsonl: line 3", "'tgt'", "src, target"]),
        ("t.jsonl", '{"src": {"x": 1}, "tgt": "b"}', ["t.jsonl: line 1: src is", "a list of tokens"]),
        ("t.jsonl", '{"src": ["a", 2], "tgt": "b"}', ["t.jsonl: line 1: src is", "a list of tokens"]),
        ("t.jsonl", "", ["t.jsonl: has no rows"]),
        ("t.jsonl", '{"src": " ", "tgt": "b"}', ["none of its 1 pairs has both a source and a target"]),
        ("t.tsv", "src\ttgt\na\tb\nc\n", ["t.tsv: line 3: has 1 fields, expected 2"]),
        ("t.txt", "a", ["t.txt: expected a file that ends in"]),
        ("t.parquet", "PAR1", ["t.parquet: not a complete Parquet file"]),
        ("t.jsonl", '{"src": ["qqqq", "zzzz"], "tgt": ["a"]}', ["t.jsonl: 2 of 2 tokens are no entries", "another tokenizer"]),
    ],
)  # fmt: skip
def test_bad_files_are_told(
    name: str, content: str, words: list[str], word_piece: Tokenizer, command: Command, tmp_path: Path
) -> None:
    write_export(tmp_path / "weights", stored(word_piece))
    (tmp_path / name).write_text(content, "utf-8")
    status, _, err = command(
        "seq2seq", "--weights", tmp_path / "weights", "--output", tmp_path / "run", "--train_file", tmp_path / name,
        "--validation_file", tmp_path / name, "--max_source_tokens", 24, "--max_target_tokens", 16,
    )  # fmt: skip
    assert status == 2
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_tokens_that_name_the_unknown_are_known(tokenizer: Tokenizer) -> None:
    unknown, letter = tokenizer.piece(tokenizer.unk_id), tokenizer.piece(int(tokenizer.normal_ids[20]))
    assert TextEncoder(tokenizer).ids([[unknown, unknown, letter]]) == [
        [tokenizer.unk_id] * 2 + [int(tokenizer.normal_ids[20])]
    ]
    assert [tokenizer.id_of_piece(tokenizer.piece(i)) for i in range(tokenizer.vocab_size)] == [
        *range(tokenizer.vocab_size)
    ]
    assert tokenizer.id_of_piece("no such entry") == tokenizer.unk_id


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--label_smoothing", "1"], "label_smoothing is 1.0"), (["--target_mask_prob", "-1"], "target_mask_prob is -1.0"),
        (["--max_source_tokens", "2"], "max_source_tokens is 2"), (["--best_by", "rouge_l", "--generated_pairs", "0"], "--best_by"),
    ],
)  # fmt: skip
def test_impossible_settings_are_told(words: list[str], part: str, command: Command, tmp_path: Path) -> None:
    files = ["--train_file", tmp_path / "x.jsonl", "--validation_file", tmp_path / "x.jsonl"]
    status, _, err = command("seq2seq", "--weights", tmp_path, *files, *words)
    assert status == 2
    assert part in err


def test_recipes_are_the_papers() -> None:
    """The rows of PAPER.md, in its order: CNN/DailyMail | XSum | question generation."""
    names = ("learning_rate", "batch_size", "epochs", "warmup", "max_source_tokens", "max_target_tokens", "length_penalty", "num_beams")  # fmt: skip
    rows = {
        "cnndm": (7e-5, 64, 14, 0.02, 608, 160, 0.7, 5), "xsum": (7e-5, 64, 14, 0.02, 720, 48, 0.6, 5),
        "qg": (2e-5, 48, 16, 0.1, 464, 48, 1.3, 8),
    }  # fmt: skip
    needed = ["seq2seq", "--weights", "w", "--train_file", "t", "--validation_file", "v"]
    for recipe, expected in rows.items():
        args = parse([*needed, "--recipe", recipe])
        assert tuple(getattr(args, name) for name in names) == expected
        assert args.label_smoothing == 0.1
        assert args.question_generation == (recipe == "qg")
        assert args.released_length_penalty
    assert 0.7 <= parse([*needed, "--recipe", "cnndm"]).target_mask_prob <= 0.8
    assert 0.4 <= parse([*needed, "--recipe", "xsum"]).target_mask_prob <= 0.5
    args = parse(["seq2seq", "--num-beams", "3", *needed[1:], "--recipe", "qg", "--epochs", "2"])
    assert (args.num_beams, args.epochs, args.batch_size) == (3, 2, 48)


# ---- learning


@pytest.fixture(scope="session")
def copying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights/ and pairs.jsonl: names to be copied."""
    folder = tmp_path_factory.mktemp("copying")
    lines = (REPOSITORY / "sample_corpus" / "pride_and_prejudice" / "chapter_01.txt").read_text("utf-8").splitlines()
    tokenizer = train_tokenizer(lines, folder / "t.model", vocab_size=150)
    write_export(folder / "weights", stored(tokenizer, initializer_range=0.05, hidden_size=48, dropout=0.0))
    words = sorted({*re.findall(r"[a-z]{5,8}", " ".join(lines))})[:16]
    rows = [{"src": word, "tgt": word} for word in words]
    (folder / "pairs.jsonl").write_text(
        "".join(map("{}\n".format, map(json.dumps, [*rows, {"src": "", "tgt": "x"}]))), "utf-8"
    )
    return folder


def copy_words(folder: Path, run: Path, *words: object) -> list[Any]:
    return [
        "seq2seq", "--weights", folder / "weights", "--output", run, "--train_file", folder / "pairs.jsonl", "--validation_file",
        folder / "pairs.jsonl", "--max_source_tokens", 12, "--max_target_tokens", 10, "--learning_rate", 5e-3, "--batch_size", 16, "--micro_batch_size", 16,
        "--epochs", 80, "--eval_steps", 40, "--generated_pairs", 16, "--num_beams", 2, *words,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def copied(copying: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run = tmp_path_factory.mktemp("copied") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune", *map(str, copy_words(copying, run, "--target_mask_prob", 0.2, "--best_by", "rouge_l"))])  # fmt: skip
        assert main() == 0
    return run


@pytest.mark.slow
def test_a_tiny_model_learns_to_copy(copied: Path, copying: Path) -> None:
    values = json.loads((copied / "summary.json").read_text())["validation"]
    assert values["token_accuracy"] > 0.95
    assert values["exact_match"] > 90
    assert values["score"] == values["rouge_l"]
    rows = [json.loads(line) for line in (copied / "model" / "written.jsonl").read_text("utf-8").splitlines()]
    words = [json.loads(line)["src"] for line in (copying / "pairs.jsonl").read_text("utf-8").splitlines()[:-1]]
    assert sorted(row["tgt"] for row in rows) == words
    assert 100 * sum(row["tgt"] == row["text"] for row in rows) / 16 == values["exact_match"]
    model, tokenizer, settings = load_seq2seq(copied)
    assert settings == Seq2SeqSettings(12, 10, num_beams=2)
    search = settings.search()
    for row in rows[:3]:
        source, _ = source_ids(tokenizer, [tokenizer.encode([row["src"]]).tolist()], settings.max_source_tokens)
        with torch.no_grad():
            (found,) = decode(model, Rules.of(tokenizer, search), [source], search)
        assert tokenizer.decode(found.hypotheses[0].tokens) == row["text"]


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_bit(
    copied: Path, copying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """Also what is drawn of targets."""
    from finetune import trainer

    class Interrupting(trainer.Trainer):
        def _step(self) -> tuple[float, float]:
            if self._progress.step == 50:
                raise KeyboardInterrupt
            return super()._step()

    words = copy_words(copying, tmp_path / "run", "--target_mask_prob", 0.2, "--best_by", "rouge_l")
    with monkeypatch.context() as patch:
        patch.setattr("finetune.runs.Trainer", Interrupting)
        status, _, err = command(*words)
    assert status == 130
    assert "1 of 17 pairs are left out: their source or target is empty (the first:" in err
    assert "pairs.jsonl: line 17)" in err
    status, _, err = command(*words[:-1], "exact_match")
    assert status == 2
    assert "best_by 'rouge_l', now 'exact_match'" in err
    assert command(*words)[0] == 0
    expected = load_file(copied / "model" / "model.safetensors")
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.heavy
def test_launchers_train_what_one_process_does(copying: Path, command: Command, tmp_path: Path) -> None:
    """torchrun, and DeepSpeed's launcher with ZeRO-2: the same weights but for the rounding of sums."""
    few = ("--epochs", 12, "--eval_steps", 12, "--micro_batch_size", 4, "--learning_rate", 1e-3)
    assert command(*copy_words(copying, tmp_path / "one", *few))[0] == 0
    expected = load_file(tmp_path / "one" / "model" / "model.safetensors")
    for name, launcher, more in (
        ("torchrun", ["torchrun", "--standalone", "--nproc_per_node", "2", "-m"], ()),
        ("deepspeed", ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "--module"], ("--deepspeed_config", "ds_configs/zero2_finetune.json")),
    ):  # fmt: skip
        done = run_command([*launcher, "finetune", *map(str, copy_words(copying, tmp_path / name, *few, *more))])
        assert done.returncode == 0, done.stderr
        found = load_file(tmp_path / name / "model" / "model.safetensors")
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-4)


def test_what_is_cut_is_told(copying: Path, command: Command, tmp_path: Path) -> None:
    words = copy_words(copying, tmp_path / "run", "--epochs", 1, "--generated_pairs", 0)
    words[words.index("--max_source_tokens") + 1], words[words.index("--max_target_tokens") + 1] = 8, 3
    status, _, err = command(*words)
    assert status == 0, err
    tokenizer = load_seq2seq(tmp_path / "run")[1]
    lengths = [len(tokenizer.encode([json.loads(line)["src"]])) for line in (copying / "pairs.jsonl").read_text("utf-8").splitlines()[:-1]]  # fmt: skip
    cut = [length - 6 for length in lengths if length > 6]
    sources = f"{len(cut)} sources are cut to --max_source_tokens 8, {sum(cut)} tokens in all"
    targets = f"{sum(length > 2 for length in lengths)} targets are cut to --max_target_tokens 3"
    assert err.count(f"pairs.jsonl: 16 pairs; {sources}; {targets}") == 1


def test_a_folder_with_another_tokenizer_is_refused(copied: Path, sentence_piece: Tokenizer, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((copied / "model" / name).read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(sentence_piece.path.read_bytes())
    with pytest.raises(ValueError, match=r"tokenizer\.model: not the tokenizer this model was trained with"):
        load_seq2seq(tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lower_precision_writes_the_same_texts(
    precision: str, copied: Path, copying: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.device.Speeds.missing", lambda self, precision: None)
    rows = {}
    words = ["generate", "--model", copied, "--input", copying / "pairs.jsonl"]
    for one in ("fp32", precision):
        output = tmp_path / f"{one}.jsonl"
        status, _, err = command(*words, "--output", output, "--precision", one)
        assert status == 0, err
        rows[one] = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert sum(a["text"] == b["text"] for a, b in zip(*rows.values(), strict=True)) >= 0.99 * len(rows["fp32"])
    assert [row["score"] for row in rows["fp32"]] != [row["score"] for row in rows[precision]]
    status, _, err = command(*words, "--output", tmp_path / "fp32.jsonl", "--precision", precision)
    assert status == 2
    assert f"precision 'fp32', now '{precision}'" in err
    status, text, _ = command("generate", "--model", copied, "--text", "acknowledged", "--precision", precision)
    assert (status, text.count("\n")) == (0, 1)
