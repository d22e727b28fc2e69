"""2-, 3-, 4- and 8-bit weights times fp16 or bf16 activations on NVIDIA GPUs, in Triton: layout, configuration, torch op.

The product is transposed (y^T = W x^T) and the weights are stored in the order in which the matrix instruction wants its
register operand, so dequantized weights never pass through shared memory on sm_90 (checked in the PTX by the tests;
sm_100 takes them from tensor memory; sm_80 and sm_120 use mma.sync, where Triton 3.9 still converts the layout through
shared memory on sm_80). The device code is in triton_w4a16_device.py. Results do not depend on timing: split-K partial
sums are added in a fixed order by a second kernel, without atomics.

3-bit codes are stored in four bits: they are read as fast as 4-bit codes, not faster. Groups are the whole row or any
multiple of 16, best 32, 64 or a multiple of 128; with others the tiles of K are small. K and N are padded when the weights
are laid out, so neither has to be a multiple of anything.

Left out: 3-bit codes in three bits; groups that are no multiples of 16; AMD GPUs (the unpacking is PTX); tuning at run
time (`tuning` does it before). `configuration` rests on predictions; no time was measured.
"""
from __future__ import annotations

import functools
import importlib.util
import os

import torch

from foem_kernels import cost, tuning
from foem_kernels.cost import STORED, Configuration, padded
from foem_kernels.problem import Problem, gpu_refusal

MAX_SPLITS = 16


