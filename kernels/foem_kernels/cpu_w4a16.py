"""4-bit products on x86 CPUs, built on two operators that exist already; the weight is stored once, in one of their layouts.

========= ============================================ ===================================== ===========================
layout    operator                                     takes                                 rounds, besides the result
========= ============================================ ===================================== ===========================
tinygemm  torch `_weight_int4pack_mm_for_cpu`          bf16; N % 16 == 0, group % 32 == 0    scale, (8 - zero) * scale
wna16     vLLM `_C.cpu_gemm_wna16`, only where vLLM    fp16, bf16; N % 32 == 0, K % 32 == 0, scale (bf16 only), then each
          has registered it in this process            group % 2 == 0                        dequantized weight
========= ============================================ ===================================== ===========================

Both add up in fp32. Measured against float64 (4096 x 4096, group 128, normal x): tinygemm 2.25e-3 relative in bf16,
wna16 2.70e-3 in bf16 and 2.8e-4 in fp16; a dense bf16 product of correctly rounded weights has 2.32e-3, in fp16 2.8e-4.

Choice (`layout`): bf16 takes tinygemm where it fits, otherwise wna16; fp16 takes wna16. M is not known when weights are laid
out, and keeping both layouts would double the memory that 4 bits are meant to save, so decoding (small M) decides:

bf16, 4096 x 4096, group 128, milliseconds
======= ====== ====== ====== ====== ====== ==============================================
M            1      4     16     64    256
======= ====== ====== ====== ====== ====== ==============================================
tinygemm  0.83   1.52   6.29   47.2    241 one Zen 4 core (AVX-512 BF16)
wna16     2.45   3.51   7.63   48.3    224
dense     2.70   2.46   4.48   23.4   63.4
tinygemm  0.65   1.25   5.05   34.1    128 two cores (AVX-512 VNNI), another run
wna16     2.55   3.66   7.52   24.4   84.4
dense     2.20   10.1   19.5   50.8    187
======= ====== ====== ====== ====== ====== ==============================================

wna16 in fp16 takes what it takes in bf16; tinygemm's fp16 and fp32 forms are scalar loops (32 ms at M = 1, 8.4 s at M = 256).
With BF16 instructions (first block) a dense product is faster from M = 64 on: dequantizing whole weights for
long prompts would pay there and is left undone, because tinygemm's layout is private to torch.

Left out: 8 bits and fp32 (no vectorized operator with group scales; the reference serves them), vLLM's AMX form (it rounds
activations to int8), and CPUs without AVX2, where tinygemm is a scalar loop too.
"""
from __future__ import annotations

import torch

from foem_kernels.problem import Problem

# What tinygemm accepts as a group; a larger group is stored as several equal ones, which costs 4 bytes per 256 codes.
TINYGEMM_GROUPS = (256, 128, 64, 32)


def tinygemm_group(group_size: int) -> int | None:
    """The largest group of tinygemm that divides `group_size`, or None."""
    return next((g for g in TINYGEMM_GROUPS if group_size % g == 0), None)


def has_wna16() -> bool:
    """Whether vLLM's CPU extension is loaded in this process. Never loads it: this package does not know vLLM."""
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def layout(p: Problem) -> tuple[str | None, str]:
    """("tinygemm" | "wna16", "") or (None, the reason why neither operator computes `p`)."""
    if p.device != "cpu":
        return None, f"runs on cpu, not {p.device}"
    if p.bits != 4:
        return None, f"takes 4-bit codes, not {p.bits}-bit"
    if p.k % p.group_size:
        return None, f"needs whole groups, but K={p.k} is not a multiple of group_size={p.group_size}"
    reasons = []
    if p.dtype != torch.bfloat16:
        reasons.append(f"torch's int4 operator is fast in bfloat16 only, not {p.dtype}")
    elif torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        reasons.append("torch's int4 operator needs AVX2 or AVX-512")
    elif p.n % 16 or tinygemm_group(p.group_size) is None:
        reasons.append(f"torch's int4 operator needs N % 16 == 0 and group_size % 32 == 0, found {p.n} and {p.group_size}")
    else:
        return "tinygemm", ""
    if p.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"vLLM's int4 operator takes float16 and bfloat16, not {p.dtype}")
    elif p.n % 32 or p.k % 32 or p.group_size % 2:
        reasons.append(f"vLLM's int4 operator needs N and K multiples of 32 and an even group_size, found "
                       f"{p.n}, {p.k}, {p.group_size}")
    elif not has_wna16():
        reasons.append("vLLM's int4 operator is not loaded in this process")
    else:
        return "wna16", ""
    return None, "; ".join(reasons)


