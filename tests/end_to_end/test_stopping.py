"""A real run, asked to end in every way: it saves, says so, and goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import PATIENCE_S, REPOSITORY, deepspeed_json, environment, free_port, run_command

from pretrain.metrics import read_records
from pretrain.watchdog import RETRY_STATUS

pytestmark = pytest.mark.slow

BATCH = 32


class EndlessRun:
    """A run of a tiny model whose schedule is too long to end by itself."""

    def __init__(self, data: Path, folder: Path) -> None:
        schedule = {"warmup_max_lr": 1e-3, "warmup_num_steps": 4, "total_num_steps": 100_000}
        config = deepspeed_json(
            folder / "ds.json", train_batch_size=BATCH, train_micro_batch_size_per_gpu=8,
            scheduler={"type": "WarmupDecayLR", "params": schedule},
        )  # fmt: skip
        self.folder = folder / "run"
        self._flags = [
            "run_pretrain.py", "--deepspeed_config", str(config), "--data", str(data), "--run", str(self.folder),
            "--model", "tiny", "--hidden_size", "32", "--intermediate_size", "64", "--dropout", "0.1", "--log_every_steps", "1",
            "--validate_every_steps", "0", "--save_every_steps", "1000",
        ]  # fmt: skip

    def start_ranks(self, *flags: str, world_size: int = 2) -> list[subprocess.Popen[str]]:
        """Ranks without a launcher."""
        shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [
            start(["python", *self._flags, *flags], **shared, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(world_size)
        ]

    def start_launcher(self) -> subprocess.Popen[str]:
        """Two ranks by `deepspeed`."""
        port = f"--master_port={free_port()}"
        return start(["deepspeed", "--quiet", "--num_accelerators", "2", port, *self._flags])

    def start_nodes(self, *flags: str) -> list[subprocess.Popen[str]]:
        """Two hosts of one rank each, by `torchrun`."""
        node = [
            "torchrun",
            "--nnodes=2",
            "--nproc_per_node=1",
            "--master_addr=127.0.0.1",
            f"--master_port={free_port()}",
        ]
        return [
            start([*node, f"--node_rank={rank}", "--", *self._flags, *flags], GLOO_SOCKET_IFNAME="lo")
            for rank in range(2)
        ]

    def train_some_steps(self, process: subprocess.Popen[str]) -> None:
        """Wait until the run has got on by three steps since its last start."""

        def has_trained() -> bool:
            records = read_records(self.folder)
            started = max((i for i, r in enumerate(records) if r["kind"] == "start"), default=len(records))
            return sum(r["kind"] == "train" for r in records[started:]) >= 3

        before = sum(r["kind"] == "start" for r in read_records(self.folder))
        wait_until(lambda: sum(r["kind"] == "start" for r in read_records(self.folder)) > before, process)
        wait_until(has_trained, process)

    def assert_saved(self, reason: str) -> None:
        """It stopped for this reason, saved its last step, and every step was trained once, on its own samples."""
        records = read_records(self.folder)
        assert records[-1]["kind"] == "stop"
        assert records[-1]["reason"] == reason
        trained = [r for r in records if r["kind"] == "train"]
        assert [r["step"] for r in trained] == list(range(1, records[-1]["step"] + 1))
        assert all(r["samples_consumed"] == BATCH * r["step"] for r in trained)
        assert newest(self.folder) == f"step{records[-1]['step']:08d}"


def start(command: list[str], **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(**changes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(is_so: Callable[[], Any], process: subprocess.Popen[str], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not is_so():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def newest(run: Path) -> str:
    return max(folder.name for folder in (run / "checkpoints").glob("step*"))


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that run the script, rank 0 first."""
    found = [p for p in psutil.Process(launcher.pid).children(recursive=True) if "run_pretrain.py" in p.cmdline()[2:3]]
    return sorted(found, key=lambda p: p.cmdline()[3])


