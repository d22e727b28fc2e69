"""Mixture-of-experts layers with quantized weights on CPUs: every expert's tokens through cpu_w4a16.

The same functions as triton_moe, for all widths, groups and dtypes of `CpuW4A16`. What leaves the first product is rounded to
x's dtype, the activation is computed in float32, and a token's experts are added up in float32, in the order of topk_ids.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from foem_kernels.cpu_w4a16 import CpuW4A16, cpu_w4a16, stored_bits
from foem_kernels.problem import Problem

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu": F.relu,
}


def supports(p: Problem) -> str | None:
    """None when the experts' `p` (of the gate and up rows together, or of the down rows) is computed right, else why not."""
    return CpuW4A16().supports(p)


def prepare(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    p: Problem,
    gated: bool = False,
) -> dict:
    """The layout of one linear of every expert: what `CpuW4A16.prepare` gives for each, in lists, and the problem.

    codes [E, n, k] uint8; scales, zeros [E, n, groups]; g_idx [E, k] or None. gated: the rows are those of gate, then of up.
    Raises ValueError on shapes that do not fit `p`, and on g_idx that gives a group too many columns.
    """
    if reason := supports(p):
        raise ValueError(f"cpu_moe cannot run {p}: {reason}")
    shapes = {"codes": (p.n, p.k), "scales": (p.n, p.groups), "zeros": (p.n, p.groups), "g_idx": (p.k,)}
    given = {"codes": codes, "scales": scales, "zeros": zeros, "g_idx": g_idx}
    for name, t in given.items():
        if t is not None and tuple(t.shape) != (len(codes), *shapes[name]):
            raise ValueError(f"{name} is {list(t.shape)}, but {len(codes)} experts of {p} need {[len(codes), *shapes[name]]}")
    if gated and p.n % 2:
        raise ValueError(f"gate and up rows must be equally many, found {p.n} together")
    dense = CpuW4A16()
    parts = [dense.prepare(*(None if t is None else t[e] for t in given.values()), p) for e in range(len(codes))]
    return {"experts": parts, "problem": p}


def _one(x: torch.Tensor, prepared: dict, expert: int) -> torch.Tensor:
    p, w = prepared["problem"], prepared["experts"][expert]
    return cpu_w4a16(x, w["weight"], w["scales"], w["zeros"], w["order"], None, p.n, stored_bits(p.bits), p.group_size,
                     float(p.mid), w["isa"], w["int8"])  # fmt: skip


def experts(
    x: torch.Tensor,
    w13: dict,
    w2: dict,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    activation: str = "silu",
    apply_router_weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `triton_moe.experts`, whose arguments these are; x float32, float16 or bfloat16 on the CPU."""
    up, down = w13["problem"], w2["problem"]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; there are {', '.join(ACTIVATIONS)}")
    if up.n != 2 * down.k or down.n != up.k or len(w13["experts"]) != len(w2["experts"]):
        raise ValueError(
            f"w13 is {[len(w13['experts']), up.n, up.k]}, w2 {[len(w2['experts']), down.n, down.k]}; they must be "
            "[E, 2 inner, hidden] and [E, hidden, inner]"
        )
    if x.dtype != up.dtype or x.dim() != 2 or x.shape[1] != up.k:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, but these experts take {up.dtype} [T, {up.k}]")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0] or not topk_ids.shape[1] or topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_ids {list(topk_ids.shape)} and topk_weights {list(topk_weights.shape)} must both be [{x.shape[0]}, k], "
            "k at least 1"
        )
    local = topk_ids.long()
    if expert_map is not None:
        known = (local >= 0) & (local < len(expert_map))
        local = torch.where(known, expert_map.long()[local.clamp(0, len(expert_map) - 1)], -1)
    found = torch.zeros(*topk_ids.shape, up.k)
    for expert in range(len(w13["experts"])):
        token, place = (local == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        rows, weights = x[token], topk_weights[token, place].float()[:, None]
        if apply_router_weight_on_input:
            rows = (rows.float() * weights).to(x.dtype)
        gate, lift = _one(rows, w13, expert).float().chunk(2, -1)
        out = _one((ACTIVATIONS[activation](gate) * lift).to(x.dtype), w2, expert).float()
        found[token, place] = out if apply_router_weight_on_input else out * weights
    total = torch.zeros(x.shape[0], up.k)
    for place in range(topk_ids.shape[1]):
        total += found[:, place]
    return total.to(x.dtype)
