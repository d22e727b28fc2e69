"""Which of a few grids rounds a range of weights best: the fused kernel of the CPU, or the loop in torch, which is the reference,
and takes every device and dtype."""

from __future__ import annotations

import functools
import logging
import os

import torch

from foem_kernels import cpu_grid

logger = logging.getLogger("foem_kernels")


def search(
    w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """`search_torch`, by the kernel where there is one and FOEM_SOLVER is not "torch" (see `solver.pick`).

    float32 weights on a CPU that are left to torch are logged, once for each reason.
    """
    reason = cpu_grid.supports(w.device, w.dtype)
    if reason is None and os.environ.get("FOEM_SOLVER") != "torch":
        return cpu_grid.search(w, scales, zeros, bits, importance)
    if reason is not None and w.device.type == "cpu" and w.dtype == torch.float32:
        _log_once(reason)
    return search_torch(w, scales, zeros, bits, importance)


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("foem solver: grids are searched in torch, which is slow: the CPU's kernel %s", reason)


def search_torch(
    w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """[...] int64: the level at which each range of w [..., g] is rounded with the least squared error; the first of equal ones.

    scales, zeros [levels, ...]: what float16 or bfloat16 holds, and whole numbers in 0 .. 2**bits - 1; zeros None: 2**(bits-1).
    importance [g], or for each of the groups that w's last but one dimension counts, [groups, g]: what errors are weighted with;
    None: 1. w is not changed; NaN is never the least.
    """
    mid = 1 << (bits - 1)
    low, high = -mid, mid - 1
    least, best = torch.full_like(scales[0], torch.inf), torch.zeros_like(scales[0], dtype=torch.int64)
    for level, scale in enumerate(scales[..., None]):
        if zeros is not None:
            low = -zeros[level, ..., None]
            high = low + (2 * mid - 1)
        error = (w / scale).round_().clamp_(low, high) * scale - w
        error = (error.square() if importance is None else error.square() * importance).sum(-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, level, best)
    return best
