"""Where a rank's output goes: progress to the console, everything else to RUN/logs/rank_00000.log."""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any

_REPORT_TIME_S = 5.0


class _Unfailing(io.FileIO):
    """Drops what cannot be written: a broken pipe (pdsh's, when it is killed) or a full disk must not end a run."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or 0
        except OSError:
            return len(content)


def _unfailing_stream(descriptor: int) -> IO[str]:
    raw = _Unfailing(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), line_buffering=True, errors="backslashreplace")


def redirect_output(run: Path, rank: int) -> tuple[IO[str], Path]:
    """Send stdout and stderr, DeepSpeed's and compilers' included, to the rank's log; returns the console and the log.

    Done on the level of file descriptors, so what libraries and child processes write goes there too.
    """
    log = run / "logs" / f"rank_{rank:05d}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    console = _unfailing_stream(os.dup(sys.stderr.fileno()))
    with open(log, "a") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.stdout, sys.stderr = _unfailing_stream(sys.stdout.fileno()), _unfailing_stream(sys.stderr.fileno())
    print(f"\n--- started {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()} ---", flush=True)
    faulthandler.enable()
    return console, log


def report_crash(error: Exception, console: IO[str], log: Path | None, rank: int) -> None:
    """The traceback to the log, if there is one yet, and one line to the console."""
    traceback.print_exc()
    reason = next(iter(str(error).splitlines()), "")
    print(f"rank {rank}: {type(error).__name__}: {reason} (traceback: {log or 'above'})", file=console, flush=True)


def wait_for_the_first_rank_to_report(rank: int) -> None:
    """Most errors meet every rank; the launcher ends all at the first exit, so rank 0 is given time to speak first."""
    if rank != 0:
        time.sleep(_REPORT_TIME_S)
