"""Attention over a layout: the interface, the relative position bias, and the plain reference.

The model takes a layout's turns and roles; a backend makes of them, once a forward pass, what all layers need. Backends
agree in value and gradient: `reference` below, `attention_cpu.py`, `attention_flex.py` (FlexAttention, for CUDA).

Shapes: N slots, R predicted places, B samples, H heads, D = size of a head; in the reference, where samples are padded,
L context + A appended = S slots of a sample, P predicted.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, Protocol, get_args

import torch
from torch import nn
from torch.nn import functional as F

from pretrain.dropout import dropout
from pretrain.layout import PADDING_TURN, Layout, visible

AttentionBackend = Literal["auto", "reference", "cpu", "flex"]


class Attention(Protocol):
    """A backend, made for one forward pass of a batch; every layer calls it. What filler gets is of no meaning."""

    def __call__(self, qkv_N3HD: torch.Tensor) -> torch.Tensor:
        """Context vectors [N, H, D] of all slots from their queries, keys and values."""

    def of_predicted(self, queries_RHD: torch.Tensor, keys_values_N2HD: torch.Tensor) -> torch.Tensor:
        """Context vectors [R, H, D] of the layout's predicted slots alone, which are all that a last layer is asked for."""


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


def choose_backend(is_cuda: bool, dropout_rate: float) -> AttentionBackend:
    """What `auto` is: `cpu` on a CPU; on CUDA `flex`, or `reference` where something is dropped, which flex cannot do."""
    if is_cuda:
        return "reference" if dropout_rate else "flex"
    return "cpu"


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
        far = self.max_distance
        by_distance = F.embedding(distance.clamp(-far, far) + far, self.by_distance(far).t())
        return by_distance.to(self.weight.dtype).movedim(-1, -3).contiguous()

    def by_distance(self, farthest: int) -> torch.Tensor:
        """The bias of key position - query position = -farthest .. farthest, [H, 2 farthest + 1], in fp32 at least."""
        distances = torch.arange(-farthest, farthest + 1, device=self.weight.device)
        buckets = relative_position_bucket(distances, self.weight.shape[1], self.max_distance)
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))[:, buckets]


