"""Mixture-of-experts layers with INT4 weights on NVIDIA GPUs, in Triton: layout, launch configuration and the torch op.

y[t] = sum_j topk_weights[t, j] * W2_e (activation(Wgate_e x[t]) * (Wup_e x[t])) with e = topk_ids[t, j]. Each expert's
weights lie as triton_w4a16 stores a linear's, so the products are the same: transposed, with the weights as the matrix
instruction's register operand. Tokens are sorted by expert on the device into blocks of one expert each; buffers and grids
have the size of the worst case for the number of tokens and blocks that are not needed return at once, so nothing waits for
the host and a CUDA graph replays with any routing. Results do not depend on timing: no atomics on numbers.

Left out: codes of other widths than 4 bits; biases; activations without a gate, and gpt-oss's clamped one; tuning at run
time. No time was measured.
"""
from __future__ import annotations

import math
from dataclasses import replace

import torch

from foem_kernels.problem import Problem
from foem_kernels.triton_w4a16 import Configuration, TritonW4A16, _gpu, interpreted

GROUPS = (16, 32, 64, 128)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def supports(p: Problem) -> str | None:
    """None when the experts' `p` (of the gate and up rows together, or of the down rows) is computed right, else why not."""
    if p.bits != 4:
        return f"takes 4-bit codes, not {p.bits}-bit"
    if p.group_size not in (*GROUPS, p.k):
        return f"takes groups of {', '.join(map(str, GROUPS))} or the whole row, not {p.group_size}"
    if p.k % p.group_size or p.k % 16:
        return f"needs K divisible by 16 and by the group size, found K={p.k}, group_size={p.group_size}"
    return TritonW4A16().supports(p)


def interleave(t: torch.Tensor) -> torch.Tensor:
    """[2 i, c], the gate rows before the up rows -> [2 * (i padded by zeros to 64), c], alternately eight of each."""
    t = t.unflatten(0, (2, -1))
    t = torch.nn.functional.pad(t, (0, 0, 0, -t.shape[1] % 64))
    return t.unflatten(1, (-1, 8)).transpose(0, 1).flatten(0, 2)


def prepare(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, g_idx: torch.Tensor | None, p: Problem,
            gated: bool = False, order: torch.Tensor | None = None) -> dict:
    """The layout of one linear of every expert, each expert's as `TritonW4A16.prepare` gives it, stacked.

    codes [E, n, k] uint8; scales, zeros [E, n, groups]; g_idx [E, k] or None. gated: the rows are those of gate, then of up.
    order: integers [E, k], which input of the linear each column belongs to, as `cpu_moe.prepare` takes it.
    Returns w uint8 [E, n_padded/64, k/chunk, 128, chunk/4], scales fp16 or fp32 and zeros uint8 or None [E, groups, n_padded],
    perm int32 [E, k] or None, n, inputs. Raises ValueError on shapes that do not fit `p` and on g_idx that gives a group too
    many columns.
    """
    experts = codes.shape[0]
    for name, t, shape in (("codes", codes, (p.n, p.k)), ("scales", scales, (p.n, p.groups)), ("zeros", zeros, (p.n, p.groups)),
                           ("g_idx", g_idx, (p.k,)), ("order", order, (p.k,))):
        if t is not None and t.shape != (experts, *shape):
            raise ValueError(f"{name} is {list(t.shape)}, but {experts} experts of {p} need {[experts, *shape]}")
    if reason := supports(p):
        raise ValueError(f"triton_moe cannot run {p}: {reason}")
    if gated and p.n % 2:
        raise ValueError(f"gate and up rows must be equally many, found {p.n} together")
    arranged = interleave if gated else torch.Tensor.contiguous
    dense, parts = TritonW4A16(), []
    for e in range(experts):
        rows = arranged(codes[e])
        parts.append(dense.prepare(rows, arranged(scales[e]), None if zeros is None else arranged(zeros[e]),
                                   None if g_idx is None else g_idx[e], replace(p, n=rows.shape[0])))
    half = all(part["scales"].dtype == torch.float16 for part in parts)
    perm = order if g_idx is None else torch.stack([part["perm"] for part in parts])
    perm = None if perm is None else perm.int()
    if perm is not None and torch.equal(perm, torch.arange(p.k, device=perm.device).int().expand_as(perm)):
        perm = None
    return {"w": torch.stack([part["w"] for part in parts]),
            "scales": torch.stack([part["scales"] if half else part["scales"].float() for part in parts]),
            "zeros": None if zeros is None else torch.stack([part["zeros"] for part in parts]), "perm": perm, "n": p.n,
            "inputs": p.k if perm is None else int(perm.max()) + 1}


