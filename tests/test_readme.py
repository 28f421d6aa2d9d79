"""Every command of the README runs as it is written, in a fresh copy of the repository."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from support import HOSTFILE_COMMAND, REPOSITORY, run_in_shell

pytestmark = pytest.mark.slow

THESE_TESTS = {"make test"}


def readme_commands() -> list[str]:
    """The lines of all bash blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def readme_python() -> str:
    """The Python block."""
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    return str(block)


def test_every_command_runs(copy: Path) -> None:
    commands = readme_commands()
    assert HOSTFILE_COMMAND in commands
    outputs = {
        command: run_in_shell(command, copy)
        for command in commands
        if command not in THESE_TESTS and command != HOSTFILE_COMMAND  # which test_hostfile.py runs
    }
    first = outputs["./run_pretrain.sh"]
    for expected in (
        "validation at step 0",
        "validation at step 3",
        "AE loss",
        "PAR loss",
        "tokens/s",
        "pretrain.export",
    ):
        assert expected in first
    assert "[launch.py" not in first  # DeepSpeed's own messages go to the log
    assert "faults" not in first
    assert (copy / "data" / "my_texts" / "manifest.json").exists()
    assert list((copy / "runs" / "my_texts" / "checkpoints").glob("step*"))
    assert (copy / "runs" / "pretrain" / "export" / "model.safetensors").exists()

    assert (copy / "runs" / "study" / "pretrain" / "ae_par-0" / "export" / "model.safetensors").exists()
    assert (copy / "runs" / "glosses" / "summary.json").exists()

    assert len([line for line in readme_python().splitlines() if line]) <= 5
    predicted = run_in_shell(f"python -c {shlex.quote(readme_python())}", copy)
    assert re.match(r"\['(austen|bierce)', '(austen|bierce)'\] \[\[", predicted)

    second = run_in_shell("./run_pretrain.sh", copy)
    assert "nothing to do" in second
    assert "resumed from step 3 of 3" in second
    assert "nothing left to train" in second


def test_the_picture_is_the_layouts() -> None:
    sys.path.insert(0, str(REPOSITORY / "docs"))
    import draw_layout

    assert draw_layout.OUTPUT.read_text() == draw_layout.draw()


@pytest.mark.parametrize("page", [Path("README.md"), *sorted(Path("docs").glob("*.md"))], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = (REPOSITORY / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (REPOSITORY / page.parent / target).exists(), target
