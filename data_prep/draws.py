"""Random numbers that depend on what is decided for which item, never on who asks or in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from enum import IntEnum
from itertools import count

import numpy as np

_WORDS_PER_COUNT = 4  # Philox4x64: one counter value gives four 64-bit words


class Decision(IntEnum):
    """What is decided; part of the generator's key. A value once used is never given another meaning."""

    SEGMENT_BOUNDARY = 1
    MASKS = 2
    CHUNK_ORDER = 3
    ORDER_IN_WINDOW = 4
    SHORT_SAMPLES = 5


def draw_words(
    seed: int, decision: Decision, first_item: int, num_items: int, words_per_item: int, variant: int = 0
) -> np.ndarray:
    """uint64 words [num_items, words_per_item]; row i is a function of (seed, decision, variant, first_item + i) alone.

    The words of an item are a range of counters of Philox4x64 keyed by (seed, decision and variant), so any split of
    the items over processes gives the same words.
    """
    counts_per_item = -(-words_per_item // _WORDS_PER_COUNT)
    generator = np.random.Philox(key=np.array([seed, (variant << 16) | decision], dtype=np.uint64))
    generator.advance(first_item * counts_per_item)
    words = generator.random_raw(num_items * counts_per_item * _WORDS_PER_COUNT)
    return words.reshape(num_items, -1)[:, :words_per_item]


def draw_one_by_one(seed: int, decision: Decision, item: int) -> Iterator[int]:
    """64-bit words without end, a function of (seed, decision, item) alone; by a hash.

    For a few words of an item that comes by itself, where setting up Philox would take longer than all else.
    """
    for number in count():
        digest = hashlib.blake2b(b"%d %d %d %d" % (seed, decision, item, number), digest_size=8).digest()
        yield int.from_bytes(digest, "big")


def scale_high_bits(words: np.ndarray, bounds: np.ndarray | int) -> np.ndarray:
    """Integers in [0, bound) from the upper 32 bits of each word (bias under bound / 2**32)."""
    return ((words >> np.uint64(32)) * np.asarray(bounds, dtype=np.uint64)) >> np.uint64(32)
