"""Every command of the README runs as it is written, in a fresh copy of the repository."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from support import HOSTFILE_COMMAND, REPOSITORY, run_in_shell

FIRST = "./run_pretrain.sh"
THESE_TESTS = {"make test", "make test-all"}


def readme_commands() -> list[str]:
    """The lines of all bash blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def readme_python() -> str:
    """The Python block."""
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    return str(block)


@pytest.mark.slow
@pytest.mark.old_processor
def test_the_first_command_trains_and_again_has_nothing_to_do(copy: Path) -> None:
    assert readme_commands()[0] == FIRST
    first = run_in_shell(FIRST, copy)
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
    second = run_in_shell(FIRST, copy)
    assert "nothing to do" in second
    assert "resumed from step 3 of 3" in second
    assert "nothing left to train" in second


@pytest.mark.heavy
def test_every_other_command_runs(copy: Path) -> None:
    commands = readme_commands()
    assert HOSTFILE_COMMAND in commands
    for command in commands:
        if command not in {FIRST, HOSTFILE_COMMAND, *THESE_TESTS}:  # test_launching.py runs that of the hostfile
            run_in_shell(command, copy)
    assert (copy / "data" / "my_texts" / "manifest.json").exists()
    assert list((copy / "runs" / "my_texts" / "checkpoints").glob("step*"))
    assert (copy / "runs" / "pretrain" / "export" / "model.safetensors").exists()

    assert (copy / "runs" / "study" / "pretrain" / "ae_par-0" / "export" / "model.safetensors").exists()
    assert (copy / "runs" / "glosses" / "summary.json").exists()

    assert len([line for line in readme_python().splitlines() if line]) <= 5
    predicted = run_in_shell(f"python -c {shlex.quote(readme_python())}", copy)
    assert re.match(r"\['(austen|bierce)', '(austen|bierce)'\] \[\[", predicted)


def test_the_picture_is_the_layouts() -> None:
    sys.path.insert(0, str(REPOSITORY / "docs"))
    import draw_layout

    assert draw_layout.OUTPUT.read_text() == draw_layout.draw()


@pytest.mark.parametrize("page", [Path("README.md"), *sorted(Path("docs").glob("*.md"))], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = (REPOSITORY / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (REPOSITORY / page.parent / target).exists(), target
