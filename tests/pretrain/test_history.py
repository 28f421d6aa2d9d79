"""What is made of a run's records: hours, thinned curves, events."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.history import Curve, History, gpu_flops_per_s
from pretrain.metrics import METRICS, Metrics, read_records


def write_records(run: Path, records: list[dict[str, Any]]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def test_hours_are_those_of_training(tmp_path: Path) -> None:
    """Two hours, a night, half an hour."""
    run = write_records(tmp_path, [
        {"kind": "start", "step": 0, "time": 1000, "resumed": False, "world_size": 2},
        {"kind": "train", "step": 1, "time": 4600, "ae_loss": 5.0},
        {"kind": "train", "step": 2, "time": 8200, "ae_loss": 4.0},
        {"kind": "start", "step": 2, "time": 50_000, "resumed": True, "world_size": 3},
        {"kind": "train", "step": 3, "time": 51_800, "ae_loss": float("nan")},
        {"kind": "train", "step": 4, "time": 51_800, "ae_loss": 3.0},
        {"kind": "fault", "step": 4, "time": 51_801, "fault": "loss is not finite", "fault_step": 6, "first_sample": 40, "stop_sample": 60},
        {"kind": "stop", "step": 4, "time": 51_802, "reason": "SIGTERM"},
    ])  # fmt: skip
    history = History(run)
    curve = history.curve("train", "ae_loss")
    assert curve.steps_P.tolist() == [1, 2, 4]
    assert curve.hours_P.tolist() == [1, 2, 2.5]
    assert curve.values_P.tolist() == [5, 4, 3]
    assert [(event.kind, event.step) for event in history.events()] == [
        ("start", 0), ("restart", 2), ("rewind", 6), ("stop", 4)
    ]  # fmt: skip
    assert "samples 40 to 59 skipped" in history.events()[2].text
    assert len(history.curve("validation", "ae_loss").values_P) == 0


def test_skipped_steps_are_where_their_count_grows(tmp_path: Path) -> None:
    counts = [0, 1, 1, 3, 3]
    run = write_records(tmp_path, [
        {"kind": "train", "step": step, "time": step, "skipped_steps": count, "loss_scale": 2.0**step}
        for step, count in enumerate(counts, start=1)
    ])  # fmt: skip
    skipped = History(run).skipped()
    assert skipped.steps_P.tolist() == [2, 4]
    assert skipped.values_P.tolist() == [4, 16]


@pytest.mark.parametrize("num_points", [1, 7, 1000, 50_001])
def test_thinned_curves_keep_every_stretchs_extremes(num_points: int) -> None:
    values = np.random.default_rng(num_points).normal(size=num_points)
    curve = Curve(np.arange(num_points), np.arange(num_points) / 7, values)
    thin, medians = curve.extremes(50), curve.medians(50)
    assert len(thin.values_P) <= 102
    assert len(medians.values_P) == min(50, num_points)
    assert (np.diff(thin.steps_P) > 0).all()
    assert (thin.values_P == values[thin.steps_P]).all()
    assert (thin.hours_P == thin.steps_P / 7).all()
    edges = np.linspace(0, num_points, min(50, num_points) + 1).astype(int)
    for number, (start, stop) in enumerate(pairwise(edges.tolist())):
        inside = thin.values_P[(thin.steps_P >= start) & (thin.steps_P < stop)]
        assert (inside.min(), inside.max()) == (values[start:stop].min(), values[start:stop].max())
        assert medians.values_P[number] == np.median(values[start:stop])
        assert start <= medians.steps_P[number] < stop


def test_what_happened_outlives_a_resume_from_further_back(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, resumed_step=0)
    for kind, step in (
        ("start", 0),
        ("train", 10),
        ("save", 10),
        ("start", 10),
        ("train", 20),
        ("save", 20),
        ("stop", 20),
    ):
        metrics.record(kind, step, {})
    metrics.close()
    Metrics(tmp_path, resumed_step=10).close()
    assert [(r["kind"], r["step"]) for r in read_records(tmp_path)] == [
        ("start", 0), ("train", 10), ("save", 10), ("start", 10), ("stop", 20)
    ]  # fmt: skip


def test_a_gpu_is_known_by_the_name_it_gives_itself() -> None:
    assert gpu_flops_per_s("Tesla V100-SXM2-32GB", "fp16") == 125e12
    assert gpu_flops_per_s("Tesla V100-SXM2-32GB", "bf16") is None
    assert gpu_flops_per_s("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert gpu_flops_per_s("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert gpu_flops_per_s("NVIDIA A10", "fp16") == 125e12
    assert gpu_flops_per_s("Intel(R) Xeon(R) Processor", "fp32") is None
