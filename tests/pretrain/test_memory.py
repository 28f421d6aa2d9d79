"""The model of memory against what tensors really take."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from memory import LiveMemory
from support import MASK, random_batch

from pretrain.layout import Layout, Objective, pseudo_masked_layout
from pretrain.memory import num_parameters, passing, states
from pretrain.model import PMLM, PMLMConfig

VOCAB_SIZE = 2000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def micro_batch(num_samples: int, objective: Objective) -> Layout:
    batch = random_batch(num_samples, max_length=160, min_length=120)
    return pseudo_masked_layout(batch, objective, mask_id=MASK)


def live_bytes(model: PMLM, layout: Layout) -> int:
    """The most that forward and backward pass make, with gradients there before, as when micro batches are accumulated."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tensors = [tensor for tensor in vars(layout).values() if isinstance(tensor, torch.Tensor)]
    known = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), *tensors]
    with LiveMemory(known) as live:
        losses = model(layout)
        (losses.ae_sum + losses.par_sum).backward()
    return live.peak_bytes


@pytest.mark.parametrize("num_samples", [2, 5])
@pytest.mark.parametrize(
    ("backend", "precision", "dropout", "checkpointing"),
    [
        *itertools.product(["cpu", "reference"], ["fp32", "bf16"], [0.1], [False]),
        ("reference", "bf16", 0.0, False), ("cpu", "fp32", 0.1, True), ("reference", "bf16", 0.1, True),
    ],
)  # fmt: skip
def test_a_micro_batch_takes_what_the_formula_says(
    num_samples: int, backend: Any, precision: str, dropout: float, checkpointing: bool
) -> None:
    """Alone, without weights and optimizer, which would only hide a fault."""
    config = PMLMConfig.of_size("tiny", vocab_size=VOCAB_SIZE, num_layers=4, dropout=dropout)
    torch.manual_seed(0)
    model = PMLM(config, backend, checkpointing).to(DTYPES[precision]).train()
    layout = micro_batch(num_samples, Objective.AE_PAR)
    expected = passing(config, layout, precision, backend, is_cuda=False, activation_checkpointing=checkpointing)
    assert sum(vars(expected).values()) == pytest.approx(live_bytes(model, layout), rel=0.1)


@pytest.mark.parametrize("objective", [Objective.AE, Objective.PAR])
def test_so_it_does_of_one_objective_and_with_more_predictions_than_a_chunk(objective: Objective) -> None:
    config = PMLMConfig.of_size(
        "tiny", dropout=0.1, vocab_size=300_000, num_layers=2, hidden_size=16, intermediate_size=64
    )
    model = PMLM(config, "cpu").train()
    layout = micro_batch(5, objective)
    expected = passing(config, layout, "fp32", "cpu", is_cuda=False)
    assert sum(vars(expected).values()) == pytest.approx(live_bytes(model, layout), rel=0.1)


def test_on_cuda_dropout_keeps_a_byte_an_element() -> None:
    """Of the embeddings, of two places in each layer, and of the reference's probabilities."""
    config = PMLMConfig.of_size("tiny", vocab_size=VOCAB_SIZE, num_layers=1, dropout=0.1)
    layout = micro_batch(1, Objective.AE)
    on_cpu, on_cuda = (
        passing(config, layout, "fp16", "reference", is_cuda=is_cuda).activations for is_cuda in (False, True)
    )
    slots, rows = len(layout.ids_N), len(layout.predicted_R)
    assert on_cuda - on_cpu == (slots + 2 * rows) * config.hidden_size + config.num_heads * rows * slots


def test_states_are_cut_by_zero_stage() -> None:
    assert [states(1000, "fp16", stage, 8) for stage in range(4)] == [
        (2000, 2000, 12_000), (2000, 2000, 1500), (2000, 250, 1500), (250, 250, 1500)
    ]  # fmt: skip
    assert states(1000, "fp32", 0, 1) == (4000, 4000, 12_000)


def test_parameters_are_counted_exactly() -> None:
    config = PMLMConfig.of_size("tiny", dropout=0.1, vocab_size=VOCAB_SIZE)
    assert num_parameters(config) == sum(parameter.numel() for parameter in PMLM(config).parameters())
    hidden, inner = 768, 3072
    of_layer = 3 * hidden**2 + 2 * hidden + hidden**2 + hidden + 2 * hidden * inner + inner + hidden + 4 * hidden
    others = (30_522 + 512 + 2 + 2) * hidden + 12 * 32 + hidden**2 + 3 * hidden + 30_522
    assert num_parameters(PMLMConfig.of_size("base", vocab_size=30_522)) == 12 * of_layer + others
