"""setup.sh with a faked nvidia-smi, and with a Python whose pip only writes down what it was asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_gpus import A100, B200, H100, T4, V100, give_gpus, list_of_gpus, write_nvidia_smi
from fake_gpus import NEW_DRIVER as NEW
from fake_gpus import OLD_DRIVER as OLD
from support import REPOSITORY, pinned_versions

from pretrain.nvidia import Device, devices, visible_gpus
from pretrain.torch_build import _BUILDS, has_kernels, installed_fault

VERSION = pinned_versions()["torch"]
INDEX = "https://download.pytorch.org/whl"

# Stands for the interpreter that PYTHON names and for .venv's: `-m venv` makes a .venv in which it stands again, `-m pip`
# writes its arguments to pips and fails as the test says, everything else is done by the real one.
PYTHON = """#!/bin/bash
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip")
        echo "${@:3}" >> pips
        case "$*" in *"--index-url $UNREACHABLE"*) echo "ERROR: no route"; exit 1 ;; esac ;;
    "-m compileall") ;;
    "-m pretrain.torch_build")
        case $3 in --check) exit "$IS_UNFIT" ;; --fault) exit ;; esac
        exec REAL "$@" ;;
    *) exec REAL "$@" ;;
esac
"""


@pytest.fixture
def set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """Run setup.sh in a copy; the result, and the arguments of each pip so far."""
    for name in (
        "setup.sh",
        "requirements.txt",
        "requirements-dev.txt",
        "pretrain/__init__.py",
        "pretrain/nvidia.py",
        "pretrain/torch_build.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(REPOSITORY / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("REAL", sys._base_executable))
    python.chmod(0o755)

    def run(
        *gpus: tuple[tuple[int, int], str], unreachable: str = "nothing", is_fit: bool = False
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        write_nvidia_smi(tmp_path / "bin", *gpus)
        env = os.environ | {
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(python),
            "UNREACHABLE": unreachable, "IS_UNFIT": str(int(not is_fit)),
        }  # fmt: skip
        done = subprocess.run(["./setup.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        pips = tmp_path / "pips"
        return done, pips.read_text().splitlines() if pips.exists() else []

    return run


@pytest.mark.parametrize(
    ("gpus", "build"),
    [
        ([], "cpu"),
        ([(V100, NEW)], "cu126"),
        ([(V100, OLD)], "cu126"),
        ([(T4, NEW)], "cu130"),
        ([(A100, NEW)], "cu130"),
        ([(A100, OLD), (A100, OLD)], "cu126"),
        ([(H100, NEW)], "cu130"),
        ([(V100, NEW), (H100, NEW)], "cu126"),
        ([(B200, NEW)], "cu130"),
        ([(B200, "570.86.10")], "cu129"),
    ],
)  # fmt: skip
def test_the_build_suits_the_gpus(set_up: Callable, gpus: list, build: str) -> None:
    done, pips = set_up(*gpus)
    assert done.returncode == 0, done.stderr
    first, second = pips
    assert f"--index-url {INDEX}/{build} torch=={VERSION}+{build}" in first
    assert "--no-deps" in first
    assert second.endswith("-r requirements.txt")
    assert "No such file" not in done.stdout + done.stderr


def test_other_gpus_than_the_last_time_need_another_build(set_up: Callable) -> None:
    """As when the first node of a job is not the login node that set up."""
    set_up()
    _, pips = set_up((A100, NEW))
    assert [f"+{build}" in pip for build, pip in (("cpu", pips[0]), ("cu130", pips[2]))] == [True, True]
    assert set_up()[1] == pips
    assert set_up((A100, NEW))[1] == pips


@pytest.mark.parametrize("gpus", [[], [(A100, NEW)]])
def test_without_its_own_index_torch_comes_from_the_default_one(set_up: Callable, gpus: list) -> None:
    done, (own, default, rest) = set_up(*gpus, unreachable=INDEX)
    assert done.returncode == 0, done.stderr
    assert "taking torch from the default index" in done.stdout
    assert INDEX in own
    assert INDEX not in default + rest
    assert default.endswith(f"torch=={VERSION}")


@pytest.mark.parametrize("gpu", [(V100, NEW), (A100, OLD)])
def test_what_the_default_index_has_does_not_run_on_a_v100(set_up: Callable, gpu: tuple) -> None:
    done, pips = set_up(gpu, unreachable=INDEX)
    assert done.returncode == 2
    assert len(pips) == 1
    assert f"pip download --no-deps --index-url {INDEX}/cu126 torch=={VERSION}+cu126" in done.stderr


def test_a_torch_that_suits_is_left_alone(set_up: Callable) -> None:
    done, (only,) = set_up((A100, NEW), is_fit=True)
    assert done.returncode == 0
    assert "torch" not in only


@pytest.mark.parametrize("gpus", [[((3, 7), OLD)], [(A100, "470.1")], [(V100, NEW), (B200, NEW)]])
def test_gpus_that_no_build_suits_are_named(set_up: Callable, gpus: list) -> None:
    done, pips = set_up(*gpus)
    assert done.returncode == 2
    assert pips == []
    (error,) = done.stderr.splitlines()
    assert "setup.sh: error: no build of torch suits compute capability " in error
    assert gpus[-1][1] in error


def test_a_python_that_is_too_old_is_named(set_up: Callable, tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    done, pips = set_up()
    assert (done.returncode, pips) == (2, [])
    assert "is not Python 3.11 or newer" in done.stderr


def test_the_builds_are_those_that_torch_itself_tells_of() -> None:
    published = torch.cuda.PYTORCH_RELEASES_CODE_CC
    for build in _BUILDS:
        of_torch = published[f"{build.name[2:4]}.{build.name[4:]}"]
        assert {processor: set(numbers) for processor, numbers in build.architectures.items()} == of_torch


@pytest.mark.parametrize(
    ("architectures", "runs_on"),
    [("sm_80", "8.0 8.6 8.9"), ("sm_86", "8.6 8.9"), ("sm_90a", "9.0"), ("sm_100f", "10.0 10.3"), ("sm_100a", "10.0"),
     ("compute_80", "8.0 8.6 8.9 9.0 10.0 10.3 12.0"), ("sm_70 sm_120", "7.0 7.5 12.0"), ("", "")],
)  # fmt: skip
def test_kernels_run_within_a_major_version(architectures: str, runs_on: str) -> None:
    known = ("7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0")
    fit = [v for v in known if has_kernels(architectures.split(), Device(tuple(map(int, v.split("."))), NEW))]  # type: ignore[arg-type]
    assert " ".join(fit) == runs_on


@pytest.mark.parametrize(
    ("architectures", "is_available", "device", "words"),
    [
        (["sm_75", "sm_80", "sm_90"], True, Device(H100, NEW), []),
        (["sm_75", "sm_80", "sm_90"], True, Device(V100, NEW), ["no kernels for compute capability 7.0", "sm_75 sm_80 sm_90", f"{INDEX}/cu126"]),
        (["sm_75", "sm_80", "sm_90"], False, Device(A100, OLD), ["finds no GPU", f"torch=={VERSION}+cu126"]),
        ([], False, Device(H100, NEW), ["a build for the CPU", f"torch=={VERSION}+cu130 from {INDEX}/cu130"]),
        ([], False, Device((3, 0), OLD), ["a build for the CPU", "no build of torch suits compute capability 3.0"]),
    ],
)  # fmt: skip
def test_a_torch_that_does_not_suit_is_told_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, architectures: list[str], is_available: bool, device: Device, words: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    fault = installed_fault([device])
    assert bool(fault) == bool(words)
    for word in words:
        assert word in (fault or "")


MIG = """GPU 0: NVIDIA A100 (UUID: GPU-11111111-aa)
GPU 1: NVIDIA A100 (UUID: GPU-22222222-bb)
  MIG 3g.20gb     Device  0: (UUID: MIG-33333333-cc)
  MIG 3g.20gb     Device  1: (UUID: MIG-44444444-dd)"""
"""The second GPU cut into instances."""
FOUR = list_of_gpus(4)


@pytest.mark.parametrize(
    ("listed", "variable", "visible"),
    [
        ("", None, []),
        ("", "0", []),
        (FOUR, None, ["0", "1", "2", "3"]),
        (FOUR, "2,0", ["2", "0"]),
        (FOUR, " 1, 3 ", ["1", "3"]),
        (FOUR, "", []),
        (FOUR, "-1", []),
        (FOUR, "NoDevFiles", []),
        (FOUR, "GPU-2222-aa,GPU-0000", ["GPU-2222-aa", "GPU-0000"]),
        (MIG, None, ["MIG-33333333-cc"]),
        (MIG, "0,1", ["MIG-33333333-cc"]),
        (MIG, "GPU-2222", ["MIG-33333333-cc"]),
        (MIG, "0", ["0"]),
        (MIG, "MIG-44444444-dd,MIG-33333333-cc", ["MIG-44444444-dd"]),
    ],
)  # fmt: skip
def test_the_gpus_that_a_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, variable: str | None, visible: list[str]
) -> None:
    give_gpus(monkeypatch, tmp_path, listed=listed)
    assert visible_gpus({} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}) == visible


@pytest.mark.parametrize("variable", ["4", "0,7", "GPU-9999", "MIG-1", "1,-1"])
def test_gpus_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    give_gpus(monkeypatch, tmp_path, listed=FOUR)
    with pytest.raises(ValueError, match=f"there is no GPU {variable.split(',')[-1]} here; expected numbers below 4"):
        visible_gpus({"CUDA_VISIBLE_DEVICES": variable})


def test_a_driver_that_does_not_tell_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpus(monkeypatch, tmp_path, listed=FOUR)
    with pytest.raises(ValueError, match="too old"):
        devices()
    write_nvidia_smi(tmp_path, (A100, "[N/A]"))
    with pytest.raises(ValueError, match="expected compute capability and driver as in"):
        devices()
