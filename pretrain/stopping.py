"""When to end a run before its last step: a signal, --max_hours, or a launcher that is gone.

A rank only notes what it was asked; the ranks agree by adding up their votes, before each step and each batch of a validation.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_MAX_HOURS, _NO_LAUNCHER = "--max_hours", "the launcher is gone"
REASONS = ("Ctrl-C", "SIGTERM", "SIGUSR1", _MAX_HOURS, _NO_LAUNCHER)
"""Why a run may be asked to end; a vote has a number for each."""
_LAUNCHERS = frozenset({
    "deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "mpirun",
    "mpiexec", "orterun", "orted", "prterun", "prted", "slurmstepd",
})  # fmt: skip
_POLL_S = 1.0
_SAME_CTRL_C_S = 1.0  # one Ctrl-C may reach a rank twice: from the terminal and from its launcher
_INTERRUPTED_STATUS = 130


class Stopping:
    """Notes, while it is entered, that this rank was asked to end; a second Ctrl-C ends it at once.

    Signals are taken by a thread, as the main thread may be waiting inside a collective.
    """

    def __init__(self, max_hours: float) -> None:
        """`max_hours` counts from the start of the process; 0 = no limit."""
        self._deadline = psutil.Process().create_time() + 3600 * max_hours if max_hours else float("inf")
        self._launchers = _launchers()
        self._asked: set[str] = set()
        self._interrupted = float("-inf")
        self._has_ended = False
        self._thread = threading.Thread(target=self._listen, name="stopping", daemon=True)

    def __enter__(self) -> Stopping:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, _do_nothing) for number in _SIGNALS}
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._has_ended = True
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def vote(self) -> list[float]:
        """Return a number for each of REASONS: 1 where this rank has it. The other ranks may not know yet, so that nothing
        may follow from it before it has been summed over them."""
        return [float(reason in self._asked) for reason in REASONS]

    def _listen(self) -> None:
        while not self._has_ended:
            if select.select([self._reader], [], [], _POLL_S)[0]:
                for number in os.read(self._reader, 64):
                    self._take(number)
            if time.time() >= self._deadline:
                self._asked.add(_MAX_HOURS)
            if not all(map(_is_alive, self._launchers)):
                self._asked.add(_NO_LAUNCHER)

    def _take(self, number: int) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if "Ctrl-C" in self._asked and now - self._interrupted > _SAME_CTRL_C_S:
                os._exit(_INTERRUPTED_STATUS)
            if "Ctrl-C" not in self._asked:
                self._interrupted = now
            self._asked.add("Ctrl-C")
        elif number in _SIGNALS:
            self._asked.add(signal.Signals(number).name)


def agreed_reason(votes: Sequence[float]) -> str | None:
    """The first reason that any rank has, given the sum of all ranks' votes."""
    return next((reason for reason, count in zip(REASONS, votes, strict=True) if count), None)


def _do_nothing(number: int, frame: object) -> None:
    """A handler, so that the signal does not end the process; its number goes to the wakeup pipe."""


def _launchers() -> list[psutil.Process]:
    """The processes that keep this one: its parents, as far up as they are launchers.

    Not a shell, which may go and leave a run behind on purpose (`nohup ... &`).
    """
    found: list[psutil.Process] = []
    for process in psutil.Process().parents():
        try:
            names = {process.name(), *(Path(word).name for word in process.cmdline()[:4])}
        except psutil.Error:
            break
        if not names & _LAUNCHERS:
            break
        found.append(process)
    return found


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
