"""What counts as a fault."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.guard import Guard, StepValues


def judge(
    guard: Guard, step: int, loss: float, norm: float, *, overflow: bool = False, smallest: bool = False
) -> str | None:
    return guard.fault_of(StepValues(step, loss, norm), is_overflow=overflow, is_at_smallest_scale=smallest)


def test_a_spike_is_told_and_an_ordinary_run_is_not() -> None:
    """A loss that falls from 10 to 3 with noise, and norms that vary by factors, as in real runs."""
    random = np.random.default_rng(0)
    guard = Guard(spike_deviations=10, spike_window_steps=100)
    for step in range(5000):
        loss = 3 + 7 * math.exp(-step / 500) + random.normal(0, 0.05)
        assert judge(guard, step, loss, float(np.exp(random.normal(0, 0.3)))) is None
    assert "loss 4.5 is above" in str(judge(guard, 5000, 4.5, 1.0))
    assert "gradient norm 60 is above" in str(judge(guard, 5000, 3.0, 60.0))
    assert judge(guard, 5000, 3.0, 1.0) is None, "a fault must not move the band"
    assert judge(Guard(0, 100), 1, 1e30, 1e30) is None


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (1.0, -1.0)]
)
def test_what_is_not_finite_is_a_fault_from_the_first_step(loss: float, norm: float) -> None:
    assert "not finite" in str(judge(Guard(0, 100), 1, loss, norm))


def test_an_overflow_is_a_fault_at_the_smallest_scale_alone() -> None:
    guard = Guard(10, 100)
    assert judge(guard, 1, math.nan, math.inf, overflow=True) is None
    assert "smallest loss scale" in str(judge(guard, 1, math.nan, math.inf, overflow=True, smallest=True))
    assert guard.state_dict() == {"recent_steps": []}


def test_a_restored_guard_judges_alike() -> None:
    first, second = Guard(10, 30), Guard(10, 30)
    for step in range(60):
        judge(first, step, 2 + step % 7 / 10, 1.0)
    second.load_state_dict(first.state_dict())
    for loss in (2.9, 3.3, 4.0, 40.0):
        assert judge(first, 60, loss, 1.0) == judge(second, 60, loss, 1.0)
