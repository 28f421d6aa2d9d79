"""Attention over a layout: the interface, the relative position bias, and the plain reference.

The model takes a layout's turns and roles; a backend makes of them, once a forward pass, what all layers need. Backends
agree in value and gradient: `reference` below, `attention_cpu.py`, `attention_flex.py` (FlexAttention, for CUDA).

Shapes: B samples, H heads, S = L context + A appended slots, D = size of a head.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, get_args

import torch
from torch import nn
from torch.nn import functional as F

from pretrain.dropout import dropout
from pretrain.layout import Layout, visible

AttentionBackend = Literal["auto", "reference", "cpu", "flex"]
_WORTH_A_LOOP_SCORES = 2**17  # of a sample, measured: docs/performance.md


class Attention(Protocol):
    """A backend, made for one forward pass of a batch; every layer calls it."""

    def __call__(self, qkv_BS3HD: torch.Tensor) -> torch.Tensor:
        """Context vectors [B, S, H, D] from queries, keys and values."""


def make_attention(
    backend: AttentionBackend, layout: Layout, relative_bias: RelativePositionBias | None, dropout_rate: float
) -> Attention:
    """The attention of a batch, with dropout on its probabilities.

    Raises ValueError for a backend that does not exist or cannot do it; `auto` is for `choose_backend`.
    """
    if backend == "cpu":
        from pretrain.attention_cpu import CpuAttention

        return CpuAttention(layout, relative_bias, dropout_rate)
    if backend == "flex":
        from pretrain.attention_flex import FlexAttention

        return FlexAttention(layout, relative_bias, dropout_rate)
    if backend == "reference":
        return ReferenceAttention(layout, relative_bias, dropout_rate)
    raise ValueError(f"no attention {backend!r}; expected one of {', '.join(get_args(AttentionBackend))}")


def choose_backend(layout: Layout, num_heads: int, dropout_rate: float) -> AttentionBackend:
    """What `auto` is: on CUDA `flex` where nothing is dropped, which flex cannot do; on a CPU `cpu` where there is enough
    to compute for its loop over samples; else `reference`."""
    if layout.ids_BS.is_cuda:
        return "reference" if dropout_rate else "flex"
    return "cpu" if num_heads * layout.ids_BS.shape[1] ** 2 >= _WORTH_A_LOOP_SCORES else "reference"


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
        """[.., Q] and [.., K] to the scores' bias [.., H, Q, K], in the weight's precision.

        Looked up in fp32 at least, so that the gradient of a bucket, a sum over a whole batch, is summed in it.
        """
        distance = key_positions[..., None, :] - query_positions[..., :, None]
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return F.embedding(self.bucket(distance), weight.t()).to(self.weight.dtype).movedim(-1, -3).contiguous()

    def bucket(self, distance: torch.Tensor) -> torch.Tensor:
        """The bucket of each (key position - query position)."""
        far = self.max_distance
        all_distances = torch.arange(-far, far + 1, device=distance.device)
        return relative_position_bucket(all_distances, self.weight.shape[1], far)[distance.clamp(-far, far) + far]


class ReferenceAttention:
    """Attention as one would write it down; the context rows know no appended column."""

    def __init__(self, layout: Layout, relative_bias: RelativePositionBias | None, dropout_rate: float) -> None:
        self._num_context = length = layout.num_context
        self._dropout_rate = dropout_rate
        turns_BS, positions_BS = layout.turns_BS, layout.positions_BS
        context_positions_L = positions_BS[0, :length]  # the same in every sample: slot = position
        self._context_hidden_B11L = turns_BS[:, None, None, :length] != 0
        self._context_bias_HLL = relative_bias(context_positions_L, context_positions_L) if relative_bias else None
        self._appended_hidden_B1AS = appended_hidden(layout)
        self._appended_bias_BHAS = relative_bias(positions_BS[:, length:], positions_BS) if relative_bias else None

    def __call__(self, qkv_BS3HD: torch.Tensor) -> torch.Tensor:
        """See Attention; the softmax is in fp32."""
        length = self._num_context
        queries_BHSD, keys_BHSD, values_BHSD = qkv_BS3HD.transpose(1, 3).unbind(2)
        context_BHLD = self._attend(
            queries_BHSD[:, :, :length], keys_BHSD[:, :, :length], values_BHSD[:, :, :length],
            self._context_bias_HLL, self._context_hidden_B11L,
        )  # fmt: skip
        if qkv_BS3HD.shape[1] == length:
            return context_BHLD.transpose(1, 2)
        appended_BHAD = self._attend(
            queries_BHSD[:, :, length:], keys_BHSD, values_BHSD, self._appended_bias_BHAS, self._appended_hidden_B1AS
        )
        return torch.cat([context_BHLD, appended_BHAD], dim=2).transpose(1, 2)

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        scores = scores.masked_fill(hidden, -math.inf)  # never a whole row: every slot sees the context
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return dropout(probabilities.to(values.dtype), self._dropout_rate) @ values


def appended_hidden(layout: Layout) -> torch.Tensor:
    """Which slots each appended slot may not see, bool [B, 1, A, S]."""
    length, roles_S, turns_BS = layout.num_context, layout.roles_S, layout.turns_BS
    is_visible = visible(roles_S[length:, None], turns_BS[:, length:, None], roles_S, turns_BS[:, None, :])
    return torch.logical_not(is_visible)[:, None]
