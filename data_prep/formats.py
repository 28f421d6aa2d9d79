"""What a corpus file holds, whatever its format: text as it is decompressed, or a column of a Parquet or Arrow file."""

from __future__ import annotations

import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_prep.blocks import BlockDigests
from data_prep.storage import Location, Url, open_raw, open_remote

EXPECTED_NAMES = ".txt, .jsonl (also with .gz, .zst or .xz), .parquet or .arrow"
# A new decompressor, and the bytes it is given at a time: few enough to become 8 MiB of text at most.
_DECOMPRESSORS: dict[str, tuple[Callable[[], Any], int]] = {
    ".gz": (lambda: zlib.decompressobj(wbits=31), 2048),  # 31: with gzip's header and checksum
    ".zst": (lambda: zstandard.ZstdDecompressor().decompressobj(), 256),  # 4 bytes may become 128 KiB
    ".xz": (lzma.LZMADecompressor, 256),
}
_TEXT_SUFFIXES, _TABLE_SUFFIXES = (".txt", ".jsonl"), (".parquet", ".arrow")
_BATCH_ROWS = 256
_BYTES_TYPE = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def format_of(path: Location) -> str:
    """.txt, .jsonl, .parquet or .arrow, without the suffix of a compression; "" for a file of another kind."""
    return format_of_name(path.name)


def format_of_name(name: str) -> str:
    """Like `format_of`, of a file's name."""
    stem, suffix = os.path.splitext(name)
    if suffix in _DECOMPRESSORS:
        suffix = os.path.splitext(stem)[1]
        return suffix if suffix in _TEXT_SUFFIXES else ""
    return suffix if suffix in (*_TEXT_SUFFIXES, *_TABLE_SUFFIXES) else ""


def is_compressed(path: Location) -> bool:
    """Whether it is a text file that can only be read from its start."""
    return path.suffix in _DECOMPRESSORS


def is_table(path: Location) -> bool:
    """Whether it has columns, and row groups (Parquet) or record batches (Arrow) as its parts."""
    return path.suffix in _TABLE_SUFFIXES


@contextmanager
def open_text(path: Location, blocks: BlockDigests | None = None) -> Iterator[IO[bytes]]:
    """The text of a file, decompressed as it is read. The bytes of the file itself go through `blocks`.

    Raises ValueError, while it is read, for a compressed file that is cut short or damaged.
    """
    try:
        with open_raw(path) as raw:
            file = blocks.seen_by(raw) if blocks else io.BufferedReader(raw, 2**17)
            yield io.BufferedReader(_Decompressed(file, path.suffix), 2**17) if is_compressed(path) else file
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise _damaged(path, error) from None


class _Decompressed(io.RawIOBase):
    """The text of a compressed file, which may be several compressed texts one behind the other.

    The readers that come with the decompressors pass over a file that is cut short (zstandard) or goes on with
    something else (lzma).
    """

    def __init__(self, file: IO[bytes], suffix: str) -> None:
        self._file = file
        self._new_decompressor, self._read_bytes = _DECOMPRESSORS[suffix]
        self._decompressor = self._new_decompressor()  # None between two texts
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            compressed = self._compressed or self._file.read(self._read_bytes)
            if not compressed:
                if self._decompressor:
                    raise EOFError("its end is missing")
                return 0
            if not self._decompressor:
                compressed = self._compressed = compressed.lstrip(b"\0")  # padding, which gzip and xz allow
                if not compressed:
                    continue
                self._decompressor = self._new_decompressor()
            self._text = memoryview(self._decompressor.decompress(compressed))
            self._compressed = self._decompressor.unused_data
            if self._decompressor.eof:
                self._decompressor = None
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size


def _damaged(path: Location, error: BaseException) -> ValueError:
    return ValueError(f"{path}: is cut short or damaged ({' '.join(str(error).split())})")


def _opened(path: Location) -> Any:
    return pa.PythonFile(open_remote(path), "r") if isinstance(path, Url) else pa.memory_map(str(path))


class _Parquet:
    def __init__(self, path: Location) -> None:
        self._file = pq.ParquetFile(_opened(path) if isinstance(path, Url) else path, page_checksum_verification=True)
        self.schema = self._file.schema_arrow
        self.num_parts: int = self._file.num_row_groups

    def batches(self, part: int, column: str) -> Iterator[Any]:
        yield from self._file.iter_batches(_BATCH_ROWS, [part], [column], use_threads=False)


class _ArrowFile:
    def __init__(self, path: Location) -> None:
        self._reader = pa.ipc.open_file(_opened(path))
        self.schema = self._reader.schema
        self.num_parts: int = self._reader.num_record_batches

    def batches(self, part: int, column: str) -> Iterator[Any]:
        yield self._reader.get_batch(part)


class _ArrowStream:
    """A stream's batches can only be found one after the other: they are one part."""

    def __init__(self, path: Location) -> None:
        self._reader = pa.ipc.open_stream(_opened(path))
        self.schema = self._reader.schema
        self.num_parts = 1

    def batches(self, part: int, column: str) -> Iterator[Any]:
        yield from self._reader


def _open_table(path: Location, column: str) -> _Parquet | _ArrowFile | _ArrowStream:
    table: _Parquet | _ArrowFile | _ArrowStream
    if path.suffix == ".parquet":
        table = _Parquet(path)
    else:
        with open_raw(path) as file:
            table = _ArrowFile(path) if file.read(6) == b"ARROW1" else _ArrowStream(path)
    index = table.schema.get_field_index(column)
    kind = table.schema.field(index).type if index >= 0 else None
    if (kind.value_type if kind and pa.types.is_dictionary(kind) else kind) not in _BYTES_TYPE:
        raise ValueError(
            f'{path}: expected strings in a column "{column}", found {kind or "no such column"}; '
            f"its columns are {', '.join(table.schema.names)}: choose one with --text_field"
        )
    return table


@contextmanager
def _damage_named(path: Location) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _damaged(path, error) from None


def num_parts(path: Location, column: str) -> int:
    """Row groups or record batches of a table.

    Raises ValueError if it has no such column of strings, or is damaged.
    """
    with _damage_named(path):
        num: int = _open_table(path, column).num_parts
    return num


def read_column(path: Location, column: str, start: int, stop: int) -> Iterator[tuple[Callable[[], int], bytes]]:
    """The UTF-8 text of each row of parts [start, stop) that has one, and what finds the row's number, from 1."""
    with _damage_named(path):
        table = _open_table(path, column)
        for part in range(start, stop):
            rows_before = 0
            for batch in table.batches(part, column):
                for row, text in enumerate(_as_bytes(batch.column(column)), start=rows_before + 1):
                    if text.is_valid:
                        yield partial(_row_number, path, column, part, row), text.as_py()
                rows_before += batch.num_rows


def _as_bytes(texts: Any) -> Any:
    """Strings as bytes: Arrow trusts what a file says of them, so their places are checked here; UTF-8 is not."""
    if pa.types.is_dictionary(texts.type):
        texts.validate(full=True)
        texts = texts.dictionary_decode()
    texts = texts.view(_BYTES_TYPE[texts.type])
    texts.validate(full=True)
    return texts


def _row_number(path: Location, column: str, part: int, row: int) -> int:
    table = _open_table(path, column)
    rows_before: int = sum(batch.num_rows for before in range(part) for batch in table.batches(before, column))
    return rows_before + row
