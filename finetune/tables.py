"""Labelled text in files: TSV, CSV or JSON lines, by the names of their columns.

The ending decides: .tsv (a tab ends a field, quotes are text, as in GLUE's files), .csv (quotes as Excel has them), .jsonl
(an object a line).
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ENDINGS = (".tsv", ".csv", ".jsonl")


@dataclass(frozen=True)
class Table:
    """Some columns of a file."""

    path: Path
    rows: list[tuple[str, ...]]
    """Of each row the columns asked for."""
    lines: list[int]
    """Where each row begins in the file, from 1."""
    num_skipped: int = 0
    """Rows with too few fields that were left out."""

    def where(self, row: int) -> str:
        """A row's place, for messages."""
        return f"{self.path}: line {self.lines[row]}"


def read_table(path: Path, columns: Sequence[str | int], *, has_header: bool = True, skip_short: bool = False) -> Table:
    """The named columns of a file, or, where there is no header, the numbered ones.

    Raises ValueError, naming file and line, for a missing column, a row with too few fields (`skip_short` leaves it out),
    what is not text, and a file without rows.
    """
    if path.suffix not in _ENDINGS:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(_ENDINGS)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    if path.suffix == ".jsonl":
        rows = [(line, _of_object(path, line, value, columns)) for line, value in _objects(path, text)]
        num_skipped = 0
    else:
        rows, num_skipped = _of_fields(path, _fields(path, text), columns, has_header, skip_short)
    if not rows:
        raise ValueError(f"{path}: has no rows; expected at least one" + (" below the header" if has_header else ""))
    return Table(path, [values for _, values in rows], [line for line, _ in rows], num_skipped)


def _objects(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            value = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {line}: not valid JSON ({error.msg})") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path}: line {line}: found {type(value).__name__}, expected a JSON object")
        yield line, value


def _of_object(path: Path, line: int, value: dict[str, Any], columns: Sequence[str | int]) -> tuple[str, ...]:
    for name in columns:
        if name not in value:
            raise ValueError(f"{path}: line {line}: has no column {name!r}; it has {', '.join(value) or 'none'}")
        if not isinstance(value[name], (str, int, float)):  # type: ignore[index]
            raise ValueError(f"{path}: line {line}: {name} is {json.dumps(value[name])}, expected text or a number")  # type: ignore[index]
    return tuple(str(value[name]) for name in columns)  # type: ignore[index]


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
) -> tuple[list[tuple[int, tuple[str, ...]]], int]:  # fmt: skip
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
