"""The loop of `descent` on CPUs, each row while it is in the cache: the wrapper of cpu_descent.c."""

from __future__ import annotations

import ctypes

import torch
from torch.nn.functional import pad

from foem_kernels import native

WIDEST = 16  # columns are padded to a multiple of it


def supports(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """None when layers of that dtype are descended on right there, else the reason why not, in one line."""
    return native.lacking(device, dtype, torch.float32)


def descend(
    codes: torch.Tensor, slope: torch.Tensor, size: torch.Tensor, cost: torch.Tensor, H: torch.Tensor, top: int, steps: int
) -> int:
    """See `descent.descend_torch`, whose arguments these are; on the CPU, float32 and uint8. The codes are the same.

    Raises ValueError on anything else.
    """
    if (reason := supports(slope.device, slope.dtype)) is not None:
        raise ValueError(f"cpu_descent {reason}")
    n, k = codes.shape
    for name, t in {"codes": codes, "slope": slope, "size": size, "cost": cost, "H": H}.items():
        dtype, shape = torch.uint8 if name == "codes" else torch.float32, (k, k) if name == "H" else (n, k)
        if t.dtype != dtype or t.shape != shape or t.device.type != "cpu":
            raise ValueError(f"{name} must be {dtype} {list(shape)} on the CPU; found {t.dtype} {list(t.shape)} on {t.device}")
    if not codes.numel():
        return 0
    more = -k % WIDEST  # columns that no step helps, because it would cost more than anything gains
    new = pad(codes, (0, more)).contiguous()
    slope = pad(slope, (0, more)).contiguous() if more else slope.clone(memory_format=torch.contiguous_format)
    size, cost = pad(size, (0, more)).contiguous(), pad(cost, (0, more), value=torch.inf).contiguous()
    H = pad(H, (0, more, 0, more)).contiguous()
    taken, at = ctypes.c_long(0), native.pointer
    failed = native.library().foem_cpu_descend(
        at(new), at(slope), at(size), at(cost), at(H), n, k + more, top, steps, ctypes.addressof(taken),
        native.instruction_set(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for two rows of {k} costs")
    codes.copy_(new[:, :k])
    return taken.value
