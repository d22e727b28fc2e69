"""INT4 weights times few rows of fp16 or bf16 activations (M <= 32: decoding) in CUDA C++: plan, launch and the torch op.

Not measured on any GPU: it has compiled (no spills) and its C++ has computed right numbers under emulation on a CPU, no
more. So it must stand behind triton_w4a16 in the registry, which takes all that this one takes: where Triton is installed
only FOEM_KERNEL=cuda_w4a16 selects it, until a measured GPU shows it to be faster; if none does, it is to be removed.

The device code, cuda_w4a16.cu, is compiled when weights are prepared, for every number of rows, so that serving never
stops to compile. Weights are stored as triton_w4a16 stores them: one copy can serve both kernels. Larger M runs as several
launches of 32 rows, each of which reads all weights: right, but not what this kernel is for.

Results do not depend on timing. They depend on the number of multiprocessors (where K is cut) and, by the order of fp32
additions, on whether M is below 9, 17 or 25. The counters in the weights are zero between launches: one layer must not run
in two streams at once. On sm_90 a launch begins to read codes while the kernel ahead of it in the stream still runs
(programmatic dependent launch), so that kernel must not be the one that writes them.

Compiled by NVRTC 12.9 and 13.5 for sm_80 and sm_90, all 128 specializations each: no spills, at most 250 registers. On sm_90 a
warp executes 247 instructions for 64 x 64 codes with one column tile, 280 with two, 348 with four (group 128, symmetric).

Left out: wgmma (at N = 8 columns mma.sync moves no more data), clusters (132 multiprocessors do not divide into them),
groups of 16, taking -128 or -64 off after the product instead of off each weight (a quarter fewer instructions, but the
fp32 sums then cancel: rows of zero weights would not give zero), TMA descriptors, GPUs of several contexts in one process.
"""
from __future__ import annotations

import ctypes
import functools
import pathlib
from typing import NamedTuple

import torch

from foem_kernels import nvrtc
from foem_kernels.problem import Problem, gpu_refusal
from foem_kernels.triton_w4a16 import TritonW4A16

GROUPS = (32, 64, 128)
SOURCE = pathlib.Path(__file__).with_suffix(".cu")
THREADS = 256
RESERVED = 1024  # bytes of shared memory that the system takes from each thread block


class Device(NamedTuple):
    """What a plan depends on: compute capability, multiprocessors, bytes of shared memory for a block and in all of one SM."""
    capability: tuple[int, int]
    sms: int
    shared_block: int
    shared_sm: int


