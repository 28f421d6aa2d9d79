"""Attention on CPU: context rows against context keys, appended rows against all keys, sample by sample.

What attention costs on a CPU is passes over score matrices, so there are few: the bias comes in with the product, what
is hidden has a bias of minus infinity, padding of the context is cut off. One sample's scores exist at a time. The
backward pass computes the probabilities again from queries and keys: that is one product more, and no score matrix
outlives its sample.

Shapes: as in attention.py; R rows (query slots) against K keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.attention import RelativePositionBias, appended_hidden
from pretrain.dropout import draw_seed, kept_scale, zero_dropped_
from pretrain.layout import Layout


class CpuAttention:
    """See `attention.Attention`. Padding slots of the context get zeros."""

    def __init__(self, layout: Layout, relative_bias: RelativePositionBias | None, dropout_rate: float) -> None:
        """Raises ValueError for a layout that is not on a CPU."""
        if layout.ids_BS.device.type != "cpu":
            raise ValueError(f"cpu attention cannot run on {layout.ids_BS.device.type}; pass --attention auto")
        length = layout.num_context
        is_text_BL = layout.turns_BS[:, :length] == 0
        lengths_B = is_text_BL.sum(dim=1)
        assert torch.equal(is_text_BL, torch.arange(length) < lengths_B[:, None]), "the context's padding comes last"
        self._plan = _Plan(length, lengths_B.tolist(), dropout_rate)
        context_positions_L = layout.positions_BS[0, :length]  # the same in every sample: slot = position
        self._context_bias_HLL = relative_bias(context_positions_L, context_positions_L) if relative_bias else None
        self._appended_bias_BHAS: torch.Tensor | None = None
        if layout.ids_BS.shape[1] > length:
            bias = (
                relative_bias(layout.positions_BS[:, length:], layout.positions_BS)
                if relative_bias
                else torch.zeros(())
            )
            self._appended_bias_BHAS = bias.masked_fill(appended_hidden(layout), -math.inf)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a loop over samples, with numba in it
    def __call__(self, qkv_BS3HD: torch.Tensor) -> torch.Tensor:
        """See Attention."""
        appended_bias = self._appended_bias_BHAS
        if appended_bias is not None:
            appended_bias = appended_bias.to(qkv_BS3HD.dtype)  # does nothing where there is a relative bias
        attended_BSHD: torch.Tensor = _Attend.apply(qkv_BS3HD, self._context_bias_HLL, appended_bias, self._plan)
        return attended_BSHD


@dataclass(frozen=True)
class _Block:
    """Rows and keys of one sample that make one product."""

    sample: int
    rows: slice
    keys: slice
    is_context: bool
    first_random: int
    """Place of its first probability in the dropout's random numbers."""


