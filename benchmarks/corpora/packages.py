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
_CAT_FILE = ("/usr/lib/apt/apt-helper", "cat-file")
_ENGLISH = ("-o", "Acquire::Languages=en")


@dataclass(frozen=True)
class Debian:
    """A version of a Debian package."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}={self.version}"


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
    """The descriptions of a release's packages in English; updates that come between two point releases are no part of them."""

    codename: str
    version: str

    def __str__(self) -> str:
        return f"package lists of Debian {self.version} ({self.codename}), main"


Package = Debian | Pip | DebianLists


class Shelf:
    """The cache folder; remembers the version of each package that was read."""

    def __init__(self, cache: Path, *, any_version: bool = False) -> None:
        """`any_version`: take what this machine's Debian offers where it is not the version that is asked for."""
        self._cache, self._any_version = cache, any_version
        self.versions: dict[str, str] = {}

    def read(self, package: Debian | Pip, pattern: str) -> dict[str, bytes]:
        """The files of a package whose path in it matches `pattern` in full, by path; ValueError where there is none."""
        path = self._fetched(package)
        found = read_archive(path, pattern)
        if not found:
            raise ValueError(f"{path.name}: holds no file like {pattern}; is this another version than expected?")
        return found

    def descriptions(self, lists: DebianLists) -> str:
        """Descriptions in English, as control stanzas. Raises ValueError where apt has the lists of another release."""
        path = self._cache / "apt" / f"{lists.codename}-{lists.version}"
        if not path.exists() or self._any_version:
            found, files = _list_files()
            if found != lists and not self._any_version:
                raise ValueError(
                    f"apt has the {found}, expected the {lists}; with --any_version other text is made of them, whose figures "
                    "are others than those of the documentation"
                )
            path = path.with_name(f"{found.codename}-{found.version}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, _output(*_CAT_FILE, *files))
        self.versions["Debian package lists"] = path.name
        return path.read_text(encoding="utf-8", errors="replace")

    def _fetched(self, package: Debian | Pip) -> Path:
        if isinstance(package, Pip):
            self.versions[package.name] = package.version
            return _fetch_pip(package, self._cache)
        path = _fetch_debian(package, self._cache, self._any_version)
        self.versions[package.name] = unquote(path.stem).split("_")[1]
        return path


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


def _fetch_debian(package: Debian, cache: Path, any_version: bool) -> Path:
    folder = cache / "deb"
    folder.mkdir(parents=True, exist_ok=True)
    held = {unquote(path.stem).split("_")[1]: path for path in sorted(folder.glob(f"{package.name}_*.deb"))}
    if package.version in held:
        return held[package.version]
    if any_version and held:
        return next(iter(held.values()))
    try:
        return _download(str(package), folder)
    except ValueError:
        offered = _offered_versions(package.name)
        if package.version in offered:
            raise
        if any_version:
            return _download(f"{package.name}={offered[0]}", folder)
        raise ValueError(
            f"{package}: this machine's Debian offers {' and '.join(offered)}; with --any_version that is taken, and the figures "
            "are others than those of the documentation"
        ) from None


def _download(package: str, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        _output("apt-get", "download", package, cwd=partial)
        (deb,) = Path(partial).glob("*.deb")
        return deb.rename(folder / deb.name)


def _offered_versions(name: str) -> list[str]:
    """Return the versions of a package that apt can fetch, its own choice first."""
    _list_files()  # raises where apt has no lists
    lines = _output("apt-cache", "madison", name).decode().splitlines()
    versions = [line.split("|")[1].strip() for line in lines if line.count("|") == 2]
    if not versions:
        raise ValueError(f"{name}: this machine's Debian has no such package")
    return list(dict.fromkeys(versions))


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


def _list_files() -> tuple[DebianLists, list[str]]:
    """Return the release that apt knows, and its files of descriptions in English.

    Of a release, its updates between two point releases, and its security updates, the release is what is listed first.
    Raises ValueError where `apt-get update` did not fetch them yet.
    """
    chosen = ("Created-By: Translations", "Language: en", "Component: main")
    listed = _output("apt-get", "indextargets", *_ENGLISH, "--format", "$(CODENAME)|$(VERSION)|$(FILENAME)", *chosen)
    files: dict[DebianLists, list[str]] = {}
    for line in listed.decode().splitlines():
        codename, version, name = line.split("|")
        if Path(name).exists():
            files.setdefault(DebianLists(codename, version), []).append(name)
    if not files:
        raise ValueError(
            f"Debian's package lists are empty: run `{' '.join(UPDATE_COMMAND)}` as root, or give --update"
        )
    return next(iter(files.items()))


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