class Plan(NamedTuple):
    """How 8 * column_tiles rows of x are launched. shared: bytes; tile_n, tile_k: rows and columns of W in a block's step."""
    column_tiles: int
    stages: int
    blocks_per_sm: int
    shared: int
    tile_n: int
    tile_k: int

    def steps(self, n_padded: int, k: int) -> int:
        return -(-n_padded // self.tile_n) * -(-k // self.tile_k)

    def grid(self, n_padded: int, k: int, sms: int) -> int:
        """Thread blocks: as many as run at once, and none without a step."""
        return min(sms * self.blocks_per_sm, self.steps(n_padded, k))


def plan(column_tiles: int, group_size: int, zeros: bool, wide: bool, device: Device) -> Plan | None:
    """group_size 0: one per row. wide: fp32 scales. None where less than two stages fit.

    Two thread blocks per multiprocessor hide each other's ends, where 128 registers a thread are enough (with two column tiles
    they nearly are: 8 bytes spill). 8 stages keep 112 KB in flight per multiprocessor; 4.3 TB/s at an assumed latency of
    1 us on 132 multiprocessors need 33.
    """
    blocks = 2 if column_tiles <= 2 else 4
    tile_n, tile_k = 64 * blocks, 64 * (8 // blocks)
    groups = 1 if group_size == 0 else max(1, tile_k // group_size)
    stage = 32 * tile_k * blocks + 8 * column_tiles * (2 * tile_k + 16) + groups * tile_n * ((4 if wide else 2) + zeros)
    stage = -(-stage // 128) * 128
    fixed = 128 + 8 // blocks // 2 * 8 * column_tiles * (tile_n + 4) * 4
    for blocks_per_sm in (2, 1) if column_tiles == 1 else (1,):
        room = min(device.shared_block, device.shared_sm // blocks_per_sm - RESERVED)
        stages = min(8, (room - fixed) // stage)
        if stages >= 1 + blocks_per_sm:
            return Plan(column_tiles, stages, blocks_per_sm, fixed + stages * stage, tile_n, tile_k)
    return None


def definitions(c: Plan, bf16: bool, group_size: int, zeros: bool, wide: bool) -> dict[str, int]:
    """The macros that cuda_w4a16.cu is compiled with."""
    return {"IS_BF16": bf16, "IS_COLUMN_TILES": c.column_tiles, "IS_GROUP": group_size, "IS_ZEROS": zeros, "IS_WIDE": wide,
            "IS_STAGES": c.stages, "IS_SHARED": c.shared, "BLOCKS_PER_SM": c.blocks_per_sm}


class Arguments(ctypes.Structure):
    """`Arguments` of cuda_w4a16.cu."""
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "w", "scales", "zeros", "bias", "y", "partial", "counters")] + [
        (name, ctypes.c_int) for name in ("m", "n", "n_padded", "k")]


@functools.cache
def _device(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return Device((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin,
                  p.shared_memory_per_multiprocessor)


@functools.cache
def _kernels(index: int, dtype: torch.dtype, group_size: int, zeros: bool, wide: bool) -> tuple[tuple[Plan, nvrtc.Function], ...]:
    """For 1 .. 4 column tiles, as far as shared memory allows."""
    device, found = _device(index), []
    target, source = f"sm_{device.capability[0]}{device.capability[1]}", SOURCE.read_text("utf-8")
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()  # makes the context current that modules are loaded into
        for column_tiles in (1, 2, 3, 4):
            if c := plan(column_tiles, group_size, zeros, wide, device):
                cubin = nvrtc.compile(source, target, definitions(c, dtype == torch.bfloat16, group_size, zeros, wide))
                found.append((c, nvrtc.Function(cubin, "w4a16", c.shared, THREADS, device.capability >= (9, 0))))
    return tuple(found)


def launch(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bias: torch.Tensor | None,
           counters: torch.Tensor, n: int, group_size: int, kernels: tuple[tuple[Plan, nvrtc.Function], ...], sms: int,
           stream: int) -> torch.Tensor:
    """y [m, n] of x's dtype from x [m, k] by `kernels`, of 1, 2, ... column tiles; the rest as `prepare` lays it out."""
    (m, k), n_padded = x.shape, w.shape[0] * 64
    assert x.is_contiguous() and w.is_contiguous() and w.numel() == n_padded * k // 2 and n <= n_padded and n_padded % 128 == 0
    assert scales.shape == (k // group_size, n_padded) and scales.is_contiguous()
    assert scales.dtype in (torch.float16, torch.float32)
    assert zeros is None or (zeros.shape == scales.shape and zeros.is_contiguous() and zeros.dtype == torch.uint8)
    assert bias is None or (bias.shape == (n,) and bias.is_contiguous() and bias.dtype == x.dtype)
    assert counters.numel() * 128 >= n_padded and all(t.data_ptr() % 16 == 0 for t in (x, w, scales, zeros) if t is not None)
    y, widest = torch.empty((m, n), dtype=x.dtype, device=x.device), 8 * len(kernels)
    for begin in range(0, m, widest):
        rows = min(m - begin, widest)
        c, function = kernels[-(-rows // 8) - 1]
        grid = c.grid(n_padded, k, sms)
        assert grid * c.steps(n_padded, k) < 1 << 32
        partial = torch.empty((2 * grid, 8 * c.column_tiles, c.tile_n), dtype=torch.float32, device=x.device)
        tensors = (x[begin:], w, scales, zeros, bias, y[begin:], partial, counters)
        pointers = (None if t is None else t.data_ptr() for t in tensors)
        function.launch(grid, Arguments(*pointers, rows, n, n_padded, k), stream)
    return y


def _w4a16(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, perm: torch.Tensor | None,
           bias: torch.Tensor | None, counters: torch.Tensor, n: int, group_size: int) -> torch.Tensor:
    if perm is not None:
        x = x.index_select(1, perm)
    if x.data_ptr() % 16:
        x = x.clone()
    index, group = x.device.index, 0 if group_size == x.shape[1] else group_size
    with torch.cuda.device(index):
        kernels = _kernels(index, x.dtype, group, zeros is not None, scales.dtype == torch.float32)
        return launch(x, w, scales, zeros, bias, counters, n, group_size, kernels, _device(index).sms,
                      torch.cuda.current_stream().cuda_stream)


def _w4a16_fake(x, w, scales, zeros, perm, bias, counters, n, group_size):
    return x.new_empty(x.shape[0], n)


# Registered by hand, see triton_w4a16. The counters change only during a launch, so no mutation is declared.
_library = torch.library.Library("foem", "FRAGMENT")
_library.define("cuda_w4a16(Tensor x, Tensor w, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, Tensor counters, "
                "int n, int group_size) -> Tensor")
_library.impl("cuda_w4a16", _w4a16, "CUDA")
torch.library.register_fake("foem::cuda_w4a16", _w4a16_fake, lib=_library)


class CudaW4A16:
    name = "cuda_w4a16"

    def supports(self, p: Problem) -> str | None:
        if p.bits != 4:
            return f"takes 4-bit codes, not {p.bits}-bit"
        if p.dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 or bfloat16, not {p.dtype}"
        if p.group_size not in (*GROUPS, p.k):
            return f"takes groups of {', '.join(map(str, GROUPS))} or the whole row, not {p.group_size}"
        if p.k % p.group_size or p.k % 64:
            return f"needs K divisible by 64 and by the group size, found K={p.k}, group_size={p.group_size}"
        if reason := gpu_refusal(p.device):
            return reason
        return None if p.elsewhere or nvrtc.compiler() else "needs libnvrtc (nvidia-cuda-nvrtc) or nvcc, found neither"

    def prepare(self, codes, scales, zeros, g_idx, p):
        """As triton_w4a16, and counters int32 [n_padded / 128], all zero. Raises ValueError also on zeros above 63."""
        if zeros is not None and zeros.numel() and int(zeros.max()) > 63:  # 64 + zero must not leave the binade of 64 in fp16
            raise ValueError(f"{self.name}: zeros must be below 64, found {int(zeros.max())}; triton_w4a16 takes them")
        weights = TritonW4A16().prepare(codes, scales, zeros, g_idx, p)
        w, wide = weights["w"], weights["scales"].dtype == torch.float32
        weights["counters"] = torch.zeros(w.shape[0] // 2, dtype=torch.int32, device=w.device)
        if w.is_cuda:
            _kernels(w.device.index, p.dtype, 0 if p.group_size == p.k else p.group_size, zeros is not None, wide)
            torch.cuda.synchronize(w.device)  # a launch may read codes before the kernel ahead of it has ended
        return weights

    def size(self, p):
        return TritonW4A16().size(p) + 4 * -(-p.n // 128)

    def gemm(self, x, weights, p, bias):
        return torch.ops.foem.cuda_w4a16(x, weights["w"], weights["scales"], weights["zeros"], weights["perm"], bias,
                                         weights["counters"], p.n, p.group_size)
