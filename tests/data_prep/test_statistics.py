"""What is random is distributed as the paper says. Seeds are fixed; a sound sampler fails a test once in 10,000 seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import floor, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from support import cut_document

from data_prep import masking
from data_prep.draws import Decision, draw_words, scale_high_bits, word_of
from data_prep.mask_settings import MaskSettings
from data_prep.masking import draw_masks, max_draws
from data_prep.packing import NUM_SPECIAL_TOKENS, Samples
from data_prep.shards import SampleBatch, batch_of
from data_prep.tokenizer import Tokenizer

FALSE_ALARM = 1e-4
MAX_LENGTH = 512
BLOCK_TOKENS = range(2, 7)


def assert_distributed(counts: np.ndarray, expected: np.ndarray | None = None) -> None:
    """Chi-square test of counts against expected ones (default: all equal), by the Wilson-Hilferty approximation."""
    counts = np.asarray(counts, dtype=np.float64)
    expected = np.ones_like(counts) if expected is None else np.asarray(expected, dtype=np.float64)
    expected = expected * (counts.sum() / expected.sum())
    assert expected.min() >= 5, "too few counts for a chi-square test"
    freedom = len(counts) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    z = ((chi_square / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / sqrt(2 / (9 * freedom))
    assert z < NormalDist().inv_cdf(1 - FALSE_ALARM), f"chi-square {chi_square:.1f} at {freedom} degrees of freedom"


def assert_share(successes: int, trials: int, probability: float) -> None:
    """Binomial test, both sides, by the normal approximation."""
    deviation = sqrt(trials * probability * (1 - probability))
    assert deviation > 3
    assert abs(successes - trials * probability) < NormalDist().inv_cdf(1 - FALSE_ALARM / 2) * deviation + 0.5


def assert_independent(first: np.ndarray, second: np.ndarray, num_values: int) -> None:
    """Chi-square test of the table of two paired draws, each uniform over the values."""
    assert_distributed(np.bincount(first * num_values + second, minlength=num_values**2))


@dataclass(frozen=True)
class MaskedCorpus:
    """Samples of the sample corpus, B of them full or nearly, and several mask sets of each."""

    mask_sets: list[SampleBatch]
    """The samples with each of their mask sets."""

    @property
    def samples(self) -> SampleBatch:
        return self.mask_sets[0]

    @property
    def used_KBP(self) -> np.ndarray:
        return self.stack("turns_BP") > 0

    @property
    def originals_KBP(self) -> np.ndarray:
        return np.stack([np.take_along_axis(self.samples.tokens_BL, m.positions_BP, axis=1) for m in self.mask_sets])

    def stack(self, name: str) -> np.ndarray:
        return np.stack([vars(masks)[name] for masks in self.mask_sets])


def mask_corpus(samples: Samples, tokenizer: Tokenizer, settings: MaskSettings) -> MaskedCorpus:
    masks = draw_masks(
        samples,
        settings,
        special_ids=tokenizer.special_ids,
        normal_ids=tokenizer.normal_ids,
        mask_id=tokenizer.mask_id,
        seed=11,
        first_sample=0,
    )
    most_masked = settings.max_masked(MAX_LENGTH, NUM_SPECIAL_TOKENS)
    return MaskedCorpus([
        batch_of(samples, num_masked_B, places_M, MAX_LENGTH, most_masked, tokenizer.pad_id).as_int64()
        for num_masked_B, places_M in zip(masks.num_masked_KB, masks.places_K, strict=True)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def masked(corpus_ids: np.ndarray, tokenizer: Tokenizer, assemble_texts: Callable[..., Samples]) -> MaskedCorpus:
    samples = assemble_texts(cut_document(corpus_ids, MAX_LENGTH), seed=11, first_sample=0)
    return mask_corpus(samples, tokenizer, MaskSettings((0.15,) * 6))


@pytest.mark.parametrize("bound", [2, 5, 7, 64, 595])
def test_scaled_words_are_uniform(bound: int) -> None:
    words = draw_words(2, Decision.MASKS, 0, 3000, 10, variant=3)
    assert_distributed(np.bincount(scale_high_bits(words, bound).ravel().astype(np.int64), minlength=bound))


def words_of_keys(first_item: int, num_items: int, num_words: int) -> np.ndarray:
    """Words as compiled code draws them, [num_items, num_words]."""
    keys = draw_words(4, Decision.MASKS, first_item, num_items, 1)[:, 0]
    return np.array([[int(word_of(key, index)) for index in range(num_words)] for key in keys], dtype=np.uint64)


WORDS = [lambda *shape: draw_words(4, Decision.MASKS, *shape), words_of_keys]


@pytest.mark.parametrize("words_of_items", WORDS)
def test_every_bit_of_a_word_is_fair(words_of_items: Callable[..., np.ndarray]) -> None:
    words = words_of_items(10**9, 2500, 8).ravel()
    for bit in range(64):
        ones = int((words >> np.uint64(bit) & np.uint64(1)).sum())
        assert_share(ones, len(words), 0.5)


@pytest.mark.parametrize("words_of_items", WORDS)
def test_consecutive_draws_of_an_item_and_of_neighbours_are_independent(
    words_of_items: Callable[..., np.ndarray],
) -> None:
    values = scale_high_bits(words_of_items(0, 4000, 6), 8).astype(np.int64)
    assert_independent(values[:, :-1].ravel(), values[:, 1:].ravel(), 8)
    assert_independent(values[:-1].ravel(), values[1:].ravel(), 8)


@pytest.mark.parametrize("num_ids", [3, 8, 21, 61])
def test_the_segment_boundary_is_uniform(
    corpus_ids: np.ndarray, assemble_texts: Callable[..., Samples], num_ids: int
) -> None:
    texts = np.split(corpus_ids[: 4000 * num_ids], 4000)
    samples = assemble_texts(texts, seed=5, first_sample=0)
    first_part = samples.segment_boundary_B - 2
    counts = np.bincount(first_part, minlength=num_ids)
    assert counts[0] == 0, "segment A is never empty"
    assert len(counts) == num_ids, "segment B is never empty"
    assert_distributed(counts[1:])


def test_forty_percent_of_the_draws_are_blocks_of_two_to_six_tokens_anywhere() -> None:
    words = draw_words(6, Decision.MASKS, 0, 400, 200)
    draws = np.array([masking.block_draw(word, 100, 0.4, 2, 6) for word in words.ravel()])
    starts, lengths = draws[:, 0], draws[:, 1]
    assert_share(int((lengths > 1).sum()), lengths.size, 0.4)
    counts = np.bincount(lengths.ravel(), minlength=7)
    assert counts[0] == 0
    assert len(counts) == 7
    assert_distributed(counts[2:])
    assert_distributed(np.bincount(starts.ravel(), minlength=100))
    is_block = lengths > 1
    assert_independent(starts[is_block] // 20, lengths[is_block] - 2, 5)


@pytest.mark.parametrize(("share", "shortest", "longest"), [(0.4, 2, 6), (0.15, 1, 3), (0.75, 3, 10), (1.0, 2, 5)])
def test_the_share_and_lengths_of_blocks_are_those_asked_for(share: float, shortest: int, longest: int) -> None:
    words = draw_words(6, Decision.MASKS, 0, 400, 200).ravel()
    is_block = words & np.uint64(2**32 - 1) < np.uint64(round(share * 2**32))
    lengths = np.array([masking.block_draw(word, 100, share, shortest, longest)[1] for word in words])
    assert (lengths[~is_block] == 1).all()
    if share < 1:
        assert_share(int(is_block.sum()), len(words), share)
    counts = np.bincount(lengths[is_block], minlength=longest + 1)
    assert not counts[:shortest].any()
    assert len(counts) == longest + 1
    assert_distributed(counts[shortest:])


OTHERWISE = {
    "falling": MaskSettings((0.3, 0.25, 0.2, 0.15)),
    "half": MaskSettings((0.5, 0.5)),
    "single tokens": MaskSettings((0.2, 0.4), 0.0),
    "blocks of three": MaskSettings((0.3, 0.3), 1.0, (3, 3)),
    "long blocks": MaskSettings((0.15, 0.4), 0.25, (8, 24)),
}


@pytest.fixture(scope="module")
def samples(corpus_ids: np.ndarray, tokenizer: Tokenizer, assemble_texts: Callable[..., Samples]) -> Samples:
    """Full samples of real text without unknown tokens, so that all of them have as many tokens to mask."""
    known = corpus_ids[corpus_ids != tokenizer.unk_id]
    whole = len(known) // (MAX_LENGTH - 3) * (MAX_LENGTH - 3)
    return assemble_texts(np.split(known[:whole], whole // (MAX_LENGTH - 3)), seed=11, first_sample=0)


@pytest.mark.parametrize("settings", OTHERWISE.values(), ids=OTHERWISE)
def test_other_rates_and_blocks(samples: Samples, tokenizer: Tokenizer, settings: MaskSettings) -> None:
    """Exact shares, block lengths of the first turns, places all over the text, 80 / 10 / 10 shown."""
    drawn = mask_corpus(samples, tokenizer, settings)
    shortest, longest = settings.block_lengths
    probability = Counter({1: 1 - settings.block_share})
    for length in range(shortest, longest + 1):
        probability[length] += settings.block_share / (longest - shortest + 1)
    segment_tokens = np.stack([samples.segment_boundary_B - 2, samples.length_B - samples.segment_boundary_B - 1])
    fits = {tokens: np.maximum(0, segment_tokens - tokens + 1).sum(axis=0) for tokens in probability}
    weights = np.array([p * fits[tokens] for tokens, p in probability.items()])
    expected = (weights / weights.sum(axis=0)).sum(axis=1)
    for rate, masks in zip(settings.rates_K, drawn.mask_sets, strict=True):
        used = masks.turns_BP > 0
        assert (masks.num_masked_B == floor(rate * 509 + 0.5)).all()
        assert (used.sum(axis=1) == masks.num_masked_B).all()
        first = Counter((masks.turns_BP == 1).sum(axis=1).tolist())
        is_likely = expected > 0
        lengths = np.array(list(probability))[is_likely]
        assert set(first) <= set(lengths.tolist())
        if len(lengths) > 1:
            assert_distributed(np.array([first[length] for length in lengths.tolist()]), expected[is_likely])
        times = np.bincount(masks.positions_BP[used], minlength=MAX_LENGTH)[longest + 4 : -longest - 4]
        margin = 5 * sqrt(rate * (1 - rate) / len(samples.length_B))
        assert abs(times / len(samples.length_B) - times.mean() / len(samples.length_B)).max() < margin + 0.06 * rate
    shown, used = drawn.stack("shown_BP"), drawn.used_KBP
    is_mask, is_original = shown[used] == tokenizer.mask_id, shown[used] == drawn.originals_KBP[used]
    chance = 0.1 / len(tokenizer.normal_ids)
    counts = np.array([is_mask.sum(), (~is_mask & ~is_original).sum(), is_original.sum()])
    assert_distributed(counts, np.array([0.8, 0.1 - chance, 0.1 + chance]))


@pytest.mark.parametrize(
    "settings", [*OTHERWISE.values(), MaskSettings((0.8,)), MaskSettings((0.6,), 0.9, (2, 6))],
)  # fmt: skip
def test_draws_do_not_run_out(
    samples: Samples, tokenizer: Tokenizer, settings: MaskSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is filled up from the left would not be random. Had they run out, twice as many would give other positions."""
    positions = []
    for times in (1, 2):
        allowed = lambda num_masked_B, rate, times=times: times * max_draws(num_masked_B, rate)  # noqa: E731
        monkeypatch.setattr(masking, "max_draws", allowed)
        positions.append(mask_corpus(samples, tokenizer, settings).stack("positions_BP"))
    np.testing.assert_array_equal(*positions)


