"""The grid of one group: scale and zero point from its range, the whole or a searched part of it; rounding to codes; RTN.

Scales are rounded before any code is chosen, to values that every dtype in `scale_dtypes` holds exactly. With (float16,
bfloat16) an engine that keeps the file's float16 scales and one that casts them to a bfloat16 model's dtype compute with
the same numbers.
"""

from __future__ import annotations

import torch
from foem_kernels import grid as kernels

from foem_vllm.format import Quantized, QuantSpec, dequantize

SCALE_DTYPES = (torch.float16,)
GRIDS = ("minmax", "search")
SHRINK = tuple(1 - 0.02 * i for i in range(26))  # a group's range, down to half of it


def round_scales(scales: torch.Tensor, dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES) -> torch.Tensor:
    """`scales` at the nearest positive value that all of `dtypes` hold exactly, in the dtype it came in.

    Clamped to float16's normal range: below it float16 and bfloat16 share too few values to be a scale.
    """
    largest = 65280.0  # the largest value that bfloat16 and float16 share
    rounded = scales.clamp(torch.finfo(torch.float16).tiny, largest)
    for dtype in sorted(dtypes, key=lambda d: -torch.finfo(d).eps):  # coarsest first: the finer ones then hold it exactly
        rounded = rounded.to(dtype).to(scales.dtype)
    return rounded


def find_grid(
    w: torch.Tensor,
    spec: QuantSpec,
    dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES,
    search: bool = False,
    importance: torch.Tensor | None = None,
):
    """(scale, zero) of weights w [..., g] that share one grid: [...] each, of w's dtype.

    Symmetric: the largest magnitude spans half of the 2**bits - 1 steps. Asymmetric: minimum to maximum, zero included.
    A group of zeros gets scale 1. With `search` the range is shrunk by the factor of SHRINK that rounds w with the smallest
    squared error, each column weighted by importance, [g] or [groups, g], of w's dtype (the diagonal of H); at equal error the
    widest range stays.
    """
    steps = (1 << spec.bits) - 1
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    shrink = torch.tensor(SHRINK if search else SHRINK[:1], dtype=w.dtype, device=w.device).view(-1, *[1] * low.dim())
    span = shrink * (2 * torch.maximum(-low, high) if spec.symmetric else high - low)
    scales = round_scales(torch.where(span > 0, span / steps, 1), dtypes)
    zeros = None if spec.symmetric else (-shrink * low / scales).round().clamp(0, steps)
    level = kernels.search(w, scales, zeros, spec.bits, importance) if search else torch.zeros_like(low, dtype=torch.int64)
    scale = scales.gather(0, level[None])[0]
    return scale, torch.full_like(scale, spec.mid) if zeros is None else zeros.gather(0, level[None])[0]


def refit_scales(
    q: Quantized, spec: QuantSpec, target: torch.Tensor, H: torch.Tensor, dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES
) -> tuple[Quantized, torch.Tensor]:
    """(q with the scales, and zero points at most one away, that bring it closest to target [N, K] under H [K, K]; same codes,
    (target - Q) H [N, K] in the end).

    One group after the other, in closed form. With V = codes - zero of group g and R = [(target - Q) H]_g, moving the zero point
    by d and the scale by t changes tr((Q - target) H (Q - target)^T) by

        (s d)^2 1 H_gg 1^T + 2 s d R 1^T  +  t^2 U H_gg U^T - 2 t (R + s d 1 H_gg) U^T,  U = V - d

    whose best t is rounded to what a scale can be. A group stays as it is where that would not lower it.
    """
    n, k = target.shape
    scales = q.scales.to(H).clone()
    zeros = None if q.zeros is None else q.zeros.to(H)
    grid = dequantize(q._replace(scales=torch.ones_like(scales)), spec).to(H)  # codes - zero
    size = k // scales.shape[1]
    residual = (target.to(H) - dequantize(q, spec).to(H)) @ H
    for g in range(scales.shape[1]):
        columns = slice(g * size, (g + 1) * size) if q.g_idx is None else (q.g_idx.to(H.device) == g).nonzero().squeeze(1)
        V, R, scale = grid[:, columns], residual[:, columns], scales[:, g].clone()
        Hg = H[columns][:, columns]
        least = torch.zeros_like(scale)
        best, moved = scale.clone(), torch.zeros_like(scale)
        for d in (0,) if zeros is None else (0, 1, -1):
            U, shift = V - d, d * scale
            toward = (R * U).sum(1) + shift * (U @ Hg.sum(0))
            curve = ((U @ Hg) * U).sum(1)
            new = round_scales(scale + torch.where(curve > 0, toward / curve, 0), dtypes)
            step = new - scale
            change = shift.square() * Hg.sum() + 2 * shift * R.sum(1) + step * (step * curve - 2 * toward)
            better = change < least
            if d:
                better &= (zeros[:, g] + d >= 0) & (zeros[:, g] + d < 1 << spec.bits)
            least, best = torch.where(better, change, least), torch.where(better, new, best)
            moved = torch.where(better, d, moved)
        scales[:, g] = best
        if zeros is not None:
            zeros[:, g] += moved
        residual.addmm_(best[:, None] * (V - moved[:, None]) - scale[:, None] * V, H[columns], alpha=-1)
    q = q._replace(scales=scales.to(q.scales.dtype), zeros=None if q.zeros is None else zeros.to(q.zeros.dtype))
    return q, residual


def to_codes(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Nearest codes, in w's dtype: round(w / scale) + zero, clamped to 0 .. 2**bits - 1."""
    return ((w / scale).round() + zero).clamp_(0, (1 << spec.bits) - 1)


def round_to_nearest(
    w: torch.Tensor, spec: QuantSpec, dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES, search: bool = False
) -> Quantized:
    """RTN: every weight of w [N, K] to the nearest point of its group's grid. K must be a multiple of the group size."""
    n, k = w.shape
    g = k if spec.group_size == -1 else spec.group_size
    groups = w.view(n, k // g, g)
    scale, zero = find_grid(groups, spec, dtypes, search)
    codes = to_codes(groups, scale[..., None], zero[..., None], spec)
    return Quantized(codes.view(n, k).to(torch.uint8), scale, None if spec.symmetric else zero.to(torch.uint8))
