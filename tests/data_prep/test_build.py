from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from support import files_of

from data_prep import build as build_module
from data_prep.corpus import find_sources, plan_units, read_documents
from data_prep.inputs import SOURCE_LIST
from data_prep.mask_settings import MaskSettings
from data_prep.masking import draw_masks
from data_prep.parameters import BuildParameters
from data_prep.shards import CHUNK_SAMPLES, MANIFEST, SPLITS, DataSet, Split, batch_of, find_faults
from data_prep.tokenizer import Tokenizer, train_tokenizer

Build = Callable[..., bool]


def samples_of(folder: Path, split: Split) -> Counter[bytes]:
    """The texts of a split's samples, without their segment boundary: how often each occurs."""
    data = DataSet(folder)
    texts: Counter[bytes] = Counter()
    for chunk in range(-(-data.num_samples(split) // CHUNK_SAMPLES)):
        for row in data.read_chunk(split, chunk, 0).tokens_BL:
            texts[row[~np.isin(row, [data.tokenizer.eos_id, data.tokenizer.pad_id])].tobytes()] += 1
    data.close()
    return texts


@pytest.fixture(scope="module")
def entries(sample_corpus: Path) -> list[str]:
    """The lines of the JSON corpus: a short document each."""
    return (sample_corpus / "devils_dictionary.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    sample_corpus: Path, tmp_path: Path, build_data: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on how much text a process reads at a time. Nor on the time: three builds are seconds apart."""
    corpus = tmp_path / "mixture.yaml"
    corpus.write_text(
        f"corpora:\n- {{name: entries, paths: {sample_corpus}/devils_dictionary.jsonl, epochs: 1.3}}\n"
        f"- {{name: chapters, paths: '{sample_corpus}/*/chapter_[0-2]*.txt', epochs: 2}}\n"
    )
    for workers, unit_bytes in [(1, 2**20), (2, 20_000), (3, 1_000)]:
        monkeypatch.setattr(build_module, "plan_units", partial(plan_units, unit_bytes=unit_bytes))
        folder = tmp_path / str(workers)
        assert build_data(
            corpus, folder, workers=workers, mask_sets=2, validation_fraction=0.2, short_sample_probability=0.2
        )
    one, two, three = (files_of(tmp_path / str(workers)) for workers in (1, 2, 3))
    assert one == two == three
    assert len([name for name in one if name.startswith("train")]) > 10
    assert len([name for name in one if name.startswith("validation")]) > 1
    assert list(find_faults(tmp_path / "3")) == []


def test_samples_hold_the_documents_in_order(data_folder: Path, chapters: list[Path], tokenizer: Tokenizer) -> None:
    """Every token of every document, nothing else; train and validation apart, each in the order of the files."""
    data = DataSet(data_folder)
    for split in SPLITS:
        stored = data.read_samples(split, 0, data.num_samples(split)).tokens_BL.ravel()
        is_text = ~np.isin(stored, [tokenizer.sos_id, tokenizer.eos_id, tokenizer.pad_id])
        documents = [
            tokenizer.encode(document.lines)
            for document in read_documents(find_sources(chapters[:9]))
            if (document.hash < 0.2 * 2**64) == (split == "validation")
        ]
        np.testing.assert_array_equal(stored[is_text], np.concatenate(documents))


def test_masks_of_a_shard_are_those_of_its_sample_numbers(data_folder: Path) -> None:
    data = DataSet(data_folder)
    tokenizer = data.tokenizer
    for split, index, first_sample in [("train", 1, 128), ("validation", 0, 2**48)]:
        samples = data.read_shard(split, index)
        masks = draw_masks(
            samples, MaskSettings((0.15, 0.15)), special_ids=tokenizer.special_ids, normal_ids=tokenizer.normal_ids,
            mask_id=tokenizer.mask_id, seed=0, first_sample=first_sample,
        )  # fmt: skip
        expected = batch_of(samples, masks.num_masked_KB[1], masks.places_K[1], 64, 9, tokenizer.pad_id)
        for name, array in vars(data.read_chunk(split, index, 1)).items():
            np.testing.assert_array_equal(array, vars(expected)[name], err_msg=name)


def test_the_manifest_tells_what_it_was_made_from(data_folder: Path, chapters: list[Path]) -> None:
    manifest = json.loads((data_folder / MANIFEST).read_bytes())
    sources = [json.loads(line) for line in (data_folder / SOURCE_LIST).read_text().splitlines()]
    assert [source["name"] for source in sources] == [chapter.name for chapter in chapters[:9]]
    assert manifest["sources"]["num_files"] == 9
    assert manifest["sources"]["size_bytes"] == sum(chapter.stat().st_size for chapter in chapters[:9])
    assert manifest["parameters"] == {
        "max_length_tokens": 64, "short_sample_probability": 0.0, "mask_sets": 2, "mask_rate": "0.15", "block_share": 0.4,
        "block_lengths": "2:6", "validation_fraction": 0.2, "shard_samples": 128, "seed": 0, "unicode_form": "none", "drop_control_characters": False,
        "min_document_characters": 0, "max_document_characters": None, "drop_duplicate_documents": False,
        "near_duplicate_jaccard": None, "drop_duplicate_paragraphs": "none", "min_duplicate_characters": 50,
    }  # fmt: skip
    assert manifest["corpora"] == [{"name": "corpus", "document_per": "file", "text_field": "text", "epochs": 1.0}]
    documents = manifest["documents"]
    assert documents["train"] + documents["validation"] == 9
    assert documents["too_short"] == 0
    assert str(data_folder.parent) not in json.dumps([manifest, sources]), "no path of this machine"


@pytest.mark.slow
def test_a_second_build_changes_nothing(data_folder: Path, chapters: list[Path], build_data: Build) -> None:
    before = {path: path.stat().st_mtime_ns for path in data_folder.iterdir()}
    assert not build_data(chapters[:9], data_folder, mask_sets=2, validation_fraction=0.2, workers=2)
    assert {path: path.stat().st_mtime_ns for path in data_folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "named", "detail"),
    [
        ({"seed": 1}, "parameters", "parameters seed was 0, is 1"),
        ({"mask_sets": 3}, "parameters", "parameters mask_sets was 2, is 3"),
        ({"mask_rate": "0.3:0.15"}, "parameters", r"parameters mask_rate was 0\.15, is 0\.3:0\.15"),
        ({"block_share": 0.5}, "parameters", r"parameters block_share was 0\.4, is 0\.5"),
        ({"block_lengths": "2:5"}, "parameters", "parameters block_lengths was 2:6, is 2:5"),
        ({"max_length_tokens": 65}, "parameters", "parameters max_length_tokens was 64, is 65"),
        ({"short_sample_probability": 0.1}, "parameters", r"short_sample_probability was 0\.0, is 0\.1"),
        ({"document_per": "blank_line"}, "corpora", "corpora corpus document_per was file, is blank_line"),
        ({"text_field": "content"}, "corpora", "text_field was text, is content"),
        ({"drop_control_characters": True}, "parameters", "drop_control_characters was false, is true"),
        ({"drop_duplicate_documents": True}, "parameters", "drop_duplicate_documents was false, is true"),
        ({"tokenizer_path": "other.model"}, "tokenizer", "tokenizer vocab_size was 600, is 500"),
        ({"corpus": slice(0, 8)}, "sources", ""),
        ({"corpus": slice(8, None, -1)}, "sources", ""),
        (
            {"seed": 1, "tokenizer_path": "other.model", "corpus": slice(1, 9)},
            "parameters and tokenizer and sources",
            "seed was 0, is 1; tokenizer sha256 was [0-9a-f]{12}, is [0-9a-f]{12}; ",
        ),
    ],
)
def test_a_folder_made_from_something_else_is_refused(
    data_folder: Path, chapters: list[Path], lines: list[str], tmp_path: Path, build_data: Build,
    changes: dict[str, object], named: str, detail: str,
) -> None:  # fmt: skip
    settings = {"mask_sets": 2, "validation_fraction": 0.2, **changes}
    corpus = chapters[settings.pop("corpus", slice(0, 9))]  # type: ignore[call-overload]
    if "tokenizer_path" in settings:
        settings["tokenizer_path"] = train_tokenizer(lines, tmp_path / "other.model", vocab_size=500).path
    before = files_of(data_folder)
    with pytest.raises(ValueError, match=rf"{data_folder}: holds a data set made from other {named} \(.*{detail}.*\);"):
        build_data(corpus, data_folder, **settings)
    assert files_of(data_folder) == before


def test_a_changed_text_of_the_same_size_is_noticed(
    chapters: list[Path], data_folder: Path, tmp_path: Path, build_data: Build
) -> None:
    folder = Path(shutil.copytree(data_folder, tmp_path / "pretrain"))
    corpus = [Path(shutil.copy(chapter, tmp_path)) for chapter in chapters[:9]]
    corpus[4].write_bytes(corpus[4].read_bytes().replace(b"Bennet", b"Wilson"))
    with pytest.raises(ValueError, match="made from other sources"):
        build_data(corpus, folder, mask_sets=2, validation_fraction=0.2)


def test_leftovers_of_an_interrupted_build_are_cleaned_and_nothing_else(
    chapters: list[Path], data_folder: Path, tmp_path: Path, build_data: Build
) -> None:
    folder = tmp_path / "pretrain"
    folder.mkdir()
    for leftover in ("train-00000.h5", "train-00099.h5", "validation-00007.h5", ".train-00001.h5.partial"):
        (folder / leftover).write_bytes(b"left over")
    for own in ("notes.txt", "train-measurements.h5"):
        (folder / own).write_bytes(b"the user's own")
    assert build_data(chapters[:9], folder, mask_sets=2, validation_fraction=0.2)
    built = files_of(folder)
    assert built.pop("notes.txt") == built.pop("train-measurements.h5") == b"the user's own"
    assert built == files_of(data_folder)


@pytest.mark.slow
def test_the_split_does_not_depend_on_names_and_order(entries: list[str], tmp_path: Path, build_data: Build) -> None:
    """The same documents, shuffled, in other files: the same texts on each side."""
    (tmp_path / "a.jsonl").write_text("\n".join(entries[:250]))
    shuffled = random.Random(0).sample(entries[:250], 250)
    (tmp_path / "x.jsonl").write_text("\n".join(shuffled[:100]))
    (tmp_path / "w.jsonl").write_text("\n".join(shuffled[100:]))
    folders = tmp_path / "first", tmp_path / "second"
    build_data([tmp_path / "a.jsonl"], folders[0], validation_fraction=0.3)
    build_data([tmp_path / "x.jsonl", tmp_path / "w.jsonl"], folders[1], validation_fraction=0.3)
    for split in SPLITS:
        first, second = (samples_of(folder, split) for folder in folders)
        assert first == second
        assert first.total() > 50


@pytest.mark.slow
def test_copies_of_a_document_are_on_one_side(entries: list[str], tmp_path: Path, build_data: Build) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(entries))
    (tmp_path / "b.jsonl").write_text("\n".join(reversed(entries)))
    build_data([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "data", validation_fraction=0.2)
    train, validation = (samples_of(tmp_path / "data", split) for split in SPLITS)
    assert not train.keys() & validation.keys()
    assert all(count % 2 == 0 for count in (train + validation).values())
    documents = json.loads((tmp_path / "data" / MANIFEST).read_bytes())["documents"]
    num_documents = len(entries)
    deviation = sqrt(num_documents * 0.2 * 0.8)
    assert documents["validation"] % 2 == 0
    assert abs(documents["validation"] / 2 - 0.2 * num_documents) < 4 * deviation


def test_short_documents_are_counted_and_left_out(entries: list[str], tmp_path: Path, build_data: Build) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([*entries[:20], '{"text": "Too short."}', '{"text": "Alas!"}']))
    build_data([tmp_path / "a.jsonl"], tmp_path / "data", validation_fraction=0)
    documents = json.loads((tmp_path / "data" / MANIFEST).read_bytes())["documents"]
    assert documents == {"train": 20, "validation": 0, "too_short": 2}


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("A chaise.\n\nAnd four.", {"document_per": "blank_line"}, "each of the 2 documents has fewer than 8 tokens"),
        (" \n\n", {}, "the corpus is empty"),
        ("It is a truth universally acknowledged. " * 3, {"validation_fraction": 0.999999}, "all 1 documents fell to val"),
    ],
)  # fmt: skip
def test_nothing_to_train_on(
    tmp_path: Path, build_data: Build, content: str, settings: dict[str, object], message: str
) -> None:
    corpus = tmp_path / "a.txt"
    corpus.write_text(content)
    with pytest.raises(ValueError, match=rf"{corpus}: .*{message}"):
        build_data([corpus], tmp_path / "data", **settings)
    assert not (tmp_path / "data" / MANIFEST).exists()


