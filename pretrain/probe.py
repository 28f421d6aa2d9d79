"""What `python -m pretrain.doctor` asks of each host: run there, a JSON object on stdin, another on stdout.

Imports torch only for the all-reduce, for a DeepSpeed JSON's precision and where there are GPUs; the rest takes a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.console import describe_error
from data_prep.files import sha256_of_file
from data_prep.shards import CHUNK_SAMPLES, DataSet, manifest_path
from pretrain.launchers import own_address, port_fault
from pretrain.local_ranks import gpus_to_use
from pretrain.nvidia import devices, nvidia_smi
from pretrain.torch_build import installed_fault

REPOSITORY = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "deepspeed", "numpy", "h5py")
_CHUNKS_READ = 8
_PAYLOAD_BYTES = 32 * 2**20
_REPETITIONS = 3


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Facts of this host: `values`, which must be the same everywhere, `faults` by check, and what rank 0's is asked for.

    `request` may have run, token, data, deepspeed_config, ports.
    """
    values: dict[str, Any] = {"code": code_hash(), "versions": versions()}
    faults: dict[str, str] = {}

    def note(check: str, find: Callable[[], str | None]) -> None:
        try:
            fault = find()
        except (ValueError, OSError) as error:
            fault = describe_error(error)
        if fault:
            faults[check] = fault

    note("torch's build", _gpu_fault)
    if "token" in request:
        note("shared folder", lambda: _token_fault(Path(request["run"]), request["token"]))
    if "data" in request:
        data = Path(request["data"])
        note("data", lambda: sample_data(data))
        values["data"] = sha256_of_file(manifest_path(data)) if manifest_path(data).is_file() else "absent"
    if "deepspeed_config" in request:
        path = Path(request["deepspeed_config"])
        values["DeepSpeed JSON"] = sha256_of_file(path) if path.is_file() else "absent"
        note("precision", lambda: _precision_fault(path))
    for port in request.get("ports", []):
        note("ports", partial(port_fault, port))
    num_gpus = 0 if "torch's build" in faults else len(gpus_to_use())
    return {
        "host": socket.gethostname(),
        "address": own_address(),
        "gpus": num_gpus,
        "values": values,
        "faults": faults,
    }


def code_hash() -> str:
    """Return a hash of the names and bytes of the Python files that a run is made of; the commit does not show local changes."""
    files = [
        *REPOSITORY.glob("run_pretrain.py"),
        *REPOSITORY.glob("data_prep/**/*.py"),
        *REPOSITORY.glob("pretrain/**/*.py"),
    ]
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file() and not file.name.startswith(".")):  # no editor's lock
        digest.update(f"{file.relative_to(REPOSITORY)} {sha256_of_file(file)}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of Python, the packages that matter, CUDA as torch was built for, and the GPU's driver."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    spec = util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        text = (Path(spec.submodule_search_locations[0]) / "version.py").read_text()
        match = re.search(r"^cuda[^=]*=\s*'([^']+)'", text, re.MULTILINE)
        found["CUDA"] = match[1] if match else "none"
    found["driver"] = next(iter(nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")), "none")
    return found


def _precision_fault(path: Path) -> str | None:
    """Return why this host cannot train in the precision of a DeepSpeed JSON, or None; other faults of it are found elsewhere."""
    from pretrain.device import speeds
    from pretrain.ds_config import DeepSpeedConfig

    try:
        config = DeepSpeedConfig(path)
    except (ValueError, OSError):
        return None
    return config.precision_fault(speeds())


def _gpu_fault() -> str | None:
    """Return why torch cannot compute on the GPUs here, and the remedy, or None."""
    return installed_fault(devices()) if gpus_to_use() else None


def _token_fault(run: Path, token: str) -> str | None:
    path = run / token
    return None if path.is_file() else f"{path}: not seen here"


def sample_data(folder: Path) -> str | None:
    """The tokenizer's hash, every shard's size and some chunks' checksums; what is wrong, or None."""
    data = DataSet(folder)
    for shards in data.manifest["splits"].values():
        for shard in shards:
            path = folder / shard["file"]
            if not path.is_file():
                return f"{path}: is missing"
            if (size := path.stat().st_size) != shard["size_bytes"]:
                return f"{path}: has {size} bytes, expected {shard['size_bytes']}"
    num_chunks = -(-data.num_samples("train") // CHUNK_SAMPLES)
    for chunk in np.unique(np.linspace(0, num_chunks - 1, min(_CHUNKS_READ, num_chunks)).astype(int)).tolist():
        data.read_chunk("train", chunk, mask_set=0)
    data.close()
    return None


def all_reduce() -> dict[str, Any]:
    """Joins the others as a run does, and sums 32 MiB a few times; bytes a second over each host's wire."""
    import torch
    from torch import distributed

    from pretrain.distributed import join_ranks

    join_ranks()
    world_size = distributed.get_world_size()
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    payload = torch.ones(_PAYLOAD_BYTES // 4, device=device)
    distributed.all_reduce(payload)
    seconds = []
    for _ in range(_REPETITIONS):
        distributed.barrier()
        started = time.perf_counter()
        distributed.all_reduce(payload)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    is_right = bool((payload == float(world_size) ** (_REPETITIONS + 1)).all())
    distributed.barrier()
    distributed.destroy_process_group()
    rate = 2 * (world_size - 1) / world_size * _PAYLOAD_BYTES / min(seconds)
    return {
        "faults": {} if is_right else {"all-reduce": "the sum is wrong"}, "bytes_per_s": rate,
        "backend": "nccl" if device == "cuda" else "gloo",
    }  # fmt: skip


def main() -> int:
    """Entry point; what is wrong is in the answer, the exit status tells only that there is one."""
    request = json.load(sys.stdin)
    signal.alarm(request["patience_s"])  # ssh, when it is ended, does not end what it started
    try:
        answer = all_reduce() if request["kind"] == "all-reduce" else look(request)
    except (ValueError, OSError, RuntimeError) as error:
        answer = {"faults": {request["kind"]: describe_error(error).splitlines()[0]}}
    print(f"\n{json.dumps(answer)}", flush=True)
    os._exit(0)  # a rank whose peers are gone could wait for them in its destructors


if __name__ == "__main__":
    sys.exit(main())
