"""One run, whoever starts its ranks: the same curve from pdsh, mpirun and torchrun."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import (
    HOSTFILE_COMMAND,
    PATIENCE_S,
    REPOSITORY,
    assert_user_error,
    deepspeed_json,
    environment,
    free_port,
    run_command,
)
from two_hosts import HOSTS, TwoHosts, run_on_two_networks

from pretrain.metrics import MEASURED, read_records

pytestmark = pytest.mark.slow


def test_nobody_else_can_reach_the_sshd_of_these_tests(two_hosts: TwoHosts) -> None:
    sockets = psutil.Process(two_hosts.server).net_connections("inet")
    assert {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN} == set(HOSTS)


def test_without_data_the_command_that_makes_it_is_named(copy: Path, two_hosts: TwoHosts) -> None:
    done = two_hosts.run(HOSTFILE_COMMAND, copy)
    errors = [line for line in done.splitlines() if "error:" in line and "run_pretrain.py" in line]
    assert 1 <= len(errors) <= 2, done  # a host each, at most
    for error in errors:
        assert "data/pretrain: no data set there" in error
        assert "python -m data_prep build" in error
    assert "Traceback" not in done


@pytest.fixture(scope="module")
def flags(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run of three steps; --run is to be added."""
    schedule = {"warmup_max_lr": 1e-2, "warmup_num_steps": 1, "warmup_type": "linear", "total_num_steps": 3}
    config = deepspeed_json(
        tmp_path_factory.mktemp("config") / "ds.json", train_batch_size=8,
        scheduler={"type": "WarmupDecayLR", "params": schedule},
    )  # fmt: skip
    return [
        "run_pretrain.py", "--deepspeed_config", str(config), "--data", str(data_folder), "--model", "tiny",
        "--hidden_size", "32", "--intermediate_size", "64", "--dropout", "0.1", "--log_every_steps", "1",
        "--validation_samples", "64",
    ]  # fmt: skip


def curve(run: Path) -> list[dict[str, Any]]:
    """What a run of two ranks came to, but for what was measured."""
    records = read_records(run)
    assert [r["world_size"] for r in records if r["kind"] == "start"] == [2]
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in records if r["kind"] in ("train", "validation")]


@pytest.fixture(scope="module")
def pdsh_run(flags: list[str], two_hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pdsh") / "run"
    done = two_hosts.run(
        f"deepspeed --hostfile {run.parent}/hosts --master_port {free_port()} {' '.join(flags)} --run {run}", run.parent,
        cwd=REPOSITORY,
    )  # fmt: skip
    assert "x 2 ranks" in done, done
    return run


def test_two_hosts_train(pdsh_run: Path) -> None:
    assert [r["step"] for r in curve(pdsh_run) if r["kind"] == "train"] == [1, 2, 3]
    assert (pdsh_run / "checkpoints" / "step00000003" / "manifest.json").exists()
    assert (pdsh_run / "logs" / "rank_00001.log").exists()


def test_open_mpi_gives_the_same_run(pdsh_run: Path, flags: list[str], two_hosts: TwoHosts, tmp_path: Path) -> None:
    """Its ranks find rank 0 themselves: DeepSpeed's launcher does not tell them where it is."""
    done = two_hosts.run(
        f"deepspeed --hostfile {tmp_path}/hosts --launcher openmpi --launcher_args='--mca btl_tcp_if_include lo' "
        f"{' '.join(flags)} --run {tmp_path / 'run'}", tmp_path, cwd=REPOSITORY,
    )  # fmt: skip
    assert "x 2 ranks" in done, done
    assert curve(tmp_path / "run") == curve(pdsh_run)


def test_torchrun_on_two_nodes_gives_the_same_run(pdsh_run: Path, flags: list[str], tmp_path: Path) -> None:
    port = free_port()
    nodes = [
        subprocess.Popen(
            ["torchrun", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.2",
             f"--master_port={port}", "--", *flags, "--run", str(tmp_path / "run")],
            cwd=REPOSITORY, env=environment(GLOO_SOCKET_IFNAME="lo"), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for node in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=PATIENCE_S)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert curve(tmp_path / "run") == curve(pdsh_run)


def test_ranks_started_by_hand_on_two_hosts_give_the_same_run(pdsh_run: Path, flags: list[str], tmp_path: Path) -> None:
    """They are given what the error below asks for, and no more: nothing tells how many of them share a host."""
    done = run_on_two_networks(["python", *flags, "--run", str(tmp_path / "run")], tmp_path)
    assert done.returncode == 0, done.stdout
    assert curve(tmp_path / "run") == curve(pdsh_run)


def test_what_a_launcher_did_not_say_is_named() -> None:
    done = run_command(
        ["python", "run_pretrain.py", "--deepspeed_config", "ds_configs/zero2_local.json"], RANK="0", LOCAL_RANK="0",
        WORLD_SIZE="2",
    )  # fmt: skip
    assert_user_error(done, "RANK is set and MASTER_ADDR is not", "torchrun")
