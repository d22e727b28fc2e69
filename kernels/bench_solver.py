"""Time the fused solver of the CPU beside the loop in torch, on one layer: one table and eval/results/solver_cpu.json.

    python kernels/bench_solver.py [--size 4096] [--rounds 3] [--out FILE]

`loop` is what the kernel replaces: all columns of the layer, a block of 128 at a time, rounded with the updates inside the block.
`solve` is the whole layer, Cholesky and the matrix products between blocks included; `grid` is the search for all its groups'
grids. Both take turns in every round; medians.
"""
from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]

from foem_eval.provenance import provenance  # noqa: E402
from foem_kernels import cpu_solver, solver  # noqa: E402

from foem_vllm.format import QuantSpec, dequantize  # noqa: E402
from foem_vllm.grid import find_grid  # noqa: E402
from foem_vllm.solver import SolverConfig, layer_loss, solve  # noqa: E402

METHODS = {"gptq": SolverConfig(), "foem": SolverConfig(beta=0.2), "foem+gptaq": SolverConfig(alpha=0.25, beta=0.2)}
FUNCTIONS = {"torch": solver.quantize_block, "cpu": cpu_solver.quantize_block}
BLOCK, GROUP = 128, 128
SPEC = QuantSpec(4, GROUP)


def random_layer(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(W, H, D), float32 [size, size]: moments of correlated inputs, as activations are."""
    r = torch.Generator().manual_seed(0)
    mix = torch.eye(size) + torch.randn(size, size, generator=r) * 0.5 / size ** 0.5
    x = torch.randn(2 * size, size, generator=r) @ mix
    H = x.T @ x / len(x)
    return torch.randn(size, size, generator=r) * 0.02, H, 0.05 * H


def loop(function: Callable, W: torch.Tensor, config: SolverConfig) -> Callable[[], float]:
    """Seconds of `function` over all blocks of W's columns, with the terms that config has."""
    size = len(W)
    columns, pulls, drifts = W.T.contiguous(), config.beta > 0, config.alpha > 0
    V = torch.randn(size, BLOCK, generator=torch.Generator().manual_seed(1)) / size ** 0.5
    scales = (columns.view(-1, GROUP, size).abs().amax(1) / 8).contiguous()
    groups = (torch.arange(size) // GROUP).int()
    points, errors, seen = (torch.empty(BLOCK, size) for _ in range(3))

    def run() -> float:
        work, seconds = columns.clone(), 0.0
        for begin in range(0, size, BLOCK):
            block = slice(begin, begin + BLOCK)
            terms = {"target": columns[block], "beta": config.beta, "first": begin} if pulls else {}
            terms |= {"P": V[block], "alpha": config.alpha, "seen": seen} if drifts else {}
            started = time.perf_counter()
            function(work[block], V[block], points, errors, scales, None, groups[block], 4, **terms)
            seconds += time.perf_counter() - started
        return seconds
    return run


def forced(name: str, call: Callable, results: dict) -> Callable[[], float]:
    """Seconds of `call` with the kernels of that name; what it returns goes into `results`."""
    def run() -> float:
        before = os.environ.get("FOEM_SOLVER")
        os.environ["FOEM_SOLVER"] = name
        try:
            started = time.perf_counter()
            results[name] = call()
            return time.perf_counter() - started
        finally:
            os.environ.pop("FOEM_SOLVER")
            if before is not None:
                os.environ["FOEM_SOLVER"] = before
    return run


def take_turns(timers: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each; every other round in the opposite order, after one call that is not counted."""
    samples = {name: [] for name in timers}
    for i in range(rounds + 1):
        for name in list(timers)[::-1 if i % 2 else 1]:
            samples[name].append(timers[name]())
    return {name: statistics.median(found[1:]) for name, found in samples.items()}


def measure(size: int, rounds: int) -> list[dict]:
    """One row a method, also on the terminal; equal: the part of codes that both solvers give, loss_ratio: of fused to torch."""
    W, H, D = random_layer(size)
    rows = []
    for method, config in METHODS.items():
        solved = {}
        loops = take_turns({name: loop(function, W, config) for name, function in FUNCTIONS.items()}, rounds)
        call = functools.partial(solve, W, H, SPEC, config, D)
        wholes = take_turns({name: forced(name, call, solved) for name in FUNCTIONS}, rounds)
        solved = {name: found.quantized for name, found in solved.items()}
        losses = [layer_loss(dequantize(solved[name], SPEC) - W, H) for name in FUNCTIONS]
        rows.append({"method": method, "size": size, "loop_torch_s": loops["torch"], "loop_cpu_s": loops["cpu"],
                     "loop_ratio": loops["torch"] / loops["cpu"], "solve_torch_s": wholes["torch"], "solve_cpu_s": wholes["cpu"],
                     "solve_ratio": wholes["torch"] / wholes["cpu"], "loss_ratio": losses[1] / losses[0],
                     "equal": float((solved["torch"].codes == solved["cpu"].codes).double().mean())})
        row = rows[-1]
        print(f"{method:11} loop {1e3 * row['loop_torch_s']:8.1f} ms in torch, {1e3 * row['loop_cpu_s']:7.1f} fused: "
              f"{row['loop_ratio']:5.1f} x; whole layer {row['solve_torch_s']:.2f} s, {row['solve_cpu_s']:.2f}: "
              f"{row['solve_ratio']:.2f} x; {row['equal']:.4%} of codes equal, loss x {row['loss_ratio']:.6f}", flush=True)
    return rows


def measure_grid(size: int, rounds: int) -> dict:
    """The search for the grids of all groups, also on the terminal; equal: the part of scales that both find."""
    W, H, _ = random_layer(size)
    found = {}
    call = functools.partial(find_grid, W.view(size, -1, GROUP), SPEC, search=True, importance=H.diagonal().view(-1, GROUP))
    seconds = take_turns({name: forced(name, call, found) for name in FUNCTIONS}, rounds)
    row = {"size": size, "torch_s": seconds["torch"], "cpu_s": seconds["cpu"], "ratio": seconds["torch"] / seconds["cpu"],
           "equal": float((found["torch"][0] == found["cpu"][0]).double().mean())}
    print(f"grid        {1e3 * row['torch_s']:8.1f} ms in torch, {1e3 * row['cpu_s']:7.1f} fused: {row['ratio']:5.1f} x; "
          f"{row['equal']:.4%} of scales equal", flush=True)
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns, a multiple of 128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "eval" / "results" / "solver_cpu.json")
    args = parser.parse_args(argv)
    if args.size < 1 or args.size % BLOCK:
        parser.error(f"--size must be a multiple of {BLOCK}")
    if reason := cpu_solver.supports("cpu", torch.float32):
        print(f"bench_solver: cpu_solver {reason}", file=sys.stderr)
        return 2
    origin = provenance()
    result = {**origin, "threads": torch.get_num_threads(), "rounds": args.rounds, "rows": measure(args.size, args.rounds),
              "grid": measure_grid(args.size, args.rounds)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
