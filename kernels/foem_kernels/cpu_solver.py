"""The inner loop of GPTQ, GPTAQ and FOEM for one block of columns in one call, on CPUs: the wrapper of cpu_solver.c.

The same function as `triton_solver.quantize_block`; sums may be fused, so results equal those of the loop in torch up to the
last bit of float32, and codes except where two grid points are equally near.
"""

from __future__ import annotations

import torch

from foem_kernels import native

MAX_COLUMNS = 128


def supports(device: torch.device | str, dtype: torch.dtype, columns: int = MAX_COLUMNS) -> str | None:
    """None when blocks of up to `columns` columns are computed right there, else the reason why not, in one line."""
    if columns > MAX_COLUMNS:
        return f"takes blocks of up to {MAX_COLUMNS} columns, not {columns}"
    return native.lacking(device, dtype, torch.float32)


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
    unpulled: int = MAX_COLUMNS,
    P: torch.Tensor | None = None,
    alpha: float | torch.Tensor = 0.0,
    seen: torch.Tensor | None = None,
) -> None:
    """See `triton_solver.quantize_block`, whose arguments these are; on the CPU."""
    if (reason := supports(w.device, w.dtype, len(w))) is not None:
        raise ValueError(f"cpu_solver {reason}")
    if (P is None) != (seen is None):
        raise ValueError("P and seen belong together: give both or neither")
    b, n = w.shape
    alpha, beta = (torch.full((n,), float(v)) if isinstance(v, (int, float)) else v for v in (alpha, beta))
    shapes = dict.fromkeys(("w", "points", "errors", "seen", "target"), (b, n)) | {"V": (b, b), "P": (b, b), "alpha": (n,)}
    shapes |= {"scales": (len(scales), n), "zeros": (len(scales), n), "groups": (b,), "beta": (n,)}
    given = dict(w=w, points=points, errors=errors, seen=seen, target=target, V=V, P=P, alpha=alpha, beta=beta, scales=scales)
    for name, t in {**given, "zeros": zeros, "groups": groups}.items():
        if t is None:
            continue
        dtype = torch.int32 if name == "groups" else torch.float32
        strided = t.stride(-1) == 1 if name in "VP" else t.is_contiguous()
        if tuple(t.shape) != shapes[name] or t.dtype != dtype or t.device.type != "cpu" or not strided:
            raise ValueError(
                f"{name} must be {dtype} {list(shapes[name])} on the CPU, each row contiguous; found {t.dtype} {list(t.shape)}, "
                f"strides {list(t.stride())}, on {t.device}"
            )
    if not (b and n):
        return
    at = native.pointer
    native.library().foem_cpu_quantize_block(
        at(w), at(V), V.stride(0), at(points), at(errors), at(scales), at(zeros), at(groups), 1 << (bits - 1), at(beta),
        at(target), first, unpulled, at(P), 0 if P is None else P.stride(0), at(alpha), at(seen), b, n, torch.get_num_threads(),
    )  # fmt: skip
