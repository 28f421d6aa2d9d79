"""A run goes on at any number of ranks, any ZeRO stage and in any precision, by itself, with the losses it would have had."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

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


class Part(NamedTuple):
    """A part of a run, from one start to the next."""

    world_size: int
    zero_stage: int
    last_step: int
    precision: str

    @property
    def description(self) -> str:
        """In the words of the console."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"{ranks} at ZeRO stage {self.zero_stage} in {self.precision}"


def parts(precision: str, *of_parts: tuple[int, int, int]) -> list[Part]:
    return [Part(*part, precision) for part in of_parts]


RUNS = {precision: parts(precision, (2, 2, STEPS)) for precision in PRECISIONS}
"""Those that nothing interrupts, and below those that are moved; each of these is compared with the first run of a name's precision."""
for _precision in ("fp16", "bf16"):
    RUNS[f"{_precision} moved"] = parts(_precision, (2, 2, 3), (3, 2, 5), (1, 2, 7), (4, 2, 8), (2, 2, STEPS))
RUNS["fp32 moved"] = parts("fp32", (3, 2, 3), (2, 3, 5), (4, 1, 7), (1, 2, 8), (3, 3, STEPS))
RUNS["fp32 in every precision"] = [
    Part(2, 2, 2, "fp16"), Part(2, 2, 4, "fp32"), Part(2, 2, 5, "bf16"), Part(3, 3, 7, "fp32"), Part(1, 1, 8, "bf16"), Part(2, 2, STEPS, "fp16"),
]  # fmt: skip


class OverflowingOnce(PMLM):
    """Its gradients overflow fp16 in the run's second step, which is skipped then."""

    num_batches = 0

    def forward(self, layout: Layout) -> PretrainingLosses:
        losses = super().forward(layout)
        self.num_batches += self.training
        is_second = self.training and self.num_batches == 2 and next(self.parameters()).dtype == torch.float16
        return losses._replace(ae_sum=losses.ae_sum * 1e30) if is_second else losses


def _train_in_parts(rank: int, name: str, ports: list[int], data: Path, folder: Path) -> None:
    for part, port in zip(RUNS[name], ports, strict=True):
        config = deepspeed_json(
            folder / f"{rank}.json", **PRECISIONS[part.precision], train_batch_size=24,
            zero_optimization={"stage": part.zero_stage, "stage3_param_persistence_threshold": 1000},
            scheduler={"type": "WarmupDecayLR", "params": {
                "warmup_max_lr": 1e-3, "warmup_num_steps": 4, "warmup_type": "linear", "total_num_steps": STEPS,
            }},
        )  # fmt: skip
        flags = [
            "--deepspeed_config", str(config), "--data", str(data), "--run", str(folder / name),
            "--max_steps", str(part.last_step),
        ]  # fmt: skip
        if rank < part.world_size:
            overflows = part is RUNS[name][0] and "every" not in name
            in_child(train_tiny, part.world_size, port, flags, OverflowingOnce if overflows else None)


@pytest.fixture(scope="module")
def run_of(data_folder: Path, forking_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the run of a name, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("elastic")

    def run(name: str) -> Path:
        if not (folder / name).exists():
            forking_ranks(_train_in_parts, name, [free_port() for _ in RUNS[name]], data_folder, folder)
        return folder / name

    return run


MOVED = [
    "fp16 moved", pytest.param("fp32 in every precision", marks=pytest.mark.old_processor),
    pytest.param("bf16 moved", marks=pytest.mark.heavy), pytest.param("fp32 moved", marks=pytest.mark.heavy),
]  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_the_losses_are_the_uninterrupted_runs_to_rounding(run_of: Callable[[str], Path], name: str) -> None:
    """What is exact: steps, samples, learning rate, and in one precision loss scale and skipped steps."""
    precision, stays = name.split()[0], "every" not in name
    expected, found = (
        {r["step"]: r for r in read_records(run_of(run)) if r["kind"] == "train"} for run in (precision, name)
    )
    assert sorted(found) == list(range(1, STEPS + 1))
    rounding = {"fp16": 2e-3, "bf16": 2e-3, "fp32": 1e-4}[precision] if stays else 3e-3
    for step in expected:
        exact = ("samples_consumed", "learning_rate", *(("loss_scale", "skipped_steps") if stays else ()))
        for key in exact:
            assert found[step][key] == expected[step][key], (step, key)
        for key in ("ae_loss", "par_loss"):
            assert found[step][key] == pytest.approx(expected[step][key], rel=rounding), (step, key)
    starts = [r for r in read_records(run_of(name)) if r["kind"] == "start"]
    assert [(r["world_size"], r["zero_stage"], r["precision"]) for r in starts] == [
        (part.world_size, part.zero_stage, part.precision) for part in RUNS[name]
    ]
    console = (run_of(name) / "console.txt").read_text()
    for before, after in pairwise(RUNS[name]):
        assert (
            f"resuming step {before.last_step}: saved by {before.description}, cut anew for {after.description}\n"
            in console
        )
    if name == "fp16 moved":
        assert found[STEPS]["skipped_steps"] == 1
        assert len({r["loss_scale"] for r in found.values()}) > 2


def test_a_loss_scale_begins_anew_in_fp16_after_another_precision(run_of: Callable[[str], Path]) -> None:
    """And its settings are those of the JSON: a first scale of 256 that doubles after two steps."""
    records = [r for r in read_records(run_of("fp32 in every precision")) if r["kind"] == "train"]
    assert [r["loss_scale"] for r in records] == [256, 256, 1, 1, 1, 1, 1, 1, 256, 256]


@pytest.mark.parametrize("name", ["fp32", pytest.param("fp32 moved", marks=pytest.mark.heavy)])
def test_an_export_has_the_runs_validation_loss(
    run_of: Callable[[str], Path], data_folder: Path, tmp_path: Path, name: str
) -> None:
    """Of checkpoints written at stage 2 and at stage 3."""
    export(run_of(name), tmp_path / "export")
    model, _ = load_exported(tmp_path / "export")
    expected = [r for r in read_records(run_of(name)) if r["kind"] == "validation"][-1]
    assert expected["step"] == STEPS
    layouts = [b.layout for b in validation_batches(DataSet(data_folder), Objective.AE_PAR, Share(0, 1, 24, 1), 25)]
    with torch.no_grad():
        losses = [model(layout) for layout in layouts]
    num_targets = sum(layout.num_targets for layout in layouts)
    assert sum(float(x.ae_sum) for x in losses) / num_targets == pytest.approx(expected["ae_loss"], rel=1e-5)
    assert sum(float(x.par_sum) for x in losses) / num_targets == pytest.approx(expected["par_loss"], rel=1e-5)
