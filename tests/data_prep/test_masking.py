"""masking.py, which is compiled, against Algorithm 1 as the paper states it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import masking
from data_prep.draws import Decision, draw_words
from data_prep.masking import MaskSet, draw_mask_set, max_masked, num_attempts, num_masked
from data_prep.packing import NUM_SPECIAL_TOKENS
from data_prep.tokenizer import Tokenizer


@dataclass(frozen=True)
class Texts:
    """Samples to mask, as `assemble` lays them out."""

    tokens_BL: np.ndarray
    length_B: np.ndarray

    @property
    def max_masked_tokens(self) -> int:
        return max_masked(self.tokens_BL.shape[1], NUM_SPECIAL_TOKENS)


def cut_texts(
    corpus_ids: np.ndarray, tokenizer: Tokenizer, *, num_samples: int, max_length: int, unk_share: float, seed: int
) -> Texts:
    """Stretches of real text, 8 tokens to full, in which a share of the tokens is made unknown."""
    random = np.random.default_rng(seed)
    tokens_BL = np.full((num_samples, max_length), tokenizer.pad_id, dtype=np.int32)
    length_B = random.integers(8 + NUM_SPECIAL_TOKENS, max_length, num_samples, endpoint=True).astype(np.int32)
    for row, length in zip(tokens_BL, length_B, strict=True):
        start = random.integers(len(corpus_ids) - length)
        row[:length] = corpus_ids[start : start + length]
        row[:length][random.random(length) < unk_share] = tokenizer.unk_id
        row[0] = tokenizer.sos_id
        row[[random.integers(2, length - 2), length - 1]] = tokenizer.eos_id
    return Texts(tokens_BL, length_B)


def draw(texts: Texts, tokenizer: Tokenizer, *, seed: int = 0, first_sample: int = 0, mask_set: int = 0) -> MaskSet:
    return draw_mask_set(
        texts.tokens_BL, texts.length_B, special_ids=tokenizer.special_ids, normal_ids=tokenizer.normal_ids,
        mask_id=tokenizer.mask_id, max_masked_tokens=texts.max_masked_tokens, seed=seed, first_sample=first_sample,
        mask_set=mask_set,
    )  # fmt: skip


def algorithm_1(
    ids: list[int], words: list[int], attempts: int, tokenizer: Tokenizer
) -> tuple[list[int], list[int], list[int]]:
    """Positions, turns and shown ids of one text (its special tokens included, its padding not) from its raw words.

    Word a gives the start of attempt a (upper half), whether it is a block and how long (lower half); one word for each
    masked token follows: what is shown (upper half) and which random id (lower half).
    """
    maskable = [position for position, token in enumerate(ids) if token not in tokenizer.special_ids]
    target = max(1, int(0.15 * len(maskable) + 0.5 + 1e-9)) if maskable else 0
    positions: list[int] = []
    turns: list[int] = []
    for attempt in range(attempts):
        if len(positions) == target:
            break
        upper, lower = divmod(words[attempt], 2**32)
        start = upper * len(ids) >> 32
        is_block_below = round(0.4 * 2**32)
        length = 2 + lower * 5 // is_block_below if lower < is_block_below else 1
        block = range(start, start + min(length, target - len(positions)))
        if all(position in maskable and position not in positions for position in block):
            turns += [max(turns, default=0) + 1] * len(block)
            positions += block
    while len(positions) < target:  # the attempts ran out
        turns.append(max(turns, default=0) + 1)
        positions.append(next(position for position in maskable if position not in positions))
    shown = []
    for position, word in zip(positions, words[attempts:], strict=False):
        upper, lower = divmod(word, 2**32)
        random_id = int(tokenizer.normal_ids[lower * len(tokenizer.normal_ids) >> 32])
        shown.append(tokenizer.mask_id if upper < 0.8 * 2**32 else random_id if upper < 0.9 * 2**32 else ids[position])
    return positions, turns, shown


def assert_is_algorithm_1(masks: MaskSet, texts: Texts, words: np.ndarray, attempts: int, tokenizer: Tokenizer) -> None:
    for row, length in enumerate(texts.length_B):
        ids = texts.tokens_BL[row, :length].tolist()
        positions, turns, shown = algorithm_1(ids, words[row].tolist(), attempts, tokenizer)
        unused = [0] * (texts.max_masked_tokens - len(positions))
        assert masks.num_masked_B[row] == len(positions)
        assert masks.positions_BP[row].tolist() == positions + unused
        assert masks.turns_BP[row].tolist() == turns + unused
        assert masks.shown_BP[row].tolist() == shown + unused


@pytest.mark.parametrize("unk_share", [0.0, 0.05, 0.9, 1.0])
@pytest.mark.parametrize("max_length", [11, 12, 40, 128, 512])
def test_equals_algorithm_1(corpus_ids: np.ndarray, tokenizer: Tokenizer, max_length: int, unk_share: float) -> None:
    num_samples, first_sample = max(10, 1000 // max_length), 2**48 + 5
    texts = cut_texts(
        corpus_ids, tokenizer, num_samples=num_samples, max_length=max_length, unk_share=unk_share, seed=max_length
    )  # fmt: skip
    attempts = num_attempts(texts.max_masked_tokens)
    for mask_set in (0, 1, 7):
        num_words = attempts + texts.max_masked_tokens
        words = draw_words(3, Decision.MASKS, first_sample, num_samples, num_words, variant=mask_set)
        masks = draw(texts, tokenizer, seed=3, first_sample=first_sample, mask_set=mask_set)
        assert_is_algorithm_1(masks, texts, words, attempts, tokenizer)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_samples=st.integers(1, 8), max_length=st.integers(11, 96), unk_share=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1), mask_set=st.integers(0, 2**16), first_sample=st.integers(0, 2**49),
)  # fmt: skip
def test_equals_algorithm_1_for_any_key(
    corpus_ids: np.ndarray, tokenizer: Tokenizer, num_samples: int, max_length: int, unk_share: float, seed: int,
    mask_set: int, first_sample: int,
) -> None:  # fmt: skip
    texts = cut_texts(
        corpus_ids, tokenizer, num_samples=num_samples, max_length=max_length, unk_share=unk_share, seed=seed
    )  # fmt: skip
    attempts = num_attempts(texts.max_masked_tokens)
    num_words = attempts + texts.max_masked_tokens
    words = draw_words(seed, Decision.MASKS, first_sample, num_samples, num_words, variant=mask_set)
    masks = draw(texts, tokenizer, seed=seed, first_sample=first_sample, mask_set=mask_set)
    assert_is_algorithm_1(masks, texts, words, attempts, tokenizer)


@pytest.mark.parametrize("attempts", [0, 1, 5, 20])
def test_equals_algorithm_1_when_the_attempts_run_out(
    corpus_ids: np.ndarray, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, attempts: int
) -> None:
    monkeypatch.setattr(masking, "num_attempts", lambda max_masked_tokens: attempts)
    texts = cut_texts(corpus_ids, tokenizer, num_samples=60, max_length=200, unk_share=0.3, seed=attempts)
    words = draw_words(1, Decision.MASKS, 0, 60, attempts + texts.max_masked_tokens)
    masks = draw(texts, tokenizer, seed=1)
    assert_is_algorithm_1(masks, texts, words, attempts, tokenizer)


@pytest.mark.parametrize("max_length", [11, 64, 512])
def test_does_not_depend_on_how_samples_are_split_into_calls(
    corpus_ids: np.ndarray, tokenizer: Tokenizer, max_length: int
) -> None:
    texts = cut_texts(corpus_ids, tokenizer, num_samples=50, max_length=max_length, unk_share=0.1, seed=0)
    together = draw(texts, tokenizer, seed=9, first_sample=1000, mask_set=2)
    for start, stop in [(0, 1), (1, 20), (20, 50)]:
        part = Texts(texts.tokens_BL[start:stop], texts.length_B[start:stop])
        masks = draw(part, tokenizer, seed=9, first_sample=1000 + start, mask_set=2)
        for name, array in vars(masks).items():
            np.testing.assert_array_equal(array, vars(together)[name][start:stop], err_msg=name)


def test_other_samples_of_a_call_change_nothing(corpus_ids: np.ndarray, tokenizer: Tokenizer) -> None:
    texts = cut_texts(corpus_ids, tokenizer, num_samples=20, max_length=64, unk_share=0, seed=0)
    others = cut_texts(corpus_ids, tokenizer, num_samples=20, max_length=64, unk_share=0.5, seed=1)
    others.tokens_BL[7], others.length_B[7] = texts.tokens_BL[7], texts.length_B[7]
    alone, among_others = draw(texts, tokenizer), draw(others, tokenizer)
    np.testing.assert_array_equal(alone.positions_BP[7], among_others.positions_BP[7])
    np.testing.assert_array_equal(alone.shown_BP[7], among_others.shown_BP[7])


@pytest.mark.parametrize(
    ("maskable", "masked"),
    [(0, 0), (1, 1), (3, 1), (8, 1), (9, 1), (10, 2), (16, 2), (17, 3), (30, 5), (100, 15), (509, 76)],
)
def test_fifteen_percent_halves_up_at_least_one(maskable: int, masked: int) -> None:
    assert num_masked(maskable) == masked


def test_a_text_of_special_tokens_has_no_masks(tokenizer: Tokenizer) -> None:
    tokens_BL = np.full((1, 32), tokenizer.pad_id, dtype=np.int32)
    tokens_BL[0, :12] = [
        tokenizer.sos_id,
        *[tokenizer.unk_id] * 4,
        tokenizer.eos_id,
        *[tokenizer.unk_id] * 5,
        tokenizer.eos_id,
    ]
    masks = draw(Texts(tokens_BL, np.array([12])), tokenizer)
    assert not any(array.any() for array in vars(masks).values())


def test_a_single_maskable_token_among_unknown_ones_is_masked(tokenizer: Tokenizer) -> None:
    tokens_BL = np.full((200, 512), tokenizer.unk_id, dtype=np.int32)
    tokens_BL[:, 300] = tokenizer.normal_ids[0]
    masks = draw(Texts(tokens_BL, np.full(200, 512)), tokenizer)
    assert (masks.num_masked_B == 1).all()
    assert (masks.positions_BP[:, 0] == 300).all()
    assert (masks.turns_BP[:, 0] == 1).all()
