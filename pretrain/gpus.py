"""What makers say of their GPUs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Numbers of a kind of GPU."""

    memory_mib: int
    """As nvidia-smi shows it."""
    tflops: dict[str, float]
    """Largest rate of dense matrix products by precision, 10^12 operations per second."""
    link_gb_per_s: float
    """To the other GPUs of a node, one way: NVLink, or PCIe."""


def _gpu(memory_mib: int, fp16: float, bf16: float, fp32: float, link_gb_per_s: float) -> Gpu:
    rates = {"fp16": fp16, "bf16": bf16, "fp32": fp32}
    return Gpu(memory_mib, {name: rate for name, rate in rates.items() if rate}, link_gb_per_s)


GPUS = {
    #                    MiB    fp16  bf16  fp32  GB/s
    "T4-16GB": _gpu(15_360, 65, 0, 8.1, 16),
    "V100-16GB": _gpu(16_160, 125, 0, 15.7, 150),
    "V100-32GB": _gpu(32_510, 125, 0, 15.7, 150),
    "A10-24GB": _gpu(23_028, 125, 125, 31.2, 32),
    "A100-40GB": _gpu(40_536, 312, 312, 19.5, 300),
    "A100-80GB": _gpu(81_251, 312, 312, 19.5, 300),
    "L4-24GB": _gpu(23_034, 121, 121, 30.3, 32),
    "L40S-48GB": _gpu(46_068, 362, 362, 91.6, 32),
    "H100-80GB": _gpu(81_559, 989, 989, 67, 450),
    "H200-141GB": _gpu(143_771, 989, 989, 67, 450),
}
"""SXM modules where there are several kinds; fp32 without TF32, as torch computes it by default."""
