"""Documents and paragraphs that the corpus holds more than once, found in bounded memory with hashes on disk.

Three kinds, one behind the other; what an earlier kind drops is not there for the later ones:

    duplicate_documents       the same text as an earlier document
    near_duplicate_documents  much the same words as an earlier document, see `_drop_near_duplicates`
    duplicate_paragraphs      the same text as an earlier paragraph

A *place* is where something is in the corpus: number of the document << 32 | number of the paragraph in it. Of everything
with the same hash, the one with the smallest place is the first. Each step is tasks that leave their results in files:

    of a unit       hashed: in parts, as it is read, the hash of each document or paragraph and its place in the part; and the
                    documents' MinHash signatures
    of a group      hashes: those of some consecutive parts, in sorted runs with their places in the corpus; signatures
    of some buckets firsts: of the hashes in a range, over all groups: those that are in several runs, and their first place
    of a group      dropped: the places to drop; for near duplicates, pairs: documents, and the first ones they are like

There are at most MAX_GROUPS groups, and as many tasks for buckets, each of which opens each file of the step before once: however
large the corpus, no step opens more than MAX_GROUPS^2 files, besides those of the units, which are opened once for each kind.

A hash has 64 bits: that among n different texts any two are taken for one has the odds n^2 / 2^65 (a billion: 1 in 37).
"""

from __future__ import annotations

import io
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.corpus import Document, ParagraphPer, hash_of
from data_prep.files import unfinished_file, write_whole
from data_prep.parts import finished_parts, part_path
from data_prep.processes import Processes, Task
from data_prep.progress import Stage, Work

Kind = Literal["duplicate_documents", "near_duplicate_documents", "duplicate_paragraphs"]
KINDS: tuple[Kind, ...] = ("duplicate_documents", "near_duplicate_documents", "duplicate_paragraphs")
"""In the order in which they are dropped; also what is counted."""
PART_HASHES = 2**17  # a part ends with the document that reaches this number: 2 MiB of hashes, 4 MiB of signatures
BUCKET_HASHES = 2**21  # of a bucket, in the mean, and of a run; a task takes about 100 bytes for each
MAX_GROUPS = 256
HASHED = "hashed"
_COMPARED = 4096  # pairs of signatures in memory at a time
_PARAGRAPH_BITS = np.uint64(32)


