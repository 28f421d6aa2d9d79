"""What a host with GPUs tells of itself, and what the doctor makes of it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpus import A100, NEW_DRIVER, OLD_DRIVER, V100, give_gpus

from pretrain.doctor import Host, Hosts, _of_hosts
from pretrain.probe import look

KERNELS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


def row(name: str, answers: dict[str, dict[str, Any]]) -> Any:
    hosts = Hosts([Host(host, 2) for host in answers], "ssh")
    rows = _of_hosts(hosts, [*answers.values()], Namespace(run=Path("run")))
    return next(check for check in rows if check.name == name)


def test_a_torch_without_kernels_for_a_hosts_gpus_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: KERNELS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    give_gpus(monkeypatch, tmp_path, (A100, NEW_DRIVER), (A100, NEW_DRIVER))
    new = look({})
    assert (new["gpus"], new["faults"]) == (2, {})
    assert new["values"]["versions"]["driver"] == NEW_DRIVER
    assert row("torch's build", {"node1": new, "node2": new}).status == "ok"

    give_gpus(monkeypatch, tmp_path, (V100, OLD_DRIVER), (V100, OLD_DRIVER))
    check = row("torch's build", {"node1": new, "node2": look({})})
    assert check.status == "FAILED"
    assert check.found.startswith("node2: torch ")
    assert "has no kernels for compute capability 7.0 (driver 550.54.15)" in check.found
    assert "+cu126 from https://download.pytorch.org/whl/cu126" in check.found
    assert "./setup.sh" in check.remedy

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    on_cpu = look({})
    assert (on_cpu["gpus"], on_cpu["faults"]) == (0, {})


def test_gpus_that_are_not_there_are_a_fault_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpus(monkeypatch, tmp_path, (A100, NEW_DRIVER))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    answer = look({})
    assert answer["gpus"] == 0
    assert "there is no GPU 1 here" in answer["faults"]["torch's build"]
