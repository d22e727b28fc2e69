"""Time what loading a model does after the file is read: a GPTQ checkpoint's tensors, checked, unpacked, laid out for the kernel.

    python kernels/bench_load.py [--rounds 3] [--out FILE]

One layer of each shape of Qwen3-8B as vLLM fuses them; a whole block is the sum of its four, and the model is 36 blocks.
"""
from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]

import foem_kernels  # noqa: E402
from foem_eval.provenance import provenance  # noqa: E402

from foem_vllm.format import Quantized, QuantSpec, pack, unpack  # noqa: E402

BLOCKS = 36
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
SPEC = QuantSpec(4, 128)


def stored(n: int, k: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's linear [n, k], random."""
    r = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=r)
    return pack(Quantized(codes, (torch.rand(n, k // SPEC.group_size, generator=r) * 0.01 + 0.001).half()), SPEC)


def load(tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Seconds of checking and unpacking, and of laying out, as the plugin does it."""
    started = time.perf_counter()
    q = unpack(tensors, SPEC)
    unpacked = time.perf_counter()
    foem_kernels.prepare(*q, bits=SPEC.bits, group_size=SPEC.group_size, dtype=torch.bfloat16, device="cpu")
    return unpacked - started, time.perf_counter() - unpacked


def measure(shapes: dict[str, tuple[int, int]], rounds: int) -> list[dict]:
    """A row a shape: medians, after one call that is not counted."""
    rows = []
    for name, (n, k) in shapes.items():
        tensors = stored(n, k)
        unpacking, laying = (statistics.median(found) for found in zip(*[load(tensors) for _ in range(rounds + 1)][1:]))
        rows.append({"layer": name, "n": n, "k": k, "unpack_s": unpacking, "prepare_s": laying, "seconds": unpacking + laying})
        print(f"{name:8} {n:6} x {k:5}: unpacked in {1e3 * unpacking:6.1f} ms, laid out in {1e3 * laying:6.1f} ms", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "eval" / "results" / "load_cpu.json")
    args = parser.parse_args(argv)
    rows = measure(SHAPES, args.rounds)
    block = sum(row["seconds"] for row in rows)
    print(f"one block {block:.3f} s, {BLOCKS} blocks of Qwen3-8B {BLOCKS * block:.1f} s, {torch.get_num_threads()} threads")
    result = {**provenance(), "threads": torch.get_num_threads(), "rounds": args.rounds, "block_s": block, "blocks": BLOCKS,
              "model_s": BLOCKS * block, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