def test_exactly_fifteen_percent_are_masked(masked: MaskedCorpus, tokenizer: Tokenizer) -> None:
    special = np.isin(masked.samples.tokens_BL, tokenizer.special_ids)
    maskable_B = (~special).sum(axis=1)
    assert len(np.unique(maskable_B)) > 2, "texts with [UNK] among them"
    expected_B = np.floor(0.15 * maskable_B + 0.5)
    np.testing.assert_array_equal(masked.used_KBP.sum(axis=2), np.tile(expected_B, (len(masked.mask_sets), 1)))
    assert (masked.stack("num_masked_B") == expected_B).all()


def test_no_special_token_is_masked_and_no_position_twice(masked: MaskedCorpus, tokenizer: Tokenizer) -> None:
    assert not np.isin(masked.originals_KBP, tokenizer.special_ids)[masked.used_KBP].any()
    for masks in masked.mask_sets:
        for positions, num_masked in zip(masks.positions_BP, masks.num_masked_B, strict=True):
            assert len(set(positions[:num_masked].tolist())) == num_masked


def test_turns_count_up_and_each_is_one_contiguous_block(masked: MaskedCorpus) -> None:
    used = masked.used_KBP
    turn_steps = np.diff(masked.stack("turns_BP"), axis=2, prepend=0)
    position_steps = np.diff(masked.stack("positions_BP"), axis=2, prepend=-9)
    assert np.isin(turn_steps[used], [0, 1]).all()
    assert (position_steps[used & (turn_steps == 0)] == 1).all()
    assert (np.diff(used.astype(int), axis=2) <= 0).all(), "unused places are at the end"
    longest = max(np.bincount(turns[turns > 0]).max() for turns in masked.stack("turns_BP").reshape(-1, 76))
    assert longest == 6


