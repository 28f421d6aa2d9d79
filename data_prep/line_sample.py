"""A sample of a corpus's lines, the same wherever the corpus is cut into files, that never holds more than a line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import repeat


class LineSample:
    """About `sample_bytes` of corpora of `total_bytes`, their epochs included; all where there is no more.

    A line is kept iff a hash of (seed, number of the line in the corpora) falls below the share, which is larger for a
    corpus of several epochs; of a share above 1 the line is there floor(share) times, and once more by what is left.
    """

    def __init__(self, sample_bytes: int, total_bytes: Fraction | int, seed: int = 0) -> None:
        self._share = Fraction(1) if sample_bytes >= total_bytes else Fraction(sample_bytes) / total_bytes
        self._seed = seed
        self.num_lines = self.num_kept = self.kept_bytes = 0
        """What went through `of` so far."""

    def of(self, lines: Iterable[str], epochs: Fraction = Fraction(1)) -> Iterator[str]:
        """The lines that are kept, counted, of a corpus that training goes through so often."""
        copies, limit = divmod(int(epochs * self._share * 2**64), 2**64)
        for line in lines:
            times = copies + (self._hash(self.num_lines) < limit)
            self.num_lines += 1
            if times:
                self.num_kept += 1
                self.kept_bytes += times * len(line.encode())
            yield from repeat(line, times)

    def _hash(self, number: int) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self._seed} {number}".encode(), digest_size=8).digest(), "big")
