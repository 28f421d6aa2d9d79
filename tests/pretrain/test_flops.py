"""A guard that does not time: a step computes what it must and no more."""

from __future__ import annotations

import pytest
import torch
from support import MASK, VOCAB_SIZE, random_batch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.flops import step_flops
from pretrain.layout import Objective, pseudo_masked_layout
from pretrain.model import PMLM, PMLMConfig

CONFIG = PMLMConfig.of_size("tiny", vocab_size=VOCAB_SIZE, max_positions=128)


@pytest.mark.parametrize("objective", list(Objective))
def test_a_step_has_the_operations_of_the_formula(objective: Objective) -> None:
    layout = pseudo_masked_layout(random_batch(2, max_length=128, min_length=128), objective, mask_id=MASK)
    model = PMLM(CONFIG, "cpu").train()
    with FlopCounterMode(display=False) as counter:
        losses = model(layout)
        (losses.ae_sum + losses.par_sum).backward()
    expected = step_flops(CONFIG, layout)
    assert counter.get_total_flops() == pytest.approx(expected.needed + expected.recomputed, rel=0.02)


def test_par_costs_its_appended_slots_alone() -> None:
    """At 512 tokens of base, 664 slots instead of 512: the whole step 1.3 times that of AE."""
    batch = random_batch(1, max_length=512, min_length=512)
    ae, both = (pseudo_masked_layout(batch, o, mask_id=MASK) for o in (Objective.AE, Objective.AE_PAR))
    config = PMLMConfig.of_size("base", vocab_size=30_522)
    assert both.ids_BS.shape == (1, 664)
    assert step_flops(config, both).layers / step_flops(config, ae).layers == 664 / 512
    assert step_flops(config, both).attention / step_flops(config, ae).attention == 1 + 152 * 664 / 512**2
    assert step_flops(config, both).head == 2 * step_flops(config, ae).head


def test_padding_of_the_context_is_not_attended() -> None:
    """Attention computes less for short samples than for padded ones."""
    batch = random_batch(2, max_length=128, min_length=40, seed=1)
    layout = pseudo_masked_layout(batch, Objective.AE, mask_id=MASK)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        PMLM(CONFIG, "cpu")(layout)
    pairs = int((batch.length_B**2).sum())
    of_attention = sum(counter.get_flop_counts()["Global"][op] for op in (torch.ops.aten.bmm, torch.ops.aten.baddbmm))
    assert of_attention == 2 * 2 * CONFIG.num_layers * pairs * CONFIG.hidden_size
