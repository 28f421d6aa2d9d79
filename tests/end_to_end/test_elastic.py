"""A run goes on at any number of ranks and any ZeRO stage, by itself, with the losses it would have had."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, in_child, train_tiny
from support import deepspeed_json, free_port

from data_prep.shards import DataSet
from pretrain.batches import Share, validation_batches
from pretrain.export import export, load_exported
from pretrain.layout import Layout, Objective
from pretrain.metrics import read_records
from pretrain.model import PMLM, PretrainingLosses

pytestmark = pytest.mark.slow

STEPS = 10
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}},
    "bf16": {"fp16": None, "bf16": {"enabled": True}},
    "fp32": {"fp16": None},
}
# Each part of a run: ranks, ZeRO stage, last step.
UNINTERRUPTED = [(2, 2, STEPS)]
ANY_WORLD_SIZE = [(2, 2, 3), (3, 2, 5), (1, 2, 7), (4, 2, 8), (2, 2, STEPS)]
ANY_STAGE = [(3, 2, 3), (2, 3, 5), (4, 1, 7), (1, 2, 8), (3, 3, STEPS)]
RUNS = {
    "fp16": [UNINTERRUPTED, ANY_WORLD_SIZE],
    "bf16": [UNINTERRUPTED, ANY_WORLD_SIZE],
    "fp32": [UNINTERRUPTED, ANY_STAGE],
}


class OverflowingOnce(PMLM):
    """Its gradients overflow fp16 in the run's second step, which is skipped then."""

    num_batches = 0

    def forward(self, layout: Layout) -> PretrainingLosses:
        losses = super().forward(layout)
        self.num_batches += self.training
        is_second = self.training and self.num_batches == 2 and next(self.parameters()).dtype == torch.float16
        return losses._replace(ae_sum=losses.ae_sum * 1e30) if is_second else losses


def _train_in_parts(rank: int, ports: list[int], data: Path, folder: Path) -> None:
    """All runs."""

    for precision, runs in RUNS.items():
        for number, parts in enumerate(runs):
            for world_size, stage, last_step in parts:
                config = deepspeed_json(
                    folder / f"{rank}.json", **PRECISIONS[precision], train_batch_size=24,
                    zero_optimization={"stage": stage, "stage3_param_persistence_threshold": 1000},
                    scheduler={"type": "WarmupDecayLR", "params": {
                        "warmup_max_lr": 1e-3, "warmup_num_steps": 4, "warmup_type": "linear", "total_num_steps": STEPS,
                    }},
                )  # fmt: skip
                flags = [
                    "--deepspeed_config", str(config), "--data", str(data), "--run", str(folder / f"{precision}-{number}"),
                    "--max_steps", str(last_step),
                ]  # fmt: skip
                port = ports.pop(0)
                if rank < world_size:
                    is_first = last_step == parts[0][2]
                    in_child(train_tiny, world_size, port, flags, OverflowingOnce if is_first else None)


@pytest.fixture(scope="module")
def runs(data_folder: Path, forking_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    ports = [free_port() for runs in RUNS.values() for parts in runs for _ in parts]
    forking_ranks(_train_in_parts, ports, data_folder, folder)
    return folder


@pytest.mark.parametrize(("precision", "number"), [(p, n) for p, runs in RUNS.items() for n in range(1, len(runs))])
def test_the_losses_are_the_uninterrupted_runs_to_rounding(runs: Path, precision: str, number: int) -> None:
    """What is exact: steps, samples, learning rate, loss scale and skipped steps."""
    parts = RUNS[precision][number]
    expected, found = (
        {r["step"]: r for r in read_records(runs / f"{precision}-{n}") if r["kind"] == "train"} for n in (0, number)
    )
    assert sorted(found) == list(range(1, STEPS + 1))
    rounding = {"fp16": 2e-3, "bf16": 2e-3, "fp32": 1e-4}[precision]
    for step in expected:
        for key in ("samples_consumed", "learning_rate", "loss_scale", "skipped_steps"):
            assert found[step][key] == expected[step][key], (step, key)
        for key in ("ae_loss", "par_loss"):
            assert found[step][key] == pytest.approx(expected[step][key], rel=rounding), (step, key)
    starts = [r for r in read_records(runs / f"{precision}-{number}") if r["kind"] == "start"]
    assert [(r["world_size"], r["zero_stage"]) for r in starts] == [part[:2] for part in parts]
    console = (runs / f"{precision}-{number}" / "console.txt").read_text()
    for (ranks, stage, step), (next_ranks, next_stage, _) in pairwise(parts):
        assert f"resuming step {step}: saved by {ranks} rank" in console
        assert f"at ZeRO stage {stage}, cut anew for {next_ranks} rank" in console
        assert f"at ZeRO stage {next_stage}\n" in console
    if precision == "fp16":
        assert found[STEPS]["skipped_steps"] == 1
        assert len({r["loss_scale"] for r in found.values()}) > 2


@pytest.mark.parametrize("run", ["fp32-0", "fp32-1"])
def test_an_export_has_the_runs_validation_loss(runs: Path, data_folder: Path, tmp_path: Path, run: str) -> None:
    """Of checkpoints written at stage 2 and at stage 3."""
    export(runs / run, tmp_path / "export")
    model, _ = load_exported(tmp_path / "export")
    expected = [r for r in read_records(runs / run) if r["kind"] == "validation"][-1]
    assert expected["step"] == STEPS
    layouts = [b.layout for b in validation_batches(DataSet(data_folder), Objective.AE_PAR, Share(0, 1, 24, 1), 25)]
    with torch.no_grad():
        losses = [model(layout) for layout in layouts]
    num_targets = sum(layout.num_targets for layout in layouts)
    assert sum(float(x.ae_sum) for x in losses) / num_targets == pytest.approx(expected["ae_loss"], rel=1e-5)
    assert sum(float(x.par_sum) for x in losses) / num_targets == pytest.approx(expected["par_loss"], rel=1e-5)
