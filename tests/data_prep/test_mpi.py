"""The same data set from `mpirun`, and what becomes of a rank that fails or dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from held_build import Hold
from support import PATIENCE_S, REPOSITORY, environment, files_of

from data_prep.__main__ import make_parser
from data_prep.processes import launched_by_mpi, num_launched
from data_prep.shards import MANIFEST
from data_prep.tokenizer import Tokenizer

Build = Callable[..., bool]
SETTINGS = {"max_length_tokens": 16, "shard_samples": 128, "mask_sets": 4, "validation_fraction": 0.2}


def build_words(corpus: list[Path], tokenizer: Tokenizer, folder: Path) -> list[str]:
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    return ["build", "--corpus", *map(str, corpus), "--tokenizer", str(tokenizer.path), "--data", str(folder), *flags]


def mpirun(ranks: int, command: list[str]) -> list[str]:
    return ["mpirun", "--oversubscribe", "-n", str(ranks), *command]


def mpi_build(ranks: int, corpus: list[Path], tokenizer: Tokenizer, folder: Path) -> list[str]:
    return mpirun(ranks, [sys.executable, "-m", "data_prep", *build_words(corpus, tokenizer, folder)])


def mpi_environment() -> dict[str, str]:
    return environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=REPOSITORY, env=mpi_environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.fixture(scope="module")
def alone(chapters: list[Path], build_data: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the data set that one process makes."""
    folder = tmp_path_factory.mktemp("alone") / "data"
    assert build_data(chapters, folder, **SETTINGS)
    return files_of(folder)


@pytest.mark.heavy
@pytest.mark.parametrize("ranks", [1, 3])
def test_mpirun_gives_the_bytes_of_one_process(
    ranks: int, chapters: list[Path], tokenizer: Tokenizer, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    """Of several ranks each has a log, and each but the first, which conducts, has work."""
    done = run(mpi_build(ranks, chapters, tokenizer, tmp_path / "mpi"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("documents: ") == 1
    assert files_of(tmp_path / "mpi") == alone
    logs = {log.name: log.read_text() for log in (tmp_path / "mpi" / "logs").iterdir()}
    assert set(logs) == ({"main.log"} if ranks == 1 else {f"rank-{rank:04d}.log" for rank in range(ranks)})
    for name, log in logs.items():
        assert ("finished draw masks train-" in log) == (name != "rank-0000.log")
        assert log.count("started ") == log.count("finished ")
    assert ("slowest: rank " in done.stderr) == (ranks > 1)


@pytest.mark.heavy
def test_an_error_of_the_conductor_is_told_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    done = run(mpi_build(2, [tmp_path / "none"], tokenizer, tmp_path / "mpi"))
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "no such corpus" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.heavy
def test_what_fails_on_one_rank_ends_the_job_with_its_reason(
    chapters: list[Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Enough text for a unit on each of the ranks; the last one is not UTF-8."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(2):
        (corpus / f"{index}.txt").write_bytes(b"\n\n".join(chapter.read_bytes() for chapter in chapters) * 13)
    with open(corpus / "1.txt", "ab") as file:
        file.write(b"caf\xe9")
    done = run(mpi_build(3, [corpus], tokenizer, tmp_path / "mpi"))
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    (rank,) = {word for word in done.stderr.split(": error: ")[0].splitlines()[-1].split() if word.isdigit()}
    assert f"rank {rank}: error: {corpus / '1.txt'}: not UTF-8 at byte" in done.stderr
    log = (tmp_path / "mpi" / "logs" / f"rank-{int(rank):04d}.log").read_text()
    assert "Traceback" in log
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "mpi" / MANIFEST).exists()


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.heavy
def test_a_job_killed_again_and_again(
    chapters: list[Path], tokenizer: Tokenizer, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    """A rank while it starts; one at a moment drawn by chance; mpirun itself. Then the job goes on to its end."""
    words, draw = build_words(chapters, tokenizer, tmp_path / "mpi"), random.Random(0)
    hashing = 2 * len(chapters)
    for victim, num_events in (
        ("rank that starts", 1), ("rank", hashing + draw.randrange(20, 80)), ("mpirun", hashing + draw.randrange(20, 80)),
    ):  # fmt: skip
        hold = Hold(tmp_path / victim, num_events)
        command = mpirun(2, hold.command(*words))
        process = subprocess.Popen(command, cwd=REPOSITORY, env=mpi_environment(), stderr=subprocess.PIPE, text=True)
        wait_until(lambda: len(ranks_of(process)) == 2, process)  # noqa: B023
        ranks = ranks_of(process)
        if victim != "rank that starts":
            wait_until(hold.is_reached, process)
        os.kill(process.pid if victim == "mpirun" else draw.choice(ranks), signal.SIGKILL)
        errors = process.communicate(timeout=PATIENCE_S)[1]
        assert process.returncode != 0
        if victim == "rank":
            assert (
                f"error: was killed, for example for want of memory; the last lines of {tmp_path}/mpi/logs/" in errors
            )
        wait_until(lambda: not any(map(is_alive, ranks)))  # noqa: B023
        assert not (tmp_path / "mpi" / MANIFEST).exists()
    done = run(mpi_build(2, chapters, tokenizer, tmp_path / "mpi"))
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "mpi") == alone


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


# ---- what the launcher tells


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "SLURM_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "launched", "is_mpi"),
    [
        ({}, 1, False),
        ({"OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1"}, 4, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, 1, False),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, 3, True),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "PMIX_RANK": "1"}, 2, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "PMIX_RANK": "0"}, 1, False),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1, False),  # the script that sbatch runs, once
        ({"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "8"}, 8, True),  # mpirun in a job of two nodes
    ],
)
def test_who_is_a_rank(variables: dict[str, str], launched: int, is_mpi: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (num_launched(), launched_by_mpi()) == (launched, is_mpi)


def test_workers_and_ranks_exclude_each_other(
    chapters: list[Path], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = build_words(chapters, tokenizer, tmp_path / "mpi")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    args = make_parser().parse_args([*words, "--workers", "2"])
    with pytest.raises(ValueError, match="--workers is for one machine"):
        args.run(args)
