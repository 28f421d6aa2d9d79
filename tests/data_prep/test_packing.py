from __future__ import annotations

from collections.abc import Callable
from itertools import chain, count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cut_document, texts_of

from data_prep.corpus import find_sources, read_documents
from data_prep.draws import Decision, draw_words, word_of
from data_prep.packing import MIN_DOCUMENT_TOKENS, NUM_SPECIAL_TOKENS, Samples, Texts, cut_into_texts
from data_prep.parameters import BuildParameters
from data_prep.tokenizer import Tokenizer
from data_prep.units import tokenize

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
    texts = cut_document(document, max_length)
    sizes = [len(text) for text in texts]
    np.testing.assert_array_equal(np.concatenate(texts), document)
    assert max(sizes) + NUM_SPECIAL_TOKENS <= max_length
    assert max(sizes) - min(sizes) <= 1
    assert (len(texts) - 1) * (max_length - NUM_SPECIAL_TOKENS) < len(document), "one piece fewer would not fit"
    assert min(sizes) >= 2, "each segment needs a token"


def test_documents_are_cut_each_for_itself() -> None:
    num_ids = np.array([0, 8, 57, 58, 1000, 0, 114, 115, 0])
    hashes = np.arange(2**63, 2**63 + 9, dtype=np.uint64)
    for share in (0.0, 0.4):
        short = {"short_sample_probability": share, "seed": 5}
        expected = [cut_into_texts(num_ids[[i]], hashes[[i]], 60, **short).tolist() for i in range(9)]
        assert cut_into_texts(num_ids, hashes, 60, **short).tolist() == list(chain.from_iterable(expected))
        if not share:
            assert [len(sizes) for sizes in expected] == [0, 1, 1, 2, 18, 0, 2, 3, 0]


def test_texts_are_taken_by_their_numbers() -> None:
    pieces = [np.arange(5, dtype=np.uint16), np.arange(5, 8, dtype=np.uint16), np.arange(8, 20, dtype=np.uint16)]
    texts = texts_of(pieces)
    taken = texts[np.array([2, 0, 0])]
    np.testing.assert_array_equal(taken.ids, np.concatenate([pieces[2], pieces[0], pieces[0]]))
    assert taken.num_ids_B.tolist() == [12, 5, 5]
    assert taken.ids.dtype == np.uint16
    both = Texts.concatenate([taken, texts[np.arange(1, 3)], texts[np.arange(0)]])
    assert both.num_ids_B.tolist() == [12, 5, 5, 3, 12]
    np.testing.assert_array_equal(both.ids[22:], np.arange(5, 20))


def cut_one_by_one(num_ids: int, max_length: int, probability: float, seed: int, document_hash: int) -> list[int]:
    """The sizes that `cut_into_texts` gives, piece by piece: a short piece ends the stretch of full ones before it."""
    largest = max_length - NUM_SPECIAL_TOKENS
    sizes: list[int] = []
    stretch = at = 0
    key = np.uint64(int(draw_words(seed, Decision.SHORT_SAMPLES, 0, 1, 1)[0, 0]) ^ document_hash)
    words = (int(word_of(key, index)) for index in count())

    def end_stretch() -> None:
        num = -(-stretch // largest)
        sizes.extend(stretch // num + (i < stretch % num) for i in range(num))

    while True:
        is_short = next(words) // 2**11 / 2**53 < probability
        sizes_left = largest - MIN_DOCUMENT_TOKENS + 1
        size = MIN_DOCUMENT_TOKENS + next(words) // 2**32 * sizes_left // 2**32 if is_short else largest
        if num_ids - at - size < MIN_DOCUMENT_TOKENS:
            stretch += num_ids - at
            end_stretch()
            return sizes
        if is_short:
            end_stretch()
            sizes.append(size)
            stretch = 0
        else:
            stretch += size
        at += size


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    case=documents_and_limits(),
    probability=st.one_of(st.floats(0.001, 1), st.just(1.0)),
    seed=st.integers(0, 2**63 - 1),
    document_hash=st.integers(0, 2**64 - 1),
)
def test_short_samples_are_cut_by_their_plain_definition_and_lose_nothing(
    case: tuple[np.ndarray, int], probability: float, seed: int, document_hash: int
) -> None:
    document, max_length = case
    texts = cut_document(document, max_length, document_hash, short_sample_probability=probability, seed=seed)
    sizes = [len(text) for text in texts]
    np.testing.assert_array_equal(np.concatenate(texts), document)
    assert sizes == cut_one_by_one(len(document), max_length, probability, seed, document_hash)
    assert max(sizes) + NUM_SPECIAL_TOKENS <= max_length
    smallest_half = (max_length - NUM_SPECIAL_TOKENS + 1) // 2  # of a text one token too long for a sample
    assert min(sizes) >= min(MIN_DOCUMENT_TOKENS, smallest_half)


@pytest.mark.parametrize("probability", [0.1, 0.5, 1.0])
def test_the_share_of_short_samples_and_their_uniform_sizes(probability: float) -> None:
    """Of one long document; a short sample may be of full size as well. Chi-square within five standard deviations."""
    largest, num_ids = 61, np.array([1_500_000])
    hash_D = np.array([2**63 + 11], dtype=np.uint64)
    sizes = cut_into_texts(num_ids, hash_D, largest + 3, short_sample_probability=probability, seed=3)
    counts = np.bincount(sizes[:-3], minlength=largest + 1)[MIN_DOCUMENT_TOKENS:]
    num_sizes = largest - MIN_DOCUMENT_TOKENS + 1
    expected = np.full(num_sizes, probability / num_sizes) + (1 - probability) * (np.arange(num_sizes) == num_sizes - 1)
    expected *= counts.sum()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - (num_sizes - 1)) < 5 * (2 * (num_sizes - 1)) ** 0.5


