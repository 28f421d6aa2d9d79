"""The precision that a device is given: the fastest it has, and of unlike devices the weakest's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from pretrain.device import Precision, Speeds, agreed_precision, device_kind, speeds


@contextmanager
def processor(instructions: str, *, onednn: str) -> Iterator[None]:
    """Torch on a CPU with these instructions; `onednn`: the precisions that oneDNN claims to have."""
    has = dict.fromkeys(instructions.split(), True)
    with (
        mock.patch.dict("os.environ", DS_ACCELERATOR="cpu"),
        mock.patch.object(torch.cpu, "get_capabilities", return_value=has),
        mock.patch.object(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", return_value="fp16" in onednn),
        mock.patch.object(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", return_value="bf16" in onednn),
    ):
        yield


@pytest.mark.parametrize(
    ("instructions", "onednn", "expected"),
    [
        ("avx2", "", ("fp32",)),
        ("avx2 avx512_f", "bf16", ("fp32",)),  # emulated
        ("avx2 avx512_f avx512_bf16", "bf16", ("bf16", "fp32")),  # AMD Zen 4
        ("avx512_f avx512_bf16 amx_bf16 avx512_fp16", "bf16 fp16", ("bf16", "fp16", "fp32")),  # Sapphire Rapids
        ("avx512_f avx512_bf16 amx_bf16 amx_fp16 avx512_fp16", "bf16 fp16", ("fp16", "bf16", "fp32")),  # Granite Rapids
        ("avx512_f avx512_bf16 avx512_fp16", "bf16 fp16", ("fp16", "bf16", "fp32")),
        ("avx512_f avx512_bf16 amx_bf16 avx512_fp16", "", ("fp32",)),  # limited by ONEDNN_MAX_CPU_ISA
        ("", "bf16", ("fp32",)),  # another architecture
    ],
)
def test_a_cpu_has_what_it_has_instructions_for(instructions: str, onednn: str, expected: tuple[str, ...]) -> None:
    with processor(instructions, onednn=onednn):
        assert device_kind() == "cpu"
        assert speeds().precisions == expected


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_has_fp16_and_the_newer_ones_bf16(has_bf16: bool) -> None:
    with (
        mock.patch.dict("os.environ", DS_ACCELERATOR="cuda"),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=has_bf16) as asked,
    ):
        assert speeds().precisions == (("fp16", "bf16", "fp32") if has_bf16 else ("fp16", "fp32"))
    asked.assert_called_once_with(including_emulation=False)


V100, H100, ZEN4, OLD = (
    Speeds(precisions, "") for precisions in (("fp16", "fp32"), ("fp16", "bf16", "fp32"), ("bf16", "fp32"), ("fp32",))
)
ANY: tuple[Precision, ...] = ("fp16", "bf16", "fp32")


@pytest.mark.parametrize(
    ("devices", "allowed", "saved", "expected"),
    [
        ([H100, H100], ANY, None, "fp16"),
        ([H100, V100], ANY, None, "fp16"),
        ([ZEN4, H100], ANY, None, "bf16"),
        ([ZEN4, V100], ANY, None, "fp32"),
        ([ZEN4, OLD], ANY, None, "fp32"),
        ([H100], ("bf16", "fp32"), None, "bf16"),
        ([V100], ("bf16", "fp32"), None, "fp32"),
        ([H100, H100], ANY, "bf16", "bf16"),  # a resume keeps the precision
        ([H100, V100], ANY, "bf16", "fp16"),  # if every device has it
        ([H100], ANY, "fp32", "fp32"),
    ],
)
def test_the_weakest_device_decides(
    devices: list[Speeds], allowed: tuple[Precision, ...], saved: Precision | None, expected: Precision
) -> None:
    assert agreed_precision(devices, allowed, saved) == expected
    assert agreed_precision(devices[::-1], allowed, saved) == expected
