"""A guard against spikes and NaN: what is a fault, which samples are skipped for it, and what is kept of it for replay.

A fault is a loss or a gradient norm above its recent band, or not finite, or an overflow at fp16's smallest loss scale.
The run goes back to its last checkpoint and on behind the samples it has seen since, the *window*.

    RUN/faults/step00000123/fault.json       reason, window, recent values, what the run is
    RUN/faults/step00000123/samples.jsonl    a line a step of the window: the training samples' numbers and epochs
    RUN/faults/step00000123/deepspeed.json   the DeepSpeed JSON, for `python -m pretrain.replay`
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.files import sync_directory, write_json, write_whole

FORMAT = "pmlm-fault"
FAULT = "fault.json"
SAMPLES = "samples.jsonl"
DEEPSPEED = "deepspeed.json"
_LEAST_STEPS = 20  # of the recent past, to know a band by
_LEAST_DEVIATION = {"loss": 0.02, "gradient_norm": 0.15}  # in logarithms: where nothing moves, 2% of a loss is none
_OF_A_NORMAL = 1.4826  # standard deviation / median absolute deviation


@dataclass(frozen=True)
class StepValues:
    """Of one step, over all ranks, so that each rank judges alike."""

    step: int
    loss: float
    gradient_norm: float


@dataclass(frozen=True)
class Window:
    """Samples that are skipped."""

    first_sample: int
    """Place in the run's order of samples."""
    stop_sample: int
    checkpoint_step: int
    """The step after which the window began."""
    fault: str
    """Folder of the fault in RUN/faults."""


def behind(place: int, skipped: Iterable[Window]) -> int:
    """The place of the next sample: `place`, or the one behind the windows that begin there."""
    stops = {window.first_sample: window.stop_sample for window in skipped}
    while place in stops:
        place = stops[place]
    return place


class Guard:
    """Judges steps by the recent ones."""

    def __init__(self, spike_deviations: float, spike_window_steps: int) -> None:
        self._deviations = spike_deviations
        self._recent: deque[StepValues] = deque(maxlen=spike_window_steps)

    @property
    def recent(self) -> list[list[float]]:
        """The applied steps it judges by, to be restored after a restart."""
        return [[values.step, values.loss, values.gradient_norm] for values in self._recent]

    def restore(self, recent: Iterable[list[float]]) -> None:
        """Judge by these steps alone."""
        self._recent.clear()
        self._recent.extend(StepValues(int(step), loss, norm) for step, loss, norm in recent)

    def fault_of(self, values: StepValues, *, is_overflow: bool, is_at_smallest_scale: bool) -> str | None:
        """What is wrong with a step, or None; `is_overflow`: fp16 skipped it, which is nothing unless its scale is spent."""
        if is_overflow:
            return "gradients overflow at fp16's smallest loss scale" if is_at_smallest_scale else None
        for name in ("loss", "gradient_norm"):
            value = getattr(values, name)
            if not math.isfinite(value) or value < 0:
                return f"{name.replace('_', ' ')} is not finite"
        for name in ("loss", "gradient_norm"):
            if reason := self._spike(name, getattr(values, name)):
                return reason
        self._recent.append(values)
        return None

    def _spike(self, name: str, value: float) -> str | None:
        """In logarithms, as losses and norms are positive, and norms vary by factors."""
        if not self._deviations or len(self._recent) < min(_LEAST_STEPS, self._recent.maxlen or 0):
            return None
        logs = [math.log(max(getattr(values, name), 1e-30)) for values in self._recent]
        median = statistics.median(logs)
        width = max(_OF_A_NORMAL * statistics.median(abs(log - median) for log in logs), _LEAST_DEVIATION[name])
        limit = median + self._deviations * width
        if math.log(max(value, 1e-30)) <= limit:
            return None
        return (
            f"{name.replace('_', ' ')} {value:.4g} is above {math.exp(limit):.4g}, the band of the last {len(logs)} steps "
            f"around {math.exp(median):.4g}"
        )


def faults_folder(run: Path) -> Path:
    """Where a run keeps what is known of its faults."""
    return run / "faults"


def new_fault_name(run: Path, step: int) -> str:
    """A folder's name that is free: a step may be at fault again after a rewind."""
    names = [f"step{step:08d}", *(f"step{step:08d}-{number}" for number in range(2, 1000))]
    return next(name for name in names if not (faults_folder(run) / name).exists())


def write_fault(
    run: Path, window: Window, about: dict[str, Any], deepspeed: dict[str, Any], samples: Iterable[str]
) -> None:
    """Keep a fault; whole or not at all."""
    folder = faults_folder(run) / window.fault
    unfinished = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write_whole(unfinished / SAMPLES, "".join(f"{line}\n" for line in samples).encode())
        write_json(unfinished / DEEPSPEED, deepspeed)
        write_json(unfinished / FAULT, {"format": FORMAT, "version": 1, **about, "window": asdict(window)})
        os.rename(unfinished, folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_directory(folder.parent)
