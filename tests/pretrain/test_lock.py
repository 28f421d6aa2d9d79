"""Two trainings of one run."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY

from pretrain.lock import hold_run

HOLDER = "import sys, time; from pathlib import Path; from pretrain.lock import hold_run; " + (
    "held = hold_run(Path(sys.argv[1]), sys.stderr); print('held', flush=True); time.sleep(60)"
)


def test_the_second_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert holder.stdout
    try:
        assert holder.stdout.readline() == b"held\n"
        console = io.StringIO()
        with pytest.raises(ValueError, match=f"is being trained by process {holder.pid} on .*choose another folder"):
            hold_run(tmp_path, console, patience_s=0)
    finally:
        holder.kill()
        holder.wait()
    with hold_run(tmp_path, console):
        assert (tmp_path / "lock").read_text().count("process") == 1
