"""Coordinate descent on codes that are already good: one step up or down at a time, where it lowers the layer's loss most.

Columns that GPTQ rounded early could not know what the later ones would be; this looks at all of them again. A row's codes move
until no single step helps, or `STEPS` of its columns have moved: the first steps, on codes that lie nearly between two grid
points, gain most, and long descents fit the calibration text rather than the layer.
"""

from __future__ import annotations

import torch

from foem_vllm.format import Quantized, QuantSpec, dequantize, group_index

STEPS = 0.2  # of the columns


def descend(q: Quantized, spec: QuantSpec, target: torch.Tensor, H: torch.Tensor) -> tuple[Quantized, int]:
    """(q with codes that bring it closer to target [N, K] under H [K, K], grid unchanged; how many steps were taken).

    A step of size s in column j changes tr(E H E^T), E = Q - target, by 2 s (E H)_j + s^2 H_jj, exactly.
    """
    n, k = target.shape
    groups = (group_index(k, spec) if q.g_idx is None else q.g_idx).long().to(H.device)
    size = q.scales.to(H)[:, groups]
    codes = q.codes.to(H)
    slope = (dequantize(q, spec).to(H) - target.to(H)) @ H
    cost = size.square() * H.diagonal()
    top = (1 << spec.bits) - 1
    # What a step down the slope would change, and in which direction it goes; rows are updated one column a round.
    taken, rows = 0, torch.arange(n, device=H.device)
    for _ in range(max(1, round(STEPS * k))):
        down = slope > 0
        free = torch.where(down, codes > 0, codes < top)
        change = torch.where(free, cost - 2 * size * slope.abs(), 0.0)
        least, column = change.min(1)
        moving = rows[least < 0]
        if not len(moving):
            break
        column = column[moving]
        step = torch.where(down[moving, column], -1.0, 1.0).to(H)
        codes[moving, column] += step
        slope[moving] += (step * size[moving, column])[:, None] * H[column]
        taken += len(moving)
    return q._replace(codes=codes.to(q.codes.dtype)), taken
