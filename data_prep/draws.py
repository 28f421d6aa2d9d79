"""Random numbers that depend on what is decided for which item, never on who asks or in which order."""

from __future__ import annotations

from enum import IntEnum

import numba
import numpy as np

_WORDS_PER_COUNT = 4  # Philox4x64: one counter value gives four 64-bit words


class Decision(IntEnum):
    """What is decided; part of the generator's key. A value once used is never given another meaning."""

    SEGMENT_BOUNDARY = 1
    MASKS = 2
    CHUNK_ORDER = 3
    ORDER_IN_WINDOW = 4
    SHORT_SAMPLES = 5
    FINETUNING_ORDER = 6
    SEQ2SEQ_TARGETS = 7
    SAMPLED_TOKENS = 8


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


def scale_high_bits(words: np.ndarray, bounds: np.ndarray | int) -> np.ndarray:
    """Integers in [0, bound) from the upper 32 bits of each word (bias under bound / 2**32)."""
    return ((words >> np.uint64(32)) * np.asarray(bounds, dtype=np.uint64)) >> np.uint64(32)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def word_of(key: int | np.uint64, index: int) -> int:
    """Word `index` of the item whose own word of `draw_words` is `key`, for compiled code that draws as it goes.

    SplitMix64 (Steele, Lea and Flood 2014), whose words are a function of a counter too: any of them, in any order.
    """
    word = key + np.uint64(index + 1) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))  # type: ignore[return-value]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def unit_interval(word: int) -> float:
    """A number of [0, 1) from the upper 53 bits of a word."""
    return float(word >> np.uint64(11)) / 2**53


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def unit_intervals(keys: np.ndarray, index: int) -> np.ndarray:
    """Of word `index` of each key, see `word_of`: float64."""
    units = np.empty(len(keys))
    for place in range(len(keys)):
        units[place] = unit_interval(word_of(keys[place], index))
    return units
