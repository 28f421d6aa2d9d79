"""Blockwise masking, Algorithm 1 of the UniLMv2 paper, for many samples at once.

    repeat: p = a random place of the text; l = randint(2, 6) if rand() < 0.4 else 1;
            if none of x_p .. x_{p+l-1} is masked already, that block is the next turn (factorization step);
    until 15% are masked.

What the paper leaves open: special tokens count as masked already, so no block holds one; a block that would run past
the text is drawn anew; the last block is shortened, so that exactly round(0.15 * maskable) tokens, at least 1, are
masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.draws import Decision, draw_words, scale_high_bits, scale_low_bits

MASK_PERCENT = 15
BLOCK_PROBABILITY = 0.4
MIN_BLOCK_TOKENS, MAX_BLOCK_TOKENS = 2, 6
SHOW_MASK_PROBABILITY, SHOW_RANDOM_PROBABILITY = 0.8, 0.1  # in what is left, the original token is shown


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
    """How many draws of a block a sample gets; that they do not suffice has a probability below 1e-12."""
    return 2 * max_masked_tokens + 32


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
    its tokens, the seed and the set."""
    num_samples, length = tokens_BL.shape
    attempts = num_attempts(max_masked_tokens)
    words = draw_words(
        seed, Decision.MASKS, first_sample, num_samples, 2 * attempts + max_masked_tokens, variant=mask_set
    )  # fmt: skip
    blocked = np.ones((num_samples, length + MAX_BLOCK_TOKENS), dtype=bool)  # the margin blocks what runs past the text
    blocked[:, :length] = np.isin(tokens_BL, special_ids) | (np.arange(length) >= length_B[:, None])
    target_B = num_masked((~blocked).sum(axis=1))
    starts, lengths = _block_draws(words[:, : 2 * attempts], length_B)
    positions, turns = _place_blocks(blocked, target_B, starts, lengths, max_masked_tokens)
    originals = np.take_along_axis(tokens_BL, positions, axis=1)
    shown = _shown_ids(words[:, 2 * attempts :], originals, mask_id, normal_ids)
    return MaskSet(target_B, positions, turns, np.where(turns > 0, shown, 0))


def _block_draws(words: np.ndarray, length_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of every attempt, each [B, attempts]."""
    starts = scale_high_bits(words[:, ::2], length_B[:, None]).astype(np.int64)
    is_block = scale_high_bits(words[:, 1::2], 2**32) < np.uint64(round(BLOCK_PROBABILITY * 2**32))
    block_lengths = MIN_BLOCK_TOKENS + scale_low_bits(words[:, 1::2], MAX_BLOCK_TOKENS - MIN_BLOCK_TOKENS + 1)
    return starts, np.where(is_block, block_lengths, 1).astype(np.int64)


def _place_blocks(
    blocked: np.ndarray, target_B: np.ndarray, starts: np.ndarray, lengths: np.ndarray, max_masked_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Run the draws of all samples side by side; `blocked` is changed."""
    num_samples = len(blocked)
    offsets = np.arange(MAX_BLOCK_TOKENS)
    positions = np.zeros((num_samples, max_masked_tokens), dtype=np.int64)
    turns = np.zeros_like(positions)
    count = np.zeros(num_samples, dtype=np.int64)
    turn = np.zeros(num_samples, dtype=np.int64)
    open_rows = np.flatnonzero(target_B > 0)
    for attempt in range(starts.shape[1]):
        if not len(open_rows):
            break
        length = np.minimum(lengths[open_rows, attempt], (target_B - count)[open_rows])
        span = starts[open_rows, attempt, None] + offsets
        inside = offsets < length[:, None]
        free = ~(blocked[open_rows[:, None], span] & inside).any(axis=1)
        rows, length, span, inside = open_rows[free], length[free], span[free], inside[free]
        turn[rows] += 1
        row_of, place = np.broadcast_to(rows[:, None], span.shape)[inside], (count[rows, None] + offsets)[inside]
        positions[row_of, place] = span[inside]
        turns[row_of, place] = turn[row_of]
        blocked[row_of, span[inside]] = True
        count[rows] += length
        open_rows = open_rows[count[open_rows] < target_B[open_rows]]
    for row in open_rows:  # draws used up: single tokens from the left
        rest = np.flatnonzero(~blocked[row])[: target_B[row] - count[row]]
        positions[row, count[row] : target_B[row]] = rest
        turns[row, count[row] : target_B[row]] = turn[row] + 1 + np.arange(len(rest))
    return positions, turns


def _shown_ids(words: np.ndarray, originals: np.ndarray, mask_id: int, normal_ids: np.ndarray) -> np.ndarray:
    random_ids = normal_ids[scale_low_bits(words, len(normal_ids)).astype(np.int64)]
    coin = scale_high_bits(words, 2**32).astype(np.float64) / 2**32
    shown = np.where(coin < SHOW_MASK_PROBABILITY + SHOW_RANDOM_PROBABILITY, random_ids, originals)
    return np.where(coin < SHOW_MASK_PROBABILITY, mask_id, shown)
