"""What a run's records say, as curves over steps, tokens and hours, and as events: for the report."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.tokenizer import MASK
from pretrain.gpus import GPUS
from pretrain.metrics import Records


@dataclass(frozen=True)
class Curve:
    """P points."""

    steps_P: np.ndarray
    hours_P: np.ndarray
    values_P: np.ndarray

    def extremes(self, num_stretches: int) -> Curve:
        """The first and the last point, and of each stretch of the curve the least and the greatest."""
        kept = {0, len(self.values_P) - 1}
        for start, stop in self._stretches(num_stretches):
            values = self.values_P[start:stop]
            kept |= {start + int(values.argmin()), start + int(values.argmax())}
        places = np.array(sorted(kept))
        return Curve(self.steps_P[places], self.hours_P[places], self.values_P[places])

    def medians(self, num_stretches: int) -> Curve:
        """Of each stretch the median, at the stretch's middle."""
        middles = [(start + stop - 1) // 2 for start, stop in self._stretches(num_stretches)]
        values = [np.median(self.values_P[start:stop]) for start, stop in self._stretches(num_stretches)]
        return Curve(self.steps_P[middles], self.hours_P[middles], np.array(values))

    def _stretches(self, count: int) -> list[tuple[int, int]]:
        """At most so many, none of them empty."""
        edges = np.linspace(0, len(self.values_P), min(count, len(self.values_P)) + 1).astype(int).tolist()
        return list(pairwise(edges))


@dataclass(frozen=True)
class Event:
    """Something that happened to a run, once."""

    kind: str
    """start, restart, rewind, fault (a checkpoint that could not be saved), save or stop."""
    step: int
    hours: float
    time: float
    """Seconds since 1970."""
    text: str


class History:
    """A run's records. Hours are those of training: what lies between the last record before a restart and the restart is
    not counted."""

    def __init__(self, run: Path) -> None:
        """Read a run's records. Raises FileNotFoundError where there are none."""
        found = Records(run)
        self.run = run
        self.records = found.update()
        self.damage = found.damage
        """Which lines are damaged, in words, or None."""
        hours, elapsed_s, session_start, last = [], 0.0, None, 0.0
        for record in self.records:
            if record["kind"] == "start" or session_start is None:
                elapsed_s += last - session_start if session_start is not None else 0.0
                session_start = record["time"]
            last = record["time"]
            hours.append((elapsed_s + last - session_start) / 3600)
        self._hours = hours
        starts = self.of_kind("start")
        self.start: dict[str, Any] = starts[-1] if starts else {}
        """The record of the newest start."""

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Its records, in order."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def hours(self) -> float:
        """Of training, up to the last record."""
        return self._hours[-1] if self._hours else 0.0

    @property
    def step(self) -> int:
        """Of the last training record."""
        return max((record["step"] for record in self.of_kind("train")), default=0)

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens of text in a batch, by the mean of the data set's training samples."""
        if "data" not in self.start:
            return None
        split = self.start["data"]["splits"]["train"]
        return float(self.start["batch_sizes"]["train_batch"] * split["num_tokens"] / split["num_samples"])

    @property
    def peak_flops_per_s(self) -> float | None:
        """Of all ranks' GPUs, where their kind is known."""
        if "machine" not in self.start:
            return None
        peak = gpu_flops_per_s(self.start["machine"]["device"], self.start["precision"])
        return peak and peak * self.start["world_size"]

    def curve(self, kind: str, *keys: str, factor: float = 1.0) -> Curve:
        """A value of the records of a kind, which may be inside of another; what is not finite is left out."""
        points = []
        for record, hours in zip(self.records, self._hours, strict=True):
            if record["kind"] != kind:
                continue
            value: Any = record
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None and math.isfinite(value):
                points.append((record["step"], hours, value * factor))
        columns = np.array(points, dtype=float).reshape(-1, 3).T
        return Curve(*columns)

    def skipped(self) -> Curve:
        """Where fp16 skipped steps since the record before, at the loss scale of then."""
        points, before = [], 0
        for record, hours in zip(self.records, self._hours, strict=True):
            if record["kind"] == "train" and "skipped_steps" in record:
                if record["skipped_steps"] > before:
                    points.append((record["step"], hours, record["loss_scale"]))
                before = record["skipped_steps"]
        return Curve(*np.array(points, dtype=float).reshape(-1, 3).T)

    def events(self) -> list[Event]:
        """What happened, in order."""
        found = []
        for record, hours in zip(self.records, self._hours, strict=True):
            if event := _event(record):
                kind, text = event
                found.append(Event(kind, record.get("fault_step", record["step"]), hours, record["time"], text))
        return found


def gpu_flops_per_s(device: str, precision: str) -> float | None:
    """The peak rate of a GPU by the name that it gives itself, None of one that is not known."""
    for kind, gpu in GPUS.items():
        if re.search(rf"\b{re.escape(kind.partition('-')[0])}\b", device):
            return gpu.tflops[precision] * 1e12 if precision in gpu.tflops else None
    return None


def _event(record: dict[str, Any]) -> tuple[str, str] | None:
    match record["kind"]:
        case "start":
            ranks = f"{record['world_size']} {'rank' if record['world_size'] == 1 else 'ranks'}"
            return ("restart", f"resumed on {ranks}") if record["resumed"] else ("start", f"started on {ranks}")
        case "fault" if "fault_step" in record:
            samples = f"samples {record['first_sample']:,} to {record['stop_sample'] - 1:,} skipped"
            return "rewind", f"{record['fault']}; back to step {record['step']:,}, {samples}"
        case "fault":
            return "fault", str(record["fault"])
        case "save":
            return (
                "save",
                f"saved, {record['size_bytes'] / 1e6:,.0f} MB, training stood still for {record['save_s']:.2f} s",
            )
        case "stop":
            return "stop", str(record["reason"])
    return None


def filled_text(prompt: dict[str, Any], mark: str = "") -> str:
    """A prompt of a cloze record with the likeliest entry at each mask, `mark` before and behind it."""
    guesses = iter(f"{mark}{predictions[0][0]}{mark}" for predictions in prompt["masks"])
    return re.sub(re.escape(MASK), lambda match: next(guesses, MASK), prompt["text"])
