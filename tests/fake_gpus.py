"""A faked nvidia-smi, as on machines with GPUs that the tests do not have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GpuKind = tuple[tuple[int, int], str]
"""Compute capability and driver."""
V100, T4, A100, H100, B200 = (7, 0), (7, 5), (8, 0), (9, 0), (10, 0)
NEW_DRIVER, OLD_DRIVER = "580.65.06", "550.54.15"


def list_of_gpus(number: int) -> str:
    """Return what `nvidia-smi --list-gpus` prints."""
    return "\n".join(f"GPU {index}: a GPU (UUID: GPU-{index}{index}{index}{index}-aa)" for index in range(number))


def write_nvidia_smi(folder: Path, *gpus: GpuKind, listed: str | None = None) -> None:
    """Write the command for these GPUs; without any it fails, as without a driver.

    `listed`: what `nvidia-smi --list-gpus` prints, if not a line for each. Without `gpus` their kind cannot be asked for, as
    with an old driver.
    """
    folder.mkdir(exist_ok=True)
    lines = "\n".join(f"{major}.{minor}, {driver}" for (major, minor), driver in gpus)
    listed = list_of_gpus(len(gpus)) if listed is None else listed
    cases = {
        "--query-gpu=compute_cap,driver_version": f"echo '{lines}'" if gpus else "exit 2",
        "--query-gpu=driver_version": f"echo '{gpus[0][1]}'" if gpus else "exit 2",
        "--list-gpus": f"echo '{listed}'",
    }
    answer = "case $1 in\n" + "".join(f"{flag}) {command} ;;\n" for flag, command in cases.items()) + "esac"
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{answer if gpus or listed else 'exit 9'}\n")
    (folder / "nvidia-smi").chmod(0o755)


def give_gpus(monkeypatch: pytest.MonkeyPatch, folder: Path, *gpus: GpuKind, listed: str | None = None) -> None:
    """Let this process and its children find such an nvidia-smi, and no variable that hides GPUs."""
    write_nvidia_smi(folder, *gpus, listed=listed)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
