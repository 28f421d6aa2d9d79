"""Blockwise masking, Algorithm 1 of the UniLMv2 paper, compiled.

    repeat: p = a random place of the text; l = randint(2, 6) if rand() < 0.4 else 1;
            if none of x_p .. x_{p+l-1} is masked already, that block is the next turn (factorization step);
    until 15% are masked.

What the paper leaves open: special tokens count as masked already, so no block holds one; a block that would run past
the text is drawn anew; the last block is shortened, so that exactly round(0.15 * maskable) tokens, at least 1, are
masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from data_prep.draws import Decision, draw_words

MASK_PERCENT = 15
BLOCK_PROBABILITY = 0.4
MIN_BLOCK_TOKENS, MAX_BLOCK_TOKENS = 2, 6
SHOW_MASK_PROBABILITY, SHOW_RANDOM_PROBABILITY = 0.8, 0.1  # in what is left, the original token is shown

_HALF_WORD = 2**32
_IS_BLOCK_BELOW = round(BLOCK_PROBABILITY * _HALF_WORD)
_SHOW_MASK_BELOW = round(SHOW_MASK_PROBABILITY * _HALF_WORD)
_SHOW_RANDOM_BELOW = round((SHOW_MASK_PROBABILITY + SHOW_RANDOM_PROBABILITY) * _HALF_WORD)


@dataclass(frozen=True)
class MaskSet:
    """One set of masks for B samples. P = the most masked tokens a sample can have; unused places are 0."""

    num_masked_B: np.ndarray
    positions_BP: np.ndarray
    """Masked positions in factorization order, a block from left to right."""
    turns_BP: np.ndarray
    """The factorization step of each, from 1."""
    shown_BP: np.ndarray
    """The id that the context shows there: the mask, a random one or the original."""


def num_masked(num_maskable: np.ndarray | int) -> np.ndarray:
    """round(0.15 * num_maskable), halves up; at least 1 where anything can be masked."""
    rounded = (MASK_PERCENT * np.asarray(num_maskable) + 50) // 100
    return np.where(np.asarray(num_maskable) > 0, np.maximum(rounded, 1), 0)


def max_masked(max_length_tokens: int, num_special_tokens: int) -> int:
    """P: the masked tokens of a full sample."""
    return int(num_masked(max_length_tokens - num_special_tokens))


def num_attempts(max_masked_tokens: int) -> int:
    """How many draws of a block a sample gets; about half of them are used, and what is missing then is filled up."""
    return max_masked_tokens + 24


def draw_mask_set(
    tokens_BL: np.ndarray,
    length_B: np.ndarray,
    *,
    special_ids: np.ndarray,
    normal_ids: np.ndarray,
    mask_id: int,
    max_masked_tokens: int,
    seed: int,
    first_sample: int,
    mask_set: int,
) -> MaskSet:
    """Mask set number `mask_set` for samples first_sample ..; the masks of a sample depend on nothing but its number,
    its tokens, the seed and the set.

    A sample's words are its attempts, each a start (upper half) and a length (lower half), and behind them one for each
    masked token that decides what is shown.
    """
    num_samples, max_length = tokens_BL.shape
    attempts = num_attempts(max_masked_tokens)
    words_BW = draw_words(seed, Decision.MASKS, first_sample, num_samples, attempts + max_masked_tokens, mask_set)
    is_special_V = np.isin(np.arange(max(tokens_BL.max(), special_ids.max()) + 1), special_ids)
    num_masked_B = np.zeros(num_samples, dtype=np.int32)
    positions_BP = np.zeros((num_samples, max_masked_tokens), dtype=np.int32)
    turns_BP, shown_BP = np.zeros_like(positions_BP), np.zeros_like(positions_BP)
    _algorithm_1(
        tokens_BL.astype(np.int32, copy=False), length_B.astype(np.int32, copy=False), is_special_V,
        num_masked(np.arange(max_length + 1)), words_BW, attempts, normal_ids.astype(np.int32), mask_id,
        num_masked_B, positions_BP, turns_BP, shown_BP,
    )  # fmt: skip
    return MaskSet(num_masked_B, positions_BP, turns_BP, shown_BP)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def block_draw(word: int, length: int) -> tuple[int, int]:
    """Start and length of the block that a word stands for, in a text of `length` tokens."""
    start = ((word >> np.uint64(32)) * np.uint64(length)) >> np.uint64(32)
    low = word & np.uint64(0xFFFFFFFF)
    if low >= np.uint64(_IS_BLOCK_BELOW):
        return int(start), 1
    lengths = MAX_BLOCK_TOKENS - MIN_BLOCK_TOKENS + 1
    return int(start), MIN_BLOCK_TOKENS + int(low * np.uint64(lengths) // np.uint64(_IS_BLOCK_BELOW))


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def shown_id(word: int, original: int, normal_ids: np.ndarray, mask_id: int) -> int:
    """What the context shows in place of `original`."""
    coin = word >> np.uint64(32)
    if coin < np.uint64(_SHOW_MASK_BELOW):
        return mask_id
    if coin < np.uint64(_SHOW_RANDOM_BELOW):
        return int(normal_ids[((word & np.uint64(0xFFFFFFFF)) * np.uint64(len(normal_ids))) >> np.uint64(32)])
    return original


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _algorithm_1(
    tokens_BL: np.ndarray,
    length_B: np.ndarray,
    is_special_V: np.ndarray,
    num_masked_of: np.ndarray,
    words_BW: np.ndarray,
    attempts: int,
    normal_ids: np.ndarray,
    mask_id: int,
    num_masked_B: np.ndarray,
    positions_BP: np.ndarray,
    turns_BP: np.ndarray,
    shown_BP: np.ndarray,
) -> None:
    is_blocked = np.empty(tokens_BL.shape[1], dtype=np.bool_)
    for b in range(len(length_B)):
        length, num_maskable = length_B[b], 0
        for position in range(length):
            is_blocked[position] = is_special_V[tokens_BL[b, position]]
            num_maskable += not is_blocked[position]
        target = num_masked_of[num_maskable]
        num_masked_B[b] = target
        count, turn, attempt = 0, 0, 0
        while count < target:
            if attempt < attempts:
                start, block = block_draw(words_BW[b, attempt], length)
                attempt += 1
                block = min(block, target - count)
            else:  # draws used up: single tokens from the left
                start, block = 0, 1
                while is_blocked[start]:
                    start += 1
            is_free = start + block <= length
            for position in range(start, min(start + block, length)):
                is_free = is_free and not is_blocked[position]
            if not is_free:
                continue
            turn += 1
            for position in range(start, start + block):
                is_blocked[position] = True
                positions_BP[b, count] = position
                turns_BP[b, count] = turn
                shown_BP[b, count] = shown_id(
                    words_BW[b, attempts + count], tokens_BL[b, position], normal_ids, mask_id
                )
                count += 1
