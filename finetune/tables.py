"""Text in files, with labels or other texts beside it: TSV, CSV, JSON lines or Parquet, by the names of their columns.

The ending decides: .tsv (a tab ends a field, quotes are text, as in GLUE's files), .csv (quotes as Excel has them), .jsonl or
.json (an object a line), .parquet.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

_ENDINGS = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
Text = str | list[str]
"""A text, or the tokens it has been cut into."""
_V = TypeVar("_V")


@dataclass(frozen=True)
class Table(Generic[_V]):
    """Some columns of a file."""

    path: Path
    rows: list[tuple[_V, ...]]
    """Of each row the columns asked for."""
    lines: list[int]
    """Where each row begins in the file, from 1; of Parquet the rows' numbers."""
    num_skipped: int = 0
    """Rows with too few fields that were left out."""

    def where(self, row: int) -> str:
        """A row's place, for messages."""
        return _where(self.path, self.lines[row])


def _where(path: Path, line: int) -> str:
    return f"{path}: {'row' if path.suffix == '.parquet' else 'line'} {line}"


def read_table(
    path: Path, columns: Sequence[str | int], *, has_header: bool = True, skip_short: bool = False
) -> Table[str]:
    """The named columns of a file, or, where there is no header, the numbered ones.

    Raises ValueError, naming file and line, for a missing column, a row with too few fields (`skip_short` leaves it out),
    what is not text, and a file without rows.
    """
    return _read(path, columns, has_header, skip_short, takes_tokens=False)


def read_texts(path: Path, columns: Sequence[str]) -> Table[Text]:
    """The same, and values may be lists of tokens."""
    return _read(path, columns, has_header=True, skip_short=False, takes_tokens=True)


def _read(
    path: Path, columns: Sequence[str | int], has_header: bool, skip_short: bool, takes_tokens: bool
) -> Table[Any]:
    if path.suffix not in _ENDINGS:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(_ENDINGS)}")
    rows: list[tuple[int, tuple[Any, ...]]]
    num_skipped = 0
    if path.suffix == ".parquet":
        rows = [(line, _of_object(path, line, value, columns, takes_tokens)) for line, value in _records(path, columns)]
    elif path.suffix in (".jsonl", ".json"):
        rows = [(line, _of_object(path, line, value, columns, takes_tokens)) for line, value in _objects(path)]
    else:
        rows, num_skipped = _of_fields(path, _fields(path, _decoded(path)), columns, has_header, skip_short)
    if not rows:
        raise ValueError(f"{path}: has no rows; expected at least one" + (" below the header" if has_header else ""))
    return Table(path, [values for _, values in rows], [line for line, _ in rows], num_skipped)


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(_decoded(path).split("\n"), start=1):
        if not content.strip():
            continue
        try:
            value = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {line}: not valid JSON ({error.msg})") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path}: line {line}: found {type(value).__name__}, expected a JSON object")
        yield line, value


def _records(path: Path, columns: Sequence[str | int]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if name in columns]
        if missing := [str(name) for name in columns if name not in names]:
            raise ValueError(
                f"{path}: has no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names) or 'none'}"
            )
        yield from enumerate(file.read(names).to_pylist(), start=1)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a whole Parquet file ({' '.join(str(error).split())})") from None


def _of_object(
    path: Path, line: int, value: dict[str, Any], columns: Sequence[str | int], takes_tokens: bool
) -> tuple[Text, ...]:
    found: list[Text] = []
    for name in columns:
        if name not in value:
            raise ValueError(
                f"{_where(path, line)}: has no column {name!r}; it has {', '.join(map(str, value)) or 'none'}"
            )
        cell = value[name]  # type: ignore[index]
        if takes_tokens and isinstance(cell, list) and all(isinstance(token, str) for token in cell):
            found.append(cell)
        elif isinstance(cell, (str, int, float)):
            found.append(str(cell))
        else:
            tokens = ", or a list of tokens" if takes_tokens else ""
            raise ValueError(
                f"{_where(path, line)}: {name} is {json.dumps(cell, default=str)[:200]}, expected text or a number{tokens}"
            )
    return tuple(found)


def _fields(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    if path.suffix == ".tsv":
        for line, content in enumerate(text.split("\n"), start=1):
            if content.strip("\r"):
                yield line, content.removesuffix("\r").split("\t")
        return
    csv.field_size_limit(sys.maxsize)
    reader, line = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}: line {line}: not valid CSV ({error})") from None


def _of_fields(
    path: Path, rows: Iterator[tuple[int, list[str]]], columns: Sequence[str | int], has_header: bool, skip_short: bool
) -> tuple[list[tuple[int, tuple[Any, ...]]], int]:  # fmt: skip
    places = [column for column in columns if isinstance(column, int)]
    if has_header:
        line, header = next(rows, (1, []))
        if not header:
            raise ValueError(f"{path}: is empty; expected a header with {', '.join(map(str, columns))}")
        if missing := [str(name) for name in columns if name not in header]:
            raise ValueError(f"{path}: line {line}: has no column {', '.join(missing)}; it has {', '.join(header)}")
        places = [header.index(str(name)) for name in columns]
    found, num_skipped = [], 0
    for line, fields in rows:
        if len(fields) <= max(places):
            if not skip_short:
                raise ValueError(f"{path}: line {line}: has {len(fields)} fields, expected at least {max(places) + 1}")
            num_skipped += 1
        else:
            found.append((line, tuple(fields[place] for place in places)))
    return found, num_skipped