@dataclass(frozen=True)
class _Plan:
    num_context: int
    lengths_B: list[int]
    """Context slots of each sample that are not padding."""
    dropout_rate: float

    def blocks(self, num_slots: int, num_heads: int) -> Iterator[_Block]:
        num_appended = num_slots - self.num_context
        for sample, length in enumerate(self.lengths_B):
            context, appended = slice(0, length), slice(self.num_context, num_slots)
            first = [
                sample * (-(-num_heads * rows * keys // 4) * 4)  # zero_dropped_ wants multiples of 4
                for rows, keys in ((self.num_context, self.num_context), (num_appended, num_slots))
            ]
            yield _Block(sample, context, context, True, first[0])
            if num_appended:
                yield _Block(sample, appended, slice(0, num_slots), False, first[1])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_BS3HD: torch.Tensor, context_bias_HLL: torch.Tensor | None, appended_bias_BHAS: torch.Tensor | None,
        plan: _Plan,
    ) -> torch.Tensor:  # fmt: skip
        rate = plan.dropout_rate
        seeds = [draw_seed(), draw_seed()] if rate else []  # of context and appended rows
        attended_BSHD = torch.zeros_like(qkv_BS3HD[:, :, 0], memory_format=torch.contiguous_format)
        for block in plan.blocks(qkv_BS3HD.shape[1], qkv_BS3HD.shape[3]):
            queries_HRD, keys_HKD, values_HKD = _of_block(qkv_BS3HD, block)
            probabilities_HRK = _probabilities(
                queries_HRD, keys_HKD, _bias(block, context_bias_HLL, appended_bias_BHAS)
            )
            if rate:
                zero_dropped_(probabilities_HRK, seeds[not block.is_context], rate, block.first_random)
                values_HKD = values_HKD * kept_scale(rate)
            attended_BSHD[block.sample, block.rows] = (probabilities_HRK @ values_HKD).transpose(0, 1)
        ctx.save_for_backward(qkv_BS3HD, context_bias_HLL, appended_bias_BHAS)
        ctx.plan, ctx.seeds = plan, seeds
        return attended_BSHD

    @staticmethod
    def backward(ctx: Any, d_attended_BSHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        qkv_BS3HD, context_bias_HLL, appended_bias_BHAS = ctx.saved_tensors
        rate, scale = ctx.plan.dropout_rate, qkv_BS3HD.shape[-1] ** -0.5
        d_qkv_BS3HD = torch.zeros_like(qkv_BS3HD, memory_format=torch.contiguous_format)
        d_context, d_appended = (
            torch.zeros_like(bias) if bias is not None and bias.requires_grad else None
            for bias in (context_bias_HLL, appended_bias_BHAS)
        )
        for block in ctx.plan.blocks(qkv_BS3HD.shape[1], qkv_BS3HD.shape[3]):
            queries_HRD, keys_HKD, values_HKD = _of_block(qkv_BS3HD, block)
            probabilities_HRK = _probabilities(
                queries_HRD, keys_HKD, _bias(block, context_bias_HLL, appended_bias_BHAS)
            )
            d_attended_HRD = d_attended_BSHD[block.sample, block.rows].transpose(0, 1)
            if rate:
                d_attended_HRD = d_attended_HRD * kept_scale(rate)
            d_probabilities_HRK = d_attended_HRD @ values_HKD.mT
            kept_HRK = probabilities_HRK
            if rate:
                kept_HRK = probabilities_HRK.clone()
                for of_dropout in (kept_HRK, d_probabilities_HRK):
                    zero_dropped_(of_dropout, ctx.seeds[not block.is_context], rate, block.first_random)
            d_scores_HRK = torch._softmax_backward_data(d_probabilities_HRK, probabilities_HRK, -1, qkv_BS3HD.dtype)
            d_queries_HSD, d_keys_HSD, d_values_HSD = d_qkv_BS3HD[block.sample].permute(1, 2, 0, 3)
            d_queries_HSD[:, block.rows] = (d_scores_HRK @ keys_HKD) * scale
            d_keys_HSD[:, block.keys] += (d_scores_HRK.mT @ queries_HRD) * scale
            d_values_HSD[:, block.keys] += kept_HRK.mT @ d_attended_HRD
            d_bias = _bias(block, d_context, d_appended)
            if d_bias is not None:
                d_bias += d_scores_HRK
        return d_qkv_BS3HD, d_context, d_appended, None


def _of_block(qkv_BS3HD: torch.Tensor, block: _Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    queries_HSD, keys_HSD, values_HSD = qkv_BS3HD[block.sample].permute(1, 2, 0, 3)
    return queries_HSD[:, block.rows], keys_HSD[:, block.keys], values_HSD[:, block.keys]


def _bias(block: _Block, context_HLL: torch.Tensor | None, appended_BHAS: torch.Tensor | None) -> torch.Tensor | None:
    if block.is_context:
        return None if context_HLL is None else context_HLL[:, block.rows, block.keys]
    return None if appended_BHAS is None else appended_BHAS[block.sample]


def _probabilities(queries_HRD: torch.Tensor, keys_HKD: torch.Tensor, bias_HRK: torch.Tensor | None) -> torch.Tensor:
    scale = queries_HRD.shape[-1] ** -0.5
    if bias_HRK is None:
        scores_HRK = (queries_HRD * scale) @ keys_HKD.mT
    else:
        scores_HRK = torch.baddbmm(bias_HRK, queries_HRD, keys_HKD.mT, alpha=scale)
    return torch.softmax(scores_HRK, dim=-1)
