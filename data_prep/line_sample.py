"""A sample of a corpus's lines, the same wherever the corpus is cut into files, that never holds more than a line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator


class LineSample:
    """About `sample_bytes` of a corpus of `total_bytes`; all of a corpus that is no larger.

    A line is kept iff a hash of (seed, number of the line in the corpus) falls below the share.
    """

    def __init__(self, sample_bytes: int, total_bytes: int, seed: int = 0) -> None:
        self._limit = 2**64 if sample_bytes >= total_bytes else sample_bytes * 2**64 // total_bytes
        self._seed = seed
        self.num_lines = self.num_kept = self.kept_bytes = 0
        """What went through `of` so far."""

    def of(self, lines: Iterable[str]) -> Iterator[str]:
        """The lines that are kept, counted."""
        for line in lines:
            is_kept = self._hash(self.num_lines) < self._limit
            self.num_lines += 1
            if is_kept:
                self.num_kept += 1
                self.kept_bytes += len(line.encode())
                yield line

    def _hash(self, number: int) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self._seed} {number}".encode(), digest_size=8).digest(), "big")
