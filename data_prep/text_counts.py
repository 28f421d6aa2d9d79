"""How often each text occurs, in bounded memory: H hashes of texts."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_prep.shards import SPLITS, Split

_PENDING_SAMPLES = 2**20


class TextCounts:
    """How often each text occurs in each split: of all texts, or, where there are too many, of those with small hashes.

    Which ones are kept depends on the texts alone, not on the order in which they come.
    """

    def __init__(self, max_hashes: int) -> None:
        self._max_hashes = max_hashes
        self._halvings = 0
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_pending = 0
        self.hashes_H = np.zeros(0, np.uint64)
        self.counts_HS = np.zeros((0, len(SPLITS)), np.int64)
        """S: the splits, in the order of SPLITS."""

    @property
    def share(self) -> float:
        """The part of the hash space that is kept."""
        return 0.5**self._halvings

    def add(self, split: Split, hashes_H: np.ndarray, counts_H: np.ndarray) -> None:
        """Count texts by their 64-bit hashes; no hash twice in one call."""
        counts_HS = np.zeros((len(hashes_H), len(SPLITS)), np.int64)
        counts_HS[:, SPLITS.index(split)] = counts_H
        self._pending.append(self._kept(hashes_H, counts_HS))
        self._num_pending += len(self._pending[-1][0])
        if self._num_pending > _PENDING_SAMPLES:
            self.settle()

    def settle(self) -> None:
        """Sum up what was added."""
        hashes, counts = zip((self.hashes_H, self.counts_HS), *self._pending, strict=True)
        self.hashes_H, places = np.unique(np.concatenate(hashes), return_inverse=True)
        columns = np.concatenate(counts).T
        self.counts_HS = np.stack(
            [np.bincount(places, column, minlength=len(self.hashes_H)) for column in columns], axis=1
        ).astype(np.int64)
        self._pending, self._num_pending = [], 0
        while len(self.hashes_H) > self._max_hashes:
            self._halvings += 1
            self.hashes_H, self.counts_HS = self._kept(self.hashes_H, self.counts_HS)

    def _kept(self, hashes_H: np.ndarray, counts_HS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        is_kept_H = hashes_H <= np.uint64(2 ** (64 - self._halvings) - 1)
        return hashes_H[is_kept_H], counts_HS[is_kept_H]

    def summarize(self) -> dict[str, Any]:
        """Shares of samples; None where there is nothing to compare."""
        count_H = self.counts_HS.sum(axis=1)
        of_train_H, of_validation_H = (self.counts_HS[:, SPLITS.index(split)] for split in ("train", "validation"))
        return {
            "repeated_share": ratio(count_H[count_H > 1].sum(), count_H.sum()),
            "surplus_share": ratio((count_H - 1).sum(), count_H.sum()),
            "validation_in_train_share": ratio(of_validation_H[of_train_H > 0].sum(), of_validation_H.sum()),
            "measured_on_share_of_texts": self.share,
        }


def ratio(part: Any, whole: Any) -> float | None:
    """Return a part's share, None where there is nothing to have a share of."""
    return float(part) / float(whole) if whole else None
