"""The lines of a run on consoles of 80 and 120 columns, and the commands that it names."""

from __future__ import annotations

import os
import pty
import shlex
import termios
from pathlib import Path

import pytest

from data_prep.console import fitting, progress_bar
from pretrain.summary import summary
from pretrain.train import postfixes

MEANS = {"ae_loss": 6.948123, "ae_accuracy": 0.0012, "par_loss": 6.94, "par_accuracy": 0.002}


@pytest.mark.parametrize("columns", [80, 120, 200])
@pytest.mark.parametrize(("done", "total"), [(30, 300), (123_456, 500_000)])
def test_the_bar_keeps_rate_time_left_and_speed(columns: int, done: int, total: int) -> None:
    reader, terminal = pty.openpty()
    os.set_blocking(reader, False)
    termios.tcsetwinsize(terminal, (24, columns))
    with os.fdopen(terminal, "w") as stream, progress_bar("train", total, "step", stream=stream) as bar:
        bar.start_t -= 3600 * 9
        bar.n = done
        bar.set_postfix_str(fitting(bar, postfixes(MEANS, 1_234_567)), refresh=True)
        shown = os.read(reader, 2**16).decode().split("\r")[-1].rstrip("\n")
    os.close(reader)
    assert len(shown) <= columns
    assert shown.endswith("]")
    assert "step" in shown.partition("<")[2]
    assert "1.23M tokens/s" in shown
    assert ("AE 6.95 PAR 6.94" in shown or "ae loss 6.948" in shown) == (columns >= 120)


def test_the_ranks_without_a_bar_need_none() -> None:
    with progress_bar("train", 10, "step", is_shown=False) as bar:
        assert fitting(bar, postfixes(MEANS, 1000)) == ""


def test_the_commands_of_the_summary_can_be_copied(tmp_path: Path) -> None:
    run = tmp_path / "it's my run"
    run.mkdir()
    lines = summary(run).splitlines()
    (export,) = [line for line in lines if line.startswith("next ")]
    words = shlex.split(export)
    assert words[1:] == ["python", "-m", "pretrain.export", "--run", str(run), "--output", str(run / "export")]
    (report,) = [line for line in lines if line.startswith("report ")]
    assert shlex.split(report)[-1] == str(run)
