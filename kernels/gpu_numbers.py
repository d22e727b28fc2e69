"""Steps of gpu_check that call kernels directly: numbers, CUDA graphs, experts, the solver's loop."""
from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import statistics
import time

import foem_kernels
import torch
from foem_kernels import KERNELS, Problem

DEVICE = "cuda"  # the tests run these steps on the CPU's kernels


class Skip(Exception):
    """A step cannot run here; says why."""


UNIT = {torch.float16: 2.0 ** -11, torch.bfloat16: 2.0 ** -8}
EVERY_M = (1, 2, 3, 4, 16, 17, 32, 33, 64, 65, 128, 256, 1024, 4096)
SOME_M = (1, 17, 64, 300)
# n, k, group sizes, activation order, M: one full sweep of M, every group size, odd N, and K that needs small tiles
CHECKED = [(4096, 4096, (128,), (False,), EVERY_M), (1024, 3072, (32, 3072), (False, True), SOME_M),
           (6144, 1024, (64,), (True,), SOME_M), (129, 512, (128, 16, 512), (False, True), SOME_M),
           (75, 48, (48,), (False,), SOME_M), (8192, 8192, (128,), (False,), (1, 4096))]
# bits, n, k, groups, act-order, M: the widths besides 4
OTHER_BITS = [(bits, 1024, 3072, (128,), (False,), SOME_M) for bits in (8, 3, 2)]
# experts, hidden, inner, top-k; the second as Qwen3-30B-A3B, the third as Mixtral with a quarter of its inner size
MOE = ((8, 512, 384, 1), (128, 2048, 768, 8), (8, 4096, 3584, 2))
SOLVED, FUSED = 4096, "triton"  # rows and columns; what FOEM_SOLVER calls the fused loop of a GPU


