"""A validation, without other ranks."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model

from data_prep.shards import DataSet
from pretrain.batches import Share, ValidationBatch, validation_batches
from pretrain.layout import Layout, Objective
from pretrain.model import PMLM, PretrainingLosses
from pretrain.validation import Validator

SAMPLES = 20


class OneRank:
    """A model without DeepSpeed."""

    device = torch.device("cpu")

    def __init__(self, model: PMLM) -> None:
        self._model, self.num_batches = model, 0

    def train(self, mode: bool) -> None:
        self._model.train(mode)

    def __call__(self, layout: Layout) -> PretrainingLosses:
        self.num_batches += 1
        losses: PretrainingLosses = self._model(layout)
        return losses

    def predict(self, layout: Layout) -> torch.Tensor:
        raise AssertionError("no prompts were given")


@pytest.fixture
def model(data_set: DataSet) -> OneRank:
    return OneRank(tiny_model(data_set.tokenizer.vocab_size, max_positions=64).train())


def batches(data: DataSet, micro_batch: int) -> list[ValidationBatch]:
    return validation_batches(data, Objective.AE_PAR, Share(0, 1, micro_batch, 1), SAMPLES)


def test_the_means_are_those_of_all_samples_at_once(data_set: DataSet, model: OneRank) -> None:
    validator = Validator(data_set, Objective.AE_PAR, SAMPLES, prompts=None)
    found = validator.validate(model, batches(data_set, 3), lambda number: False)
    assert found
    (whole,) = batches(data_set, SAMPLES)
    with torch.no_grad():
        expected = model(whole.layout)
    assert found.means["ae_loss"] == pytest.approx(float(expected.ae_sum) / whole.layout.num_targets, rel=1e-5)
    assert found.means["par_accuracy"] == pytest.approx(float(expected.par_correct) / whole.layout.num_targets)
    assert found.record.items() >= found.means.items()
    assert not model._model.training


def test_it_ends_where_the_ranks_agree_to_stop_and_computes_nothing_more(data_set: DataSet, model: OneRank) -> None:
    validator = Validator(data_set, Objective.AE_PAR, SAMPLES, prompts=None)
    asked = []

    def is_to_stop(number: int) -> bool:
        asked.append(number)
        return number == 2

    assert validator.validate(model, batches(data_set, 3), is_to_stop) is None
    assert asked == [0, 1, 2]
    assert model.num_batches == 2
