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
        if dropout_rate:
            raise ValueError(f"flex attention cannot drop probabilities, and dropout is {dropout_rate}")
        if layout.ids_N.device.type == "cpu" and torch.is_grad_enabled():
            raise ValueError("flex attention has no gradient on a CPU; pass --attention cpu")
        self._layout, self._relative_bias = layout, relative_bias
        self._of_all = _Rows(layout, relative_bias, None)

    def __call__(self, qkv_N3HD: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        return self._of_all.attend(*qkv_N3HD.unbind(1))

    def of_predicted(self, queries_RHD: torch.Tensor, keys_values_N2HD: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        rows = _Rows(self._layout, self._relative_bias, self._layout.predicted_R)
        return rows.attend(queries_RHD, *keys_values_N2HD.unbind(1))


class _Rows:
    """Queries of all slots, or of those in `slots_R`, against all keys."""

    def __init__(
        self, layout: Layout, relative_bias: RelativePositionBias | None, slots_R: torch.Tensor | None
    ) -> None:
        device, num_slots = layout.ids_N.device, len(layout.ids_N)
        self._score_mod = None if relative_bias is None else score_mod(layout, relative_bias, slots_R)
        self._flex, make_mask = _compiled() if device.type == "cuda" else (flex_attention, create_block_mask)
        num_rows = num_slots if slots_R is None else len(slots_R)
        self._block_mask = make_mask(mask_mod(layout, slots_R), None, None, num_rows, num_slots, device=device)

    def attend(self, queries_QHD: torch.Tensor, keys_NHD: torch.Tensor, values_NHD: torch.Tensor) -> torch.Tensor:
        one_batch = (x.transpose(0, 1)[None] for x in (queries_QHD, keys_NHD, values_NHD))
        attended: torch.Tensor = self._flex(*one_batch, score_mod=self._score_mod, block_mask=self._block_mask)
        return attended[0].transpose(0, 1)


def mask_mod(layout: Layout, slots_R: torch.Tensor | None = None) -> Callable[..., torch.Tensor]:
    """FlexAttention's question whether a query, a slot or a place in `slots_R`, sees a key slot."""
    roles_N, turns_N, samples_N = layout.roles_N, layout.turns_N, layout.samples_N
    roles_Q, turns_Q, samples_Q = (x if slots_R is None else x[slots_R] for x in (roles_N, turns_N, samples_N))

    def sees(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        is_visible = visible(roles_Q[query], turns_Q[query], roles_N[key], turns_N[key])
        seen: torch.Tensor = is_visible & (samples_Q[query] == samples_N[key])
        return seen

    return sees


def score_mod(
    layout: Layout, relative_bias: RelativePositionBias, slots_R: torch.Tensor | None = None
) -> Callable[..., torch.Tensor]:
    """FlexAttention's change of a score: the relative bias, from a table by distance, so that no bucket is computed."""
    positions_N = layout.positions_N
    positions_Q = positions_N if slots_R is None else positions_N[slots_R]
    farthest = layout.longest  # a position is less than the number of slots
    by_distance_HM = relative_bias.by_distance(farthest)

    def add_bias(score: torch.Tensor, batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return score + by_distance_HM[head, positions_N[key] - positions_Q[query] + farthest]

    return add_bias


@functools.cache
def _compiled() -> tuple[Any, Any]:
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)
