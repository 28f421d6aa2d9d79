"""What work was done, and how far it is: for a bar, and for hours that someone spends looking at it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.console import progress_bar


@dataclass(frozen=True)
class Work:
    """What a task did."""

    size: int
    """In the unit of its stage: bytes read or samples written."""
    documents: int = 0
    tokens: int = 0
    value: Any = None
    """What else the main process wants to know of it."""
    process: str = ""
    """Who did it, for example "rank 3"; filled in, as `seconds`, by the process itself."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Stage:
    """Tasks of one kind, and how much there is to do."""

    name: str
    total: int
    unit: str
    done: int = 0
    """Done by an earlier, interrupted run."""
    is_lasting: bool = True
    """Whether its bar stays when it is done."""


class Progress:
    """A bar with the documents, tokens a second and the slowest of several processes beside rate and time left.

    The slowest process is the one with the least done in this stage; how long nothing was heard of it is shown, too.
    """

    def __init__(self, stage: Stage, processes: Sequence[str], *, is_shown: bool) -> None:
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._documents = self._tokens = 0
        self._size = dict.fromkeys(processes, 0)
        self._heard = dict.fromkeys(processes, self._started)
        self._bar = progress_bar(
            stage.name, stage.total, stage.unit, initial=stage.done, is_shown=is_shown, is_lasting=stage.is_lasting
        )
        self._has_ended = threading.Event()
        self._clock = threading.Thread(target=self._refresh_while_nothing_comes, daemon=True)

    def add(self, work: Work) -> None:
        """Count what a process has done."""
        with self._lock:
            self._documents += work.documents
            self._tokens += work.tokens
            self._size[work.process] += work.size
            self._heard[work.process] = time.monotonic()
            self._bar.set_postfix_str(self._describe(), refresh=False)
            self._bar.update(work.size)

    def _describe(self) -> str:
        now = time.monotonic()
        words = [f"{self._documents:,} documents"] if self._documents else []
        if self._tokens:
            words.append(f"{self._tokens / (now - self._started):,.0f} tokens/s")
        mean = sum(self._size.values()) / len(self._size)
        if mean and len(self._size) > 1:
            slowest = min(self._size, key=self._size.__getitem__)
            share, age_s = self._size[slowest] / mean, now - self._heard[slowest]
            words.append(f"slowest: {slowest} with {share:.0%} of the mean, heard {age_s:.0f} s ago")
        return ", ".join(words)

    def _refresh_while_nothing_comes(self) -> None:
        interval_s = max(self._bar.mininterval, 1.0)
        while not self._has_ended.wait(interval_s):
            with self._lock:
                if time.time() - self._bar.last_print_t >= interval_s:
                    self._bar.set_postfix_str(self._describe(), refresh=False)
                    self._bar.refresh()

    def __enter__(self) -> Progress:
        if not self._bar.disable:
            self._clock.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._has_ended.set()
        if self._clock.is_alive():
            self._clock.join()
        self._bar.close()