@dataclass(frozen=True)
class DuplicateSettings:
    """What is dropped because the corpus has it before."""

    drop_duplicate_documents: bool = False
    """Drop documents whose text, once cleaned, is that of an earlier one."""
    near_duplicate_jaccard: float | None = None
    """Drop documents whose words are nearly those of an earlier one: the least Jaccard similarity of their sets of 5 consecutive words, as MinHash estimates it, for example 0.8 (default: none is dropped)."""
    drop_duplicate_paragraphs: Literal["none", "line", "blank_line"] = "none"
    """Drop paragraphs that the corpus has before: lines, or what stands between blank lines."""
    min_duplicate_characters: int = 50
    """Paragraphs of fewer characters are never dropped."""

    def __post_init__(self) -> None:
        if self.near_duplicate_jaccard is not None and not 0 < self.near_duplicate_jaccard <= 0.99:
            raise ValueError(
                f"near_duplicate_jaccard is {self.near_duplicate_jaccard}, expected more than 0 and at most 0.99 "
                "(drop_duplicate_documents is for equal ones)"
            )
        if self.min_duplicate_characters < 1:
            raise ValueError(f"min_duplicate_characters is {self.min_duplicate_characters}, expected at least 1")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is looked for, in the order in which it is dropped."""
        asked = (
            self.drop_duplicate_documents,
            self.near_duplicate_jaccard is not None,
            self.paragraph_per is not None,
        )
        return tuple(kind for kind, is_asked in zip(KINDS, asked, strict=True) if is_asked)

    @property
    def paragraph_per(self) -> ParagraphPer | None:
        """What a paragraph is."""
        return None if self.drop_duplicate_paragraphs == "none" else self.drop_duplicate_paragraphs


KEEP_DUPLICATES = DuplicateSettings()


# ---- the hashes of a unit


def choose_bands(settings: DuplicateSettings) -> tuple[int, int]:
    """The bands of a signature, and the values of each, that serve the threshold; (0, 0) where none is needed."""
    if settings.near_duplicate_jaccard is None:
        return 0, 0
    from data_prep import minhash  # here, because scipy takes its time to import

    return minhash.choose_bands(settings.near_duplicate_jaccard)


def hash_unit(
    folder: Path,
    unit: int,
    documents: Iterable[Document],
    settings: DuplicateSettings,
    bands: tuple[int, int],
    part_hashes: int = PART_HASHES,
    *,
    done: Sequence[Path] = (),
    digests: bytes | bytearray = b"",
) -> None:
    """Leave the hashes of a unit's documents in files, in as many parts as they need; `done` are there already.

    With the last part are the digests of the unit's input, which are complete when the last document was taken.
    """
    remaining, number = iter(documents), len(done)
    for _ in islice(remaining, sum(int(_read_stored(path, "num_documents")) for path in done)):
        pass
    hashes = _PartHashes(settings, bands)
    for document in remaining:
        hashes.add(document)
        if hashes.size >= part_hashes:
            hashes.write(part_path(folder, HASHED, unit, number, is_last=False))
            hashes, number = _PartHashes(settings, bands), number + 1
    hashes.write(part_path(folder, HASHED, unit, number, is_last=True), digests)


class _PartHashes:
    """The hashes of a part as they are collected."""

    def __init__(self, settings: DuplicateSettings, bands: tuple[int, int]) -> None:
        self._settings, self._bands = settings, bands
        self._hashes = {kind: array("Q") for kind in settings.kinds}
        self._places = {kind: array("Q") for kind in settings.kinds}
        self._signatures: list[np.ndarray] = []
        self.num_documents = self.size = 0

    def add(self, document: Document) -> None:
        """Take in the next document."""
        if self._settings.drop_duplicate_documents:
            self._add("duplicate_documents", document.hash)
        if self._settings.near_duplicate_jaccard is not None:
            from data_prep import minhash

            self._signatures.append(minhash.signature(document))
            for key in minhash.band_keys(self._signatures[-1], *self._bands):
                self._add("near_duplicate_documents", key)
        if self._settings.paragraph_per:
            for number, lines in enumerate(document.paragraphs(self._settings.paragraph_per)):
                text = "\n".join(lines)
                if len(text) >= self._settings.min_duplicate_characters:
                    self._add("duplicate_paragraphs", hash_of(text.encode()), number)
        self.num_documents += 1

    def _add(self, kind: Kind, hash: int, paragraph: int = 0) -> None:
        self._hashes[kind].append(hash)
        self._places[kind].append(self.num_documents << 32 | paragraph)
        self.size += 1

    def write(self, path: Path, digests: bytes | bytearray = b"") -> None:
        """Leave everything in files."""
        if self._signatures:
            _write_array(_signatures_of_part(path), np.stack(self._signatures))
        arrays: dict[str, np.ndarray] = {
            kind: np.array([collected, self._places[kind]], dtype=np.uint64) for kind, collected in self._hashes.items()
        }
        arrays |= {"num_documents": np.array(self.num_documents), "digests": np.frombuffer(digests, np.uint8)}
        with unfinished_file(path) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its signature has a flag beside the arrays


def _read_stored(path: Path, name: str) -> np.ndarray:
    """Return an array of a part's file."""
    with np.load(path, allow_pickle=False) as stored:
        return np.asarray(stored[name])


def read_digests(folder: Path, unit: int) -> bytes:
    """Return the digests of the input that the unit's hashes were made from."""
    parts = _read_parts(folder)
    return _read_stored(parts.path(folder, parts.of_unit(unit)[-1]), "digests").tobytes()