def test_lengths_of_first_turns(masked: MaskedCorpus) -> None:
    """60% single tokens and 8% of each block length, less the starts from which a block would not fit its segment.

    A text with an unknown token has more such places and is left out.
    """
    samples = masked.samples
    whole_B = masked.mask_sets[0].num_masked_B == 76
    segment_tokens = np.stack([samples.segment_boundary_B - 2, samples.length_B - samples.segment_boundary_B - 1])
    probability = {1: 0.6, **dict.fromkeys(BLOCK_TOKENS, 0.4 / 5)}
    weights = np.stack(
        [p * np.maximum(0, segment_tokens - tokens + 1).sum(axis=0) for tokens, p in probability.items()]
    )
    expected = (weights / weights.sum(axis=0))[:, whole_B].sum(axis=1)
    lengths = (masked.stack("turns_BP") == 1).sum(axis=2)[:, whole_B]
    assert_distributed(np.bincount(lengths.ravel(), minlength=7)[1:], expected)


def test_blocks_hold_seventy_percent_of_the_masked_tokens(masked: MaskedCorpus) -> None:
    """As the paper reckons: 0.4 * 4 of 0.6 + 0.4 * 4 tokens a draw is 73%; blocks are rejected more often."""
    turn_lengths = np.concatenate([np.bincount(turns)[1:] for turns in masked.stack("turns_BP").reshape(-1, 76)])
    assert 0.68 < turn_lengths[turn_lengths > 1].sum() / turn_lengths.sum() < 0.73


