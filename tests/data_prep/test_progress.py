"""What is shown of hours of work, and what the logs of its processes tell."""

from __future__ import annotations

import os
import pty
import re
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.processes import LocalProcesses
from data_prep.progress import Progress, Stage, Work
from data_prep.tokenizer import load_tokenizer

RANKS = [f"rank {rank}" for rank in range(4)]


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Done of all, earlier runs included; documents, tokens a second, and who has done the least."""
    clock = iter([10.0, *[10.2] * 99])
    monkeypatch.setattr("data_prep.progress.time", SimpleNamespace(monotonic=lambda: next(clock), time=time.time))
    with Progress(Stage("tokenize", 1000, "B", done=200), RANKS, is_shown=True) as progress:
        for rank, size in enumerate([100, 200, 50, 250]):
            progress.add(Work(size, documents=2, tokens=1000, process=f"rank {rank}"))
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("tokenize:  20%")
    found = re.search(r" 80%.* 800/1\.00k \[.*B/s, 8 documents, ([0-9,]+) tokens/s, (.*)\]", last)
    assert found
    assert found[1] == "20,000"
    assert found[2] == "slowest: rank 2 with 33% of the mean, heard 0 s ago"


def test_one_process_is_not_slower_than_others(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(Stage("draw masks", 10, "sample"), ["main"], is_shown=True) as progress:
        progress.add(Work(10, process="main"))
    assert "10/10" in capsys.readouterr().err
    with Progress(Stage("draw masks", 10, "sample"), ["main"], is_shown=False) as progress:
        progress.add(Work(10, process="main"))
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_terminal_shows_that_nothing_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, terminal = pty.openpty()
    os.set_blocking(reader, False)
    termios.tcsetwinsize(terminal, (24, 160))
    with os.fdopen(terminal, "w") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        with Progress(Stage("tokenize", 1000, "B"), RANKS, is_shown=True) as progress:
            progress.add(Work(100, process="rank 0"))
            time.sleep(1.5)
            shown = os.read(reader, 2**16).decode()
    os.close(reader)
    assert "slowest: rank 1 with 0% of the mean, heard 1 s ago" in shown


def run_missing_tokenizer(folder: Path) -> None:
    with LocalProcesses(2) as processes:
        processes.prepare(load_tokenizer, folder / "missing", log_folder=folder / "logs")
        processes.run(Work, [(1,), (2,)], Stage("count", 3, "B"))


def test_why_no_worker_could_start(tmp_path: Path) -> None:
    """Not that the pool is broken."""
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        run_missing_tokenizer(tmp_path)
    logs = {log.name: log.read_text() for log in (tmp_path / "logs").iterdir()}
    assert "failed by" not in logs["main.log"], "what a worker tells, in a log that it has from its parent"
    assert "Traceback" in logs["worker-0000.log"]


def run_and_fail(log_folder: Path) -> None:
    with LocalProcesses(1) as processes:
        processes.prepare(lambda: None, log_folder=log_folder)
        done: list[Work] = []
        processes.run(Work, [(5, 1, 30), (6, 2, 40)], Stage("count", 11, "B"), done.append)
        assert [(work.size, work.documents, work.tokens, work.process) for work in done] == [
            (5, 1, 30, "main"), (6, 2, 40, "main"),
        ]  # fmt: skip
        processes.run(Work, [("one", "word", "too", "many", "for", "it", "here")], Stage("fail", 1, "B"))


def test_a_log_tells_tasks_and_errors_and_is_appended_to(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(TypeError):
            run_and_fail(tmp_path)
    log = (tmp_path / "main.log").read_text()
    stamp = rf"^\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} {os.uname().nodename} {os.getpid()} "
    finished = r"INFO finished count 5 1 30: 5 B, 1 documents, 30 tokens, \d\.\d{3} s$"
    for line in (
        "INFO started count 5 1 30$",
        finished,
        "INFO started fail one word",
        "ERROR ended by TypeError\nTrace",
    ):
        assert len(re.findall(stamp + line, log, re.MULTILINE)) == 2
