"""Attention over a layout: the plain reference, and the relative position bias.

Shapes: B samples, H heads, S = L context + A appended slots, D = size of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from pretrain.dropout import dropout
from pretrain.layout import Layout, visible


def relative_position_bucket(distance: torch.Tensor, num_buckets: int, max_distance: int) -> torch.Tensor:
    """T5's bidirectional bucket of (key position - query position).

    Half of the buckets are for keys behind the query; of each half, one half are exact distances and the other grows
    logarithmically up to `max_distance`, from where on all distances share the last.
    """
    half = num_buckets // 2
    num_exact = half // 2
    away = distance.abs()
    log_scale = torch.log(away.clamp(min=1).double() / num_exact) / math.log(max_distance / num_exact)
    far = (num_exact + (log_scale * (half - num_exact)).long()).clamp(max=half - 1)
    return torch.where(away < num_exact, away, far) + (distance > 0) * half


class RelativePositionBias(nn.Module):
    """One learned number for each head and bucket, shared by all layers."""

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, num_buckets))
        self.max_distance = max_distance

    def forward(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """[.., Q] and [.., K] to the scores' bias [.., H, Q, K]."""
        distance = key_positions[..., None, :] - query_positions[..., :, None]
        bucket = relative_position_bucket(distance, self.weight.shape[1], self.max_distance)
        return F.embedding(bucket, self.weight.t()).movedim(-1, -3)


@dataclass(frozen=True)
class AttentionRule:
    """What the scores get added, for all layers of a forward pass; the context rows know no appended column."""

    num_context: int
    context_bias_HLL: torch.Tensor | None
    context_hidden_B11L: torch.Tensor
    appended_bias_BHAS: torch.Tensor | None
    appended_hidden_B1AS: torch.Tensor


def attention_rule(layout: Layout, relative_bias: RelativePositionBias | None) -> AttentionRule:
    """The layout's rule as masks, and its positions as biases."""
    length = layout.num_context
    turns_BS, roles_S, positions_BS = layout.turns_BS, layout.roles_S, layout.positions_BS
    appended_visible_BAS = visible(
        roles_S[length:, None], turns_BS[:, length:, None], roles_S[None, :], turns_BS[:, None, :]
    )
    context_positions_L = positions_BS[0, :length]  # the same in every sample: slot = position
    return AttentionRule(
        num_context=length,
        context_bias_HLL=relative_bias(context_positions_L, context_positions_L) if relative_bias else None,
        context_hidden_B11L=(turns_BS[:, None, None, :length] != 0),
        appended_bias_BHAS=relative_bias(positions_BS[:, length:], positions_BS) if relative_bias else None,
        appended_hidden_B1AS=~appended_visible_BAS[:, None],
    )


def attend(
    queries_BHSD: torch.Tensor,
    keys_BHSD: torch.Tensor,
    values_BHSD: torch.Tensor,
    rule: AttentionRule,
    dropout_rate: float,
) -> torch.Tensor:
    """Context vectors [B, H, S, D]; softmax in fp32, dropout on the attention probabilities."""
    length = rule.num_context
    queries_BHSD = queries_BHSD * queries_BHSD.shape[-1] ** -0.5
    context_BHLD = _attend(
        queries_BHSD[:, :, :length], keys_BHSD[:, :, :length], values_BHSD[:, :, :length],
        rule.context_bias_HLL, rule.context_hidden_B11L, dropout_rate,
    )  # fmt: skip
    if queries_BHSD.shape[2] == length:
        return context_BHLD
    appended_BHAD = _attend(
        queries_BHSD[:, :, length:],
        keys_BHSD,
        values_BHSD,
        rule.appended_bias_BHAS,
        rule.appended_hidden_B1AS,
        dropout_rate,
    )
    return torch.cat([context_BHLD, appended_BHAD], dim=2)


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor, rate: float
) -> torch.Tensor:  # fmt: skip
    scores = queries @ keys.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(hidden, -math.inf)  # never a whole row: every slot sees the context
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
        values.dtype
    )
    return dropout(probabilities, rate) @ values
