"""Which files are a corpus: those named, those below folders, those matched by globs.

Hidden files and folders (`.ipynb_checkpoints`, a Mac's `._a.txt`) are no corpus unless they are named themselves. Links to
files and folders are followed.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.console import tell_note
from data_prep.formats import EXPECTED_NAMES, format_of, format_of_name

_NUM_EXAMPLES = 3


def find_files(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return each file once, with its path below the folder that was given; those of a folder or glob are sorted by path.

    What is passed over, because it is there already under another name, is told on stderr. Raises FileNotFoundError for a
    path that is not there and for a link to nothing, PermissionError for a folder that may not be read, ValueError if there
    is no file to read.
    """
    seen = _Seen()
    files: list[tuple[Path, str]] = []
    for given in paths:
        files += [(file.path, name) for file, name in _files_of(given, seen) if seen.is_new_file(file)]
    if not files:
        raise ValueError(f"{', '.join(map(str, paths))}: no {EXPECTED_NAMES} file there")
    for what, passed_over in (
        ("named more than once, read once", seen.repeated_files),
        ("a link to a folder that is read already, not followed", seen.repeated_folders),
    ):
        if passed_over:
            more = f" and {len(passed_over) - _NUM_EXAMPLES:,} more" if len(passed_over) > _NUM_EXAMPLES else ""
            tell_note(f"{', '.join(map(str, sorted(passed_over)[:_NUM_EXAMPLES]))}{more}: {what}")
    return files


@dataclass(frozen=True)
class _Found:
    """A path, which is a file or a link. It is kept as text, and the file system is not asked again: with `Path`, listing takes
    three times as long."""

    text: str
    is_link: bool

    @property
    def path(self) -> Path:
        return Path(self.text)


class _Seen:
    """Files and links that were found, by what they are once all links are resolved."""

    def __init__(self) -> None:
        self.repeated_files: list[Path] = []
        self.repeated_folders: list[Path] = []
        self._files: set[str] = set()
        self._folders: dict[str, str] = {}

    def is_new_file(self, file: _Found) -> bool:
        """Whether the file was not seen yet, under any name."""
        folder, _, name = file.text.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder or ("/" if file.text.startswith("/") else "."))
        real = os.path.realpath(file.text) if file.is_link else os.path.join(self._folders[folder], name)
        if real in self._files:
            self.repeated_files.append(file.path)
            return False
        self._files.add(real)
        return True


def _files_of(given: Path, seen: _Seen) -> Iterator[tuple[_Found, str]]:
    if given.is_dir():
        yield from _named(given, _files_below([given], seen))
    elif given.is_file():
        if not format_of(given):
            raise ValueError(f"{given}: expected a name that ends in {EXPECTED_NAMES}")
        yield _Found(str(given), given.is_symlink()), given.name
    else:
        folder = next(folder for folder in given.parents if not glob.has_magic(str(folder)))
        if not (matches := list(_matches(given, seen))):
            raise FileNotFoundError(
                2, "no such corpus; --corpus and a mixture's paths are text files, folders or globs", str(given)
            )
        yield from _named(folder, matches)


def _named(folder: Path, found: Iterable[_Found]) -> Iterator[tuple[_Found, str]]:
    start = len(_below(str(folder)))
    for file in sorted(found, key=lambda file: file.text.split("/")):
        if file.is_link and not file.path.exists():
            raise FileNotFoundError(2, "a link to nothing; put back what it leads to, or remove it", file.text)
        if format_of_name(file.text.rpartition("/")[2]) and (not file.is_link or file.path.is_file()):
            yield file, file.text[start:]


def _below(folder: str) -> str:
    """Return what the path of a file in the folder begins with, as `Path` would have it."""
    return "" if folder == "." else folder if folder.endswith("/") else f"{folder}/"


def _matches(pattern: Path, seen: _Seen) -> Iterator[_Found]:
    """Return what the glob matches, and what is below the folders that it matches."""
    parts = pattern.parts
    # The library would follow links in circles from `**` on.
    num_plain = parts.index("**") if "**" in parts else len(parts)
    matches = [*map(Path, glob.glob(str(Path(*parts[:num_plain])) if num_plain else "."))]
    folders = [match for match in matches if match.is_dir()]
    if num_plain == len(parts):
        for path in set(matches).difference(folders):
            if (is_link := path.is_symlink()) or path.is_file():
                yield _Found(str(path), is_link)
    for file in _files_below(folders, seen):
        if _is_match(file.path.parts[num_plain:], parts[num_plain:]):
            yield file


def _is_match(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the pattern matches a path or a folder that the path is in."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_is_match(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _is_match(parts[1:], pattern[1:])


def _files_below(folders: Sequence[Path], seen: _Seen) -> Iterator[_Found]:
    """Return the files below folders; a folder that several links lead to, or a circle of links, is entered once.

    What is reached without a link comes first, so that a folder is known by its own name where it has one.
    """
    entered: set[str] = set()
    linked = deque(sorted(folders, key=lambda folder: (folder.is_symlink(), folder)))
    while linked:
        below = [linked.popleft()]
        if os.path.realpath(below[0]) in entered:
            seen.repeated_folders.append(below[0])
            continue
        links: list[Path] = []
        while below:
            folder = below.pop()
            if (real := os.path.realpath(folder)) in entered:
                continue
            entered.add(real)
            with os.scandir(folder) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
            start = _below(str(folder))
            for entry in visible:
                if not entry.is_dir():
                    if (is_link := entry.is_symlink()) or entry.is_file():
                        yield _Found(start + entry.name, is_link)
                    continue
                path = folder / entry.name
                if not entry.is_symlink():
                    below.append(path)
                elif Path(real).is_relative_to(os.path.realpath(path)):
                    seen.repeated_folders.append(path)
                else:
                    links.append(path)
        linked.extend(sorted(links))
