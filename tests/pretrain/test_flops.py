"""A guard that does not time: a step computes what it must and no more."""

from __future__ import annotations

import pytest
import torch
from support import MASK, VOCAB_SIZE, random_batch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.flops import step_flops
from pretrain.layout import Objective, pseudo_masked_layout
from pretrain.model import PMLM, PMLMConfig

CONFIG = PMLMConfig.of_size("tiny", dropout=0.1, vocab_size=VOCAB_SIZE, max_positions=128)


@pytest.mark.parametrize("objective", list(Objective))
def test_a_step_has_the_operations_of_the_formula(objective: Objective) -> None:
    """Of 112 tokens and 32 appended slots, which need no padding."""
    layout = pseudo_masked_layout(random_batch(2, max_length=112, min_length=112), objective, mask_id=MASK)
    model = PMLM(CONFIG, "cpu").train()
    with FlopCounterMode(display=False) as counter:
        losses = model(layout)
        (losses.ae_sum + losses.par_sum).backward()
    expected = step_flops(CONFIG, layout)
    assert counter.get_total_flops() == pytest.approx(expected.needed + expected.recomputed, rel=0.02)


def test_par_costs_its_appended_slots_alone() -> None:
    """At 512 tokens of base, 664 slots instead of 512, in the last layer 152 instead of 76."""
    batch = random_batch(1, max_length=512, min_length=512)
    ae, both = (pseudo_masked_layout(batch, o, mask_id=MASK) for o in (Objective.AE, Objective.AE_PAR))
    config = PMLMConfig.of_size("base", vocab_size=30_522)
    assert (len(both.ids_N), len(both.predicted_R)) == (664, 152)
    kv, rest = 2 * 768**2, 2 * 768**2 + 2 * 768 * 3072  # weights of a layer
    found = [(f.layers / 6, f.attention / (12 * 768)) for f in (step_flops(config, o) for o in (ae, both))]
    assert found[0] == (11 * 512 * (kv + rest) + 512 * kv + 76 * rest, 11 * 512**2 + 76 * 512)
    assert found[1] == (
        11 * 664 * (kv + rest) + 664 * kv + 152 * rest, 11 * (512**2 + 152 * 664) + 76 * 512 + 76 * 664
    )  # fmt: skip
    assert step_flops(config, both).head == 2 * step_flops(config, ae).head


@pytest.mark.parametrize("objective", [Objective.AE, Objective.AE_PAR])
def test_samples_of_any_length_cost_little_padding(objective: Objective) -> None:
    for seed in range(5):
        batch = random_batch(16, max_length=128, min_length=5, seed=seed)
        layout = pseudo_masked_layout(batch, objective, mask_id=MASK)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            PMLM(CONFIG, "cpu")(layout)
        needed = step_flops(CONFIG, layout).needed / 3
        assert needed < counter.get_total_flops() < 1.15 * needed
