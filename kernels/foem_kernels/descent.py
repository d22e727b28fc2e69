"""One step at a time on the codes of a layer: the fused kernel of the CPU, or the loop in torch, which is the reference, and
takes every device and dtype."""

from __future__ import annotations

import functools
import logging
import os

import torch

from foem_kernels import cpu_descent

logger = logging.getLogger("foem_kernels")


def descend(
    codes: torch.Tensor, slope: torch.Tensor, size: torch.Tensor, cost: torch.Tensor, H: torch.Tensor, top: int, steps: int
) -> int:
    """`descend_torch`, by the kernel where there is one and FOEM_SOLVER is not "torch" (see `solver.pick`).

    float32 layers on a CPU that are left to torch are logged, once for each reason.
    """
    reason = cpu_descent.supports(slope.device, slope.dtype)
    if reason is None and os.environ.get("FOEM_SOLVER") != "torch":
        return cpu_descent.descend(codes, slope, size, cost, H, top, steps)
    if reason is not None and slope.device.type == "cpu" and slope.dtype == torch.float32:
        _log_once(reason)
    return descend_torch(codes, slope, size, cost, H, top, steps)


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("foem solver: codes descend in torch, which is slow: the CPU's kernel %s", reason)


def descend_torch(
    codes: torch.Tensor, slope: torch.Tensor, size: torch.Tensor, cost: torch.Tensor, H: torch.Tensor, top: int, steps: int
) -> int:
    """Move codes [N, K] uint8, in place, and return how many steps were taken: at most `steps` in a row.

    Half of what a step up in column j changes is cost + slope, down cost - slope, [N, K] each; a row takes the step with the
    least, the first of equal ones, while that is below 0, and none beyond 0 or `top`. It adds direction * size_j * size * H[j]
    to the row's slopes; size [N, K]: how large steps are; H [K, K]: symmetric.
    """
    up, down = cost.masked_fill(codes == top, torch.inf), cost.masked_fill(codes == 0, torch.inf)
    rows, taken = torch.arange(len(codes), device=codes.device), 0
    for _ in range(steps):
        least, column = torch.minimum(up + slope, down - slope).min(1)
        moving = least < 0
        count = int(moving.sum())
        if not count:
            break
        taken += count
        if 2 * count < len(rows):  # a row that has come to rest stays there
            rows, column, slope, size, cost, up, down = (t[moving] for t in (rows, column, slope, size, cost, up, down))
            moving = moving[moving]
        at = torch.arange(len(rows), device=codes.device), column
        direction = torch.where(slope[at] > 0, -1, 1) * moving
        new = codes[rows, column].int() + direction
        codes[rows, column] = new.to(codes.dtype)
        up[at], down[at] = (torch.where(new == edge, torch.inf, cost[at]) for edge in (top, 0))
        slope = slope + size * (H[column] * (direction * size[at])[:, None])
    return taken
