"""Each number against its plain definition, on small data sets."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import RECIPES

from data_prep.__main__ import make_parser
from data_prep.corpus import Document, find_sources, read_documents
from data_prep.files import write_manifest
from data_prep.processes import LocalProcesses
from data_prep.recipe import read_recipe
from data_prep.shards import FORMAT, MANIFEST, SPLITS, VERSION, DataSet, Split, find_faults
from data_prep.stats import Measured, measure
from data_prep.stats_figure import draw
from data_prep.stats_summary import FREQUENT, describe, summarize
from data_prep.text_counts import TextCounts
from data_prep.tokenizer import Tokenizer


def measured_of(folder: Path, recipe: Path | None = None, **settings: Any) -> Measured:
    with LocalProcesses(1) as processes:
        return measure(DataSet(folder), recipe and read_recipe(recipe), processes, **settings)


@pytest.fixture(scope="module")
def measured(data_folder: Path) -> Measured:
    return measured_of(data_folder)


@pytest.fixture(scope="module")
def summary(measured: Measured) -> dict[str, Any]:
    return summarize(measured)


@pytest.fixture(scope="module")
def documents(chapters: list[Path]) -> list[Document]:
    """Those of the data set."""
    return list(read_documents(find_sources(chapters[:9])))


@pytest.fixture(scope="module")
def repetitive(build_data: Callable[..., bool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of documents that begin alike and of whole copies, so that samples occur again in both splits."""
    folder = tmp_path_factory.mktemp("repetitive")
    texts = [
        "It is a truth universally acknowledged, that a single man must be in want of a wife. " * (1 + i % 5)
        + "Alas! " * i
        + "What is his name? Bingley. " * (i % 9 == 0)
        for i in range(40)
    ]
    lines = [json.dumps({"text": text}) for text in [*texts, *texts[:7], *texts[:3]]]
    (folder / "a.jsonl").write_text("\n".join(lines))
    assert build_data([folder / "a.jsonl"], folder / "data", validation_fraction=0.4)
    return folder / "data"


def texts_of(folder: Path, split: Split) -> list[bytes]:
    """The text of each sample of a split, without special tokens."""
    data = DataSet(folder)
    tokenizer = data.tokenizer
    tokens_BL = data.read_samples(split, 0, data.num_samples(split)).tokens_BL
    return [row[~np.isin(row, [tokenizer.sos_id, tokenizer.eos_id, tokenizer.pad_id])].tobytes() for row in tokens_BL]


def test_tokens_are_those_of_the_documents(
    summary: dict[str, Any], documents: list[Document], tokenizer: Tokenizer, data_folder: Path
) -> None:
    counts = Counter(token_id for document in documents for token_id in tokenizer.encode(document.lines).tolist())
    num_samples = sum(len(texts_of(data_folder, split)) for split in SPLITS)
    assert counts[tokenizer.unk_id] > 0
    assert summary["tokens"] == {
        "text": counts.total(),
        "special": 3 * num_samples,
        "unknown": counts[tokenizer.unk_id],
        "unknown_share": counts[tokenizer.unk_id] / counts.total(),
    }


def test_vocabulary(repetitive: Path, tokenizer: Tokenizer) -> None:
    documents = read_documents(find_sources([repetitive.parent / "a.jsonl"]))
    counts = Counter(token_id for document in documents for token_id in tokenizer.encode(document.lines).tolist())
    entries = len(tokenizer.normal_ids)
    assert entries == tokenizer.vocab_size - 5
    vocabulary = summarize(measured_of(repetitive))["vocabulary"]
    assert (vocabulary["entries"], vocabulary["seen"], vocabulary["never_seen"]) == (
        entries, len(counts), entries - len(counts)
    )  # fmt: skip
    assert vocabulary["never_seen"] > 0
    frequent = sum(count >= 100 for count in counts.values())
    assert 0 < frequent < len(counts)
    assert (vocabulary["frequent"], FREQUENT) == (frequent, 100)
    assert vocabulary["frequent_share"] == frequent / entries
    assert vocabulary["seen_share"] == len(counts) / entries
    by_piece = {tokenizer.piece(token_id): count for token_id, count in counts.items()}
    for name, expected in (
        ("most_frequent", sorted(counts.values())[:-11:-1]),
        ("rarest", sorted(counts.values())[:10]),
    ):
        assert list(vocabulary[name].values()) == expected
        assert vocabulary[name].items() <= by_piece.items()
    assert not set(vocabulary["never_seen_examples"]) & by_piece.keys()
    assert len(vocabulary["never_seen_examples"]) == min(10, vocabulary["never_seen"])


