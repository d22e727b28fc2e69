"""Memory for weights in huge pages, on Linux: every token reads all of it, one product after the other, a fifth faster so.

Weights of a model share arenas of some huge pages; one is given back when no tensor in it lives any more. Where the system has no
huge pages to give, or not for the asking (transparent_hugepage = never), the memory is ordinary. A tensor's storage is its whole
arena: clone it before saving it.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading

import torch

HUGE = 2 << 20
ARENA = 64 << 20
LINE = 64  # bytes of a cache line: where every tensor begins
MADV_HUGEPAGE = 14

_lock = threading.Lock()
_arena = torch.empty(0, dtype=torch.uint8)  # what is left of the last one


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized tensor on the CPU."""
    global _arena
    size = math.prod(shape) * dtype.itemsize
    room = -(-size // LINE) * LINE
    with _lock:
        if len(_arena) < room:
            _arena = _new(max(ARENA, -(-room // HUGE) * HUGE))
        found, _arena = _arena[:size], _arena[room:]
    return found.view(dtype).view(shape)


def _new(size: int) -> torch.Tensor:
    """uint8 [size], aligned to huge pages and not yet touched: what is never used takes no memory."""
    whole = torch.empty(size + HUGE, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    arena = whole[start : start + size]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(arena.data_ptr()), ctypes.c_size_t(size), MADV_HUGEPAGE)  # a hint: refusal costs only speed
    return arena
