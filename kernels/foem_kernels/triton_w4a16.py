"""INT4 weights times fp16 or bf16 activations on NVIDIA GPUs, in Triton: layout, launch configuration and the torch op.

The product is transposed (y^T = W x^T) and the weights are stored in the order in which the matrix instruction wants its
register operand, so dequantized weights never pass through shared memory on sm_90 (checked in the PTX by the tests;
sm_100 takes them from tensor memory; sm_80 and sm_120 use mma.sync, where Triton 3.9 still converts the layout through
shared memory on sm_80). The device code is in triton_w4a16_device.py. Results do not depend on timing: split-K partial
sums are added in a fixed order by a second kernel, without atomics.

Left out: 2-, 3- and 8-bit codes; groups that are neither 16, 32, 64, 128 nor the whole row; AMD GPUs (the unpacking is
PTX); tuning at run time. `configuration` was chosen from registers, instruction counts and byte counts of compiled
kernels; no time was measured.
"""
from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from foem_kernels.problem import Problem

GROUPS = (16, 32, 64, 128)
MAX_SPLITS = 16


class Configuration(NamedTuple):
    """One launch. scale: "after" (fp32 sum of a group), "before" (each weight), "end" (one group per row)."""
    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int
    scale: str


def configuration(m: int, n: int, k: int, group_size: int, capability: tuple[int, int] = (9, 0), sms: int = 132) -> Configuration:
    """The launch for x [m, k] and W [n, k] on a GPU of that compute capability with `sms` multiprocessors.

    The scale goes onto the fp32 sum of a group while the M tile is small: it costs block_m multiplications per row and
    group there, against group_size on the weights, and rounds nothing. From block_m 128 on it goes onto the weights, so
    that the accumulators need not be drained after each group. Wide N tiles, because every N tile reads x again (from L2).
    Tiles of 256 rows fit the registers only where wgmma keeps the sums of two 64-row blocks per warp group (sm_90).
    """
    n_padded = -(-n // 128) * 128
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    wide = capability[0] == 9 and n_padded % 256 == 0 and block_m >= 64
    block_n = 256 if wide else 128
    num_warps = 4 if block_m <= 32 else 8
    num_stages = 4 if capability[0] == 9 or block_m <= 32 else 3
    limit = 128 if block_m <= 64 else 64
    if group_size == k:
        scale, block_k = "end", next(size for size in (128, 64, 32, 16) if size <= limit and k % size == 0)
    else:
        scale, block_k = "after" if block_m <= 64 else "before", min(group_size, limit)
    tiles, k_tiles = -(-m // block_m) * (n_padded // block_n), k // block_k
    per_sm = {16: 3, 32: 2}.get(block_m, 1)
    # Fewer tiles than the GPU runs at once: split K, while each part keeps four tiles for the load pipeline and the
    # partial sums (8 bytes written and read per output) stay below the bytes of the weights.
    splits = max(1, min(sms * per_sm // tiles, k_tiles // 4, k // (16 * m), MAX_SPLITS))
    splits = -(-k_tiles // -(-k_tiles // splits))
    return Configuration(block_m, block_n, block_k, splits, num_warps, num_stages, scale)


def chunk_of(k: int, group_size: int) -> int:
    """Columns per stored chunk: what one thread's 16-byte load spans, less where groups or K are not multiples of 64."""
    unit = group_size if group_size != k else k
    return next(size for size in (64, 32, 16) if unit % size == 0)


def shuffle(codes: torch.Tensor, chunk: int) -> torch.Tensor:
    """codes uint8 [n, k] (n a multiple of 64, k of chunk) -> uint8 [n/64, k/chunk, 128 threads, chunk/4 bytes].

    A thread of a warp group finds its own fragment: rows (n_half) and columns (k_half, k_pair) of each 16 x 16 block as
    wgmma's operand A has them; the two codes of a byte are 8 columns apart, neighbouring bytes are neighbouring columns.
    """
    n, k = codes.shape
    #                   block    n_warp n_half n_lane k_chunk    k_block     k_half k_lane k_pair
    t = codes.reshape(n // 64, 4, 2, 8, k // chunk, chunk // 16, 2, 4, 2).permute(0, 4, 1, 3, 7, 5, 2, 8, 6)
    return (t[..., 0] | t[..., 1] << 4).reshape(n // 64, k // chunk, 128, chunk // 4).contiguous()


def interpreted() -> bool:
    """Whether Triton runs on its interpreter (TRITON_INTERPRET=1, set before triton is imported): then on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _gpu(index: int) -> tuple[tuple[int, int], int]:
    return torch.cuda.get_device_capability(index), torch.cuda.get_device_properties(index).multi_processor_count


def launch(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bias: torch.Tensor | None, n: int,
           group_size: int, c: Configuration) -> torch.Tensor:
    """y [m, n] of x's dtype from x [m, k], with exactly the configuration `c`; the other tensors as `prepare` lays them out."""
    from foem_kernels import triton_w4a16_device as device
    m, k = x.shape
    n_padded, chunk = w.shape[0] * 64, w.shape[3] * 4
    assert x.is_contiguous() and w.is_contiguous() and w.shape[1] * chunk == k and w.shape[2] == 128 and n <= n_padded
    assert n_padded % c.block_n == 0 and k % c.block_k == 0 and c.block_k % chunk == 0
    assert scales.shape == (k // group_size, n_padded) and scales.is_contiguous()
    assert zeros is None or (zeros.shape == scales.shape and zeros.is_contiguous())
    assert bias is None or (bias.shape == (n,) and bias.is_contiguous())
    assert c.scale == "end" if group_size == k else c.block_k == group_size or c.scale == "before" and group_size % c.block_k == 0
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    out = torch.empty((c.splits, m, n), dtype=torch.float32, device=x.device) if c.splits > 1 else y
    m_tiles, n_tiles = -(-m // c.block_m), n_padded // c.block_n
    device.w4a16[(m_tiles * n_tiles, c.splits)](
        x, w, scales, zeros, bias, out, m, n, n_padded, k, -(-(k // c.block_k) // c.splits), m_tiles, n_tiles,
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, CHUNK=chunk, GROUP=0 if group_size == k else group_size,
        SCALE=c.scale, HAS_ZEROS=zeros is not None, HAS_BIAS=bias is not None, SPLIT=c.splits > 1, PLAIN=interpreted(),
        num_warps=c.num_warps, num_stages=c.num_stages)
    if c.splits > 1:
        device.reduce_splits[(-(-m * n // 512),)](out, bias, y, m, n, SPLITS=c.splits, HAS_BIAS=bias is not None, BLOCK=512,
                                                  PLAIN=interpreted(), num_warps=4)
    return y


def _w4a16(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, perm: torch.Tensor | None,
           bias: torch.Tensor | None, n: int, group_size: int) -> torch.Tensor:
    if perm is not None:
        x = x.index_select(1, perm)
    capability, sms = _gpu(x.device.index) if x.is_cuda else ((9, 0), 132)
    return launch(x, w, scales, zeros, bias, n, group_size, configuration(x.shape[0], n, x.shape[1], group_size, capability, sms))


def _w4a16_fake(x, w, scales, zeros, perm, bias, n, group_size):
    return x.new_empty(x.shape[0], n)


# An op of its own, so that torch.compile does not trace into the launch. Registered by hand instead of by custom_op:
# dispatch costs less, and at M = 1 outside CUDA graphs that is what one waits for.
_library = torch.library.Library("foem", "FRAGMENT")
_library.define("triton_w4a16(Tensor x, Tensor w, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, int n, "
                "int group_size) -> Tensor")
_library.impl("triton_w4a16", _w4a16, "CUDA")
_library.impl("triton_w4a16", _w4a16, "CPU")
torch.library.register_fake("foem::triton_w4a16", _w4a16_fake, lib=_library)


class TritonW4A16:
    name = "triton_w4a16"

    def supports(self, p: Problem) -> str | None:
        if p.bits != 4:
            return f"takes 4-bit codes, not {p.bits}-bit"
        if p.dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 or bfloat16, not {p.dtype}"
        if p.group_size not in (*GROUPS, p.k):
            return f"takes groups of {', '.join(map(str, GROUPS))} or the whole row, not {p.group_size}"
        if p.k % p.group_size or p.k % 16:
            return f"needs K divisible by 16 and by the group size, found K={p.k}, group_size={p.group_size}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if interpreted():
            return None if p.device == "cpu" else f"TRITON_INTERPRET=1 runs on the CPU, not on {p.device}"
        if p.device != "cuda":
            return f"needs a CUDA device, not {p.device}"
        if not torch.cuda.is_available() or torch.version.hip:
            return "no NVIDIA GPU is visible"
        major, minor = torch.cuda.get_device_capability()
        return None if major >= 8 else f"needs compute capability 8.0, found {major}.{minor}"

    def prepare(self, codes, scales, zeros, g_idx, p):
        """w as `shuffle` gives it, rows padded to a multiple of 128 by zero scales; scales fp16 where that is exact, else
        fp32 [groups, n_padded]; zeros uint8 alike or None; perm int64 [k] or None: the order that makes groups contiguous."""
        perm = None
        if g_idx is not None:
            sizes = torch.bincount(g_idx.long(), minlength=p.groups)
            if (sizes != p.group_size).any():
                raise ValueError(f"{self.name}: g_idx gives groups {int(sizes.min())} to {int(sizes.max())} columns, but each "
                                 f"needs {p.group_size}; FOEM_KERNEL=reference computes it")
            perm = torch.argsort(g_idx.long(), stable=True)
            codes = codes[:, perm]
        rows = -p.n % 128
        half = scales.to(torch.float16)
        scales = half if torch.equal(half.to(scales.dtype), scales) else scales.float()

        def pad(t):
            return torch.nn.functional.pad(t, (0, 0, 0, rows))
        return {"w": shuffle(pad(codes), chunk_of(p.k, p.group_size)), "scales": pad(scales).T.contiguous(), "perm": perm,
                "zeros": None if zeros is None else pad(zeros.to(torch.uint8)).T.contiguous()}

    def gemm(self, x, weights, p, bias):
        return torch.ops.foem.triton_w4a16(x, weights["w"], weights["scales"], weights["zeros"], weights["perm"], bias, p.n,
                                           p.group_size)
