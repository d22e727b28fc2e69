"""Check and time the kernels on an NVIDIA GPU, and the quantizer against its own CPU result: one JSON, one exit code.

    python kernels/gpu_check.py [--dry-run] [--steps numbers,graphs,timing,quantizer] [--out FOLDER]

Needs torch and triton, and transformers and safetensors for the quantizer; nothing need be installed. Exit 0: every check
passed; 1: one failed (the others ran all the same); 2: no GPU. --dry-run names what would run and exits 0.
Timing never fails a run: a slow kernel is a result, not an error.
"""
from __future__ import annotations

import argparse
import itertools
import json
import math
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import foem_kernels  # noqa: E402
from foem_kernels import KERNELS, Problem  # noqa: E402

UNIT = {torch.float16: 2.0 ** -11, torch.bfloat16: 2.0 ** -8}
EVERY_M = (1, 2, 3, 4, 16, 17, 32, 33, 64, 65, 128, 256, 1024, 4096)
SOME_M = (1, 17, 64, 300)
# n, k, group sizes, activation order, M: one full sweep of M, every group size, odd N, and K that needs small tiles
CHECKED = [(4096, 4096, (128,), (False,), EVERY_M), (1024, 3072, (32, 3072), (False, True), SOME_M),
           (6144, 1024, (64,), (True,), SOME_M), (129, 512, (128, 16, 512), (False, True), SOME_M),
           (75, 48, (48,), (False,), SOME_M), (8192, 8192, (128,), (False,), (1, 4096))]
TIMED = {"Qwen3-8B qkv": (6144, 4096), "Qwen3-8B o": (4096, 4096), "Qwen3-8B gate_up": (24576, 4096),
         "Qwen3-8B down": (4096, 12288), "Llama-3-8B gate_up": (28672, 4096), "Llama-3-8B down": (4096, 14336),
         "Qwen3-0.6B qkv": (4096, 1024), "Qwen3-0.6B o": (1024, 2048), "Qwen3-0.6B gate_up": (6144, 1024),
         "Qwen3-0.6B down": (1024, 3072), "8192": (8192, 8192)}
TIMED_M = (1, 4, 16, 32, 64, 128, 256, 1024, 4096)
CACHE_BYTES = 60 << 20  # the largest L2 so far (H100, H200); weight sets rotate through three times as much


