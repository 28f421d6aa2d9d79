"""The C++ compiler that an offloaded optimizer and `--compile` need; nothing else does."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def compiler_fault(*programs: str) -> str | None:
    """Return which of a C++ compiler, Python's headers and `programs` are missing here, and the remedy, or None."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    needed = (os.environ.get("CXX", "c++"), *programs)
    missing = [f"the program {name}" for name in needed if not shutil.which(name, path=path)]
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.is_file():
        missing.append(str(headers))
    if not missing:
        return None
    return (
        f"it is compiled at its first use, and {' and '.join(missing)} is missing: install it (Debian: g++, python3-dev; a "
        "compiler of another name: CXX), or do without, which needs no compiler"
    )
