from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.packing import MIN_DOCUMENT_TOKENS, NUM_SPECIAL_TOKENS, Samples, cut_into_texts
from data_prep.tokenizer import Tokenizer

Assemble = Callable[..., Samples]


@st.composite
def documents_and_limits(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """A document of up to some thousand tokens, each its own place, and max_length_tokens."""
    max_length = draw(st.integers(MIN_DOCUMENT_TOKENS + NUM_SPECIAL_TOKENS, 600))
    return np.arange(draw(st.integers(MIN_DOCUMENT_TOKENS, 5000))), max_length


@settings(max_examples=200, deadline=None, derandomize=True)
@given(documents_and_limits())
def test_pieces_lose_nothing_fit_and_are_equal_within_one_token(case: tuple[np.ndarray, int]) -> None:
    document, max_length = case
    texts = cut_into_texts(document, max_length)
    sizes = [len(text) for text in texts]
    np.testing.assert_array_equal(np.concatenate(texts), document)
    assert max(sizes) + NUM_SPECIAL_TOKENS <= max_length
    assert max(sizes) - min(sizes) <= 1
    assert (len(texts) - 1) * (max_length - NUM_SPECIAL_TOKENS) < len(document), "one piece fewer would not fit"
    assert min(sizes) >= 2, "each segment needs a token"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=documents_and_limits(), seed=st.integers(0, 2**63 - 1), first_sample=st.integers(0, 2**49))
def test_layout(
    assemble_texts: Assemble, tokenizer: Tokenizer, case: tuple[np.ndarray, int], seed: int, first_sample: int
) -> None:
    document, max_length = case
    texts = cut_into_texts(document + tokenizer.vocab_size, max_length)  # no id is a special one
    samples = assemble_texts(texts, max_length, seed=seed, first_sample=first_sample)
    assert samples.tokens_BL.shape == (len(texts), max_length)
    for text, row, length, boundary in zip(
        texts, samples.tokens_BL, samples.length_B, samples.segment_boundary_B, strict=True
    ):
        first, second = text[: boundary - 2], text[boundary - 2 :]
        padding = [tokenizer.pad_id] * (max_length - length)
        assert len(first) > 0
        assert len(second) > 0
        assert length == len(text) + NUM_SPECIAL_TOKENS
        assert row.tolist() == [tokenizer.sos_id, *first, tokenizer.eos_id, *second, tokenizer.eos_id, *padding]


@pytest.mark.parametrize("split_at", [1, 7, 19])
def test_does_not_depend_on_how_samples_are_split_into_calls(
    assemble_texts: Assemble, corpus_ids: np.ndarray, split_at: int
) -> None:
    texts = cut_into_texts(corpus_ids[:1100], 60)
    together = assemble_texts(texts, 60, seed=1, first_sample=40)
    parts = [
        assemble_texts(texts[:split_at], 60, seed=1, first_sample=40),
        assemble_texts(texts[split_at:], 60, seed=1, first_sample=40 + split_at),
    ]
    for name, array in vars(together).items():
        np.testing.assert_array_equal(array, np.concatenate([vars(part)[name] for part in parts]))


def test_another_seed_draws_other_boundaries(assemble_texts: Assemble, corpus_ids: np.ndarray) -> None:
    texts = cut_into_texts(corpus_ids[:1100], 60)
    boundaries = {
        tuple(assemble_texts(texts, 60, seed=seed, first_sample=0).segment_boundary_B.tolist()) for seed in range(5)
    }
    assert len(boundaries) == 5
