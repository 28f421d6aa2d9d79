"""NaN, a spike or a spent loss scale in the middle of a run: recorded, gone back from, its samples skipped, and replayed."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, in_child, train_tiny
from support import deepspeed_json, free_port

from data_prep.files import read_json
from data_prep.shards import DataSet
from pretrain.batches import SampleOrder
from pretrain.layout import Layout
from pretrain.metrics import read_records
from pretrain.model import PMLM, PretrainingLosses
from pretrain.replay import replay

pytestmark = pytest.mark.slow

BATCH, SAVE_EVERY, STEPS = 24, 4, 10


class BrokenOnce(PMLM):
    """A weight becomes NaN before the run's sixth step."""

    num_batches = 0

    def forward(self, layout: Layout) -> PretrainingLosses:
        self.num_batches += self.training
        if self.training and self.num_batches == 6:
            with torch.no_grad():
                self.cls.predictions.bias.fill_(torch.nan)
        return super().forward(layout)


class BrokenEarly(PMLM):
    """A weight becomes NaN before the run's second step."""

    num_batches = 0

    def forward(self, layout: Layout) -> PretrainingLosses:
        self.num_batches += self.training
        if self.training and self.num_batches == 2:
            with torch.no_grad():
                self.cls.predictions.bias.fill_(torch.nan)
        return super().forward(layout)


class LargeInSome(PMLM):
    """The losses of some training batches, counted from the process's start, are far too large."""

    batches: range
    num_batches = 0

    def forward(self, layout: Layout) -> PretrainingLosses:
        losses = super().forward(layout)
        self.num_batches += self.training
        if not self.training or self.num_batches not in self.batches:
            return losses
        return losses._replace(ae_sum=losses.ae_sum * 1e6, par_sum=losses.par_sum * 1e6)


class Spiked(LargeInSome):
    """In the sixth step."""

    batches = range(6, 7)


class Overflowing(LargeInSome):
    """In steps six to eight, so that fp16's scale falls from 4 to 1 and can fall no more."""

    batches = range(6, 9)


class Broken(PMLM):
    """In every step behind the first checkpoint a loss is far too large."""

    num_batches = 0

    def forward(self, layout: Layout) -> PretrainingLosses:
        losses = super().forward(layout)
        self.num_batches += self.training
        return losses._replace(ae_sum=losses.ae_sum * torch.inf) if self.num_batches > SAVE_EVERY else losses


def _runs(rank: int, ports: list[int], data: Path, folder: Path) -> None:
    """A run without a fault, one with NaN, two taken up from the checkpoint before it, and one that is beyond help."""
    schedule = {"warmup_max_lr": 1e-3, "warmup_num_steps": 4, "warmup_type": "linear", "total_num_steps": STEPS}
    config = deepspeed_json(
        folder / f"{rank}.json", fp16=None, bf16={"enabled": True}, train_batch_size=BATCH,
        scheduler={"type": "WarmupDecayLR", "params": schedule},
    )  # fmt: skip
    small_scale = {"enabled": True, "initial_scale_power": 2, "hysteresis": 1, "min_loss_scale": 1}
    fp16 = deepspeed_json(
        folder / f"{rank}-fp16.json", fp16=small_scale, train_batch_size=BATCH,
        scheduler={"type": "WarmupDecayLR", "params": schedule},
    )  # fmt: skip
    runs: list[tuple[str, int, type | None]] = [
        ("sound", 2, None), ("nan", 2, BrokenOnce), ("resumed", 2, None), ("elastic", 3, None), ("lost", 2, Broken),
        ("spike", 2, Spiked), ("collapse", 2, Overflowing), ("early", 2, BrokenEarly),
    ]  # fmt: skip
    for name, world_size, model_class in runs:
        run, port = folder / name, ports.pop(0)
        flags = [
            "--deepspeed_config", str(fp16 if name == "collapse" else config), "--data", str(data), "--run", str(run), "--max_rewinds", "1",
            "--save_every_steps", str(SAVE_EVERY), "--keep_last", "1", "--spike_window_steps", "4",
        ]  # fmt: skip
        if rank == 0 and name in ("resumed", "elastic"):
            before = Path("checkpoints") / f"step{SAVE_EVERY:08d}"
            shutil.copytree(folder / "nan" / before, run / before)
            (run / "ready").touch()
        while name in ("resumed", "elastic") and not (run / "ready").exists():
            time.sleep(0.05)
        if rank < world_size:
            in_child(train_tiny, world_size, port, flags, model_class)


