"""What a training step keeps in the memory of one GPU or process.

Counted from what `model.py`, the attention backends and `cross_entropy.py` save for the backward pass, and from what
DeepSpeed 0.19 allocates under each ZeRO stage; a test holds it to what is measured on a CPU.

Shapes: as in model.py and attention.py; a number of the model's precision has E bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from pretrain.attention import AttentionBackend
from pretrain.cross_entropy import chunk_predictions
from pretrain.layout import Layout
from pretrain.model import PMLM, PMLMConfig

STATE_BYTES = 12
"""Of a parameter: DeepSpeed's fp32 weight and Adam's two moments."""
_BLOCK_SLOTS, _BLOCK_BYTES = 128, 32  # of flex attention's masks, both ways, full and partial blocks apart


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment when a step needs most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept from the forward pass of a micro batch for its backward pass."""
    logits: int
    """A chunk of the output layer's."""
    buffers: int
    """What the backward pass has in hand beside them, the buckets in which gradients travel; or what the update has."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Passing:
    """Bytes that a micro batch needs beside weights and optimizer."""

    activations: int
    logits: int
    buffers: int


def num_parameters(config: PMLMConfig) -> int:
    """Of the model; the output embedding is the word embedding."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in PMLM(config).parameters())


def number_bytes(precision: str) -> int:
    """E of fp16, bf16 or fp32."""
    return 4 if precision == "fp32" else 2


def checkpoint_bytes(num_parameters: int, precision: str) -> int:
    """The size of a checkpoint: fp32 weights and two moments, and the weights that the model computes with."""
    return num_parameters * (STATE_BYTES + number_bytes(precision))


