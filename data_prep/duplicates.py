"""Documents and paragraphs that the corpus holds more than once, found in bounded memory with hashes on disk.

Three kinds, one behind the other; what an earlier kind drops is not there for the later ones:

    duplicate_documents       the same text as an earlier document
    near_duplicate_documents  much the same words as an earlier document, see `_drop_near_duplicates`
    duplicate_paragraphs      the same text as an earlier paragraph

A *place* is where something is in the corpus: number of the document << 32 | number of the paragraph in it. Of everything
with the same hash, the one with the smallest place is the first. The corpus is cut into *parts*: some documents of a
unit, few enough that one process holds all their hashes. Each step is tasks that leave their results in files:

    of a part       hashes: sorted, each with its place in the part; signatures: the documents' MinHash signatures
    of a bucket     firsts: of the hashes in a range, over all parts: places in a part, and the first place in the corpus
    of a part       dropped: the places to drop; for near duplicates, pairs: documents, and the first ones they are like

A hash has 64 bits: that among n different texts any two are taken for one has the odds n^2 / 2^65 (a billion: 1 in 37).
"""

from __future__ import annotations

import io
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.corpus import Document, ParagraphPer, hash_of
from data_prep.files import read_json, write_json, write_whole
from data_prep.processes import Processes, Task
from data_prep.progress import Stage, Work

Kind = Literal["duplicate_documents", "near_duplicate_documents", "duplicate_paragraphs"]
KINDS: tuple[Kind, ...] = ("duplicate_documents", "near_duplicate_documents", "duplicate_paragraphs")
"""In the order in which they are dropped; also what is counted."""
PART_HASHES = 2**17  # a part ends with the document that reaches this number: 2 MiB of hashes, 4 MiB of signatures
BUCKET_HASHES = 2**21  # in the mean; a task takes about 100 bytes for each
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


def is_hashed(folder: Path, unit: int) -> bool:
    """Whether the unit's hashes are whole."""
    return _hashed_file(folder, unit).exists()


def hash_unit(
    folder: Path,
    unit: int,
    documents: Iterable[Document],
    settings: DuplicateSettings,
    bands: tuple[int, int],
    part_hashes: int = PART_HASHES,
    digests: bytes | bytearray = b"",
) -> None:
    """Leave the hashes of a unit's documents in files, in as many parts as they need, and the digests of its input, which
    are complete when the last document was taken."""
    parts: list[dict[str, int]] = []
    hashes = _PartHashes(settings, bands)
    for document in documents:
        hashes.add(document)
        if hashes.size >= part_hashes:
            parts.append(hashes.write(folder, _part_name(unit, len(parts))))
            hashes = _PartHashes(settings, bands)
    if hashes.num_documents:
        parts.append(hashes.write(folder, _part_name(unit, len(parts))))
    write_json(_hashed_file(folder, unit), {"parts": parts, "digests": digests.hex()})


def read_digests(folder: Path, unit: int) -> bytes:
    """Return the digests of the input that the unit's hashes were made from."""
    return bytes.fromhex(read_json(_hashed_file(folder, unit))["digests"])


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

    def write(self, folder: Path, part: str) -> dict[str, int]:
        """Leave everything in files; returns the number of documents and of the hashes of each kind."""
        for kind, collected in self._hashes.items():
            rows = np.array([collected, self._places[kind]], dtype=np.uint64)
            _write_array(_hashes_file(folder, kind, part), rows[:, np.argsort(rows[0], kind="stable")])
        if self._signatures:
            _write_array(_signatures_file(folder, part), np.stack(self._signatures))
        return {"num_documents": self.num_documents} | {kind: len(h) for kind, h in self._hashes.items()}


# ---- the parts of the corpus


@dataclass(frozen=True)
class _Parts:
    """All P parts of the corpus, in order."""

    unit_P: np.ndarray
    first_document: np.ndarray
    """[P + 1] the number of each part's first document; behind them the number of documents."""

    def name(self, part: int) -> str:
        return _part_name(int(self.unit_P[part]), part - self.of_unit(self.unit_P[part]).start)

    def of_unit(self, unit: int) -> range:
        return range(*np.searchsorted(self.unit_P, [unit, unit + 1]).tolist())

    def documents(self, part: int) -> range:
        return range(*self.first_document[part : part + 2].tolist())

    def places(self, part: int) -> np.ndarray:
        """The part's first place, and the first one behind it."""
        return self.first_document[part : part + 2].astype(np.uint64) << _PARAGRAPH_BITS