def test_bad_parameters_are_all_in_one_message() -> None:
    with pytest.raises(ValueError, match="expected") as failure:
        BuildParameters(
            10, short_sample_probability=1.1, mask_sets=0, validation_fraction=1.0, shard_samples=100, seed=-1
        )
    faults = str(failure.value).split("; ")
    assert [fault.split(" is ")[0] for fault in faults] == [
        "max_length_tokens", "short_sample_probability", "mask_sets", "validation_fraction", "shard_samples", "seed",
    ]  # fmt: skip
    assert all("expected" in fault for fault in faults)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length_tokens": 11}, {"max_length_tokens": 65_535}, {"seed": 2**63 - 1}, {"validation_fraction": 0.0},
        {"shard_samples": 128}, {"short_sample_probability": 1.0},
    ],
)  # fmt: skip
def test_parameters_at_their_limits_are_taken(settings: dict[str, float]) -> None:
    assert BuildParameters(**settings)  # type: ignore[arg-type]


def test_the_shortest_samples_can_be_built(entries: list[str], tmp_path: Path, build_data: Build) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(entries[:40]))
    build_data([tmp_path / "a.jsonl"], tmp_path / "data", max_length_tokens=11, seed=2**63 - 1, validation_fraction=0)
    assert list(find_faults(tmp_path / "data")) == []


def test_a_file_name_that_is_not_utf8(entries: list[str], tmp_path: Path, build_data: Build) -> None:
    corpus = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    corpus.write_text("\n".join(entries[:20]))
    assert build_data([corpus], tmp_path / "data", validation_fraction=0)
    assert not build_data([corpus], tmp_path / "data", validation_fraction=0)