@pytest.fixture(scope="module")
def runs(data_folder: Path, forking_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    forking_ranks(_runs, [free_port() for _ in range(8)], data_folder, folder)
    return folder


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    kept = ("ae_loss", "par_loss", "gradient_norm", "learning_rate", "samples_consumed")
    return {r["step"]: {key: r[key] for key in kept} for r in read_records(run) if r["kind"] == "train"}


def test_the_run_goes_back_and_on_behind_the_window(runs: Path) -> None:
    sound, found = steps_of(runs / "sound"), steps_of(runs / "nan")
    assert sorted(found) == list(range(1, STEPS + 1))
    assert [found[step] for step in range(1, SAVE_EVERY + 1)] == [sound[step] for step in range(1, SAVE_EVERY + 1)]
    skipped = 2 * BATCH  # steps 5 and 6
    assert [found[s]["samples_consumed"] for s in range(5, 11)] == [s * BATCH + skipped for s in range(5, 11)]
    assert all(0 < record["ae_loss"] < 10 for record in found.values())
    (fault,) = [r for r in read_records(runs / "nan") if r["kind"] == "fault"]
    assert (fault["step"], fault["fault_step"], fault["first_sample"], fault["stop_sample"]) == (4, 6, 96, 144)
    assert "step 6: loss is not finite; back to step 4, samples 96 to 143" in (runs / "nan" / "console.txt").read_text()


@pytest.mark.parametrize(
    ("name", "reason"), [("spike", "loss "), ("collapse", "gradients overflow at fp16's smallest loss scale")]
)
def test_so_it_does_from_a_spike_and_where_the_loss_scale_is_spent(runs: Path, name: str, reason: str) -> None:
    records = read_records(runs / name)
    (fault,) = [record for record in records if record["kind"] == "fault"]
    assert fault["fault"].startswith(reason)
    assert (fault["step"], fault["first_sample"]) == (SAVE_EVERY, SAVE_EVERY * BATCH)
    found = steps_of(runs / name)
    assert sorted(found) == list(range(1, STEPS + 1))
    skipped = fault["stop_sample"] - fault["first_sample"]
    assert skipped >= 2 * BATCH
    assert [found[s]["samples_consumed"] for s in range(5, 11)] == [s * BATCH + skipped for s in range(5, 11)]
    assert all(0 < record["ae_loss"] < 10 for record in found.values())


def test_before_the_first_checkpoint_it_goes_back_to_the_initial_weights(runs: Path) -> None:
    """The skipped samples are the first two steps'; the schedule begins anew."""
    sound, found = steps_of(runs / "sound"), steps_of(runs / "early")
    assert sorted(found) == list(range(1, STEPS + 1))
    for step, record in found.items():
        assert record["samples_consumed"] == (step + 2) * BATCH
        assert record["learning_rate"] == sound[step]["learning_rate"]
        assert record["ae_loss"] == pytest.approx(sound[step]["ae_loss"], rel=0.1)
    (fault,) = [r for r in read_records(runs / "early") if r["kind"] == "fault"]
    assert (fault["step"], fault["fault_step"], fault["first_sample"], fault["stop_sample"]) == (0, 2, 0, 48)
    assert "back to the initial weights, samples 0 to 47" in (runs / "early" / "console.txt").read_text()


def test_a_later_resume_skips_the_same_samples(runs: Path) -> None:
    """From the checkpoint before the window: to the bit at the same number of ranks, to rounding at another."""
    expected = steps_of(runs / "nan")
    assert steps_of(runs / "resumed") == {step: expected[step] for step in range(5, STEPS + 1)}
    for step, record in steps_of(runs / "elastic").items():
        assert record["samples_consumed"] == expected[step]["samples_consumed"]
        assert record["ae_loss"] == pytest.approx(expected[step]["ae_loss"], rel=2e-3)


def test_the_fault_names_its_samples(runs: Path, data_folder: Path) -> None:
    folder = runs / "nan" / "faults" / "step00000006"
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    order = SampleOrder(DataSet(data_folder).num_samples("train"), seed=0)
    assert [line["step"] for line in lines] == [5, 6]
    assert [s for line in lines for s in line["samples"]] == order.samples(96, 144)[1].tolist()
    assert read_json(folder / "fault.json")["reason"] == "loss is not finite"


def _replayed(run: Path, fault: str, port: int, out: Path) -> None:
    os.environ |= {"WORLD_SIZE": "1", "MASTER_PORT": str(port)}
    console = io.StringIO()
    replay(run, fault, None, BATCH, console)
    out.write_text(console.getvalue())


def _replay(rank: int, run: Path, fault: str, port: int, out: Path) -> None:
    if rank == 0:
        in_child(_replayed, run, fault, port, out)


@pytest.mark.parametrize(("name", "steps"), [("nan", (5, 6)), ("early", (1, 2))])
def test_replay_shows_the_steps_and_their_samples(
    runs: Path, forking_ranks: Ranks, tmp_path: Path, name: str, steps: tuple[int, int]
) -> None:
    """The weight that the test broke is not broken here: the losses are those of the sound run. The checkpoint, which
    --keep_last 1 would have removed, is still there; nothing in the run's folder changes."""
    run = runs / name
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    forking_ranks(_replay, run, str(steps[1]), free_port(), tmp_path / "replay.txt")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    lines = (tmp_path / "replay.txt").read_text().splitlines()
    assert lines[0] == f"step {steps[1]}: loss is not finite"
    assert len(lines) == 1 + 2 * (1 + BATCH)
    for step, line in zip(steps, (lines[1], lines[2 + BATCH]), strict=True):
        expected = steps_of(runs / "sound")[step]
        words = line.split()
        assert words[:2] == ["step", str(step)]
        assert float(words[3]) == pytest.approx(expected["ae_loss"] + expected["par_loss"], rel=2e-3)
        assert float(words[6]) == pytest.approx(expected["gradient_norm"], rel=1e-2)
    losses = [float(line.split()[3]) for line in lines[2 : 2 + BATCH]]
    assert losses == sorted(losses, reverse=True)
    assert len(lines[2].split()) > 8, "an excerpt of the text"


def test_a_limit_ends_the_run(runs: Path) -> None:
    console = (runs / "lost" / "console.txt").read_text()
    assert (
        "error: step 5: loss is not finite; 1 windows of samples have been skipped already (--max_rewinds 1)" in console
    )
    assert "pretrain.replay --run" in console
    assert sorted(p.name for p in (runs / "lost" / "checkpoints").glob("step*")) == ["step00000004"]
