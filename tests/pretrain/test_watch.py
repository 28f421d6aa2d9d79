"""What is said of a run by its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import assert_user_error, run_command

from pretrain.metrics import METRICS, Metrics, Records
from pretrain.watch import look

STEP_S = 10.0


def records_of(num_steps: int, **last: Any) -> list[dict[str, Any]]:
    """A sound run on two ranks up to a step, with a checkpoint every 50."""
    records: list[dict[str, Any]] = [
        {"kind": "start", "step": 0, "time": 0.0, "resumed": False, "world_size": 2, "total_steps": 1000, "config": {"max_rewinds": 5}}
    ]  # fmt: skip
    for step in range(1, num_steps + 1):
        records.append({
            "kind": "train", "step": step, "time": step * STEP_S, "ae_loss": 5.0, "par_loss": 4.0, "ae_accuracy": 0.1,
            "par_accuracy": 0.2, "loss_scale": 65536.0, "gradient_norm": 1.0, "tokens_per_s": 1e4, "data_wait": 0.01,
        })  # fmt: skip
        if step % 50 == 0:
            records.append({"kind": "save", "step": step, "time": step * STEP_S, "save_s": 1.0, "size_bytes": 10**6})
    records[-1] |= last
    return records


def test_a_sound_run(tmp_path: Path) -> None:
    view = look(tmp_path, records_of(120), now=1203)
    assert (view.state, view.step, view.total_steps, view.saved_step, view.faults) == ("running", 120, 1000, 100, [])
    assert view.silent_s == 3
    assert view.seconds_left == pytest.approx(880 * STEP_S - 3)
    view = look(
        tmp_path, [*records_of(120), {"kind": "stop", "step": 120, "time": 1200.0, "reason": "finished"}], now=10**6
    )
    assert (view.state, view.has_ended, view.faults) == ("finished", True, [])
    view = look(tmp_path, records_of(0), now=600)  # it compiles
    assert (view.state, view.faults) == ("starting", [])


FAULT = {"kind": "fault", "step": 50, "fault": "loss is not finite", "fault_step": 60, "time": 600.0}


@pytest.mark.parametrize(
    ("records", "now", "words"),
    [
        (records_of(120), 1200 + 119, None),  # within 2 minutes
        (records_of(120), 1200 + 121, "no record for 2 min 1 s, expected one within 2 min"),
        (records_of(0), 1000, "no record for 16 min 40 s, expected one within 15 min"),
        (records_of(120, ae_loss=float("nan")), 1200, "loss is not finite at step 120"),
        (records_of(120, loss_scale=4096.0), 1200, None),
        (records_of(120, loss_scale=1024.0), 1200, "fell from 65536 to 1024 within 49 steps"),
        (records_of(40, loss_scale=1024.0), 400, None),  # it came down from where it began
        ([*records_of(60), FAULT], 600, "step 60: loss is not finite; gone back from"),
        ([*records_of(60), FAULT, *records_of(100)[61:]], 1000, None),  # a checkpoint since
        ([*records_of(60), *[FAULT] * 5, *records_of(100)[61:]], 1000, "5 rewinds, of 5 that --max_rewinds allows"),
        ([*records_of(60), {"kind": "fault", "step": 60, "fault": "X: could not be saved", "time": 600.0}], 600, "X: could not be"),
        (records_of(100, size_bytes=10**16), 1000, "GB free on the run's disk, less than two checkpoints of 10000000.0 GB"),
    ],
)  # fmt: skip
def test_what_is_wrong(tmp_path: Path, records: list[dict[str, Any]], now: float, words: str | None) -> None:
    faults = look(tmp_path, records, now).faults
    assert len(faults) == (words is not None)
    assert words is None or words in faults[0]


def test_records_are_followed_through_a_restart(tmp_path: Path) -> None:
    """Also one that is half written when it is looked at."""
    followed, metrics = Records(tmp_path), Metrics(tmp_path, resumed_step=0)

    def steps() -> list[int]:
        return [record["step"] for record in followed.update()]

    assert steps() == []
    for step in (1, 2, 3):
        metrics.record("train", step, {})
        assert steps() == list(range(1, step + 1))
    metrics.close()
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"kind": "train", ')
        file.flush()
        assert steps() == [1, 2, 3]
        file.write('"step": 4, "time": 1}\n')
        file.flush()
        assert steps() == [1, 2, 3, 4]
    metrics = Metrics(tmp_path, resumed_step=2)
    assert steps() == [1, 2]
    metrics.record("train", 3, {})
    metrics.close()
    assert steps() == [1, 2, 3]


def test_the_command_tells_by_its_exit_status_too(tmp_path: Path) -> None:
    command = ["python", "-m", "pretrain.watch", "--run", str(tmp_path)]
    assert_user_error(run_command(command), "no records of a run there", str(tmp_path))
    (tmp_path / METRICS).write_text(
        "".join(json.dumps(record) + "\n" for record in records_of(60, gradient_norm=float("inf")))
    )
    done = run_command([*command, "--once", "--json"])
    assert done.returncode == 1, done.stderr
    view = json.loads(done.stdout)
    assert (view["state"], view["step"], view["train"]["gradient_norm"]) == ("silent", 60, None)
    with open(tmp_path / METRICS, "a") as file:
        file.write(json.dumps({"kind": "stop", "step": 1000, "time": 700.0, "reason": "finished"}) + "\n")
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}: finished\nstep        1,000 of 1,000 (100.0%)\n")
    assert "\x1b" not in done.stdout
    assert done.stdout.rstrip().endswith("healthy")
