from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest
from support import REPOSITORY

from data_prep.memory import keep_freed_memory

FAULTS_WHERE_MEMORY_IS_TAKEN_AGAIN = """
import resource
from data_prep.memory import keep_freed_memory
assert keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    before = faults()
    taken = bytearray(b"x") * 100_000_000
    del taken
    print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_once_taken_are_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS_WHERE_MEMORY_IS_TAKEN_AGAIN], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE
    )
    first, again = map(int, done.stdout.split())
    assert again < max(10, first / 10)


def test_nothing_is_done_where_the_library_has_no_mallopt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
