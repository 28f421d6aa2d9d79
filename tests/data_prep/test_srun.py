"""The same data set from `srun`, on two nodes of a real Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from held_build import Hold
from support import PATIENCE_S, REPOSITORY, assert_user_error, environment, files_of

from data_prep.shards import MANIFEST
from data_prep.tokenizer import Tokenizer

SETTINGS = {"max_length_tokens": 16, "shard_samples": 128, "mask_sets": 4, "validation_fraction": 0.2}


@pytest.fixture
def words(chapters: list[Path], tokenizer: Tokenizer, tmp_path: Path) -> list[str]:
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    corpus = map(str, chapters)
    return ["build", "--corpus", *corpus, "--tokenizer", str(tokenizer.path), "--data", str(tmp_path / "data"), *flags]


@pytest.fixture
def command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "data_prep", *words]


def start(slurm: dict[str, str], *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["srun", *words], cwd=REPOSITORY, env=environment(**slurm), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip


def processes_of(command: list[str]) -> list[int]:
    """Those that Slurm's daemons have started: srun has the same words, behind others."""
    words = "\0".join(command).encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(words):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_killed_rank_ends_the_job_and_the_next_gives_the_bytes_of_one_process(
    slurm: dict[str, str], words: list[str], command: list[str], chapters: list[Path], tmp_path: Path,
    build_data: Callable[..., bool],
) -> None:  # fmt: skip
    two_ranks = ["--mpi=pmix", "--nodes=2", "--ntasks=2"]
    hold = Hold(tmp_path / "hold", 2 * len(chapters) + 40)
    held = hold.command(*words)
    killed = start(slurm, *two_ranks, *held)
    while not hold.is_reached():
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.01)
    ranks = processes_of(held)
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    errors = killed.communicate(timeout=PATIENCE_S)[1]
    assert killed.returncode != 0
    assert f"error: was killed, for example for want of memory; the last lines of {tmp_path}/data/logs/*.log" in errors
    assert not (tmp_path / "data" / MANIFEST).exists()
    assert not processes_of(held)

    done = start(slurm, *two_ranks, *command)
    output, errors = done.communicate(timeout=PATIENCE_S)
    assert done.returncode == 0, errors
    assert output.count("documents: ") == 1
    assert (tmp_path / "data" / "logs" / "rank-0001.log").is_file()
    assert build_data(chapters, tmp_path / "alone", **SETTINGS)
    assert files_of(tmp_path / "data") == files_of(tmp_path / "alone")


def test_srun_without_mpi_is_refused(slurm: dict[str, str], command: list[str], tmp_path: Path) -> None:
    """Each process would make the whole data set, in the same folder."""
    alone = start(slurm, "--mpi=none", "--ntasks=2", *command)
    output, errors = alone.communicate(timeout=PATIENCE_S)
    errors = "\n".join(line for line in errors.splitlines() if not line.startswith("srun: error:"))
    done = subprocess.CompletedProcess(command, alone.returncode, output, errors)
    assert_user_error(done, "srun has started 2 processes without MPI", "srun --mpi=pmix")
    assert not (tmp_path / "data").exists()
