"""`python -m data_prep`, held before it can be finished, however fast the machine is.

    python tests/held_build.py HOLD NUM_EVENTS build --corpus ...

An event is a line of a log or a change to the disk, of any worker process or MPI rank; each adds a byte to the file HOLD.
From event NUM_EVENTS on the processes wait, until they are killed or HOLD is removed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


class Hold:
    """The file HOLD, as a test sees it."""

    def __init__(self, path: Path, num_events: int) -> None:
        path.touch()
        self._path, self._num_events = path, num_events

    def command(self, *words: object) -> list[str]:
        """The command line of a held `python -m data_prep`."""
        return [sys.executable, __file__, str(self._path), str(self._num_events), *map(str, words)]

    def is_reached(self) -> bool:
        """Whether a process waits."""
        return self._path.stat().st_size >= self._num_events

    def release(self) -> None:
        """Let those that wait go on."""
        self._path.unlink(missing_ok=True)


def on_changes(react: Callable[[str, str], None]) -> None:
    """From now on call `react(event, path)` before this process opens a file for writing, renames, removes or makes one."""
    for_writing = os.O_WRONLY | os.O_RDWR

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            react(event, str(arguments[1 if event == "os.rename" else 0]))
        elif event == "open" and arguments[2] & for_writing:
            react(event, str(arguments[0]))

    sys.addaudithook(hook)


def _hold(path: str, num_events: int) -> int:
    sys.path[0] = str(REPOSITORY)
    from data_prep import processes
    from data_prep.__main__ import main

    counter = os.open(path, os.O_WRONLY | os.O_APPEND)

    def wait(*_: object) -> None:
        if parent_process() is None and processes.num_launched() == 1:
            return
        os.write(counter, b".")
        while os.fstat(counter).st_size >= num_events and os.path.exists(path):
            time.sleep(0.01)

    def log(*words: object, info: Callable[..., None] = processes._log.info) -> None:
        info(*words)
        wait()

    processes._log.info = log  # type: ignore[method-assign]
    on_changes(wait)
    return main()


if __name__ == "__main__":
    hold, number = sys.argv[1:3]
    del sys.argv[1:3]
    sys.exit(_hold(hold, int(number)))
