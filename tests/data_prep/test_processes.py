from __future__ import annotations

import subprocess
import sys

from support import REPOSITORY

COMPILED_CODE_AND_SCIPY = """
import sys
import numpy as np
from data_prep.draws import unit_intervals
from data_prep.processes import LocalProcesses
with LocalProcesses(1) as processes:
    processes.prepare(lambda: None)
assert unit_intervals(np.zeros(1, np.uint64), 0).shape == (1,)
assert "scipy.linalg" not in sys.modules
import scipy.linalg
assert scipy.linalg.norm(np.ones(4)) == 2
"""


def test_compiled_code_does_not_load_scipy_which_works_all_the_same() -> None:
    subprocess.run([sys.executable, "-c", COMPILED_CODE_AND_SCIPY], cwd=REPOSITORY, check=True)
