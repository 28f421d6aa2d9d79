"""Rows of TSV, CSV, JSON-lines and Parquet files: one reader for every command.

The ending decides: .tsv (a tab ends a field, quotes are text, as in GLUE's files), .csv (quotes as Excel has them), .jsonl or
.json (an object a line), .parquet. A file is read row by row, and again for each pass over it, so that its texts are never all
in memory.

Every row has as many fields as the header; empty fields after the last one do not count. A value is taken only if it is of
the kind that its column asks for: see `as_text`, `as_text_or_tokens`, `as_label` and `as_number`. Each error names the file,
the line, what was found, what was expected and what to do.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.files import NotJSON, named, parse_json, sha256_of_file

_ENDINGS = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
Text = str | list[str]
"""A text, or the tokens it has been cut into."""
_V = TypeVar("_V")
_SURROGATE = re.compile("[\ud800-\udfff]")
_DECIMAL = re.compile(r"(?P<sign>[+-]?)(?=\.?[0-9])(?P<whole>[0-9]*)(\.(?P<fraction>[0-9]*))?")
_NO_LABEL = ("", "-", "nan")
_SHOWN_CHARACTERS = 200
_PARQUET_ROWS = 1024


# ---- values


def described(value: Any) -> str:
    """Return a value of JSON as an error shows it: the value, cut, and what kind of value it is."""
    if value is None:
        return "nothing"
    kind = next(kind for types, kind in _KINDS if isinstance(value, types))
    return f"{shortened(json.dumps(value, ensure_ascii=False, default=str))} ({kind})"


_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "true or false"), (int, "a number"), (float, "a number"), (str, "text"), (list, "a list"), (dict, "an object"),
    (object, "a value of another kind"),
)  # fmt: skip


def shortened(text: str) -> str:
    """Return the text, without its end if it is long."""
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def as_text(value: Any) -> str:
    """Return a text, or a whole number as text. Raises ValueError for any other value.

    Numbers with a fraction are refused: the file's way of writing them is lost when they are read.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"is {described(value)}, expected text; put it in quotes if it is meant as text")
    if _SURROGATE.search(value):
        raise ValueError("has half a surrogate pair, which is no character; repair what wrote the file")
    return value


def as_text_or_tokens(value: Any) -> Text:
    """Return a text, or a list of tokens. Raises ValueError for any other value."""
    if not isinstance(value, list):
        try:
            return as_text(value)
        except ValueError as error:
            raise ValueError(str(error).replace("expected text", "expected text or a list of tokens")) from None
    for token in value:
        if not isinstance(token, str):
            raise ValueError(
                f"is a list with {described(token)} in it, expected text or a list of tokens, which are texts"
            )
        as_text(token)
    return value


def as_label(value: Any) -> str:
    """Return a class's name. White space around it does not count, and equal decimal numbers are one class: 1, 1.0 and "1".

    Raises ValueError for what stands for no label (nothing, "-", NaN), for true and false, and for anything but text and numbers.
    """
    if isinstance(value, (bool, list, dict)) or value is None:
        raise ValueError(f"is {described(value)}, expected a class's name or number; write names as text in quotes")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"is {described(value)}, which is no class; remove the row, or give it a label")
    label = as_text(repr(value) if isinstance(value, float) else value).strip()
    if label.lower() in _NO_LABEL:
        raise ValueError(f"is {label!r}, which stands for no label; remove the row, or give it a label")
    number = _DECIMAL.fullmatch(label)
    if number is None:
        return label
    sign, whole, fraction = number["sign"], number["whole"].lstrip("0") or "0", (number["fraction"] or "").rstrip("0")
    plain = f"{whole}.{fraction}" if fraction else whole
    return f"-{plain}" if sign == "-" and plain != "0" else plain


def as_number(value: Any) -> float:
    """Return a finite number, written as such or as text. Raises ValueError for any other value."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"is {described(value)}, expected a number; for classes leave out --regression")
    return number


@dataclass(frozen=True)
class Column(Generic[_V]):
    """A column that is wanted."""

    name: str | int
    """Its name, or its number where the file has no header."""
    read: Callable[[Any], _V]
    """Makes a cell's value of what the file holds; its ValueError is to continue "COLUMN ..."."""
    flag: str = ""
    """Command-line flag that chooses the column, for messages."""


