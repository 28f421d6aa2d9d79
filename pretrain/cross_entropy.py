"""The output layer and its cross-entropy in chunks of predictions, their logits computed again in the backward pass.

So memory for logits is bounded, whatever the vocabulary and the number of predictions. The last chunk's are kept: they
take what a chunk takes anyway.

Shapes: T predictions, C of them in a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

_CHUNK_LOGITS = 1 << 24


def cross_entropy_in_chunks(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor,
    targets_T: torch.Tensor,
    label_smoothing: float = 0.0,
    chunk_logits: int = _CHUNK_LOGITS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each prediction, in fp32 at least, and whether its largest logit is the target's.

    Logits are `hidden_TH` x `weight_VH` transposed + `bias_V`; no more than `chunk_logits` of them exist at a time, or
    those of one prediction. With label smoothing, that share of what is to be predicted is spread evenly over the vocabulary.
    """
    device = hidden_TH.device.type
    if torch.is_autocast_enabled(device):  # which does not reach the backward pass below: it would be of other logits
        dtype = torch.get_autocast_dtype(device)
        hidden_TH, weight_VH, bias_V = hidden_TH.to(dtype), weight_VH.to(dtype), bias_V.to(dtype)
    losses_T, is_correct_T = _ChunkedCrossEntropy.apply(
        hidden_TH, weight_VH, bias_V, targets_T, label_smoothing, chunk_predictions(len(weight_VH), chunk_logits)
    )
    return losses_T, is_correct_T


def chunk_predictions(vocab_size: int, chunk_logits: int = _CHUNK_LOGITS) -> int:
    """Predictions of a chunk."""
    return max(1, chunk_logits // vocab_size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor, targets_T: torch.Tensor,
        label_smoothing: float, chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        log_sums_T = hidden_TH.new_empty(len(hidden_TH), dtype=_at_least_fp32(hidden_TH.dtype))
        losses_T, is_correct_T = torch.empty_like(log_sums_T), torch.empty_like(targets_T, dtype=torch.bool)
        ctx.kept = None
        for part in _chunks(len(hidden_TH), chunk):
            logits_CV, targets_C1 = _logits(hidden_TH[part], weight_VH, bias_V), targets_T[part, None]
            losses_T[part] = (label_smoothing - 1) * logits_CV.gather(1, targets_C1)[:, 0]
            if label_smoothing:
                losses_T[part] -= label_smoothing * logits_CV.mean(dim=1)
            largest_C1, likeliest_C1 = logits_CV.max(dim=1, keepdim=True)
            is_correct_T[part] = (likeliest_C1 == targets_C1)[:, 0]
            sums_C = logits_CV.sub_(largest_C1).exp_().sum(dim=1)
            log_sums_T[part] = sums_C.log() + largest_C1[:, 0]
            if part.stop >= len(hidden_TH) and any(ctx.needs_input_grad):
                ctx.kept = logits_CV, sums_C
            del logits_CV
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, targets_T, log_sums_T)
        ctx.chunk, ctx.label_smoothing = chunk, label_smoothing
        ctx.mark_non_differentiable(is_correct_T)
        return losses_T + log_sums_T, is_correct_T

    @staticmethod
    def backward(ctx: Any, d_losses_T: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden_TH, weight_VH, bias_V, targets_T, log_sums_T = ctx.saved_tensors
        d_hidden_TH = torch.empty_like(hidden_TH)
        d_weight_VH, d_bias_V = torch.empty_like(weight_VH), torch.zeros_like(bias_V, dtype=log_sums_T.dtype)
        kept, ctx.kept = ctx.kept, None  # changed in place below: another backward pass computes it again
        for part in reversed(_chunks(len(hidden_TH), ctx.chunk)):
            is_first = part.stop >= len(hidden_TH)
            d_losses_C1 = d_losses_T[part, None]
            if kept is not None:
                (d_logits_CV, sums_C), kept = kept, None
                d_logits_CV.mul_(d_losses_C1 / sums_C[:, None])
            else:
                d_logits_CV = _logits(hidden_TH[part], weight_VH, bias_V).sub_(log_sums_T[part, None]).exp_()
                d_logits_CV.mul_(d_losses_C1)
            if ctx.label_smoothing:
                d_logits_CV -= d_losses_C1 * (ctx.label_smoothing / d_logits_CV.shape[1])
            d_logits_CV.scatter_add_(1, targets_T[part, None], d_losses_C1 * (ctx.label_smoothing - 1))
            d_bias_V += d_logits_CV.sum(dim=0)
            d_logits_CV = d_logits_CV.to(hidden_TH.dtype)
            torch.mm(d_logits_CV, weight_VH, out=d_hidden_TH[part])
            d_weight_VH.addmm_(d_logits_CV.mT, hidden_TH[part], beta=0 if is_first else 1)
        if not len(hidden_TH):
            d_weight_VH.zero_()
        return d_hidden_TH, d_weight_VH, d_bias_V.to(bias_V.dtype), None, None, None


def _chunks(num_predictions: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, num_predictions, chunk)]


def _logits(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor) -> torch.Tensor:
    """In fp32 at least, and nobody else's: they may be changed in place."""
    return torch.addmm(bias_V, hidden_CH, weight_VH.mT).to(_at_least_fp32(hidden_CH.dtype))


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
