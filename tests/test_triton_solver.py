"""The fused solver kernel: numbers on Triton's interpreter, machine code for GPUs that are not here, equality where one is.

TRITON_INTERPRET is read when triton is imported, and other tests import triton too: so this file runs itself twice as a
script, `interpret` and `compile`, and the tests judge the two reports.
"""

import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from unittest import mock

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
pytest.importorskip("triton")

from foem_kernels import solver, triton_solver  # noqa: E402

from foem_vllm.format import QuantSpec  # noqa: E402
from foem_vllm.solver import SolverConfig, solve  # noqa: E402

TERMS = {"gptq": (False, False), "gptaq": (False, True), "foem": (True, False), "both": (True, True)}  # pulls, drifts
# columns, rows, bits, first column's place, columns between unpulled ones: every width of tile, rows beyond the last program
BLOCKS = [(1, 1, 4, 0, 128), (7, 19, 3, 5, 4), (16, 8, 8, 128, 128), (33, 9, 2, 100, 20), (96, 11, 4, 96, 128),
          (128, 21, 4, 0, 128)]  # fmt: skip
CASES = [(b, terms, (i + j) % 2 == 0) for i, b in enumerate(BLOCKS) for j, terms in enumerate(TERMS)]
# One layer of every order and group size; methods, forms, symmetry and strengths per row run through them.
LAYERS = [
    (order, group, list(TERMS)[i % 4], ("published", "consistent")[i // 2 % 2], i % 3 > 0, i % 5 < 2)
    for i, (order, group) in enumerate(itertools.product(("none", "group", "static", "full"), (16, 32, 64, 128, -1)))
]
# capability, BLOCK, symmetric, terms
COMPILED = [(80, 128, False, "both"), (90, 128, True, "gptq"), (90, 128, False, "both"), (90, 32, False, "both"),
            (100, 128, False, "both")]  # fmt: skip


def name(case):
    return "-".join(map(str, case))


def block(b, n, bits, first, unpulled, terms, symmetric, per_row):
    """Arguments of quantize_block: views into larger matrices, as `solve` hands them over, and three groups in any order."""
    g = torch.Generator().manual_seed(b * n + bits)
    randn = functools.partial(torch.randn, generator=g)
    pulls, drifts = TERMS[terms]
    V, P = (0.25 * randn(b + 3, b + 5))[2 : 2 + b, 4 : 4 + b], (0.05 * randn(b + 3, b + 5))[:b, :b]
    w, top = randn(b, n), (1 << bits) - 1
    scales = (3 + torch.rand(3, n, generator=g)) / top
    zeros = None if symmetric else torch.randint(0, top + 1, (3, n), generator=g).float()
    groups = torch.randint(0, 3, (b,), generator=g).int()
    out = [torch.full((b, n), torch.nan) for _ in range(3)]
    named = dict(first=first, unpulled=unpulled)
    if pulls:
        named |= dict(target=w + 0.1 * randn(b, n), beta=0.3 * torch.rand(n, generator=g) if per_row else 0.2)
    if drifts:
        named |= dict(P=P, alpha=torch.rand(n, generator=g) if per_row else 0.25, seen=out[2])
    return (w, V, out[0], out[1], scales, zeros, groups, bits), named


def formulas(w, V, points, errors, scales, zeros, groups, bits, beta=0.0, target=None, first=0, unpulled=128, P=None, alpha=0.0,
             seen=None):  # fmt: skip
    """float64: points, errors, seen [b, n], and how far each row keeps from the middle of two points, in steps [n].

    Each column is worked out when its turn comes, from all earlier ones at once.
    """
    b, n = w.shape
    q, e, a = torch.zeros(3, b, n, dtype=torch.float64)
    clear = torch.full((n,), torch.inf, dtype=torch.float64)
    for i in range(b):
        x = w[i].double() - V[:i, i].double() @ e[:i]
        if P is not None:
            x = x + P[:i, i].double() @ a[:i]
        pull = torch.as_tensor(beta).double() if target is not None else 0.0
        away = x - target[i].double() if target is not None else 0.0
        if target is not None and (first + i) % unpulled > 0:
            x, away = x - pull * away, (1 - pull) * away
        s = scales[groups[i]].double()
        z = torch.full_like(s, 2 ** (bits - 1)) if zeros is None else zeros[groups[i]].double()
        q[i] = torch.minimum(torch.maximum(torch.round(x / s) + z, torch.zeros_like(s)), torch.full_like(s, 2**bits - 1)) - z
        e[i] = x - s * q[i] - pull * away
        a[i] = x * torch.as_tensor(alpha).double()
        clear = torch.minimum(clear, ((x / s) % 1 - 0.5).abs())
    return q, e, a, clear


def layer(n, k, device="cpu"):
    """W, H, D in float32, and strengths alpha, beta per row; fewer than three tokens a column."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(640, k, generator=g) @ (torch.eye(k) + torch.randn(k, k, generator=g) / k**0.5)
    x *= 0.1 + 3 * torch.rand(k, generator=g)
    d = (0.05 * torch.randn(640, k, generator=g) + 0.05 * x.roll(1, 1)).T @ x / 640
    tensors = torch.randn(n, k, generator=g), x.T @ x / 640, d, torch.rand(n, generator=g), 0.3 * torch.rand(n, generator=g)
    return [t.to(device) for t in tensors]


def both(tensors, order, group, terms, form, symmetric, per_row):
    """Quantized by the loop in torch and by the fused kernel."""
    W, H, D, alpha, beta = tensors
    pulls, drifts = TERMS[terms]
    rows = dict(alpha=alpha if drifts else None, beta=beta if pulls else None) if per_row else {}
    config, found = SolverConfig(0.25 * drifts, 0.2 * pulls, form=form), []
    for backend in ("torch", "triton"):
        with mock.patch.dict(os.environ, FOEM_SOLVER=backend):
            found.append(solve(W, H, QuantSpec(4, group, symmetric, order), config, D, **rows).quantized)
    return found


def interpret():
    report = {"blocks": {}, "layers": {}}
    for case in CASES:
        sizes, terms, symmetric = case
        arguments, named = block(*sizes, terms, symmetric, per_row=symmetric)
        before = arguments[0].clone()
        triton_solver.quantize_block(*arguments, **named)
        points, errors, seen, clear = formulas(*arguments, **named)
        # 128 sums of values below 10 in float32 are off by less; a row nearer to a tie may go the other way.
        rows = clear > 1e-4
        pairs = [(arguments[3], errors)] + ([(named["seen"], seen)] if "seen" in named else [])
        report["blocks"][str(case)] = {
            "rows": int(rows.sum()), "wrong": int((arguments[2].double() != points)[:, rows].sum()),
            "error": max(float(((got - want).abs() / (1 + want.abs()))[:, rows].max()) if rows.any() else 0.0
                         for got, want in pairs),
            "unchanged": torch.equal(before, arguments[0])}  # fmt: skip
    arguments, named = block(*BLOCKS[-1], "both", False, True)
    triton_solver.quantize_block(*arguments, **named)
    clean = arguments[3].clone()
    arguments[0][3, 5], arguments[0][40, 20] = torch.nan, torch.inf
    triton_solver.quantize_block(*arguments, **named)
    others = [i for i in range(21) if i not in (5, 20)]
    report["bad rows stay alone"] = torch.equal(arguments[3][:, others], clean[:, others])
    arguments, _ = block(*BLOCKS[1], "gptq", True, False)
    triton_solver.quantize_block(*(t[:, :0] if i in (0, 2, 3, 4) else t for i, t in enumerate(arguments)))  # no rows: no error
    launches = []
    fused = triton_solver.quantize_block
    triton_solver.quantize_block = lambda *a, **b: (launches.append(len(a[0])), fused(*a, **b))
    triton_solver.ROWS = 32  # the interpreter takes as long for 8
    tensors = layer(21, 256)
    for case in LAYERS:
        loop, one = both(tensors, *case)
        report["layers"][name(case)] = {
            "different": int((loop.codes != one.codes).sum()), "codes": loop.codes.numel(),
            "scales": float((loop.scales / one.scales - 1).abs().max()), "launches": launches[:]}  # fmt: skip
        launches.clear()
    return report


def compile_all():
    import triton
    from foem_kernels import triton_solver_device as device
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    names, report = device.round_columns.arg_names, {}
    for case in COMPILED:
        capability, width, symmetric, terms = case
        pulls, drifts = TERMS[terms]
        constants = dict(MID=8, BLOCK=width, ROWS=triton_solver.ROWS, SYMMETRIC=symmetric, PULLS=pulls, DRIFTS=drifts)
        absent = {"zeros": symmetric, "target": not pulls, "beta": not pulls}
        absent |= dict.fromkeys(("P", "alpha", "seen"), not drifts)
        constants |= {a: None for a, gone in absent.items() if gone}
        integers = ("n_size", "columns", "first", "period", "stride_v", "stride_p")
        types = {a: "i32" if a in integers else "*i32" if a == "groups" else "*fp32" for a in names}
        signature = types | dict.fromkeys(constants, "constexpr")
        aligned = [a for a in names if signature[a].startswith("*")] + ["stride_v", "stride_p"]
        kernel = triton.compile(
            ASTSource(device.round_columns, signature, {(names.index(a),): v for a, v in constants.items()},
                      {(names.index(a),): [["tt.divisibility", 16]] for a in aligned}),
            target=GPUTarget("cuda", capability, 32), options={"num_warps": 1, "enable_fp_fusion": False})  # fmt: skip
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout + usage.stderr)
        registers, stack, shared, local = map(int, found.groups())
        inexact = re.findall(r"\bmad\S*\.f32|\bdiv\.(?:approx|full)\S*|\brcp\S*|\S+\.ftz\S*", kernel.asm["ptx"])
        fused = re.findall(r"fma\.rn\.f32(x2)?", kernel.asm["ptx"])  # sm_100 has instructions for two at once
        report[name(case)] = {"registers": registers, "spilled": stack + local, "shared": max(shared, kernel.metadata.shared),
                              "inexact": inexact, "fma": sum(2 if pair else 1 for pair in fused),
                              "divisions": kernel.asm["ptx"].count("div.rn.f32")}  # fmt: skip
    return report


@functools.cache
def reported(mode):
    environment = {key: v for key, v in os.environ.items() if key not in ("TRITON_INTERPRET", "FOEM_SOLVER")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if mode == "interpret" else {}
    run = subprocess.run([sys.executable, "-W", "ignore", __file__, mode], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_blocks_equal_the_formulas():
    found = reported("interpret")["blocks"]
    assert len(found) == len(CASES)
    assert {case: f for case, f in found.items() if f["wrong"] or f["error"] > 1e-4 or not f["unchanged"]} == {}
    assert sum(f["rows"] for f in found.values()) > 0.8 * 4 * sum(n for _, n, *_ in BLOCKS), "too few rows were compared"


@pytest.mark.parametrize("case", LAYERS, ids=name)
def test_layers_equal_the_loop_in_torch(case):
    found = reported("interpret")["layers"][name(case)]
    order, group = case[:2]
    width = 128 if group == -1 or order == "static" else group
    assert found["launches"] == [width] * (256 // width)
    # A row in which one value lies near a tie may come out otherwise from there on: one row in 21.
    assert found["different"] <= found["codes"] / 21
    assert found["scales"] < 1e-2


def test_codes_that_differ_from_the_loop_in_torch_are_few():
    found = reported("interpret")["layers"].values()
    assert sum(f["different"] for f in found) < 1e-3 * sum(f["codes"] for f in found)


def test_bad_rows_stay_alone():
    assert reported("interpret")["bad rows stay alone"]


@pytest.mark.parametrize("case", COMPILED, ids=name)
def test_compiled(case):
    found = reported("compile")[name(case)]
    assert found["spilled"] == 0
    assert found["registers"] <= 128  # 16 programs on a multiprocessor
    assert found["shared"] <= 1024
    assert found["inexact"] == [], "rounds otherwise than torch"
    # Each of the 32 lanes has one of 8 rows and a quarter of the columns: a fused operation for every update, one for the error.
    assert found["fma"] == case[1] // 4 * (2 if case[3] == "both" else 1) + 1
    assert found["divisions"] == 1


@pytest.mark.parametrize(
    "device, dtype, columns, reason",
    [("cuda", torch.float64, 128, "takes float32, not torch.float64"), ("cuda", torch.float32, 129, "up to 128 columns, not 129"),
     ("cpu", torch.float32, 128, "needs a CUDA device, not cpu")],
)  # fmt: skip
def test_what_is_not_supported_is_refused(monkeypatch, device, dtype, columns, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert reason in triton_solver.supports(device, dtype, columns)
    monkeypatch.setenv("FOEM_SOLVER", "triton")
    with pytest.raises(ValueError, match=reason):
        solver.pick(torch.device(device), dtype, columns)


def test_arguments_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # nothing is launched
    arguments, named = block(*BLOCKS[1], "both", False, True)
    wrong = {0: lambda t: t.T.contiguous().T, 1: torch.t, 2: lambda t: t[:4], 4: torch.Tensor.double, 6: torch.Tensor.long}
    for place, change in wrong.items():
        changed = [change(t) if i == place else t for i, t in enumerate(arguments)]
        with pytest.raises(ValueError, match="must be torch"):
            triton_solver.quantize_block(*changed, **named)
    with pytest.raises(ValueError, match="beta must be .* \\[19\\]"):
        triton_solver.quantize_block(*arguments, **named | {"beta": torch.ones(7)})
    with pytest.raises(ValueError, match="P and seen belong together"):
        triton_solver.quantize_block(*arguments, **named | {"seen": None})


@pytest.mark.skipif(not torch.cuda.is_available() or bool(torch.version.hip), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", LAYERS, ids=name)
def test_gpu_equals_the_loop_in_torch(case):
    loop, one = both(layer(512, 1024, "cuda"), *case)
    assert (loop.codes != one.codes).float().mean() < 1e-3
    assert torch.allclose(loop.scales, one.scales, rtol=1e-2)


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))
