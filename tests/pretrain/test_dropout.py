"""Dropout: its rate, its independence, its gradient, and that it can be repeated."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pretrain.dropout import Dropout, draw_seed, dropout, kept_scale, zero_dropped_

pytestmark = pytest.mark.old_processor

N = 1 << 22


def dropped(seed: int, rate: float, shape: tuple[int, ...] = (N,), dtype: torch.dtype = torch.float32) -> np.ndarray:
    torch.manual_seed(seed)
    return (dropout(torch.ones(shape, dtype=dtype), rate) == 0).numpy()


@pytest.mark.parametrize("rate", [1 / 65536, 0.1, 0.5, 0.9])
def test_rate_and_mean(rate: float) -> None:
    found = dropped(1, rate).mean()
    assert abs(found - rate) < 4.5 * math.sqrt(rate * (1 - rate) / N) + 2**-17
    assert kept_scale(rate) == pytest.approx(1 / (1 - rate), rel=1e-4)


def test_elements_and_calls_are_independent() -> None:
    """Correlations with neighbours at many distances, and between calls, are those of chance."""
    a, b = (dropped(seed, 0.1).astype(np.float32) - 0.1 for seed in (1, 2))
    chance = 4.5 * 0.1 * 0.9 / math.sqrt(N)
    assert abs(float((a * b).mean())) < chance
    for distance in [1, 2, 3, 4, 5, 8, 16, 64, 512, 768, 4095, 4096, 4097, 1 << 18, 1 << 20]:
        assert abs(float((a[distance:] * a[:-distance]).mean())) < 1.1 * chance, distance


def test_runs_of_dropped_elements_have_the_geometric_distribution() -> None:
    lengths = np.array([sum(1 for _ in run) for value, run in itertools.groupby(dropped(3, 0.5, (1 << 18,))) if value])
    expected = np.array([len(lengths) * 0.5**k for k in range(1, 11)])
    found = np.bincount(lengths, minlength=12)[1:11]
    assert (((found - expected) ** 2 / expected).sum()) < 35  # chi-squared of 10: p = 0.0001


def test_rows_and_columns_have_the_binomial_spread() -> None:
    grid = dropped(4, 0.1, (2048, 2048))
    for axis in (0, 1):
        z = (grid.sum(axis=axis) - 204.8) / math.sqrt(2048 * 0.09)
        assert z.std() == pytest.approx(1, abs=0.08)
        assert abs(z).max() < 5.5


def test_sixteen_bits_of_a_word_do_not_share_their_fate() -> None:
    by_lane = dropped(5, 0.5).reshape(-1, 4).astype(int)
    patterns = np.bincount(by_lane @ [1, 2, 4, 8], minlength=16)
    expected = len(by_lane) / 16
    assert ((patterns - expected) ** 2 / expected).sum() < 45  # chi-squared of 15: p = 0.0001


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_kept_elements_are_scaled_and_the_gradient_takes_the_same_ones(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 5001, dtype=dtype).clone().requires_grad_()
    y = dropout(x, 0.3)
    (y * torch.arange(1, 5002).to(dtype)).sum().backward()
    assert x.grad is not None
    kept = x.grad != 0
    assert kept.float().mean() == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(y, torch.where(kept, x * kept_scale(0.3), 0))
    torch.testing.assert_close(x.grad, torch.where(kept, torch.arange(1, 5002).to(dtype) * kept_scale(0.3), 0))


def test_the_same_elements_are_dropped_whatever_type_threads_or_pieces() -> None:
    expected = dropped(6, 0.1)
    np.testing.assert_array_equal(dropped(6, 0.1, dtype=torch.bfloat16), expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    np.testing.assert_array_equal(dropped(6, 0.1), expected)
    torch.set_num_threads(threads)
    torch.manual_seed(6)
    seed, x = draw_seed(), torch.ones(N)
    for start, stop in [(0, 12), (12, 5000), (5000, N)]:
        zero_dropped_(x[start:stop], seed, 0.1, first=start)
    np.testing.assert_array_equal(x.numpy() == 0, expected)


def test_recomputed_activations_drop_the_same() -> None:
    x = torch.randn(300, requires_grad=True)
    module = Dropout(0.4).train()
    gradients = []
    for run in (lambda v: module(v.sin()), lambda v: checkpoint(lambda u: module(u.sin()), v, use_reentrant=False)):
        torch.manual_seed(8)
        gradients.append(torch.autograd.grad((run(x) ** 2).sum(), x)[0])
    assert torch.equal(*gradients)


def test_off_outside_training_and_at_rate_0() -> None:
    x = torch.randn(5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


def test_torch_finds_the_operator_sound() -> None:
    """Its schema, its fake for torch.compile, and its gradient's registration."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.pmlm.dropout, (torch.randn(4, 6, requires_grad=True), 0.25), test_utils=checks)
