"""Dequantize, then matmul, in plain torch: supports everything, and is the oracle that other kernels are tested against.

The codes stay one byte each and the weight is rebuilt in every call, so this is the slow path, never a silent one:
`choose` logs it.
"""

from __future__ import annotations

import torch

from foem_kernels.problem import Problem


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    p: Problem,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[n, k] of `dtype`: scale * (code - zero)."""
    group = torch.arange(p.k, device=codes.device) // p.group_size if g_idx is None else g_idx.long().to(codes.device)
    zero = p.mid if zeros is None else zeros.to(dtype)[:, group]
    return (codes.to(dtype) - zero) * scales.to(dtype)[:, group]


class Reference:
    name = "reference"

    def supports(self, p: Problem) -> str | None:
        return None

    def prepare(self, codes, scales, zeros, g_idx, p):
        return {"codes": codes.contiguous(), "scales": scales.float().contiguous(), "zeros": zeros, "g_idx": g_idx}

    def size(self, p):
        return p.n * (p.k + (4 if p.symmetric else 5) * p.groups) + 4 * p.k * p.act_order

    def gemm(self, x, weights, p, bias):
        w = dequantize(weights["codes"], weights["scales"], weights["zeros"], weights["g_idx"], p).to(p.dtype)
        return torch.nn.functional.linear(x, w, bias)
