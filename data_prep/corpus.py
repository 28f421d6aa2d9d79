"""Documents from text files in many formats, in an order that is always the same."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Literal

import orjson

from data_prep.blocks import BlockDigests, num_blocks
from data_prep.corpus_files import find_files
from data_prep.files import NotJSON, parse_json
from data_prep.formats import EXPECTED_NAMES, format_of, is_compressed, is_table, num_parts, open_text, read_column
from data_prep.storage import Location, Url, find_remote, state_of

DocumentPer = Literal["file", "blank_line"]
ParagraphPer = Literal["line", "blank_line"]
MAX_DOCUMENT_BYTES = 256 * 2**20
_READ_BYTES = 2**20
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class ReadSettings:
    """What is a document, where the format leaves it open."""

    document_per: DocumentPer = "file"
    """What is a document in a .txt file: the file, or what stands between blank lines."""
    text_field: str = "text"
    """Where a document's text is: the key in JSON lines, the column in Parquet and Arrow files."""


DEFAULT_READING = ReadSettings()


@dataclass(frozen=True, slots=True)
class Source:
    """An input file."""

    path: Location
    name: str
    """Path below the folder that was given: what the manifest records, the same on every machine."""
    size_bytes: int
    mtime_ns: int
    """When it was last changed; of a remote file a number made of what its server tells of its version."""
    reading: ReadSettings = DEFAULT_READING
    corpus: int = 0
    """Which corpus of a mixture it is of."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a source: its bytes [start, stop), or its row groups or record batches where it has those.

    A JSON line belongs to the piece in which it begins; a document between blank lines to the piece in which the last
    blank line before it begins. So every piece is read by itself, forward only, and no document twice.
    """

    source: Source
    start: int
    stop: int
    first_byte: int
    """Of the part's bytes; those of a table are its share of the file, as it has no place of its own there."""
    size_bytes: int

    @property
    def num_blocks(self) -> int:
        """Blocks that begin in it: those that it is hashed by."""
        return num_blocks(self.first_byte, self.first_byte + self.size_bytes)

    def blocks(self) -> BlockDigests:
        """Return what hashes its blocks."""
        return BlockDigests(self.first_byte, self.first_byte + self.size_bytes, self.source.size_bytes)


@dataclass(frozen=True, slots=True)
class Unit:
    """A task's share of the input, all of one corpus. It names its files itself, so that nobody needs the list of all."""

    pieces: tuple[Piece, ...]
    size_bytes: int
    corpus: int

    def __str__(self) -> str:
        first, *others = self.pieces
        return f"{first.source.name} from {first.start}" + (f" and {len(others)} more" if others else "")


@dataclass(frozen=True)
class Document:
    """One text: its lines, without surrounding white space and without empty ones."""

    lines: tuple[str, ...]
    paragraph_starts: tuple[int, ...] = ()
    """The lines, besides the first, that stand behind a blank one."""
    whole_hash: int | None = None
    """`hash` of the document that this one is a rest of."""

    @property
    def utf8(self) -> bytes:
        """The lines, with a line break between two; made once."""
        # functools.cached_property takes a lock, which costs more than this.
        kept: bytes | None = self.__dict__.get("_utf8")
        if kept is None:
            kept = self.__dict__["_utf8"] = "\n".join(self.lines).encode()
        return kept

    @property
    def hash(self) -> int:
        """64 bits of the whole text's BLAKE2b: decides train or validation, whatever the file order."""
        return hash_of(self.utf8) if self.whole_hash is None else self.whole_hash

    @property
    def text(self) -> str:
        """The lines, with a blank one before each paragraph: what `make_document` makes the same document of."""
        return "\n\n".join("\n".join(lines) for lines in self.paragraphs("blank_line"))

    @property
    def num_characters(self) -> int:
        """Of the lines, with a line break between two."""
        return sum(map(len, self.lines)) + max(len(self.lines) - 1, 0)

    def paragraphs(self, per: ParagraphPer) -> list[tuple[str, ...]]:
        """The lines as paragraphs: each for itself, or those between blank lines."""
        if per == "line":
            return [(line,) for line in self.lines]
        return [self.lines[start:stop] for start, stop in pairwise((0, *self.paragraph_starts, len(self.lines)))]

    def without(self, numbers: Collection[int], per: ParagraphPer) -> Document:
        """The rest of the document without the paragraphs of these numbers."""
        kept = (lines for number, lines in enumerate(self.paragraphs(per)) if number not in numbers)
        return Document(tuple(chain.from_iterable(kept)), whole_hash=self.hash)


