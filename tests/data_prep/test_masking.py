"""masking.py, which is compiled, against Algorithm 1 as the paper states it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import masking
from data_prep.draws import Decision, draw_words, word_of
from data_prep.mask_settings import PAPER_MASKS, MaskSettings
from data_prep.masking import draw_masks, max_draws
from data_prep.packing import NUM_SPECIAL_TOKENS, Samples
from data_prep.tokenizer import Tokenizer


def cut_samples(
    corpus_ids: np.ndarray, tokenizer: Tokenizer, *, num_samples: int, max_length: int, unk_share: float, seed: int
) -> list[np.ndarray]:
    """Samples of real text, 8 tokens to full, in which a share of the tokens is made unknown."""
    random = np.random.default_rng(seed)
    samples = []
    for length in random.integers(8 + NUM_SPECIAL_TOKENS, max_length, num_samples, endpoint=True):
        start = random.integers(len(corpus_ids) - length)
        sample = corpus_ids[start : start + length].astype(np.uint16)
        sample[random.random(length) < unk_share] = tokenizer.unk_id
        sample[0] = tokenizer.sos_id
        sample[[random.integers(2, length - 2), length - 1]] = tokenizer.eos_id
        samples.append(sample)
    return samples


Drawn = list[tuple[list[int], list[int], list[int]]]
"""Of each sample, the positions, turns and shown ids of its masked tokens."""


def draw(
    samples: list[np.ndarray],
    tokenizer: Tokenizer,
    masks: MaskSettings = PAPER_MASKS,
    *,
    seed: int = 0,
    first_sample: int = 0,
    mask_set: int = 0,
) -> Drawn:
    """The mask set of this number, of as many sets as it takes with the first one's rate."""
    length_B = np.array([len(sample) for sample in samples])
    drawn = draw_masks(
        Samples(np.concatenate(samples), length_B, length_B // 2), replace(masks, rates_K=masks.rates_K * (mask_set + 1)),
        special_ids=tokenizer.special_ids, normal_ids=tokenizer.normal_ids, mask_id=tokenizer.mask_id, seed=seed,
        first_sample=first_sample,
    )  # fmt: skip
    num_masked_B, places_M = drawn.num_masked_KB[mask_set], drawn.places_K[mask_set]
    assert len(places_M) == num_masked_B.sum()
    of_samples = np.split(places_M, np.cumsum(num_masked_B)[:-1])
    return [tuple(places[name].tolist() for name in ("position", "turn", "shown")) for places in of_samples]  # type: ignore[misc]


def words_of(seed: int, sample: int, mask_set: int) -> Callable[[int], int]:
    """The words of a sample by their number: SplitMix64 from a word of Philox."""
    key = int(draw_words(seed, Decision.MASKS, sample, 1, 1, variant=mask_set)[0, 0])
    return lambda index: int(word_of(np.uint64(key), index))


def algorithm_1(
    ids: list[int], word: Callable[[int], int], draws: int, tokenizer: Tokenizer, masks: MaskSettings
) -> tuple[list[int], list[int], list[int]]:
    """Positions, turns and shown ids of one sample from its raw words.

    The word of a draw gives its start (upper half) and whether it is a block and how long (lower half); behind those of
    all draws, made or not, comes one for each masked token: what is shown (upper half) and which random id (lower half).
    """
    maskable = [position for position, token in enumerate(ids) if token not in tokenizer.special_ids]
    target = max(1, floor(Fraction(str(masks.rates_K[0])) * len(maskable) + Fraction(1, 2))) if maskable else 0
    shortest, longest = masks.block_lengths
    positions: list[int] = []
    turns: list[int] = []
    shown: list[int] = []

    def mask(block: Sequence[int]) -> None:
        turns.extend([max(turns, default=0) + 1] * len(block))
        for position in block:
            upper, lower = divmod(word(draws + len(positions)), 2**32)
            positions.append(position)
            random_id = int(tokenizer.normal_ids[lower * len(tokenizer.normal_ids) >> 32])
            kept = random_id if upper < 0.9 * 2**32 else ids[position]
            shown.append(tokenizer.mask_id if upper < 0.8 * 2**32 else kept)

    for draw in range(draws):
        if len(positions) == target:
            break
        upper, lower = divmod(word(draw), 2**32)
        start = upper * len(ids) >> 32
        is_block_below = round(masks.block_share * 2**32)
        length = shortest + lower * (longest - shortest + 1) // is_block_below if lower < is_block_below else 1
        block = range(start, start + min(length, target - len(positions)))
        if all(position in maskable and position not in positions for position in block):
            mask(block)
    while len(positions) < target:  # the draws ran out
        mask([next(position for position in maskable if position not in positions)])
    return positions, turns, shown


def assert_is_algorithm_1(
    samples: list[np.ndarray],
    tokenizer: Tokenizer,
    masks: MaskSettings = PAPER_MASKS,
    draws: int | None = None,
    **key: int,
) -> None:
    drawn = draw(samples, tokenizer, masks, **key)
    for number, (sample, found) in enumerate(zip(samples, drawn, strict=True), start=key.get("first_sample", 0)):
        word = words_of(key.get("seed", 0), number, key.get("mask_set", 0))
        allowed = int(max_draws(np.array(len(found[0])), masks.rates_K[0])) if draws is None else draws
        assert found == algorithm_1(sample.tolist(), word, allowed, tokenizer, masks)


def test_the_masks_of_a_seed_stay_what_they_are(tokenizer: Tokenizer) -> None:
    """A data set that is built again has the same bytes; the hash is of what the first versions drew."""
    random = np.random.default_rng(7)
    length_B = random.integers(11, 129, 500)
    tokens_T = random.integers(0, 4000, length_B.sum()).astype(np.uint16)
    drawn = draw_masks(
        Samples(tokens_T, length_B, length_B // 2), MaskSettings((0.15,) * 3), special_ids=np.arange(5),
        normal_ids=np.arange(5, 4000), mask_id=4, seed=11, first_sample=2**48 + 3,
    )  # fmt: skip
    content = b"".join(places.tobytes() for places in drawn.places_K)
    assert hashlib.sha256(content).hexdigest() == "6fcffb5a1f62f5ccea46a3dd231a5daf3d44c2be30f24b3fb04672ad60ae2f38"


@pytest.mark.parametrize("unk_share", [0.0, 0.05, 0.9, 1.0])
@pytest.mark.parametrize("max_length", [11, 12, 40, 128, 512])
def test_equals_algorithm_1(corpus_ids: np.ndarray, tokenizer: Tokenizer, max_length: int, unk_share: float) -> None:
    samples = cut_samples(
        corpus_ids, tokenizer, num_samples=max(10, 1000 // max_length), max_length=max_length, unk_share=unk_share,
        seed=max_length,
    )  # fmt: skip
    for mask_set in (0, 1, 7):
        assert_is_algorithm_1(samples, tokenizer, seed=3, first_sample=2**48 + 5, mask_set=mask_set)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_samples=st.integers(1, 8), max_length=st.integers(11, 96), unk_share=st.integers(0, 1000).map(lambda n: n / 1000),
    seed=st.integers(0, 2**63 - 1), mask_set=st.integers(0, 20), first_sample=st.integers(0, 2**49),
    rate=st.one_of(st.just(0.15), st.integers(1, 999).map(lambda n: n / 1000)), share=st.integers(0, 1000).map(lambda n: n / 1000),
    lengths=st.one_of(st.just((2, 6)), st.tuples(st.integers(1, 9), st.integers(9, 40))),
)  # fmt: skip
def test_equals_algorithm_1_for_any_key(
    corpus_ids: np.ndarray, tokenizer: Tokenizer, num_samples: int, max_length: int, unk_share: float, seed: int,
    mask_set: int, first_sample: int, rate: float, share: float, lengths: tuple[int, int],
) -> None:  # fmt: skip
    samples = cut_samples(
        corpus_ids, tokenizer, num_samples=num_samples, max_length=max_length, unk_share=unk_share, seed=seed
    )  # fmt: skip
    masks = MaskSettings((rate,), share, lengths)
    assert_is_algorithm_1(samples, tokenizer, masks, seed=seed, first_sample=first_sample, mask_set=mask_set)


@pytest.mark.parametrize("length", [6, 63, 64, 65, 128, 129])
def test_no_block_runs_past_a_text_without_special_tokens(
    corpus_ids: np.ndarray, tokenizer: Tokenizer, length: int
) -> None:
    normal = corpus_ids[np.isin(corpus_ids, tokenizer.normal_ids)].astype(np.uint16)
    assert_is_algorithm_1(np.split(normal[: 50 * length], 50), tokenizer, seed=length)


@pytest.mark.parametrize("draws", [0, 1, 5, 20])
def test_equals_algorithm_1_when_the_draws_run_out(
    corpus_ids: np.ndarray, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, draws: int
) -> None:
    monkeypatch.setattr(masking, "max_draws", lambda num_masked_B, rate: np.full_like(num_masked_B, draws))
    samples = cut_samples(corpus_ids, tokenizer, num_samples=60, max_length=200, unk_share=0.3, seed=draws)
    assert_is_algorithm_1(samples, tokenizer, draws=draws, seed=1)


@pytest.mark.parametrize("max_length", [11, 64, 512])
def test_does_not_depend_on_how_samples_are_split_into_calls(
    corpus_ids: np.ndarray, tokenizer: Tokenizer, max_length: int
) -> None:
    samples = cut_samples(corpus_ids, tokenizer, num_samples=50, max_length=max_length, unk_share=0.1, seed=0)
    together = draw(samples, tokenizer, seed=9, first_sample=1000, mask_set=2)
    for start, stop in [(0, 1), (1, 20), (20, 50)]:
        part = draw(samples[start:stop], tokenizer, seed=9, first_sample=1000 + start, mask_set=2)
        assert part == together[start:stop]


def test_other_samples_of_a_call_change_nothing(corpus_ids: np.ndarray, tokenizer: Tokenizer) -> None:
    samples = cut_samples(corpus_ids, tokenizer, num_samples=20, max_length=64, unk_share=0, seed=0)
    others = cut_samples(corpus_ids, tokenizer, num_samples=20, max_length=64, unk_share=0.5, seed=1)
    others[7] = samples[7]
    assert draw(samples, tokenizer)[7] == draw(others, tokenizer)[7]


def test_other_mask_sets_of_a_call_change_nothing(corpus_ids: np.ndarray, tokenizer: Tokenizer) -> None:
    samples = Samples(corpus_ids[:900].astype(np.uint16), np.full(9, 100), np.full(9, 50))
    settings = {"special_ids": tokenizer.special_ids, "normal_ids": tokenizer.normal_ids, "mask_id": tokenizer.mask_id}
    rates = [(0.15,), (0.15,) * 5, (0.15, 0.3, 0.5)]
    one, many, rising = (
        draw_masks(samples, MaskSettings(rates_K), seed=4, first_sample=0, **settings).places_K for rates_K in rates
    )
    np.testing.assert_array_equal(many[0], one[0])
    np.testing.assert_array_equal(rising[0], one[0])
    for of_set in many[1:]:
        assert (of_set["position"] != one[0]["position"]).mean() > 0.9


def test_a_text_of_special_tokens_has_no_masks(tokenizer: Tokenizer) -> None:
    unknown, eos = [tokenizer.unk_id], [tokenizer.eos_id]
    sample = np.array([tokenizer.sos_id, *unknown * 4, *eos, *unknown * 5, *eos], dtype=np.uint16)
    assert draw([sample, sample], tokenizer) == [([], [], [])] * 2


def test_a_single_maskable_token_among_unknown_ones_is_masked(tokenizer: Tokenizer) -> None:
    sample = np.full(512, tokenizer.unk_id, dtype=np.uint16)
    sample[300] = tokenizer.normal_ids[0]
    drawn = draw([sample] * 200, tokenizer)
    assert all((positions, turns) == ([300], [1]) for positions, turns, _ in drawn)
