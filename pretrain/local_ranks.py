"""Ranks on this machine, one a visible GPU; without GPUs two by default.

  python -m pretrain.local_ranks [--ranks N] [--master_port N] run_pretrain.py FLAGS    start them
  python -m pretrain.local_ranks --count [--ranks N] [--master_port N]                  check, and print their number and cuda or cpu

The command `deepspeed` replaces CUDA_VISIBLE_DEVICES by 0, 1, ... when it is given a number of ranks, cannot read the UUIDs of
GPUs and MIG instances, and always takes port 29500. So its second half is started here, with the names of the visible GPUs and
a free port.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from collections.abc import Mapping, Sequence

from data_prep.console import ArgumentParser, run_command
from pretrain.launchers import free_port, port_fault
from pretrain.nvidia import visible_gpus

_RANKS_WITHOUT_GPU = 2


def gpus_to_use(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the GPUs that ranks started here compute on: those that are visible, unless DS_ACCELERATOR chooses the CPU."""
    return [] if environ.get("DS_ACCELERATOR") == "cpu" else visible_gpus(environ)


def default_ranks(gpus: Sequence[str]) -> int:
    """Return the number of ranks of a host where nobody says."""
    return len(gpus) or _RANKS_WITHOUT_GPU


def names_of_ranks(num_ranks: int | None, gpus: Sequence[str]) -> list[str]:
    """Return the GPU of each rank, or the ranks' numbers without GPUs. Raises ValueError for more ranks than GPUs."""
    num_ranks = default_ranks(gpus) if num_ranks is None else num_ranks
    if num_ranks < 1:
        raise ValueError(f"--ranks is {num_ranks}, expected at least 1")
    if gpus and num_ranks > len(gpus):
        raise ValueError(
            f"--ranks is {num_ranks}, and a process here may use {len(gpus)} GPUs ({', '.join(gpus)}): take as many ranks at "
            "most, make more visible by CUDA_VISIBLE_DEVICES, or take the CPU by DS_ACCELERATOR=cpu"
        )
    return list(gpus[:num_ranks]) if gpus else [str(rank) for rank in range(num_ranks)]


def launch_command(names: Sequence[str], port: int, program: Sequence[str]) -> list[str]:
    """Return the command that starts DeepSpeed's launcher of a single host for these ranks."""
    hosts = base64.urlsafe_b64encode(json.dumps({"localhost": list(names)}).encode()).decode()
    return [
        sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={hosts}", "--master_addr=127.0.0.1",
        f"--master_port={port}", "--quiet", *program,
    ]  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status, or does not return if the launcher takes this process's place."""
    parser = ArgumentParser(prog="python -m pretrain.local_ranks", description=__doc__)
    parser.add_argument("--ranks", type=int, metavar="N", help="by default one a visible GPU, 2 without GPUs")
    parser.add_argument("--master_port", type=int, metavar="N", help="where they meet; by default a free port")
    parser.add_argument("--count", action="store_true", help="only print how many there would be, and cuda or cpu")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="what each rank runs")
    args = parser.parse_args(words)
    if bool(args.program) == args.count:
        parser.error("give either a script with its flags, or --count")

    def start() -> None:
        gpus = gpus_to_use()
        names = names_of_ranks(args.ranks, gpus)
        if args.master_port and (fault := port_fault(args.master_port)):
            raise ValueError(f"--master_port: {fault}, perhaps by another run; without the flag a free one is taken")
        if args.count:
            print(len(names), "cuda" if gpus else "cpu")
            return
        if not gpus:
            os.environ["DS_ACCELERATOR"] = "cpu"
        os.execv(sys.executable, launch_command(names, args.master_port or free_port(), args.program))

    return run_command(start, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
