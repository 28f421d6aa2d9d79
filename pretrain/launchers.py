"""Which rank this process is, whoever started it.

DeepSpeed's launcher and torchrun say so in RANK, WORLD_SIZE, ...; srun and mpirun in variables of their own. Here they
are made one, before anything expensive starts.
"""

from __future__ import annotations

import ipaddress
import os
import random
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

_NAMES = {
    "torch": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
}
_LOCAL_SIZES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")  # DeepSpeed's, torchrun's, mpirun's
_DEEPSPEED = ("deepspeed", "ds", "deepspeed.launcher.runner", "runner.py")
_HERE = "127.0.0.1"
_FIRST_PORT, _NUM_PORTS = 12000, 20000  # below those that the kernel gives to outgoing connections


@dataclass(frozen=True)
class Place:
    """A process among the ranks of a job."""

    rank: int = 0
    local_rank: int = 0
    """Number among the ranks of its host: the number of its GPU."""
    world_size: int = 1
    local_size: int | None = 1
    """Ranks of its host; None if the environment does not say and there may be several hosts (`join_ranks` counts them)."""
    master_addr: str = _HERE
    """Where rank 0 is to be reached."""
    master_port: int = 0

    @property
    def is_one_host(self) -> bool:
        """Whether all ranks are known to be on this host; every rank comes to the same answer."""
        return self.local_size == self.world_size


