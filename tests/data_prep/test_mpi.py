"""The same data set from `mpirun`, and what becomes of a rank that fails or dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import REPOSITORY, environment

from data_prep.shards import MANIFEST
from data_prep.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


def mpi_build(ranks: int, corpus: list[Path], tokenizer: Tokenizer, folder: Path, *more: str) -> list[str]:
    return [
        "mpirun", "--oversubscribe", "-n", str(ranks), sys.executable, "-m", "data_prep", "build", "--corpus",
        *map(str, corpus), "--tokenizer", str(tokenizer.path), "--data", str(folder), "--max_length_tokens", "16",
        "--shard_samples", "128", "--mask_sets", "2", "--validation_fraction", "0.2", *more,
    ]  # fmt: skip


def mpi_environment() -> dict[str, str]:
    return environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=REPOSITORY, env=mpi_environment(), capture_output=True, text=True, timeout=120, check=False
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_mpirun_gives_the_bytes_of_one_process(
    ranks: int, chapters: list[Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    done = run(mpi_build(ranks, chapters[:12], tokenizer, tmp_path / "mpi"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("documents: ") == 1
    alone = mpi_build(1, chapters[:12], tokenizer, tmp_path / "alone", "--workers", "2")[4:]
    assert run(alone).returncode == 0
    assert files_of(tmp_path / "mpi") == files_of(tmp_path / "alone")


def test_an_error_that_all_ranks_share_is_told_once(chapters: list[Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    done = run(mpi_build(3, [tmp_path / "none"], tokenizer, tmp_path / "mpi"))
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "no such corpus" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_fails_on_one_rank_ends_the_job_with_its_reason(
    chapters: list[Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Enough text for a unit on each of the ranks; the last one is not UTF-8."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(3):
        (corpus / f"{index}.txt").write_bytes(b"\n\n".join(chapter.read_bytes() for chapter in chapters) * 13)
    with open(corpus / "2.txt", "ab") as file:
        file.write(b"caf\xe9")
    done = run(mpi_build(3, [corpus], tokenizer, tmp_path / "mpi"))
    assert done.returncode != 0
    assert "rank " in done.stderr
    assert "2.txt: not UTF-8 at byte" in done.stderr
    assert not (tmp_path / "mpi" / MANIFEST).exists()


def test_a_rank_that_is_killed_ends_the_job_and_the_next_one_goes_on(
    chapters: list[Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    command = mpi_build(2, chapters[:40], tokenizer, tmp_path / "mpi")
    process = subprocess.Popen(command, cwd=REPOSITORY, env=mpi_environment(), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "mpi" / "train-00002.h5").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "signal 9" in errors
    assert not (tmp_path / "mpi" / MANIFEST).exists()
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert run(mpi_build(1, chapters[:40], tokenizer, tmp_path / "clean")).returncode == 0
    assert files_of(tmp_path / "mpi") == files_of(tmp_path / "clean")


def test_workers_and_ranks_exclude_each_other(chapters: list[Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    done = run(mpi_build(2, chapters[:1], tokenizer, tmp_path / "mpi", "--workers", "2"))
    assert done.returncode == 2
    assert "--workers is for one machine" in done.stderr
