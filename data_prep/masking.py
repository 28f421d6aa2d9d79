"""Blockwise masking, Algorithm 1 of the UniLMv2 paper.

    repeat: p = a random position of the text; l = randint(2, 6) if rand() < 0.4 else 1;
            if none of x_p .. x_{p+l-1} is masked already, that block is the next turn (factorization step);
    until 15% are masked.

What the paper leaves open: special tokens count as masked already, so no block holds one; a block that would run past
the text is drawn anew; the last block is shortened, so that exactly round(0.15 * maskable) tokens, at least 1, are
masked. data_prep/mask_settings.py has the three numbers, which can be chosen.

A sample's random words, for a mask set: one for each block that may be drawn, its start (upper half) and length (lower
half), then one for each masked token, what the context shows there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from data_prep.draws import Decision, draw_words, word_of
from data_prep.mask_settings import MASK_RATE, MaskSettings, num_masked
from data_prep.packing import Samples

SHOW_MASK_PROBABILITY, SHOW_RANDOM_PROBABILITY = 0.8, 0.1  # in what is left, the original token is shown

_HALF_WORD = 2**32
_LOW_HALF = np.uint64(_HALF_WORD - 1)
_SHOW_MASK_BELOW = round(SHOW_MASK_PROBABILITY * _HALF_WORD)
_SHOW_RANDOM_BELOW = round((SHOW_MASK_PROBABILITY + SHOW_RANDOM_PROBABILITY) * _HALF_WORD)


@dataclass(frozen=True)
class Masks:
    """K sets of masks for B samples."""

    num_masked_KB: np.ndarray
    """int64."""
    places_K: list[np.ndarray]
    """Of each set, the masked tokens of all samples, concatenated: see `place_dtype`; a sample's in factorization order, a
    block from left to right."""


def place_dtype(token: np.dtype[Any]) -> np.dtype[Any]:
    """A masked token: its position in the sample (never 0, which is [SOS]'s), its turn, that is its factorization step,
    from 1, and the id that the context shows there: the mask, a random one or the original."""
    return np.dtype([("position", np.uint16), ("turn", np.uint16), ("shown", token)])


def max_draws(num_masked: np.ndarray, rate: float) -> np.ndarray:
    """Return how many blocks may be drawn for samples; about half of them are used at the paper's rate.

    The higher the rate, the more blocks meet one that is there already; words that nobody draws cost nothing.
    """
    return 2 * num_masked + 64 if rate <= MASK_RATE else 32 * num_masked + 1024


def draw_masks(
    samples: Samples,
    settings: MaskSettings,
    *,
    special_ids: np.ndarray,
    normal_ids: np.ndarray,
    mask_id: int,
    seed: int,
    first_sample: int,
) -> Masks:
    """All mask sets of samples number first_sample ..; a sample's masks of a set depend on nothing but its number, its
    tokens, the seed, the set's number and rate, and the block share and lengths."""
    tokens_T, length_B = samples.tokens_T, samples.length_B
    is_special_V = np.zeros(max(tokens_T.max(), special_ids.max()) + 1, dtype=np.bool_)
    is_special_V[special_ids] = True
    is_special_T = is_special_V[tokens_T]
    starts_B = np.cumsum(length_B, dtype=np.int64) - length_B
    num_maskable_B = length_B - np.add.reduceat(is_special_T, starts_B, dtype=np.int64)
    num_masked_KB = np.stack([num_masked(num_maskable_B, rate) for rate in settings.rates_K])
    places_K = []
    for mask_set, (rate, num_masked_B) in enumerate(zip(settings.rates_K, num_masked_KB, strict=True)):
        keys_B = draw_words(seed, Decision.MASKS, first_sample, len(length_B), 1, mask_set)[:, 0]
        places_M = np.empty(num_masked_B.sum(), dtype=place_dtype(tokens_T.dtype))
        _mask_samples(
            tokens_T,
            length_B,
            is_special_T.copy(),
            num_masked_B,
            max_draws(num_masked_B, rate),
            keys_B,
            settings.block_share,
            *settings.block_lengths,
            normal_ids.astype(tokens_T.dtype),
            mask_id,
            places_M,
        )
        places_K.append(places_M)
    return Masks(num_masked_KB, places_K)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def block_draw(word: int, text_tokens: int, share: float, shortest: int, longest: int) -> tuple[int, int]:
    """Return start and length of the block that a word stands for, in a text of `text_tokens` tokens."""
    start = ((word >> np.uint64(32)) * np.uint64(text_tokens)) >> np.uint64(32)
    low, is_block_below = word & _LOW_HALF, np.uint64(share * _HALF_WORD + 0.5)
    if low >= is_block_below:
        return int(start), 1
    return int(start), shortest + int(low * np.uint64(longest - shortest + 1) // is_block_below)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def shown_id(word: int, original: int, normal_ids: np.ndarray, mask_id: int) -> int:
    """Return what the context shows in place of `original`."""
    coin = word >> np.uint64(32)
    if coin < np.uint64(_SHOW_MASK_BELOW):
        return mask_id
    if coin < np.uint64(_SHOW_RANDOM_BELOW):
        return normal_ids[((word & _LOW_HALF) * np.uint64(len(normal_ids))) >> np.uint64(32)]  # type: ignore[no-any-return]
    return original


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _num_masked(is_masked_L: np.ndarray, start: int, stop: int) -> int:
    count = 0
    for position in range(start, stop):  # NumPy's functions, compiled, take five times as long for so few
        count += is_masked_L[position]
    return count


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _algorithm_1(
    tokens_L: np.ndarray,
    is_masked_L: np.ndarray,
    key: int,
    max_draws: int,
    share: float,
    shortest: int,
    longest: int,
    normal_ids: np.ndarray,
    mask_id: int,
    places_P: np.ndarray,
) -> None:
    """Write the masked tokens of a sample; as many as there are places. In `is_masked_L` special tokens are masked."""
    count = turn = draw = 0
    while count < len(places_P):
        if draw < max_draws:
            start, length = block_draw(word_of(key, draw), len(tokens_L), share, shortest, longest)
            draw += 1
        else:  # no block may fit any more: single tokens from the left
            start, length = int(np.argmin(is_masked_L)), 1
        stop = start + min(length, len(places_P) - count)
        if stop > len(tokens_L) or _num_masked(is_masked_L, start, stop):
            continue
        turn += 1
        for position in range(start, stop):
            is_masked_L[position] = True
            place, word = places_P[count], word_of(key, max_draws + count)
            place.position, place.turn = position, turn
            place.shown = shown_id(word, tokens_L[position], normal_ids, mask_id)
            count += 1


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _mask_samples(
    tokens_T: np.ndarray,
    length_B: np.ndarray,
    is_masked_T: np.ndarray,
    num_masked_B: np.ndarray,
    max_draws_B: np.ndarray,
    keys_B: np.ndarray,
    share: float,
    shortest: int,
    longest: int,
    normal_ids: np.ndarray,
    mask_id: int,
    places_M: np.ndarray,
) -> None:
    first_token = first_place = 0
    for b in range(len(length_B)):
        tokens, places = (
            slice(first_token, first_token + length_B[b]),
            slice(first_place, first_place + num_masked_B[b]),
        )
        _algorithm_1(
            tokens_T[tokens],
            is_masked_T[tokens],
            keys_B[b],
            max_draws_B[b],
            share,
            shortest,
            longest,
            normal_ids,
            mask_id,
            places_M[places],
        )
        first_token, first_place = tokens.stop, places.stop
