"""benchmarks.train_step: what is compared computes the same."""

from __future__ import annotations

import pytest
from support import MASK, VOCAB_SIZE, random_batch

from benchmarks.train_step import DENSE, OURS, SEPARATE, Setting, make_step


@pytest.mark.slow
def test_all_ways_to_compute_a_step_have_the_same_loss() -> None:
    setting = Setting(1, 40, 3, "fp32", 0.0, VOCAB_SIZE)
    batch = random_batch(3)
    losses = {name: make_step(name, setting, batch, MASK)() for name in (OURS, DENSE, SEPARATE)}
    assert losses[DENSE] == pytest.approx(losses[OURS], rel=1e-5)
    assert losses[SEPARATE] == pytest.approx(losses[OURS], rel=1e-5)