def test_short_samples_of_many_documents_differ_and_have_the_share() -> None:
    """Documents that would be one sample: cut where the first is short and leaves enough behind it."""
    largest, share = 61, 0.3
    cuts = [
        int(cut_into_texts(np.array([40]), np.array([h], np.uint64), largest + 3, short_sample_probability=share)[0])
        for h in range(2**60, 2**60 + 4000)
    ]
    num_cut = sum(size < 40 for size in cuts)
    expected = share * (40 - 8 - 8 + 1) / (largest - 8 + 1)
    assert abs(num_cut - 4000 * expected) < 4.5 * (4000 * expected * (1 - expected)) ** 0.5
    assert set(cuts) == {*range(8, 33), 40}


def test_a_build_cuts_each_document_by_its_hash_and_the_seed(chapters: list[Path], tokenizer: Tokenizer) -> None:
    parameters = BuildParameters(64, short_sample_probability=0.3, validation_fraction=0.0, seed=5)
    documents = list(read_documents(find_sources(chapters[:2])))
    texts, counts = tokenize(documents, tokenizer, parameters)
    expected = [
        cut
        for document in documents
        for cut in cut_document(
            tokenizer.encode(document.lines), 64, document.hash, short_sample_probability=0.3, seed=5
        )
    ]
    assert counts["train_samples"] == len(expected) > 20
    assert texts["train"].num_ids_B.tolist() == [len(cut) for cut in expected]
    np.testing.assert_array_equal(texts["train"].ids, np.concatenate(expected))


def test_without_short_samples_no_draw_is_made() -> None:
    document = np.arange(1000)
    first, second = (cut_document(document, 64, document_hash, seed=seed) for seed, document_hash in ((0, 0), (1, 99)))
    assert [len(text) for text in first] == [len(text) for text in second]
    assert max(map(len, first)) - min(map(len, first)) <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=documents_and_limits(), seed=st.integers(0, 2**63 - 1), first_sample=st.integers(0, 2**49))
def test_layout(
    assemble_texts: Assemble, tokenizer: Tokenizer, case: tuple[np.ndarray, int], seed: int, first_sample: int
) -> None:
    document, max_length = case
    texts = cut_document(document + tokenizer.vocab_size, max_length)  # no id is a special one
    samples = assemble_texts(texts, seed=seed, first_sample=first_sample)
    rows = np.split(samples.tokens_T, np.cumsum(samples.length_B)[:-1])
    for text, row, boundary in zip(texts, rows, samples.segment_boundary_B, strict=True):
        first, second = text[: boundary - 2], text[boundary - 2 :]
        assert len(first) > 0
        assert len(second) > 0
        assert row.tolist() == [tokenizer.sos_id, *first, tokenizer.eos_id, *second, tokenizer.eos_id]


@pytest.mark.parametrize("split_at", [1, 7, 19])
def test_does_not_depend_on_how_samples_are_split_into_calls(
    assemble_texts: Assemble, corpus_ids: np.ndarray, split_at: int
) -> None:
    texts = cut_document(corpus_ids[:1100], 60)
    together = assemble_texts(texts, seed=1, first_sample=40)
    parts = [
        assemble_texts(texts[:split_at], seed=1, first_sample=40),
        assemble_texts(texts[split_at:], seed=1, first_sample=40 + split_at),
    ]
    for name, array in vars(together).items():
        np.testing.assert_array_equal(array, np.concatenate([vars(part)[name] for part in parts]))


def test_another_seed_draws_other_boundaries(assemble_texts: Assemble, corpus_ids: np.ndarray) -> None:
    texts = cut_document(corpus_ids[:1100], 60)
    boundaries = {
        tuple(assemble_texts(texts, seed=seed, first_sample=0).segment_boundary_B.tolist()) for seed in range(5)
    }
    assert len(boundaries) == 5