def int4_words(nibbles: torch.Tensor) -> torch.Tensor:
    """[..., 8] codes below 16 -> [...] int32, the first code in the low bits."""
    words = torch.zeros(nibbles.shape[:-1], dtype=torch.int64, device=nibbles.device)
    for i in range(8):
        words |= nibbles[..., i].long() << (4 * i)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


class CpuW4A16:
    name = "cpu_w4a16"

    def supports(self, p: Problem) -> str | None:
        return layout(p)[1] or None

    def prepare(self, codes, scales, zeros, g_idx, p):
        """See `Kernel.prepare`. Raises ValueError when an activation order gives some group too many columns."""
        order = None
        if g_idx is not None:
            if not bool((torch.bincount(g_idx.long(), minlength=p.groups) == p.group_size).all()):
                raise ValueError(f"g_idx does not give every group {p.group_size} columns; FOEM_KERNEL=reference computes it")
            # Sorted by group, columns are where both operators expect them; x's columns follow in every call.
            order = torch.argsort(g_idx.long(), stable=True)
            codes = codes[:, order]
        prepared = {"order": order}
        if layout(p)[0] == "tinygemm":
            group = tinygemm_group(p.group_size)
            offset = torch.zeros_like(scales, dtype=torch.float32) if zeros is None else (8.0 - zeros.float()) * scales.float()
            both = torch.stack([scales.float().T, offset.T], -1).repeat_interleave(p.group_size // group, 0)
            return {**prepared, "group": group, "zeros": None, "scales": both.to(p.dtype).contiguous(),
                    "weight": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)}
        # Blocks of 16 outputs, each [K, 16] nibbles; zeros [G, N] nibbles.
        blocks = int4_words(codes.T.reshape(p.k, p.n // 16, 2, 8)).permute(1, 0, 2).reshape(p.n // 16, -1)
        return {**prepared, "group": 0, "weight": blocks.contiguous(), "scales": scales.T.to(p.dtype).contiguous(),
                "zeros": None if zeros is None else int4_words(zeros.T.reshape(p.groups, p.n // 8, 8)).contiguous()}

    def gemm(self, x, weights, p, bias):
        return torch.ops.foem.cpu_w4a16(x, weights["weight"], weights["scales"], weights["zeros"], weights["order"], bias,
                                        weights["group"], p.n)


def cpu_w4a16(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
              order: torch.Tensor | None, bias: torch.Tensor | None, group: int, n: int) -> torch.Tensor:
    """x [m, k] -> [m, n]. weight, scales, zeros, order as `CpuW4A16.prepare` lays them out; group 0 says "wna16"."""
    if order is not None:
        x = x.index_select(1, order)
    if group:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group, scales)
        return y if bias is None else y.add_(bias)
    y = x.new_empty(x.shape[0], n)
    torch.ops._C.cpu_gemm_wna16(x, weight, y, scales, zeros, bias, 8, "vec")
    return y


# An operator of our own: torch.compile must neither trace into wna16, which writes to its argument, nor split the graph.
# `Library` rather than `torch.library.custom_op`, whose Python layers cost more than the product of a small layer.
_library = torch.library.Library("foem", "FRAGMENT")
_library.define("cpu_w4a16(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? order, Tensor? bias, int group, int n)"
                " -> Tensor")
_library.impl("cpu_w4a16", cpu_w4a16, "CPU")
torch.library.register_fake("foem::cpu_w4a16", lambda x, weight, scales, zeros, order, bias, group, n: x.new_empty(x.shape[0], n),
                            lib=_library)
