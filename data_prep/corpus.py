"""Documents from text files, in an order that is always the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.files import sha256_of_file

DocumentPer = Literal["file", "blank_line"]
MAX_DOCUMENT_BYTES = 256 * 2**20
_SUFFIXES = (".txt", ".jsonl")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Source:
    """An input file."""

    path: Path
    name: str
    """Path below the folder that was given: what the manifest records, the same on every machine."""
    size_bytes: int


@dataclass(frozen=True)
class Document:
    """One text: its lines, without surrounding white space and without empty ones."""

    lines: tuple[str, ...]

    @property
    def hash(self) -> int:
        """64 bits of the text's BLAKE2b: decides train or validation, whatever the file order."""
        digest = hashlib.blake2b("\n".join(self.lines).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


def find_sources(corpus: Sequence[Path]) -> list[Source]:
    """The .txt and .jsonl files named or below the folders named, in the order of their names.

    Raises FileNotFoundError for a path that is not there, ValueError if there is no file to read.
    """
    sources = []
    for given in corpus:
        if given.is_dir():
            files = sorted(p for p in given.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
            sources += [Source(p, _printable(p.relative_to(given).as_posix()), p.stat().st_size) for p in files]
        elif given.is_file():
            if given.suffix not in _SUFFIXES:
                raise ValueError(f"{given}: expected a name that ends in {' or '.join(_SUFFIXES)}")
            sources.append(Source(given, _printable(given.name), given.stat().st_size))
        else:
            raise FileNotFoundError(2, "no such corpus; --corpus takes text files or folders", str(given))
    if not sources:
        raise ValueError(f"{', '.join(map(str, corpus))}: no {' or '.join(_SUFFIXES)} file there")
    return sources


def _printable(name: str) -> str:
    """A file's name; bytes of it that are not UTF-8 as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def describe_sources(sources: Sequence[Source]) -> list[dict[str, object]]:
    """Name, size and SHA-256 of each input, for the manifest."""
    return [{"name": s.name, "size_bytes": s.size_bytes, "sha256": sha256_of_file(s.path)} for s in sources]


def read_documents(
    sources: Sequence[Source],
    document_per: DocumentPer = "file",
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> Iterator[Document]:
    """All documents in order; `advance` is told the bytes read.

    Raises ValueError for text that is not UTF-8 (file and byte offset), a line that is not a JSON object with a
    string "text", or a document over 256 MiB.
    """
    for source in sources:
        if source.path.suffix == ".jsonl":
            yield from _json_lines(source, advance)
        elif document_per == "file":
            yield from _whole_file(source, advance)
        else:
            yield from _split_at_blank_lines(source, advance)


def _document(text: str) -> Iterator[Document]:
    lines = tuple(stripped for line in text.splitlines() if (stripped := line.strip()))
    if lines:
        yield Document(lines)


def _whole_file(source: Source, advance: Callable[[int], object]) -> Iterator[Document]:
    if source.size_bytes > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"{source.path}: {source.size_bytes} bytes would be one document; at most {MAX_DOCUMENT_BYTES} can be. "
            "If blank lines separate its documents, pass --document_per blank_line"
        )
    content = source.path.read_bytes()
    yield from _document(_decode(source, content, 0))
    advance(len(content))


def _split_at_blank_lines(source: Source, advance: Callable[[int], object]) -> Iterator[Document]:
    lines: list[str] = []
    num_bytes = 0
    for offset, raw in _raw_lines(source, advance):
        line = _decode(source, raw, offset)
        if line.strip():
            num_bytes += len(raw)
            if num_bytes > MAX_DOCUMENT_BYTES:
                raise ValueError(f"{source.path}: no blank line in the {MAX_DOCUMENT_BYTES} bytes before byte {offset}")
            lines.append(line)
        else:
            yield from _document("\n".join(lines))
            lines, num_bytes = [], 0
    yield from _document("\n".join(lines))


def _json_lines(source: Source, advance: Callable[[int], object]) -> Iterator[Document]:
    for number, (offset, raw) in enumerate(_raw_lines(source, advance), start=1):
        line = _decode(source, raw, offset)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source.path}: line {number}: not JSON ({error})") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'{source.path}: line {number}: expected a JSON object with a string under "text"')
        if _SURROGATE.search(text):
            raise ValueError(f"{source.path}: line {number}: has half a surrogate pair, which is no character")
        yield from _document(text)


def _raw_lines(source: Source, advance: Callable[[int], object]) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with open(source.path, "rb") as file:
        while raw := file.readline(MAX_DOCUMENT_BYTES + 1):
            if len(raw) > MAX_DOCUMENT_BYTES:
                raise ValueError(f"{source.path}: a line of over {MAX_DOCUMENT_BYTES} bytes at byte {offset}; split it")
            yield offset, raw
            offset += len(raw)
            advance(len(raw))


def _decode(source: Source, raw: bytes, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        raise ValueError(
            f"{source.path}: not UTF-8 at byte {position} (found 0x{raw[error.start]:02x}); convert it, for example with iconv"
        ) from None
    return text.removeprefix("\ufeff") if offset == 0 else text
