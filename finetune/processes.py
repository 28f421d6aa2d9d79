"""One process, or several that torchrun, srun or mpirun started."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from pretrain.device import device_kind
from pretrain.launchers import find_place, take_place

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """This process among those of the job, and where it computes."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = _CPU

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> None:
        """Make the values those of all processes, added up, in place."""
        if self.world_size > 1:
            distributed.all_reduce(values)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Go on when all have come here."""
        self.gather(None)


def join_processes() -> Processes:
    """Join the others as the launcher's environment says (NCCL on GPUs, else gloo); alone where there was no launcher.

    Raises ValueError where the environment lacks something.
    """
    place = find_place()
    torch.set_flush_denormal(True)
    device = torch.device("cuda", place.local_rank) if device_kind() == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.world_size > 1 and not distributed.is_initialized():
        if place.is_one_host:  # gloo hangs where the host's name means 127.0.1.1, as on Debian
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        take_place()
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(place.rank, place.world_size, device)


_TOLD, _HEARD = "the first process told a user's error", "so many heard it"
_PATIENCE_S, _LINGER_S, _POLL_S = 5.0, 1.5, 0.05


def have_told(processes: Processes) -> None:
    """Let the other processes know that the first one told what is wrong, so that they need not."""
    if not distributed.is_initialized():
        return
    store = distributed.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    store.set(_TOLD, "1")
    deadline = time.monotonic() + _LINGER_S  # the store goes with this process, and torch says so at length
    while store.add(_HEARD, 0) < processes.world_size - 1 and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def is_told() -> bool:
    """Whether the first process has told what is wrong, or does so soon, or is no more."""
    if not distributed.is_initialized():
        return False
    store = distributed.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    deadline = time.monotonic() + _PATIENCE_S
    try:
        while not store.check([_TOLD]):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        store.add(_HEARD, 1)
    except RuntimeError:
        return True
    return True


def leave_processes() -> None:
    """Undo `join_processes`."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
