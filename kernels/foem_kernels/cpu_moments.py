"""Second moments of bfloat16 activations on CPUs with AVX-512 BF16, or AMX too: the wrapper of cpu_moments.c."""

from __future__ import annotations

import torch

from foem_kernels import native


def supports(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """None when moments of activations of that dtype are added up right there, else the reason why not, in one line."""
    if (reason := native.lacking(device, dtype, torch.bfloat16)) is not None:
        return reason
    if native.INSTRUCTION_SETS[native.instruction_set()] != "avx512_bf16":
        return "needs a CPU with AVX-512 BF16"
    return None


def add(
    gram: torch.Tensor,
    x: torch.Tensor,
    cross: torch.Tensor | None = None,
    then: torch.Tensor | None = None,
    now: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> None:
    """gram [K, K] += x^T diag(weights) x on and above the diagonal (below it, in places), cross [N, K] +=
    (then - now)^T diag(weights) x.

    x [T, K], then, now [T, N]: bfloat16; gram, cross: contiguous float32; weights [T] >= 0, None: 1. Products of x alone are
    exact and sums are float32. Differences, and whatever is weighted, are rounded to bfloat16 first: 2^-9 of each token's own
    share. Raises ValueError on anything else.
    """
    if reason := supports(x.device, x.dtype):
        raise ValueError(f"cpu_moments {reason}")
    t, k = x.shape
    shapes = {"gram": (k, k), "weights": (t,)}
    if cross is not None:
        if then is None or now is None:
            raise ValueError("cross needs then and now")
        shapes |= dict.fromkeys(("then", "now"), (t, len(cross))) | {"cross": (len(cross), k)}
    given = {"gram": gram, "weights": weights, "cross": cross, "then": then, "now": now}
    for name, shape in shapes.items():
        a = given[name]
        dtype = torch.bfloat16 if name in ("then", "now") else torch.float32
        if a is not None and (a.shape != shape or a.dtype != dtype or a.device.type != "cpu"):
            raise ValueError(f"{name} must be {dtype} {list(shape)} on the CPU; found {a.dtype} {list(a.shape)} on {a.device}")
    if not all(a is None or a.is_contiguous() for a in (gram, cross)):
        raise ValueError("gram and cross must be contiguous")
    if not (t and k):
        return
    x, then, now = (a if a is None or a.stride(-1) == 1 else a.contiguous() for a in (x, then, now))
    root = None if weights is None else weights.sqrt().contiguous()
    at = native.pointer
    failed = native.library().foem_cpu_add_moments(
        at(x), x.stride(0), t, k, at(root), at(gram), at(then), 0 if then is None else then.stride(0), at(now),
        0 if now is None else now.stride(0), 0 if cross is None else len(cross), at(cross), native.tiles(),
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for a copy of {t} x {k} activations")
