"""What a launch of triton_w4a16 costs on paper: floor, thread blocks, waves, bytes in flight, predicted time. Needs no GPU.

`triton_w4a16.configuration` takes the launch with the least predicted time, so this file is also the heuristic. Only the
memory and matrix rates of the H200 were measured (elsewhere, not by this code); the other fields of `Machine` are
assumptions, so predictions rank launches and are no promise of speed. Times are microseconds.

A block that computes one tile waits for its first loads with nothing to multiply; that is charged once for each wave, even
where two blocks share a multiprocessor, because blocks of a wave start together. Blocks that walk over tiles wait once, but
their round is longer (WALK); its extra instructions are charged as if nothing hid them, so that walking is chosen only where
it wins even then. A partial last wave costs both the same: the busiest multiprocessor decides.

Left out: the instructions that dequantize (they run beside loads and products, or not: only a GPU can tell), those that a
tensor descriptor spares, storing y (as many bytes in every launch), contention between L2 slices, clocks that fall under
load, start-up of the kernel itself.
"""
from __future__ import annotations

import math
from typing import NamedTuple

STORED = {2: 2, 3: 4, 4: 4, 8: 8}  # bits of a code -> bits it takes in memory
# Qwen3-8B, Llama-3-8B, Qwen3-0.6B and a square for comparison with public tables: (N, K).
SHAPES = {"Qwen3-8B qkv": (6144, 4096), "Qwen3-8B o": (4096, 4096), "Qwen3-8B gate_up": (24576, 4096),
          "Qwen3-8B down": (4096, 12288), "Llama-3-8B gate_up": (28672, 4096), "Llama-3-8B down": (4096, 14336),
          "Qwen3-0.6B qkv": (4096, 1024), "Qwen3-0.6B o": (1024, 2048), "Qwen3-0.6B gate_up": (6144, 1024),
          "Qwen3-0.6B down": (1024, 3072), "8192": (8192, 8192)}

# (block_m, block_n) -> registers of a thread with codes below 8 bits, and with 8 bits.
REGISTERS = {(16, 64): (80, 80), (16, 128): (128, 184), (32, 64): (128, 128), (32, 128): (208, 255), (64, 64): (152, 168),
             (64, 128): (152, 168), (64, 256): (255, 255), (128, 64): (160, 160), (128, 128): (128, 128), (128, 256): (224, 240)}
# The same for thread blocks that walk over tiles of y, and the instructions that this adds to a warp's round on sm_90.
WALKING_REGISTERS = {(128, 128): (168, 184), (128, 256): (255, 255)}
WALK = {(128, 128): 46, (128, 256): 30}


class Configuration(NamedTuple):
    """One launch. scale: "after" (fp32 sum of a tile), "before" (each weight), "end" (one group per row). programs: 0 for a
    thread block to each tile of y and part of K, else at most so many blocks, which walk over them. tma: x through a tensor
    descriptor (sm_90 and up; K a multiple of 8)."""
    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int
    scale: str
    programs: int = 0
    tma: bool = False


class Machine(NamedTuple):
    """A GPU. Rates per microsecond: bytes from memory, bytes through L2, multiply-adds counted as two operations.

    The defaults are an H200; l2, latency, launch and clock (cycles) are assumptions. shared: bytes that the blocks of one
    multiprocessor have.
    """
    sms: int = 132
    memory: float = 4.3e6
    flops: float = 790e6
    l2: float = 8.6e6
    latency: float = 0.8
    launch: float = 1.0
    clock: float = 1750
    shared: int = 227 * 1024
    registers: int = 65536


H200 = Machine()


def machine_of(capability: tuple[int, int], sms: int) -> Machine:
    """A GPU of that compute capability with `sms` multiprocessors, each with the rates of an H200's: the same ratios."""
    share = sms / H200.sms
    shared = {(8, 0): 164, (9, 0): 227, (10, 0): 227, (10, 3): 227}.get(capability, 100) * 1024
    return Machine(sms, H200.memory * share, H200.flops * share, H200.l2 * share, shared=shared)


class Plan(NamedTuple):
    """What a configuration does with a product. per_sm: thread blocks that fit a multiprocessor at once; waves: tiles of y
    times parts of K, over all blocks that fit the GPU; in_flight: bytes of weights under way per multiprocessor."""
    blocks: int
    per_sm: int
    waves: float
    in_flight: int
    predicted: float


