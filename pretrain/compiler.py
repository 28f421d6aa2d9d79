"""The C++ compiler that DeepSpeed's own operators need. Only an offloaded optimizer uses one."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def compiler_fault() -> str | None:
    """Return what is missing here to compile DeepSpeed's optimizer for the host's memory, and the remedy, or None."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    compiler = os.environ.get("CXX", "c++")
    missing = [f"the program {name}" for name in (compiler, "ninja") if not shutil.which(name, path=path)]
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.is_file():
        missing.append(f"{headers} (Debian: python3-dev)")
    if not missing:
        return None
    return (
        f"DeepSpeed compiles its optimizer for the host's memory at its first use, and {' and '.join(missing)} is missing: "
        "install it, or leave offload_optimizer out, which needs no compiler"
    )
