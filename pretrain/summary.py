"""What a run came to, in a few lines."""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path
from typing import Any

from pretrain.checkpoint import checkpoints_folder
from pretrain.metrics import METRICS, read_records


def summary(run: Path) -> str:
    """Where things are, losses at the start and the end, speed, and what to do next."""
    records = read_records(run)
    trained = [r for r in records if r["kind"] == "train"]
    validated = [r for r in records if r["kind"] == "validation"]
    lines = [
        "",
        f"checkpoints  {checkpoints_folder(run)}",
        f"metrics      {run / METRICS}; charts: {shlex.join(['tensorboard', '--logdir', str(run / 'tensorboard')])}",
        f"logs         {run / 'logs'}",
    ]
    for name, of_kind in (("training", trained), ("validation", validated)):
        if of_kind:
            lines.append(f"{name:12} {_first_and_last(of_kind)}")
    if trained:
        speed = statistics.median(r["tokens_per_s"] for r in trained)
        lines.append(f"speed        {speed:,.0f} tokens/s (median)")
    lines.append(f"report       {shlex.join(['python', '-m', 'pretrain.report', str(run)])}")
    export = ["python", "-m", "pretrain.export", "--run", str(run), "--output", str(run / "export")]
    lines.append(f"next         {shlex.join(export)}")
    return "\n".join(lines)


def _first_and_last(records: list[dict[str, Any]]) -> str:
    first, last = records[0], records[-1]
    parts = [
        f"{name.upper()} loss {first[f'{name}_loss']:.3f} -> {last[f'{name}_loss']:.3f}"
        for name in ("ae", "par")
        if f"{name}_loss" in first and f"{name}_loss" in last
    ]
    return f"{', '.join(parts)} (step {first['step']} -> {last['step']})"
