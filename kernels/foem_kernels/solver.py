"""Which code rounds a block of columns: the fused kernels of the CPU and of NVIDIA GPUs, or the loop in torch, which is the
reference, and takes every device and dtype."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable

import torch

from foem_kernels import cpu_solver, triton_solver

logger = logging.getLogger("foem_kernels")

FUSED = {"triton": triton_solver, "cpu": cpu_solver}


def pick(device: torch.device, dtype: torch.dtype, columns: int) -> Callable:
    """The `quantize_block` for blocks of up to `columns` columns.

    FOEM_SOLVER=torch, cpu or triton decides instead; ValueError where that one does not exist or cannot run. float32 blocks
    that are left to torch are logged, once for each reason.
    """
    force = os.environ.get("FOEM_SOLVER") or None
    if force not in (None, "torch", *FUSED):
        raise ValueError(f"FOEM_SOLVER={force} does not exist; choose one of torch, {', '.join(FUSED)}")
    name = force or {"cuda": "triton", "cpu": "cpu"}.get(device.type, "torch")
    if name == "torch":
        return quantize_block
    reason = FUSED[name].supports(device, dtype, columns)
    if reason is None:
        return FUSED[name].quantize_block
    if force:
        raise ValueError(f"FOEM_SOLVER={force} cannot run: {reason}; unset it to let one be chosen")
    if dtype == torch.float32:
        _log_once(f"{name} {reason}")
    return quantize_block


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("foem solver: columns are rounded one by one in torch, which is slow: %s", reason)


def quantize_block(
    w: torch.Tensor,
    V: torch.Tensor,
    points: torch.Tensor,
    errors: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    groups: torch.Tensor,
    bits: int,
    *,
    beta: float | torch.Tensor = 0.0,
    target: torch.Tensor | None = None,
    first: int = 0,
    unpulled: int = 128,
    P: torch.Tensor | None = None,
    alpha: float | torch.Tensor = 0.0,
    seen: torch.Tensor | None = None,
) -> None:
    """Round B columns of a layer with N rows, from left to right, into `points`, `errors` and `seen`; w is used up.

    Columns of the layer are rows of the tensors. w [B, N]: the columns, with all updates of earlier blocks. V [B, B]: the
    block of U's rows over its diagonal. points [B, N]: set to codes minus zero. errors [B, N]: set to what must be taken off
    later columns, times V. scales, zeros [G, N]; zeros None for symmetric codes. groups [B]: row of scales of each column.
    target [B, N]: what each column is pulled to by `beta`, a number or [N]; None for no pull. first: place of the block's first
    column in the layer; columns whose place is a multiple of `unpulled` are not pulled. P [B, B]: drift; seen [B, N]: set to
    alpha (a number or [N]) times each column as it was when it was rounded; None, both, for no drift.
    """
    mid = 1 << (bits - 1)
    low, high = -mid, mid - 1
    for i, (column, point, error, g) in enumerate(zip(w.unbind(), points.unbind(), errors.unbind(), groups.tolist())):
        if target is not None and (first + i) % unpulled:
            column -= beta * (column - target[i])
        if seen is not None:
            torch.mul(column, alpha, out=seen[i])
        if zeros is not None:
            low, high = -zeros[g], 2 * mid - 1 - zeros[g]
        torch.div(column, scales[g], out=point).round_().clamp_(low, high)
        torch.addcmul(column, point, scales[g], value=-1, out=error)
        if target is not None:
            error -= beta * (column - target[i])
        if i + 1 < len(w):
            w[i + 1 :].addr_(V[i, i + 1 :], error, alpha=-1)
            if seen is not None:
                w[i + 1 :].addr_(P[i, i + 1 :], seen[i])