class ReferenceAttention:
    """Attention as one would write it down, samples padded to one length; the context rows know no appended column."""

    def __init__(self, layout: Layout, relative_bias: RelativePositionBias | None, dropout_rate: float) -> None:
        self._layout, self._relative_bias, self._dropout_rate = layout, relative_bias, dropout_rate
        self._num_context = length = max(layout.context_lengths)
        self._slots = slots = _Padding(
            [(start, start + of_context, stop) for (start, stop), of_context in zip(pairwise(layout.edges), layout.context_lengths, strict=True)],
            len(layout.ids_N), layout.ids_N.device,
        )  # fmt: skip
        self._roles_BS, self._positions_BS = slots.padded(layout.roles_N), slots.padded(layout.positions_N)
        self._turns_BS = slots.padded(layout.turns_N).masked_fill(slots.is_padding_BS, PADDING_TURN)
        bias = relative_bias or (lambda *_: None)
        context_positions_L = torch.arange(length, device=layout.ids_N.device)
        self._context_bias_HLL = bias(context_positions_L, context_positions_L)
        self._context_hidden_B11L = self._turns_BS[:, None, None, :length] != 0
        positions_BA = self._positions_BS[:, length:]
        self._appended_bias_BHAS = bias(positions_BA, self._positions_BS) if positions_BA.shape[1] else None
        self._appended_hidden_B1AS = self._hidden(self._roles_BS[:, length:], self._turns_BS[:, length:])

    def __call__(self, qkv_N3HD: torch.Tensor) -> torch.Tensor:
        """See Attention; the softmax is in fp32."""
        length = self._num_context
        queries_BHSD, keys_BHSD, values_BHSD = self._slots.padded(qkv_N3HD).transpose(1, 3).unbind(2)
        context_BHLD = self._attend(
            queries_BHSD[:, :, :length], keys_BHSD[:, :, :length], values_BHSD[:, :, :length],
            self._context_bias_HLL, self._context_hidden_B11L,
        )  # fmt: skip
        appended_BHAD = self._attend(
            queries_BHSD[:, :, length:], keys_BHSD, values_BHSD, self._appended_bias_BHAS, self._appended_hidden_B1AS
        )
        return self._slots.in_a_row(torch.cat([context_BHLD, appended_BHAD], dim=2).transpose(1, 2))

    def of_predicted(self, queries_RHD: torch.Tensor, keys_values_N2HD: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        layout = self._layout
        predicted = _Padding(
            [(start, stop, stop) for start, stop in pairwise(layout.predicted_edges)],
            len(layout.predicted_R), layout.predicted_R.device,
        )  # fmt: skip
        roles_BP, turns_BP, positions_BP = (
            predicted.padded(of_slots[layout.predicted_R]) for of_slots in (layout.roles_N, layout.turns_N, layout.positions_N)
        )  # fmt: skip
        bias_BHPS = self._relative_bias(positions_BP, self._positions_BS) if self._relative_bias else None
        keys_BHSD, values_BHSD = self._slots.padded(keys_values_N2HD).transpose(1, 3).unbind(2)
        queries_BHPD = predicted.padded(queries_RHD).transpose(1, 2)
        attended_BHPD = self._attend(queries_BHPD, keys_BHSD, values_BHSD, bias_BHPS, self._hidden(roles_BP, turns_BP))
        return predicted.in_a_row(attended_BHPD.transpose(1, 2))

    def _hidden(self, roles_BQ: torch.Tensor, turns_BQ: torch.Tensor) -> torch.Tensor:
        """Which slots of its sample a query may not see, bool [B, 1, Q, S]."""
        is_visible = visible(
            roles_BQ[:, :, None], turns_BQ[:, :, None], self._roles_BS[:, None, :], self._turns_BS[:, None, :]
        )
        return torch.logical_not(is_visible)[:, None]

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        scores = scores.masked_fill(hidden, -math.inf)  # never a whole row: every slot sees the context
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return dropout(probabilities.to(values.dtype), self._dropout_rate) @ values


class _Padding:
    """From rows that lie one behind the other to rows of one length for each sample, and back.

    A sample's rows have two parts, each padded by itself, so that the second begins at the same place in all samples.
    """

    def __init__(self, bounds_B: list[tuple[int, int, int]], num_rows: int, device: torch.device) -> None:
        """`bounds_B`: for each sample its first row, where its second part begins, and its end."""
        first = max(middle - start for start, middle, _ in bounds_B)
        self._shape = (len(bounds_B), first + max(stop - middle for _, middle, stop in bounds_B))
        rows_BS = torch.full(self._shape, -1)
        for sample, (start, middle, stop) in enumerate(bounds_B):
            rows_BS[sample, : middle - start] = torch.arange(start, middle)
            rows_BS[sample, first : first + stop - middle] = torch.arange(middle, stop)
        self.is_padding_BS = (rows_BS < 0).to(device)
        places_N = torch.zeros(num_rows, dtype=torch.int64)
        is_row = rows_BS.flatten() >= 0
        places_N[rows_BS.flatten()[is_row]] = is_row.nonzero()[:, 0]
        self._rows_BS, self._places_N = rows_BS.clamp(min=0).flatten().to(device), places_N.to(device)

    def padded(self, of_rows: torch.Tensor) -> torch.Tensor:
        """[N, ..] to [B, S, ..], the first row where padding is."""
        return of_rows.index_select(0, self._rows_BS).view(*self._shape, *of_rows.shape[1:])

    def in_a_row(self, of_samples: torch.Tensor) -> torch.Tensor:
        """[B, S, ..] to [N, ..]."""
        return of_samples.flatten(0, 1).index_select(0, self._places_N)
