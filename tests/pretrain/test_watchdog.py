"""Ranks that only watch each other, over a real store: one is stopped, killed, stuck or gone with a word."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from support import PATIENCE_S, REPOSITORY, free_port

from pretrain.watchdog import RETRY_STATUS

RANK = """
import datetime, sys, time
from torch.distributed import TCPStore
from pretrain.watchdog import Watch
rank, port, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = TCPStore("127.0.0.1", port, 3, is_master=rank == 0, timeout=datetime.timedelta(seconds=60))
with Watch(store.clone(), rank, 3, 0.07, sys.stdout) as watch:
    print("ready", flush=True)
    for step in range(10_000):
        if rank == 1 and mode == "stuck" and step >= 10:
            time.sleep(60)
        if rank == 1 and mode == "ended" and step == 10:
            raise ValueError("shard 7 is damaged")
        watch.progress(f"step {step}")
        time.sleep(0.1)
        if mode == "collective" and step == 30:
            print(watch.lost_rank(), flush=True)
"""


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[list[subprocess.Popen[str]]]:
    """Three of them; without progress or a beat for 4.2 s they end."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), port, request.param], cwd=REPOSITORY, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [""], indirect=True)
@pytest.mark.parametrize(
    ("victim", "named"), [(2, "no sign of life from rank 2, in step "), (0, "rank 0 or its launcher, which keeps the")]
)
def test_a_stopped_rank_is_named_by_the_others_which_end(
    ranks: list[subprocess.Popen[str]], victim: int, named: str
) -> None:
    time.sleep(1)
    ranks[victim].send_signal(signal.SIGSTOP)
    for rank, process in enumerate(ranks):
        if rank != victim:
            output, log = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == RETRY_STATUS
            assert output.startswith(f"rank {rank}, in step "), output
            assert named in output
            assert "most recent call first" in log  # the stacks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [""], indirect=True)
def test_a_job_that_is_suspended_and_continued_goes_on(ranks: list[subprocess.Popen[str]]) -> None:
    time.sleep(1)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in ranks:
            process.send_signal(number)
        time.sleep(8)
    assert [process.poll() for process in ranks] == [None, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["stuck"], indirect=True)
def test_a_rank_without_progress_ends_with_its_stacks(ranks: list[subprocess.Popen[str]]) -> None:
    output, log = ranks[1].communicate(timeout=PATIENCE_S)
    assert ranks[1].returncode == RETRY_STATUS
    assert output.startswith("rank 1, in step 9: no progress for 0.07 minutes; furthest behind: ")
    assert "rank 1, in step 9;" in output.partition("behind: ")[2]
    assert 'File "<string>", line 11 in <module>' in log  # where it sleeps


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["collective"], indirect=True)
@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_failed_collective_the_killed_rank_is_named(ranks: list[subprocess.Popen[str]], victim: int) -> None:
    ranks[victim].kill()
    assert ranks[2].stdout
    words = ranks[2].stdout.readline()
    assert f"rank {victim}" in words
    assert "rank 2" not in words


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["ended"], indirect=True)
def test_a_rank_that_ends_for_a_reason_is_quoted(ranks: list[subprocess.Popen[str]]) -> None:
    for rank in (0, 2):
        assert "rank 1 ended: ValueError: shard 7 is damaged; " in ranks[rank].communicate(timeout=PATIENCE_S)[0]
        assert ranks[rank].returncode == RETRY_STATUS
