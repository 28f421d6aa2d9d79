"""Fixtures for all tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Ranks
from slurm import start_slurm
from support import REPOSITORY
from two_hosts import TwoHosts, start_two_hosts

from data_prep.build import build
from data_prep.corpus import find_sources, read_documents
from data_prep.mixture import Corpus
from data_prep.parameters import BuildParameters
from data_prep.processes import LocalProcesses
from data_prep.tokenizer import train_tokenizer

LONGEST_FIRST = (
    "test_readme.py", "test_run.py", "test_restart.py", "test_launching.py", "test_slurm.py", "test_doctor.py", "test_engine.py", "test_export.py",
    "test_mpi.py", "test_command_line.py", "test_execution.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """So that at the end no process is left alone with a long file."""
    items.sort(key=lambda item: (*LONGEST_FIRST, item.path.name).index(item.path.name))


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Two hosts that DeepSpeed's launcher reaches over pdsh and ssh."""
    yield from start_two_hosts(tmp_path_factory.mktemp("two_hosts"))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A private Slurm of two nodes: what is to be in the environment of `srun` and `sbatch`."""
    with start_slurm(tmp_path_factory.mktemp("slurm"), num_nodes=2) as changes:
        yield changes


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two processes that act as ranks: `two_ranks(function, *arguments)`."""
    ranks = Ranks(2)
    yield ranks
    ranks.end()


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git would hand out, with the environment that is already there.

    Only the number of training steps is smaller: ds_configs/zero2_local.json is cut down to three.
    """
    folder = tmp_path_factory.mktemp("copy")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    local = folder / "ds_configs" / "zero2_local.json"
    values = json.loads(local.read_text())
    values["scheduler"]["params"] |= {"total_num_steps": 3, "warmup_num_steps": 1}
    local.write_text(json.dumps(values))
    (folder / "my_texts").mkdir()
    for chapter in sorted((REPOSITORY / "sample_corpus" / "pride_and_prejudice").glob("*.txt"))[:40]:
        shutil.copy2(chapter, folder / "my_texts")
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve chapters of the sample corpus as a data set: samples of 64 tokens, two mask sets."""
    folder = tmp_path_factory.mktemp("data")
    corpus = sorted((REPOSITORY / "sample_corpus" / "pride_and_prejudice").glob("chapter_0*.txt"))
    corpus.append(REPOSITORY / "sample_corpus" / "devils_dictionary.jsonl")
    lines = (line for document in read_documents(find_sources(corpus)) for line in document.lines)
    train_tokenizer(lines, folder / "tokenizer.model", vocab_size=1000)
    parameters = BuildParameters(max_length_tokens=64, mask_sets=2, validation_fraction=0.1, shard_samples=512)
    with LocalProcesses(1) as processes:
        build([Corpus(corpus)], folder / "tokenizer.model", folder / "set", parameters, processes)
    return folder / "set"


@pytest.fixture(scope="session")
def forking_ranks() -> Iterator[Ranks]:
    """Four processes that fork into the ranks of runs of one to four ranks: `forking_ranks(function, *arguments)`."""
    ranks = Ranks(4, timeout_s=1200, is_joined=False)
    yield ranks
    ranks.end()