def test_a_run_that_is_asked_to_end_saves_and_goes_on(data_folder: Path, tmp_path: Path) -> None:
    run = EndlessRun(data_folder, tmp_path)

    ranks = run.start_ranks()  # a signal to one rank alone
    run.train_some_steps(ranks[0])
    ranks[1].send_signal(signal.SIGUSR1)
    outputs = [rank.communicate(timeout=PATIENCE_S)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "(SIGUSR1); saved; the same command goes on from there" in outputs[0]
    run.assert_saved("SIGUSR1")
    asked = run_command(["python", "-m", "pretrain.status", "--run", str(run.folder)])
    assert asked.returncode == 3
    assert " of 100000, not finished, " in asked.stdout

    launcher = run.start_launcher()  # as pdsh leaves it: the console's other end is gone
    run.train_some_steps(launcher)
    ranks_before = ranks_of(launcher)
    assert len(ranks_before) == 2
    launcher.stderr.close()  # type: ignore[union-attr]
    ranks_before[0].parent().send_signal(signal.SIGTERM)
    launcher.wait(PATIENCE_S)
    assert not any(rank.is_running() for rank in ranks_before)
    run.assert_saved("SIGTERM")

    launcher = run.start_launcher()
    run.train_some_steps(launcher)
    left_behind = [*ranks_of(launcher), ranks_of(launcher)[0].parent()]
    launcher.kill()
    assert "(the launcher is gone); saved" in launcher.communicate(timeout=PATIENCE_S)[1]
    assert not psutil.wait_procs(left_behind, timeout=PATIENCE_S)[1]
    run.assert_saved("the launcher is gone")


def test_a_run_out_of_hours_ends_in_the_same_way(data_folder: Path, tmp_path: Path) -> None:
    """Even before its first step, when there is nothing to save."""
    run = EndlessRun(data_folder, tmp_path)
    (rank,) = run.start_ranks("--max_hours", "1e-4", world_size=1)
    output = rank.communicate(timeout=PATIENCE_S)[1]
    assert rank.returncode == 0, output
    assert "stopped at step 0 of 100000 (--max_hours); the same command goes on from there" in output
    assert read_records(run.folder)[-1]["reason"] == "--max_hours"
    assert run_command(["python", "-m", "pretrain.status", "--run", str(run.folder)]).returncode == 3


def test_the_survivors_of_a_killed_rank_name_it(data_folder: Path, tmp_path: Path) -> None:
    run = EndlessRun(data_folder, tmp_path)
    ranks = run.start_ranks()
    run.train_some_steps(ranks[0])
    ranks[1].kill()
    output = ranks[0].communicate(timeout=PATIENCE_S)[1]
    assert ranks[0].returncode == RETRY_STATUS
    assert "rank 0: no sign of life from rank 1, in " in output  # where it was at its last sign
    assert "Traceback" not in output


@pytest.mark.heavy
def test_a_host_that_is_gone_ends_the_others_and_the_next_start_goes_on(data_folder: Path, tmp_path: Path) -> None:
    """The second host's processes are killed all at once: launcher and rank."""
    run = EndlessRun(data_folder, tmp_path)
    nodes = run.start_nodes("--save_every_steps", "2")
    run.train_some_steps(nodes[0])
    of_host = [*psutil.Process(nodes[1].pid).children(recursive=True), psutil.Process(nodes[1].pid)]
    for process in of_host:
        process.kill()
    output = nodes[0].communicate(timeout=PATIENCE_S)[1]
    assert nodes[0].returncode != 0
    assert "rank 0: no sign of life from rank 1, in " in output  # where it was at its last sign
    saved = int(newest(run.folder).removeprefix("step"))
    nodes = run.start_nodes("--max_hours", "1e-4")
    outputs = [node.communicate(timeout=PATIENCE_S)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert f"resumed from step {saved} of 100000" in outputs[0]


@pytest.mark.heavy
def test_a_rank_that_is_stopped_ends_the_others_and_is_named(data_folder: Path, tmp_path: Path) -> None:
    run = EndlessRun(data_folder, tmp_path)
    ranks = run.start_ranks("--watchdog_minutes", "5")
    try:
        run.train_some_steps(ranks[0])
        ranks[1].send_signal(signal.SIGSTOP)
        output = ranks[0].communicate(timeout=PATIENCE_S)[1]
        assert ranks[0].returncode == RETRY_STATUS
        assert "no sign of life from rank 1" in output
        log = (run.folder / "logs" / "rank_00000.log").read_text()
        assert "Current thread" in log
        assert 'pretrain/train.py", line ' in log.partition("Current thread")[2]  # where the main thread waits
    finally:
        os.kill(ranks[1].pid, signal.SIGKILL)
        ranks[1].communicate()
