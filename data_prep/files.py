"""Files that are whole or absent, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in 1 MiB pieces."""
    with named(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError that does not tell its file, as one of reading does not, is of this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename in it outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """Another name to write under, which is flushed and becomes `path` if nothing is raised, and else goes."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Under `path` there is the whole content afterwards, or what was there before."""
    with unfinished_file(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """`write_whole` for JSON; keys keep their order, so equal values give equal bytes."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_manifest(path: Path, format_name: str, version: int, content: dict[str, Any]) -> None:
    """Declare whole what the manifest describes; it carries a hash of itself."""
    manifest = {"format": format_name, "version": version, **content}
    write_json(path, {**manifest, "manifest_sha256": _hash_of(manifest)})


def read_manifest(path: Path, format_name: str, version: int, *older: int) -> dict[str, Any]:
    """Return what `write_manifest` wrote, of this version or one of the `older`.

    Raises ValueError where it is another format's or version's, or damaged.
    """
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != format_name:
        raise ValueError(f'{path}: not a manifest of this kind (expected "format": "{format_name}")')
    if manifest.get("version") not in (version, *older):
        raise ValueError(
            f"{path}: format version {manifest.get('version')}; this code reads version {version}: build it anew"
        )
    if manifest.pop("manifest_sha256", None) != _hash_of(manifest):
        raise ValueError(f"{path}: is damaged (its content is not what was written)")
    return manifest


def _hash_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class NotJSON(ValueError):
    """A text that is no JSON, or none that can be read; says why, but not in which file."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line
        """Line of the text, from 1."""


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text, in which NaN and Infinity may stand for numbers as Python writes them.

    Raises UnicodeDecodeError for bytes that are not UTF-8, and NotJSON for everything else that cannot be read.
    """
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise
    except json.JSONDecodeError as error:
        raise NotJSON(f"not valid JSON ({error.msg} at character {error.colno})", error.lineno) from None
    except RecursionError:
        raise NotJSON("not valid JSON (lists or objects in one another, more than can be read)") from None
    except ValueError:  # Python's own limit, which keeps a text from taking hours
        raise NotJSON(f"not valid JSON (an integer of more than {sys.get_int_max_str_digits()} digits)") from None


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. Raises ValueError that names the file, and the line that is not JSON."""
    try:
        return parse_json(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    except NotJSON as error:
        raise ValueError(f"{path}: line {error.line}: {error}") from None
