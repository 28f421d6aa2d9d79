"""Blockwise masking, Algorithm 1 of the UniLMv2 paper, compiled.

    repeat: p = a random place of the text; l = randint(2, 6) if rand() < 0.4 else 1;
            if none of x_p .. x_{p+l-1} is masked already, that block is the next turn (factorization step);
    until 15% are masked.

What the paper leaves open: special tokens count as masked already, so no block holds one; a block that would run past
the text is drawn anew; the last block is shortened, so that exactly round(0.15 * maskable) tokens, at least 1, are
masked.

A sample's words: one for each block that may be drawn, its start (upper half) and length (lower half), and behind them one
for each masked token, what is shown there. None depends on which blocks were taken, so no jump does either: a processor
cannot foresee it, and to be wrong costs it more than to draw a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from data_prep.draws import Decision, draw_words, word_of
from data_prep.packing import Samples

MASK_PERCENT = 15
BLOCK_PROBABILITY = 0.4
MIN_BLOCK_TOKENS, MAX_BLOCK_TOKENS = 2, 6
SHOW_MASK_PROBABILITY, SHOW_RANDOM_PROBABILITY = 0.8, 0.1  # in what is left, the original token is shown

_HALF_WORD = 2**32
_IS_BLOCK_BELOW = round(BLOCK_PROBABILITY * _HALF_WORD)
_SHOW_MASK_BELOW = round(SHOW_MASK_PROBABILITY * _HALF_WORD)
_SHOW_RANDOM_BELOW = round((SHOW_MASK_PROBABILITY + SHOW_RANDOM_PROBABILITY) * _HALF_WORD)


@dataclass(frozen=True)
class Masks:
    """K sets of masks for B samples. M = the masked tokens of all samples, one sample behind the other."""

    num_masked_B: np.ndarray
    """int64; the same in every set."""
    places_KM: np.ndarray
    """See `place_dtype`; a sample's masked tokens in factorization order, a block from left to right."""


def place_dtype(token: np.dtype[Any]) -> np.dtype[Any]:
    """A masked token: its position in the sample (never 0, which is [SOS]'s), its turn, that is its factorization step,
    from 1, and the id that the context shows there: the mask, a random one or the original."""
    return np.dtype([("position", np.uint16), ("turn", np.uint16), ("shown", token)])


def num_masked(num_maskable: np.ndarray | int) -> np.ndarray:
    """round(0.15 * num_maskable), halves up; at least 1 where anything can be masked."""
    rounded = (MASK_PERCENT * np.asarray(num_maskable) + 50) // 100
    return np.where(np.asarray(num_maskable) > 0, np.maximum(rounded, 1), 0)


def max_masked(max_length_tokens: int, num_special_tokens: int) -> int:
    """P: the masked tokens of a full sample."""
    return int(num_masked(max_length_tokens - num_special_tokens))


def num_attempts(num_masked: np.ndarray) -> np.ndarray:
    """How many draws of a block samples get; about half of them are used, and what is missing then is filled up."""
    return 2 * num_masked + 64


def draw_masks(
    samples: Samples,
    *,
    special_ids: np.ndarray,
    normal_ids: np.ndarray,
    mask_id: int,
    mask_sets: int,
    seed: int,
    first_sample: int,
) -> Masks:
    """All mask sets of samples number first_sample ..; a sample's masks of a set depend on nothing but its number, its
    tokens, the seed and the set."""
    tokens_T, length_B = samples.tokens_T, samples.length_B
    is_special_V = np.zeros(max(tokens_T.max(), special_ids.max()) + 1, dtype=np.bool_)
    is_special_V[special_ids] = True
    num_masked_B = num_masked(_num_maskable(tokens_T, length_B, is_special_V))
    places_KM = np.empty((mask_sets, num_masked_B.sum()), dtype=place_dtype(tokens_T.dtype))
    keys = [draw_words(seed, Decision.MASKS, first_sample, len(length_B), 1, variant) for variant in range(mask_sets)]
    _algorithm_1(
        tokens_T, length_B, is_special_V, num_masked_B, num_attempts(num_masked_B), np.concatenate(keys, axis=1),
        normal_ids.astype(tokens_T.dtype), mask_id, places_KM,
    )  # fmt: skip
    return Masks(num_masked_B, places_KM)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _num_maskable(tokens_T: np.ndarray, length_B: np.ndarray, is_special_V: np.ndarray) -> np.ndarray:
    num_maskable_B = np.zeros(len(length_B), dtype=np.int64)
    start = 0
    for b, length in enumerate(length_B):
        for token in tokens_T[start : start + length]:
            num_maskable_B[b] += not is_special_V[token]
        start += length
    return num_maskable_B


