"""How this process takes memory from the system."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep what is freed for what is taken next, instead of giving pages back to the system and taking them anew; returns
    False, having done nothing, where the C library is none that can be told so.

    Not by M_MMAP_THRESHOLD: older glibc refuses more than 32 MB.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
