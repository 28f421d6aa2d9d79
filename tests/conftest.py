"""Fixtures for all tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, start_browser
from ranks import Ranks
from slurm import start_slurm
from support import REPOSITORY, TESTS_MARK, kill_left_processes
from two_hosts import TwoHosts, start_two_hosts

from benchmarks.text import make_data, make_tokenizer
from data_prep.parameters import BuildParameters

LONGEST_FIRST = (
    "test_readme.py", "test_study.py", "test_run.py", "test_slurm.py", "test_stopping.py", "test_launching.py", "test_elastic.py",
    "test_guard.py", "test_engine.py", "test_watchdog.py", "test_classify.py", "test_seq2seq.py", "test_restart.py", "test_export.py",
)  # fmt: skip

HEAVY_FIXTURES = {"browser", "slurm", "two_hosts"}


def pytest_configure() -> None:
    """Mark what the tests start; pytest's own worker processes inherit the mark."""
    os.environ.setdefault(TESTS_MARK, uuid.uuid4().hex)
    resource_tracker.ensure_running()  # else the first test that needs it owns it


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Also after Ctrl-C, leave nothing running."""
    if not hasattr(session.config, "workerinput"):
        kill_left_processes()


@pytest.fixture(autouse=True)
def end_what_it_started(request: pytest.FixtureRequest) -> Iterator[None]:
    """So that a failed test does not take the cores from the next."""
    yield
    if {"slow", "heavy"} & set(request.keywords):
        kill_left_processes(request.node.nodeid)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of programs that only `./setup.sh all` installs; sort the longest files to the front, so that both
    processes end at about the same time."""
    for item in items:
        if HEAVY_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("heavy")
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
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium."""
    with start_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git would hand out, with the environment that is already there; each module writes into its own.

    Only the number of training steps is smaller: ds_configs/zero2_local.json and the study's plan are cut down to three. What
    the study takes from packages is there, made of the sample corpus.
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
    plan = folder / "benchmarks" / "study" / "plan.py"
    content, num_steps = re.subn("(?m)^TOTAL_STEPS = .*$", "TOTAL_STEPS = 3", plan.read_text())
    content, num_sizes = re.subn("(?m)^VOCAB_SIZE = .*$", "VOCAB_SIZE = 600", content)
    assert num_steps == num_sizes == 1
    plan.write_text(content)
    made = _make_corpora(folder / "data" / "corpora")
    (folder / "benchmarks" / "corpora" / "sha256.json").write_text(json.dumps(made))
    (folder / "my_texts").mkdir()
    for chapter in sorted((REPOSITORY / "sample_corpus" / "pride_and_prejudice").glob("*.txt"))[:40]:
        shutil.copy2(chapter, folder / "my_texts")
    return folder


def _make_corpora(output: Path) -> dict[str, str]:
    """Make what the README's study needs, as benchmarks.corpora does, but of paragraphs of a novel; return its files' hashes."""
    from benchmarks.corpora.output import make_entry
    from benchmarks.corpora.registry import ENTRIES
    from benchmarks.study.plan import TEXTS, WRITING

    chapters = sorted((REPOSITORY / "sample_corpus" / "pride_and_prejudice").glob("*.txt"))
    paragraphs = [line for path in chapters for line in path.read_text("utf-8").splitlines() if len(line.split()) > 8]
    texts = [" ".join(paragraph.split()[:20]) for paragraph in paragraphs]
    parts = {"train": texts[:150], "validation": texts[150:180], "test": texts[180:200]}
    rows: dict[str, Any] = {name: [[p] for p in paragraphs[i :: len(TEXTS)]] for i, name in enumerate(TEXTS)}
    rows["wordnet-lexname"] = {
        part: [("act" if "he" in text.split() else "artifact", text) for text in of_part]
        for part, of_part in parts.items()
    }
    rows[WRITING] = {part: [(text, text.split()[0]) for text in of_part] for part, of_part in parts.items()}
    hashes = {}
    for name, made in rows.items():
        entry = replace(ENTRIES[name], make=lambda _, made=made: made)
        files = make_entry(entry, output, output, any_version=True)["files"]
        hashes |= {file: about["sha256"] for file, about in files.items()}
    return hashes


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve chapters of the sample corpus as a data set: samples of 64 tokens, two mask sets."""
    folder = tmp_path_factory.mktemp("data")
    corpus = sorted((REPOSITORY / "sample_corpus" / "pride_and_prejudice").glob("chapter_0*.txt"))
    corpus.append(REPOSITORY / "sample_corpus" / "devils_dictionary.jsonl")
    tokenizer = make_tokenizer(corpus, folder / "tokenizer.model", vocab_size=1000)
    parameters = BuildParameters(max_length_tokens=64, mask_sets=2, validation_fraction=0.1, shard_samples=512)
    return make_data(corpus, tokenizer.path, folder / "set", parameters)


@pytest.fixture(scope="session")
def forking_ranks() -> Iterator[Ranks]:
    """Four processes that fork into the ranks of runs of one to four ranks: `forking_ranks(function, *arguments)`."""
    ranks = Ranks(4, is_joined=False)
    yield ranks
    ranks.end()