def states(num_parameters: int, precision: str, stage: int, world_size: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer of a rank; stage 0 is plain data parallelism with fp32 weights in Adam."""
    whole = num_parameters * number_bytes(precision)
    weights, gradients, optimizer = whole, whole, num_parameters * STATE_BYTES
    return (
        -(-weights // (world_size if stage >= 3 else 1)),
        -(-gradients // (world_size if stage >= 2 else 1)),
        -(-optimizer // (world_size if stage >= 1 else 1)),
    )


def passing(
    config: PMLMConfig, layout: Layout, precision: str, backend: AttentionBackend, *, is_cuda: bool,
    activation_checkpointing: bool = False,
) -> Passing:  # fmt: skip
    """What forward and backward pass of a micro batch hold at most, its model in training mode."""
    return _MicroBatch(config, layout, number_bytes(precision), backend, is_cuda).passing(activation_checkpointing)


class _MicroBatch:
    def __init__(self, config: PMLMConfig, layout: Layout, e: int, backend: AttentionBackend, is_cuda: bool) -> None:
        self._config, self._layout, self._e, self._backend = config, layout, e, backend
        self._mask_bytes = 1 if is_cuda and config.dropout else 0  # on a CPU dropout keeps a seed
        self._bounds = [
            (num_context, stop - start, last - first)
            for num_context, (start, stop), (first, last) in zip(
                layout.context_lengths, pairwise(layout.edges), pairwise(layout.predicted_edges), strict=True
            )
        ]  # L, S and P of each sample
        self._per_target = sum(places is not None for places in (layout.ae_places_T, layout.par_places_T))
        context, whole, predicted = map(max, zip(*self._bounds, strict=True))
        self._padded: tuple[int, int, int, int] = len(self._bounds), context, whole, predicted

    def passing(self, checkpointing: bool) -> Passing:
        config, layout, e = self._config, self._layout, self._e
        hidden, vocab = config.hidden_size, config.vocab_size
        slots, rows, predictions = len(layout.ids_N), len(layout.predicted_R), layout.num_targets * self._per_target
        embeddings = slots * hidden * (e + self._mask_bytes)
        inner, last = self._layer(slots, is_last=False), self._layer(rows, is_last=True)
        inputs = config.num_layers * slots * hidden * e
        kept = embeddings + self._of_all_layers()
        kept += inputs if checkpointing else (config.num_layers - 1) * inner + last
        head = predictions * hidden * 4 * e
        chunk = chunk_predictions(vocab)
        logits = min(predictions, chunk) * vocab * (8 if predictions > chunk else 4 if e == 4 else 6)
        # The output layer's part of the word embedding's gradient waits for the other part to the end.
        tied, biases = vocab * hidden * e, self._biases()
        moments = [head + logits + tied + predictions * hidden * e + (biases if checkpointing else 0)]
        for of_layer, num_rows, freed, is_last in ((last, rows, 0, True), (inner, slots, last, False)):
            there = of_layer - slots * hidden * e if checkpointing else -freed
            moments += [tied + biases + there + in_hand for in_hand in self._in_hand(num_rows, is_last=is_last)]
        return Passing(kept + head, logits, max(moments) - head - logits)

    def _layer(self, rows: int, *, is_last: bool) -> int:
        """What a layer keeps; the last one has another row for each of its inputs that is predicted from."""
        inputs = len(self._layout.ids_N) + (rows if is_last else 0)
        return (
            inputs * self._config.hidden_size * self._e + self._of_rows(rows) + self._attention(rows, is_last=is_last)
        )

    def _attention(self, rows: int, *, is_last: bool) -> int:
        config, e = self._config, self._e
        slots, hidden = len(self._layout.ids_N), config.hidden_size
        if self._backend != "reference":
            queries_keys_values = (rows + 2 * slots) * hidden * e
            is_flex = self._backend == "flex"
            return queries_keys_values + (rows * (hidden * e + 4 * config.num_heads) if is_flex else 0)
        samples, context, whole, predicted = self._padded
        # Products take copies of what lies in parts: the keys and values of all slots, and of the context once more.
        copied = predicted + 2 * whole if is_last else whole + 2 * (context + whole)
        keeps_dropped = config.dropout > 0 or e < 4
        score_bytes = 4 + (e if keeps_dropped else 0) + self._mask_bytes
        return samples * copied * hidden * e + self._scores(is_last=is_last) * score_bytes

    def _scores(self, *, is_last: bool) -> int:
        """Scores that the reference has of all samples, padded."""
        samples, context, whole, predicted = self._padded
        pairs = predicted * whole if is_last else context**2 + (whole - context) * whole
        return samples * self._config.num_heads * pairs

    def _of_all_layers(self) -> int:
        """What the attention of a batch keeps for all layers: masks, distances, and what `cpu` has of biases."""
        heads = self._config.num_heads if self._config.relative_buckets else 0
        samples, context, whole, predicted = self._padded
        if self._backend == "cpu":
            pairs = context**2
            for num_context, num_slots, num_predicted in self._bounds:
                targets = num_predicted // self._per_target
                pairs += (num_slots - num_context) * num_slots
                pairs += targets * num_context if self._layout.ae_places_T is not None else 0
                pairs += targets * num_slots if self._layout.par_places_T is not None else 0
            return pairs * (heads * self._e or 4)
        if self._backend == "flex":
            return _BLOCK_BYTES * (-(-len(self._layout.ids_N) // _BLOCK_SLOTS)) ** 2
        pairs = samples * (whole - context + predicted) * whole
        return pairs + (8 * (context**2 + pairs) if heads else 0)

    def _biases(self) -> int:
        """The reference's relative bias of all pairs, or its gradient."""
        heads = self._config.num_heads if self._config.relative_buckets else 0
        samples, context, whole, _ = self._padded
        if self._backend != "reference":
            return 0
        return heads * self._e * (context**2 + samples * (whole - context) * whole)

    def _in_hand(self, rows: int, *, is_last: bool) -> tuple[int, int]:
        """What the backward pass makes of a layer's feed-forward block, and then, that block's numbers gone, of attention."""
        config, e = self._config, self._e
        slots, hidden, intermediate = len(self._layout.ids_N), config.hidden_size, config.intermediate_size
        samples, context, whole, predicted = self._padded
        feed_forward = (rows * (intermediate + 2 * hidden) + hidden * intermediate) * e
        attention = (3 * rows + 2 * slots) * hidden * e - self._of_rows(rows)
        block = config.num_heads * (predicted * whole if is_last else max(context**2, (whole - context) * whole))
        if self._backend == "cpu":
            attention += block * (6 if config.dropout else 5) * e
        elif self._backend == "reference":
            attention += samples * block * (8 if e == 4 and not config.dropout else 4)
        return feed_forward, attention

    def _of_rows(self, rows: int) -> int:
        """Of each row a layer keeps the attended vector, the two sums that LayerNorm takes, what is between them, and both
        sides of GELU."""
        hidden = self._config.hidden_size
        return rows * (self._e * (4 * hidden + 2 * self._config.intermediate_size) + 2 * self._mask_bytes * hidden + 16)
