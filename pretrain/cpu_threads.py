"""Threads for compiled code that torch does not know, as many as torch has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def for_each(function: Callable[[T], None], items: Iterable[T]) -> None:
    """Call it with each, which gains only where it lets go of Python's lock."""
    items = [*items]
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(items) == 1:
        for item in items:
            function(item)
    else:
        list(_threads(num_threads).map(function, items))


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="cpu")
