"""`sbatch run_pretrain.sh` on a real Slurm of two nodes."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import PATIENCE_S, REPOSITORY, deepspeed_json, environment

from pretrain.metrics import read_records


class Cluster:
    """Commands of the private Slurm."""

    def __init__(self, changes: dict[str, str], folder: Path) -> None:
        self._env = environment(**changes, GLOO_SOCKET_IFNAME="lo")
        self.folder = folder

    def __call__(self, *command: str) -> str:
        done = subprocess.run(command, cwd=REPOSITORY, env=self._env, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *words: str) -> str:
        """The number of a job of run_pretrain.sh on two nodes with a rank each."""
        output = f"--output={self.folder}/%j.out"
        return self("sbatch", "--parsable", "--nodes=2", "--time=10", output, *words)

    def run(self, *command: str) -> str:
        """The output of a command that is the batch script of a job of two nodes."""
        wrapped = f"--wrap={shlex.join(command)}"
        job = self("sbatch", "--parsable", "--wait", "--nodes=2", f"--output={self.folder}/%j.out", wrapped)
        return self.output(job)

    def state(self, job: str) -> str:
        return self("scontrol", "--oneliner", "show", "job", job).partition("JobState=")[2].split()[0]

    def output(self, job: str) -> str:
        path = self.folder / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def wait_until(self, is_so: Callable[[], bool], *jobs: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < deadline, [(job, self.state(job), self.output(job)) for job in jobs]
            time.sleep(0.2)


@pytest.fixture
def cluster(slurm: dict[str, str], tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(slurm, tmp_path)
    yield cluster
    cluster("scancel", f"--user={os.getuid()}")  # what a test that failed has left would keep the nodes from the next


@pytest.fixture
def flags(data_folder: Path, tmp_path: Path) -> list[str]:
    """Of a training that ends when a test says so by `set_steps`."""
    set_steps(tmp_path, 100_000)
    return [
        "run_pretrain.sh", "--deepspeed_config", str(tmp_path / "ds.json"), "--data", str(data_folder), "--ranks", "1", "--model",
        "tiny", "--hidden_size", "32", "--intermediate_size", "64", "--dropout", "0.1", "--log_every_steps", "1",
        "--validate_every_steps", "0",
        "--spike_deviations", "0",
    ]  # fmt: skip


def set_steps(folder: Path, steps: int) -> None:
    """Write the DeepSpeed JSON of a training of so many steps."""
    schedule = {"warmup_max_lr": 1e-2, "warmup_num_steps": 1, "warmup_type": "linear", "total_num_steps": steps}
    deepspeed_json(folder / "ds.json", train_batch_size=8, scheduler={"type": "WarmupDecayLR", "params": schedule})


def train_steps(run: Path) -> list[int]:
    return [record["step"] for record in read_records(run) if record["kind"] == "train"]


def test_a_job_that_another_goes_before_saves_is_requeued_and_finishes(
    cluster: Cluster, flags: list[str], tmp_path: Path
) -> None:
    """And a job that depends on this one comes after it."""
    run = tmp_path / "run"
    job = cluster.submit(*flags, "--run", str(run))
    chained = cluster.submit(f"--dependency=afterok:{job}", *flags, "--run", str(run))
    cluster.wait_until(lambda: train_steps(run) != [], job)
    urgent = cluster("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=true")
    cluster.wait_until(lambda: cluster.state(urgent) == "COMPLETED", job, urgent)
    assert cluster.state(job) == "PENDING"
    (stop,) = [record for record in read_records(run) if record["kind"] == "stop"]
    assert stop["reason"] == "SIGTERM"
    last_step = stop["step"] + 10
    set_steps(tmp_path, last_step)
    # Slurm puts a requeued job off for two minutes; in the second in which it was ended, a node would refuse it.
    cluster("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    cluster.wait_until(lambda: cluster.state(chained) == "COMPLETED", job, chained)
    assert cluster.state(job) == "COMPLETED", cluster.output(job)
    assert "Restarts=1 " in cluster("scontrol", "--oneliner", "show", "job", job)
    assert train_steps(run) == list(range(1, last_step + 1))
    starts = [record for record in read_records(run) if record["kind"] == "start"]
    assert [(record["world_size"], record["resumed"]) for record in starts][:2] == [(2, False), (2, True)]
    assert "nothing left to train" in cluster.output(chained)


def test_what_the_time_limit_ends_the_next_of_an_array_goes_on_with(
    cluster: Cluster, flags: list[str], tmp_path: Path
) -> None:
    """Where jobs may not requeue themselves: tasks of an array, one at a time, on the same run."""
    run = tmp_path / "run"
    one_at_a_time = ["--array=1-2%1", "--no-requeue", "--signal=USR1@10", f"--output={tmp_path}/%A_%a.out"]
    array = cluster.submit(*one_at_a_time, *flags, f"--run={run}")
    first, second = f"{array}_1", f"{array}_2"
    cluster.wait_until(lambda: train_steps(run) != [], first)
    assert cluster.state(second) == "PENDING"
    cluster("scontrol", "update", f"JobId={first}", "TimeLimit=1")  # Slurm looks at limits every half minute
    cluster.wait_until(lambda: cluster.state(first) == "FAILED", first)
    stop = next(record for record in read_records(run) if record["kind"] == "stop")
    assert stop["reason"] == "SIGUSR1"
    assert "submit it again" in cluster.output(first)
    cluster.wait_until(lambda: len(train_steps(run)) > stop["step"], second)
    steps = train_steps(run)  # it goes on meanwhile
    assert steps == list(range(1, len(steps) + 1))
    cluster("scancel", array)


def test_scancel_saves_and_does_not_come_back(cluster: Cluster, flags: list[str], tmp_path: Path) -> None:
    """As a task of a job array, with its number in the run's name."""
    array = cluster.submit("--array=3", *flags, "--run", str(tmp_path / "sweep-%a"), "--seed", "%a")
    run = tmp_path / "sweep-3"
    cluster.wait_until(lambda: train_steps(run) != [], array)
    cluster("scancel", array)
    cluster.wait_until(lambda: cluster.state(array) == "CANCELLED", array)
    assert list((run / "checkpoints").glob("step*/manifest.json")), cluster.output(array)
    assert "requeueing" not in cluster.output(array)


def test_the_doctor_reaches_a_jobs_nodes_without_ssh(cluster: Cluster, tmp_path: Path) -> None:
    output = cluster.run("python", "-m", "pretrain.doctor", "--run", str(tmp_path / "run"))
    assert "FAILED" not in output, output
    assert "2 answer" in output, output
    assert "between 2 hosts" in output