def _gather_parts(folder: Path, num_units: int) -> Counter[str]:
    """Write down the parts of all units; returns the number of documents and of the hashes of each kind."""
    parts = [(unit, part) for unit in range(num_units) for part in read_json(_hashed_file(folder, unit))["parts"]]
    total = sum((Counter(part) for _, part in parts), Counter[str]())
    if total["num_documents"] >= 2**32:
        raise ValueError(
            f"the corpus has {total['num_documents']:,} documents; among 2**32 at most duplicates are found"
        )
    rows = [[unit for unit, _ in parts], [part["num_documents"] for _, part in parts]]
    _write_array(_parts_file(folder), np.array(rows, dtype=np.int64))
    return total


def _read_parts(folder: Path) -> _Parts:
    units, num_documents = np.load(_parts_file(folder))
    return _Parts(units, np.concatenate([[0], np.cumsum(num_documents)]))


# ---- from hashes to what is dropped


def find_duplicates(folder: Path, num_units: int, settings: DuplicateSettings, processes: Processes) -> None:
    """From the hashes of all units to what is dropped of each part; goes on where it was interrupted."""
    num_hashes = _gather_parts(folder, num_units)
    num_parts = len(_read_parts(folder).unit_P)

    def run(what: str, task: Task, result: Callable[[int], Path], num: int, *words: Any) -> None:
        todo = [number for number in range(num) if not result(number).exists()]
        stage = Stage(what, num, "task", num - len(todo))
        processes.run(task, [(folder, number, *words) for number in todo], stage)

    for kind in settings.kinds:
        num, what = -(-num_hashes[kind] // BUCKET_HASHES), kind.replace("_", " ")
        run(f"find {what}", _find_firsts, partial(_firsts_file, folder, kind, num), num, kind, num, settings)
        if kind == "near_duplicate_documents":
            run("compare them", _find_pairs, partial(_pairs_file, folder), num_parts, num, settings)
            _drop_near_duplicates(folder)
        else:
            result = partial(_dropped_file, folder, kind)
            run("drop them", _drop_later_ones, result, num_parts, kind, num, settings)


def _find_firsts(folder: Path, bucket: int, kind: Kind, num_buckets: int, settings: DuplicateSettings) -> Work:
    """Of the hashes in a bucket that are in several parts: their place in all but the first part, and the first place.

    A part gives a hash but once, so a text that is everywhere does not fill the memory.
    """
    parts = _read_parts(folder)
    low, high = (number * 2**64 // num_buckets for number in (bucket, bucket + 1))
    of_parts = [_read_hashes(folder, kind, parts, part, settings, low, high) for part in range(len(parts.unit_P))]
    hashes, places = np.concatenate([rows[:, _starts_run(rows[0])] for rows in of_parts], axis=1)
    del of_parts
    order = np.argsort(hashes, kind="stable")
    hashes, places = hashes[order], places[order]
    is_first = _starts_run(hashes)
    firsts = places[is_first][np.cumsum(is_first) - 1]
    rows = np.stack([places, firsts, hashes])[:, ~is_first]
    _write_array(_firsts_file(folder, kind, num_buckets, bucket), rows[:, np.argsort(rows[0], kind="stable")])
    return Work(1)


def _later_ones(
    folder: Path, kind: Kind, parts: _Parts, part: int, num_buckets: int, settings: DuplicateSettings
) -> tuple[np.ndarray, np.ndarray]:
    """The places in a part whose hash is at an earlier place too, and the first place of each."""
    hashes, places = _read_hashes(folder, kind, parts, part, settings)
    is_first = _starts_run(hashes)
    different, firsts = hashes[is_first], places[is_first]
    for bucket in range(num_buckets):
        rows = np.load(_firsts_file(folder, kind, num_buckets, bucket), mmap_mode="r")
        _, earlier, earlier_hashes = rows[:, slice(*np.searchsorted(rows[0], parts.places(part)))]
        firsts[np.searchsorted(different, earlier_hashes)] = earlier
    firsts = firsts[np.cumsum(is_first) - 1]
    is_later = firsts != places
    return places[is_later], firsts[is_later]


def _drop_later_ones(folder: Path, part: int, kind: Kind, num_buckets: int, settings: DuplicateSettings) -> Work:
    parts = _read_parts(folder)
    places, _ = _later_ones(folder, kind, parts, part, num_buckets, settings)
    _write_array(_dropped_file(folder, kind, part), np.sort(places))
    return Work(1)


def _find_pairs(folder: Path, part: int, num_buckets: int, settings: DuplicateSettings) -> Work:
    """The documents of a part that are like the first one with the same key of a band: [2, N], in order."""
    from data_prep import minhash

    parts = _read_parts(folder)
    later = _later_ones(folder, "near_duplicate_documents", parts, part, num_buckets, settings)
    pairs = np.unique(np.stack(later) >> _PARAGRAPH_BITS, axis=1).astype(np.int64)
    part_of_first = np.searchsorted(parts.first_document, pairs[1], side="right") - 1
    is_like = np.zeros(pairs.shape[1], dtype=bool)
    signatures = _read_signatures(folder, parts.name(part))
    for other in np.unique(part_of_first).tolist():
        others = _read_signatures(folder, parts.name(other))
        columns = np.flatnonzero(part_of_first == other)
        for some in np.split(columns, range(_COMPARED, len(columns), _COMPARED)):
            similarity = minhash.similarity(
                signatures[pairs[0, some] - parts.first_document[part]],
                others[pairs[1, some] - parts.first_document[other]],
            )
            is_like[some] = similarity >= settings.near_duplicate_jaccard
    _write_array(_pairs_file(folder, part), pairs[:, is_like])
    return Work(1)


def _drop_near_duplicates(folder: Path) -> None:
    """Drop, in the order of the corpus, each document that is like an earlier one that is not dropped itself.

    It is compared with, for each band, the first document of the corpus that has the same key there (and that is no
    duplicate, if those are dropped). So of many versions of a text, each a little different from the one before, those
    stay that have grown apart. Takes one byte a document.
    """
    parts = _read_parts(folder)
    is_kept = bytearray(b"\1") * int(parts.first_document[-1])
    for part in range(len(parts.unit_P)):
        for document, first in zip(*np.load(_pairs_file(folder, part)).tolist(), strict=True):
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
            for place in _read_dropped(folder, kind, parts, part).tolist():
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


def _read_hashes(
    folder: Path, kind: Kind, parts: _Parts, part: int, settings: DuplicateSettings, low: int = 0, high: int = 2**64
) -> np.ndarray:
    """The hashes of a part in [low, high), sorted, and the place of each: [2, N]. Not those that an earlier kind drops."""
    stored = np.load(_hashes_file(folder, kind, parts.name(part)), mmap_mode="r")
    start = int(np.searchsorted(stored[0], np.uint64(low)))
    stop = int(np.searchsorted(stored[0], np.uint64(high - 1), side="right"))
    rows = np.array(stored[:, start:stop])
    rows[1] += parts.places(part)[0]
    for earlier in settings.kinds[: settings.kinds.index(kind)]:
        dropped = _read_dropped(folder, earlier, parts, part)
        rows = rows[:, ~np.isin(rows[1] >> _PARAGRAPH_BITS, dropped >> _PARAGRAPH_BITS)]
    return rows


def _read_dropped(folder: Path, kind: Kind, parts: _Parts, part: int) -> np.ndarray:
    """The places in a part that are dropped, in order."""
    if kind != "near_duplicate_documents":
        return np.asarray(np.load(_dropped_file(folder, kind, part)))
    dropped = np.load(_dropped_file(folder, kind), mmap_mode="r")
    return np.array(dropped[slice(*np.searchsorted(dropped, parts.places(part)))])


def _read_signatures(folder: Path, part: str) -> np.ndarray:
    return np.asarray(np.load(_signatures_file(folder, part), mmap_mode="r"))


def _part_name(unit: int, part: int) -> str:
    return f"{unit:08d}-{part:04d}"


def _hashed_file(folder: Path, unit: int) -> Path:
    return folder / f"hashed-{unit:08d}.json"


def _parts_file(folder: Path) -> Path:
    return folder / "parts.npy"


def _hashes_file(folder: Path, kind: Kind, part: str) -> Path:
    return folder / f"{kind}-hashes-{part}.npy"


def _signatures_file(folder: Path, part: str) -> Path:
    return folder / f"signatures-{part}.npy"


def _firsts_file(folder: Path, kind: Kind, num_buckets: int, bucket: int) -> Path:
    return folder / f"{kind}-firsts-{bucket:05d}-of-{num_buckets:05d}.npy"


def _pairs_file(folder: Path, part: int) -> Path:
    return folder / f"pairs-{part:08d}.npy"


def _dropped_file(folder: Path, kind: Kind, part: int | None = None) -> Path:
    return folder / (f"{kind}-dropped.npy" if part is None else f"{kind}-dropped-{part:08d}.npy")


def _write_array(path: Path, values: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    write_whole(path, content.getvalue())
