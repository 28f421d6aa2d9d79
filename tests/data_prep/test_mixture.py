"""Several corpora in one data set: what their file may say, how often each is seen, which text a sample is made of."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from itertools import groupby
from math import floor
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.build import WORK
from data_prep.corpus import ReadSettings, plan_units, read_documents
from data_prep.inputs import SOURCE_LIST
from data_prep.mixture import Corpus, TextOrder, epochs_of, read_mixture, sources_of
from data_prep.shards import MANIFEST, DataSet, find_faults
from data_prep.tokenizer import Tokenizer, train_tokenizer

Build = Callable[..., bool]
CommandLine = Callable[..., subprocess.CompletedProcess[str]]


def write_mixture(path: Path, *corpora: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"corpora": list(corpora)}))
    return path


@pytest.fixture
def novel_and_dictionary(sample_corpus: Path, chapters: list[Path], tmp_path: Path) -> Path:
    """Six chapters of a novel x 2.5, and 300 entries of a dictionary; the files have the same names."""
    entries = (sample_corpus / "devils_dictionary.jsonl").read_text().splitlines()[:300]
    for name, texts in (
        ("novel", [c.read_text() for c in chapters[:6]]),
        ("words", [json.loads(e)["text"] for e in entries]),
    ):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"body" if name == "novel" else "text": text}) for text in texts]
        (tmp_path / name / "a.jsonl").write_text("\n".join(lines[:3]))
        (tmp_path / name / "b.jsonl").write_text("\n".join(lines[3:]))
    novel = {"name": "novel", "paths": "novel/", "text_field": "body", "epochs": 2.5}
    return write_mixture(tmp_path / "mixture.yaml", novel, {"name": "words", "paths": ["words/a.jsonl", "words/b*"]})


# ---- the file


def test_what_a_corpus_does_not_say_the_flags_do(tmp_path: Path) -> None:
    path = write_mixture(
        tmp_path / "texts" / "mixture.yaml",
        {"name": "wikipedia", "paths": ["wiki/*.gz", "/more"], "text_field": "body", "epochs": 0.7},
        {"name": "books", "paths": "books", "document_per": "file"},
    )
    assert read_mixture(path, ReadSettings("blank_line", "content")) == [
        Corpus([tmp_path / "texts/wiki/*.gz", Path("/more")], ReadSettings("blank_line", "body"), "wikipedia", Fraction(7, 10)),
        Corpus([tmp_path / "texts/books"], ReadSettings("file", "content"), "books"),
    ]  # fmt: skip


def test_every_setting_of_reading_can_be_given_to_a_corpus(tmp_path: Path) -> None:
    settings = {"document_per": "blank_line", "text_field": "body"}
    assert set(settings) == {field.name for field in fields(ReadSettings)}
    (corpus,) = read_mixture(write_mixture(tmp_path / "m.yaml", {"name": "a", "paths": "a", **settings}))
    assert corpus.reading == ReadSettings(**settings)  # type: ignore[arg-type]


def test_all_faults_are_in_one_message(tmp_path: Path) -> None:
    path = write_mixture(
        tmp_path / "m.yaml",
        {"name": "a", "paths": [], "epoch": 2, "document_per": "line", "text_field": 3},
        {"paths": ["x", 1], "epochs": 0},
        {"name": 2020, "paths": "x", "epochs": True, "weight": "1e3"},
        {"name": "a", "paths": "x", "weight": float("nan")},
        {"name": "b", "weight": -0.5, "epochs": float("inf")},
    )
    with pytest.raises(ValueError, match="expected") as failure:
        read_mixture(path)
    head, separator, faults = str(failure.value).partition(": ")
    assert (head, separator) == (str(path), ": ")
    assert faults.split("; ") == [
        "corpus a: unknown key epoch, expected name, paths, document_per, text_field, epochs, weight",
        "corpus a: paths is [], expected a path or several",
        "corpus a: document_per is 'line', expected file or blank_line",
        "corpus a: text_field is 3, expected a text",
        "corpus a: has no weight as others have: give every corpus one, or none",
        "corpus a: there are several of this name",
        "corpus number 2: has no name",
        "corpus number 2: paths is ['x', 1], expected a path or several",
        "corpus number 2: epochs is 0, expected a number above 0 and up to 10,000",
        "corpus number 2: has epochs where there are weights: give every corpus a weight, or none",
        "corpus number 3: name is 2020, expected a text",
        "corpus number 3: epochs is True, expected a number above 0 and up to 10,000",
        "corpus number 3: weight is '1e3', expected a number above 0",
        "corpus number 3: has epochs where there are weights: give every corpus a weight, or none",
        "corpus a: weight is nan, expected a number above 0",
        "corpus b: has no paths",
        "corpus b: epochs is inf, expected a number above 0 and up to 10,000",
        "corpus b: weight is -0.5, expected a number above 0",
        "corpus b: has epochs where there are weights: give every corpus a weight, or none",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("corpora: [", "not valid YAML .*line 1"),
        ("corpora:\n- name: a\n  paths: a\n  epochs: 1\n  epochs: 2\n", "not valid YAML .*key epochs is given twice.*line 2"),
        ("", 'expected one key, "corpora"'),
        ("corpora: []", 'expected one key, "corpora"'),
        ("corpora: [wiki]", 'expected one key, "corpora"'),
        ("corpora: [{name: a, paths: a}]\nseed: 1", 'expected one key, "corpora"'),
        ("- name: a\n  paths: a", 'expected one key, "corpora"'),
        ("\0", "not valid YAML"),
        ("corpora: !!python/object:os.system {}", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_file_that_names_no_corpora(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"^{path}: {message}"):
        read_mixture(path)


# ---- how often each is seen


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(1e-3, 1e3)), min_size=1, max_size=6))
def test_weights_are_the_shares_and_no_text_is_left_out(corpora: list[tuple[int, float]]) -> None:
    sizes, weights = zip(*corpora, strict=True)
    epochs = epochs_of([Corpus([], weight=Fraction(weight)) for weight in weights], sizes)
    samples = [size * often for size, often in zip(sizes, epochs, strict=True)]
    assert [count / sum(samples) for count in samples] == [Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    assert min(epochs) == 1


def test_weights_that_make_too_many_samples() -> None:
    epochs = epochs_of([Corpus([], weight=Fraction(weight)) for weight in (1e300, 1)], [10, 10])
    with pytest.raises(
        ValueError, match=r"weights make 1e\+301 samples, epochs of the corpora: 1e\+300, 1; choose smaller"
    ):
        TextOrder([10, 10], [0, 1], epochs)


def test_a_corpus_without_text_has_no_epochs() -> None:
    with pytest.raises(ValueError, match="empty, b: the corpus is empty"):
        epochs_of([Corpus([Path("a")]), Corpus([Path("empty/"), Path("b")])], [5, 0])


def plain_order(num_texts: list[int], corpora: list[int], epochs: list[Fraction]) -> list[tuple[int, int]]:
    """What TextOrder says it does, text by text."""
    order = []
    for corpus, often in enumerate(epochs):
        texts = [(u, i) for u, n in enumerate(num_texts) if corpora[u] == corpus for i in range(n)]
        part = often - floor(often)
        order += texts * floor(often)
        order += [text for j, text in enumerate(texts) if floor((j + 1) * part) > floor(j * part)]
    return order


@st.composite
def orders(draw: st.DrawFn) -> tuple[list[int], list[int], list[Fraction]]:
    """Units of up to five corpora, some of them empty, gone through up to four times."""
    num_corpora = draw(st.integers(1, 5))
    corpora = sorted(draw(st.lists(st.integers(0, num_corpora - 1), max_size=12)))
    num_texts = [draw(st.integers(0, 30)) for _ in corpora]
    often = st.one_of(st.integers(1, 4).map(Fraction), st.fractions(Fraction(1, 1000), 4, max_denominator=1000))
    return num_texts, corpora, [draw(often) for _ in range(num_corpora)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=orders(), data=st.data())
def test_the_order_is_its_plain_definition(
    case: tuple[list[int], list[int], list[Fraction]], data: st.DataObject
) -> None:
    order, expected = TextOrder(*case), plain_order(*case)
    assert sum(order.num_samples) == len(expected)
    first = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(first, len(expected)))
    units, texts = order.texts(first, stop)
    assert list(zip(units.tolist(), texts.tolist(), strict=True)) == expected[first:stop]


def test_the_order_is_exact_where_floats_are_not() -> None:
    """Two ninths of 10**15 texts, to the last."""
    order = TextOrder([10**15], [0], [Fraction(2, 9)])
    assert order.num_samples == [222_222_222_222_222]
    assert order.texts(222_222_222_222_219, 222_222_222_222_222)[1].tolist() == [10**15 - 11, 10**15 - 6, 10**15 - 2]


def test_an_order_of_twenty_thousand_units_is_small_and_quickly_asked() -> None:
    """What goes to a worker with each shard: 8 bytes a unit."""
    order = TextOrder([4000] * 20_000, [0] * 10_000 + [1] * 10_000, [Fraction(5, 2), Fraction(1)])
    assert sum(array.nbytes for array in vars(order).values() if isinstance(array, np.ndarray)) < 200_000
    assert order.num_samples == [100_000_000, 40_000_000]
    units, texts = order.texts(80_000_000, 80_000_000 + 16_384)
    assert (units[0], texts[0], units[-1]) == (0, 1, 8)


def test_a_unit_is_of_one_corpus(novel_and_dictionary: Path) -> None:
    sources = sources_of(read_mixture(novel_and_dictionary))
    units = plan_units(sources, unit_bytes=2**40)
    assert [[piece.source for piece in unit.pieces] for unit in units] == [sources[:2], sources[2:]]
    assert [unit.corpus for unit in units] == [0, 1]
    for unit in plan_units(sources, unit_bytes=3000):
        assert {piece.source.corpus for piece in unit.pieces} == {unit.corpus}


# ---- the data set


def texts_of(tokenizer: Tokenizer, tokens_BL: np.ndarray) -> list[bytes]:
    structure = [tokenizer.sos_id, tokenizer.eos_id, tokenizer.pad_id]
    return [row[~np.isin(row, structure)].tobytes() for row in tokens_BL]


def test_a_data_set_of_two_corpora(
    novel_and_dictionary: Path, tmp_path: Path, build_data: Build, data_prep_command: CommandLine
) -> None:
    assert build_data(novel_and_dictionary, tmp_path / "data", validation_fraction=0.3)
    assert list(find_faults(tmp_path / "data")) == []
    data = DataSet(tmp_path / "data")
    manifest = data.manifest
    assert manifest["corpora"] == [
        {"name": "novel", "document_per": "file", "text_field": "body", "epochs": 2.5},
        {"name": "words", "document_per": "file", "text_field": "text", "epochs": 1.0},
    ]
    sources = [json.loads(line) for line in (tmp_path / "data" / SOURCE_LIST).read_text().splitlines()]
    assert [(source["corpus"], source["name"]) for source in sources] == [
        (corpus, name) for corpus in ("novel", "words") for name in ("a.jsonl", "b.jsonl")
    ]
    novel, words = manifest["mixture"]
    assert (novel["corpus"], novel["epochs"], words["corpus"], words["epochs"]) == ("novel", 2.5, "words", 1.0)
    assert {name: novel["documents"][name] + words["documents"][name] for name in novel["documents"]} == manifest[
        "documents"
    ]
    assert sum(novel["documents"].values()) == 6
    assert novel["train_samples"] + words["train_samples"] == data.num_samples("train")

    batch = data.read_samples("train", 0, data.num_samples("train"))
    texts = texts_of(data.tokenizer, batch.tokens_BL)
    num_novel = novel["train_samples"] * 2 // 5
    once = texts[:num_novel]
    in_part = [text for j, text in enumerate(once) if (j + 1) // 2 > j // 2]
    assert num_novel > 50
    assert texts[: novel["train_samples"]] == once + once + in_part
    assert all(count == 1 for count in Counter(texts[novel["train_samples"] :]).values())
    held_out = texts_of(data.tokenizer, data.read_samples("validation", 0, data.num_samples("validation")).tokens_BL)
    assert len(set(held_out)) == len(held_out) > 20
    of_corpora = data.samples_of_corpora("validation")
    assert list(of_corpora) == ["novel", "words"]
    lengths = [data.read_samples("validation", s.start, s.stop).length_B.mean() for s in of_corpora.values()]
    assert lengths[0] > lengths[1] + 5, "chapters fill their samples, entries do not"
    assert [s.stop - s.start for s in of_corpora.values()] == [
        share["validation_samples"] for share in manifest["mixture"]
    ]
    assert sum(map(len, of_corpora.values())) == len(held_out)

    again = slice(num_novel, 2 * num_novel)
    assert (batch.segment_boundary_B[:num_novel] != batch.segment_boundary_B[again]).mean() > 0.9
    assert (batch.positions_BP[:num_novel] != batch.positions_BP[again]).any(axis=1).mean() > 0.9

    shown = data_prep_command("inspect", "--data", tmp_path / "data", "--count", 1).stdout
    assert f"corpus novel: 2.5 epochs of {novel['documents']['train']} documents to train on, " in shown
    assert (
        f"{words['train_samples']:,} samples ({words['train_samples'] / data.num_samples('train'):.1%} of train)"
        in shown
    )


def test_the_shares_of_a_data_set_are_the_weights(
    novel_and_dictionary: Path, tmp_path: Path, build_data: Build
) -> None:
    content = yaml.safe_load(novel_and_dictionary.read_text())["corpora"]
    del content[0]["epochs"]
    content[0]["weight"], content[1]["weight"] = 1, 3
    write_mixture(novel_and_dictionary, *content)
    build_data(novel_and_dictionary, tmp_path / "data", validation_fraction=0)
    novel, words = DataSet(tmp_path / "data").manifest["mixture"]
    assert min(novel["epochs"], words["epochs"]) == 1 < max(novel["epochs"], words["epochs"])
    assert abs(words["train_samples"] - 3 * novel["train_samples"]) < 3


def test_a_mixture_of_one_corpus_is_that_corpus(
    chapters: list[Path], data_folder: Path, tmp_path: Path, build_data: Build
) -> None:
    path = write_mixture(tmp_path / "m.yaml", {"name": "novel", "paths": [str(chapter) for chapter in chapters[:9]]})
    build_data(path, tmp_path / "data", mask_sets=2, validation_fraction=0.2)
    for shard in data_folder.glob("*.h5"):
        assert (tmp_path / "data" / shard.name).read_bytes() == shard.read_bytes()


def test_other_epochs_are_another_data_set(novel_and_dictionary: Path, tmp_path: Path, build_data: Build) -> None:
    assert build_data(novel_and_dictionary, tmp_path / "data")
    assert not build_data(novel_and_dictionary, tmp_path / "data")
    novel_and_dictionary.write_text(novel_and_dictionary.read_text().replace("2.5", "2"))
    with pytest.raises(ValueError, match=r"holds a data set made from other corpora .*; remove it"):
        build_data(novel_and_dictionary, tmp_path / "data")


@pytest.mark.parametrize(
    ("epochs", "text", "message"),
    [
        (1, "Alas!", "nothing to train on: each of the 1 documents has fewer than 8 tokens"),
        (1, "", "the corpus is empty: no text in it"),
        (
            0.4,
            "It is a truth universally acknowledged.",
            "0.4 epochs of its 1 training samples are less than one sample",
        ),
    ],
)
def test_a_corpus_that_would_add_nothing_is_refused(
    novel_and_dictionary: Path, tmp_path: Path, build_data: Build, epochs: float, text: str, message: str
) -> None:
    (tmp_path / "idle.txt").write_text(text)
    corpora = yaml.safe_load(novel_and_dictionary.read_text())["corpora"]
    write_mixture(novel_and_dictionary, *corpora, {"name": "idle", "paths": "idle.txt", "epochs": epochs})
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / 'idle.txt'))}: {message}"):
        build_data(novel_and_dictionary, tmp_path / "data", validation_fraction=0)
    assert not (tmp_path / "data" / MANIFEST).exists()
    assert not (tmp_path / "data" / WORK).exists()


# ---- the command line


def test_tokenizer_and_data_set_of_one_file(
    novel_and_dictionary: Path, tmp_path: Path, data_prep_command: CommandLine
) -> None:
    """The tokenizer sees each corpus as often as the model will: a line of three epochs three times."""
    few_texts = (("2.5", "3"), ("novel/", "novel/a.jsonl"), ("- words/b*\n", ""))
    for words in few_texts:
        assert words[0] in novel_and_dictionary.read_text()
        novel_and_dictionary.write_text(novel_and_dictionary.read_text().replace(*words))
    made = tmp_path / "t.model"
    for words in (
        ["train-tokenizer", "--mixture", novel_and_dictionary, "--tokenizer", made, "--vocab-size", 300],
        ["build", "--mixture", novel_and_dictionary, "--tokenizer", made, "--data", tmp_path / "data", "--workers", 1],
    ):
        done = data_prep_command(*words)
        assert done.returncode == 0, done.stderr
    assert "corpus novel: 3 epochs of " in done.stdout
    assert [share["epochs"] for share in DataSet(tmp_path / "data").manifest["mixture"]] == [3, 1]

    sources = sources_of(read_mixture(novel_and_dictionary))
    novel, dictionary = (
        [line for document in read_documents(list(group)) for line in document.lines]
        for _, group in groupby(sources, key=lambda source: source.corpus)
    )
    lines = [line for line in novel for _ in range(3)] + dictionary
    assert train_tokenizer(lines, tmp_path / "by_hand.model", vocab_size=300).path.read_bytes() == made.read_bytes()


@pytest.mark.parametrize("words", [[], ["--corpus", "a.txt", "--mixture", "m.yaml"]])
@pytest.mark.parametrize("command", ["train-tokenizer", "build"])
def test_a_corpus_or_a_mixture(command: str, words: list[str], data_prep_command: CommandLine) -> None:
    done = data_prep_command(command, *words)
    assert done.returncode == 2
    assert "--corpus" in done.stderr
    assert "--mixture" in done.stderr.splitlines()[-1]


def test_a_path_of_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    mixture = read_mixture(write_mixture(tmp_path / "m.yaml", {"name": "a", "paths": "missing.txt"}))
    with pytest.raises(FileNotFoundError, match="no such corpus; --corpus and a mixture's paths are") as failure:
        sources_of(mixture)
    assert failure.value.filename == str(tmp_path / "missing.txt")
