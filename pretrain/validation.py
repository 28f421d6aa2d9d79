"""Losses and accuracies of held-out samples, and texts filled in by the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from data_prep.shards import DataSet
from pretrain import distributed
from pretrain.batches import ValidationBatch, validation_samples
from pretrain.cloze import ClozePrompts, fill_in
from pretrain.layout import Layout, Objective
from pretrain.model import PretrainingLosses


class Model(Protocol):
    """What a validation needs of an engine."""

    device: torch.device

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""

    def __call__(self, layout: Layout) -> PretrainingLosses:
        """Return the losses of a micro batch."""

    def predict(self, layout: Layout) -> torch.Tensor:
        """Return the logits of the slots that are predicted from."""


@dataclass(frozen=True)
class Validation:
    """What a validation found."""

    means: dict[str, float]
    """Losses and accuracies, see `mean_losses`."""
    record: dict[str, Any]
    """For RUN/metrics.jsonl: the means, those of each corpus of a mixture, and the time it took."""
    filled: list[dict[str, Any]]
    """Cloze prompts with the model's predictions."""


class Validator:
    """Validates a model as often as it is asked to, always on the same samples."""

    def __init__(self, data: DataSet, objective: Objective, max_samples: int, prompts: ClozePrompts | None) -> None:
        self._data, self._objective, self._prompts = data, objective, prompts
        self._corpora = list(validation_samples(data, max_samples))

    @property
    def has_samples(self) -> bool:
        """Whether the data set has any held-out samples."""
        return bool(self._corpora)

    @torch.no_grad()
    def validate(
        self, model: Model, batches: list[ValidationBatch], is_to_stop: Callable[[int], bool]
    ) -> Validation | None:
        """Return what the model's losses are, or None if the ranks stopped on the way; called by all ranks.

        `batches` has as many entries on every rank. `is_to_stop` is called with each one's number, and must return the
        same on all ranks, as the others would wait in the next batch's collectives for one that has left.
        """
        started = time.perf_counter()
        model.train(False)
        sums = torch.zeros(len(self._corpora), 5, dtype=torch.float64, device=model.device)
        for number, (corpus, layout) in enumerate(batches):
            if is_to_stop(number):
                return None
            losses = stacked(model(layout))
            if corpus is not None:
                sums[self._corpora.index(corpus), :4] += losses
                sums[self._corpora.index(corpus), 4] += layout.num_targets
        means = mean_losses(sums.sum(dim=0), self._objective)
        record: dict[str, Any] = dict(means)
        if len(self._corpora) > 1:
            record["corpora"] = {
                corpus: mean_losses(of_corpus, self._objective)
                for corpus, of_corpus in zip(self._corpora, sums, strict=True)
            }
        filled = []
        if self._prompts:
            filled = fill_in(self._prompts, model.predict(self._prompts.layout), self._data.tokenizer)
        return Validation(means, record | {"validation_s": round(time.perf_counter() - started, 3)}, filled)


def stacked(losses: PretrainingLosses) -> torch.Tensor:
    """Return the four sums as a tensor of shape (4,), in fp64 and without their graph."""
    return torch.stack([value.detach().double() for value in losses])


def mean_losses(sums: torch.Tensor, objective: Objective) -> dict[str, float]:
    """Return losses and accuracies per target, over all ranks, which all call this.

    `sums`, shape (5,), is this rank's: the four of `PretrainingLosses` and the number of targets.
    """
    ae_sum, par_sum, ae_correct, par_correct, num_targets = distributed.sum_over_ranks(sums).tolist()
    values: dict[str, float] = {}
    if objective.has_ae:
        values |= {"ae_loss": ae_sum / num_targets, "ae_accuracy": ae_correct / num_targets}
    if objective.has_par:
        values |= {"par_loss": par_sum / num_targets, "par_accuracy": par_correct / num_targets}
    return values
