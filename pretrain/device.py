"""The device that this process computes on, and the precisions that it computes fast.

A CPU multiplies fp16 and bf16 numbers of a model fast only if it has instructions for them. Without these torch gives the
same results, 20 to 200 times slower, so such a precision counts as missing. Does not import DeepSpeed.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["fp16", "bf16", "fp32"]
DeviceKind = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Speeds:
    """The precisions that a device computes fast."""

    precisions: tuple[Precision, ...]
    """The fastest first. fp32 is always among them."""
    reason: str
    """Why the first one is the fastest, for the console."""

    def missing(self, precision: Precision) -> str | None:
        """Return why `precision` cannot be used here and what can, or None if it can be used."""
        if precision in self.precisions:
            return None
        return (
            f"{precision} has no fast arithmetic on this device ({self.reason}); it has {', '.join(self.precisions)}: "
            f'choose one of them, or "auto" for the fastest'
        )


def device_kind() -> DeviceKind:
    """Return what DeepSpeed will compute on: `cpu` if there is no CUDA GPU or if DS_ACCELERATOR=cpu is set."""
    if os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available():
        return "cuda"
    return "cpu"


def device_name() -> str:
    """Return the name of the current GPU, or of the processor."""
    if device_kind() == "cuda":
        return torch.cuda.get_device_name()
    cpu_info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.*)$", cpu_info.read_text(), re.MULTILINE) if cpu_info.is_file() else None
    return match[1] if match else platform.machine()


def speeds() -> Speeds:
    """Return the precisions of this process's device, the fastest first.

    benchmarks/precision.py shows that a training step is fastest in the first one.
    """
    return _gpu_speeds() if device_kind() == "cuda" else _cpu_speeds()


def agreed_precision(of_ranks: Sequence[Speeds], allowed: Sequence[Precision], saved: Precision | None) -> Precision:
    """Return the precision of a run whose ranks have unlike devices: the weakest device decides.

    `allowed`: what the DeepSpeed JSON leaves open. `saved`: the precision of the checkpoint that the run resumes from; it
    is kept if every device has it. fp32 is the last resort.
    """
    weakest = min(of_ranks, key=lambda speeds: len(speeds.precisions))
    preferred = [saved, *weakest.precisions] if saved else [*weakest.precisions]
    for precision in preferred:
        if precision in allowed and all(precision in speeds.precisions for speeds in of_ranks):
            return precision
    return "fp32"


def _gpu_speeds() -> Speeds:
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Speeds(("fp16", "bf16", "fp32"), "a GPU with fp16 and bf16 tensor cores")
    return Speeds(("fp16", "fp32"), "a GPU without bf16 arithmetic")


def _cpu_speeds() -> Speeds:
    """oneDNN, which multiplies matrices on CPUs, and torch's own list of instructions must agree.

    oneDNN reports bf16 also where it emulates it. Torch's list does not follow ONEDNN_MAX_CPU_ISA.
    """
    instructions = torch.cpu.get_capabilities()
    has_fp16, has_bf16 = (
        check() for check in (torch.ops.mkldnn._is_mkldnn_fp16_supported, torch.ops.mkldnn._is_mkldnn_bf16_supported)
    )
    candidates: list[tuple[bool, Precision, str]] = [
        (has_fp16, "fp16", "amx_fp16"),
        (has_bf16, "bf16", "amx_bf16"),
        (has_fp16, "fp16", "avx512_fp16"),
        (has_bf16, "bf16", "avx512_bf16"),
    ]
    found = [(precision, name) for has, precision, name in candidates if has and instructions.get(name)]
    if not found:
        return Speeds(("fp32",), "a CPU without instructions for 16-bit products")
    precisions = tuple(dict.fromkeys(precision for precision, _ in found))
    return Speeds((*precisions, "fp32"), f"a CPU with {found[0][1].upper().replace('_', '-')}")
