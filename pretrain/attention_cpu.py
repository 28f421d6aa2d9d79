"""Attention on CPU: context rows against context keys, appended rows against all keys, sample by sample.

What attention costs on a CPU is passes over score matrices, so there are few: the bias comes in with the product, what
is hidden has a bias of minus infinity. One sample's scores exist at a time. The backward pass computes the probabilities
again from queries and keys: that is one product more, and no score matrix outlives its sample. The gradient of the bias
is summed by distance, not kept for pairs.

Shapes: as in attention.py; Q rows (query slots) against K keys, M the farthest distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch

from pretrain.attention import RelativePositionBias
from pretrain.dropout import draw_seed, kept_scale, zero_dropped_
from pretrain.layout import Layout, visible


@dataclass(frozen=True)
class _Block:
    """Rows and keys of one sample that make one product."""

    rows: slice
    keys: slice
    num_context_keys: int
    """The first keys, at positions 0, 1, 2 ..."""
    query_positions_Q: torch.Tensor
    key_positions_K: torch.Tensor
    bias_HQK: torch.Tensor | None
    is_context: bool
    first_random: int
    """Place of its first probability in the dropout's random numbers."""


class CpuAttention:
    """See `attention.Attention`. Filler gets zeros."""

    def __init__(self, layout: Layout, relative_bias: RelativePositionBias | None, dropout_rate: float) -> None:
        """Raises ValueError for a layout that is not on a CPU."""
        if layout.ids_N.device.type != "cpu":
            raise ValueError(f"cpu attention cannot run on {layout.ids_N.device.type}; pass --attention auto")
        self._layout, self._rate = layout, dropout_rate
        self._num_heads = 1
        self._by_distance_HM: torch.Tensor | None = None
        self._context_bias_HLL: torch.Tensor | None = None
        if relative_bias is not None:
            self._num_heads = len(relative_bias.weight)
            self._dtype = relative_bias.weight.dtype
            self._by_distance_HM = relative_bias.by_distance(int(layout.positions_N.max()))
            positions_L = torch.arange(max(layout.context_lengths))
            self._context_bias_HLL = self._bias(positions_L, positions_L, None)
        self._of_all = self._blocks(layout.edges, layout.context_lengths, None)
        self._of_predicted: list[_Block] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a loop over samples, with numba in it
    def __call__(self, qkv_N3HD: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        attended_NHD: torch.Tensor = _Attend.apply(None, qkv_N3HD, self._by_distance_HM, self._of_all, self._rate)
        return attended_NHD

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def of_predicted(self, queries_RHD: torch.Tensor, keys_values_N2HD: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        layout = self._layout
        if self._of_predicted is None:
            in_context = layout.roles_N[layout.predicted_R] == 0
            num_context = [int(in_context[start:stop].sum()) for start, stop in pairwise(layout.predicted_edges)]
            self._of_predicted = self._blocks(layout.predicted_edges, tuple(num_context), layout.predicted_R)
        attended_RHD: torch.Tensor = _Attend.apply(
            queries_RHD, keys_values_N2HD, self._by_distance_HM, self._of_predicted, self._rate
        )
        return attended_RHD

    def _blocks(
        self, edges: tuple[int, ...], num_context_rows: tuple[int, ...], slots_R: torch.Tensor | None
    ) -> list[_Block]:
        """The blocks of rows that are all slots, or those of `slots_R`; each sample's first rows are of its context."""
        layout, blocks = self._layout, []
        next_random = [0, 0]  # of context and of appended rows
        bounds = zip(pairwise(edges), num_context_rows, pairwise(layout.edges), layout.context_lengths, strict=True)
        for (start, stop), num_rows, (first_key, last_key), num_keys in bounds:
            for is_context, rows, keys in (
                (True, slice(start, start + num_rows), slice(first_key, first_key + num_keys)),
                (False, slice(start + num_rows, stop), slice(first_key, last_key)),
            ):
                if rows.start == rows.stop:
                    continue
                slots = rows if slots_R is None else slots_R[rows]
                positions_Q, positions_K = layout.positions_N[slots], layout.positions_N[keys]
                bias = self._context_bias_HLL
                if is_context and bias is not None:
                    bias = bias[:, :num_rows, :num_keys] if slots_R is None else bias[:, positions_Q, :num_keys]
                elif not is_context:
                    is_visible_QK = visible(
                        layout.roles_N[slots][:, None], layout.turns_N[slots][:, None], layout.roles_N[keys], layout.turns_N[keys]
                    )  # fmt: skip
                    bias = self._bias(positions_Q, positions_K, is_visible_QK)
                blocks.append(
                    _Block(rows, keys, num_keys, positions_Q, positions_K, bias, is_context, next_random[not is_context])
                )  # fmt: skip
                num_scores = self._num_heads * len(positions_Q) * len(positions_K)
                next_random[not is_context] += -(-num_scores // 4) * 4  # zero_dropped_ wants multiples of 4
        return blocks

    def _bias(
        self, positions_Q: torch.Tensor, positions_K: torch.Tensor, is_visible_QK: torch.Tensor | None
    ) -> torch.Tensor:
        """[H, Q, K], minus infinity where nothing is visible; [1, Q, K] where there is no relative bias."""
        if self._by_distance_HM is None:
            assert is_visible_QK is not None
            return torch.zeros(is_visible_QK.shape).masked_fill(~is_visible_QK, -math.inf)[None]
        by_distance_HM = self._by_distance_HM.detach()
        bias_HQK = by_distance_HM.new_empty(self._num_heads, len(positions_Q), len(positions_K))
        _look_up(by_distance_HM.numpy(), positions_Q.numpy(), positions_K.numpy(), bias_HQK.numpy())
        if is_visible_QK is not None:
            bias_HQK.masked_fill_(~is_visible_QK, -math.inf)
        return bias_HQK.to(self._dtype)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries_RHD: torch.Tensor | None, packed: torch.Tensor, by_distance_HM: torch.Tensor | None,
        blocks: list[_Block], rate: float,
    ) -> torch.Tensor:  # fmt: skip
        """`packed`: keys and values [N, 2, H, D], before them the queries where they are of all slots."""
        seeds = [draw_seed(), draw_seed()] if rate else []  # of context and appended rows
        queries_HRD, keys_HND, values_HND = _by_heads(queries_RHD, packed)
        attended_RHD = packed.new_zeros(queries_HRD.shape[1], *packed.shape[2:])
        for block in blocks:
            values_HKD = values_HND[:, block.keys]
            probabilities_HQK = _probabilities(queries_HRD, keys_HND, block)
            if rate:
                zero_dropped_(probabilities_HQK, seeds[not block.is_context], rate, block.first_random)
                values_HKD = values_HKD * kept_scale(rate)
            attended_RHD[block.rows] = (probabilities_HQK @ values_HKD).transpose(0, 1)
        ctx.save_for_backward(queries_RHD, packed, by_distance_HM)
        ctx.blocks, ctx.rate, ctx.seeds = blocks, rate, seeds
        return attended_RHD

    @staticmethod
    def backward(ctx: Any, d_attended_RHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        queries_RHD, packed, by_distance_HM = ctx.saved_tensors
        rate, scale = ctx.rate, packed.shape[-1] ** -0.5
        queries_HRD, keys_HND, values_HND = _by_heads(queries_RHD, packed)
        d_queries_RHD = None if queries_RHD is None else torch.zeros_like(queries_RHD)
        d_packed = torch.zeros_like(packed, memory_format=torch.contiguous_format)
        d_queries_HRD, d_keys_HND, d_values_HND = _by_heads(d_queries_RHD, d_packed)
        d_by_distance_HM = torch.zeros_like(by_distance_HM) if ctx.needs_input_grad[2] else None
        for block in ctx.blocks:
            queries_HQD, keys_HKD = queries_HRD[:, block.rows], keys_HND[:, block.keys]
            probabilities_HQK = _probabilities(queries_HRD, keys_HND, block)
            d_attended_HQD = d_attended_RHD[block.rows].transpose(0, 1)
            if rate:
                d_attended_HQD = d_attended_HQD * kept_scale(rate)
            d_probabilities_HQK = d_attended_HQD @ values_HND[:, block.keys].mT
            kept_HQK = probabilities_HQK
            if rate:
                kept_HQK = probabilities_HQK.clone()
                for of_dropout in (kept_HQK, d_probabilities_HQK):
                    zero_dropped_(of_dropout, ctx.seeds[not block.is_context], rate, block.first_random)
            d_values_HND[:, block.keys] += kept_HQK.mT @ d_attended_HQD
            d_scores_HQK = torch._softmax_backward_data(d_probabilities_HQK, probabilities_HQK, -1, packed.dtype)
            d_queries_HRD[:, block.rows] = (d_scores_HQK @ keys_HKD).mul_(scale)
            d_keys_HND[:, block.keys] += (d_scores_HQK.mT @ queries_HQD).mul_(scale)
            if d_by_distance_HM is not None:
                _sum_by_distance(
                    d_scores_HQK.to(d_by_distance_HM.dtype).numpy(), block.query_positions_Q.numpy(),
                    block.key_positions_K.numpy(), block.num_context_keys, d_by_distance_HM.numpy(),
                )  # fmt: skip
        return d_queries_RHD, d_packed, d_by_distance_HM, None, None


def _by_heads(queries_RHD: torch.Tensor | None, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values, or their gradients, as [H, .., D]."""
    of_packed = packed.transpose(0, 2).unbind(1)
    return of_packed if queries_RHD is None else (queries_RHD.transpose(0, 1), *of_packed)


def _probabilities(queries_HRD: torch.Tensor, keys_HND: torch.Tensor, block: _Block) -> torch.Tensor:
    queries_HQD, keys_HKD = queries_HRD[:, block.rows], keys_HND[:, block.keys]
    scale = queries_HQD.shape[-1] ** -0.5
    if block.bias_HQK is None:
        return torch.softmax((queries_HQD * scale) @ keys_HKD.mT, dim=-1)
    bias = block.bias_HQK.to(queries_HQD.dtype)  # does nothing where there is a relative bias
    return torch.softmax(torch.baddbmm(bias, queries_HQD, keys_HKD.mT, alpha=scale), dim=-1)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _look_up(by_distance: np.ndarray, query_positions: np.ndarray, key_positions: np.ndarray, bias: np.ndarray) -> None:
    farthest = by_distance.shape[1] // 2
    for head in range(bias.shape[0]):
        table = by_distance[head]
        for query in range(bias.shape[1]):
            row, zero = bias[head, query], farthest - query_positions[query]
            for key in range(len(row)):
                row[key] = table[zero + key_positions[key]]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _sum_by_distance(
    d_scores: np.ndarray, query_positions: np.ndarray, key_positions: np.ndarray, num_context_keys: int,
    d_by_distance: np.ndarray,
) -> None:  # fmt: skip
    """The gradient of `_look_up`, for the context's keys without asking their positions."""
    farthest = d_by_distance.shape[1] // 2
    for head in range(d_scores.shape[0]):
        sums = d_by_distance[head]
        for query in range(d_scores.shape[1]):
            row, zero = d_scores[head, query], farthest - query_positions[query]
            of_context = sums[zero : zero + num_context_keys]
            for key in range(num_context_keys):
                of_context[key] += row[key]
            for key in range(num_context_keys, len(row)):
                sums[zero + key_positions[key]] += row[key]
