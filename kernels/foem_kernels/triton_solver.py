"""The inner loop of GPTQ, GPTAQ and FOEM for one block of columns in one launch, in Triton, for NVIDIA GPUs and float32.

Rows of a layer do not interact, so a program takes a few of them and holds the block's columns in registers while it rounds
one after the other; the loop in torch (`solver.quantize_block`, where the choice is made too) makes at least five launches a
column. Operations, their order and their rounding are those of that loop. The update of the columns after the block is a
matrix product and stays the caller's. Grids must be known before the block begins: where a group's grid is found from weights
that have seen all updates, a block must not go beyond the group.

The launch was chosen from registers and instruction counts of compiled kernels; no time was measured.
"""

from __future__ import annotations

import importlib.util
import os

import torch

MAX_COLUMNS = 128
ROWS = 8  # of the layer, in one program of one warp: 4096 rows make 512, about one for each scheduler of 132 multiprocessors


def supports(device: torch.device | str, dtype: torch.dtype, columns: int = MAX_COLUMNS) -> str | None:
    """None when blocks of up to `columns` columns are computed right there, else the reason why not, in one line."""
    device = torch.device(device)
    if dtype != torch.float32:
        return f"takes float32, not {dtype}"
    if columns > MAX_COLUMNS:
        return f"takes blocks of up to {MAX_COLUMNS} columns, not {columns}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return None if device.type == "cpu" else f"TRITON_INTERPRET=1 runs on the CPU, not on {device.type}"
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if not torch.cuda.is_available() or torch.version.hip:
        return "no NVIDIA GPU is visible"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"needs compute capability 8.0, found {major}.{minor}"


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
    """Round B <= 128 columns of a layer with N rows, from left to right, into `points`, `errors` and `seen`.

    All float32 on one device; columns of the layer are rows of the tensors, each contiguous.
    w [B, N]: the columns, with all updates of earlier blocks; not changed. V [B, B], any row stride: the block of U's rows over
    its diagonal; what is not right of the diagonal is not read. points [B, N]: set to codes minus zero. errors [B, N]: set to
    what must be taken off later columns, times V. scales, zeros [G, N]; zeros None for symmetric codes. groups [B] int32: row
    of scales of each column. bits: 1 to 8. target [B, N]: what each column is pulled to by `beta`, a number or [N]; None for no
    pull. first: place of the block's first column in the layer; columns whose place is a multiple of `unpulled` are not
    pulled. P [B, B], any row stride: drift, read like V; seen [B, N]: set to alpha (a number or [N]) times each column as it
    was when it was rounded; None, both, for no drift. Raises ValueError when shapes, dtypes, strides or devices do not fit.
    """
    b, n = w.shape
    pulls, drifts = target is not None, P is not None
    if (P is None) != (seen is None):
        raise ValueError("P and seen belong together: give both or neither")
    if (reason := supports(w.device, w.dtype, b)) is not None:
        raise ValueError(f"triton_solver {reason}")
    like = {"w": w, "points": points, "errors": errors, "seen": seen, "target": target}
    rows = {"alpha": alpha if drifts else None, "beta": beta if pulls else None}
    rows = {name: w.new_full((n,), v) if isinstance(v, (int, float)) else v for name, v in rows.items()}
    shapes = dict.fromkeys(like, (b, n)) | {"V": (b, b), "P": (b, b), "scales": (len(scales), n), "zeros": tuple(scales.shape)}
    shapes |= {"groups": (b,), "alpha": (n,), "beta": (n,)}
    for name, t in {**like, "V": V, "P": P, "scales": scales, "zeros": zeros, "groups": groups, **rows}.items():
        if t is None:
            continue
        dtype = torch.int32 if name == "groups" else torch.float32
        strided = t.stride(-1) == 1 if name in "VP" else t.is_contiguous()
        if tuple(t.shape) != shapes[name] or t.dtype != dtype or t.device != w.device or not strided:
            raise ValueError(
                f"{name} must be {dtype} {list(shapes[name])} on {w.device}, each row contiguous; "
                f"found {t.dtype} {list(t.shape)}, strides {list(t.stride())}, on {t.device}"
            )
    if n == 0 or b == 0:
        return
    from foem_kernels import triton_solver_device as device

    block = max(16, 1 << (b - 1).bit_length())
    with torch.cuda.device_of(w):
        device.round_columns[(-(-n // ROWS),)](
            w, V, P, points, errors, seen, scales, zeros, groups, target, rows["alpha"], rows["beta"], n, b, first, unpulled,
            V.stride(0), P.stride(0) if drifts else 0, MID=1 << (bits - 1), BLOCK=block, ROWS=ROWS, SYMMETRIC=zeros is None,
            PULLS=pulls, DRIFTS=drifts, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