def find_place(environ: Mapping[str, str] = os.environ) -> Place:
    """This process's place, by the environment of DeepSpeed's launcher, torchrun, mpirun or srun; alone without one.

    Ranks of mpirun agree on rank 0's address by MPI where MASTER_ADDR is not given. Raises ValueError for what is missing.
    """
    launcher = _launcher(environ)
    if launcher is None:
        return Place()
    rank, local_rank, world_size = (_number(environ, name, launcher) for name in _NAMES[launcher])
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if world_size == 1 and not (address and port):
        return Place()
    local_size = _local_size(environ, launcher, world_size)
    if local_size is None and (world_size == 1 or not address or _is_loopback(address)):
        local_size = world_size  # no other host could reach rank 0
    is_one_host = local_size == world_size
    if launcher == "torch":
        if not address or not port:
            raise ValueError(
                f"RANK is set and {'MASTER_PORT' if address else 'MASTER_ADDR'} is not: start {_program()} by deepspeed, "
                "torchrun, srun or mpirun, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            )
    elif launcher == "srun":
        if not address and not is_one_host:
            raise ValueError(
                "srun does not tell where rank 0 is: "
                'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            )
        address = address or _HERE
        port = port or str(slurm_port(_number(environ, "SLURM_JOB_ID", launcher)))
    elif not address or not port:
        address, port = _agreed_by_mpi(rank, is_one_host)
    return Place(rank, local_rank, world_size, local_size, address, _port(port))


def take_place() -> Place:
    """Return `find_place()`, written into the environment too, where torch and DeepSpeed look for it."""
    if fault := hostfile_fault():
        raise ValueError(fault)
    place = find_place()
    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(place.master_port),
    }
    if place.local_size is not None:
        os.environ["LOCAL_SIZE"] = str(place.local_size)
    return place


def hostfile_fault() -> str | None:
    """Return what is wrong if the `deepspeed` command that started this rank was given a hostfile that is not there, or None.

    DeepSpeed trains on this machine only then, with nothing but a warning.
    """
    for process in psutil.Process().parents():
        try:
            words, folder = process.cmdline(), Path(process.cwd())
        except psutil.Error:
            continue
        if any(Path(word).name in _DEEPSPEED for word in words[:4]) and (given := hostfile_of(words)):
            return (
                None
                if (folder / given).is_file()
                else f"--hostfile {given}: no such file; expected lines as: node1 slots=8"
            )
    return None


def hostfile_of(words: Sequence[str]) -> str | None:
    """Return the hostfile among the words of a `deepspeed` command, or None; the words of the script do not count."""
    for word, following in pairwise([*words, ""]):
        if word in ("-H", "--hostfile"):
            return following
        if word.startswith("--hostfile="):
            return word.partition("=")[2]
        if word.endswith(".py") and Path(word).name not in _DEEPSPEED:
            return None
    return None


def slurm_port(job: int) -> int:
    """Where rank 0 of a Slurm job listens: jobs that share a node do not meet."""
    return _FIRST_PORT + job % _NUM_PORTS


def free_port() -> int:
    """Return a port on which nobody listens, below those that the kernel gives to outgoing connections.

    It is drawn at random, so that two runs that start together do not take the same one. Raises ValueError if none is found.
    """
    for port in random.sample(range(_FIRST_PORT, _FIRST_PORT + _NUM_PORTS), 100):
        if not port_fault(port):
            return port
    raise ValueError(f"no free port found from {_FIRST_PORT} to {_FIRST_PORT + _NUM_PORTS}; give one by --master_port")


def port_fault(port: int) -> str | None:
    """Return why nobody could listen on the port now, or None."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return f"port {port}: {error.strerror}"
    return None


def in_slurm_step(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether srun started this process; a batch script has some of the variables, too."""
    return "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ


def _launcher(environ: Mapping[str, str]) -> str | None:
    """The innermost one: torchrun may itself be started by srun, and so may mpirun's daemons."""
    if "RANK" in environ:
        return "torch"
    if "OMPI_COMM_WORLD_RANK" in environ:
        return "mpirun"
    return "srun" if in_slurm_step(environ) else None


def _number(environ: Mapping[str, str], name: str, launcher: str) -> int:
    value = environ.get(name, "")
    if not value.isdecimal():
        found = f"is {value!r}, expected a number" if name in environ else "is not set"
        others = ", ".join(_NAMES[launcher])
        raise ValueError(f"environment variable {name} {found}; a launcher of this kind sets {others} together")
    return int(value)


def _local_size(environ: Mapping[str, str], launcher: str, world_size: int) -> int | None:
    """Return the number of ranks of this host, or None if the environment does not say."""
    if launcher == "srun":
        counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", str(world_size))
        return tasks_per_node(counts)[int(environ.get("SLURM_NODEID", 0))]
    given = next((name for name in _LOCAL_SIZES if environ.get(name)), None)
    return _number(environ, given, launcher) if given else None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost" or address.startswith("localhost.")


def _program() -> str:
    """What was started, as one names it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"-m {spec.name}" if spec else Path(sys.argv[0]).name


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form, as `8(x3),2` for three nodes with 8 tasks and one with 2."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, expected numbers as in 8(x3),2")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) < 65536:
        raise ValueError(f"environment variable MASTER_PORT is {text!r}, expected a number up to 65535")
    return int(text)


def _agreed_by_mpi(rank: int, is_one_host: bool) -> tuple[str, str]:
    """Rank 0's address and a port free there, in all ranks."""
    from mpi4py import MPI  # here, because it initialises MPI

    mine = None
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            mine = (_HERE if is_one_host else own_address(), str(probe.getsockname()[1]))
    agreed: tuple[str, str] = MPI.COMM_WORLD.bcast(mine)
    MPI.Finalize()  # now, because a rank may leave without it later
    return agreed


def host_identity() -> str:
    """Return a text that all ranks of this host have in common, and no other host has."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"


def own_address() -> str:
    """An IPv4 address by which other hosts reach this one: its name's, or, where that is the loopback, its first other."""
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = _HERE
    if not named.startswith("127."):
        return named
    running = (name for name, state in psutil.net_if_stats().items() if state.isup)
    addresses = [a.address for name in running for a in psutil.net_if_addrs()[name] if a.family == socket.AF_INET]
    return next((address for address in addresses if not address.startswith("127.")), _HERE)
