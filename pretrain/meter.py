"""Speed and memory of the steps since the last record."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from pretrain import distributed
from pretrain.flops import step_flops
from pretrain.layout import Layout
from pretrain.model import PMLMConfig


class Meter:
    """A stopwatch that also counts tokens and FLOPs; it runs while a step is computed, not during validations and saves."""

    def __init__(self, model: PMLMConfig) -> None:
        self._model = model
        self._started: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._step_time_s, self._data_wait_s, self._num_tokens, self._num_flops = 0.0, 0.0, 0, 0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Begin a step, whose batches are waited for inside."""
        self._started = time.perf_counter()
        yield
        self._data_wait_s += time.perf_counter() - self._started

    def count(self, micro_batches: Sequence[Layout]) -> None:
        """Count what this rank has computed in the step."""
        self._num_tokens += sum(layout.num_tokens for layout in micro_batches)
        self._num_flops += sum(step_flops(self._model, layout).needed for layout in micro_batches)

    def step_done(self) -> None:
        """End the step."""
        assert self._started is not None
        self._step_time_s += time.perf_counter() - self._started

    def take(self, peak_memory_bytes: int) -> dict[str, Any]:
        """Return the values since the last call, of all ranks together; of memory, of the rank that has taken most.

        `peak_memory_bytes`: of this rank's GPU, 0 without one. Called by all ranks.
        """
        rank, world_size = distributed.rank(), distributed.world_size()
        own = torch.zeros(2 + 2 * world_size, dtype=torch.float64)
        own[:2] = torch.tensor([self._num_tokens, self._num_flops], dtype=torch.float64)
        own[2 + rank] = psutil.Process().memory_info().rss
        own[2 + world_size + rank] = peak_memory_bytes
        total = distributed.sum_over_ranks(own).cpu()
        host_bytes, device_bytes = (int(part.max()) for part in total[2:].split(world_size))
        values = {
            "tokens_per_s": round(float(total[0]) / self._step_time_s, 1),
            "flops_per_s": round(float(total[1]) / self._step_time_s),
            "host_memory_bytes": host_bytes,
            **({"memory_bytes": device_bytes} if device_bytes else {}),
            "data_wait": round(self._data_wait_s / self._step_time_s, 5),
        }
        self._reset()
        return values
