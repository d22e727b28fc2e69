"""Mixture-of-experts layers with quantized weights on CPUs: every expert's tokens through cpu_w4a16.

The same functions as triton_moe, for all widths, groups and dtypes of `CpuW4A16`. What leaves the first product is rounded to
x's dtype, the activation is computed in float32, and a token's experts are added up in float32, in the order of topk_ids.
One torch op does it all, because how many tokens an expert gets is known only at run time: torch.compile sees [T, hidden].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from foem_kernels import native
from foem_kernels.cpu_w4a16 import PAIR, CpuW4A16, blocked, cpu_w4a16, int8_activations, pack_words, stored_bits
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
    order: torch.Tensor | None = None,
) -> dict:
    """The layout of one linear of every expert, each as `CpuW4A16.prepare` gives it, the weights of all in huge pages.

    codes [E, n, k] uint8; scales, zeros [E, n, groups]; g_idx [E, k] or None. order: integers [E, k], which input of the linear
    each column belongs to, when that is not one after the other: inputs may be fewer than columns, and more than one column's.
    gated: the rows are those of gate, then of up. Raises ValueError on shapes that do not fit `p`, and on g_idx that gives a
    group too many columns.
    """
    if reason := supports(p):
        raise ValueError(f"cpu_moe cannot run {p}: {reason}")
    shapes = {"codes": (p.n, p.k), "scales": (p.n, p.groups), "zeros": (p.n, p.groups), "g_idx": (p.k,), "order": (p.k,)}
    given = {"codes": codes, "scales": scales, "zeros": zeros, "g_idx": g_idx, "order": order}
    for name, t in given.items():
        if t is not None and tuple(t.shape) != (len(codes), *shapes[name]):
            raise ValueError(f"{name} is {list(t.shape)}, but {len(codes)} experts of {p} need {[len(codes), *shapes[name]]}")
    if gated and p.n % 2:
        raise ValueError(f"gate and up rows must be equally many, found {p.n} together")
    if g_idx is not None:
        groups, order = torch.sort(g_idx.long(), dim=1, stable=True)
        if not torch.equal(groups, (torch.arange(p.k) // p.group_size).expand_as(groups)):
            raise ValueError(f"g_idx does not give every group {p.group_size} columns")
        codes = codes.gather(2, order[:, None].expand_as(codes))

    def stacked(rows: torch.Tensor, layout) -> torch.Tensor:
        if p.n % PAIR:  # no tile of outputs belongs to two experts
            rows = torch.nn.functional.pad(rows, (0, 0, 0, -p.n % PAIR))
        return layout(rows.flatten(0, 1)).unflatten(0, (len(codes), -1))

    return {
        "weight": stacked(codes, lambda rows: pack_words(rows, stored_bits(p.bits))),
        "scales": stacked(scales, blocked),
        "zeros": None if zeros is None else stacked(zeros, blocked),
        "order": None if order is None else order.int(),
        "inputs": p.k if order is None else int(order.max()) + 1,
        "isa": native.instruction_set(),
        "int8": int8_activations(),
        "problem": p,
    }


class _Linear:
    """One linear of every expert, from the op's arguments; sizes: `_sizes`."""

    def __init__(self, weight, scales, zeros, order, sizes: list[int]):
        self.tensors, self.sizes = (weight, scales, zeros, order), sizes

    def __call__(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        n, bits, group_size, zero, isa, int8 = self.sizes
        weight, scales, zeros, order = (None if t is None else t[expert] for t in self.tensors)
        if order is not None and len(order) != x.shape[1]:  # else the kernel does it on the way
            x, order = x.index_select(1, order), None
        return cpu_w4a16(x, weight, scales, zeros, order, None, n, bits, group_size, float(zero), isa, bool(int8))


def _sizes(prepared: dict) -> list[int]:
    p = prepared["problem"]
    return [p.n, stored_bits(p.bits), p.group_size, p.mid, prepared["isa"], int(prepared["int8"])]


def _cpu_moe(
    x: torch.Tensor,
    weight13: torch.Tensor,
    scales13: torch.Tensor,
    zeros13: torch.Tensor | None,
    order13: torch.Tensor | None,
    sizes13: list[int],
    weight2: torch.Tensor,
    scales2: torch.Tensor,
    zeros2: torch.Tensor | None,
    order2: torch.Tensor | None,
    sizes2: list[int],
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    activation: str,
    apply_router_weight_on_input: bool,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    up, down = _Linear(weight13, scales13, zeros13, order13, sizes13), _Linear(weight2, scales2, zeros2, order2, sizes2)
    experts, (tokens, top_k) = len(weight13), topk_ids.shape
    local = topk_ids.flatten().long()
    if expert_map is not None:
        known = (local >= 0) & (local < len(expert_map))
        local = torch.where(known, expert_map.long()[local.clamp(0, len(expert_map) - 1)], -1)
    local = torch.where((local >= 0) & (local < experts), local, experts)  # what is not here comes last and is left out
    pairs = torch.argsort(local, stable=True)
    counts = torch.bincount(local, minlength=experts + 1)[:experts].tolist()
    found, start = torch.zeros(tokens, top_k, x.shape[1], dtype=torch.float32), 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        mine = pairs[start : start + count]
        start += count
        rows, weights = x[mine // top_k], topk_weights.flatten()[mine].float()[:, None]
        if apply_router_weight_on_input:
            rows = (rows.float() * weights).to(x.dtype)
        gate, lift = up(rows, expert).float().chunk(2, -1)
        out = down((ACTIVATIONS[activation](gate) * lift).to(x.dtype), expert).float()
        found.flatten(0, 1)[mine] = out if apply_router_weight_on_input else out * weights
    total = torch.zeros(x.shape, dtype=torch.float32)
    for place in range(top_k):
        total += found[:, place]
    return total.to(x.dtype)


_library = torch.library.Library("foem", "FRAGMENT")
_library.define(
    "cpu_moe(Tensor x, Tensor weight13, Tensor scales13, Tensor? zeros13, Tensor? order13, int[] sizes13, Tensor weight2, "
    "Tensor scales2, Tensor? zeros2, Tensor? order2, int[] sizes2, Tensor topk_ids, Tensor topk_weights, str activation, "
    "bool apply_router_weight_on_input, Tensor? expert_map) -> Tensor"
)
_library.impl("cpu_moe", _cpu_moe, "CPU")
torch.library.register_fake("foem::cpu_moe", lambda x, *_: torch.empty_like(x), lib=_library)


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
    if up.n != 2 * w2["inputs"] or down.n != w13["inputs"] or len(w13["weight"]) != len(w2["weight"]):
        raise ValueError(
            f"w13 is {[len(w13['weight']), up.n, w13['inputs']]}, w2 {[len(w2['weight']), down.n, w2['inputs']]}; they must be "
            "[E, 2 inner, hidden] and [E, hidden, inner]"
        )
    if x.dtype != up.dtype or x.dim() != 2 or x.shape[1] != w13["inputs"]:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, but these experts take {up.dtype} [T, {w13['inputs']}]")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0] or not topk_ids.shape[1] or topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_ids {list(topk_ids.shape)} and topk_weights {list(topk_weights.shape)} must both be [{x.shape[0]}, k], "
            "k at least 1"
        )
    linears = (t for w in (w13, w2) for t in (w["weight"], w["scales"], w["zeros"], w["order"], _sizes(w)))
    return torch.ops.foem.cpu_moe(
        x.contiguous(), *linears, topk_ids, topk_weights, activation, apply_router_weight_on_input, expert_map
    )
