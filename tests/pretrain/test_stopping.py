"""Being asked to end, each way, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support import PATIENCE_S, REPOSITORY

from pretrain.stopping import REASONS, agreed_reason

PROGRAM = """
import ctypes, sys, time
from pretrain.stopping import Stopping, agreed_reason
with Stopping(float(sys.argv[1])) as stopping:
    print("ready", flush=True)
    while not any(stopping.vote()):
        time.sleep(0.01)
    print(agreed_reason(stopping.vote()), flush=True)
    if sys.argv[2:]:  # as inside a collective that hangs: no Python code runs in the main thread
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    """The program, listening."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGINT, "Ctrl-C")]
)
def test_a_signal_is_noted_and_ends_nothing(number: int, reason: str) -> None:
    process = start("0")
    process.send_signal(number)
    assert process.communicate(timeout=PATIENCE_S)[0] == f"{reason}\n"
    assert process.returncode == 0


def test_a_second_ctrl_c_leaves_at_once_even_out_of_a_hanging_collective() -> None:
    process = start("0", "hang")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # the same one, as a launcher passes it on
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130


def test_max_hours_counts_from_the_start_of_the_process() -> None:
    process = start(str(3 / 3600))
    started = psutil.Process(process.pid).create_time()
    assert process.communicate(timeout=PATIENCE_S)[0] == "--max_hours\n"
    assert time.time() - started >= 3


def test_a_launcher_that_is_gone_is_a_reason_and_a_shell_is_not(tmp_path: Path) -> None:
    for name, is_watched in (("torchrun", True), ("shell", False)):
        launcher = tmp_path / name
        launcher.write_text(
            "import subprocess, sys\n"
            f"child = subprocess.Popen([sys.executable, '-c', {PROGRAM!r}, '0'], cwd={str(REPOSITORY)!r})\n"
            "child.wait()\n"
        )
        process = subprocess.Popen([sys.executable, launcher], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        child = psutil.Process(process.pid).children()[0]
        process.kill()
        if is_watched:
            assert process.stdout.readline() == "the launcher is gone\n"
        else:
            with pytest.raises(psutil.TimeoutExpired):
                child.wait(3)
            child.terminate()
            assert process.stdout.readline() == "SIGTERM\n"
        process.stdout.close()
        process.wait()


def test_the_ranks_agree_on_the_first_reason_that_any_has() -> None:
    assert agreed_reason([0.0] * len(REASONS)) is None
    for place, reason in enumerate(REASONS):
        votes = [0.0] * place + [2.0] + [1.0] * (len(REASONS) - place - 1)
        assert agreed_reason(votes) == reason
