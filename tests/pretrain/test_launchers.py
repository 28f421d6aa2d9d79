"""Ranks from what each launcher puts into the environment; tests/end_to_end starts the launchers themselves."""

from __future__ import annotations

import pytest

from pretrain.launchers import Place, find_place, tasks_per_node

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


def test_tasks_per_node() -> None:
    assert tasks_per_node("8(x3),2") == [8, 8, 8, 2]
    with pytest.raises(ValueError, match="expected numbers as in"):
        tasks_per_node("8x3")
