"""Packages by name: fetched once into a cache, read from the archive; nothing is installed, nothing is unpacked to disk."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote

from data_prep.files import write_whole

UPDATE_COMMAND = ("apt-get", "update", "-o", "Acquire::Languages=en")
_ENGLISH = ("-o", "Acquire::Languages=en")


@dataclass(frozen=True)
class Debian:
    """A Debian package; `pattern` finds one whose name holds a version, which differs from release to release."""

    name: str
    pattern: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Pip:
    """A pinned release of a Python distribution, as a wheel or as its source archive."""

    name: str
    version: str
    is_source: bool = False

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class DebianLists:
    """Debian's package lists: the descriptions in English, and the section of each package."""

    def __str__(self) -> str:
        return "Debian package lists"


Package = Debian | Pip | DebianLists


class Shelf:
    """The cache folder; remembers the version of each package that was read."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self.versions: dict[str, str] = {}

    def read(self, package: Debian | Pip, pattern: str) -> dict[str, bytes]:
        """The files of a package whose path in it matches `pattern` in full, by path; ValueError where there is none."""
        path = self._fetched(package)
        found = read_archive(path, pattern)
        if not found:
            raise ValueError(f"{path.name}: holds no file like {pattern}; is this another version than expected?")
        return found

    def descriptions(self) -> str:
        """Debian's descriptions in English, as control stanzas."""
        return self._lists("Translations")

    def package_lists(self) -> str:
        """Debian's lists of packages, as control stanzas."""
        return self._lists("Packages")

    def _fetched(self, package: Debian | Pip) -> Path:
        path = _fetch_debian(package, self._cache) if isinstance(package, Debian) else _fetch_pip(package, self._cache)
        if isinstance(package, Debian):
            name, version, _ = unquote(path.stem).split("_")
            self.versions[name] = version
        else:
            self.versions[package.name] = package.version
        return path

    def _lists(self, kind: str) -> str:
        path = self._cache / "apt" / kind
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, _output("/usr/lib/apt/apt-helper", "cat-file", *_list_files(kind)))
            release = _output("apt-get", "indextargets", "--format", "$(CODENAME)", "Created-By: Packages")
            write_whole(path.with_name("release"), release.split(b"\n")[0])
        self.versions[str(DebianLists())] = path.with_name("release").read_text().strip()
        return path.read_text(encoding="utf-8", errors="replace")


def update_lists() -> None:
    """Fetch Debian's package lists, descriptions among them; the one command here that needs root."""
    _output(*UPDATE_COMMAND)


def read_archive(archive: Path | IO[bytes], pattern: str) -> dict[str, bytes]:
    """The regular files of a .deb, .zip, .whl or .tar.* that match `pattern` in full, sorted by path.

    ValueError where a member's path leads outside of the archive.
    """
    wanted = re.compile(pattern)
    try:
        found = {name: content for name, content in _members(archive, wanted) if content is not None}
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{archive}: is damaged ({error}); delete it to fetch it anew") from None
    return dict(sorted(found.items()))


def _members(archive: Path | IO[bytes], wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes | None]]:
    if isinstance(archive, Path) and archive.suffix == ".deb":
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                yield from _tar_members(tar, wanted)
            process.stdout.read()
        if process.returncode:
            raise ValueError(f"{archive}: dpkg-deb cannot read it; delete it to fetch it anew")
    elif isinstance(archive, Path) and archive.suffix in (".zip", ".whl"):
        with zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                path = inner_path(name)
                yield path, zipped.read(name) if not name.endswith("/") and wanted.fullmatch(path) else None
    else:
        with tarfile.open(archive) if isinstance(archive, Path) else tarfile.open(fileobj=archive) as tar:
            yield from _tar_members(tar, wanted)


def _tar_members(tar: tarfile.TarFile, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes | None]]:
    for member in tar:
        path = inner_path(member.name)
        file = tar.extractfile(member) if member.isreg() and wanted.fullmatch(path) else None
        yield path, file.read() if file else None


def inner_path(name: str) -> str:
    """A member's path without `./`; ValueError where it is absolute or climbs out with `..`."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"the archive has a member {name!r}, which leads outside of it: refused")
    return str(path)


def read_inner_archive(content: bytes, pattern: str) -> dict[str, bytes]:
    """`read_archive` for a tar archive that lies in another one."""
    return read_archive(io.BytesIO(content), pattern)


def _fetch_debian(package: Debian, cache: Path) -> Path:
    folder = cache / "deb"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = re.compile(package.pattern or re.escape(package.name))
    held = [path for path in folder.glob("*.deb") if wanted.fullmatch(path.name.partition("_")[0])]
    if held:
        return min(held, key=lambda path: _version_key(path.name))
    _list_files("Packages")
    name = _offered_name(package) if package.pattern else package.name
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        _output("apt-get", "download", name, cwd=partial)
        (deb,) = Path(partial).glob("*.deb")
        return deb.rename(folder / deb.name)


def _offered_name(package: Debian) -> str:
    """The lowest version that the release offers: its own; later ones came as additions."""
    listed = _output("apt-cache", "search", "--names-only", f"^{package.pattern}$").decode()
    names = [line.partition(" ")[0] for line in listed.splitlines()]
    if not names:
        raise ValueError(f"{package}: this release of Debian has no package like {package.pattern}")
    return min(names, key=_version_key)


def _version_key(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _fetch_pip(package: Pip, cache: Path) -> Path:
    folder = cache / "pip" / f"{package.name}-{package.version}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        form = ["--no-binary", package.name] if package.is_source else ["--only-binary", ":all:"]
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            _output(
                sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                *form, "--dest", f"{partial}/whole", str(package),
            )  # fmt: skip
            Path(partial, "whole").rename(folder)
    (archive,) = folder.iterdir()
    return archive


def _list_files(kind: str) -> list[str]:
    """apt's files of a kind (Packages, Translations); ValueError where `apt-get update` did not fetch them yet."""
    chosen = [f"Created-By: {kind}", *(["Language: en"] if kind == "Translations" else [])]
    named = _output("apt-get", "indextargets", *_ENGLISH, "--format", "$(FILENAME)", *chosen).decode().split()
    files = [name for name in named if Path(name).exists()]
    if not files:
        raise ValueError(
            f"Debian's package lists ({kind}) are empty: run `{' '.join(UPDATE_COMMAND)}` as root, or give --update"
        )
    return sorted(files)


def _output(*command: str, cwd: str | None = None) -> bytes:
    """What a command prints; ValueError with its last line of error where it fails."""
    try:
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, "LC_ALL": "C.UTF-8"}, capture_output=True, check=False
        )
    except FileNotFoundError:
        raise ValueError(f"{command[0]}: no such command; the packages come with apt, on Debian or Ubuntu") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if re.match("E:|ERROR:", line)] or lines or ["no message"]
        raise ValueError(f"`{' '.join(command)}` failed: {errors[-1]}")
    return done.stdout
