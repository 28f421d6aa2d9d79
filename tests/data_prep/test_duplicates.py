"""What is dropped as a duplicate, against the plain definition with everything in memory and every pair compared."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stages import Interrupted
from support import files_of

from data_prep import build as build_module
from data_prep import duplicates, inspect, minhash
from data_prep.corpus import Document, find_sources, make_document, plan_units, read_documents
from data_prep.duplicates import DuplicateSettings, choose_bands, find_duplicates, hash_unit, without_duplicates
from data_prep.parts import finished_parts, is_done
from data_prep.processes import LocalProcesses
from data_prep.shards import SPLITS, DataSet, Split

ALL_KINDS = DuplicateSettings(True, 0.75, "blank_line", min_duplicate_characters=5)


# ---- the plain definition


def plainly(documents: list[Document], settings: DuplicateSettings, counts: Counter[str]) -> list[Document]:
    """What is left of the documents."""
    if settings.drop_duplicate_documents:
        different = []
        for document in documents:
            if any(document.lines == earlier.lines for earlier in different):
                counts["duplicate_documents"] += 1
            else:
                different.append(document)
        documents = different
    if settings.near_duplicate_jaccard is not None:
        documents = without_near_duplicates(documents, settings.near_duplicate_jaccard, counts)
    if settings.paragraph_per:
        seen: set[str] = set()
        remaining = []
        for document in documents:
            kept = []
            for lines in document.paragraphs(settings.paragraph_per):
                text = "\n".join(lines)
                if text in seen:
                    counts["duplicate_paragraphs"] += 1
                    continue
                kept += lines
                if len(text) >= settings.min_duplicate_characters:
                    seen.add(text)
            remaining.append(Document(tuple(kept), whole_hash=document.hash))
        documents = remaining
    return documents


def without_near_duplicates(documents: list[Document], threshold: float, counts: Counter[str]) -> list[Document]:
    num_bands, num_rows = choose_bands(DuplicateSettings(near_duplicate_jaccard=threshold))
    signatures = [MinHash(hashvalues=minhash.signature(document), scheme="affine32") for document in documents]
    bands = [slice(start, start + num_rows) for start in range(0, num_bands * num_rows, num_rows)]
    keys = [[signature.hashvalues[band].tobytes() for band in bands] for signature in signatures]
    dropped: set[int] = set()
    for number, signature in enumerate(signatures):
        for band in range(num_bands):
            first = next(other for other in range(number + 1) if keys[other][band] == keys[number][band])
            if first < number and first not in dropped and signature.jaccard(signatures[first]) >= threshold:
                dropped.add(number)
    counts["near_duplicate_documents"] += len(dropped)
    return [document for number, document in enumerate(documents) if number not in dropped]


# ---- the product's way


def find(
    folder: Path, units: list[list[Document]], settings: DuplicateSettings, part_hashes: int = 2**17, workers: int = 1
) -> tuple[list[Document], Counter[str]]:
    """All steps over documents in memory; what is left of them, and the counts."""
    bands = choose_bands(settings)
    for unit, documents in enumerate(units):
        done = finished_parts(folder, duplicates.HASHED).get(unit, [])
        if not is_done(done):
            hash_unit(folder, unit, documents, settings, bands, part_hashes, done=done)
    with LocalProcesses(workers) as processes:
        processes.prepare(int)
        find_duplicates(folder, len(units), settings, processes)
    return remaining(folder, units, settings)


def remaining(
    folder: Path, units: list[list[Document]], settings: DuplicateSettings
) -> tuple[list[Document], Counter[str]]:
    counts: Counter[str] = Counter()
    left = [
        document
        for unit, documents in enumerate(units)
        for document in without_duplicates(folder, unit, documents, settings, counts)
    ]
    return left, counts


def comparable(documents: list[Document]) -> list[tuple[tuple[str, ...], int]]:
    return [(document.lines, document.hash) for document in documents]


def assert_as_plainly(
    folder: Path, units: list[list[Document]], settings: DuplicateSettings, part_hashes: int = 2**17
) -> Counter[str]:
    """The same documents left, the same counts; returns them."""
    expected_counts: Counter[str] = Counter()
    expected = plainly([document for unit in units for document in unit], settings, expected_counts)
    left, counts = find(folder, units, settings, part_hashes)
    assert comparable(left) == comparable(expected)
    assert counts == +expected_counts
    return counts


# ---- tests


WORDS = [f"word{number}" for number in range(400)]
PARAGRAPH = st.sampled_from(
    [" ".join(WORDS[start : start + 40]) for start in (0, 1, 2, 5, 100, 101)] + ["short", "tiny", "no", "a\nb c"]
)
DOCUMENT = st.lists(PARAGRAPH, min_size=1, max_size=4).map(lambda p: make_document("\n\n".join(p).split("\n")))
SETTINGS = st.builds(
    DuplicateSettings, st.booleans(), st.sampled_from([None, 0.3, 0.8]), st.sampled_from(["none", "line", "blank_line"]),
    st.integers(1, 6),
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(DOCUMENT, max_size=9), cuts=st.lists(st.integers(0, 9), max_size=2), wanted=SETTINGS,
    part_hashes=st.sampled_from([1, 20, 2**17]), bucket_hashes=st.sampled_from([20, 2**21]),
)  # fmt: skip
def test_what_is_dropped_is_what_the_plain_definition_drops(
    monkeypatch: pytest.MonkeyPatch, documents: list[Document], cuts: list[int], wanted: DuplicateSettings,
    part_hashes: int, bucket_hashes: int,
) -> None:  # fmt: skip
    """Wherever the corpus is cut into units and parts, and the hashes into buckets."""
    monkeypatch.setattr(duplicates, "BUCKET_HASHES", bucket_hashes)
    units = [documents[start:stop] for start, stop in pairwise([0, *sorted(cuts), len(documents) + 9])]
    with TemporaryDirectory() as folder:
        assert_as_plainly(Path(folder), units, wanted, part_hashes)


@pytest.fixture(scope="module")
def corpus(sample_corpus: Path) -> list[Document]:
    """Real text with duplicates of all kinds: some entries of a dictionary again, as they are, with some words changed,
    or with a paragraph from elsewhere; in an order by chance."""
    dictionary = read_documents(find_sources([sample_corpus / "devils_dictionary.jsonl"]))
    entries = [document for document in dictionary if document.num_characters > 300][:150]
    chance = random.Random(0)
    documents = list(entries)
    for number, entry in enumerate(entries[:40]):
        words = " ".join(entry.lines).split()
        other = entries[-1 - number]
        documents += [
            Document(entry.lines, entry.paragraph_starts),
            make_document([" ".join(word if chance.random() > 0.01 else "changed" for word in words)]),
            make_document([" ".join(word if chance.random() > 0.2 else "changed" for word in words)]),
            make_document([*entry.lines, "", *other.lines]),
        ]
    chance.shuffle(documents)
    return documents


@pytest.fixture(scope="module")
def units(corpus: list[Document]) -> list[list[Document]]:
    return [corpus[start : start + 100] for start in range(0, len(corpus), 100)]


@pytest.fixture(scope="module")
def found(units: list[list[Document]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of all steps."""
    folder = tmp_path_factory.mktemp("duplicates")
    counts = assert_as_plainly(folder, units, ALL_KINDS)
    assert counts["duplicate_documents"] >= 40
    assert counts["near_duplicate_documents"] > 30
    assert counts["duplicate_paragraphs"] > 15
    return folder


