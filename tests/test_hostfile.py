"""The README's way onto several hosts, over real pdsh and sshd."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import HOSTFILE_COMMAND, free_port, run_in_shell
from two_hosts import TwoHosts

pytestmark = pytest.mark.slow


def test_without_data_the_command_that_makes_it_is_named(copy: Path, two_hosts: TwoHosts) -> None:
    done = two_hosts.run(HOSTFILE_COMMAND, copy)
    errors = [line for line in done.splitlines() if "error:" in line and "run_pretrain.py" in line]
    assert 1 <= len(errors) <= 2, done  # a host each, at most
    for error in errors:
        assert "data/pretrain: no data set there" in error
        assert "python -m data_prep build" in error
    assert "Traceback" not in done


def test_two_hosts_train(copy: Path, two_hosts: TwoHosts, tmp_path: Path) -> None:
    corpus = "--corpus sample_corpus/pride_and_prejudice"
    run_in_shell(f"python -m data_prep train-tokenizer {corpus} --tokenizer data/t.model --vocab_size 1000", copy)
    run_in_shell(
        f"python -m data_prep build {corpus} --tokenizer data/t.model --data data/two --max_length_tokens 64", copy
    )
    command = HOSTFILE_COMMAND.replace("zero2.json", "zero2_local.json")
    command = command.replace("--hostfile hosts", f"--hostfile hosts --master_port {free_port()}")
    done = two_hosts.run(f"{command} --data data/two --run {tmp_path / 'run'} --model tiny", copy)
    assert "x 2 ranks" in done, done
    assert "validation at step 3" in done
    assert (tmp_path / "run" / "checkpoints" / "step00000003" / "manifest.json").exists()
    assert (tmp_path / "run" / "logs" / "rank_00001.log").exists()
