"""Tasks handed out by one process: to how many, how evenly, and what travels."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from support import PATIENCE_S, REPOSITORY, environment

from data_prep import processes
from data_prep.console import available_cores
from data_prep.processes import PROCESSES_PER_CORE, LocalProcesses, MPIProcesses
from data_prep.progress import Stage, Work

NUM_TASKS = 20_000

COMPILED_CODE_AND_SCIPY = """
import sys
import numpy as np
from data_prep.draws import unit_intervals
from data_prep.processes import LocalProcesses
with LocalProcesses(1) as processes:
    processes.prepare(lambda: None)
assert unit_intervals(np.zeros(1, np.uint64), 0).shape == (1,)
assert "scipy.linalg" not in sys.modules
import scipy.linalg
assert scipy.linalg.norm(np.ones(4)) == 2
"""


def test_compiled_code_does_not_load_scipy_which_works_all_the_same() -> None:
    subprocess.run([sys.executable, "-c", COMPILED_CODE_AND_SCIPY], cwd=REPOSITORY, check=True)


def short_task(number: int) -> Work:
    """Wait, so that the share of each process does not depend on which core is faster."""
    time.sleep(0.0002)
    return Work(1, value=number)


def share_of_each_process(processes: LocalProcesses | MPIProcesses) -> Counter[str]:
    done: list[Work] = []
    processes.prepare(int)
    processes.run(short_task, ((number,) for number in range(NUM_TASKS)), Stage("wait", NUM_TASKS, "task"), done.append)
    assert sorted(work.value for work in done) == list(range(NUM_TASKS))
    return Counter(work.process for work in done)


def assert_even(shares: dict[str, int], names: set[str]) -> None:
    assert set(shares) == names
    mean = NUM_TASKS / len(names)
    assert all(0.8 * mean < share < 1.2 * mean for share in shares.values()), shares


def test_short_tasks_are_shared_evenly_by_workers() -> None:
    with LocalProcesses(2) as local:
        assert_even(share_of_each_process(local), {"worker 0", "worker 1"})


@pytest.mark.slow
def test_short_tasks_are_shared_evenly_by_ranks() -> None:
    """Of three ranks two work."""
    command = ["mpirun", "--oversubscribe", "-n", "3", sys.executable, __file__]
    allowed = environment(
        OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", PYTHONPATH=f"{REPOSITORY}:{REPOSITORY}/tests"
    )
    done = subprocess.run(
        command, cwd=REPOSITORY, env=allowed, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_even(json.loads(done.stdout), {"rank 1", "rank 2"})


def own_name() -> Work:
    time.sleep(0.01)
    return Work(1)


def names_of(local: LocalProcesses, num_tasks: int) -> set[str]:
    done: list[Work] = []
    local.run(own_name, [()] * num_tasks, Stage("name", num_tasks, "task"), done.append)
    assert len(done) == num_tasks
    return {work.process for work in done}


def test_no_more_processes_than_work_or_than_two_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "available_cores", lambda: 2)
    with LocalProcesses(100_000) as local:
        local.prepare(int)
        for num_tasks, num_processes in [(0, 0), (1, 1), (3, 3), (2, 3), (200, 4)]:
            assert len(names_of(local, num_tasks)) <= num_processes
            assert len(local._pool._processes if local._pool else {}) == num_processes  # type: ignore[union-attr]


def test_a_setting_reaches_processes_that_had_another(tmp_path: Path) -> None:
    """Each process calls `set_up` once for each `prepare`, and has its log where the newest says."""
    with LocalProcesses(2) as local:
        for name in ("a", "b"):
            local.prepare((tmp_path / name).touch, log_folder=tmp_path / f"logs-{name}")
            used = names_of(local, 40)
            assert (tmp_path / name).exists()
            logs = {log.name for log in (tmp_path / f"logs-{name}").iterdir()}
            assert logs == {"main.log", *(f"{process.replace(' ', '-000')}.log" for process in used)}


def test_arguments_are_taken_as_they_are_needed() -> None:
    """So that those of millions of tasks never are in memory together."""
    num_cores = available_cores()
    taken: list[int] = []
    ahead: list[int] = []

    def arguments() -> list[tuple[int]]:
        for number in range(2000):
            taken.append(number)
            yield (number,)  # type: ignore[misc]

    with LocalProcesses(2) as local:
        local.prepare(int)
        done: list[Work] = []

        def report(work: Work) -> None:
            done.append(work)
            ahead.append(len(taken) - len(done))

        local.run(short_task, arguments(), Stage("wait", 2000, "task"), report)
    assert len(done) == len(taken) == 2000
    assert max(ahead) <= 2 * PROCESSES_PER_CORE * max(num_cores, 2) * 16


if __name__ == "__main__":  # a rank
    with MPIProcesses() as ranks:
        if ranks:
            print(json.dumps(share_of_each_process(ranks)))