def hash_of(text: bytes) -> int:
    """64 bits of the text's BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def make_document(lines: Iterable[str]) -> Document:
    """The document of raw lines; without any text it has no lines."""
    stripped = [*map(str.strip, lines)]
    if "" not in stripped:
        return Document(tuple(stripped))
    kept = tuple(filter(None, stripped))
    blank = [number for number, line in enumerate(stripped) if not line]
    starts = {number - blanks_before for blanks_before, number in enumerate(blank)} - {0, len(kept)}
    return Document(kept, tuple(sorted(starts)))


def find_sources(paths: Sequence[Location], reading: ReadSettings = DEFAULT_READING, corpus: int = 0) -> list[Source]:
    """The files of this machine that `find_files` finds, and those at URLs, in the order of the paths; these functions tell
    what is raised."""
    found: list[Source] = []
    for is_remote, some in groupby(paths, key=lambda path: isinstance(path, Url)):
        if is_remote:
            for url in (path for path in some if isinstance(path, Url)):
                files = [file for file in find_remote(url) if format_of(file[0])]
                if not files:
                    raise ValueError(f"{url}: no {EXPECTED_NAMES} file there")
                found += [Source(place, name, *state, reading, corpus) for place, name, state in files]
        else:
            local = find_files([path for path in some if isinstance(path, Path)])
            found += [Source(file, _printable(name), *state_of(file), reading, corpus) for file, name in local]
    return found


def _printable(name: str) -> str:
    """A file's name; bytes of it that are not UTF-8 as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


@contextmanager
def refuse_changes(sources: Iterable[Source]) -> Iterator[None]:
    """Raises ValueError if a file is, behind the block, not what `find_sources` has found: by its size and time.

    A ValueError of the block itself is then that of a file which someone was writing.
    """
    failure: ValueError | None = None
    try:
        yield
    except ValueError as error:
        failure = error
    for source in sources:
        if state_of(source.path) != (source.size_bytes, source.mtime_ns):
            raise ValueError(
                f"{source.path}: has changed since this command was started; start it again when the file is complete"
            )
    if failure:
        raise failure


def plan_units(sources: Sequence[Source], unit_bytes: int = 8 * 2**20) -> list[Unit]:
    """The sources in units of about `unit_bytes`: a large file is split, small ones of a corpus share a unit.

    Raises ValueError for a table without the column of texts, or one that is damaged.
    """
    units = []
    for corpus, of_corpus in groupby(sources, key=attrgetter("corpus")):
        pieces: list[Piece] = []
        size_bytes = 0
        for source in of_corpus:
            for piece in _split(source, unit_bytes):
                if pieces and size_bytes + piece.size_bytes > unit_bytes:
                    units.append(Unit(tuple(pieces), size_bytes, corpus))
                    pieces, size_bytes = [], 0
                pieces.append(piece)
                size_bytes += piece.size_bytes
        units.append(Unit(tuple(pieces), size_bytes, corpus))
    return units