# ---- the parts of the corpus, and groups of them


@dataclass(frozen=True)
class _Parts:
    """All P parts of the corpus, in order, in groups of about as many."""

    unit_P: np.ndarray
    first_document: np.ndarray
    """[P + 1] the number of each part's first document; after them the number of documents."""

    def path(self, folder: Path, part: int) -> Path:
        """Where the part's hashes are."""
        of_unit = self.of_unit(self.unit_P[part])
        return part_path(folder, HASHED, int(self.unit_P[part]), part - of_unit.start, is_last=part + 1 == of_unit.stop)

    def of_unit(self, unit: int) -> range:
        return range(*np.searchsorted(self.unit_P, [unit, unit + 1]).tolist())

    def documents(self, part: int) -> range:
        return range(*self.first_document[part : part + 2].tolist())

    def first_place(self, part: int) -> np.uint64:
        return np.uint64(self.first_document[part]) << _PARAGRAPH_BITS

    def cut_out(self, part: int, places: np.ndarray) -> np.ndarray:
        """Those of places, which are in order, that are in the part."""
        span = np.array([self.first_place(part), self.first_place(part + 1)])
        return np.array(places[slice(*np.searchsorted(places, span))])

    @property
    def num_groups(self) -> int:
        return min(MAX_GROUPS, len(self.unit_P))

    def of_group(self, group: int) -> range:
        num_parts = len(self.unit_P)
        return range(group * num_parts // self.num_groups, (group + 1) * num_parts // self.num_groups)

    def group_of(self, part: int) -> int:
        return ((part + 1) * self.num_groups - 1) // len(self.unit_P)

    @property
    def first_document_of_groups(self) -> np.ndarray:
        """[G + 1] like `first_document`."""
        starts = [self.of_group(group).start for group in range(self.num_groups)]
        return np.append(self.first_document[starts], self.first_document[-1])


def _gather_parts(folder: Path, num_units: int, settings: DuplicateSettings) -> Counter[str]:
    """Write down the parts of all units; returns the number of documents and of the hashes of each kind."""
    of_units = finished_parts(folder, HASHED)
    rows: list[tuple[int, int]] = []
    total: Counter[str] = Counter()
    for unit in range(num_units):
        for path in of_units[unit]:
            with np.load(path, allow_pickle=False) as stored:
                rows.append((unit, int(stored["num_documents"])))
                total.update({kind: stored[kind].shape[1] for kind in settings.kinds})
    num_documents = sum(num for _, num in rows)
    if num_documents >= 2**32:
        raise ValueError(f"the corpus has {num_documents:,} documents; among 2**32 at most duplicates are found")
    _write_array(_parts_file(folder), np.array(rows, dtype=np.int64).T)
    return total


def _read_parts(folder: Path) -> _Parts:
    units, num_documents = np.load(_parts_file(folder))
    return _Parts(units, np.concatenate([[0], np.cumsum(num_documents)]))


# ---- from hashes to what is dropped


def find_duplicates(folder: Path, num_units: int, settings: DuplicateSettings, processes: Processes) -> None:
    """From the hashes of all units to what is dropped of each group; goes on where it was interrupted."""
    num_hashes = _gather_parts(folder, num_units, settings)
    num_groups = _read_parts(folder).num_groups

    def run(what: str, task: Task, result: Callable[[int], Path], num: int, *words: Any) -> None:
        todo = [number for number in range(num) if not result(number).exists()]
        stage = Stage(what, num, "task", num - len(todo))
        processes.run(task, ((folder, number, *words) for number in todo), stage)

    for kind in settings.kinds:
        what = kind.replace("_", " ")
        num_buckets = -(-num_hashes[kind] // BUCKET_HASHES)
        num_tasks = min(MAX_GROUPS, num_buckets)
        run("sort their hashes", _gather_group, partial(_hashes_file, folder, kind), num_groups, kind, settings)
        run(
            f"find {what}",
            _find_firsts,
            partial(_firsts_file, folder, kind, num_tasks),
            num_tasks,
            kind,
            num_tasks,
            num_buckets,
        )
        if kind == "near_duplicate_documents":
            run("compare them", _find_pairs, partial(_pairs_file, folder), num_groups, num_tasks, settings)
            _drop_near_duplicates(folder)
        else:
            run("drop them", _drop_later_ones, partial(_dropped_file, folder, kind), num_groups, kind, num_tasks)


def _gather_group(folder: Path, group: int, kind: Kind, settings: DuplicateSettings) -> Work:
    """Leave the hashes of a group's parts in one file, without those of documents that an earlier kind drops."""
    parts = _read_parts(folder)
    earlier = [_read_dropped(folder, other, group) for other in settings.kinds[: settings.kinds.index(kind)]]

    def runs() -> Iterator[np.ndarray]:
        collected: list[np.ndarray] = []
        for part in parts.of_group(group):
            rows = _read_stored(parts.path(folder, part), kind)
            rows[1] += parts.first_place(part)
            for dropped in (parts.cut_out(part, of_group) for of_group in earlier):
                rows = rows[:, ~np.isin(rows[1] >> _PARAGRAPH_BITS, dropped >> _PARAGRAPH_BITS)]
            if collected and sum(map(np.size, collected)) + rows.size > 2 * BUCKET_HASHES:
                yield _sorted(collected)
                collected = []
            collected.append(rows)
        yield _sorted(collected)

    if kind == "near_duplicate_documents":
        _gather_signatures(folder, group, parts)
    _write_runs(_hashes_file(folder, kind, group), runs())
    return Work(1)


def _sorted(collected: list[np.ndarray]) -> np.ndarray:
    """Return the columns of all arrays, in the order of their first row. The list is empty afterwards, to save memory."""
    rows = np.concatenate(collected, axis=1)
    collected.clear()
    order = np.argsort(rows[0], kind="stable")
    for row in rows:
        row[:] = row[order]
    return rows


def _gather_signatures(folder: Path, group: int, parts: _Parts) -> None:
    """Move the signatures of a group's parts to one file."""
    of_parts = [_signatures_of_part(parts.path(folder, part)) for part in parts.of_group(group)]
    if not _signatures_file(folder, group).exists():
        with unfinished_file(_signatures_file(folder, group)) as partial, open(partial, "wb") as file:
            arrays = (np.load(path) for path in of_parts if path.exists())  # a part without documents has none
            first = next(arrays, np.zeros((0, 1), np.uint32))
            num_documents = np.diff(parts.first_document_of_groups)[group]
            header = {"descr": "<u4", "fortran_order": False, "shape": (int(num_documents), first.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
            for of_part in chain([first], arrays):
                file.write(of_part.tobytes())
    for path in of_parts:
        path.unlink(missing_ok=True)


def _find_firsts(folder: Path, task: int, kind: Kind, num_tasks: int, num_buckets: int) -> Work:
    """Of the hashes in some buckets that are in several runs: their place in all but the first run, and the first place.

    A run gives a hash but once, so a text that is everywhere does not fill the memory.
    """
    num_groups = _read_parts(folder).num_groups
    runs = [run for group in range(num_groups) for run in _read_runs(_hashes_file(folder, kind, group))]

    def firsts_of(bucket: int) -> np.ndarray:
        low, high = (number * 2**64 // num_buckets for number in (bucket, bucket + 1))
        of_runs = []
        for run in runs:
            start = int(np.searchsorted(run[0], np.uint64(low)))
            rows = run[:, start : int(np.searchsorted(run[0], np.uint64(high - 1), side="right"))]
            of_runs.append(rows[:, _starts_run(rows[0])])
        hashes, places = _sorted(of_runs)
        is_first = _starts_run(hashes)
        firsts = places[is_first][np.cumsum(is_first) - 1]
        rows = np.stack([places, firsts, hashes])[:, ~is_first]
        return rows[:, np.argsort(rows[0], kind="stable")]

    buckets = range(task * num_buckets // num_tasks, (task + 1) * num_buckets // num_tasks)
    _write_runs(_firsts_file(folder, kind, num_tasks, task), map(firsts_of, buckets))
    return Work(1)


def _later_ones(folder: Path, kind: Kind, group: int, num_tasks: int) -> Iterator[np.ndarray]:
    """Return, for each run of a group, the places whose hash is at an earlier place too, and the first place of each."""
    firsts_of_buckets = [
        rows for task in range(num_tasks) for rows in _read_runs(_firsts_file(folder, kind, num_tasks, task))
    ]
    for run in _read_runs(_hashes_file(folder, kind, group)):
        hashes, places = run
        is_first = _starts_run(hashes)
        different, firsts = hashes[is_first], places[is_first]
        span = (places.min(), places.max() + np.uint64(1)) if len(places) else (0, 0)
        for rows in firsts_of_buckets:
            _, earlier, earlier_hashes = rows[:, slice(*np.searchsorted(rows[0], np.array(span, np.uint64)))]
            firsts[np.searchsorted(different, earlier_hashes)] = earlier
        firsts = firsts[np.cumsum(is_first) - 1]
        is_later = firsts != places
        yield np.stack([places[is_later], firsts[is_later]])


def _drop_later_ones(folder: Path, group: int, kind: Kind, num_tasks: int) -> Work:
    places = [later[0] for later in _later_ones(folder, kind, group, num_tasks)]
    _write_array(_dropped_file(folder, kind, group), np.sort(np.concatenate(places)))
    return Work(1)


def _find_pairs(folder: Path, group: int, num_tasks: int, settings: DuplicateSettings) -> Work:
    """The documents of a group that are like the first one with the same key of a band: [2, N], in order."""
    from data_prep import minhash

    first_document = _read_parts(folder).first_document_of_groups
    signatures = {group: _read_signatures(folder, group)}
    alike = []
    for later in _later_ones(folder, "near_duplicate_documents", group, num_tasks):
        pairs = np.unique(later >> _PARAGRAPH_BITS, axis=1).astype(np.int64)
        group_of_first = np.searchsorted(first_document, pairs[1], side="right") - 1
        is_like = np.zeros(pairs.shape[1], dtype=bool)
        for other in np.unique(group_of_first).tolist():
            if other not in signatures:
                signatures[other] = _read_signatures(folder, other)
            columns = np.flatnonzero(group_of_first == other)
            for some in np.split(columns, range(_COMPARED, len(columns), _COMPARED)):
                similarity = minhash.similarity(
                    signatures[group][pairs[0, some] - first_document[group]],
                    signatures[other][pairs[1, some] - first_document[other]],
                )
                is_like[some] = similarity >= settings.near_duplicate_jaccard
        alike.append(pairs[:, is_like])
    _write_array(_pairs_file(folder, group), np.concatenate(alike, axis=1))
    return Work(1)


def _drop_near_duplicates(folder: Path) -> None:
    """Drop, in the order of the corpus, each document that is like an earlier one that is not dropped itself.

    It is compared with, for each band, the first document of the corpus that has the same key there (and that is no
    duplicate, if those are dropped). So of many versions of a text, each a little different from the one before, those
    stay that have grown apart. Takes one byte a document.
    """
    parts = _read_parts(folder)
    is_kept = bytearray(b"\1") * int(parts.first_document[-1])
    for group in range(parts.num_groups):
        for document, first in zip(*np.load(_pairs_file(folder, group)).tolist(), strict=True):
            if is_kept[first]:
                is_kept[document] = 0
    dropped = np.flatnonzero(np.frombuffer(is_kept, dtype=np.uint8) == 0)
    _write_array(_dropped_file(folder, "near_duplicate_documents"), dropped.astype(np.uint64) << _PARAGRAPH_BITS)


def without_duplicates(
    folder: Path, unit: int, documents: Iterable[Document], settings: DuplicateSettings, counts: Counter[str]
) -> Iterator[Document]:
    """What is left of a unit's documents, maybe without a line; what is dropped is counted."""
    parts, remaining = _read_parts(folder), iter(documents)
    for part in parts.of_unit(unit):
        dropped: dict[int, Kind] = {}
        paragraphs: dict[int, set[int]] = {}
        for kind in settings.kinds:
            for place in parts.cut_out(part, _read_dropped(folder, kind, parts.group_of(part))).tolist():
                document, paragraph = divmod(place, 2**32)
                if kind == "duplicate_paragraphs":
                    paragraphs.setdefault(document, set()).add(paragraph)
                else:
                    dropped[document] = kind
        for number, document in zip(parts.documents(part), remaining, strict=False):
            if number in dropped:
                counts[dropped[number]] += 1
            elif settings.paragraph_per and number in paragraphs:
                counts["duplicate_paragraphs"] += len(paragraphs[number])
                yield document.without(paragraphs[number], settings.paragraph_per)
            else:
                yield document
    assert not sum(1 for _ in remaining)  # and so what reads them comes to its end, and counts all that it leaves out


def _starts_run(hashes: np.ndarray) -> np.ndarray:
    """Which of sorted values differ from the one before."""
    return np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)]


# ---- files


def _read_dropped(folder: Path, kind: Kind, group: int) -> np.ndarray:
    """The places that are dropped, in order: of a group at least."""
    of_group = None if kind == "near_duplicate_documents" else group
    return np.asarray(np.load(_dropped_file(folder, kind, of_group), mmap_mode="r"))


def _read_signatures(folder: Path, group: int) -> np.ndarray:
    return np.asarray(np.load(_signatures_file(folder, group), mmap_mode="r"))


def _parts_file(folder: Path) -> Path:
    return folder / "parts.npy"


def _signatures_of_part(part: Path) -> Path:
    return part.with_name(f"{part.stem.replace(HASHED, 'signatures')}.npy")


def _hashes_file(folder: Path, kind: Kind, group: int) -> Path:
    return folder / f"{kind}-hashes-{group:03d}.runs"


def _signatures_file(folder: Path, group: int) -> Path:
    return folder / f"signatures-{group:03d}.npy"


def _firsts_file(folder: Path, kind: Kind, num_tasks: int, task: int) -> Path:
    return folder / f"{kind}-firsts-{task:03d}-of-{num_tasks:03d}.runs"


def _pairs_file(folder: Path, group: int) -> Path:
    return folder / f"pairs-{group:03d}.npy"


def _dropped_file(folder: Path, kind: Kind, group: int | None = None) -> Path:
    return folder / (f"{kind}-dropped.npy" if group is None else f"{kind}-dropped-{group:03d}.npy")


def _write_array(path: Path, values: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    write_whole(path, content.getvalue())


def _write_runs(path: Path, runs: Iterable[np.ndarray]) -> None:
    """Write arrays [W, N] of unsigned 64-bit integers as they come, W the same for all; after them their N, number and W."""
    sizes: list[int] = []
    num_rows = 1
    with unfinished_file(path) as partial, open(partial, "wb") as file:
        for run in runs:
            num_rows = len(run)
            sizes.append(run.shape[1])
            file.write(run.astype(np.uint64).tobytes())
        file.write(np.array([*sizes, len(sizes), num_rows], dtype=np.uint64).tobytes())


def _read_runs(path: Path) -> list[np.ndarray]:
    """Return the arrays of a file, in the order in which they were written; of the disk, what is used is read."""
    values = np.memmap(path, np.uint64, "r")
    num_runs, num_rows = map(int, values[-2:])
    sizes = values[len(values) - 2 - num_runs : -2].astype(np.int64) * num_rows
    starts = np.cumsum(sizes) - sizes
    return [
        np.asarray(values[start : start + size]).reshape(num_rows, -1)
        for start, size in zip(starts, sizes, strict=True)
    ]