def test_shown_are_eighty_ten_ten(masked: MaskedCorpus, tokenizer: Tokenizer) -> None:
    used, originals, shown = masked.used_KBP, masked.originals_KBP, masked.stack("shown_BP")
    is_mask, is_original = shown[used] == tokenizer.mask_id, shown[used] == originals[used]
    chance = 0.1 / len(tokenizer.normal_ids)  # the random id is the original one
    counts = np.array([is_mask.sum(), (~is_mask & ~is_original).sum(), is_original.sum()])
    assert_distributed(counts, np.array([0.8, 0.1 - chance, 0.1 + chance]))


def test_random_replacements_are_uniform_over_normal_ids(masked: MaskedCorpus, tokenizer: Tokenizer) -> None:
    used, originals, shown = masked.used_KBP, masked.originals_KBP, masked.stack("shown_BP")
    replaced = shown[used][(shown[used] != tokenizer.mask_id) & (shown[used] != originals[used])]
    assert np.isin(replaced, tokenizer.normal_ids).all()
    other_originals = used.sum() - np.bincount(originals[used], minlength=tokenizer.vocab_size)
    normal = tokenizer.normal_ids
    counts = np.bincount(replaced, minlength=tokenizer.vocab_size)[normal]
    assert counts.min() > 0, "each is drawn some 50 times"
    assert_distributed(counts, other_originals[normal])


