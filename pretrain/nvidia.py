"""GPUs of this machine, as nvidia-smi and CUDA_VISIBLE_DEVICES name them. Imports neither torch nor any other package."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

_PATIENCE_S = 60


@dataclass(frozen=True)
class Device:
    """A GPU and its driver."""

    compute_capability: tuple[int, int]
    driver: str


def nvidia_smi(*flags: str) -> list[str]:
    """Return the lines that nvidia-smi prints; none if it is missing or fails."""
    try:
        done = subprocess.run(["nvidia-smi", *flags], capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def devices() -> list[Device]:
    """Return the GPUs of this machine, visible or not.

    Raises ValueError if nvidia-smi lists GPUs and does not tell their compute capability, as drivers before 510 do.
    """
    found = []
    for line in nvidia_smi("--query-gpu=compute_cap,driver_version", "--format=csv,noheader"):
        match = re.fullmatch(r"\s*(\d+)\.(\d+)\s*,\s*(\d\S*)\s*", line)
        if not match:
            raise ValueError(f"nvidia-smi says {line!r}, expected compute capability and driver as in: 8.0, 580.65.06")
        found.append(Device((int(match[1]), int(match[2])), match[3]))
    if not found and nvidia_smi("--list-gpus"):
        raise ValueError("nvidia-smi does not tell the GPUs' compute capability: its driver is too old; update it")
    return found


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the GPUs that a process started here may use, each named as in CUDA_VISIBLE_DEVICES.

    CUDA shows a process a single MIG instance, and no whole GPU with it, however many are visible. Raises ValueError for a
    CUDA_VISIBLE_DEVICES that names what is not there; CUDA itself would use the GPUs before it.
    """
    instances: dict[str, list[str]] = {}  # of each GPU's UUID
    for line in nvidia_smi("--list-gpus"):
        match = re.search(r"UUID: ((?:GPU|MIG)-[^)]+)", line)
        if match and line.startswith("GPU "):
            instances[match[1]] = []
        elif match:
            instances[[*instances][-1]].append(match[1])
    gpus = [*instances]
    uuids = [*gpus, *(instance for of_gpu in instances.values() for instance in of_gpu)]
    given = environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(len(gpus))]
    if given is not None and gpus:
        names = [name for word in given.split(",") if (name := word.strip())]
    if names in (["-1"], ["NoDevFiles"]):  # how one hides them all
        return []
    for name in names:
        found = [gpus[int(name)]] if name.isdecimal() and int(name) < len(gpus) else []
        if len(name) > len("GPU-"):
            found += [uuid for uuid in uuids if uuid.startswith(name)]
        if not found:
            raise ValueError(
                f"CUDA_VISIBLE_DEVICES is {given!r}, and there is no GPU {name} here; expected numbers below {len(gpus)}, "
                "or UUIDs that `nvidia-smi -L` lists"
            )
        if found[0].startswith("MIG-"):
            return [name]
        if instances[found[0]]:
            return instances[found[0]][:1]
    return names