# ---- files


@dataclass(frozen=True)
class Row:
    """A row's values, in the order of the columns asked for."""

    line: int
    """Where it begins in the file, from 1; of Parquet the row's number."""
    values: tuple[Any, ...]


class TableFile:
    """Some columns of a file, which is read again for each pass: `for row in table`.

    Raises ValueError, while it is read, for everything that cannot be taken; see the module.
    """

    def __init__(
        self, path: Path, columns: Sequence[Column[Any]], *, has_header: bool = True, skips_broken: bool = False
    ) -> None:
        """`skips_broken`: rows with too few or too many fields are counted instead of refused."""
        if path.suffix not in _ENDINGS:
            raise ValueError(f"{path}: expected a file that ends in {', '.join(_ENDINGS)}; rename or convert it")
        self.path, self.columns = path, columns
        self._has_header, self._skips_broken = has_header, skips_broken
        self.sha256 = ""
        """Of the file's content; known after the first pass. Later passes must read the same."""
        self.num_rows = 0
        self.num_skipped = 0
        """Rows whose number of fields is wrong."""
        self.first_skipped = 0
        """Line of the first of them."""

    def where(self, line: int) -> str:
        """Return a row's place in words, for messages."""
        return f"{self.path}: {'row' if self.path.suffix == '.parquet' else 'line'} {line}"

    def __iter__(self) -> Iterator[Row]:
        digest = hashlib.sha256()
        self.num_rows = self.num_skipped = self.first_skipped = 0
        for row in self._rows(digest.update):
            self.num_rows += 1
            yield row
        found = sha256_of_file(self.path) if self.path.suffix == ".parquet" else digest.hexdigest()
        if self.sha256 not in ("", found):
            raise ValueError(
                f"{self.path}: has changed since this command began; start it again when the file is complete"
            )
        self.sha256 = found
        if not self.num_rows:
            below = " below the header" if self._has_header and self.path.suffix in (".tsv", ".csv") else ""
            raise ValueError(f"{self.path}: has no rows; expected at least one{below}")

    def _rows(self, see: Callable[[bytes], object]) -> Iterator[Row]:
        if self.path.suffix == ".parquet":
            yield from (Row(line, self._of_object(line, value)) for line, value in self._parquet_rows())
        elif self.path.suffix in (".jsonl", ".json"):
            yield from (Row(line, self._of_object(line, value)) for line, value in self._objects(see))
        else:
            yield from self._of_fields(self._tab_fields(see) if self.path.suffix == ".tsv" else self._csv_fields(see))

    # ---- objects

    def _objects(self, see: Callable[[bytes], object]) -> Iterator[tuple[int, dict[str, Any]]]:
        for line, content in text_lines(self.path, see):
            if not content.strip():
                continue
            try:
                value = parse_json(content)
            except NotJSON as error:
                raise ValueError(f"{self.where(line)}: {error}; expected a JSON object on each line") from None
            if not isinstance(value, dict):
                raise ValueError(f"{self.where(line)}: found {described(value)}, expected a JSON object on each line")
            yield line, value

    def _parquet_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        wanted = [column.name for column in self.columns]
        line = 0
        try:
            with named(self.path), open(self.path, "rb") as content:
                file = pq.ParquetFile(content)
                names = [name for name in file.schema_arrow.names if name in wanted]
                self._refuse_missing("", file.schema_arrow.names)
                for batch in file.iter_batches(_PARQUET_ROWS, columns=names):
                    for value in batch.to_pylist():
                        line += 1
                        yield line, value
        except pa.ArrowException as error:
            reason = shortened(" ".join(str(error).split()))
            raise ValueError(f"{self.path}: not a complete Parquet file ({reason}); get or make it again") from None

    def _of_object(self, line: int, value: dict[str, Any]) -> tuple[Any, ...]:
        found = []
        for column in self.columns:
            if column.name not in value:
                self._refuse_missing(f"{self.where(line)}: ", [*value])
            found.append(self._read(column, line, value[column.name]))  # type: ignore[index]
        return tuple(found)

    def _read(self, column: Column[_V], line: int, value: Any) -> _V:
        try:
            return column.read(value)
        except ValueError as error:
            name = f"column {column.name + 1}" if isinstance(column.name, int) else column.name
            raise ValueError(f"{self.where(line)}: {name} {error}") from None

    def _refuse_missing(self, where: str, names: Sequence[str]) -> None:
        missing = [column for column in self.columns if column.name not in names]
        if missing:
            flags = " and ".join(dict.fromkeys(column.flag for column in missing if column.flag))
            raise ValueError(
                f"{where or f'{self.path}: '}has no column {', '.join(repr(column.name) for column in missing)}; it has "
                f"{shortened(', '.join(map(str, names))) or 'none'}" + (f"; name another with {flags}" if flags else "")
            )

    # ---- fields

    def _tab_fields(self, see: Callable[[bytes], object]) -> Iterator[tuple[int, list[str]]]:
        for line, content in text_lines(self.path, see):
            if content:
                yield line, content.split("\t")

    def _csv_fields(self, see: Callable[[bytes], object]) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(sys.maxsize)
        lines = (f"{content}\n" for _, content in text_lines(self.path, see))
        reader, line = csv.reader(lines, strict=True), 1
        try:
            for fields in reader:
                if fields:
                    yield line, fields
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{self.where(line)}: not valid CSV ({error}); expected fields as Excel quotes them"
            ) from None

    def _of_fields(self, rows: Iterator[tuple[int, list[str]]]) -> Iterator[Row]:
        places = [column.name for column in self.columns if isinstance(column.name, int)]
        num_fields = 0
        if self._has_header:
            line, header = next(rows, (1, []))
            if not header:
                raise ValueError(
                    f"{self.path}: is empty; expected a header with {', '.join(str(c.name) for c in self.columns)}"
                )
            self._refuse_missing(f"{self.where(line)}: ", header)
            places, num_fields = [header.index(str(column.name)) for column in self.columns], len(header)
            if repeated := [name for name in (str(column.name) for column in self.columns) if header.count(name) > 1]:
                raise ValueError(f"{self.where(line)}: has two columns {repeated[0]!r}; expected one; rename the other")
        for line, fields in rows:
            num_fields = num_fields or len(fields)
            if len(fields) <= max(places) or len(fields) < num_fields or any(fields[num_fields:]):
                if not self._skips_broken:
                    of = "as the header has" if self._has_header else "as the first row has"
                    kind = "tabs" if self.path.suffix == ".tsv" else "commas"
                    raise ValueError(
                        f"{self.where(line)}: has {len(fields)} fields, expected {max(num_fields, max(places) + 1)}, {of}; "
                        f"look for {kind} that are missing, or that are part of a text"
                    )
                self.num_skipped += 1
                self.first_skipped = self.first_skipped or line
                continue
            values = zip(self.columns, places, strict=True)
            yield Row(line, tuple(self._read(column, line, fields[place]) for column, place in values))


