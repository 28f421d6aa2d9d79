"""What a run writes about itself: RUN/metrics.jsonl and TensorBoard.

A record is a JSON object a line; "kind" is "train", "validation", "cloze", "start", "save", "fault" or "stop". After a resume,
records of steps that are done again are removed, so each step of the run appears once; what happened (start, fault, stop) stays.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.files import write_whole

METRICS = "metrics.jsonl"
MEASURED = (
    "time", "tokens_per_s", "flops_per_s", "data_wait", "memory_bytes", "host_memory_bytes", "validation_s"
)  # fmt: skip
"""Values that differ between runs that compute the same."""
_WHAT_HAPPENED = ("start", "fault", "stop")


class Records:
    """The records of a run as they are written; what was read is not read again."""

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS
        self._identity: tuple[int, int] | None = None
        self._read_bytes = 0
        self.lines: list[tuple[bytes, dict[str, Any] | None]] = []
        """Each line, and its record, or None where the line is damaged."""

    def update(self) -> list[dict[str, Any]]:
        """Return all whole records there are now, in order. Raises FileNotFoundError where there is no run."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            raise FileNotFoundError(
                2, "no records of a run there; expected the folder given as --run", str(self.path)
            ) from None
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._identity or status.st_size < self._read_bytes:  # written anew, by a restart
                self._identity, self._read_bytes, self.lines = identity, 0, []
            file.seek(self._read_bytes)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]  # a last line cut off by a crash is left out
        self._read_bytes += len(complete)
        self.lines += [(line, _record_of(line)) for line in re.findall(rb"[^\n]*\n", complete)]
        return [record for _, record in self.lines if record]

    @property
    def damage(self) -> str | None:
        """Which lines are damaged and skipped, in words, or None."""
        numbers = [number for number, (_, record) in enumerate(self.lines, 1) if not record]
        if not numbers:
            return None
        named = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        what = "line is" if len(numbers) == 1 else "lines are"
        return f"{self.path}: {len(numbers)} damaged {what} skipped: {named}"


def _record_of(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return None
    is_record = (
        isinstance(record, dict)
        and isinstance(record.get("kind"), str)
        and isinstance(record.get("step"), int)
        and isinstance(record.get("time"), (int, float))
    )
    return record if is_record else None


def read_records(run: Path) -> list[dict[str, Any]]:
    """Return all records of a run, in order, without damaged lines; none where there is no run."""
    try:
        return Records(run).update()
    except FileNotFoundError:
        return []


def numbers(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among a record's values, those inside of other values too, each as prefix/name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers(f"{prefix}/{name}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}/{name}", value


def _is_kept(record: dict[str, Any], resumed_step: int) -> bool:
    return record["step"] <= resumed_step or record["kind"] in _WHAT_HAPPENED


class Metrics:
    """Rank 0's records; the other ranks have none."""

    def __init__(self, run: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, as who reads records has no need of torch

        run.mkdir(parents=True, exist_ok=True)
        found = Records(run)
        if found.path.exists():
            found.update()
        self.damage = found.damage
        """Lines of an earlier start that cannot be read, in words, or None. They are kept as they are."""
        write_whole(found.path, b"".join(line for line, r in found.lines if not r or _is_kept(r, resumed_step)))
        self._descriptor = os.open(run / METRICS, os.O_WRONLY | os.O_APPEND)
        self._unwritten = b""
        self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)

    def record(self, kind: str, step: int, values: dict[str, Any], text: str | None = None) -> None:
        """Write a record; its numbers, but for a start's, also go to TensorBoard, and `text`, in Markdown.

        What a full disk does not take is kept in memory and written when it can be.
        """
        line = json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n"
        self._unwritten += line.encode()
        with suppress(OSError):
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._descriptor, self._unwritten) :]
        with suppress(OSError):  # of a writer whose thread met a full disk: its charts end there
            for name, value in numbers(kind, values) if kind != "start" else ():
                self._tensorboard.add_scalar(name, value, step)
            if text is not None:
                self._tensorboard.add_text(kind, text, step)

    def close(self) -> None:
        """Flush and close both."""
        os.close(self._descriptor)
        with suppress(OSError):
            self._tensorboard.close()
