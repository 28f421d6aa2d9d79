"""What `python -m pretrain.doctor` asks of each host: run there, a JSON object on stdin, another on stdout.

Imports torch for the all-reduce alone, so that the rest takes a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from data_prep.console import describe_error
from data_prep.files import sha256_of_file
from data_prep.shards import CHUNK_SAMPLES, DataSet, manifest_path
from pretrain.launchers import own_address

REPOSITORY = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "deepspeed", "numpy", "h5py")
_CHUNKS_READ = 8
_PAYLOAD_BYTES = 32 * 2**20
_REPETITIONS = 3
_STALE_LOCK_S = 600.0


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

    note("compilers", lambda: "; ".join(missing_compilers()) or None)
    if "token" in request:
        note("shared folder", lambda: _token_fault(Path(request["run"]), request["token"]))
    if "data" in request:
        data = Path(request["data"])
        note("data", lambda: sample_data(data))
        values["data"] = sha256_of_file(manifest_path(data)) if manifest_path(data).is_file() else "absent"
    if "deepspeed_config" in request:
        path = Path(request["deepspeed_config"])
        values["DeepSpeed JSON"] = sha256_of_file(path) if path.is_file() else "absent"
    note("ports", lambda: "; ".join(taken_ports(request.get("ports", []))) or None)
    return {
        "host": socket.gethostname(), "address": own_address(), "gpus": num_gpus(), "values": values, "faults": faults
    }  # fmt: skip


def code_hash() -> str:
    """Of the Python files that a run is made of, names and bytes; not of the commit, which local changes do not show in."""
    files = [
        REPOSITORY / "run_pretrain.py",
        *REPOSITORY.glob("data_prep/**/*.py"),
        *REPOSITORY.glob("pretrain/**/*.py"),
    ]
    digest = hashlib.sha256()
    for file in sorted(files):
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
    found["driver"] = next(iter(_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")), "none")
    return found


def num_gpus() -> int:
    """GPUs that a process here may use."""
    return len(_nvidia_smi("--list-gpus"))


def _nvidia_smi(*flags: str) -> list[str]:
    try:
        done = subprocess.run(["nvidia-smi", *flags], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def missing_compilers() -> Iterator[str]:
    """What the compilation of DeepSpeed's fused ops needs and is not there."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler, path=path):
        yield f"no C++ compiler {compiler}"
    if not shutil.which("ninja", path=path):
        yield "no ninja"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        yield "no Python.h"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache)).glob("**/lock"):
        if is_abandoned(lock):
            yield f"{lock} is left over from a compilation that was killed, delete it"


def is_abandoned(lock: Path, *, is_one_host: bool = False) -> bool:
    """Whether a compilation of DeepSpeed's ops has left its lock: every later one would wait for it for ever.

    The one that works holds it open. Where other hosts may share the folder, only its age tells.
    """
    found = _identity(lock)
    if found is None:
        return False
    if time.time() - found[1] / 1e9 > _STALE_LOCK_S:
        return True
    return is_one_host and not _is_open(lock) and _identity(lock) == found


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _is_open(path: Path) -> bool:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(file.path == str(path) for file in process.open_files()):
                return True
    return False


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


def taken_ports(ports: list[int]) -> Iterator[str]:
    """The ports that nobody could listen on now."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                yield f"port {port}: {error.strerror}"


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
