"""How long ranks talk in a step, by a model of rings: each rank passes its part on to the next.

What is sent when is DeepSpeed 0.19's: ZeRO 2 reduces a gradient in every micro batch, by an all-reduce of each bucket of
which a rank keeps its part; ZeRO 1 and plain data parallelism once a step. ZeRO 1 and 2 gather the weights after the
update. Reductions overlap with the backward pass where `overlap_comm` says so, but for the last bucket; the gathering of
weights overlaps with nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

HOP_S = 10e-6
"""Latency between neighbours of a ring."""
BACKWARD_SHARE = 2 / 3
"""Of the time of a micro batch."""


@dataclass(frozen=True)
class Network:
    """Bandwidths in bytes per second, one way."""

    gpus_per_node: int
    link: float
    """Of a GPU to others of its node."""
    between_nodes: float
    """Of a node to others."""

    def ring_s(self, num_bytes: float, ranks: int, passes: int, num_buckets: int = 1) -> float:
        """Seconds of a reduce-scatter or all-gather (1 pass) or all-reduce (2) of so many bytes."""
        if ranks == 1:
            return 0.0
        slowest = self.link if ranks <= self.gpus_per_node else min(self.link, self.between_nodes)
        return passes * ((ranks - 1) / ranks * num_bytes / slowest + (ranks - 1) * num_buckets * HOP_S)


@dataclass(frozen=True)
class Traffic:
    """What a rank has to say in a step."""

    weight_bytes: int
    """Of all weights, and as many of gradients."""
    stage: int
    num_buckets: int
    """In which the gradients travel."""
    overlaps: bool
    accumulation_steps: int

    def sent_bytes(self, ranks: int) -> int:
        """Of a rank, in a step."""
        part = self.weight_bytes * (ranks - 1) / ranks
        return round(
            part * {0: 2, 1: 3, 2: 2 * self.accumulation_steps + 1, 3: 3 * self.accumulation_steps}[self.stage]
        )

    def exposed_s(self, ranks: int, network: Network, micro_batch_s: float) -> float:
        """Seconds of a step in which nothing is computed, a micro batch taking `micro_batch_s` of computing."""
        gather = network.ring_s(self.weight_bytes, ranks, 1)
        if self.stage == 3:  # weights are gathered ahead for both passes, gradients scattered
            scatter = network.ring_s(self.weight_bytes, ranks, 1, self.num_buckets)
            hidden_s = micro_batch_s if self.overlaps else 0.0
            return self.accumulation_steps * max(0.0, 2 * gather + scatter - hidden_s)
        reduce = network.ring_s(self.weight_bytes, ranks, 2, self.num_buckets)
        if self.overlaps:
            last = reduce / self.num_buckets
            reduce = max(last, reduce - BACKWARD_SHARE * micro_batch_s)
        times = self.accumulation_steps if self.stage == 2 else 1
        return times * reduce + (gather if self.stage else 0.0)
