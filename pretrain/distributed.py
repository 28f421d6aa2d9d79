"""The ranks of a run: how they meet, and what they tell each other. Does not import DeepSpeed.

Every function is called by all ranks together, unless it says otherwise.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import replace
from typing import Any

import torch
from torch import distributed

from data_prep.console import available_cores
from data_prep.errors import UserError
from pretrain.device import device_kind
from pretrain.launchers import host_identity, take_place

_NEVER_MINUTES = 60 * 24 * 365
_timeout = datetime.timedelta(minutes=30)


def join_ranks(timeout_minutes: float = 30) -> None:
    """Join the other ranks as the launcher's environment says: over NCCL on GPUs, over gloo on CPUs.

    After `timeout_minutes` (0 = never) the wait for another rank, here or in a collective, is an error. Without a
    launcher this process is the only rank. Raises ValueError if the environment lacks something, or if rank 0's
    port is in use.
    """
    global _timeout
    _timeout = datetime.timedelta(minutes=timeout_minutes or _NEVER_MINUTES)
    place = take_place()
    if device_kind() == "cpu":
        torch.set_flush_denormal(True)  # before there are other threads; products of denormals take many times longer
        if place.is_one_host:  # gloo hangs where the host's name means 127.0.1.1, as on Debian
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        if torch.cuda.device_count() == 1:  # a scheduler may show each rank its own GPU only
            os.environ["LOCAL_RANK"] = "0"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not distributed.is_initialized():
        try:
            distributed.init_process_group("nccl" if device_kind() == "cuda" else "gloo", timeout=_timeout)
        except distributed.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"port {place.master_port} is in use, perhaps by another run on this machine: give the launcher another "
                "one by --master_port (./run_pretrain.sh takes a free one by itself)"
            ) from None
    if place.local_size is None:
        place = replace(place, local_size=gather(host_identity()).count(host_identity()))
        os.environ["LOCAL_SIZE"] = str(place.local_size)
    if device_kind() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // (place.local_size or 1)))


def new_group(ranks: list[int]) -> Any:
    """Return a new group of ranks with the timeout of `join_ranks`; torch's default would be that of the backend."""
    return distributed.new_group(ranks, timeout=_timeout)


def current_device() -> torch.device:
    """Return the device of this rank. Not a collective."""
    return torch.device("cuda", torch.cuda.current_device()) if device_kind() == "cuda" else torch.device("cpu")


def rank() -> int:
    """Return the number of this rank; a process that has not joined others is rank 0 of 1. Not a collective."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks. Not a collective."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the elementwise sum over all ranks, in fp64 and on this rank's device."""
    total = values.to(current_device(), torch.float64, copy=True)
    if distributed.is_initialized():
        distributed.all_reduce(total)
    return total


def gather(value: Any) -> list[Any]:
    """Return every rank's value, in the order of the ranks, on every rank."""
    values: list[Any] = [None] * world_size()
    if not distributed.is_initialized():
        return [value]
    distributed.all_gather_object(values, value)
    return values


def from_rank_0(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    box = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(box, src=0)
    return box[0]


def ranks_store() -> Any:
    """Return a new connection to the key-value store in which the ranks met, for use by one thread. Not a collective."""
    return distributed.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def leave_ranks() -> None:
    """Wait for the other ranks and leave them."""
    distributed.barrier()
    distributed.destroy_process_group()
