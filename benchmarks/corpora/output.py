"""The files of an entry and its lines in the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from benchmarks.corpora.markup import one_line
from benchmarks.corpora.packages import Shelf
from benchmarks.corpora.registry import ENTRIES, SHA256, Entry, Kind
from benchmarks.corpora.tasks import Paragraphs, Splits
from benchmarks.corpora.texts import Document
from data_prep.files import read_manifest, sha256_of_file, write_manifest, write_whole

MANIFEST = "MANIFEST.json"
_FORMAT, _VERSION = "pmlm-corpora", 1
_MIN_WORDS = 8
_HEADERS = {
    Kind.CLASSIFICATION: ("label", "text"),
    Kind.PAIRS: ("label", "text_a", "text_b"),
}


def read_entries(output: Path) -> dict[str, Any]:
    """What the manifest says of each entry; nothing where there is none."""
    path = output / MANIFEST
    return cast(dict[str, Any], read_manifest(path, _FORMAT, _VERSION)["entries"]) if path.exists() else {}


def is_made(output: Path, made: dict[str, Any] | None) -> bool:
    """Whether an entry's files are there, byte by byte as they were written."""
    return made is not None and all(
        (output / name).exists() and sha256_of_file(output / name) == file["sha256"]
        for name, file in made["files"].items()
    )


def make_entry(entry: Entry, output: Path, cache: Path, *, any_version: bool = False) -> dict[str, Any]:
    """Make an entry's files, then note it in the manifest; returns what was noted.

    Raises ValueError if a file is not, byte by byte, what it was when its figures were measured; with `any_version` it may be
    another, made of the versions of the packages that there are.
    """
    shelf = Shelf(cache, any_version=any_version)
    files = {name: _content_of(entry.kind, rows) for name, rows in _rows_of(entry, shelf).items()}
    for name, (content, _, _) in files.items():
        found = hashlib.sha256(content).hexdigest()
        if found != SHA256.get(name) and not any_version:
            versions = ", ".join(f"{package} {version}" for package, version in shelf.versions.items())
            raise ValueError(
                f"{name}, made of {versions}, is another text than is expected (SHA-256 {found[:12]}, expected "
                f"{SHA256.get(name, 'none')[:12]}); with --any_version it is taken"
            )
    counts = {}
    for name, (content, documents, words) in files.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
        counts[name] = {"documents": documents, "words": words, "bytes": len(content), "sha256": sha256_of_file(path)}
    made = {
        "kind": entry.kind.value,
        "licence": entry.licence,
        "is_free": entry.is_free,
        "packages": shelf.versions,
        **{total: sum(cast(int, file[total]) for file in counts.values()) for total in ("documents", "words", "bytes")},
        "files": counts,
    }
    entries = {**read_entries(output), entry.name: made}
    write_manifest(output / MANIFEST, _FORMAT, _VERSION, {"entries": {n: entries[n] for n in ENTRIES if n in entries}})
    return made


def _rows_of(entry: Entry, shelf: Shelf) -> dict[str, Any]:
    """The rows of each of an entry's files, by the file's path in the output folder."""
    rows = entry.make(shelf)
    if entry.kind is Kind.TEXT:
        return {f"text/{entry.name}.jsonl": rows}
    suffix = {Kind.QA: "json", Kind.SEQ2SEQ: "jsonl"}.get(entry.kind, "tsv")
    splits = cast(Splits | Paragraphs, rows)
    return {f"tasks/{entry.name}/{split}.{suffix}": splits[split] for split in splits}


def _content_of(kind: Kind, rows: Any) -> tuple[bytes, int, int]:
    """A file's content, and how many documents (rows; for QA questions) and words it has."""
    if kind is Kind.QA:
        content = {"version": "v2.0", "data": [{"title": "", "paragraphs": rows}]}
        words = sum(len(paragraph["context"].split()) for paragraph in rows)
        return ((json.dumps(content, ensure_ascii=False) + "\n").encode(), sum(len(p["qas"]) for p in rows), words)
    if kind is Kind.TEXT:
        texts = list(clean_documents(rows))
        lines, words = (_json_line(text=text) for text in texts), sum(len(text.split()) for text in texts)
        return "".join(lines).encode(), len(texts), words
    words = sum(len(text.split()) for row in rows for text in (row if kind is Kind.SEQ2SEQ else row[1:]))
    if kind is Kind.SEQ2SEQ:
        return "".join(_json_line(src=src, tgt=tgt) for src, tgt in rows).encode(), len(rows), words
    return "".join("\t".join(row) + "\n" for row in (_HEADERS[kind], *rows)).encode(), len(rows), words


def _json_line(**values: str) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def clean_documents(documents: Iterable[Document]) -> Iterator[str]:
    """Documents as lines of single-spaced words; a paragraph of 8 words or more comes once, shorter documents not at all."""
    seen_lines: set[str] = set()
    seen_texts: set[str] = set()
    for document in documents:
        kept = []
        for line in map(one_line, document):
            is_long = len(line.split()) >= _MIN_WORDS
            if line and not (is_long and line in seen_lines):
                kept.append(line)
            if is_long:
                seen_lines.add(line)
        text = "\n".join(kept)
        if len(text.split()) >= _MIN_WORDS and text not in seen_texts:
            seen_texts.add(text)
            yield text


def left_to_make(entries: list[Entry], output: Path, *, any_version: bool = False) -> list[Entry]:
    """Those whose files are not there, not whole, or not those that are expected."""
    made = read_entries(output)
    return [
        entry
        for entry in entries
        if not is_made(output, made.get(entry.name))
        or not (any_version or all(SHA256.get(n) == f["sha256"] for n, f in made[entry.name]["files"].items()))
    ]


def make_all(
    entries: list[Entry], output: Path, cache: Path, bar: Callable[[list[Entry]], Any], *, any_version: bool = False
) -> dict[str, list[str]]:
    """Make what is not there yet; returns the errors, each with the entries that could not be made for it."""
    todo = left_to_make(entries, output, any_version=any_version)
    failures: dict[str, list[str]] = {}
    if not todo:
        return failures
    with bar(todo) as progress:
        for entry in todo:
            progress.set_description(entry.name)
            try:
                make_entry(entry, output, cache, any_version=any_version)
            except (ValueError, OSError) as error:
                failures.setdefault(str(error), []).append(entry.name)
            progress.update(entry.size_bytes)
    return failures
