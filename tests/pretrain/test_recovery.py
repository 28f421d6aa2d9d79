"""Judging steps and going back from one, without other ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_prep.shards import DataSet
from pretrain.batches import SampleOrder, Share
from pretrain.checkpoint import Checkpoint
from pretrain.config import RunConfig
from pretrain.ds_config import BatchSizes
from pretrain.faults import new_fault_name, read_fault, steps_to_replay
from pretrain.guard import Guard, StepValues
from pretrain.order import Cursor
from pretrain.recovery import Recovery, StepJudge

BATCH = 8


@pytest.fixture
def guard() -> Guard:
    return Guard(spike_deviations=0, spike_window_steps=4)


def test_a_step_is_judged_once_by_the_loss_of_all_ranks(guard: Guard) -> None:
    judge = StepJudge(guard, torch.device("cpu"))
    assert judge.own_loss.tolist() == [0.0]
    assert judge.judge(torch.tensor([torch.nan])) is None, "there is no step to judge yet"
    judge.note(StepValues(1, 0.0, 1.0), torch.tensor([2.5]), is_overflow=False, is_at_smallest_scale=False)
    assert judge.own_loss.tolist() == [2.5]
    assert judge.judge(torch.tensor([torch.nan])) == "loss is not finite"
    assert judge.judge(torch.tensor([torch.nan])) is None
    judge.note(StepValues(2, 0.0, 1.0), torch.tensor([2.5]), is_overflow=False, is_at_smallest_scale=False)
    assert judge.judge(torch.tensor([5.0])) is None
    assert guard.state_dict() == {"recent_steps": [[2, 5.0, 1.0]]}


def recovery(run: Path, data: DataSet, guard: Guard, cursor: Cursor, max_rewinds: int = 5) -> Recovery:
    config = RunConfig(Path("ds.json"), data=data.folder, run=run, max_rewinds=max_rewinds)
    inputs: Any = SimpleNamespace(
        config=config,
        data=data,
        deepspeed=SimpleNamespace(values={}),
        batch_sizes=BatchSizes(BATCH, BATCH, 1),
        schedule_samples=800,
    )
    return Recovery(inputs, {"seed": 0}, Share(0, 1, BATCH, 1), guard, cursor)


def test_it_goes_back_to_the_checkpoint_and_tells_all_of_them(tmp_path: Path, data_set: DataSet, guard: Guard) -> None:
    cursor = Cursor(BATCH)
    for _ in range(2):
        cursor.next()
    states = {"cursor": cursor.state_dict(), "guard": {"recent_steps": [[2, 3.0, 1.0]]}}
    for _ in range(3):
        cursor.next()
    told: dict[str, Any] = {}

    def update_states(name: str, change: Any) -> None:
        assert read_fault(tmp_path / "faults" / "step00000005"), "the fault is recorded first"
        told[name] = change(Cursor(BATCH).state_dict())

    rewind = recovery(tmp_path, data_set, guard, cursor).go_back(
        5, "loss is not finite", Checkpoint(tmp_path, {"version": 2, "step": 2, "states": states}), update_states
    )
    assert (rewind.step, rewind.fault_step, rewind.skipped, rewind.number) == (2, 5, range(16, 40), 1)
    assert guard.state_dict() == states["guard"]
    assert cursor.copy().next() == range(40, 48)
    assert told == {"cursor": {"samples_consumed": 0, "skipped": [[16, 40]]}}
    about = read_fault(tmp_path / "faults" / "step00000005")
    assert about["cursor"] == states["cursor"]
    lines = [json.loads(line) for line in (tmp_path / "faults" / "step00000005" / "samples.jsonl").open()]
    assert [line["step"] for line in lines] == [3, 4, 5]
    order = SampleOrder(data_set.num_samples("train"), seed=0)
    assert [sample for line in lines for sample in line["samples"]] == order.samples(16, 40)[1].tolist()
    assert steps_to_replay(tmp_path) == {2}
    assert new_fault_name(tmp_path, 5) == "step00000005-2"


def test_without_a_checkpoint_it_goes_back_to_the_start_as_often_as_it_may(
    tmp_path: Path, data_set: DataSet, guard: Guard
) -> None:
    cursor = Cursor(BATCH)
    found = recovery(tmp_path, data_set, guard, cursor, max_rewinds=2)
    for number, skipped in enumerate([range(0, 16), range(16, 32)], start=1):
        for _ in range(2):
            cursor.next()
        rewind = found.go_back(2, "loss is not finite", None, lambda name, change: None)
        assert (rewind.step, rewind.skipped, rewind.number) == (0, skipped, number)
    cursor.next()
    with pytest.raises(ValueError, match="2 windows of samples have been skipped already"):
        found.go_back(1, "loss is not finite", None, lambda name, change: None)
    assert (tmp_path / "faults" / "step00000001" / "fault.json").is_file(), "the last fault is recorded, too"


def test_the_command_that_replays_is_quoted(tmp_path: Path, data_set: DataSet, guard: Guard) -> None:
    cursor = Cursor(BATCH)
    cursor.next()
    run = tmp_path / "my runs"
    with pytest.raises(ValueError, match=r"--run '.*/my runs' --fault 1`"):
        recovery(run, data_set, guard, cursor, max_rewinds=0).go_back(1, "a spike", None, lambda name, change: None)


def test_a_damaged_or_foreign_record_of_a_fault_keeps_nothing_and_breaks_nothing(tmp_path: Path) -> None:
    for name, text in {
        "step1": "{",
        "step2": "[]",
        "step3": "{}",
        "step4": '{"window": {"checkpoint_step": 7}}',
    }.items():
        (tmp_path / "faults" / name).mkdir(parents=True)
        (tmp_path / "faults" / name / "fault.json").write_text(text)
    assert steps_to_replay(tmp_path) == {7}
    with pytest.raises(ValueError, match="format version None; this code replays version 2"):
        read_fault(tmp_path / "faults" / "step4")
