"""The solver's inner loop in C against the formulas in float64, and inside `solve` against the loop in torch."""

import logging

import pytest
import torch
from foem_kernels import cpu_solver, native, solver

from foem_vllm.format import QuantSpec
from foem_vllm.solver import SolverConfig, solve

pytestmark = pytest.mark.skipif(native.library() is None, reason="the CPU kernels were not compiled (no C compiler?)")


def make(b, n, bits=4, asymmetric=False, pulls=False, drifts=False, per_row=False, seed=0):
    """Arguments of quantize_block, float32: a block inside larger matrices, as `solve` hands it over."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    whole = (0.3 * rand(b + 7, b + 9)).triu(1)
    drift = 0.05 * rand(b + 7, b + 9)
    groups = torch.randint(0, 3, (b,), generator=g).int()
    scales = torch.rand(3, n, generator=g) * 0.2 + 0.05
    zeros = torch.randint(0, 1 << bits, (3, n), generator=g).float() if asymmetric else None
    w = rand(b, n)
    extra = {}
    if pulls:
        beta = torch.rand(n, generator=g) * 0.3 if per_row else 0.2
        extra |= dict(target=w + 0.1 * rand(b, n), beta=beta, first=128, unpulled=5)
    if drifts:
        alpha = torch.rand(n, generator=g) if per_row else 0.25
        extra |= dict(P=drift[3 : 3 + b, 5 : 5 + b], alpha=alpha, seen=torch.full((b, n), torch.nan))
    out = torch.full((b, n), torch.nan), torch.full((b, n), torch.nan)
    return (w, whole[2 : 2 + b, 4 : 4 + b], *out, scales, zeros, groups, bits), extra


def formulas(w, V, points, errors, scales, zeros, groups, bits, beta=0.0, target=None, first=0, unpulled=128, P=None, alpha=0.0,
             seen=None):  # fmt: skip
    """(points, errors, seen, distance of each value to the next rounding boundary) in float64, row after row of the layer."""
    b, n = w.shape
    found = [torch.zeros(b, n, dtype=torch.float64) for _ in range(4)]
    for row in range(n):
        left = w[:, row].double().clone()
        a, pull = (float(t[row]) if isinstance(t, torch.Tensor) else t for t in (alpha, beta))
        for i in range(b):
            s = float(scales[groups[i], row])
            z = float(1 << (bits - 1)) if zeros is None else float(zeros[groups[i], row])
            value, aim = float(left[i]), 0.0 if target is None else float(target[i, row])
            if target is not None and (first + i) % unpulled:
                value -= pull * (value - aim)
            code = min(max(round(value / s) + z, 0), (1 << bits) - 1)
            error = value - (code - z) * s - (pull * (value - aim) if target is not None else 0.0)
            for t, v in zip(found, (code - z, error, a * value, abs((value / s) % 1 - 0.5))):
                t[i, row] = v
            left[i + 1 :] -= V[i, i + 1 :].double() * error
            if P is not None:
                left[i + 1 :] += P[i, i + 1 :].double() * a * value
    return found


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("terms", ["gptq", "foem", "gptaq", "both", "rows"])
def test_equals_the_formulas(terms, asymmetric):
    """In the rows in which no value lies so near the middle of two grid points that float32 may see it on the other side."""
    clear = 0
    for b, n, bits in ((1, 1, 4), (7, 5, 3), (33, 40, 4), (128, 17, 4), (16, 16, 8), (20, 16, 2)):
        flags = dict(pulls=terms in ("foem", "both", "rows"), drifts=terms in ("gptaq", "both", "rows"), per_row=terms == "rows")
        arguments, extra = make(b, n, bits, asymmetric, **flags)
        before = arguments[0].clone()
        cpu_solver.quantize_block(*arguments, **extra)
        points, errors, seen, distance = formulas(*arguments, **extra)
        assert torch.equal(arguments[0], before)
        rows = (distance > 1e-4).all(0)
        clear += int(rows.sum())
        assert torch.equal(arguments[2][:, rows].double(), points[:, rows])
        scale = errors[:, rows].abs().max() if rows.any() else 1
        assert ((arguments[3].double() - errors)[:, rows].abs() <= 1e-4 * scale).all()
        if "seen" in extra and rows.any():
            assert ((extra["seen"].double() - seen)[:, rows].abs() <= 1e-4 * seen[:, rows].abs().max()).all()
    assert clear > 60


def test_equals_the_loop_in_torch():
    for seed in range(3):
        arguments, extra = make(96, 50, 4, True, True, True, True, seed)
        again = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
        more = {**extra, "seen": extra["seen"].clone()}
        cpu_solver.quantize_block(*arguments, **extra)
        solver.quantize_block(*again, **more)
        assert (arguments[2] != again[2]).float().mean() < 1e-3
        same = (arguments[2] == again[2]).all(0)
        assert torch.allclose(arguments[3][:, same], again[3][:, same], atol=1e-4)


def layer(n, k, tokens=500):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, k, generator=g) @ (torch.eye(k) + torch.randn(k, k, generator=g) / k**0.5)
    d = x.T @ (0.05 * torch.randn(tokens, k, generator=g)) / tokens
    return torch.randn(n, k, generator=g), x.T @ x / tokens, d


@pytest.mark.parametrize("order", ["none", "group", "static", "full"])
@pytest.mark.parametrize("group", [16, 64, 128, -1])
def test_whole_layers_get_the_same_codes(order, group, monkeypatch):
    W, H, D = layer(70, 256)
    both = SolverConfig(0.25, 0.2, form="consistent")
    for symmetric, config in ((True, SolverConfig()), (False, both), (True, SolverConfig(0, 0.2))):
        spec, found = QuantSpec(4, group, symmetric, order), {}
        for name in ("torch", "cpu"):
            monkeypatch.setenv("FOEM_SOLVER", name)
            found[name] = solve(W, H, spec, config, D).quantized
        assert (found["torch"].codes != found["cpu"].codes).float().mean() < 1e-3
        assert torch.allclose(found["torch"].scales, found["cpu"].scales, rtol=0.02)


def test_what_does_not_fit_is_refused():
    arguments, extra = make(8, 8, pulls=True, drifts=True)
    for place, wrong in ((1, arguments[1].T), (2, arguments[2][:4]), (4, arguments[4].double()), (6, arguments[6].long())):
        changed = list(arguments)
        changed[place] = wrong
        with pytest.raises(ValueError, match="must be torch"):
            cpu_solver.quantize_block(*changed, **extra)
    with pytest.raises(ValueError, match="P and seen belong together"):
        cpu_solver.quantize_block(*arguments, P=extra["P"])
    with pytest.raises(ValueError, match="takes blocks of up to 128 columns, not 129"):
        cpu_solver.quantize_block(*make(129, 4)[0])


def test_the_choice(monkeypatch, caplog):
    cpu = torch.device("cpu")
    assert solver.pick(cpu, torch.float32, 128) is cpu_solver.quantize_block
    assert solver.pick(cpu, torch.float64, 128) is solver.quantize_block
    monkeypatch.setenv("FOEM_SOLVER", "torch")
    assert solver.pick(cpu, torch.float32, 128) is solver.quantize_block
    monkeypatch.setenv("FOEM_SOLVER", "cpu")
    with pytest.raises(ValueError, match="FOEM_SOLVER=cpu cannot run: takes float32, not torch.float64"):
        solver.pick(cpu, torch.float64, 128)
    monkeypatch.setenv("FOEM_SOLVER", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="FOEM_SOLVER=triton cannot run"):
        solver.pick(cpu, torch.float32, 128)
    monkeypatch.setenv("FOEM_SOLVER", "numpy")
    with pytest.raises(ValueError, match="FOEM_SOLVER=numpy does not exist; choose one of torch"):
        solver.pick(cpu, torch.float32, 128)
    monkeypatch.delenv("FOEM_SOLVER")
    solver._log_once.cache_clear()
    caplog.set_level(logging.WARNING, "foem_kernels")
    for _ in range(2):
        assert solver.pick(cpu, torch.float32, 200) is solver.quantize_block
    assert caplog.text.count("rounded one by one in torch") == 1
