"""How many floating-point operations a training step needs.

That is what a step is measured against: PAR's price is its appended slots, 2 for each masked token, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from pretrain.cross_entropy import chunk_predictions
from pretrain.layout import Layout
from pretrain.model import PMLMConfig


@dataclass(frozen=True)
class StepFlops:
    """Of a forward and a backward pass; a multiplication and an addition are two."""

    layers: int
    """Matrix products of slots and weights; of the last layer, what the predicted slots need."""
    attention: int
    """Context rows against context keys, appended rows against all of their sample's."""
    head: int
    """Of the predicted slots alone."""
    recomputed: int
    """What is computed a second time to save memory: attention scores, and logits where they are many."""

    @property
    def needed(self) -> int:
        """All but what is computed a second time: the figure that a utilisation refers to."""
        return self.layers + self.attention + self.head


def step_flops(config: PMLMConfig, layout: Layout) -> StepFlops:
    """The operations of one micro batch; filler, if there is any, is counted."""
    num_slots, num_predicted, hidden = len(layout.ids_N), len(layout.predicted_R), config.hidden_size
    square, feed_forward = hidden**2, 2 * hidden * config.intermediate_size
    weights = (config.num_layers - 1) * num_slots * (4 * square + feed_forward)
    weights += num_slots * 2 * square + num_predicted * (2 * square + feed_forward)
    pairs = 0
    per_target = (layout.ae_places_T is not None) + (layout.par_places_T is not None)
    bounds = zip(pairwise(layout.edges), pairwise(layout.predicted_edges), layout.context_lengths, strict=True)
    for (start, stop), (first, last), num_context in bounds:
        num_of_sample = stop - start
        pairs += (config.num_layers - 1) * (num_context**2 + (num_of_sample - num_context) * num_of_sample)
        num_targets = (last - first) // per_target
        pairs += num_targets * num_context if layout.ae_places_T is not None else 0
        pairs += num_targets * num_of_sample if layout.par_places_T is not None else 0
    scores = 2 * pairs * hidden
    num_predictions = layout.num_targets * per_target
    logits = 2 * num_predictions * hidden * config.vocab_size
    kept = 2 * min(num_predictions, chunk_predictions(config.vocab_size)) * hidden * config.vocab_size
    return StepFlops(  # a backward pass has two products for each of the forward pass
        layers=3 * 2 * weights,
        attention=3 * 2 * scores,
        head=3 * (logits + 2 * num_predictions * hidden**2),
        recomputed=scores + logits - kept,
    )
