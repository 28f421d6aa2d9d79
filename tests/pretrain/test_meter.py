"""The meter, without other ranks."""

from __future__ import annotations

import time

import pytest
from support import MASK, VOCAB_SIZE, random_batch

from pretrain.flops import step_flops
from pretrain.layout import Objective, pseudo_masked_layout
from pretrain.meter import Meter
from pretrain.model import PMLMConfig


def test_it_counts_steps_and_not_what_comes_between(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 100.0, 103.0, 110.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    model = PMLMConfig.of_size("tiny", vocab_size=VOCAB_SIZE)
    layout = pseudo_masked_layout(random_batch(4), Objective.AE_PAR, mask_id=MASK)
    meter = Meter(model)
    for _ in range(2):  # steps of 10 s, 1 and 3 of them waiting, and 90 s between
        with meter.waiting_for_data():
            pass
        meter.count([layout, layout])
        meter.step_done()
    values = meter.take(peak_memory_bytes=5)
    assert values["tokens_per_s"] == round(4 * layout.num_tokens / 20, 1)
    assert values["flops_per_s"] == round(4 * step_flops(model, layout).needed / 20)
    assert values["data_wait"] == 0.2
    assert values["memory_bytes"] == 5
    assert values["host_memory_bytes"] > 1e6


def test_each_record_has_its_own_steps() -> None:
    layout = pseudo_masked_layout(random_batch(4), Objective.AE_PAR, mask_id=MASK)
    meter = Meter(PMLMConfig.of_size("tiny", vocab_size=VOCAB_SIZE))
    for num_batches in (50, 0):
        with meter.waiting_for_data():
            pass
        meter.count([layout] * num_batches)
        meter.step_done()
        assert (meter.take(0)["tokens_per_s"] > 0) == (num_batches > 0)
