"""What a data set was made from: hashed as it is read, compared at the next start without reading it again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stages import Disturbed, Interrupted
from support import files_of
from texts import as_json_lines, write, write_table

from data_prep import blocks as blocks_module
from data_prep import build as build_module
from data_prep.blocks import BlockDigests, digest_of_blocks, num_blocks
from data_prep.build import WORK, build
from data_prep.corpus import ReadSettings, find_sources, plan_units, read_unit
from data_prep.duplicates import DuplicateSettings
from data_prep.files import write_manifest
from data_prep.inputs import SOURCE_LIST, TIMES, digests_of_unit, hashes_of_sources
from data_prep.mixture import Corpus
from data_prep.parameters import BuildParameters
from data_prep.processes import LocalProcesses
from data_prep.remask import remask
from data_prep.shards import FORMAT, MANIFEST, VERSION, DataSet
from data_prep.tokenizer import Tokenizer

Build = Callable[..., bool]


def plain_hash(content: bytes, block_bytes: int) -> str:
    blocks = [content[start : start + block_bytes] for start in range(0, len(content), block_bytes)]
    return hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()


@given(
    content=st.binary(max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    block_bytes=st.integers(1, 20),
    read_ahead=st.integers(0, 30),
)
def test_parts_of_a_file_are_hashed_to_the_hash_of_all(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, cuts: list[int], block_bytes: int, read_ahead: int
) -> None:
    """However it is cut, and however much of each part, and of what is after it, was read for another purpose."""
    path = tmp_path_factory.getbasetemp() / "content"
    path.write_bytes(content)
    edges = sorted({0, len(content), *(min(cut, len(content)) for cut in cuts)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "BLOCK_BYTES", block_bytes)
        digests = b""
        for start, stop in pairwise(edges):
            blocks = BlockDigests(start, stop, len(content))
            first = max(start - 1, 0)
            with open(path, "rb", buffering=0) as raw:
                seen = blocks.seen_by(raw)
                seen.seek(first)
                seen.read(read_ahead)
            digests += blocks.finish(path)
            assert len(digests) == 32 * num_blocks(0, stop)
    assert digest_of_blocks(digests) == plain_hash(content, block_bytes)


@pytest.mark.parametrize("unit_bytes", [700, 10_000, 2**30])
def test_reading_hashes_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 512)
    texts = [f"Text number {number} of a corpus, in several lines\n" * 5 for number in range(60)]
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        write(tmp_path / name, as_json_lines(texts))
    write(tmp_path / "d.txt", "\n\n".join(texts).encode())
    write(tmp_path / "e.txt", b"")
    write_table(tmp_path / "f.parquet", texts, part_rows=7)
    write_table(tmp_path / "g.arrow", texts, part_rows=7)
    for reading in (ReadSettings("blank_line"), ReadSettings("file")):
        units = plan_units(find_sources([tmp_path], reading), unit_bytes)
        found = []
        for unit in units:
            digests = bytearray()
            assert sum(1 for _ in read_unit(unit, digests)) >= 0
            assert digests == digests_of_unit(unit)
            found.append((unit, bytes(digests)))
        assert {source.name: sha256 for source, sha256 in hashes_of_sources(found)} == {
            path.name: plain_hash(path.read_bytes(), 512) for path in tmp_path.iterdir()
        }


# ---- another start


@pytest.fixture
def corpus(chapters: list[Path], tmp_path: Path) -> list[Path]:
    (tmp_path / "corpus").mkdir()
    return [Path(shutil.copy2(chapter, tmp_path / "corpus")) for chapter in chapters[:9]]


SETTINGS: dict[str, Any] = {"mask_sets": 2, "validation_fraction": 0.2}


def refuse(*words: Any, **key: Any) -> Any:
    raise AssertionError("this is not needed")


def test_what_is_made_is_not_read_again(
    corpus: list[Path], tmp_path: Path, build_data: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build_data(corpus, tmp_path / "data", **SETTINGS)
    before = files_of(tmp_path / "data")
    with monkeypatch.context() as patch:
        for name in ("plan_units", "digests_of_unit", "read_source_hashes"):
            patch.setattr(build_module, name, refuse)
        assert not build_data(corpus, tmp_path / "data", **SETTINGS)
    os.utime(corpus[3])
    assert not build_data(corpus, tmp_path / "data", **SETTINGS), "the same text, written anew"
    after = files_of(tmp_path / "data")
    assert before.pop(TIMES) != after.pop(TIMES), "and it is not read a third time"
    assert after == before
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "plan_units", refuse)
        assert not build_data(corpus, tmp_path / "data", **SETTINGS)
    (tmp_path / "data" / TIMES).unlink()
    assert not build_data(corpus, tmp_path / "data", **SETTINGS), (
        "a copy of the data set, without what this machine noted"
    )


def test_other_text_of_the_same_size_and_time_is_noticed_by_samples(
    corpus: list[Path], tmp_path: Path, build_data: Build
) -> None:
    """As where a corpus was made anew and copied with its times."""
    assert build_data(corpus, tmp_path / "data", **SETTINGS)
    for path in corpus:
        status = path.stat()
        path.write_bytes(path.read_bytes().swapcase())
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ValueError, match="holds a data set made from other sources"):
        build_data(corpus, tmp_path / "data", **SETTINGS)


@pytest.mark.parametrize("is_other", [False, True])
def test_text_that_was_read_before_an_interruption(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_other: bool
) -> None:
    """Files of another time are hashed again, if what was made of them is to be kept: only another text is refused."""
    monkeypatch.setattr(build_module, "plan_units", partial(plan_units, unit_bytes=4_000))
    folder = tmp_path / "data"
    parameters = BuildParameters(max_length_tokens=64, shard_samples=128, validation_fraction=0.2)
    with pytest.raises(KeyboardInterrupt), Interrupted(0, "tokenize") as processes:
        build([Corpus(corpus)], tokenizer.path, folder, parameters, processes)
    assert len(list((folder / WORK).glob("unit-*"))) == 1
    content = corpus[0].read_bytes()
    if is_other:  # at a place that no sample has
        monkeypatch.setattr("data_prep.inputs._hash_sample", lambda sources: "")
        plan = json.loads((folder / WORK / "plan.json").read_text())
        plan["sources"]["sample_sha256"] = ""
        (folder / WORK / "plan.json").write_text(json.dumps(plan))
        content = content.replace(b"Bennet", b"Wilson")
    corpus[0].write_bytes(content)
    with LocalProcesses(1) as processes:
        if is_other:
            with pytest.raises(ValueError, match=rf"{corpus[0]}: has changed since this build first read it"):
                build([Corpus(corpus)], tokenizer.path, folder, parameters, processes)
        else:
            assert build([Corpus(corpus)], tokenizer.path, folder, parameters, processes)


def test_a_second_reading_of_other_text_is_refused(corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Where duplicates are dropped the corpus is read twice; size and time are those of the first reading."""

    def disturb() -> None:
        status = corpus[1].stat()
        corpus[1].write_bytes(corpus[1].read_bytes().replace(b"Bennet", b"Wilson"))
        os.utime(corpus[1], ns=(status.st_atime_ns, status.st_mtime_ns))

    with (
        pytest.raises(ValueError, match=rf"{corpus[1]}: has changed since"),
        Disturbed("tokenize", disturb) as processes,
    ):
        build(
            [Corpus(corpus)], tokenizer.path, tmp_path / "data", BuildParameters(), processes,
            duplicates=DuplicateSettings(drop_duplicate_documents=True),
        )  # fmt: skip