# Below, indices are unsigned: of others numba asks whether they count from the end.


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def block_draw(word: int, length: int | np.uint64) -> tuple[np.uint64, np.uint64]:
    """Start and length of the block that a word stands for, in a text of `length` tokens."""
    start = ((word >> np.uint64(32)) * np.uint64(length)) >> np.uint64(32)
    low = word & np.uint64(0xFFFFFFFF)
    lengths = np.uint64(MAX_BLOCK_TOKENS - MIN_BLOCK_TOKENS + 1)
    block = np.uint64(MIN_BLOCK_TOKENS) + low * lengths // np.uint64(_IS_BLOCK_BELOW)
    return start, block if low < np.uint64(_IS_BLOCK_BELOW) else np.uint64(1)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def shown_id(word: int, original: int, normal_ids: np.ndarray, mask_id: int) -> int:
    """What the context shows in place of `original`."""
    coin = word >> np.uint64(32)
    random_id = normal_ids[((word & np.uint64(0xFFFFFFFF)) * np.uint64(len(normal_ids))) >> np.uint64(32)]
    unmasked_id = random_id if coin < np.uint64(_SHOW_RANDOM_BELOW) else original
    return mask_id if coin < np.uint64(_SHOW_MASK_BELOW) else unmasked_id


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _bits_from(bits: np.ndarray, start: np.uint64) -> np.uint64:
    """64 bits, the lowest of them number `start`."""
    word, shift = start >> np.uint64(6), start & np.uint64(63)
    return (bits[word] >> shift) | (bits[word + np.uint64(1)] << (np.uint64(63) - shift) << np.uint64(1))  # type: ignore[no-any-return]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _set_from(bits: np.ndarray, start: np.uint64, chosen: np.uint64) -> None:
    word, shift = start >> np.uint64(6), start & np.uint64(63)
    bits[word] |= chosen << shift
    bits[word + np.uint64(1)] |= chosen >> (np.uint64(63) - shift) >> np.uint64(1)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _algorithm_1(
    tokens_T: np.ndarray,
    length_B: np.ndarray,
    is_special_V: np.ndarray,
    num_masked_B: np.ndarray,
    attempts_B: np.ndarray,
    keys_BK: np.ndarray,
    normal_ids: np.ndarray,
    mask_id: int,
    places_KM: np.ndarray,
) -> None:
    zero, one = np.uint64(0), np.uint64(1)
    always_blocked = np.empty(length_B.max() // 64 + 2, dtype=np.uint64)
    is_blocked = np.empty_like(always_blocked)
    room = num_masked_B.max() + MAX_BLOCK_TOKENS  # every block is written as if it were taken and of the most tokens
    positions, turns = np.empty(room, dtype=np.uint16), np.empty(room, dtype=np.uint16)
    first_token = first_place = zero
    for b in range(len(length_B)):
        length, target = np.uint64(length_B[b]), np.uint64(num_masked_B[b])
        always_blocked[:] = ~zero  # what is behind the text
        for position in range(length):
            is_free = np.uint64(not is_special_V[tokens_T[first_token + position]])
            always_blocked[position >> np.uint64(6)] ^= is_free << (position & np.uint64(63))
        for k in range(keys_BK.shape[1]):
            key = keys_BK[b, k]
            is_blocked[:] = always_blocked
            count, turn, attempt = zero, zero, 0
            while count < target and attempt < attempts_B[b]:
                start, block = block_draw(word_of(key, attempt), length)
                block = min(block, target - count)
                attempt += 1
                chosen = (one << block) - one
                is_taken = np.uint64((_bits_from(is_blocked, start) & chosen) == zero)
                _set_from(is_blocked, start, chosen * is_taken)
                turn += is_taken
                for i in range(np.uint64(MAX_BLOCK_TOKENS)):
                    positions[count + i] = start + i
                    turns[count + i] = turn
                count += block * is_taken
            start = zero
            while count < target:  # draws used up: single tokens from the left
                if not _bits_from(is_blocked, start) & one:
                    turn += one
                    positions[count], turns[count] = start, turn
                    count += one
                start += one
            for i in range(target):
                place, original = places_KM[k, first_place + i], tokens_T[first_token + np.uint64(positions[i])]
                word = word_of(key, attempts_B[b] + np.int64(i))
                place.position, place.turn = positions[i], turns[i]
                place.shown = shown_id(word, original, normal_ids, mask_id)
        first_token += length
        first_place += target