@pytest.mark.slow
def test_real_text_in_many_buckets_and_parts(
    units: list[list[Document]], found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many files as the numbers say, and the same documents left."""
    monkeypatch.setattr(duplicates, "BUCKET_HASHES", 300)
    assert comparable(find(tmp_path, units, ALL_KINDS, part_hashes=200)[0]) == comparable(remaining(found, units, ALL_KINDS)[0])  # fmt: skip
    num_documents = sum(map(len, units))
    num_hashes = num_documents * choose_bands(ALL_KINDS)[0]
    assert len(list(tmp_path.glob("near_duplicate_documents-firsts-*"))) == -(-num_hashes // 300)
    assert len(list(tmp_path.glob("signatures-*"))) > num_hashes / 300


def shingles(document: Document) -> set[bytes]:
    return {shingle for block in minhash.shingles(document) for shingle in block}


def jaccard(first: Document, second: Document) -> float:
    a, b = shingles(first), shingles(second)
    return len(a & b) / len(a | b)


def test_near_duplicates_are_those_whose_words_say_so(corpus: list[Document], tmp_path: Path) -> None:
    """By the true similarity: whoever is dropped has one like it that is kept, and little of what is very like stays."""
    left, counts = find(tmp_path, [corpus], DuplicateSettings(near_duplicate_jaccard=0.8))
    kept = {id(document) for document in left}
    sets = [(shingles(document), id(document) in kept) for document in corpus]
    similar = [
        (max(len(a & b) / len(a | b) for b, other_is_kept in sets if other_is_kept and b is not a), is_kept)
        for a, is_kept in sets
    ]
    dropped = [value for value, is_kept in similar if not is_kept]
    still_alike = [value for value, is_kept in similar if is_kept and value > 0.9]
    assert len(dropped) == counts["near_duplicate_documents"] > 50
    assert min(dropped) > 0.65, "the standard deviation of the estimate at 0.8 is 0.035"
    assert len(still_alike) <= 0.05 * len(dropped)


def test_the_estimate_is_the_true_similarity_within_its_error() -> None:
    chance = random.Random(1)
    errors = []
    for _ in range(60):
        words = [str(chance.random()) for _ in range(300)]
        changed = [word if chance.random() > 0.03 else "x" for word in words]
        first, second = Document((" ".join(words),)), Document((" ".join(changed),))
        true = jaccard(first, second)
        estimate = minhash.similarity(minhash.signature(first)[None], minhash.signature(second)[None])[0]
        errors.append((estimate - true) / np.sqrt(true * (1 - true) / minhash.NUM_VALUES))
    assert abs(np.mean(errors)) < 4 / np.sqrt(len(errors))
    assert 0.6 < np.std(errors) < 1.5


def test_as_alike_as_asked_is_alike(corpus: list[Document], tmp_path: Path) -> None:
    words = " ".join(line for document in corpus[:5] for line in document.lines).split()
    pair = [Document((" ".join(words),)), Document((" ".join(words[6:]),))]
    alike = float(minhash.similarity(*(minhash.signature(document)[None] for document in pair))[0])
    assert 0.9 < alike < 0.99
    for threshold, num_left in [(alike, 1), (alike + 1e-9, 2)]:
        folder = tmp_path / str(num_left)
        folder.mkdir()
        assert len(find(folder, [pair], DuplicateSettings(near_duplicate_jaccard=threshold))[0]) == num_left


def test_shingles_are_five_words_without_case_and_punctuation() -> None:
    document = Document(("One, two -", "THREE four? (five) six"))
    assert shingles(document) == {b"one two three four five", b"two three four five six"}
    assert shingles(Document(("One two",))) == {b"one two"}
    assert shingles(Document(("---",))) == {b"---"}
    assert shingles(Document(("日本語の文字",))) == {"日 本 語 の 文".encode(), "本 語 の 文 字".encode()}
    assert shingles(Document(("हिन्दी में लिखा है ना",))) == {"हिन्दी में लिखा है ना".encode()}


def test_shingles_of_a_long_document_do_not_depend_on_blocks(
    corpus: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Document(tuple(line for document in corpus[:40] for line in document.lines))
    expected = shingles(long)
    for block_words in (1, 3, 4, 5, 2**20):
        monkeypatch.setattr(minhash, "_BLOCK_WORDS", max(block_words, minhash.SHINGLE_WORDS))
        assert shingles(long) == expected


def test_versions_that_have_grown_apart_stay(tmp_path: Path) -> None:
    """A text of which each version differs a little from the one before, and the last one wholly from the first."""
    chance = random.Random(0)
    words = [f"w{chance.random()}" for _ in range(400)]
    versions = []
    for version in range(40):
        versions.append(Document((" ".join(words),)))
        words[version * 10 : version * 10 + 10] = [f"v{chance.random()}" for _ in range(10)]
    left, _ = find(tmp_path, [versions], DuplicateSettings(near_duplicate_jaccard=0.8))
    assert 3 < len(left) < 20
    for version in versions:
        assert max(jaccard(version, document) for document in left) > 0.65


@pytest.mark.slow
def test_two_processes_leave_the_same_files(units: list[list[Document]], found: Path, tmp_path: Path) -> None:
    find(tmp_path, units, ALL_KINDS, workers=2)
    assert files_of(tmp_path) == files_of(found)


@pytest.mark.slow
def test_interrupted_at_any_task_it_goes_on(units: list[list[Document]], found: Path, tmp_path: Path) -> None:
    bands = choose_bands(ALL_KINDS)
    hashed = tmp_path / "hashed"
    hashed.mkdir()
    for unit, documents in enumerate(units):
        hash_unit(hashed, unit, documents, ALL_KINDS, bands)
    num_interrupted = 0
    is_through = False
    while not is_through:
        folder = Path(shutil.copytree(hashed, tmp_path / str(num_interrupted)))
        with Interrupted(num_interrupted) as processes:
            try:
                find_duplicates(folder, len(units), ALL_KINDS, processes)
                is_through = True
            except KeyboardInterrupt:
                num_interrupted += 1
        with LocalProcesses(1) as processes:
            done = {path: path.stat().st_mtime_ns for path in folder.glob("*-[0-9][0-9][0-9].*")}
            find_duplicates(folder, len(units), ALL_KINDS, processes)
        assert {path: path.stat().st_mtime_ns for path in done} == done
        assert files_of(folder) == files_of(found)
        shutil.rmtree(folder)
    assert num_interrupted > 10


def test_hashing_goes_on_inside_a_unit(
    units: list[list[Document]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of parts that are written are read again, but not hashed."""
    bands = choose_bands(ALL_KINDS)
    documents = units[0] + units[1]
    for name in ("undisturbed", "interrupted"):
        (tmp_path / name).mkdir()
    hash_unit(tmp_path / "undisturbed", 7, documents, ALL_KINDS, bands, 100)

    def break_off() -> Iterator[Document]:
        yield from documents[: len(documents) // 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hash_unit(tmp_path / "interrupted", 7, break_off(), ALL_KINDS, bands, 100)
    done = finished_parts(tmp_path / "interrupted", duplicates.HASHED)[7]
    assert len(done) > 1
    assert not is_done(done)
    before = {path: path.stat().st_mtime_ns for path in done}
    num_hashed = []
    add = duplicates._PartHashes.add
    monkeypatch.setattr(
        duplicates._PartHashes, "add", lambda self, document: (num_hashed.append(1), add(self, document))
    )
    hash_unit(tmp_path / "interrupted", 7, documents, ALL_KINDS, bands, 100, done=done)
    assert {path: path.stat().st_mtime_ns for path in done} == before
    assert 0 < len(num_hashed) < len(documents)
    assert files_of(tmp_path / "interrupted") == files_of(tmp_path / "undisturbed")


_opened: list[str] | None = None


def _count_opens(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(_count_opens)


def num_opened(folder: Path, num_units: int, corpus: list[Document]) -> int:
    """The times that finding opens a file of the folder."""
    global _opened
    folder.mkdir()
    per_unit = len(corpus) // num_units
    units = [corpus[start : start + per_unit] for start in range(0, num_units * per_unit, per_unit)]
    for unit, documents in enumerate(units):
        hash_unit(folder, unit, documents, ALL_KINDS, choose_bands(ALL_KINDS))
    _opened = []
    with LocalProcesses(1) as processes:
        processes.prepare(int)
        find_duplicates(folder, num_units, ALL_KINDS, processes)
    opened, _opened = _opened, None
    return len([path for path in opened if path.startswith(str(folder))])


@pytest.mark.slow
def test_opens_grow_with_the_units_and_not_with_units_times_buckets(
    corpus: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts and buckets there are: for each unit, and for each pair of groups, a fixed number."""
    monkeypatch.setattr(duplicates, "MAX_GROUPS", 4)
    monkeypatch.setattr(duplicates, "BUCKET_HASHES", 100)
    few, many = (num_opened(tmp_path / str(num), num, corpus[:160]) for num in (10, 40))
    of_a_unit = len(ALL_KINDS.kinds) + 2  # its hashes for each kind, before that its counts, and its signatures
    assert 0 < many - few <= 30 * (of_a_unit + 1)
    assert few <= 10 * of_a_unit + 4 * 4 * 2 * len(ALL_KINDS.kinds) + 4 * 4 * 3 + 200


@pytest.mark.slow
@pytest.mark.parametrize("num_texts", [60_000, 600], ids=["different", "a hundred times"])
def test_memory_is_bounded_by_buckets_and_parts(
    num_texts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 bytes for each hash of a bucket or part, however large the corpus, and however often a text is in it."""
    num_paragraphs = 60_000
    wanted = DuplicateSettings(drop_duplicate_paragraphs="line")
    lines = [
        f"paragraph number {number % num_texts} of a corpus that is long indeed" for number in range(num_paragraphs)
    ]
    documents = [Document(tuple(lines[start : start + 50])) for start in range(0, num_paragraphs, 50)]

    def peak_bytes(bound: int) -> int:
        folder = tmp_path / str(bound)
        folder.mkdir()
        monkeypatch.setattr(duplicates, "BUCKET_HASHES", bound)
        hash_unit(folder, 0, documents, wanted, (0, 0), part_hashes=bound)
        with LocalProcesses(1) as processes:
            tracemalloc.start()
            find_duplicates(folder, 1, wanted, processes)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        _, counts = remaining(folder, [documents], wanted)
        assert counts["duplicate_paragraphs"] == num_paragraphs - num_texts
        return peak

    assert peak_bytes(4096) < 100 * 4096
    assert peak_bytes(num_paragraphs) > 30 * num_paragraphs, "so it is the bound that holds it down"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"near_duplicate_jaccard": 0.0}, "near_duplicate_jaccard is 0.0, expected more than 0 and at most 0.99"),
        ({"near_duplicate_jaccard": 1.0}, "near_duplicate_jaccard is 1.0, expected more than 0 and at most 0.99"),
        ({"min_duplicate_characters": 0}, "min_duplicate_characters is 0, expected at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DuplicateSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [0.01, 0.5, 0.8, 0.99])
def test_there_are_bands_for_every_threshold(threshold: float) -> None:
    num_bands, num_rows = minhash.choose_bands(threshold)
    assert num_bands >= 2
    assert num_bands * num_rows <= minhash.NUM_VALUES
    assert 1 - (1 - min(1, threshold + 0.05) ** num_rows) ** num_bands > 0.75, (
        "found, if a little more alike than asked"
    )


# ---- as part of a build

EVERYTHING = {
    "unicode_form": "NFC", "drop_control_characters": True, "min_document_characters": 40, "max_document_characters": 5000,
    "drop_duplicate_documents": True, "near_duplicate_jaccard": 0.8, "drop_duplicate_paragraphs": "blank_line",
}  # fmt: skip


@pytest.fixture(scope="module")
def dirty_corpus(corpus: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus with control characters, decomposed letters, and documents too short and too long."""
    texts = [document.text for document in corpus[:120]]
    texts[::10] = [f"\ufeffcafe\u0301 {text}\0" for text in texts[::10]]
    texts += ["too short", "too long " * 1000, corpus[0].text + "\u200b"]
    path = tmp_path_factory.mktemp("corpus") / "dirty.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def clean_data(dirty_corpus: Path, build_data: Callable[..., bool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of it."""
    folder = tmp_path_factory.mktemp("data") / "pretrain"
    assert build_data([dirty_corpus], folder, validation_fraction=0.2, **EVERYTHING)
    return folder


def test_the_manifest_tells_what_cleaning_did(clean_data: Path) -> None:
    data = DataSet(clean_data)
    assert data.parameters | EVERYTHING == data.parameters
    counts = data.manifest["cleaning"]
    assert counts["control_characters"] == 12 * 2 + 1
    assert counts["normalised_documents"] == 12
    assert (counts["too_short_documents"], counts["too_long_documents"]) == (3, 1), "two had but copies"
    assert min(counts[kind] for kind in duplicates.KINDS) > 2
    dropped = counts["too_short_documents"] + counts["too_long_documents"] + counts["duplicate_documents"] + counts["near_duplicate_documents"]  # fmt: skip
    assert sum(data.manifest["documents"].values()) + dropped == 123
    summary = "\n".join(inspect.describe(data))
    assert f"cleaning: 12 normalised documents, 25 control characters, 3 too short documents, 1 too long documents, {counts['duplicate_documents']} duplicate documents" in summary  # fmt: skip
    assert "unicode_form NFC" in summary
    data.close()


def documents_of(folder: Path, split: Split) -> list[str]:
    """The texts of a split's samples."""
    data = DataSet(folder)
    batch = data.read_samples(split, 0, data.num_samples(split))
    data.close()
    return [data.tokenizer.decode(row[:length]) for row, length in zip(batch.tokens_BL, batch.length_B, strict=True)]


def test_no_paragraph_is_on_both_sides(clean_data: Path) -> None:
    train, validation = (documents_of(clean_data, split) for split in SPLITS)
    assert len(validation) > 20
    assert not set(train) & set(validation)


def test_the_side_does_not_depend_on_what_else_there_is(
    dirty_corpus: Path, clean_data: Path, build_data: Callable[..., bool], tmp_path: Path
) -> None:
    """A paragraph that is dropped changes the text, not its side."""
    wanted = EVERYTHING | {"drop_duplicate_paragraphs": "none"}
    build_data([dirty_corpus], tmp_path / "data", validation_fraction=0.2, **wanted)
    counts = [DataSet(folder).manifest["documents"] for folder in (clean_data, tmp_path / "data")]
    assert counts[0]["validation"] == counts[1]["validation"]


@pytest.mark.slow
def test_a_cleaned_data_set_does_not_depend_on_processes_and_units(
    dirty_corpus: Path,
    clean_data: Path,
    build_data: Callable[..., bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build_module, "plan_units", partial(plan_units, unit_bytes=6_000))
    assert build_data([dirty_corpus], tmp_path / "data", workers=2, validation_fraction=0.2, **EVERYTHING)
    assert files_of(tmp_path / "data") == files_of(clean_data)


def test_cleaning_that_leaves_nothing_is_an_error(
    chapters: list[Path], tmp_path: Path, build_data: Callable[..., bool]
) -> None:
    with pytest.raises(ValueError, match=r"cleaning left nothing to train on: it dropped 3 too long documents"):
        build_data(chapters[:3], tmp_path / "data", max_document_characters=10)
    assert not (tmp_path / "data" / ".work").exists()


def test_the_tokenizer_sees_the_cleaned_text(
    dirty_corpus: Path, tmp_path: Path, data_prep_command: Callable[..., CompletedProcess[str]]
) -> None:
    flags = ["--corpus", dirty_corpus, "--tokenizer", tmp_path / "tokenizer.model", "--vocab-size", "500"]
    cleaning = ["--min-document-characters", "40", "--max-document-characters", "5000", "--drop-control-characters"]
    num_lines = []
    for more in ([], cleaning):
        done = data_prep_command("train-tokenizer", *flags, *more)
        assert done.returncode == 0, done.stderr
        num_lines.append(int(done.stdout.split(" lines ")[0].split()[-1]))
    assert num_lines[0] - num_lines[1] == 2, "the short and the long document"


def test_flags_become_settings(
    dirty_corpus: Path, clean_data: Path, data_prep_command: Callable[..., CompletedProcess[str]]
) -> None:
    """The same flags find the data set made already."""
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in EVERYTHING.items()]
    done = data_prep_command(
        "build", "--corpus", dirty_corpus, "--tokenizer", clean_data / "tokenizer.model", "--data", clean_data,
        "--max_length_tokens=64", "--shard_samples=128", "--validation_fraction=0.2", "--workers=1", *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