def _split(source: Source, unit_bytes: int) -> Iterator[Piece]:
    """The pieces of a source; their sizes add up to its own."""
    whole_bytes = source.size_bytes
    parts, step = whole_bytes, unit_bytes
    if is_table(source.path):
        parts = num_parts(source.path, source.reading.text_field)
        step = unit_bytes * parts // max(whole_bytes, 1)
    elif is_compressed(source.path) or (format_of(source.path) == ".txt" and source.reading.document_per == "file"):
        step = whole_bytes
    for start in range(0, max(parts, 1), max(step, 1)):
        stop = min(start + max(step, 1), parts)
        first_byte, end = (whole_bytes * part // parts if parts else whole_bytes for part in (start, stop))
        yield Piece(source, start, stop, first_byte if parts else 0, end - first_byte if parts else whole_bytes)


def read_documents(
    sources: Sequence[Source], advance: Callable[[int], object] = lambda num_bytes: None
) -> Iterator[Document]:
    """The documents of all units, in order; `advance` is told the bytes read. Raises what `read_unit` raises."""
    for unit in plan_units(sources):
        yield from read_unit(unit)
        advance(unit.size_bytes)


def read_unit(unit: Unit, digests: bytearray | None = None) -> Iterator[Document]:
    """The documents of a unit in order; the units' documents together do not depend on how the sources were split.

    `digests`, if given, has those of the blocks of all its pieces when the last document was taken: the text is hashed as
    it is read.

    Raises ValueError for text that is not UTF-8 (file and byte offset, or row), a line that is not a JSON object with
    a string under `text_field`, a document over 256 MiB, or a file that is damaged or has changed since `find_sources`.
    """
    with refuse_changes({piece.source: None for piece in unit.pieces}):
        for piece in unit.pieces:
            source = piece.source
            blocks = None if digests is None else piece.blocks()
            if is_table(source.path):
                yield from _rows(source, piece)
            elif format_of(source.path) == ".jsonl":
                yield from _json_lines(source, piece, blocks)
            elif source.reading.document_per == "file":
                yield from _whole_file(source, blocks)
            else:
                yield from _between_blank_lines(source, piece, blocks)
            if blocks and digests is not None:
                digests += blocks.finish(source.path)


def _document(lines: Iterable[str]) -> tuple[Document, ...]:
    """The document of the lines, or none."""
    document = make_document(lines)
    return (document,) if document.lines else ()


def _whole_file(source: Source, blocks: BlockDigests | None) -> Iterator[Document]:
    content = bytearray()
    with open_text(source.path, blocks) as file:
        while part := file.read(_READ_BYTES):
            content += part
            if len(content) > MAX_DOCUMENT_BYTES:
                raise ValueError(
                    f"{source.path}: its text would be one document of over {MAX_DOCUMENT_BYTES} bytes. "
                    "If blank lines separate its documents, pass --document_per blank_line"
                )
    yield from _document(_decode(source, content, 0).split("\n"))


def _between_blank_lines(source: Source, piece: Piece, blocks: BlockDigests | None) -> Iterator[Document]:
    stop = _stop_bytes(source, piece)
    lines: list[str] = []
    num_bytes = 0
    is_own = piece.start == 0
    for offset, raw in _raw_lines(source, piece.start, stop, blocks):
        line = _decode(source, raw, offset)
        is_blank = not line.strip()
        if is_blank:
            yield from _document(lines)
            lines, num_bytes, is_own = [], 0, True
        if offset >= stop and (is_blank or not is_own):
            return
        if is_own and not is_blank:
            num_bytes += len(raw)
            if num_bytes > MAX_DOCUMENT_BYTES:
                raise ValueError(f"{source.path}: no blank line in the {MAX_DOCUMENT_BYTES} bytes before byte {offset}")
            lines.append(line)
    yield from _document(lines)


def _json_lines(source: Source, piece: Piece, blocks: BlockDigests | None) -> Iterator[Document]:
    text_field = source.reading.text_field
    stop = _stop_bytes(source, piece)
    for offset, raw in _raw_lines(source, piece.start, stop, blocks):
        if offset >= stop:
            return
        try:
            record = orjson.loads(raw)
        except ValueError:  # Python's own parser, which is slower, takes more: NaN, for example
            line = _decode(source, raw, offset)
            if not line or line.isspace():
                continue
            try:
                record = parse_json(line)
            except NotJSON as error:
                raise _bad_line(source, offset, str(error)) from None
        if isinstance(record, dict) and text_field in record and record[text_field] is None:
            continue
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise _bad_line(
                source, offset, f'expected a JSON object with a string under "{text_field}"; --text_field names the key'
            )
        if not text.isascii() and b"\\u" in raw and _SURROGATE.search(text):
            raise _bad_line(source, offset, "has half a surrogate pair, which is no character")
        yield from _document(text.split("\n"))


def _rows(source: Source, piece: Piece) -> Iterator[Document]:
    for row, raw in read_column(source.path, source.reading.text_field, piece.start, piece.stop):
        if len(raw) > MAX_DOCUMENT_BYTES:
            raise ValueError(f"{source.path}: row {row()}: a text of over {MAX_DOCUMENT_BYTES} bytes; split it")
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 at byte {error.start} of its text (found 0x{raw[error.start]:02x})"
            raise ValueError(f"{source.path}: row {row()}: {reason}") from None
        yield from _document(text.split("\n"))


def _stop_bytes(source: Source, piece: Piece) -> int:
    """Where the piece ends in the text: a compressed file is one piece, of a text whose length nobody knows."""
    return sys.maxsize if is_compressed(source.path) else piece.stop


def _raw_lines(source: Source, start: int, stop: int, blocks: BlockDigests | None) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of the lines that begin at `start` or behind; none if no line begins before `stop`."""
    with open_text(source.path, blocks) as file:
        offset = file.seek(start - 1) if start else 0
        while start and (raw := file.readline(_READ_BYTES)):
            offset += len(raw)
            if raw.endswith(b"\n"):
                break
            if offset >= stop:
                return
        while raw := file.readline(MAX_DOCUMENT_BYTES + 1):
            if len(raw) > MAX_DOCUMENT_BYTES:
                raise ValueError(f"{source.path}: a line of over {MAX_DOCUMENT_BYTES} bytes at byte {offset}; split it")
            yield offset, raw
            offset += len(raw)


def _bad_line(source: Source, offset: int, reason: str) -> ValueError:
    number = 1
    with open_text(source.path) as file:
        while offset > 0 and (part := file.read(min(offset, _READ_BYTES))):
            number += part.count(b"\n")
            offset -= len(part)
    return ValueError(f"{source.path}: line {number}: {reason}")


def _decode(source: Source, raw: bytes | bytearray, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        raise ValueError(
            f"{source.path}: not UTF-8 at byte {position} (found 0x{raw[error.start]:02x}); convert it, for example with iconv"
        ) from None
    return text.removeprefix("\ufeff") if offset == 0 else text