def grouped_configuration(pairs: int, experts: int, all_experts: int, n: int, k: int, group_size: int,
                          capability: tuple[int, int] = (9, 0), sms: int = 132) -> Configuration:
    """The launch of one grouped product, with n rows of weights (padded to 128) for each of `experts` on this rank.

    pairs: tokens times top-k, over all_experts. The block of rows is two standard deviations above the mean (Poisson, as if
    the router were fair): a row too many costs little while weights are what is waited for, but an expert whose rows fill
    two blocks reads its weights twice. It depends on nothing else, because both products share one sorting. Tiles, warps and
    the place of the scale: the more rows, the fewer rounds of unpacking per product. K is split while one wave of the GPU is
    not full, as if no two pairs met, since how many experts are busy is known to the device alone; each part keeps four
    tiles for the load pipeline, and the partial sums stay below the bytes of the weights.
    """
    mean = pairs / all_experts
    rows = mean + 2 * math.sqrt(mean)
    block_m = next((size for size in (16, 32, 64) if rows <= size), 128)
    block_n = 256 if capability[0] == 9 and n % 256 == 0 and block_m >= 64 else 128
    block_k = next(size for size in (128, 64, 32, 16) if size <= (128 if block_m <= 64 else 64) and group_size % size == 0)
    scale = "end" if group_size == k else "after" if block_m <= 64 else "before"
    busy = max(1, min(math.ceil(mean * experts), experts))
    k_tiles, room = k // block_k, sms * {16: 3, 32: 2}.get(block_m, 1)
    splits = max(1, min(room // (busy * n // block_n), k_tiles // 4, k // (16 * math.ceil(rows)), 16))
    splits = -(-k_tiles // -(-k_tiles // splits))
    return Configuration(block_m, block_n, block_k, splits, 4 if block_m <= 32 else 8,
                         4 if capability[0] == 9 or block_m <= 32 else 3, scale)


def most_blocks(pairs: int, experts: int, block_m: int) -> int:
    """How many blocks of block_m rows of one expert each `pairs` can need: all experts but the last row of each full."""
    return min(pairs, (pairs + min(pairs, experts) * (block_m - 1)) // block_m)


def sort_pairs(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int,
               block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """order int32 [blocks * block_m] and block_expert int32 [blocks], as the device code of that name describes them."""
    from foem_kernels import triton_moe_device as device
    pairs = topk_ids.numel()
    blocks = most_blocks(pairs, experts, block_m)
    order = torch.empty(blocks * block_m, dtype=torch.int32, device=topk_ids.device)
    block_expert = torch.empty(blocks, dtype=torch.int32, device=topk_ids.device)
    device.sort_pairs[(experts + 1,)](
        topk_ids, expert_map, order, block_expert, pairs, blocks, experts, 0 if expert_map is None else expert_map.numel(),
        BINS=max(2, 1 << (experts - 1).bit_length()), BLOCK_M=block_m, CHUNK=1024, HAS_MAP=expert_map is not None, num_warps=4)
    return order, block_expert


def product(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, routing: tuple,
            n: int, pairs: int, c: Configuration, activation: str = "", pair_weights: torch.Tensor | None = None) -> torch.Tensor:
    """[pairs, n] of x's dtype, or fp32 [splits, pairs, n] where K is split; with an activation n counts what comes out of it.

    x: [pairs, k], or one row for as many pairs as divide `pairs`. w, scales, zeros: as `prepare` lays them out; routing: as
    `sort_pairs` gives it for c.block_m; pair_weights [pairs]: applied before the activation.
    """
    from foem_kernels import triton_moe_device as device
    experts, row_blocks, chunks, threads, size = w.shape
    (order, block_expert), k, n_padded, chunk = routing, x.shape[1], row_blocks * 64, size * 4
    group_size = k // scales.shape[1]
    assert x.is_contiguous() and w.is_contiguous() and chunks * chunk == k and threads == 128
    assert n <= n_padded // (2 if activation else 1) and pairs % x.shape[0] == 0
    assert n_padded % c.block_n == 0 and k % c.block_k == 0 and c.block_k % chunk == 0
    assert scales.shape == (experts, k // group_size, n_padded) and scales.is_contiguous()
    assert zeros is None or (zeros.shape == scales.shape and zeros.is_contiguous())
    assert c.scale == "end" if group_size == k else c.block_k == group_size or c.scale == "before" and group_size % c.block_k == 0
    split = c.splits > 1
    columns = n_padded if split and activation else n
    y = torch.empty((c.splits, pairs, columns) if split else (pairs, n), dtype=torch.float32 if split else x.dtype,
                    device=x.device)
    m_blocks, n_tiles = block_expert.numel(), n_padded // c.block_n
    weighted = pair_weights is not None
    device.grouped[(m_blocks * n_tiles, c.splits)](
        x, w, scales, zeros, pair_weights, order, block_expert, y, pairs, columns, n_padded, k, experts,
        -(-(k // c.block_k) // c.splits), m_blocks, n_tiles, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
        CHUNK=chunk, GROUP=0 if group_size == k else group_size, SCALE=c.scale, HAS_ZEROS=zeros is not None, WEIGHTED=weighted,
        PAIRS_PER_ROW=pairs // x.shape[0], ACTIVATION=activation, SPLIT=split, PLAIN=interpreted(), num_warps=c.num_warps,
        num_stages=c.num_stages)
    if not (split and activation):
        return y
    result = torch.empty((pairs, n), dtype=x.dtype, device=x.device)
    device.activate[(pairs, -(-n // 512))](y, pair_weights, result, pairs, n, n_padded, SPLITS=c.splits, WEIGHTED=weighted,
                                           ACTIVATION=activation, BLOCK=512, PLAIN=interpreted(), num_warps=4)
    return result


def _triton_moe(x: torch.Tensor, w13: torch.Tensor, scales13: torch.Tensor, zeros13: torch.Tensor | None,
                perm13: torch.Tensor | None, w2: torch.Tensor, scales2: torch.Tensor, zeros2: torch.Tensor | None,
                perm2: torch.Tensor | None, topk_ids: torch.Tensor, topk_weights: torch.Tensor, activation: str,
                apply_router_weight_on_input: bool, expert_map: torch.Tensor | None) -> torch.Tensor:
    from foem_kernels import triton_moe_device as device
    tokens, hidden = x.shape
    y = torch.empty_like(x)
    if not tokens:
        return y
    experts, pairs, top_k = w13.shape[0], topk_ids.numel(), topk_ids.shape[1]
    k13, k2 = (w.shape[2] * w.shape[4] * 4 for w in (w13, w2))
    # What is gathered may have more columns than h: then h keeps the rows that gate and up are padded by.
    inner = k2 if perm2 is None else w13.shape[1] * 32
    all_experts = experts if expert_map is None else expert_map.numel()
    capability, sms = _gpu(x.device.index) if x.is_cuda else ((9, 0), 132)
    first, second = (grouped_configuration(pairs, experts, all_experts, w.shape[1] * 64, k, k // scales.shape[1], capability, sms)
                     for w, k, scales in ((w13, k13, scales13), (w2, k2, scales2)))
    assert first.block_m == second.block_m
    routing = sort_pairs(topk_ids, expert_map, experts, first.block_m)

    def ordered(t, perm):
        if perm is None:
            return t
        k = perm.shape[1]
        gathered = torch.empty((pairs, k), dtype=t.dtype, device=t.device)
        device.gather_columns[(pairs, -(-k // 1024))](t, perm, topk_ids, expert_map, gathered, t.shape[1], k, experts,
                                                      all_experts, PAIRS_PER_ROW=pairs // t.shape[0], BLOCK=1024,
                                                      HAS_MAP=expert_map is not None, num_warps=4)
        return gathered

    h = product(ordered(x, perm13), w13, scales13, zeros13, routing, inner, pairs, first, activation,
                topk_weights if apply_router_weight_on_input else None)
    out = product(ordered(h, perm2), w2, scales2, zeros2, routing, hidden, pairs, second)
    device.combine[(tokens, -(-hidden // 512))](
        out, topk_weights, topk_ids, expert_map, y, pairs, hidden, experts, all_experts, TOP_K=top_k, SPLITS=second.splits,
        WEIGHTED=not apply_router_weight_on_input, HAS_MAP=expert_map is not None, BLOCK=512, PLAIN=interpreted(), num_warps=4)
    return y


def _triton_moe_fake(x, *_):
    return torch.empty_like(x)


_library = torch.library.Library("foem", "FRAGMENT")
_library.define("triton_moe(Tensor x, Tensor w13, Tensor scales13, Tensor? zeros13, Tensor? perm13, Tensor w2, Tensor scales2, "
                "Tensor? zeros2, Tensor? perm2, Tensor topk_ids, Tensor topk_weights, str activation, "
                "bool apply_router_weight_on_input, Tensor? expert_map) -> Tensor")
_library.impl("triton_moe", _triton_moe, "CUDA")
_library.impl("triton_moe", _triton_moe, "CPU")
torch.library.register_fake("foem::triton_moe", _triton_moe_fake, lib=_library)


def experts(x: torch.Tensor, w13: dict, w2: dict, topk_ids: torch.Tensor, topk_weights: torch.Tensor, activation: str = "silu",
            apply_router_weight_on_input: bool = False, expert_map: torch.Tensor | None = None) -> torch.Tensor:
    """The layer's output [T, hidden] of x's dtype; rows of x with Inf or NaN spoil no others.

    x [T, hidden] fp16 or bf16. w13: `prepare(gated=True)` of [E, 2 inner, hidden]; w2: `prepare` of [E, hidden, inner].
    topk_ids [T, k] integers; an id that is no expert's adds nothing. topk_weights [T, k] floating point; with
    apply_router_weight_on_input they multiply x instead of the result. expert_map: integers [experts of all ranks], each
    one's place among the E of this rank, or -1; the result is then this rank's part of the sum.
    Raises ValueError on an unknown activation and on shapes or dtypes that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; there are {', '.join(ACTIVATIONS)}")
    inner, hidden = w2["inputs"], w13["inputs"]
    if w13["n"] != 2 * inner or w2["n"] != hidden or w13["w"].shape[0] != w2["w"].shape[0]:
        raise ValueError(f"w13 is {[w13['w'].shape[0], w13['n'], hidden]}, w2 {[w2['w'].shape[0], w2['n'], inner]}; they must be "
                         "[E, 2 inner, hidden] and [E, hidden, inner]")
    if x.dtype not in (torch.float16, torch.bfloat16) or x.dim() != 2 or x.shape[1] != hidden:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, but these experts take float16 or bfloat16 [T, {hidden}]")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0] or not topk_ids.shape[1] or topk_weights.shape != topk_ids.shape:
        raise ValueError(f"topk_ids {list(topk_ids.shape)} and topk_weights {list(topk_weights.shape)} must both be "
                         f"[{x.shape[0]}, k], k at least 1")
    if topk_ids.dtype.is_floating_point or not topk_weights.dtype.is_floating_point:
        raise ValueError(f"topk_ids must be integers and topk_weights numbers, found {topk_ids.dtype} and {topk_weights.dtype}")
    return torch.ops.foem.triton_moe(
        x.contiguous(), w13["w"], w13["scales"], w13["zeros"], w13["perm"], w2["w"], w2["scales"], w2["zeros"], w2["perm"],
        topk_ids.contiguous(), topk_weights.contiguous(), activation, apply_router_weight_on_input,
        None if expert_map is None else expert_map.contiguous())
