"""A guard against spikes and NaN, which judges each step by the recent ones.

A fault is a loss or a gradient norm above its recent band, or not finite, or an overflow at fp16's smallest loss scale.
What the run does about one: recovery.py.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

_LEAST_STEPS = 20  # of the recent past, to know a band by
_LEAST_DEVIATION = {"loss": 0.02, "gradient_norm": 0.15}  # in logarithms: where nothing moves, 2% of a loss is none
_OF_A_NORMAL = 1.4826  # standard deviation / median absolute deviation


@dataclass(frozen=True)
class StepValues:
    """Of one step, over all ranks, so that each rank judges alike."""

    step: int
    loss: float
    gradient_norm: float


class Guard:
    """Judges steps by the recent ones."""

    def __init__(self, spike_deviations: float, spike_window_steps: int) -> None:
        self._deviations = spike_deviations
        self._recent: deque[StepValues] = deque(maxlen=spike_window_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the applied steps that it judges by, in JSON's types."""
        return {"recent_steps": [[values.step, values.loss, values.gradient_norm] for values in self._recent]}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Judge by these steps only; None: by none."""
        self._recent.clear()
        recent = state["recent_steps"] if state else []
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
