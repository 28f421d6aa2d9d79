"""Where text lives: in files of this machine, or elsewhere, at a URL that fsspec reads.

A local file is a `Path`, another one a `Url`. Both have a name, a suffix and a stem; only this module opens them.
Text from elsewhere is streamed: read in ranges of 4 MiB, each asked for again if it does not come.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import posixpath
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from data_prep.files import named

PROTOCOLS = ("s3", "hf", "https", "http")
RANGE_BYTES = 4 * 2**20
NUM_TRIES = 6
_FIRST_PAUSE_S = 0.5  # doubled after each try: 15 s in all
_VERSION_KEYS = ("ETag", "blob_id", "Content-MD5", "LastModified", "Last-Modified", "last_modified", "mtime")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, order=True)
class Url:
    """Where a file is that is not on this machine."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        """The last part of its path, without a query."""
        return posixpath.basename(urlsplit(self.text).path) if self._is_http else posixpath.basename(self.text)

    @property
    def suffix(self) -> str:
        """See `Path.suffix`."""
        return Path(self.name).suffix

    @property
    def stem(self) -> str:
        """See `Path.stem`."""
        return Path(self.name).stem

    @property
    def _is_http(self) -> bool:
        return self.text.startswith("http")


Location = Path | Url


def location(text: str) -> Location:
    """Return the place that a user names. Raises ValueError for a URL of a kind that is not read."""
    protocol, separator, _ = text.partition("://")
    if not separator:
        return Path(text)
    if protocol not in PROTOCOLS:
        raise ValueError(
            f"{text}: expected {', '.join(f'{known}://' for known in PROTOCOLS)} or a path on this machine"
        )
    return Url(text)


def state_of(place: Location) -> tuple[int, int]:
    """Return the size in bytes, and a number that changes when the content does: of a local file its time."""
    if isinstance(place, Path):
        status = place.stat()
        return status.st_size, status.st_mtime_ns
    info = _ask(place, lambda files, path: files.info(path))
    if info.get("size") is None:
        raise ValueError(f"{place}: the server does not tell its size, so it cannot be read in parts; download it")
    return int(info["size"]), _version(info)


def _version(info: dict[str, Any]) -> int:
    """Return 63 bits of a hash of what tells one content of a remote file from another."""
    known = [f"{key}={info[key]}" for key in _VERSION_KEYS if info.get(key) is not None]
    return int.from_bytes(hashlib.sha256("\n".join(known).encode()).digest()[:8], "big") >> 1


def find_remote(url: Url) -> list[tuple[Url, str, tuple[int, int]]]:
    """Return the files at a URL, below it, or matched by it, if it is a glob: each with its name below it and its state.

    As with local files, hidden ones are passed over. Web servers (http, https) list nothing: there a URL is one file.
    """
    if url.text.startswith("http"):
        return [(url, url.name, state_of(url))]
    protocol = url.text.partition("://")[0]

    def listed(files: Any, path: str) -> tuple[str, dict[str, Any]]:
        if "*" in path or "?" in path or "[" in path:
            folder = path[: min(path.find(sign) for sign in "*?[" if sign in path)].rpartition("/")[0]
            return folder, files.glob(path, detail=True)
        if files.isfile(path):
            return path.rpartition("/")[0], {path: files.info(path)}
        return path.rstrip("/"), files.find(path, detail=True)

    folder, found = _ask(url, listed)
    return [
        (Url(f"{protocol}://{path}"), name, (int(info["size"]), _version(info)))
        for path, info in sorted(found.items())
        for name in [path[len(folder) :].lstrip("/")]
        if info["type"] == "file" and not any(part.startswith(".") for part in name.split("/"))
    ]


@contextmanager
def open_raw(place: Location) -> Iterator[Any]:
    """The bytes of a file, without a buffer of Python's; an OSError of it tells which file it is."""
    if isinstance(place, Url):
        yield _Ranges(place)
        return
    with named(place), open(place, "rb", buffering=0) as file:
        yield file


def open_remote(url: Url) -> IO[bytes]:
    """Return a remote file that can be read from anywhere; nothing has to be closed."""
    return io.BufferedReader(_Ranges(url), 2**17)


class _Ranges(io.RawIOBase):
    """A remote file, read in ranges."""

    def __init__(self, url: Url) -> None:
        self._url = url
        self._size_bytes = state_of(url)[0]
        self._offset = self._start = 0
        self._range = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._offset = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._size_bytes}[whence]
        return self._offset

    def tell(self) -> int:
        return self._offset

    def readinto(self, buffer: Any) -> int:
        if self._offset >= self._size_bytes:
            return 0
        if not self._start <= self._offset < self._start + len(self._range):
            self._fetch(self._offset, min(max(RANGE_BYTES, len(buffer)), self._size_bytes - self._offset))
        found = memoryview(self._range)[self._offset - self._start :][: len(buffer)]
        buffer[: len(found)] = found
        self._offset += len(found)
        return len(found)

    def _fetch(self, start: int, size: int) -> None:
        def ranged(files: Any, path: str) -> bytes:
            content: bytes = files.cat_file(path, start=start, end=start + size)
            if len(content) < size:
                raise OSError(f"{len(content)} of {size} bytes came")
            return content

        content = _ask(self._url, ranged)
        if len(content) > size:
            raise ValueError(f"{self._url}: the server sends more than the part that is asked for; download the file")
        self._range, self._start = content, start


def _ask(url: Url, question: Callable[[Any, str], _T]) -> _T:
    """Return what a remote file system answers about a URL; asked again, after a pause, if it does not answer.

    Raises FileNotFoundError and PermissionError, which another try does not help, OSError for what no try helped, ValueError
    if the packages for it are not installed.
    """
    for attempt in range(NUM_TRIES):
        if attempt:
            time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
        try:
            return question(*_file_system(url))
        except ImportError as error:
            raise ValueError(f"{url}: {error}; install what reads it with: pip install '.[remote]'") from None
        except (FileNotFoundError, PermissionError) as error:
            number = errno.EACCES if isinstance(error, PermissionError) else errno.ENOENT
            raise type(error)(number, os.strerror(number), str(url)) from None
        except Exception as error:  # each back end has its own kinds
            is_refused = getattr(error, "status", None) in (400, 401, 403, 405, 410)  # of HTTP
            if is_refused or isinstance(error, ValueError) or type(error).__name__ == "NoCredentialsError":
                raise OSError(errno.EACCES, f"cannot be read ({_describe(error)})", str(url)) from None
            failure = error
    raise OSError(errno.EIO, f"cannot be read, tried {NUM_TRIES} times ({_describe(failure)})", str(url)) from None


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _file_system(url: Url) -> tuple[Any, str]:
    import fsspec  # here, because a local corpus does without

    # What is listed is not remembered: a file that changes meanwhile is to be noticed.
    more = {"client_kwargs": {"headers": {"Accept-Encoding": "identity"}}} if url.text.startswith("http") else {}
    files, path = fsspec.core.url_to_fs(str(url), use_listings_cache=False, **more)
    return files, path