def weights(n, k, g, dtype, symmetric, act_order, exact=False, seed=0):
    """codes [n, k] u8, scales [n, k/g] fp32, zeros u8 or None, g_idx or None, bias [n], on the GPU, drawn from `seed`."""
    r = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda", generator=r)
    scales = (torch.rand(n, k // g, device="cuda", generator=r) * 0.02 + 0.001).half().float()
    bias = torch.randn(n, device="cuda", generator=r).to(dtype)
    if exact:
        scales = 2.0 ** -torch.randint(0, 4, scales.shape, device="cuda", generator=r).float()
        bias = torch.randint(-4, 5, (n,), device="cuda", generator=r).to(dtype)
    zeros = None if symmetric else torch.randint(0, 16, scales.shape, dtype=torch.uint8, device="cuda", generator=r)
    g_idx = (torch.arange(k, device="cuda") // g)[torch.randperm(k, device="cuda", generator=r)] if act_order else None
    return codes, scales, zeros, g_idx, bias


def activations(m, k, dtype, exact=False, seed=1):
    r = torch.Generator("cuda").manual_seed(seed)
    if exact:
        return torch.randint(-4, 5, (m, k), device="cuda", generator=r).to(dtype)
    return torch.randn(m, k, device="cuda", generator=r).to(dtype)


def weight64(codes, scales, zeros, g_idx):
    group = torch.arange(codes.shape[1], device="cuda") // (codes.shape[1] // scales.shape[1]) if g_idx is None else g_idx
    return scales.double()[:, group] * (codes.double() - (8.0 if zeros is None else zeros.double()[:, group]))


def worst_error(y, x, w, bias):
    """Largest |y - float64| over the bound, and the relative error in the Frobenius norm; above 1, or NaN, is a failure.

    The bound: k fp32 additions (2**-24 each, doubled because tensor cores may truncate), each weight rounded once to the
    activations' dtype (1.01: a scale in two bf16 terms), the result rounded once; 2**-24 for fp16 results that underflow.
    """
    k, u, x, bias = x.shape[1], UNIT[y.dtype], x.double(), bias.double()
    wanted, magnitude = x @ w.T + bias, x.abs() @ w.abs().T + bias.abs()
    error = ((k + 16) * 2.0 ** -23 + 1.01 * u) * magnitude
    difference = (y.double() - wanted).abs()
    return float((difference / (error + u * (wanted.abs() + error) + 2.0 ** -24)).max()), float(difference.norm() / wanted.norm())


def number_cases():
    """(kernel, n, k, group, dtype, symmetric, act-order, Ms) that some kernel says it supports on a GPU."""
    for (n, k, groups, orders, ms), dtype, symmetric, kernel in itertools.product(CHECKED, UNIT, (True, False), KERNELS):
        for g, order in itertools.product(groups, orders):
            if kernel.supports(Problem(n, k, 4, g, symmetric, dtype, "cuda", order)) is None:
                yield kernel.name, n, k, g, dtype, symmetric, order, ms


def check_numbers():
    """Every kernel against float64, exact where integers allow it, the same twice, and rows with NaN kept apart."""
    # By default cuBLAS may add partial sums in half precision; the bound is that of fp32 sums.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    rows, failures = [], []
    for name, n, k, g, dtype, symmetric, order, ms in number_cases():
        row = {"kernel": name, "n": n, "k": k, "group_size": g, "dtype": str(dtype)[6:], "symmetric": symmetric,
               "act_order": order, "of_bound": 0.0, "relative": 0.0, "wrong_integers": 0, "failed": []}
        for exact, m in itertools.product((False, True), ms):
            if m == ms[0]:
                codes, scales, zeros, g_idx, bias = weights(n, k, g, dtype, symmetric, order, exact, seed=n + k + g)
                p = foem_kernels.prepare(codes, scales, zeros, g_idx, bits=4, group_size=g, dtype=dtype, device="cuda",
                                         kernel=name)
                w = weight64(codes, scales, zeros, g_idx)
            x = activations(m, k, dtype, exact, seed=m)
            y = foem_kernels.gemm(x, p, bias)
            if exact:  # multiples of 1/8 below 2**19 for every k here: fp32 holds each sum
                wrong = int((y != (x.double() @ w.T + bias.double()).to(dtype)).sum())
                row["wrong_integers"] += wrong
                ok = wrong == 0
            else:
                of_bound, relative = worst_error(y, x, w, bias)
                row["of_bound"], row["relative"] = max(row["of_bound"], of_bound), max(row["relative"], relative)
                ok = of_bound <= 1
            if name != "reference":  # cuBLAS promises neither
                ok &= torch.equal(y, foem_kernels.gemm(x, p, bias))
                bad = x.clone()
                bad[m // 2, 5] = math.nan
                others = torch.arange(m, device="cuda") != m // 2
                ok &= torch.equal(foem_kernels.gemm(bad, p, bias)[others], y[others])
            if not ok:
                row["failed"].append({"m": m, "integers": exact})
        rows.append(row)
        failures += [row] if row["failed"] else []
        print(f"  {name} {n}x{k} g{g} {row['dtype']} {'sym' if symmetric else 'asym'}{' act-order' if order else ''}: "
              f"{row['of_bound']:.2f} of the bound, relative {row['relative']:.1e}, "
              f"{row['wrong_integers']} integers wrong{', FAILED' if row['failed'] else ''}", flush=True)
    p = Problem(4096, 4096, 4, 128, True, torch.bfloat16, "cuda")
    reasons = {kernel.name: kernel.supports(p) for kernel in KERNELS}
    passed = not failures and "triton_w4a16" in {row["kernel"] for row in rows}
    return passed, {"failures": len(failures), "not_supported": {k: v for k, v in reasons.items() if v}, "rows": rows}


def capture(function):
    """A CUDA graph of `function`, warmed up first so that compilation stays out of it, and what it returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def check_graphs():
    """Captured once and replayed on other inputs, and traced whole by torch.compile: the same bits as called plainly."""
    rows = []
    for kernel, m, order in itertools.product(KERNELS, (1, 16, 64, 300), (False, True)):
        p = Problem(6144, 4096, 4, 128, False, torch.bfloat16, "cuda", order)
        if kernel.name == "reference" or kernel.supports(p) is not None:
            continue
        codes, scales, zeros, g_idx, bias = weights(p.n, p.k, 128, p.dtype, False, order)
        ready = foem_kernels.prepare(codes, scales, zeros, g_idx, bits=4, group_size=128, dtype=p.dtype, device="cuda",
                                     kernel=kernel.name)
        x = activations(m, p.k, p.dtype)
        graph, y = capture(lambda: foem_kernels.gemm(x, ready, bias))  # noqa: B023 (called before the loop goes on)
        same = True
        for seed in (7, 8):
            x.copy_(activations(m, p.k, p.dtype, seed=seed))
            graph.replay()
            torch.cuda.synchronize()
            same &= torch.equal(y, foem_kernels.gemm(x, ready, bias))
        traced = torch.compile(lambda x: foem_kernels.gemm(x, ready, bias), backend="aot_eager", fullgraph=True)  # noqa: B023
        rows.append({"kernel": kernel.name, "m": m, "act_order": order, "replay_equal": same,
                     "compiled_equal": torch.equal(traced(x), foem_kernels.gemm(x, ready, bias))})
    return bool(rows) and all(r["replay_equal"] and r["compiled_equal"] for r in rows), {"rows": rows}


def microseconds(calls):
    """Median time of one call: a graph that makes each of `calls` in turn, replayed 20 times between events."""
    calls = calls * max(1, -(-20 // len(calls)))

    def one_round():
        for call in calls:
            call()
    graph, _ = capture(one_round)
    times = []
    for _ in range(23):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[3:])


def copies(size):
    """How many weight sets of `size` bytes it takes for each to have left the L2 before its next turn."""
    return max(2, min(256, -(-3 * CACHE_BYTES // size)))


def time_kernels():
    """Beside dense bf16 (cuBLAS) on the same x, weight sets rotated past the L2 so that every call reads device memory."""
    rows = []
    print(f"  {'shape':20s} {'M':>5s} {'kernel':14s} {'us':>9s} {'GB/s':>7s} {'TFLOP/s':>8s} {'x dense':>8s}", flush=True)
    for shape, (n, k) in TIMED.items():
        codes, scales, _, _, _ = weights(n, k, 128, torch.bfloat16, True, False)
        dense = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies(2 * n * k))]
        sets = {}
        for kernel in KERNELS:
            if kernel.name != "reference" and kernel.supports(Problem(n, k, 4, 128, True, torch.bfloat16, "cuda")) is None:
                p = foem_kernels.prepare(codes, scales, bits=4, group_size=128, dtype=torch.bfloat16, device="cuda",
                                         kernel=kernel.name)
                tensors = [t for t in p.weights.values() if isinstance(t, torch.Tensor)]
                size = sum(t.numel() * t.element_size() for t in tensors)
                sets[kernel.name] = size, [p._replace(weights={a: t.clone() if isinstance(t, torch.Tensor) else t
                                                               for a, t in p.weights.items()}) for _ in range(copies(size))]
        for m in TIMED_M:
            x = activations(m, k, torch.bfloat16)
            base = microseconds([lambda w=w: torch.nn.functional.linear(x, w) for w in dense])  # noqa: B023
            timed = [("dense bf16", 2 * n * k, base)]
            timed += [(name, size, microseconds([lambda p=p: foem_kernels.gemm(x, p) for p in ready]))  # noqa: B023
                      for name, (size, ready) in sets.items()]
            for name, size, us in timed:
                row = {"shape": shape, "n": n, "k": k, "m": m, "kernel": name, "us": us, "x_dense": base / us,
                       "GB/s": (size + 2 * m * (n + k)) / us / 1e3, "TFLOP/s": 2 * m * n * k / us / 1e6}
                rows.append(row)
                print(f"  {shape:20s} {m:5d} {name:14s} {us:9.2f} {row['GB/s']:7.0f} {row['TFLOP/s']:8.1f} {row['x_dense']:8.2f}",
                      flush=True)
        del dense, sets
    return True, {"group_size": 128, "symmetric": True, "dtype": "bfloat16", "rows": rows,
                  "timer": "CUDA graph, median of 20 replays, weight sets rotated through 3 x 60 MiB"}


def check_quantizer():
    """The demo's model quantized on the GPU and on the CPU: codes that agree, and losses within 5 % of each other.

    Codes need not be equal: the GPU runs the blocks in the model's own dtype, the CPU in fp32, and a code that falls on the
    other side of a tie moves those after it. The loss is what the method minimizes; 5 % is a judgement, not a theorem.
    """
    from safetensors.torch import load_file

    from foem_vllm import QuantizeConfig, quantize
    tinylm = ROOT / "eval" / "tinylm"
    text = str(tinylm / "data" / "calibration.jsonl")
    rows, ok = [], True
    with tempfile.TemporaryDirectory() as folder:
        for method in ("rtn", "foem"):
            reports, codes, seconds = {}, {}, {}
            for device in ("cpu", "cuda"):
                out, started = pathlib.Path(folder) / f"{method}-{device}", time.perf_counter()
                reports[device] = quantize(tinylm / "qwen3", out, QuantizeConfig(
                    method=method, device=device, calibration=text, samples=64, seq_len=256))
                seconds[device] = time.perf_counter() - started
                codes[device] = {name: t for file in sorted(out.glob("*.safetensors")) for name, t in load_file(file).items()
                                 if name.endswith(".qweight")}
            nibbles = [sum(int(((a ^ codes["cuda"][name]) >> shift & 15 == 0).sum()) for shift in range(0, 32, 4))
                       for name, a in codes["cpu"].items()]
            losses = {device: [layer.loss for layer in r.layers if layer.loss is not None] for device, r in reports.items()}
            ratios = [b / a for a, b in zip(losses["cpu"], losses["cuda"]) if a]
            row = {"method": method, "layers": len(nibbles), "seconds": seconds,
                   "equal_codes": sum(nibbles) / (8 * sum(t.numel() for t in codes["cpu"].values())),
                   "loss_ratio_cuda_to_cpu": {"median": statistics.median(ratios), "worst": max(ratios, key=lambda r: abs(r - 1))}
                   if ratios else None}
            rows.append(row)
            ok &= codes["cpu"].keys() == codes["cuda"].keys() and all(0.95 <= r <= 1.05 for r in ratios)
            ok &= method == "foem" or row["equal_codes"] > 0.999  # no activations: only ties in the grid search can differ
            ok &= method == "rtn" or bool(ratios)
            print(f"  {row}", flush=True)
    return ok, {"rows": rows}


STEPS = {"numbers": check_numbers, "graphs": check_graphs, "timing": time_kernels, "quantizer": check_quantizer}


def machine():
    import triton
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True)
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "capability": list(torch.cuda.get_device_capability(0)),
            "sms": properties.multi_processor_count, "memory_GiB": round(properties.total_memory / 2 ** 30, 1),
            "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__,
            "python": platform.python_version(), "commit": git.stdout.strip() or "not a git checkout",
            "command": "python kernels/gpu_check.py " + " ".join(sys.argv[1:])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="name the steps, run none; needs no GPU")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"some of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "eval" / "results",
                        help="folder of the JSON (default: eval/results)")
    args = parser.parse_args()
    steps = args.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"unknown step {', '.join(sorted(unknown))}; choose from {', '.join(STEPS)}")
    if args.dry_run:
        print("dry run: nothing is checked")
        for step in steps:
            print(f"skipped {step} (needs a GPU): {STEPS[step].__doc__.splitlines()[0]}")
        return 0
    if not torch.cuda.is_available() or torch.version.hip:
        print("gpu_check: no NVIDIA GPU is visible to torch; run it where there is one, or see the plan with --dry-run",
              file=sys.stderr)
        return 2
    result = {"machine": machine(), "steps": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu_check_{re.sub(r'[^a-z0-9]+', '_', result['machine']['gpu'].lower()).strip('_')}.json"
    for step in steps:
        print(f"{step}: {STEPS[step].__doc__.splitlines()[0]}", flush=True)
        started = time.perf_counter()
        try:
            passed, found = STEPS[step]()
        except Exception:  # reported as a failure: the other steps still have something to say
            passed, found = False, {"crashed": traceback.format_exc()}
            traceback.print_exc()
        result["steps"][step] = {"passed": passed, "seconds": round(time.perf_counter() - started, 1), **found}
        path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")  # after every step: a lost machine keeps what it found
        print(f"{step}: {'passed' if passed else 'FAILED'} in {result['steps'][step]['seconds']} s", flush=True)
    print(f"wrote {path}")
    return 0 if all(step["passed"] for step in result["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
