"""Every command of the README runs as it is written, in a fresh copy of the repository.

Only the number of training steps is smaller: the copy's ds_configs/zero2_local.json is cut down to six.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, environment
from two_hosts import TwoHosts

pytestmark = pytest.mark.slow

THESE_TESTS = {"make test"}
HOSTFILE_COMMAND = "deepspeed --hostfile hosts run_pretrain.py --deepspeed_config ds_configs/zero2.json"


def readme_commands() -> list[str]:
    """The lines of all bash blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git would hand out, with the environment that is already there."""
    folder = tmp_path_factory.mktemp("copy")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    local = folder / "ds_configs" / "zero2_local.json"
    values = json.loads(local.read_text())
    values["scheduler"]["params"] |= {"total_num_steps": 6, "warmup_num_steps": 2}
    local.write_text(json.dumps(values))
    (folder / "my_texts").mkdir()
    for chapter in sorted((REPOSITORY / "sample_corpus" / "pride_and_prejudice").glob("*.txt"))[:40]:
        shutil.copy2(chapter, folder / "my_texts")
    return folder


def run(command: str, folder: Path) -> str:
    """A command line in a shell, as a user types it; its stdout and stderr, together."""
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment(), text=True, timeout=300, check=False, executable="/bin/bash",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    assert "Traceback" not in done.stdout
    return done.stdout


def test_every_command_runs(copy: Path) -> None:
    commands = readme_commands()
    assert HOSTFILE_COMMAND in commands
    outputs = {
        command: run(command, copy)
        for command in commands
        if command not in THESE_TESTS and command != HOSTFILE_COMMAND
    }
    first = outputs["./run_pretrain.sh"]
    for expected in (
        "validation at step 0",
        "validation at step 6",
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

    second = run("./run_pretrain.sh", copy)
    assert "nothing to do" in second
    assert "resumed from step 6 of 6" in second
    assert "nothing left to train" in second


def test_the_hostfile_command_without_data_names_the_command_that_makes_it(copy: Path, two_hosts: TwoHosts) -> None:
    shutil.rmtree(copy / "data" / "pretrain", ignore_errors=True)
    done = two_hosts.run(HOSTFILE_COMMAND, copy)
    errors = [line for line in done.splitlines() if "error:" in line and "run_pretrain.py" in line]
    assert 1 <= len(errors) <= 2, done  # a host each, at most
    for error in errors:
        assert "data/pretrain: no data set there" in error
        assert "python -m data_prep build" in error
    assert "Traceback" not in done


def test_the_hostfile_command_trains_on_two_hosts(copy: Path, two_hosts: TwoHosts, tmp_path: Path) -> None:
    folder = copy / "data" / "two_hosts"
    corpus = "--corpus sample_corpus/pride_and_prejudice"
    run(f"python -m data_prep train-tokenizer {corpus} --tokenizer data/t.model --vocab_size 1000", copy)
    run(f"python -m data_prep build {corpus} --tokenizer data/t.model --data {folder} --max_length_tokens 64", copy)
    command = HOSTFILE_COMMAND.replace("zero2.json", "zero2_local.json")
    done = two_hosts.run(f"{command} --data {folder} --run {tmp_path / 'run'} --model tiny", copy)
    assert "x 2 ranks" in done
    assert "validation at step 6" in done
    assert (tmp_path / "run" / "checkpoints" / "step00000006" / "manifest.json").exists()
    assert (tmp_path / "run" / "logs" / "rank_00001.log").exists()


def test_the_picture_is_the_layouts() -> None:
    sys.path.insert(0, str(REPOSITORY / "docs"))
    import draw_layout

    assert draw_layout.OUTPUT.read_text() == draw_layout.draw()


@pytest.mark.parametrize("page", [Path("README.md"), *sorted(Path("docs").glob("*.md"))], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = (REPOSITORY / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (REPOSITORY / page.parent / target).exists(), target
