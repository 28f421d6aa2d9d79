"""What a run writes about itself: RUN/metrics.jsonl and TensorBoard.

A record is a JSON object a line; "kind" is "train", "validation", "cloze", "start", "save", "fault" or "stop". After a resume,
records of steps that are done again are removed, so each step of the run appears once; what happened (start, fault, stop) stays.
"""

from __future__ import annotations

import json
import os
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


def read_records(run: Path) -> list[dict[str, Any]]:
    """All records of a run, in order; a last line cut off by a crash is left out."""
    path = run / METRICS
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def numbers(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among a record's values, those inside of other values too, each as prefix/name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers(f"{prefix}/{name}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}/{name}", value


class Metrics:
    """Rank 0's records; the other ranks have none."""

    def __init__(self, run: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, as who reads records has no need of torch

        run.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_records(run) if r["step"] <= resumed_step or r["kind"] in _WHAT_HAPPENED]
        write_whole(run / METRICS, "".join(json.dumps(r) + "\n" for r in kept).encode())
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