# ---- manifests


def test_the_manifest_does_not_grow_with_the_number_of_sources(
    lines: list[str], tmp_path: Path, build_data: Build
) -> None:
    sizes = []
    for num_files in (100, 400):
        corpus = tmp_path / str(num_files)
        for number in range(num_files):
            write(corpus / f"a-name-that-takes-its-space-{number:05d}.txt", "\n".join(lines[:4]).encode())
        assert build_data([corpus], tmp_path / f"{num_files}-data", validation_fraction=0)
        manifest = json.loads((tmp_path / f"{num_files}-data" / MANIFEST).read_bytes())
        sizes.append(len(json.dumps({key: value for key, value in manifest.items() if key != "splits"})))
        listed = (tmp_path / f"{num_files}-data" / SOURCE_LIST).read_bytes()
        assert listed.count(b"\n") == num_files
        assert hashlib.sha256(listed).hexdigest() == manifest["source_list"]["sha256"]
    assert abs(sizes[1] - sizes[0]) < 100


def test_training_does_not_open_the_list_of_sources(data_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data_folder, tmp_path / "data"))
    (folder / SOURCE_LIST).unlink()
    (folder / TIMES).unlink()
    data = DataSet(folder)
    assert data.read_chunk("train", 0, 0).length_B.all()
    data.close()


def test_a_data_set_of_an_earlier_version_is_read_but_not_compared(
    corpus: list[Path], tmp_path: Path, build_data: Build
) -> None:
    folder = tmp_path / "data"
    assert build_data(corpus, folder, **SETTINGS)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    content = {k: v for k, v in manifest.items() if k not in ("format", "version", "manifest_sha256", "source_list")}
    old = {**content, "sources": [{"corpus": "corpus", "name": "a.txt", "size_bytes": 3, "sha256": "0"}]}
    write_manifest(folder / MANIFEST, FORMAT, VERSION, old)
    (folder / SOURCE_LIST).unlink()
    with pytest.raises(ValueError, match=r"made by an earlier version .* remove it or choose another folder"):
        build_data(corpus, folder, **SETTINGS)
    with LocalProcesses(1) as processes:
        assert remask(folder, tmp_path / "remasked", {"seed": 7, "mask_sets": 1}, processes)
    with LocalProcesses(1) as processes:
        assert not remask(folder, tmp_path / "remasked", {"seed": 7, "mask_sets": 1}, processes)
