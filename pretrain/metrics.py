"""What a run writes about itself: RUN/metrics.jsonl and TensorBoard.

A record is a JSON object a line; "kind" is "train", "validation" or "start". After a resume, records of steps that
are done again are removed, so each step of the run appears once.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from data_prep.files import write_whole

METRICS = "metrics.jsonl"


def read_records(run: Path) -> list[dict[str, Any]]:
    """All records of a run, in order; a last line cut off by a crash is left out."""
    path = run / METRICS
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Metrics:
    """Rank 0's records; the other ranks have none."""

    def __init__(self, run: Path, resumed_step: int) -> None:
        run.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_records(run) if r["step"] <= resumed_step]
        write_whole(run / METRICS, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self._file = open(run / METRICS, "a", buffering=1)  # noqa: SIM115 (closed by close)
        self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write a record; numbers also go to TensorBoard."""
        self._file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._tensorboard.close()
