"""Dropout on CPU whose random numbers cost next to nothing.

torch's own draws one Mersenne-Twister number an element in one thread, which is more than the rest of a step. Here the
elements' random bits are SplitMix64 of (seed, place): nothing but the seed, drawn from torch's generator, is kept for
the backward pass, and seeding torch's generator repeats the numbers. The rate is exact to 1/65536.
On CUDA it is torch's.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from data_prep.draws import word_of
from pretrain.cpu_threads import for_each

_BITS = 16  # of each element's random number
_ELEMENTS_PER_WORD = 64 // _BITS
_BLOCK_ELEMENTS = 4096  # their random words stay in the innermost cache
_PIECE_ELEMENTS = 1 << 18  # what is worth a thread
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Dropout(nn.Module):
    """`dropout` while training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.rate) if self.training else x


def dropout(x: torch.Tensor, rate: float) -> torch.Tensor:
    """`x` with elements dropped at `rate`, the others scaled to keep the mean."""
    if rate == 0:
        return x
    return F.dropout(x, rate) if x.is_cuda else _dropout(x, rate)[0]


def draw_seed() -> torch.Tensor:
    """The seed of one dropout, an int64 from torch's generator."""
    return torch.randint(2**63 - 1, ())


def kept_scale(rate: float) -> float:
    """What kept elements are multiplied by."""
    return 1 / (1 - _threshold(rate) / (1 << _BITS))


def zero_dropped_(x: torch.Tensor, seed: torch.Tensor, rate: float, first: int = 0) -> None:
    """Set the dropped elements of a contiguous CPU tensor to zero; element i has the random number of place `first` + i.

    `first` must be a multiple of 4.
    """
    assert x.is_contiguous()
    assert first % _ELEMENTS_PER_WORD == 0
    bits = x.detach().view(_INTEGERS[x.element_size()]).numpy().reshape(-1)
    key, threshold = np.uint64(int(seed)), np.uint16(_threshold(rate))

    def zero_piece(start: int) -> None:
        word = (first + start) // _ELEMENTS_PER_WORD
        _zero_dropped(bits[start : start + _PIECE_ELEMENTS], key, word, threshold)

    for_each(zero_piece, range(0, len(bits), _PIECE_ELEMENTS))


def _threshold(rate: float) -> int:
    return min(round(rate * (1 << _BITS)), (1 << _BITS) - 1)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _zero_dropped(bits: np.ndarray, key: np.uint64, first_word: int, threshold: np.uint16) -> None:
    words = np.empty(_BLOCK_ELEMENTS // _ELEMENTS_PER_WORD, np.uint64)
    numbers = words.view(np.uint16)
    for start in range(0, len(bits), _BLOCK_ELEMENTS):
        for i in range(len(words)):
            words[i] = word_of(key, first_word + start // _ELEMENTS_PER_WORD + i)
        block = bits[start : start + _BLOCK_ELEMENTS]
        for i in range(len(block)):  # without a branch, so that it is compiled to vector instructions
            block[i] *= numbers[i] >= threshold


@torch.library.custom_op("pmlm::dropout", mutates_args=())  # opaque to torch.compile
def _dropout(x: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    seed = draw_seed()
    return _dropped(x, seed, rate), seed


@torch.library.custom_op("pmlm::dropout_backward", mutates_args=())
def _dropped(x: torch.Tensor, seed: torch.Tensor, rate: float) -> torch.Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x, kept_scale(rate), out=y)
    zero_dropped_(y, seed, rate)
    return y


@_dropout.register_fake
def _(x: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty((), dtype=torch.int64)


@_dropped.register_fake
def _(x: torch.Tensor, seed: torch.Tensor, rate: float) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_for_backward(ctx: Any, inputs: tuple[torch.Tensor, float], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.rate = inputs[1]
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, None]:
    return _dropped(gradient, *ctx.saved_tensors, ctx.rate), None


_dropout.register_autograd(_backward, setup_context=_keep_for_backward)
