"""Texts in files of every format."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress,
}  # fmt: skip


def as_json_lines(texts: Sequence[str | None], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, key: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
    return path


def write_table(path: Path, texts: Sequence[str | None], part_rows: int = 2, kind: pa.DataType | None = None) -> Path:
    """A table with other columns around the texts; "stream" in the name of an .arrow file is its format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = pa.array(range(len(texts)), pa.int64())
    column = pa.array(texts, pa.string())
    column = (
        column.dictionary_encode()
        if kind is not None and pa.types.is_dictionary(kind)
        else column.cast(kind or pa.string())
    )
    table = pa.table({"id": numbers, "text": column, "score": numbers})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=part_rows)
    else:
        new = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=part_rows)
    return path
