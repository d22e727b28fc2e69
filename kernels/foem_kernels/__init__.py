"""INT4 (and INT8) weight-only matrix products for GPTQ-style codes, usable without vLLM.

p = foem_kernels.prepare(codes, scales, zeros, bits=4, group_size=128, dtype=torch.bfloat16, device="cuda")
y = foem_kernels.gemm(x, p, bias)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from foem_kernels.problem import Kernel, Problem
from foem_kernels.registry import KERNELS, choose

__all__ = ["KERNELS", "Kernel", "Prepared", "Problem", "choose", "gemm", "prepare"]


class Prepared(NamedTuple):
    """Weights in one kernel's private layout."""

    kernel: Kernel
    problem: Problem
    weights: dict[str, Any]


def prepare(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    device: str | torch.device,
    kernel: str | None = None,
) -> Prepared:
    """Choose a kernel and lay the weights out for it.

    codes: [N, K] uint8. scales, zeros: [N, K/group_size]; zeros None means 2**(bits-1). g_idx: [K], None when column k is
    in group k // group_size. group_size: -1 for one group per row. kernel: force one by name.
    Raises ValueError on shapes that do not fit each other, on codes or groups out of range, and when a forced kernel cannot run.
    """
    n, k = codes.shape
    group_size = k if group_size == -1 else group_size
    device = torch.device(device)
    p = Problem(n, k, bits, group_size, zeros is None, dtype, device.type, g_idx is not None)
    if codes.dtype != torch.uint8 or (codes.numel() and int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes must be uint8 below {1 << bits}, found {codes.dtype} up to {int(codes.max())}")
    for name, t in (("scales", scales), ("zeros", zeros)):
        if t is not None and tuple(t.shape) != (n, p.groups):
            raise ValueError(f"{name} is {list(t.shape)}, but codes {[n, k]} with group_size {group_size} need {[n, p.groups]}")
    if g_idx is not None and (tuple(g_idx.shape) != (k,) or int(g_idx.min()) < 0 or int(g_idx.max()) >= p.groups):
        raise ValueError(f"g_idx must be [{k}] with values in 0..{p.groups - 1}")
    chosen = choose(p, kernel)
    moved = [None if t is None else t.to(device) for t in (codes, scales, zeros, g_idx)]
    return Prepared(chosen, p, chosen.prepare(*moved, p))


def gemm(x: torch.Tensor, p: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + bias. x: [..., K] of the prepared dtype and device -> [..., N]. M = 0 gives an empty result."""
    if x.shape[-1] != p.problem.k or x.dtype != p.problem.dtype or x.device.type != p.problem.device:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} on {x.device.type}, but these weights take "
            f"{p.problem.dtype} [..., {p.problem.k}] on {p.problem.device}"
        )
    flat = x.reshape(-1, p.problem.k).contiguous()
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], p.problem.n)
    return p.kernel.gemm(flat, p.weights, p.problem, bias).view(*x.shape[:-1], p.problem.n)
