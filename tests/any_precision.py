"""run_pretrain.py on a CPU that is told to have every precision: torch computes fp16 right everywhere, though slowly.

Run as a script, with run_pretrain.py's own flags, it is that program. So fp16's paths are tested on every machine.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def allow_every_precision() -> None:
    """Make DeepSpeed and the program's own check accept every precision in this process."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from pretrain.device import Speeds

    CPU_Accelerator.is_fp16_supported = lambda self: True
    Speeds.missing = lambda self, precision: None  # type: ignore[method-assign]


if __name__ == "__main__":
    repository = Path(__file__).resolve().parent.parent
    sys.path[0] = str(repository)
    allow_every_precision()
    runpy.run_path(str(repository / "run_pretrain.py"), run_name="__main__")
