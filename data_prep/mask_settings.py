"""How many tokens are masked, in blocks of which lengths, and which mask set an epoch of the training uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

_T = TypeVar("_T", int, float)
MASK_RATE = 0.15
BLOCK_SHARE = 0.4
BLOCK_LENGTHS = (2, 6)
MAX_BLOCK_LENGTH_TOKENS = 255
_RATE_STEPS = 10**6  # a rate is a multiple of this part, so that every machine rounds alike


@dataclass(frozen=True)
class MaskSettings:
    """What Algorithm 1 leaves to choose; the defaults are the paper's."""

    rates_K: tuple[float, ...] = (MASK_RATE,)
    """Of each mask set, the share of the tokens that is masked; special tokens do not count."""
    block_share: float = BLOCK_SHARE
    """Share of the draws that are blocks; the others are single tokens."""
    block_lengths: tuple[int, int] = BLOCK_LENGTHS
    """Tokens of the shortest and the longest block."""

    @classmethod
    def parse(cls, mask_rate: str, mask_sets: int, block_share: float, block_lengths: str) -> MaskSettings:
        """Return the settings that flags give: a rate is `0.15` or `0.30:0.15`, lengths are `2:6` or `3`.

        A rate of two numbers goes from the first, in set 0, to the second, in the last set, in equal steps. Raises
        ValueError that tells all that is wrong.
        """
        faults: list[str] = []
        rates, lengths = _numbers(mask_rate, float), _numbers(block_lengths, int)
        if not rates or not all(1 / _RATE_STEPS <= rate <= 1 - 1 / _RATE_STEPS for rate in rates):
            faults.append(
                f"mask_rate is {mask_rate}, expected a number from {1 / _RATE_STEPS:f} to {1 - 1 / _RATE_STEPS:f}, or two as "
                "0.30:0.15, of the first mask set and of the last"
            )
        elif rates[0] != rates[-1] and mask_sets < 2:
            faults.append(f"mask_rate is {mask_rate}, which takes at least 2 mask sets: mask_sets is {mask_sets}")
        if not 0 <= block_share <= 1:
            faults.append(f"block_share is {block_share}, expected 0 to 1")
        if not lengths or not 1 <= lengths[0] <= lengths[-1] <= MAX_BLOCK_LENGTH_TOKENS:
            faults.append(
                f"block_lengths is {block_lengths}, expected tokens of the shortest and the longest block, as 2:6, from 1 to "
                f"{MAX_BLOCK_LENGTH_TOKENS}"
            )
        if faults:
            raise ValueError("; ".join(faults))
        first, last = rates[0], rates[-1]
        rates_K = (first + (last - first) * k / max(1, mask_sets - 1) for k in range(mask_sets))
        return cls(
            tuple(round(rate * _RATE_STEPS) / _RATE_STEPS for rate in rates_K), block_share, (lengths[0], lengths[-1])
        )

    @classmethod
    def of_data_set(cls, parameters: Mapping[str, Any]) -> MaskSettings:
        """Return the settings of a data set; one that was made before they could be chosen has the paper's."""
        return cls.parse(
            parameters.get("mask_rate", str(MASK_RATE)),
            parameters["mask_sets"],
            parameters.get("block_share", BLOCK_SHARE),
            parameters.get("block_lengths", ":".join(map(str, BLOCK_LENGTHS))),
        )

    @property
    def is_constant(self) -> bool:
        """Whether all mask sets have the same rate."""
        return len(set(self.rates_K)) == 1

    def max_masked(self, max_length_tokens: int, num_special_tokens: int) -> int:
        """P: the most masked tokens of a sample."""
        return int(num_masked(max_length_tokens - num_special_tokens, max(self.rates_K)))

    def sets_of_epochs(self, epochs: np.ndarray, num_epochs: int) -> np.ndarray:
        """Return the mask set that each epoch uses, of a run of `num_epochs`.

        Epoch e uses set e mod K. Where the rate differs between sets it is set floor(e K / E), so that it changes in one
        direction; what comes after the run's end uses the last set.
        """
        num_sets = len(self.rates_K)
        if self.is_constant:
            return epochs % num_sets
        return np.minimum(epochs * num_sets // num_epochs, num_sets - 1)  # type: ignore[no-any-return]

    def epochs_of_sets(self, num_epochs: int, of_epochs: int) -> list[int]:
        """Return how many of the first `num_epochs` of a run's `of_epochs` use each mask set."""
        num_sets = len(self.rates_K)
        if self.is_constant:
            return [len(range(k, num_epochs, num_sets)) for k in range(num_sets)]
        starts = [min(num_epochs, -(-k * of_epochs // num_sets)) for k in range(num_sets + 1)]
        return [stop - start for start, stop in pairwise(starts)]


PAPER_MASKS = MaskSettings()


def num_masked(num_maskable: np.ndarray | int, rate: float) -> np.ndarray:
    """Return rate * num_maskable rounded, halves up; at least 1 where anything can be masked."""
    steps = round(rate * _RATE_STEPS)
    rounded = (steps * np.asarray(num_maskable, dtype=np.int64) + _RATE_STEPS // 2) // _RATE_STEPS
    return np.where(np.asarray(num_maskable) > 0, np.maximum(rounded, 1), 0)


def _numbers(text: str, number: Callable[[str], _T]) -> list[_T]:
    """Return one number or two, separated by a colon; none for what is neither."""
    try:
        numbers = [number(part) for part in text.split(":")]
    except ValueError:
        return []
    return numbers if len(numbers) <= 2 else []
