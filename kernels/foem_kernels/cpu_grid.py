"""The search of `grid` on CPUs, in one pass over the weights: the wrapper of cpu_grid.c."""

from __future__ import annotations

import torch

from foem_kernels import native

MAX_LEVELS = 32


def supports(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """None when weights of that dtype are searched right there, else the reason why not, in one line."""
    return native.lacking(device, dtype, torch.float32)


def search(
    w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """See `grid.search_torch`, whose arguments these are; on the CPU, at most MAX_LEVELS levels, float32 all. w: any strides.

    Raises ValueError on anything else. Errors are summed in double, so that neither strides nor threads change what is found.
    """
    if (reason := supports(w.device, w.dtype)) is not None:
        raise ValueError(f"cpu_grid {reason}")
    levels, ranges, g = len(scales), w.shape[:-1], w.shape[-1]
    groups = w.shape[-2] if w.dim() > 2 else 1
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"cpu_grid takes 1 to {MAX_LEVELS} levels, not {levels}")
    shapes = {"scales": (levels, *ranges), "zeros": (levels, *ranges), "importance": (groups, g)}
    importance = torch.ones(g) if importance is None else importance
    if importance.dim() == 1:
        importance = importance.expand(groups, -1)
    given = {"scales": scales, "zeros": zeros, "importance": importance}
    for name, t in given.items():
        if t is not None and (t.shape != shapes[name] or t.dtype != torch.float32 or t.device.type != "cpu"):
            raise ValueError(
                f"{name} must be torch.float32 {list(shapes[name])} on the CPU; found {t.dtype} {list(t.shape)} on {t.device}"
            )
    best = torch.zeros(ranges, dtype=torch.int64)
    if not w.numel():
        return best
    rows = w.reshape(-1, groups, g)
    scales, zeros, importance = (None if t is None else t.contiguous() for t in given.values())
    at = native.pointer
    native.library().foem_cpu_search_grid(
        at(rows), *rows.stride(), at(importance), at(scales), at(zeros), 1 << (bits - 1), levels, *rows.shape, at(best),
        native.instruction_set(), torch.get_num_threads(),
    )  # fmt: skip
    return best