def padded(k: int, group_size: int) -> tuple[int, int]:
    """(columns that share a scale, columns stored for K): multiples of 16 and of the group."""
    unit = group_size if group_size != k else -(-k // 16) * 16
    return unit, -(-k // unit) * unit


def weight_bytes(n: int, k: int, group_size: int, bits: int = 4, symmetric: bool = True) -> int:
    """Codes, fp16 scales and uint8 zeros of W [n, k]."""
    return n * k * STORED[bits] // 8 + n * -(-k // group_size) * (2 if symmetric else 3)


def floor(m: int, n: int, k: int, group_size: int, bits: int = 4, symmetric: bool = True, machine: Machine = H200) -> float:
    """The time below which no kernel can be: every byte read or written once, or every operation done."""
    moved = weight_bytes(n, k, group_size, bits, symmetric) + 2 * m * (k + n)
    return max(moved / machine.memory, 2 * m * n * k / machine.flops)


def shared_bytes(c: Configuration, bits: int = 4) -> int:
    """Buffers of the load pipeline on sm_90: one fewer for weights, which go on to registers, than for x, unless it walks."""
    weight_buffers = c.num_stages if c.programs else c.num_stages - 1
    return weight_buffers * c.block_n * c.block_k * STORED[bits] // 8 + c.num_stages * c.block_m * c.block_k * 2


def registers(c: Configuration, bits: int = 4) -> int:
    """What a thread may need on sm_90; the compiled kernels (kernels/compile_table.py) need no more."""
    known = WALKING_REGISTERS if c.programs else REGISTERS
    return known.get((c.block_m, c.block_n), (255, 255))[bits == 8]


def per_sm(c: Configuration, bits: int = 4, machine: Machine = H200) -> int:
    """Thread blocks that a multiprocessor holds at once."""
    return max(1, min(machine.registers // (32 * c.num_warps * registers(c, bits)),
                      machine.shared // (shared_bytes(c, bits) + 1024)))


def plan(c: Configuration, m: int, n: int, k: int, group_size: int, bits: int = 4, machine: Machine = H200) -> Plan:
    """`c` on x [m, k] and W [n, k]."""
    n_padded, k_padded = -(-n // 128) * 128, padded(k, group_size)[1]
    m_tiles, n_tiles, k_tiles = -(-m // c.block_m), n_padded // c.block_n, -(-k // c.block_k)
    items, resident = m_tiles * n_tiles * c.splits, per_sm(c, bits, machine)
    waves = items / (machine.sms * resident)
    blocks = min(items, c.programs or items)
    most = -(-items // min(blocks, machine.sms))  # tiles and parts of the busiest multiprocessor
    tile = c.block_n * c.block_k * STORED[bits] // 8
    in_flight = min(resident, most) * (c.num_stages - 1) * tile
    rounds = -(-k_tiles // c.splits)

    weights = weight_bytes(n_padded, k_padded, group_size, bits)
    partial = 8 * c.splits * m * n if c.splits > 1 else 0  # fp32, written once and read once; they stay in L2
    memory = max((weights + 2 * m * (k + n)) / machine.memory, most * rounds * tile * machine.latency / in_flight)
    l2 = (weights * m_tiles + 2 * m * k * n_tiles + partial / 2) / machine.l2
    products = most * rounds * 2 * c.block_m * c.block_n * c.block_k / (machine.flops / machine.sms)
    reduction = machine.launch + (partial / 2 + 2 * m * n) / machine.l2 if c.splits > 1 else 0
    if c.programs:  # four schedulers, each an instruction a cycle
        extra = WALK.get((c.block_m, c.block_n), max(WALK.values())) * c.num_warps / 4
        start = machine.latency + most * rounds * extra / machine.clock
    else:
        start = math.ceil(waves) * machine.latency
    return Plan(blocks, resident, waves, in_flight, max(memory, l2, products) + start + reduction)


def table(group_size: int = 128, bits: int = 4, ms: tuple[int, ...] = (1, 16, 32, 64, 128, 256, 1024, 4096)) -> list[dict]:
    """A row per layer shape and M: the floor, the chosen configuration and its plan; walking: the least predicted time of a
    launch whose blocks walk over tiles, None where there is none."""
    from foem_kernels.triton_w4a16 import candidates, configuration
    rows = []
    for name, (n, k) in SHAPES.items():
        for m in ms:
            c = configuration(m, n, k, group_size, bits=bits)
            walking = [w for w in candidates(m, n, k, group_size, bits=bits) if w.programs]
            rows.append({"shape": name, "n": n, "k": k, "m": m, "floor": floor(m, n, k, group_size, bits), **c._asdict(),
                         **plan(c, m, n, k, group_size, bits)._asdict(),
                         "walking": min((plan(w, m, n, k, group_size, bits).predicted for w in walking), default=None)})
    return rows


def main() -> int:
    """Print `table` for an H200."""
    print("4 bits, group 128, H200; times in us, predicted from assumptions, not measured\n"
          "walking: the best launch whose blocks walk over tiles, * where it is the choice")
    print(f"{'shape':20s}{'M':>6s}{'floor':>9s}{'predicted':>10s}{'walking':>10s}{'tile':>12s}{'splits':>7s}{'blocks':>7s}"
          f"{'per SM':>7s}{'waves':>7s}{'KiB in flight':>14s}")
    for r in table():
        walking = "" if r["walking"] is None else f"{'*' * (r['programs'] > 0)}{r['walking']:.2f}"
        print(f"{r['shape']:20s}{r['m']:6d}{r['floor']:9.2f}{r['predicted']:10.2f}{walking:>10s}"
              f"{r['block_m']:5d}x{r['block_n']}x{r['block_k']:<4d}{r['splits']:5d}{r['blocks']:7d}{r['per_sm']:7d}"
              f"{r['waves']:7.2f}{r['in_flight'] / 1024:14.0f}")
    return 0
