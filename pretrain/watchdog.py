"""Ranks that watch each other, and themselves: a run that stands still is ended, with the name of who holds it up.

Each rank writes a beat into the store in which the ranks met, once a second, and reads the others'. Times are counted in
a rank's own seconds awake, so that a job which is suspended and continued as a whole is not taken for one that hangs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import IO, Any

RETRY_STATUS = 75
"""Exit status of a rank that ended for no fault of its own: what was trained since the last checkpoint is to be done again."""
_TICK_S = 1.0
_SILENCE_LIMIT_S = 45.0  # of a process that does not even beat: stopped, or on a host that is down
_SHORT_SILENCE_TICKS = 3  # enough where a collective has failed already
_LAST_WORDS_S = 20.0
_STORE_KEEPER = 0
_DONE = "done"


class RankLost(Exception):
    """Another rank is gone, so this one cannot go on."""


@dataclass(frozen=True)
class _Beat:
    """What a rank says of itself."""

    count: int
    """Grows with each beat."""
    progress: int
    """Grows with each step, validation batch and phase."""
    doing: str
    ended: str = ""
    """Why it leaves; empty while it runs."""

    @property
    def has_failed(self) -> bool:
        return self.ended not in ("", _DONE)


class Watch:
    """Ends this process, while it is entered, when it makes no progress or another rank is silent."""

    def __init__(self, store: Any, rank: int, world_size: int, limit_minutes: float, console: IO[str]) -> None:
        """`store`: torch's, with a connection of its own; `limit_minutes` without progress, 0 = watch but never end."""
        self._store, self._rank, self._console = store, rank, console
        self._limit_s = 60 * limit_minutes
        self._doing, self._progress, self._still_ticks = "starting", 0, 0
        self._beats = [_Beat(0, 0, "starting")] * world_size
        self._silent_ticks = [0] * world_size
        self._count, self._is_store_gone = 0, False
        self._has_ended = threading.Event()
        self._send("")
        self._threads = [
            threading.Thread(target=work, name=work.__name__, daemon=True) for work in (self._beat, self._watch)
        ]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._leave(f"{kind.__name__}: {next(iter(str(error).splitlines()), '')}" if kind else _DONE)

    def progress(self, doing: str) -> None:
        """Something was brought to its end, and `doing` begins."""
        self._doing, self._still_ticks = doing, 0
        self._progress += 1

    def lost_rank(self) -> str | None:
        """After a collective failed: which rank is gone, in words; waits some seconds to find out."""
        for _ in range(_SHORT_SILENCE_TICKS + 3):
            has_failed = any(beat.has_failed for beat in self._beats)
            if has_failed or self._is_store_gone or max(self._silent_ticks) >= _SHORT_SILENCE_TICKS:
                return self._name_silent(_SHORT_SILENCE_TICKS)
            time.sleep(_TICK_S)
        return None

    def _send(self, ended: str) -> None:
        self._count += 1
        beat = _Beat(self._count, self._progress, self._doing, ended)
        self._store.set(_key(self._rank), json.dumps(asdict(beat)))

    def _beat(self) -> None:
        keys = [_key(rank) for rank in range(len(self._beats))]
        try:
            while not self._has_ended.is_set():
                self._send("")
                self._beats = [_Beat(**json.loads(value)) for value in self._store.multi_get(keys)]
                self._has_ended.wait(_TICK_S)
        except RuntimeError:  # torch's DistError: the connection to the store's keeper broke
            self._is_store_gone = True

    def _watch(self) -> None:
        silence_limit_ticks = min(_SILENCE_LIMIT_S, self._limit_s) / _TICK_S
        counts = [beat.count for beat in self._beats]
        while not self._has_ended.wait(_TICK_S):
            beats = self._beats
            for rank, beat in enumerate(beats):
                is_silent = beat.count == counts[rank] and beat.ended != _DONE
                self._silent_ticks[rank] = self._silent_ticks[rank] + 1 if is_silent else 0
            counts = [beat.count for beat in beats]
            self._still_ticks += 1
            if not self._limit_s:
                continue
            if max(self._silent_ticks) > silence_limit_ticks:
                self._end(self._name_silent(int(silence_limit_ticks)))
            elif self._still_ticks * _TICK_S > self._limit_s:
                self._end(self._name_slowest())

    def _name_silent(self, limit_ticks: int) -> str:
        if left := [f"rank {r} ended: {beat.ended}" for r, beat in enumerate(self._beats) if beat.has_failed]:
            return "; ".join(left)
        if self._is_store_gone or self._silent_ticks[self._rank] > limit_ticks // 2:  # no answer to our own beat
            return f"rank {_STORE_KEEPER} or its launcher, which keeps the ranks' store, is gone or stands still"
        silent = [r for r, ticks in enumerate(self._silent_ticks) if ticks >= limit_ticks]
        parts = [f"rank {r}, in {self._beats[r].doing}" for r in silent]
        return f"no sign of life from {'; '.join(parts)} (killed, stopped, or its host is down)"

    def _name_slowest(self) -> str:
        """All processes live: the ranks with the least progress hold up the others."""
        least = min(beat.progress for beat in self._beats)
        slowest = [f"rank {r}, in {beat.doing}" for r, beat in enumerate(self._beats) if beat.progress == least]
        return f"no progress for {self._limit_s / 60:g} minutes; furthest behind: {'; '.join(slowest[:8])}"

    def _end(self, reason: str) -> None:
        threading.Timer(_LAST_WORDS_S, os._exit, [RETRY_STATUS]).start()  # should the log's disk be what hangs
        text = f"rank {self._rank}, in {self._doing}: {reason}; this rank ends, with every thread's stack in its log"
        print(text, file=self._console, flush=True)
        self._leave(reason)
        print(f"{text}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(RETRY_STATUS)

    def _leave(self, words: str) -> None:
        self._has_ended.set()
        if self._is_store_gone or self._silent_ticks[self._rank] >= _SHORT_SILENCE_TICKS:
            return  # the store would not answer
        current = threading.current_thread()
        for thread in self._threads:
            if thread is not current and thread.is_alive():
                thread.join(2 * _TICK_S)
        try:
            self._send(words)
        except RuntimeError:
            self._is_store_gone = True
        if self._rank == _STORE_KEEPER and words != _DONE:  # the store goes with it; the others are to read the words
            time.sleep(_SHORT_SILENCE_TICKS * _TICK_S)


def _key(rank: int) -> str:
    return f"watch/{rank}"
