"""Threads for compiled code that torch does not know, as many as torch has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def for_each(function: Callable[[T], None], items: Iterable[T]) -> None:
    """Call it with each, which gains only where it lets go of Python's lock, and where that is for a tenth of a millisecond
    or more: so long it takes to wake a thread. This thread takes its share."""
    items = [*items]
    num_shares = min(torch.get_num_threads(), len(items))

    def do(share: int) -> None:
        for item in items[share::num_shares]:
            function(item)

    others = [_threads(num_shares - 1).submit(do, share) for share in range(1, num_shares)]
    if items:
        do(0)
    for other in others:
        other.result()


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="cpu")
