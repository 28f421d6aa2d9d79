"""The build of torch that suits this machine's GPUs: `python -m pretrain.torch_build` prints cpu or a CUDA build's name.

`--check VERSION` says instead, by its exit status, whether the installed torch is of that version and suits them; `--fault`
prints a warning if it does not suit. setup.sh runs the first two before anything is installed, so nothing is imported but
torch, and that only for the check.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata

from pretrain.nvidia import Device, devices

INDEX = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class _Build:
    name: str
    """As in the version 2.13.0+cu130, and the last part of its index's address."""
    driver: int
    """The oldest major version that runs it."""
    architectures: dict[str, tuple[int, ...]]
    """Compute capabilities, times ten, that it has kernels for, by the host's processor."""

    def suits(self, found: Iterable[Device]) -> bool:
        names = [f"sm_{number}" for number in self.architectures[_processor()]]
        return all(int(d.driver.split(".")[0]) >= self.driver and has_kernels(names, d) for d in found)


_BUILDS = (
    _Build("cu130", 580, {"x86_64": (75, 80, 86, 90, 100, 120), "aarch64": (80, 90, 100, 110, 120)}),
    _Build("cu126", 525, {"x86_64": (50, 60, 70, 75, 80, 86, 90), "aarch64": (80, 90)}),
    _Build("cu129", 525, {"x86_64": (75, 80, 86, 90, 100, 120), "aarch64": (80, 90, 100, 120)}),
)
"""Of the pinned torch; the first one that suits all GPUs is taken."""


def _processor() -> str:
    return "aarch64" if platform.machine() == "aarch64" else "x86_64"


def has_kernels(architectures: Iterable[str], device: Device) -> bool:
    """Return whether code for these architectures (sm_80, compute_90, ...) runs on the GPU.

    Machine code (sm_80, sm_100f) runs on its own and later minor versions of the same major one, PTX (compute_80) on
    everything newer, and code for a single architecture (sm_90a) only on that one.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if not match:
            continue
        version = (int(match[2]), int(match[3]))
        if match[4] == "a":
            is_fit = version == device.compute_capability
        else:
            is_fit = version <= device.compute_capability and (
                match[1] == "compute" or version[0] == device.compute_capability[0]
            )
        if is_fit:
            return True
    return False


def suitable_build(found: Sequence[Device]) -> str:
    """Return the name of the build for all these GPUs, cpu for none. Raises ValueError if no build suits them all."""
    if not found:
        return "cpu"
    for build in _BUILDS:
        if build.suits(found):
            return build.name
    raise ValueError(
        f"no build of torch suits {_described(found)}: CUDA 13 needs compute capability 7.5 and driver 580, CUDA 12.6 has "
        "5.0 to 9.0 and needs driver 525; update the driver"
    )


def installed_fault(found: Sequence[Device]) -> str | None:
    """Return why the installed torch cannot compute on these GPUs, and which build to install; None if it can."""
    if not found:
        return None
    import torch  # here, because it takes seconds

    architectures = torch.cuda.get_arch_list()
    unfit = [device for device in found if not has_kernels(architectures, device)]
    if not unfit and torch.cuda.is_available():
        return None
    if not architectures:
        fault = f"torch {torch.__version__} is a build for the CPU"
    elif unfit:
        fault = f"torch {torch.__version__} has no kernels for {_described(unfit)}, only for {' '.join(architectures)}"
    else:
        fault = f"torch {torch.__version__} finds no GPU; is the driver too old for CUDA {torch.version.cuda}?"
    version = torch.__version__.partition("+")[0]
    try:
        build = suitable_build(found)
    except ValueError as error:
        return f"{fault}; {error}"
    return f"{fault}; install torch=={version}+{build} from {INDEX}/{build}, as ./setup.sh does"


def _described(found: Iterable[Device]) -> str:
    kinds = sorted({(device.compute_capability, device.driver) for device in found})
    return ", ".join(f"compute capability {major}.{minor} (driver {driver})" for (major, minor), driver in kinds)


def _is_fit(version: str, found: Sequence[Device]) -> bool:
    try:
        return metadata.version("torch").partition("+")[0] == version and not installed_fault(found)
    except (ImportError, OSError):  # not installed, or not all that it needs
        return False


def main() -> int:
    """Entry point; returns the exit status."""
    try:
        found = devices()
        if sys.argv[1:2] == ["--check"]:
            return int(not _is_fit(sys.argv[2], found))
        if sys.argv[1:] == ["--fault"]:
            if fault := installed_fault(found):
                print(f"setup.sh: warning: {fault}", file=sys.stderr)
            return 0
        print(suitable_build(found))
    except ValueError as error:
        print(f"setup.sh: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
