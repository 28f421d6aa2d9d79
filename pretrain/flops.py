"""How many floating-point operations a training step needs.

That is what a step is measured against: PAR's price is its appended slots, 2 for each masked token, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.layout import Layout
from pretrain.model import PMLMConfig


@dataclass(frozen=True)
class StepFlops:
    """Of a forward and a backward pass; a multiplication and an addition are two."""

    layers: int
    """Matrix products of slots and weights."""
    attention: int
    """Context rows against context keys, appended rows against all keys."""
    head: int
    """Of the predicted slots alone."""
    recomputed: int
    """What is computed a second time to save memory: attention scores and logits."""

    @property
    def needed(self) -> int:
        """All but what is computed a second time: the figure that a utilisation refers to."""
        return self.layers + self.attention + self.head


def step_flops(config: PMLMConfig, layout: Layout) -> StepFlops:
    """The operations of one micro batch; samples count with their padding."""
    num_samples, num_slots = layout.ids_BS.shape
    num_appended = num_slots - layout.num_context
    num_predictions = layout.num_targets * ((layout.ae_slots_T is not None) + (layout.par_slots_T is not None))
    hidden = config.hidden_size
    weights_of_a_layer = 4 * hidden**2 + 2 * hidden * config.intermediate_size
    pairs = num_samples * (layout.num_context**2 + num_appended * num_slots)
    scores = 2 * config.num_layers * pairs * hidden
    logits = 2 * num_predictions * hidden * config.vocab_size
    return StepFlops(  # a backward pass has two products for each of the forward pass
        layers=3 * 2 * config.num_layers * num_samples * num_slots * weights_of_a_layer,
        attention=3 * 2 * scores,
        head=3 * (logits + 2 * num_predictions * hidden**2),
        recomputed=scores + logits,
    )