def bucket(m: int) -> int:
    """M rounded up to what configurations tell apart: 16, 32, 64, multiples of 128, from 1024 on of 1024, at most 8192."""
    if m <= 64:
        return 16 if m <= 16 else 32 if m <= 32 else 64
    step = 128 if m <= 1024 else 1024
    return min(-(-m // step) * step, 8192)


def candidates(m: int, n: int, k: int, group_size: int, capability: tuple[int, int] = (9, 0),
               bits: int = 4, sms: int = 132) -> list[Configuration]:
    """Every launch for x [m, k] and W [n, k] that is worth a thought; `tune` times them, `configuration` weighs them.

    block_m follows from m alone. The scale goes onto the fp32 sum of a tile while the M tile is small: it costs block_m
    multiplications per row and tile there, against block_k on the weights, and rounds nothing. With block_m 128 it goes
    onto the weights, so that the accumulators need not be drained after each tile. Tiles of 256 rows fit the registers only
    where wgmma keeps the sums of two 64-row blocks per warp group (sm_90). Each part of a split K keeps four tiles for the
    load pipeline. With block_m 128 x may come through a descriptor, and where tiles are more than the blocks that the GPU
    holds, those blocks may walk over them; not tiles of 64 rows, whose walk spills registers on sm_80, nor with 8 bits tiles
    of 256, whose walk with a descriptor spills on sm_90.
    """
    n_padded, unit, found = -(-n // 128) * 128, padded(k, group_size)[0], {}
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    limit = 128 if block_m <= 64 else 64
    block_k = next(size for size in (128, 64, 32, 16) if size <= limit and unit % size == 0)
    scale = "end" if group_size == k else "after" if block_m <= 64 else "before"
    num_stages = 4 if capability[0] == 9 or block_m <= 32 and bits < 8 else 3
    k_tiles = -(-k // block_k)
    for block_n in (256, 128, 64):
        if block_n == 256 and (capability[0] != 9 or n_padded % 256 or block_m < 64):
            continue
        num_warps = 4 if block_m <= 32 or block_n == 64 else 8
        for wanted in range(1, max(1, min(k_tiles // 4, MAX_SPLITS)) + 1):
            splits = -(-k_tiles // -(-k_tiles // wanted))  # no part of K is empty
            found[Configuration(block_m, block_n, block_k, splits, num_warps, num_stages, scale)] = None
        if block_m == 128 and (block_n == 128 or block_n == 256 and bits < 8):
            c = Configuration(block_m, block_n, block_k, 1, num_warps, num_stages, scale, programs=sms)
            held = sms * cost.per_sm(c, bits, cost.machine_of(capability, sms))
            if -(-m // block_m) * (n_padded // block_n) > held:
                found[c._replace(programs=held)] = None
    if capability[0] >= 9 and k % 8 == 0:
        found |= {c._replace(tma=True): None for c in found if block_m == 128 and c.splits == 1}
    return list(found)


@functools.lru_cache(maxsize=4096)
def configuration(m: int, n: int, k: int, group_size: int, capability: tuple[int, int] = (9, 0), sms: int = 132,
                  bits: int = 4) -> Configuration:
    """The candidate of least predicted time (cost.plan), on a GPU of that compute capability with `sms` multiprocessors.

    The prediction knows an H200's rates for each multiprocessor; on other GPUs it is the same ratios.
    """
    machine = cost.machine_of(capability, sms)
    m = bucket(m)

    def rank(c):
        plan = cost.plan(c, m, n, k, group_size, bits, machine)
        return plan.predicted, -min(plan.blocks, sms)  # of equals the one that leaves the fewest multiprocessors idle
    return min(candidates(m, n, k, group_size, capability, bits, sms), key=rank)


def chunk_of(k: int, group_size: int, bits: int = 4) -> int:
    """Columns per stored chunk: what one thread's 16-byte load spans (8-byte for 2 bits), less where groups are no multiples."""
    return next(size for size in (64, 32, 16) if padded(k, group_size)[0] % size == 0 and size * STORED[bits] <= 256)


def shuffle(codes: torch.Tensor, chunk: int, bits: int = 4) -> torch.Tensor:
    """codes uint8 [n, k] (n a multiple of 64, k of chunk) -> uint8 [n/64, k/chunk, 128 threads, bytes].

    A thread of a warp group finds its own fragment: rows (n_half) and columns (k_half, k_pair) of each 16 x 16 block as
    wgmma's operand A has them. The codes of a byte are 8 columns apart, with 2 bits also 8 rows; neighbouring bytes are
    neighbouring columns. bytes: chunk / 4 with 3 or 4 bits, chunk / 8 with 2, chunk / 2 with 8.
    """
    n, k = codes.shape
    #                   block    n_warp n_half n_lane k_chunk    k_block     k_half k_lane k_pair
    t = codes.reshape(n // 64, 4, 2, 8, k // chunk, chunk // 16, 2, 4, 2)
    if STORED[bits] == 8:
        t = t.permute(0, 4, 1, 3, 7, 5, 2, 6, 8)
    elif STORED[bits] == 4:
        t = t.permute(0, 4, 1, 3, 7, 5, 2, 8, 6)
        t = t[..., 0] | t[..., 1] << 4
    else:
        t = t.permute(0, 4, 1, 3, 7, 5, 8, 2, 6)
        t = t[..., 0, 0] | t[..., 0, 1] << 2 | t[..., 1, 0] << 4 | t[..., 1, 1] << 6
    return t.reshape(n // 64, k // chunk, 128, chunk * STORED[bits] // 16).contiguous()


def unpack_asm(shifts: tuple[int, ...], mask: int, exponent: int) -> str:
    """PTX that makes 16-bit floats of the codes in four bytes, without converting integers.

    Each of `shifts` (right; negative: left) brings one code of every byte under `mask`; the code becomes the lower byte of
    a number whose upper byte is `exponent`. Operands: two registers of two numbers for each shift, then the four bytes.
    """
    source = f"${2 * len(shifts)}"
    lines = []
    for i, shift in enumerate(shifts):
        moved = f"{'shr' if shift > 0 else 'shl'}.b32 t, {source}, {abs(shift)};" if shift else ""
        masked = f"and.b32 t, {'t' if shift else source}, {mask * 0x01010101:#x};"
        lines += [moved, masked] + [f"prmt.b32 ${2 * i + half}, t, {exponent * 0x01010101:#x}, {select};"
                                    for half, select in enumerate(("0x4140", "0x4342"))]
    return "{ .reg .b32 t; " + " ".join(filter(None, lines)) + " }"


def interpreted() -> bool:
    """Whether Triton runs on its interpreter (TRITON_INTERPRET=1, set before triton is imported): then on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _gpu(index: int) -> tuple[tuple[int, int], int]:
    return torch.cuda.get_device_capability(index), torch.cuda.get_device_properties(index).multi_processor_count


def most_registers(capability: tuple[int, int]) -> int | None:
    """What a thread may use. But for sm_90 ptxas, left alone, spills a few registers of some forms to run more blocks."""
    return None if capability[0] == 9 else 255


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def descriptor(x: torch.Tensor, c: Configuration):
    """x [m, k], contiguous, as a tensor descriptor with blocks [c.block_m, c.block_k]: a parameter of the launch, so a CUDA
    graph keeps it. It needs k to be a multiple of 8, and x at a multiple of 16 bytes: one that is not is copied."""
    from triton.tools.tensor_descriptor import TensorDescriptor
    x = x.clone() if x.data_ptr() % 16 else x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [c.block_m, c.block_k])


def launch(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bias: torch.Tensor | None, n: int,
           group_size: int, c: Configuration, bits: int = 4) -> torch.Tensor:
    """y [m, n] of x's dtype from x [m, k], with exactly the configuration `c`; the other tensors as `prepare` lays them out."""
    from foem_kernels import triton_w4a16_device as device
    m, k = x.shape
    n_padded, chunk = w.shape[0] * 64, w.shape[3] * 16 // STORED[bits]
    unit, k_padded = padded(k, group_size)
    assert x.is_contiguous() and w.is_contiguous() and w.shape[1] * chunk == k_padded and w.shape[2] == 128 and n <= n_padded
    assert n_padded % c.block_n == 0 and unit % c.block_k == 0 and c.block_k % chunk == 0
    assert scales.shape == (k_padded // unit, n_padded) and scales.is_contiguous()
    assert zeros is None or (zeros.shape == scales.shape and zeros.is_contiguous())
    assert bias is None or (bias.shape == (n,) and bias.is_contiguous())
    assert (c.scale == "end") == (group_size == k)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if not m:
        return y
    out = torch.empty((c.splits, m, n), dtype=torch.float32, device=x.device) if c.splits > 1 else y
    limit = most_registers(_gpu(x.device.index)[0]) if x.is_cuda else None
    m_tiles, n_tiles, k_tiles = -(-m // c.block_m), n_padded // c.block_n, -(-k // c.block_k)
    assert (c.splits - 1) * -(-k_tiles // c.splits) < k_tiles, f"{c} leaves a part of K={k} empty"
    items = m_tiles * n_tiles * c.splits
    if c.tma:
        x = descriptor(x, c)
    device.w4a16[(min(items, c.programs or items),)](
        x, w, scales, zeros, bias, out, m, n, n_padded, k, k_padded, -(-k_tiles // c.splits), m_tiles, n_tiles, items,
        BITS=bits, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, CHUNK=chunk,
        GROUP=0 if group_size == k else group_size, SCALE=c.scale, HAS_ZEROS=zeros is not None, HAS_BIAS=bias is not None,
        TAIL=k % c.block_k > 0, SPLIT=c.splits > 1, TMA=c.tma, PERSISTENT=c.programs > 0,
        PLAIN=interpreted(), num_warps=c.num_warps, num_stages=c.num_stages, maxnreg=limit)
    if c.splits > 1:
        device.reduce_splits[(-(-m * n // 512),)](out, bias, y, m, n, SPLITS=c.splits, HAS_BIAS=bias is not None, BLOCK=512,
                                                  PLAIN=interpreted(), num_warps=4)
    return y


def _w4a16(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, perm: torch.Tensor | None,
           bias: torch.Tensor | None, n: int, group_size: int, bits: int = 4) -> torch.Tensor:
    if perm is not None:
        x = x.index_select(1, perm)
    (m, k), c = x.shape, None
    capability, sms = _gpu(x.device.index) if x.is_cuda else ((9, 0), 132)
    if x.is_cuda:
        c = tuning.table(_name(x.device.index)).get((bucket(m), n, k, group_size, bits))
    c = c or configuration(bucket(m), n, k, group_size, capability, sms, bits)
    return launch(x, w, scales, zeros, bias, n, group_size, c, bits)


def _w4a16_fake(x, w, scales, zeros, perm, bias, n, group_size, bits=4):
    return x.new_empty(x.shape[0], n)


# An op of its own, so that torch.compile does not trace into the launch. Registered by hand instead of by custom_op:
# dispatch costs less, and at M = 1 outside CUDA graphs that is what one waits for.
_library = torch.library.Library("foem", "FRAGMENT")
_library.define("triton_w4a16(Tensor x, Tensor w, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, int n, "
                "int group_size, int bits=4) -> Tensor")
_library.impl("triton_w4a16", _w4a16, "CUDA")
_library.impl("triton_w4a16", _w4a16, "CPU")
torch.library.register_fake("foem::triton_w4a16", _w4a16_fake, lib=_library)


class TritonW4A16:
    name = "triton_w4a16"

    def supports(self, p: Problem) -> str | None:
        if p.bits not in STORED:
            return f"takes codes of {', '.join(map(str, STORED))} bits, not {p.bits}"
        if p.dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 or bfloat16, not {p.dtype}"
        if p.group_size != p.k and p.group_size % 16:
            return f"takes groups that are the whole row or a multiple of 16, not {p.group_size}"
        if not p.elsewhere and importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not p.elsewhere and interpreted():
            return None if p.device == "cpu" else f"TRITON_INTERPRET=1 runs on the CPU, not on {p.device}"
        return gpu_refusal(p.device)

    def prepare(self, codes, scales, zeros, g_idx, p):
        """w as `shuffle` gives it, rows padded to a multiple of 128 by zero scales, columns to whole groups of 16; scales fp16
        where that is exact, else fp32 [groups, n_padded]; zeros uint8 alike or None; perm int64 [k] or None: the order that
        makes groups contiguous. Raises ValueError where g_idx gives a group too many or too few columns, and on zeros that
        are no integers 0 .. 255."""
        perm = None
        if g_idx is not None:
            sizes = torch.bincount(g_idx.long(), minlength=p.groups)
            wanted = torch.full_like(sizes, p.group_size)
            wanted[-1] = p.k - (p.groups - 1) * p.group_size
            if not torch.equal(sizes, wanted):
                raise ValueError(f"{self.name}: g_idx gives groups {int(sizes.min())} to {int(sizes.max())} columns, but each "
                                 f"needs {p.group_size}; FOEM_KERNEL=reference computes it")
            perm = torch.argsort(g_idx.long(), stable=True)
            codes = codes[:, perm]
        rows, columns = -p.n % 128, padded(p.k, p.group_size)[1] - p.k
        half = scales.to(torch.float16)
        scales = half if torch.equal(half.to(scales.dtype), scales) else scales.float()
        if zeros is not None:
            given, zeros = zeros, zeros.to(torch.uint8)
            if not torch.equal(zeros.to(given.dtype), given):
                raise ValueError(f"{self.name}: zeros must be integers 0 .. 255, found {given.min()} to {given.max()}")

        def pad(t, columns=0):
            return torch.nn.functional.pad(t, (0, columns, 0, rows))
        w = shuffle(pad(codes, columns), chunk_of(p.k, p.group_size, p.bits), p.bits)
        return {"w": w, "scales": pad(scales).T.contiguous(),
                "zeros": None if zeros is None else pad(zeros).T.contiguous(), "perm": perm}

    def size(self, p):
        (unit, columns), rows = padded(p.k, p.group_size), -(-p.n // 128) * 128
        return rows * (columns * STORED[p.bits] // 8 + columns // unit * (2 if p.symmetric else 3)) + 8 * p.k * p.act_order

    def gemm(self, x, weights, p, bias):
        return torch.ops.foem.triton_w4a16(x, weights["w"], weights["scales"], weights["zeros"], weights["perm"], bias, p.n,
                                           p.group_size, p.bits)
