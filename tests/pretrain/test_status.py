"""How far a run is, by its checkpoints and where it is to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import assert_user_error, make_checkpoint, run_command

from pretrain.status import read_status, write_plan


@pytest.mark.parametrize(
    ("steps", "damaged", "expected"), [([], [], 0), ([100, 200], [], 200), ([100, 200], [200], 100)]
)
def test_the_newest_whole_checkpoint_decides(
    tmp_path: Path, steps: list[int], damaged: list[int], expected: int
) -> None:
    write_plan(tmp_path, 200)
    for step in steps:
        folder = make_checkpoint(tmp_path, step)
        if step in damaged:
            (folder / "manifest.json").unlink()
    status = read_status(tmp_path)
    assert (status.step, status.total_steps, status.is_finished) == (expected, 200, expected == 200)
    assert len(status.passed_over) == len(damaged)


def test_the_command_tells_by_its_exit_status_too(tmp_path: Path) -> None:
    command = ["python", "-m", "pretrain.status", "--run", str(tmp_path)]
    assert_user_error(run_command(command), "no run was started there", str(tmp_path))
    write_plan(tmp_path, 200)
    folder = make_checkpoint(tmp_path, 200)
    done = run_command(command)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}: step 200 of 200, finished, {folder}\n")
    write_plan(tmp_path, 300)  # started again, to go further
    done = run_command([*command, "--json"])
    assert done.returncode == 3
    assert json.loads(done.stdout) == {
        "step": 200, "total_steps": 300, "is_finished": False, "checkpoint": str(folder), "passed_over": [],
    }  # fmt: skip