def test_what_is_shown_does_not_depend_on_the_turn(masked: MaskedCorpus, tokenizer: Tokenizer) -> None:
    hidden_KBP = masked.stack("shown_BP") == tokenizer.mask_id
    for places in np.array_split(np.arange(76), 8):
        used = masked.used_KBP[:, :, places]
        assert_share(int(hidden_KBP[:, :, places][used].sum()), int(used.sum()), 0.8)


def test_turns_start_anywhere_in_the_text(masked: MaskedCorpus) -> None:
    """In 15 parts of the text, the first and last 16 places left out, where blocks are cut off by the edge."""
    starts = masked.stack("positions_BP")[np.diff(masked.stack("turns_BP"), axis=2, prepend=0) == 1]
    inner = starts[(starts >= 16) & (starts < 496)]
    assert_distributed(np.bincount((inner - 16) // 32, minlength=15))


def test_every_place_is_masked_about_as_often(masked: MaskedCorpus) -> None:
    used = masked.used_KBP
    times = np.bincount(masked.stack("positions_BP")[used], minlength=MAX_LENGTH)[8:-8]
    assert times.min() > 0.75 * times.mean()
    assert times.max() < 1.25 * times.mean()


def test_mask_sets_and_samples_are_independent(masked: MaskedCorpus) -> None:
    """The first turn's start, in quarters of the text, of two sets of a sample and of two samples of a set."""
    quarter_KB = np.minimum(3, masked.stack("positions_BP")[:, :, 0] * 4 // 509)
    assert_independent(quarter_KB[:-1].ravel(), quarter_KB[1:].ravel(), 4)
    assert_independent(quarter_KB[:, :-1].ravel(), quarter_KB[:, 1:].ravel(), 4)


@pytest.mark.parametrize(("set_step", "sample_step"), [(1, 0), (0, 1), (1, 1)])
def test_two_sets_of_masks_overlap_by_chance_alone(masked: MaskedCorpus, set_step: int, sample_step: int) -> None:
    """About 15% of 15% of the places; the places near the edges, masked less often, add under 2%."""
    num_sets, num_samples = len(masked.mask_sets), len(masked.samples.tokens_BL)
    is_masked_KBL = np.zeros((num_sets, num_samples, MAX_LENGTH), dtype=bool)
    sets, rows, places = np.nonzero(masked.used_KBP)
    is_masked_KBL[sets, rows, masked.stack("positions_BP")[sets, rows, places]] = True
    first = is_masked_KBL[: num_sets - set_step, : num_samples - sample_step]
    second = is_masked_KBL[set_step:, sample_step:]
    overlap = (first & second).sum(axis=2)
    by_chance = 76 * 76 / 509
    margin = 4 * overlap.std() / sqrt(overlap.size)
    assert by_chance - margin < overlap.mean() < 1.02 * by_chance + margin
