"""Attention by torch's FlexAttention: the layout's rule is its mask, the relative bias its change of scores.

Blocks of 128 x 128 that the rule hides whole are skipped, no matrix of scores, biases or booleans is made. Compiled on
CUDA; on CPU, where FlexAttention has no backward pass, it runs plainly and serves tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pretrain.attention import RelativePositionBias
from pretrain.layout import Layout, visible


class FlexAttention:
    """See `attention.Attention`."""

    def __init__(self, layout: Layout, relative_bias: RelativePositionBias | None, dropout_rate: float) -> None:
        """Raises ValueError for what FlexAttention cannot: drop probabilities, or train on a CPU."""
        device = layout.ids_BS.device
        if dropout_rate:
            raise ValueError(f"flex attention cannot drop probabilities, and dropout is {dropout_rate}")
        if device.type == "cpu" and torch.is_grad_enabled():
            raise ValueError("flex attention has no gradient on a CPU; pass --attention cpu")
        num_samples, num_slots = layout.ids_BS.shape
        self.mask_mod = mask_mod(layout)
        self.score_mod = None if relative_bias is None else score_mod(layout, relative_bias)
        self._flex, make_mask = _compiled() if device.type == "cuda" else (flex_attention, create_block_mask)
        self._block_mask = make_mask(self.mask_mod, num_samples, None, num_slots, num_slots, device=device)

    def __call__(self, qkv_BS3HD: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        queries_BHSD, keys_BHSD, values_BHSD = qkv_BS3HD.transpose(1, 3).unbind(2)
        attended_BHSD: torch.Tensor = self._flex(
            queries_BHSD, keys_BHSD, values_BHSD, score_mod=self.score_mod, block_mask=self._block_mask
        )
        return attended_BHSD.transpose(1, 2)


def mask_mod(layout: Layout) -> Callable[..., torch.Tensor]:
    """FlexAttention's question whether a query slot sees a key slot."""
    roles_S, turns_BS = layout.roles_S, layout.turns_BS

    def sees(sample: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        seen: torch.Tensor = visible(roles_S[query], turns_BS[sample, query], roles_S[key], turns_BS[sample, key])
        return seen

    return sees


def score_mod(layout: Layout, relative_bias: RelativePositionBias) -> Callable[..., torch.Tensor]:
    """FlexAttention's change of a score: the relative bias, from a table by distance, so that no bucket is computed."""
    positions_BS = layout.positions_BS
    largest = positions_BS.shape[1]  # a position is less than the number of slots
    distances = torch.arange(-largest, largest + 1, device=positions_BS.device)
    weight = relative_bias.weight.to(torch.promote_types(relative_bias.weight.dtype, torch.float32))
    by_distance_HR = weight[:, relative_bias.bucket(distances)]

    def add_bias(score: torch.Tensor, sample: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        distance = positions_BS[sample, key] - positions_BS[sample, query]
        return score + by_distance_HR[head, distance + largest]

    return add_bias


@functools.cache
def _compiled() -> tuple[Any, Any]:
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)
