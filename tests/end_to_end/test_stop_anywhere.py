"""One rank is asked to stop at any moment: all stop together, saved, and the next start ends where an undisturbed run does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, in_child, train_tiny
from support import deepspeed_json, free_port

from pretrain.layout import Layout
from pretrain.metrics import MEASURED, read_records
from pretrain.model import PMLM, PretrainingLosses

pytestmark = pytest.mark.slow

STEPS = 4
BATCHES = 7  # of a validation on one rank: 25 samples, two at a time


class StopsIn(PMLM):
    """The second rank alone receives SIGUSR1, in a forward pass counted from the process's start."""

    is_validating: bool
    number: int
    num_batches = 0

    def forward(self, layout: Layout) -> PretrainingLosses:
        self.num_batches += self.training != self.is_validating
        if self.num_batches == self.number and self.training != self.is_validating and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)  # so that this rank knows in the next batch, and the other does not
        return super().forward(layout)


MOMENTS: dict[str, tuple[bool, int, int]] = {  # is_validating, number of the forward pass, step at which it stops
    "first validation": (True, 2, 0),
    "training": (False, 2, 1),
    "validation in the middle": (True, BATCHES + 3, 2),
}
CASES = [(3, name) for name in MOMENTS] + [(2, "validation in the middle")]


def _runs(rank: int, ports: list[int], data: Path, folder: Path) -> None:
    schedule = {"warmup_max_lr": 1e-3, "warmup_num_steps": 2, "warmup_type": "linear", "total_num_steps": STEPS}
    for stage, name in [(3, "undisturbed"), (2, "undisturbed"), *CASES]:
        config = deepspeed_json(
            folder / f"{rank}-{stage}.json", fp16=None, train_batch_size=8, train_micro_batch_size_per_gpu=2,
            zero_optimization={"stage": stage}, scheduler={"type": "WarmupDecayLR", "params": schedule},
        )  # fmt: skip
        run = folder / f"{name} {stage}"
        flags = [
            *("--deepspeed_config", str(config), "--data", str(data), "--run", str(run)),
            *("--validate_every_steps", "2", "--watchdog_minutes", "1"),
        ]
        model_classes: list[type | None] = [None]
        if name in MOMENTS:
            is_validating, number, _ = MOMENTS[name]
            model_classes.insert(0, type("Stops", (StopsIn,), {"is_validating": is_validating, "number": number}))
        for model_class in model_classes:
            port = ports.pop(0)
            if rank < 2:
                in_child(train_tiny, 2, port, flags, model_class)


@pytest.fixture(scope="module")
def runs(data_folder: Path, forking_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    forking_ranks(_runs, [free_port() for _ in range(2 + 2 * len(CASES))], data_folder, folder)
    return folder


def curve(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if key not in MEASURED}
        for record in read_records(run)
        if record["kind"] in ("train", "validation")
    ]


@pytest.mark.parametrize(("stage", "name"), CASES)
def test_all_ranks_stop_at_one_step_and_go_on_from_it(runs: Path, stage: int, name: str) -> None:
    run = runs / f"{name} {stage}"
    stops = [(record["step"], record["reason"]) for record in read_records(run) if record["kind"] == "stop"]
    assert stops == [(MOMENTS[name][2], "SIGUSR1"), (STEPS, "finished")]
    undisturbed = curve(runs / f"undisturbed {stage}")
    assert curve(run) == undisturbed
    assert [record["kind"] for record in undisturbed].count("validation") == 3
