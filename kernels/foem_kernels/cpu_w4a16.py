"""Quantized weights times fp32, fp16 or bf16 activations on CPUs: layout of the weights, and the torch op around cpu_w4a16.c.

One kernel for every M: a tile of up to 6 rows of x and 64 outputs takes the codes apart in registers, so that weights are
read once from memory while decoding and stay in the cache for prompts; nothing is dequantized into memory. Sums are float32.
Codes of 2 and 3 bits are stored in 4. Activations are used as they are, in bf16 dot products (AVX-512 BF16, exact products)
or float32 multiply-adds, unless FOEM_CPU_ACT=int8 asks for 8 bits a token's element (AVX-512 VNNI).

FOEM_CPU_ISA forces one of `native.INSTRUCTION_SETS`. AMX tiles are not used here.
"""

from __future__ import annotations

import os

import torch

from foem_kernels import native, pages
from foem_kernels.problem import Problem

BLOCK = 32  # outputs that are stored together
PAIR = 2 * BLOCK  # outputs that are computed together: their number is padded to it
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of the C enumeration


def stored_bits(bits: int) -> int:
    return 4 if bits <= 4 else 8


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes uint8 [N, K] -> int32 [2 ceil(N / 64), ceil(K * bits / 32), 32] as cpu_w4a16.c describes them; padded with zeros."""
    n, k = codes.shape
    per = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -k % per, 0, -n % PAIR))
    # Four codes at a time: with 4 bits, columns 0 .. 3 of a word lie in its even nibbles, 4 .. 7 in the odd ones.
    quads = codes.view(torch.int32).view(-1, BLOCK, codes.shape[1] // per, per // 4)
    words = quads[..., 0] | quads[..., 1] << 4 if bits == 4 else quads[..., 0]
    words = words.transpose(1, 2)
    return pages.empty(tuple(words.shape), torch.int32).copy_(words)


def blocked(values: torch.Tensor) -> torch.Tensor:
    """[N, G] -> float32 [2 ceil(N / 64), G, 32], padded with zeros."""
    values = torch.nn.functional.pad(values.float(), (0, 0, 0, -values.shape[0] % PAIR))
    return values.view(-1, BLOCK, values.shape[1]).transpose(1, 2).contiguous()


def int8_activations() -> bool:
    """FOEM_CPU_ACT; ValueError when it is unknown or this CPU has no kernel for it."""
    asked = os.environ.get("FOEM_CPU_ACT") or "exact"
    if asked not in ("exact", "int8"):
        raise ValueError(f"FOEM_CPU_ACT={asked}: choose exact or int8")
    if asked == "int8" and not native.library().foem_cpu_has_int8():
        raise ValueError("FOEM_CPU_ACT=int8 needs a CPU with AVX-512 VNNI; leave it away")
    return asked == "int8"


class CpuW4A16:
    name = "cpu_w4a16"

    def supports(self, p: Problem) -> str | None:
        per_word = 32 // stored_bits(p.bits)
        if p.device != "cpu":
            return f"runs on cpu, not {p.device}"
        if native.library() is None:
            return "was not compiled when foem-vllm was installed (no C compiler?); install one and reinstall"
        if p.bits not in (2, 3, 4, 8):
            return f"takes 2-, 3-, 4- and 8-bit codes, not {p.bits}-bit"
        if p.dtype not in DTYPES:
            return f"takes float32, float16 and bfloat16, not {p.dtype}"
        if p.group_size % per_word and p.groups > 1:
            return f"needs a group_size that {per_word} divides, or one group per row, not {p.group_size}"
        if p.act_order and p.k % p.group_size:
            return f"needs whole groups with act-order, but K={p.k} is not a multiple of group_size={p.group_size}"
        return None

    def prepare(self, codes, scales, zeros, g_idx, p):
        """See `Kernel.prepare`. Raises ValueError when an activation order gives some group too many columns."""
        order = None
        if g_idx is not None:
            if not bool((torch.bincount(g_idx.long(), minlength=p.groups) == p.group_size).all()):
                raise ValueError(f"g_idx does not give every group {p.group_size} columns; FOEM_KERNEL=reference computes it")
            order = torch.argsort(g_idx.long(), stable=True)  # sorted by group; x's columns follow in every call
            codes = codes[:, order]
        return {
            "weight": pack_words(codes, stored_bits(p.bits)),
            "scales": blocked(scales),
            "zeros": None if zeros is None else blocked(zeros),
            "order": None if order is None else order.int(),
            "isa": native.instruction_set(),
            "int8": int8_activations(),
        }

    def size(self, p):
        columns = -(-p.k * stored_bits(p.bits) // 32) + p.groups * (1 if p.symmetric else 2)
        return 4 * (-(-p.n // PAIR) * PAIR * columns + p.k * p.act_order)

    def gemm(self, x, weights, p, bias):
        return torch.ops.foem.cpu_w4a16(
            x, weights["weight"], weights["scales"], weights["zeros"], weights["order"], bias, p.n, stored_bits(p.bits),
            p.group_size, float(p.mid), weights["isa"], weights["int8"],
        )  # fmt: skip


def cpu_w4a16(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    bits: int,
    group_size: int,
    zero: float,
    isa: int,
    int8: bool,
) -> torch.Tensor:
    """x [M, K] -> [M, N] of x's dtype. Tensors as `CpuW4A16.prepare` lays them out; zero: of all groups when zeros is None."""
    x, (m, k) = x.contiguous(), x.shape
    y = x.new_empty(m, n)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if m and n:
        failed = native.library().foem_cpu_w4a16(
            x.data_ptr(), m, k, DTYPES.index(x.dtype), weight.data_ptr(), n, bits, group_size, scales.data_ptr(),
            native.pointer(zeros), zero, native.pointer(order), native.pointer(bias), y.data_ptr(), isa, int8,
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"cpu_w4a16: no memory for {m} rows of {k} activations")
    return y


# `Library` rather than `torch.library.custom_op`, whose Python layers cost more than the product of a small layer.
_library = torch.library.Library("foem", "FRAGMENT")
_library.define(
    "cpu_w4a16(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? order, Tensor? bias, int n, int bits, "
    "int group_size, float zero, int isa, bool int8) -> Tensor"
)
_library.impl("cpu_w4a16", cpu_w4a16, "CPU")
torch.library.register_fake("foem::cpu_w4a16", lambda x, weight, scales, zeros, order, bias, n, *_: x.new_empty(x.shape[0], n),
                            lib=_library)  # fmt: skip
