"""What a host tells of itself."""

from __future__ import annotations

import os
from pathlib import Path

from torch.utils.file_baton import FileBaton

from pretrain.probe import is_abandoned


def test_the_lock_of_a_compilation_is_abandoned_when_its_process_is_gone_or_after_long(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert not is_abandoned(lock, is_one_host=True)
    baton = FileBaton(str(lock))  # what torch locks its compilations with
    assert baton.try_acquire()
    assert not is_abandoned(lock, is_one_host=True)
    os.close(baton.fd)  # as the kernel does for a process that is killed
    assert is_abandoned(lock, is_one_host=True)
    assert not is_abandoned(lock)  # the process may be another host's
    os.utime(lock, (0, 0))
    assert is_abandoned(lock)
