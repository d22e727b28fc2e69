"""Coordinate descent on codes that are already good: one step up or down at a time, where it lowers the layer's loss most.

Columns that GPTQ rounded early could not know what the later ones would be; this looks at all of them again. A row's codes move
until no single step helps, or `STEPS` of its columns have moved: the first steps, on codes that lie nearly between two grid
points, gain most, and long descents fit the calibration text rather than the layer.
"""

from __future__ import annotations

import torch
from foem_kernels import descent as kernels

from foem_vllm.format import Quantized, QuantSpec, dequantize, group_index

STEPS = 0.2  # of the columns


def descend(q: Quantized, spec: QuantSpec, target: torch.Tensor, H: torch.Tensor) -> tuple[Quantized, int]:
    """(q with codes that bring it closer to target [N, K] under H [K, K], grid unchanged; how many steps were taken).

    A step of size s in column j changes tr(E H E^T), E = Q - target, by 2 s (E H)_j + s^2 H_jj, exactly.
    """
    n, k = target.shape
    groups = (group_index(k, spec) if q.g_idx is None else q.g_idx).long().to(H.device)
    size = q.scales.to(H)[:, groups]
    codes, top = q.codes.clone(), (1 << spec.bits) - 1
    slope = ((dequantize(q, spec).to(H) - target.to(H)) @ H) * size
    cost = size.square() * (H.diagonal() / 2)
    taken = kernels.descend(codes, slope, size, cost, H, top, max(1, round(STEPS * k)))
    return q._replace(codes=codes), taken
