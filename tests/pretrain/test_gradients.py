"""Gradients in fp16 and bf16 are those of fp64, however many slots a micro batch has."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from data_prep.shards import DataSet
from pretrain.batches import Share, TrainingBatches
from pretrain.layout import Layout, Objective
from pretrain.model import PMLM, PMLMConfig

pytestmark = pytest.mark.old_processor

SCALE = 64.0
"""Of the loss, so that no gradient is too small for fp16."""


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [8, 32, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)], ids=["bf16", "fp16"])
def test_the_gradient_of_every_weight_is_that_of_fp64(
    data_folder: Path, dtype: torch.dtype, tolerance: float, micro_batch: int
) -> None:
    """Summed over slots in bf16, as torch does for LayerNorm and embeddings on CPUs, a third of it is lost at 128."""
    data = DataSet(data_folder)
    config = PMLMConfig.of_size(
        "tiny", vocab_size=data.tokenizer.vocab_size, hidden_size=64, intermediate_size=128, num_layers=2
    )
    torch.manual_seed(0)
    model = PMLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.05 * torch.randn_like(parameter)
    model.to(dtype)
    exact = copy.deepcopy(model).double()
    exact.bert.encoder.attention = "reference"
    layout = TrainingBatches(data, Objective.AE_PAR, Share(0, 1, micro_batch, 1), seed=0).step(0)[0]
    found, expected = _gradients(model, layout), _gradients(exact, layout)
    assert max(float(gradient.norm()) for gradient in expected.values()) > 0.1 * SCALE
    errors = {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected}
    assert {name: error for name, error in errors.items() if error > tolerance} == {}


def _gradients(model: nn.Module, layout: Layout) -> dict[str, torch.Tensor]:
    losses = model(layout)
    ((losses.ae_sum + losses.par_sum) * (SCALE / layout.num_targets)).backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters() if parameter.grad is not None}
