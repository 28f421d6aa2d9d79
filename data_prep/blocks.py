"""A file hashed by its blocks, which several processes share, while they read it for another purpose."""

from __future__ import annotations

import hashlib
import io
import os
from typing import IO, Any

from data_prep.storage import Location, open_raw

BLOCK_BYTES = 2**20


class BlockDigests:
    """SHA-256 of those blocks of a file that begin in a part of it: processes that share a file hash it together.

    The bytes are taken in as they are read for another purpose; what was not read is read by `finish`. A file's hash, made by
    `digest_of_blocks`, is that of the hashes of its blocks of 1 MiB.
    """

    def __init__(self, start: int, stop: int, size_bytes: int) -> None:
        """The part is [start, stop) of `size_bytes`; its last block ends after `stop`, unless that is a block's end."""
        self._next, after = (-(-offset // BLOCK_BYTES) * BLOCK_BYTES for offset in (start, stop))
        self._stop = min(after, size_bytes)
        self._block = hashlib.sha256()
        self._digests = bytearray()

    def update(self, offset: int, content: memoryview) -> None:
        """Take in the bytes that the file has at `offset`."""
        content = content[max(self._next - offset, 0) : max(self._stop - offset, 0)]
        if offset > self._next:
            return  # not the bytes that come next
        while content:
            size = min(len(content), BLOCK_BYTES - self._next % BLOCK_BYTES)
            self._block.update(content[:size])
            self._next += size
            content = content[size:]
            if self._next % BLOCK_BYTES == 0 or self._next == self._stop:
                self._digests += self._block.digest()
                self._block = hashlib.sha256()

    def finish(self, place: Location) -> bytes:
        """Read what is missing; return the digests, one after the other. A file that has become shorter has fewer."""
        if self._next < self._stop:
            with open_raw(place) as file:
                file.seek(self._next)
                while content := file.read(min(BLOCK_BYTES, self._stop - self._next)):
                    self.update(self._next, memoryview(content))
        return bytes(self._digests)

    def seen_by(self, file: IO[bytes]) -> io.BufferedReader:
        """Return a file whose bytes are taken in as they are read."""
        return io.BufferedReader(_Seen(file, self), 2**17)


class _Seen(io.RawIOBase):
    def __init__(self, file: IO[bytes], blocks: BlockDigests) -> None:
        self._file, self._blocks = file, blocks

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        offset = self._file.tell()
        size: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._blocks.update(offset, memoryview(buffer)[:size])
        return size


def num_blocks(start: int, stop: int) -> int:
    """Return how many blocks begin in [start, stop)."""
    return -(-stop // BLOCK_BYTES) - -(-start // BLOCK_BYTES)


def digest_of_blocks(digests: bytes) -> str:
    """Return the hex hash of a file, given the digests of all its blocks."""
    return hashlib.sha256(digests).hexdigest()
