"""What a corpus of 160 GB asks of `data_prep build`, counted instead of waited for: files opened, bytes sent, memory, sizes.

The code that is counted is the product's; only the inputs are made up, and nothing is tokenized:

  sources      160 GB in 20,000 sparse files, which are on the disk, and in 8 million small ones, of which a tenth is made up
               as a list without files: what the conductor holds, what it sends to the workers, what the manifest takes
  start        what a second start opens and reads of the sparse files
  duplicates   20,000 parts, each with as many hashes as keeps the disk small, and a range of hashes a task that is
               smaller by the same factor: so there are as many parts, groups and buckets as at 160 GB
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from data_prep import duplicates
from data_prep.corpus import ReadSettings, Source, find_sources, plan_units
from data_prep.duplicates import HASHED, DuplicateSettings, find_duplicates
from data_prep.inputs import describe_sources, find_changed, remember_times
from data_prep.mixture import Corpus
from data_prep.parts import part_path
from data_prep.processes import LocalProcesses

_FILE_BYTES = 8 * 10**6
_SMALL_FILE_BYTES = 20_000
_BAND_KEYS = 20  # of a document, at a Jaccard similarity of 0.8
_MB = 10**6
_opened: Counter[str] | None = None


def _count_opens(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened[os.path.dirname(str(arguments[0]))] += 1


@contextmanager
def count_opens() -> Iterator[Counter[str]]:
    """The files that this process opens inside the block, by their folder."""
    global _opened
    if not hasattr(count_opens, "has_hook"):
        sys.addaudithook(_count_opens)  # there is no way to take it away
        count_opens.has_hook = True  # type: ignore[attr-defined]
    _opened = Counter()
    try:
        yield _opened
    finally:
        _opened = None


@dataclass(frozen=True)
class Scale:
    """How large a corpus is simulated."""

    num_files: int = 20_000
    num_small_files: int = 800_000
    small_file_factor: int = 10
    """Small files for each one that is made up."""
    num_parts: int = 20_000
    documents_of_part: int = 40
    num_buckets: int = 800


def measure_sources(sources: Sequence[Source], factor: int = 1) -> dict[str, Any]:
    """What the conductor holds of the sources, and sends."""
    units = plan_units(sources)
    messages = [len(pickle.dumps((number, unit, []))) for number, unit in enumerate(units)]
    with mock.patch("data_prep.inputs._hash_sample", return_value="0" * 64):
        manifest = describe_sources([Corpus([])], sources)
    held = sum(map(_size_of_source, sources)) + sum(sys.getsizeof(u) + sum(map(sys.getsizeof, u.pieces)) for u in units)
    return {
        "files": len(sources) * factor, "units": len(units) * factor, "sent_bytes": sum(messages) * factor,
        "largest_message_bytes": max(messages), "held_bytes": held * factor, "manifest_bytes": len(str(manifest)),
    }  # fmt: skip


def _size_of_source(source: Source) -> int:
    return sum(
        map(sys.getsizeof, (source, source.path, str(source.path), source.name, source.size_bytes, source.mtime_ns))
    )


def measure_start(corpus: Path, folder: Path) -> dict[str, Any]:
    """What a second start does before it says that the data set is made."""
    remember_times(folder, find_sources([corpus]))
    started = time.perf_counter()
    with count_opens() as opened:
        sources = find_sources([corpus])
        describe_sources([Corpus([corpus])], sources)
        assert not len(find_changed(folder, sources))
    return {"opens": sum(opened.values()), "seconds": time.perf_counter() - started}


def measure_duplicates(folder: Path, scale: Scale) -> dict[str, Any]:
    """The files that finding near duplicates opens."""
    folder.mkdir()
    settings = DuplicateSettings(near_duplicate_jaccard=0.8)
    random = np.random.default_rng(0)
    num_documents, kind = scale.documents_of_part, "near_duplicate_documents"
    signatures = random.integers(0, 2**32, (num_documents, 128), dtype=np.uint32)
    places = np.repeat(np.arange(num_documents, dtype=np.uint64) << np.uint64(32), _BAND_KEYS)
    for unit in range(scale.num_parts):
        path = part_path(folder, HASHED, unit, 0, is_last=True)
        hashes = random.integers(0, 2**64, len(places), dtype=np.uint64)
        with open(path, "wb") as file:
            arrays: dict[str, Any] = {kind: np.stack([hashes, places])}
            np.savez(file, num_documents=num_documents, digests=np.zeros(0, np.uint8), **arrays)
        np.save(duplicates._signatures_of_part(path), signatures)
    bucket_hashes = -(-scale.num_parts * len(places) // scale.num_buckets)
    with (
        mock.patch.object(duplicates, "BUCKET_HASHES", bucket_hashes),
        count_opens() as opened,
        LocalProcesses(1) as processes,
    ):
        processes.prepare(int)
        find_duplicates(folder, scale.num_parts, settings, processes)
    return {
        "parts": scale.num_parts, "buckets": scale.num_buckets, "opens": opened[str(folder)],
        "files": len(os.listdir(folder)),
        "opens_of_parts_x_buckets": 2 * scale.num_parts * scale.num_buckets,
    }  # fmt: skip


def measure_scale(folder: Path, scale: Scale = Scale()) -> dict[str, Any]:
    """All counts; `folder` is empty, and on a disk that takes sparse files."""
    corpus = folder / "corpus"
    for number in range(scale.num_files):
        path = corpus / f"{number // 1000:03d}" / f"part-{number:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(_FILE_BYTES)
    names = (f"{number // 1000:05d}/article-{number:08d}.txt" for number in range(scale.num_small_files))
    reading = ReadSettings()
    small = [Source(Path("/corpus") / name, name, _SMALL_FILE_BYTES, 10**18, reading) for name in names]
    return {
        "large_files": measure_sources(find_sources([corpus])),
        "small_files": measure_sources(small, scale.small_file_factor),
        "second_start": measure_start(corpus, folder),
        "duplicates": measure_duplicates(folder / "duplicates", scale),
    }


def table_of_scale(result: dict[str, Any]) -> Iterator[str]:
    """The counts in words."""
    for name in ("large_files", "small_files"):
        found = result[name]
        yield f"{found['files']:,} files, {found['units']:,} units"
        yield f"  held by the conductor alone     {found['held_bytes'] / _MB:12,.1f} MB"
        yield f"  sent to the workers, together   {found['sent_bytes'] / _MB:12,.1f} MB"
        yield f"  largest message                 {found['largest_message_bytes'] / 1000:12,.1f} kB"
        yield f"  of the manifest                 {found['manifest_bytes']:12,} bytes"
    start, found = result["second_start"], result["duplicates"]
    yield f"second start: {start['opens']:,} files opened, {start['seconds']:.2f} s"
    yield (
        f"near duplicates: {found['parts']:,} parts, {found['buckets']:,} buckets: {found['opens']:,} files opened "
        f"(each part in each bucket: {found['opens_of_parts_x_buckets']:,}), {found['files']:,} files left in the folder"
    )