def test_bytes_and_lengths_of_documents(
    summary: dict[str, Any], documents: list[Document], chapters: list[Path], tokenizer: Tokenizer
) -> None:
    lengths = [len(tokenizer.encode(document.lines)) for document in documents]
    lines = [[line.strip() for line in chapter.read_text("utf-8").split("\n")] for chapter in chapters[:9]]
    num_bytes = sum(len("\n".join(line for line in of_file if line).encode()) for of_file in lines)
    assert num_bytes > sum(len(line) for of_file in lines for line in of_file), "some characters are not ASCII"
    assert summary["text"] == {
        "num_bytes": num_bytes, "num_tokens": sum(lengths), "bytes_per_token": num_bytes / sum(lengths)
    }  # fmt: skip
    first_three_bits = [int(f"{length:b}"[:3].ljust(length.bit_length(), "0"), 2) for length in lengths]
    expected = {str(length): count for length, count in sorted(Counter(first_three_bits).items())}
    assert list(summary["document_lengths_tokens"].items()) == list(expected.items())


def test_lengths_of_samples(summary: dict[str, Any], data_folder: Path) -> None:
    lengths = Counter(str(len(text) // 2 + 3) for split in SPLITS for text in texts_of(data_folder, split))
    assert summary["sample_lengths_tokens"] == lengths
    sizes = summary["splits"]
    assert sum(lengths.values()) == sizes["train"]["num_samples"] + sizes["validation"]["num_samples"]


def test_duplicates(repetitive: Path) -> None:
    train, validation = (Counter(texts_of(repetitive, split)) for split in SPLITS)
    both = train + validation
    repeated = sum(count for count in both.values() if count > 1)
    in_train = sum(count for text, count in validation.items() if text in train)
    assert 0 < repeated < both.total()
    assert 0 < in_train < validation.total()
    assert summarize(measured_of(repetitive))["duplicates"] == {
        "repeated_share": repeated / both.total(),
        "surplus_share": (both.total() - len(both)) / both.total(),
        "validation_in_train_share": in_train / validation.total(),
        "measured_on_share_of_texts": 1.0,
    }


def test_duplicates_are_estimated_in_bounded_memory(repetitive: Path) -> None:
    few = measured_of(repetitive, max_hashes=10)
    assert len(few.texts.hashes_H) <= 10
    assert few.texts.share < 1
    words = next(line for line in describe(few) if line.startswith("duplicates: "))
    assert f"estimated from {few.texts.share:.2%} of the texts" in words


def counted(hashes: np.ndarray, counts: np.ndarray, order: np.ndarray, max_hashes: int, parts: int = 7) -> TextCounts:
    """Each of the texts as often as its count says, in this order."""
    texts = TextCounts(max_hashes)
    for part in np.array_split(np.repeat(hashes, counts)[order], parts):
        texts.add("train", *np.unique(part, return_counts=True))
        if parts > 2:
            texts.settle()
    texts.settle()
    return texts


def test_the_estimate_is_right_on_average() -> None:
    random = np.random.default_rng(0)
    counts = random.choice([1, 1, 1, 2, 5], size=2_000)
    truth = {
        "repeated_share": counts[counts > 1].sum() / counts.sum(),
        "surplus_share": (counts - 1).sum() / counts.sum(),
    }
    estimates: dict[str, list[float]] = {name: [] for name in truth}
    for _ in range(300):
        hashes = random.integers(0, 2**64, len(counts), dtype=np.uint64)
        texts = counted(hashes, counts, random.permutation(counts.sum()), max_hashes=200)
        assert 0 < len(texts.hashes_H) <= 200
        assert texts.share in (1 / 16, 1 / 32)
        found = texts.summarize()
        for name, values in estimates.items():
            values.append(found[name])
    for name, values in estimates.items():
        assert 0.005 < np.std(values) < 0.1
        assert abs(np.mean(values) - truth[name]) < 4 * np.std(values) / sqrt(len(values)), name


def test_the_order_of_texts_does_not_matter() -> None:
    random = np.random.default_rng(1)
    hashes = random.integers(0, 2**64, 500, dtype=np.uint64)
    counts = random.integers(1, 4, 500)
    found = [counted(hashes, counts, random.permutation(counts.sum()), 100, parts) for parts in (1, 2, 50)]
    plain = sorted((h, c) for h, c in zip(hashes.tolist(), counts.tolist(), strict=True) if h < found[0].share * 2**64)
    for texts in found:
        assert texts.share == found[0].share
        assert list(zip(texts.hashes_H.tolist(), texts.counts_HS[:, 0].tolist(), strict=True)) == plain
        assert not texts.counts_HS[:, 1].any()


@pytest.fixture(scope="module")
def falling(chapters: list[Path], build_data: Callable[..., bool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose mask rate falls over three mask sets, with other blocks than the paper's."""
    folder = tmp_path_factory.mktemp("falling") / "data"
    masks = {"mask_sets": 3, "mask_rate": "0.4:0.1", "block_share": 0.7, "block_lengths": "3:5"}
    assert build_data(chapters[:9], folder, validation_fraction=0.2, **masks)
    return folder


@pytest.mark.parametrize("fixture", ["data_folder", "falling"])
def test_masks_are_those_of_the_samples(fixture: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(fixture)
    data, masks = DataSet(folder), summarize(measured_of(folder))["masks"]
    special = set(data.tokenizer.special_ids.tolist())
    num_maskable = sum(token not in special for split in SPLITS for text in texts_of(folder, split)
                       for token in np.frombuffer(text, np.uint16).tolist())  # fmt: skip
    num_masked = [0] * data.num_mask_sets
    lengths = Counter[int]()
    for split in SPLITS:
        for mask_set in range(data.num_mask_sets):
            for turns in data.read_samples(split, 0, data.num_samples(split), mask_set).turns_BP.tolist():
                num_masked[mask_set] += sum(turn > 0 for turn in turns)
                if mask_set == 0:
                    lengths.update(Counter(turn for turn in turns if turn).values())
    num_blocks = lengths.total() - lengths[1]
    assert masks == {
        "rates": [0.15] * 2 if fixture == "data_folder" else [0.4, 0.25, 0.1],
        "masked_shares": [n / num_maskable for n in num_masked],
        "turn_lengths_tokens": {str(length): lengths[length] for length in sorted(lengths)},
        "block_share_of_turns": num_blocks / lengths.total(),
        "block_share_of_tokens": 1 - lengths[1] / num_masked[0],
    }
    assert masks["masked_shares"] == pytest.approx(masks["rates"], abs=0.005)


def test_rates_of_a_data_set_are_told(data_folder: Path, falling: Path) -> None:
    for folder, told in ((data_folder, r"masks: 1[45]\.\d\d% of the tokens of text; "),
                         (falling, r"masks: (40|39)\.\d\d%, 2[45]\.\d\d%, (10|9)\.\d\d% \(by mask set\) of the tokens of text; ")):  # fmt: skip
        line = next(line for line in describe(measured_of(folder)) if line.startswith("masks: "))
        assert re.match(told + r"[\d.]+% of the turns are blocks, with [\d.]+% of the masked tokens$", line), line


@pytest.mark.parametrize("steps", [1, 9, 30, 77, 200])
def test_epochs_of_each_set_where_the_rate_falls(falling: Path, tmp_path: Path, steps: int) -> None:
    recipe = tmp_path / "ds.json"
    recipe.write_text(json.dumps({"train_batch_size": 32, "scheduler": {"params": {"total_num_steps": steps}}}))
    num_samples = DataSet(falling).num_samples("train")
    uses = summarize(measured_of(falling, recipe))["recipe"]["epochs_of_each_mask_set"]
    num_epochs = ceil(32 * steps / num_samples)
    sets = [3 * (sample // num_samples) // num_epochs for sample in range(32 * steps)]
    assert uses == pytest.approx([sets.count(k) / num_samples for k in range(3)])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_epochs_of_a_shipped_recipe(data_folder: Path, measured: Measured, path: Path) -> None:
    values = json.loads(path.read_text())
    steps = values["scheduler"]["params"]["total_num_steps"]
    num_samples = len(texts_of(data_folder, "train"))
    num_tokens = sum(len(text) // 2 for text in texts_of(data_folder, "train"))
    seen = values["train_batch_size"] * steps
    recipe = summarize(Measured(**vars(measured) | {"recipe": read_recipe(path)}))["recipe"]
    uses = recipe.pop("epochs_of_each_mask_set")
    assert recipe == {
        "deepspeed_config": str(path), "train_batch_size": values["train_batch_size"], "total_num_steps": steps,
        "samples": seen, "text_tokens": round(num_tokens * seen / num_samples), "epochs": seen / num_samples,
    }  # fmt: skip
    assert len(uses) == 2
    assert sum(uses) == pytest.approx(seen / num_samples)
    assert 0 <= uses[0] - uses[1] <= 1
    if seen < 10**6:
        epochs = np.arange(seen) // num_samples
        assert uses == pytest.approx([(epochs % 2 == k).sum() / num_samples for k in range(2)])


@pytest.mark.parametrize(("steps", "words"), [(1, "no sample twice with the same masks"), (2_000, "up to {} times")])
def test_how_often_the_same_masks_are_seen(data_folder: Path, tmp_path: Path, steps: int, words: str) -> None:
    recipe = tmp_path / "ds.json"
    recipe.write_text(json.dumps({"train_batch_size": 8, "scheduler": {"params": {"total_num_steps": steps}}}))
    line = next(line for line in describe(measured_of(data_folder, recipe)) if line.startswith(str(recipe)))
    epochs = 8 * steps / len(texts_of(data_folder, "train"))
    assert words.format(ceil(ceil(epochs) / 2)) in line
    assert f"are {epochs:,.2f} epochs" in line


@pytest.mark.parametrize(
    ("content", "faults"),
    [
        ("{}", ["train_batch_size is missing", "scheduler.params.total_num_steps is missing"]),
        ('{"train_batch_size": 8, "scheduler": {"params": {}}}', ["scheduler.params.total_num_steps is missing"]),
        ('{"train_batch_size": 0, "scheduler": {"params": {"total_num_steps": "9"}}}',
         ["train_batch_size: expected a whole number of at least 1, found 0", "total_num_steps: expected a whole number"]),
        ('{"train_batch_size": true, "scheduler": 3}', ["found True", "scheduler.params.total_num_steps is missing"]),
        ("[1]", ["train_batch_size is missing", "scheduler.params.total_num_steps is missing"]),
        ('{"train_batch_size":', ["line 1: not valid JSON"]),
    ],
)  # fmt: skip
def test_a_bad_recipe(tmp_path: Path, content: str, faults: list[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="^" + str(path)) as failure:
        read_recipe(path)
    parts = str(failure.value).split("; ")
    assert len(parts) == len(faults)
    for part, fault in zip(parts, faults, strict=True):
        assert fault in part


def test_no_recipe_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such DeepSpeed configuration"):
        read_recipe(tmp_path / "ds.json")


def test_a_data_set_whose_text_was_not_counted(data_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data_folder, tmp_path / "old"))
    manifest = {k: v for k, v in DataSet(folder).manifest.items() if k not in ("text", "format", "version")}
    write_manifest(folder / MANIFEST, FORMAT, VERSION, manifest)
    with pytest.raises(ValueError, match=f"^{folder}: made by an older version, .*; build it anew"):
        measured_of(folder)


# ---- the figure and the command


def drawn_pixels(path: Path) -> list[float]:
    """The share of coloured pixels of each third of the figure."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert 1000 < image.width < 3000
        assert 300 < image.height < 1500
        pixels = np.asarray(image.convert("RGB")).astype(int)
    is_coloured = np.ptp(pixels, axis=2) > 30
    return [float(third.mean()) for third in np.array_split(is_coloured, 3, axis=1)]


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", ["chaise " * 500, "☃ " * 500], ids=["one word", "nothing known"])
def test_a_strange_corpus_can_be_told_and_drawn(build_data: Callable[..., bool], tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    build_data([tmp_path / "a.txt"], tmp_path / "data", validation_fraction=0)
    measured = measured_of(tmp_path / "data")
    words = "\n".join(describe(measured))
    assert "nan" not in words
    assert "None" not in words
    draw(measured, tmp_path / "figures" / "figure.png")
    coloured = drawn_pixels(tmp_path / "figures" / "figure.png")
    assert coloured[0] > 0.005
    assert coloured[1] > 0.05


def run_stats(*words: object) -> None:
    """The command, in this process."""
    args = make_parser().parse_args(["stats", *map(str, words)])
    args.run(args)


@pytest.mark.slow
def test_the_command_tells_and_draws_beside_the_data(
    data_folder: Path, tmp_path: Path, build_data: Callable[..., bool], chapters: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(data_folder, tmp_path / "data"))
    run_stats("--data", folder, "--deepspeed-config", RECIPES[0], "--workers", 1)
    told = capsys.readouterr()
    assert told.err == ""
    assert told.out.endswith(f"\nfigure: {folder / 'stats.png'}\n")
    for words in ("text: ", "tokens: ", "vocabulary: ", "duplicates: 0.00% ", f"{RECIPES[0]}: ", "all texts compared"):
        assert words in told.out
    table = [line.split() for line in told.out.partition("length in tokens")[2].splitlines()[1:-1]]
    num_documents = sum(int(row[3].replace(",", "")) for row in table)
    num_samples = sum(int(row[5].replace(",", "")) for row in table)
    assert (num_documents, num_samples) == (9, sum(len(texts_of(folder, split)) for split in SPLITS))
    assert min(drawn_pixels(folder / "stats.png")) > 0.001
    assert list(find_faults(folder)) == []
    assert not build_data(chapters[:9], folder, mask_sets=2, validation_fraction=0.2)


@pytest.mark.slow
def test_json_by_two_processes(
    data_folder: Path, summary: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(data_folder.iterdir())
    run_stats("--data", data_folder, "--json", "--output", tmp_path / "x.png", "--workers", 2)
    assert json.loads(capsys.readouterr().out) == read_json_of(summary)
    assert sorted(data_folder.iterdir()) == before
    assert min(drawn_pixels(tmp_path / "x.png")) > 0.001


def read_json_of(value: dict[str, Any]) -> Any:
    return json.loads(json.dumps(value))


def test_a_figure_of_another_kind_is_refused(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--output .*figure.pdf: .* ends in .png"):
        run_stats("--data", data_folder, "--output", tmp_path / "figure.pdf")
    assert list(tmp_path.iterdir()) == []
