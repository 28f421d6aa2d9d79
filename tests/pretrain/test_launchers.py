"""Ranks from what each launcher puts into the environment; tests/end_to_end starts the launchers themselves."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import PATIENCE_S, REPOSITORY, environment, free_port, run_command

from data_prep.console import available_cores
from pretrain.launchers import _LOCAL_SIZES, Place, find_place, hostfile_of, own_address, tasks_per_node

TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "5"
}  # fmt: skip
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "10", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8,2", "SLURM_JOB_ID": "20007", "MASTER_ADDR": "node1",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "b", "MASTER_PORT": "6",
}  # fmt: skip


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, Place()),
        (TORCHRUN, Place(3, 1, 4, 2, "a", 5)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"LOCAL_SIZE": "4"}, Place(3, 1, 4, 4, "a", 5)),  # DeepSpeed's name
        (SRUN, Place(9, 1, 10, 2, "node1", 12007)),
        (MPIRUN, Place(1, 0, 2, 1, "b", 6)),
        (SRUN | MPIRUN, Place(1, 0, 2, 1, "b", 6)),  # in a job, mpirun's daemons are srun's tasks
        (SRUN | MPIRUN | TORCHRUN | {"LOCAL_SIZE": "2"}, Place(3, 1, 4, 2, "a", 5)),
        (without(SRUN, "SLURM_STEP_ID"), Place()),  # the batch script itself
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "MASTER_ADDR": ""},
         Place(9, 1, 2, 2, "127.0.0.1", 12007)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), Place(3, 1, 4, None, "a", 5)),  # by hand: one host or several
        (without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"MASTER_ADDR": "127.0.0.2"}, Place(3, 1, 4, 4, "127.0.0.2", 5)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"MASTER_ADDR": "::1"}, Place(3, 1, 4, 4, "::1", 5)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"MASTER_ADDR": "localhost"}, Place(3, 1, 4, 4, "localhost", 5)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"WORLD_SIZE": "1", "RANK": "0"}, Place(0, 1, 1, 1, "a", 5)),
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, Place(master_addr="a", master_port=5)),
    ],
)  # fmt: skip
def test_the_place_is_what_the_innermost_launcher_says(environ: dict[str, str], place: Place) -> None:
    assert find_place(environ) == place


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (without(TORCHRUN, "MASTER_PORT"), "RANK is set and MASTER_PORT is not"),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is not set"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http', expected a number up to 65535"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1', expected a number"),
        (without(SRUN, "MASTER_ADDR"), "scontrol show hostnames"),
        (without(MPIRUN, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set"),
    ],
)
def test_what_is_missing_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_place(environ)


@pytest.mark.slow
def test_ranks_started_by_hand_are_no_one_host_until_they_are_counted() -> None:
    """Each rank is told what `find_place` asks for if it is not told, and an address that other hosts could reach."""
    assert not find_place(without(TORCHRUN, "LOCAL_WORLD_SIZE")).is_one_host
    code = (
        "import os, torch; from pretrain.distributed import join_ranks, leave_ranks; "
        "assert 'LOCAL_SIZE' not in os.environ; join_ranks(); print(os.environ['LOCAL_SIZE'], torch.get_num_threads()); "
        "leave_ranks()"
    )
    shared = {
        "WORLD_SIZE": "2", "MASTER_ADDR": own_address(), "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"
    }  # fmt: skip
    env = without(environment(**shared), "OMP_NUM_THREADS", *_LOCAL_SIZES)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=PATIENCE_S) for rank in ranks]
    assert [out for out, _ in outputs] == [f"2 {max(1, available_cores() // 2)}\n"] * 2, outputs


@pytest.mark.slow
def test_a_port_in_use_is_named_with_the_remedy() -> None:
    code = "from pretrain.distributed import join_ranks\ntry: join_ranks()\nexcept ValueError as error: print(error)"
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        place = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        done = run_command([sys.executable, "-c", code], **place)
    assert f"port {port} is in use, perhaps by another run" in done.stdout, done.stderr
    assert "--master_port" in done.stdout


def test_tasks_per_node() -> None:
    assert tasks_per_node("8(x3),2") == [8, 8, 8, 2]
    with pytest.raises(ValueError, match="expected numbers as in"):
        tasks_per_node("8x3")


@pytest.mark.parametrize(
    ("command", "hostfile"),
    [
        ("deepspeed --hostfile hosts run_pretrain.py --deepspeed_config ds.json", "hosts"),
        ("python /bin/deepspeed -H hosts run_pretrain.py", "hosts"),
        ("python /bin/deepspeed --hostfile=my/hosts --num_nodes 2 run_pretrain.py", "my/hosts"),
        ("deepspeed --num_accelerators 2 run_pretrain.py", None),
        ("deepspeed train.py --hostfile mine", None),
        ("deepspeed", None),
    ],
)
def test_the_hostfile_of_a_deepspeed_command(command: str, hostfile: str | None) -> None:
    assert hostfile_of(command.split()) == hostfile


@pytest.mark.slow
def test_a_hostfile_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """DeepSpeed would train on this machine only."""
    program = tmp_path / "program.py"
    program.write_text(
        "from pretrain.launchers import take_place\ntry: print(take_place())\nexcept ValueError as error: print(error)\n"
    )
    command = ["deepspeed", "--quiet", f"--master_port={free_port()}", "--hostfile", "nohosts", str(program)]
    done = run_command(command, PYTHONPATH=str(REPOSITORY))
    assert "--hostfile nohosts: no such file; expected lines as: node1 slots=8" in done.stdout + done.stderr
