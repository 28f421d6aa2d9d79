"""What a data set was made from: its list of sources, and whether they are still what they were.

    sources.jsonl    a source a line: corpus, name, size and hash. Nothing but `build` opens it: it may name millions of files
    .mtimes.npy      when each source was last changed, on the machine of the build: only a cache, and not part of the data set;
                     until the data set is whole it is with the unfinished work

A start reads no text to compare it with what was read before: the names and sizes must be the same, a sample of the text,
and the times. Sources of another time are hashed again. The hash of a source is that of the hashes of its blocks of 1 MiB.
"""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.blocks import digest_of_blocks
from data_prep.corpus import Source, Unit, refuse_changes
from data_prep.files import sha256_of_file, unfinished_file, write_whole
from data_prep.mixture import Mixture
from data_prep.storage import open_raw

SOURCE_LIST = "sources.jsonl"
TIMES = ".mtimes.npy"
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096
_DIGEST_BYTES = 32


def describe_sources(mixture: Mixture, sources: Sequence[Source]) -> dict[str, Any]:
    """Return what the manifest tells of all sources: it stays small, however many there are."""
    listing = hashlib.sha256()
    for source in sources:
        listing.update(f"{mixture[source.corpus].name}\0{source.name}\0{source.size_bytes}\n".encode())
    return {
        "num_files": len(sources),
        "size_bytes": sum(source.size_bytes for source in sources),
        "listing_sha256": listing.hexdigest(),
        "sample_sha256": _hash_sample(sources),
    }


def _hash_sample(sources: Sequence[Source]) -> str:
    """Return a hash of 4 KiB at each of 64 places, evenly spread over the text of all sources."""
    ends = list(accumulate(source.size_bytes for source in sources))
    found = hashlib.sha256()
    for number in range(_NUM_SAMPLES if ends[-1] else 0):
        place = ends[-1] * number // _NUM_SAMPLES
        index = bisect_right(ends, place)
        with open_raw(sources[index].path) as file:
            file.seek(place - (ends[index] - sources[index].size_bytes))
            found.update(file.read(_SAMPLE_BYTES))
    return found.hexdigest()


# ---- times


def find_changed(folder: Path, sources: Sequence[Source]) -> np.ndarray:
    """Return the numbers of the sources that were changed at another time than `remember_times` has noted."""
    times = np.array([source.mtime_ns for source in sources], dtype=np.int64)
    try:
        known = np.load(folder / TIMES, allow_pickle=False)
    except (OSError, ValueError):
        known = np.zeros(0, np.int64)
    return np.flatnonzero(times != known) if len(known) == len(times) else np.arange(len(times))


def remember_times(folder: Path, sources: Sequence[Source]) -> None:
    """Note when each source was last changed."""
    content = io.BytesIO()
    np.save(content, np.array([source.mtime_ns for source in sources], dtype=np.int64))
    write_whole(folder / TIMES, content.getvalue())


# ---- hashes


def digests_of_unit(unit: Unit) -> bytes:
    """Return the digests of the blocks of a unit. Raises ValueError if a file changes meanwhile."""
    with refuse_changes({piece.source: None for piece in unit.pieces}):
        return b"".join(piece.blocks().finish(piece.source.path) for piece in unit.pieces)


def refuse_other_digests(unit: Unit, digests: bytes | bytearray, expected: bytes) -> None:
    """Raise ValueError, naming the file, if a unit is not what was read before."""
    for piece, found, before in zip(unit.pieces, _split(unit, digests), _split(unit, expected), strict=True):
        if found != before:
            raise ValueError(
                f"{piece.source.path}: has changed since this build first read it; put it back, or begin anew in another folder"
            )


def _split(unit: Unit, digests: bytes | bytearray) -> list[bytes]:
    ends = accumulate((piece.num_blocks * _DIGEST_BYTES for piece in unit.pieces), initial=0)
    return [bytes(digests[start:stop]) for start, stop in pairwise(ends)]


def hashes_of_sources(units: Iterable[tuple[Unit, bytes]]) -> Iterator[tuple[Source, str]]:
    """Return each source and its hash, from all units in order and the digests of their blocks."""
    source: Source | None = None
    digests = b""
    for unit, of_unit in units:
        for piece, of_piece in zip(unit.pieces, _split(unit, of_unit), strict=True):
            if piece.first_byte == 0:
                if source:
                    yield source, digest_of_blocks(digests)
                source, digests = piece.source, b""
            digests += of_piece
    if source:
        yield source, digest_of_blocks(digests)


# ---- the list


def write_source_list(folder: Path, mixture: Mixture, hashes: Iterable[tuple[Source, str]]) -> dict[str, str]:
    """Write the list of sources and their hashes; returns its name and own hash, for the manifest."""
    with unfinished_file(folder / SOURCE_LIST) as partial, open(partial, "w", encoding="utf-8") as file:
        for source, sha256 in hashes:
            entry = {"corpus": mixture[source.corpus].name, "name": source.name, "size_bytes": source.size_bytes}
            file.write(json.dumps({**entry, "blocks_sha256": sha256}, ensure_ascii=False) + "\n")
    return {"file": SOURCE_LIST, "sha256": sha256_of_file(folder / SOURCE_LIST)}


def read_source_hashes(folder: Path) -> list[str]:
    """Return the hash of each source of a data set."""
    with open(folder / SOURCE_LIST, encoding="utf-8") as file:
        return [json.loads(line)["blocks_sha256"] for line in file]


def copy_source_list(source: Path, folder: Path) -> None:
    """Copy the list of one data set to another, where there is one: data sets made by earlier versions have none."""
    with suppress(FileNotFoundError):
        write_whole(folder / SOURCE_LIST, (source / SOURCE_LIST).read_bytes())
