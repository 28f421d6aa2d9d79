"""Which samples are computed together. Samples lie one behind the other, without padding, sorted by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.draws import Decision, draw_words

PREDICTION_TOKENS = 8192
"""At most so many tokens are predicted from at once, or one sample."""


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """A permutation of the samples, a function of seed and epoch."""
    words = draw_words(seed, Decision.FINETUNING_ORDER, 0, num_samples, 1, variant=epoch)
    return np.argsort(words[:, 0], kind="stable")


def micro_batches(batch: np.ndarray, lengths: np.ndarray, micro_batch_size: int) -> list[np.ndarray]:
    """The batch's samples in groups of similar length, the longest first, however many processes there are."""
    by_length = batch[np.argsort(-lengths[batch], kind="stable")]
    return [by_length[start : start + micro_batch_size] for start in range(0, len(by_length), micro_batch_size)]


def prediction_batches(
    lengths: Sequence[int] | np.ndarray, max_tokens: int = PREDICTION_TOKENS
) -> Iterator[np.ndarray]:
    """All samples, the longest first, in groups of at most `max_tokens` tokens."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start, tokens = 0, 0
    for place, sample in enumerate(order):
        tokens += int(lengths[sample])
        if tokens > max_tokens and place > start:
            yield order[start:place]
            start, tokens = place, int(lengths[sample])
    if start < len(order):
        yield order[start:]