def text_lines(path: Path, see: Callable[[bytes], object] = lambda raw: None) -> Iterator[tuple[int, str]]:
    """Yield each line of a UTF-8 text file with its number, from 1, without LF or CRLF; `see` gets all bytes.

    Raises ValueError, naming byte or line, for what is not UTF-8 and for a file that ends its lines with CR only.
    """
    offset = 0
    with named(path), open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            see(raw)
            try:
                content = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}: line {line}: not UTF-8 at byte {offset + error.start} (found 0x{raw[error.start]:02x}); convert it, for "
                    "example with iconv"
                ) from None
            offset += len(raw)
            content = content.removesuffix("\n").removesuffix("\r")
            if line == 1 and "\r" in content and b"\n" not in raw:
                raise ValueError(
                    f"{path}: its lines end with CR only, expected LF or CRLF; convert it: tr '\\r' '\\n' < OLD > NEW"
                )
            yield line, content


@dataclass(frozen=True)
class Table(Generic[_V]):
    """All rows of a small file."""

    path: Path
    rows: list[tuple[_V, ...]]
    lines: list[int]
    """Where each row begins in the file, from 1; of Parquet the rows' numbers."""


def read_table(path: Path, columns: Sequence[str], flags: Sequence[str] = ()) -> Table[str]:
    """Return the named columns, which hold texts; `flags` choose them. Raises ValueError, see TableFile."""
    flags = flags or [""] * len(columns)
    rows = [*TableFile(path, [Column(name, as_text, flag) for name, flag in zip(columns, flags, strict=True)])]
    return Table(path, [row.values for row in rows], [row.line for row in rows])