def weights(n, k, g, dtype, symmetric, act_order, exact=False, seed=0, bits=4):
    """codes [n, k] u8, scales [n, k/g] fp32, zeros u8 or None, g_idx or None, bias [n], on the GPU, drawn from `seed`."""
    r = torch.Generator(DEVICE).manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device=DEVICE, generator=r)
    scales = (torch.rand(n, k // g, device=DEVICE, generator=r) * 0.02 + 0.001).half().float()
    bias = torch.randn(n, device=DEVICE, generator=r).to(dtype)
    if exact:
        scales = 2.0 ** -torch.randint(0, 4, scales.shape, device=DEVICE, generator=r).float()
        bias = torch.randint(-4, 5, (n,), device=DEVICE, generator=r).to(dtype)
    zeros = None if symmetric else torch.randint(0, 1 << bits, scales.shape, dtype=torch.uint8, device=DEVICE, generator=r)
    g_idx = (torch.arange(k, device=DEVICE) // g)[torch.randperm(k, device=DEVICE, generator=r)] if act_order else None
    return codes, scales, zeros, g_idx, bias


def activations(m, k, dtype, exact=False, seed=1):
    r = torch.Generator(DEVICE).manual_seed(seed)
    if exact:
        return torch.randint(-4, 5, (m, k), device=DEVICE, generator=r).to(dtype)
    return torch.randn(m, k, device=DEVICE, generator=r).to(dtype)


def weight64(codes, scales, zeros, g_idx, bits=4):
    group = torch.arange(codes.shape[1], device=codes.device) // (codes.shape[1] // scales.shape[1]) if g_idx is None else g_idx
    return scales.double()[:, group] * (codes.double() - (2.0 ** (bits - 1) if zeros is None else zeros.double()[:, group]))


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
    """(kernel, bits, n, k, group, dtype, symmetric, act-order, Ms) that some kernel says it supports on a GPU."""
    checked = [(4, *case) for case in CHECKED] + OTHER_BITS
    for (bits, n, k, groups, orders, ms), dtype, symmetric, kernel in itertools.product(checked, UNIT, (True, False), KERNELS):
        for g, order in itertools.product(groups, orders):
            if kernel.supports(Problem(n, k, bits, g, symmetric, dtype, DEVICE, order)) is None:
                yield kernel.name, bits, n, k, g, dtype, symmetric, order, ms


@contextlib.contextmanager
def fp32_sums():
    """By default cuBLAS may add partial sums in half precision; the bound of `worst_error` is that of fp32 sums."""
    matmul, names = torch.backends.cuda.matmul, [f"allow_{t}_reduced_precision_reduction" for t in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before):
            setattr(matmul, name, value)


@fp32_sums()
def check_numbers(run):
    """Every kernel against float64, exact where integers allow it, the same twice, and rows with NaN kept apart."""
    rows, failures = [], []
    for name, bits, n, k, g, dtype, symmetric, order, ms in number_cases():
        row = {"kernel": name, "bits": bits, "n": n, "k": k, "group_size": g, "dtype": str(dtype)[6:], "symmetric": symmetric,
               "act_order": order, "of_bound": 0.0, "relative": 0.0, "wrong_integers": 0, "failed": []}
        for exact, m in itertools.product((False, True), ms):
            if m == ms[0]:
                codes, scales, zeros, g_idx, bias = weights(n, k, g, dtype, symmetric, order, exact, n + k + g, bits)
                p = foem_kernels.prepare(codes, scales, zeros, g_idx, bits=bits, group_size=g, dtype=dtype, device=DEVICE,
                                         kernel=name)
                w = weight64(codes, scales, zeros, g_idx, bits)
            x = activations(m, k, dtype, exact, seed=m)
            y = foem_kernels.gemm(x, p, bias)
            if exact:  # multiples of 1/8; sums of random signs stay below 2**19 for every k and width here: fp32 holds each
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
                others = torch.arange(m, device=DEVICE) != m // 2
                ok &= torch.equal(foem_kernels.gemm(bad, p, bias)[others], y[others])
            if not ok:
                row["failed"].append({"m": m, "integers": exact})
        rows.append(row)
        failures += [row] if row["failed"] else []
        run.save({"failures": len(failures), "rows": rows})
        print(f"  {name} {bits}-bit {n}x{k} g{g} {row['dtype']} {'sym' if symmetric else 'asym'}{' act-order' if order else ''}: "
              f"{row['of_bound']:.2f} of the bound, relative {row['relative']:.1e}, "
              f"{row['wrong_integers']} integers wrong{', FAILED' if row['failed'] else ''}", flush=True)
    p = Problem(4096, 4096, 4, 128, True, torch.bfloat16, DEVICE)
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


def check_graphs(run):
    """Captured once and replayed on other inputs, and traced whole by torch.compile: the same bits as called plainly."""
    rows = []
    for kernel, m, order in itertools.product(KERNELS, (1, 16, 64, 300), (False, True)):
        p = Problem(6144, 4096, 4, 128, False, torch.bfloat16, DEVICE, order)
        if kernel.name == "reference" or kernel.supports(p) is not None:
            continue
        codes, scales, zeros, g_idx, bias = weights(p.n, p.k, 128, p.dtype, False, order)
        ready = foem_kernels.prepare(codes, scales, zeros, g_idx, bits=4, group_size=128, dtype=p.dtype, device=DEVICE,
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


def check_moe(run):
    """Experts against float64: no more than twice the error of torch in the same dtype; the same twice, and from a graph."""
    try:
        from foem_kernels import triton_moe
    except ImportError as error:
        raise Skip(f"no triton_moe: {error}") from None
    rows, ok = [], True
    kinds = (torch.bfloat16, True), (torch.float16, False)
    for (experts, hidden, inner, top_k), (dtype, symmetric) in itertools.product(MOE, kinds):
        ready, exact = [], []
        for n, k, gated in ((2 * inner, hidden, True), (hidden, inner, False)):
            parts = [weights(n, k, 128, dtype, symmetric, False, seed=e)[:4] for e in range(experts)]
            exact.append([weight64(*part) for part in parts])
            codes, scales, zeros, _ = (None if part[0] is None else torch.stack(part) for part in zip(*parts))
            p = Problem(n, k, 4, 128, symmetric, dtype, DEVICE)
            ready.append(triton_moe.prepare(codes, scales, zeros, None, p, gated))
        for tokens in (1, 33, 300):
            r = torch.Generator(DEVICE).manual_seed(tokens)
            x, share = activations(tokens, hidden, dtype), torch.rand(tokens, top_k, device=DEVICE, generator=r)
            spread = torch.rand(tokens, experts, device=DEVICE, generator=r).argsort(1)[:, :top_k]
            crowded = torch.arange(top_k, device=DEVICE).expand(tokens, -1)  # all on the first ones, the others idle
            ids = spread.clone()
            graph, y = capture(lambda: triton_moe.experts(x, *ready, ids, share))  # noqa: B023 (called before the loop goes on)
            for routing, chosen in (("spread", spread), ("crowded", crowded)):
                ids.copy_(chosen)
                graph.replay()
                wanted, plain = (moe_by_torch(x, exact, chosen, share, d) for d in (torch.float64, dtype))
                error, of_torch = (float((t.double() - wanted).norm() / wanted.norm()) for t in (y, plain))
                same = torch.equal(y, triton_moe.experts(x, *ready, ids, share))
                rows.append({"experts": experts, "hidden": hidden, "inner": inner, "top_k": top_k, "tokens": tokens,
                             "routing": routing, "dtype": str(dtype)[6:], "symmetric": symmetric, "relative": error,
                             "relative_of_torch": of_torch, "replay_equal": same})
                ok &= same and error <= 2 * of_torch
                print(f"  {rows[-1]}", flush=True)
            run.save({"rows": rows})
    return ok, {"rows": rows}


def moe_by_torch(x, w, ids, share, dtype):
    """[tokens, hidden] of dtype, every weight, product and activation rounded to it."""
    y = torch.zeros(x.shape[0], w[1][0].shape[0], dtype=torch.float64, device=x.device)
    for e in ids.unique().tolist():
        token, place = (ids == e).nonzero().unbind(1)
        gate, up = (x[token].to(dtype) @ w[0][e].to(dtype).T).chunk(2, 1)
        h = torch.nn.functional.silu(gate) * up
        y.index_add_(0, token, (h @ w[1][e].to(dtype).T).double() * share[token, place, None].double())
    return y.to(dtype)


def check_solver(run):
    """One layer through the fused loop and through torch's: milliseconds, codes that differ, losses within 0.1 %.

    Both make the same operations, so codes should differ at ties alone; a code on the other side of a tie moves those after
    it, which is why the loss decides.
    """
    if importlib.util.find_spec("foem_kernels.solver") is None:
        raise Skip("no fused solver in foem_kernels")
    from foem_vllm.format import QuantSpec, dequantize
    from foem_vllm.solver import SolverConfig, layer_loss, solve
    r = torch.Generator(DEVICE).manual_seed(0)
    n = k = SOLVED
    mix = torch.eye(k, device=DEVICE) + torch.randn(k, k, device=DEVICE, generator=r) * 0.5 / k ** 0.5
    x = torch.randn(2 * k, k, device=DEVICE, generator=r) @ mix  # correlated, as activations are
    H, D = x.T @ x / len(x), 0.05 * x.T @ x / len(x)
    W = torch.randn(n, k, device=DEVICE, generator=r) * 0.02
    rows, ok, before = [], True, os.environ.get("FOEM_SOLVER")
    for method, order, config in (("gptq", "none", SolverConfig()), ("gptq", "static", SolverConfig()),
                                  ("foem+gptaq", "none", SolverConfig(alpha=0.25, beta=0.2))):
        spec, solved = QuantSpec(4, 128, act_order=order), {}
        row = {"method": method, "act_order": order, "n": n, "k": k}
        try:
            for name in ("torch", FUSED):
                os.environ["FOEM_SOLVER"] = name
                times = []
                for _ in range(4):  # the first compiles
                    torch.cuda.synchronize()
                    started = time.perf_counter()
                    solved[name] = solve(W, H, spec, config, D).quantized
                    torch.cuda.synchronize()
                    times.append(1e3 * (time.perf_counter() - started))
                row[f"{name}_ms"] = statistics.median(times[1:])
        finally:
            os.environ.pop("FOEM_SOLVER")
            if before is not None:
                os.environ["FOEM_SOLVER"] = before
        losses = [layer_loss(dequantize(q, spec) - W, H) for q in (solved["torch"], solved[FUSED])]
        row |= {"equal_codes": float((solved["torch"].codes == solved[FUSED].codes).double().mean()),
                "loss_ratio": losses[1] / losses[0]}
        rows.append(row)
        ok &= abs(row["loss_ratio"] - 1) < 1e-3
        print(f"  {row}", flush=True)
        run.save({"rows": rows})
    return ok, {"rows": rows}
