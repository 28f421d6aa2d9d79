from __future__ import annotations

import numpy as np
import pytest

from data_prep.draws import Decision, draw_words, scale_high_bits, unit_interval, word_of

LARGEST_WORD = 2**64 - 1


@pytest.mark.parametrize("words_per_item", [1, 3, 4, 5, 444])
@pytest.mark.parametrize("first_item", [0, 1, 2**48])
def test_words_depend_on_the_item_number_alone(first_item: int, words_per_item: int) -> None:
    together = draw_words(7, Decision.MASKS, first_item, 10, words_per_item)
    one_by_one = [draw_words(7, Decision.MASKS, first_item + i, 1, words_per_item)[0] for i in range(10)]
    np.testing.assert_array_equal(together, one_by_one)
    np.testing.assert_array_equal(together[3:8], draw_words(7, Decision.MASKS, first_item + 3, 5, words_per_item))


def test_words_of_different_items_decisions_variants_and_seeds_differ() -> None:
    keys = [(seed, decision, variant) for seed in (0, 1, 2**63 - 1) for decision in Decision for variant in (0, 1, 99)]
    words = np.concatenate([draw_words(seed, d, 0, 50, 6, variant=variant).ravel() for seed, d, variant in keys])
    assert len(np.unique(words)) == len(words) == len(keys) * 300


def test_streams_are_uncorrelated() -> None:
    """Neighbours in each part of the key, and neighbouring items, as numbers in [0, 1)."""
    streams = [
        draw_words(seed, decision, first_item, 20_000, 4, variant=variant)[:, 0] / 2.0**64
        for seed, decision, variant, first_item in [
            (0, Decision.MASKS, 0, 0), (1, Decision.MASKS, 0, 0), (0, Decision.SEGMENT_BOUNDARY, 0, 0),
            (0, Decision.MASKS, 1, 0), (0, Decision.MASKS, 0, 1),
        ]
    ]  # fmt: skip
    correlation = np.corrcoef(streams)[np.triu_indices(len(streams), k=1)]
    assert np.abs(correlation).max() < 4.4 / np.sqrt(20_000)


def test_values_that_stored_data_sets_rely_on() -> None:
    """A data set built again later must have the same bytes: neither keys nor the generator may ever change."""
    stored = {"SEGMENT_BOUNDARY": 1, "MASKS": 2, "CHUNK_ORDER": 3, "ORDER_IN_WINDOW": 4, "SHORT_SAMPLES": 5}
    assert {name: Decision[name] for name in stored} == stored
    assert draw_words(5, Decision.MASKS, 3, 1, 2, variant=1)[0].tolist() == [8506315779875957605, 4549029752255616134]


def test_words_of_neighbouring_keys_are_uniform_and_uncorrelated() -> None:
    """5,000 words of each as numbers in [0, 1): their mean, variance and correlations."""
    streams = [
        [unit_interval(np.uint64(word_of(np.uint64(key), i))) for i in range(5001)]
        for key in (0, 1, 2, 2**63, 2**64 - 1)
    ]
    numbers = np.array([stream[:-1] for stream in streams] + [streams[0][1:]])
    assert np.abs(numbers.mean(axis=1) - 0.5).max() < 4.5 * (1 / 12 / 5000) ** 0.5
    assert np.abs(numbers.var(axis=1) - 1 / 12).max() < 4.5 * (1 / 180 / 5000) ** 0.5
    correlation = np.corrcoef(numbers[1:])[np.triu_indices(5, k=1)]
    assert np.abs(correlation).max() < 4.4 / np.sqrt(5000)


def test_the_unit_interval_is_half_open() -> None:
    assert unit_interval(np.uint64(0)) == 0.0
    assert unit_interval(np.uint64(LARGEST_WORD)) == 1 - 2.0**-53


@pytest.mark.parametrize("bound", [1, 2, 5, 600, 2**31])
def test_scaled_words_stay_below_the_bound_and_reach_it(bound: int) -> None:
    assert scale_high_bits(np.array([0, LARGEST_WORD], dtype=np.uint64), bound).tolist() == [0, bound - 1]


def test_a_bound_for_each_row() -> None:
    words = draw_words(0, Decision.MASKS, 0, 200, 9)
    scaled = scale_high_bits(words, np.arange(1, 201)[:, None])
    assert (scaled < np.arange(1, 201)[:, None]).all()
    np.testing.assert_array_equal(scaled[11], scale_high_bits(words[11], 12))


def test_the_low_bits_do_not_matter() -> None:
    word = np.array([(3 << 32) | (2**32 - 1)], dtype=np.uint64)
    assert scale_high_bits(word, 2**32) == 3


def test_words_of_a_key_are_those_of_splitmix64() -> None:
    """The first words of its published reference code, seeded with 1234567."""
    words = [int(word_of(np.uint64(1234567), index)) for index in range(5)]
    assert words == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
