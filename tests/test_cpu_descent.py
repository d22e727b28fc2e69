"""Coordinate descent in C: against trying every step on numbers that floats hold exactly, and against the loop in torch."""

import logging

import pytest
import torch
from foem_kernels import cpu_descent, native
from foem_kernels import descent as kernels

from foem_vllm.descent import descend
from foem_vllm.format import QuantSpec
from foem_vllm.grid import round_to_nearest

pytestmark = pytest.mark.skipif(native.library() is None, reason="the CPU kernels were not compiled (no C compiler?)")
ISAS = native.INSTRUCTION_SETS[: native._best() + 1] if native.library() else ()
SHAPES = [(1, 16), (3, 1), (5, 40), (16, 128), (9, 250), (40, 515)]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("FOEM_CPU_ISA", request.param)


def problem(n, k, bits=3, seed=0):
    """(codes, slope, size, cost, H, top) of a layer whose codes are far from the best."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * k + 4, k, generator=g) @ (torch.eye(k) + 0.5 * torch.randn(k, k, generator=g) / k**0.5)
    H = x.T @ x / len(x)
    size = torch.rand(n, k, generator=g) * 0.02 + 0.01
    codes = torch.randint(0, 1 << bits, (n, k), generator=g, dtype=torch.uint8)
    missed = (torch.rand(n, k, generator=g) - 0.5) * size * 1.5
    return codes, (missed @ H) * size, size, size.square() * (H.diagonal() / 2), (H + H.T) / 2, (1 << bits) - 1


def by_trying_every_step(codes, missed, size, H, top, steps):
    """The same for whole numbers, in float64: codes after each row took the steps that lower its error most."""
    codes, missed, H = codes.long(), missed.double(), H.double()
    for row in range(len(codes)):
        for _ in range(steps):
            now, best, found = missed[row] @ H @ missed[row], 0.0, None
            for j in range(codes.shape[1]):
                for step in (-1, 1):
                    if 0 <= codes[row, j] + step <= top:
                        e = missed[row].clone()
                        e[j] += step * size[row, j]
                        if e @ H @ e - now < best:
                            best, found = float(e @ H @ e - now), (j, step, e)
            if found is None:
                break
            codes[row, found[0]] += found[1]
            missed[row] = found[2]
    return codes


@pytest.mark.parametrize("seed", range(4))
def test_equals_trying_every_step(isa, seed):
    g = torch.Generator().manual_seed(seed)
    n, k, bits = 4, (16, 24, 33, 7)[seed], (2, 3, 4, 2)[seed]
    a = torch.randint(-2, 3, (2 * k, k), generator=g).float()
    H, size = a.T @ a, torch.tensor([1.0, 2.0, 4.0])[torch.randint(0, 3, (n, k), generator=g)]
    codes = torch.randint(0, 1 << bits, (n, k), generator=g, dtype=torch.uint8)
    missed = torch.randint(-3, 4, (n, k), generator=g).float()
    for steps in (1, 3, 20):
        found, cost, top = codes.clone(), size.square() * (H.diagonal() / 2), (1 << bits) - 1
        taken = cpu_descent.descend(found, (missed @ H) * size, size, cost, H, top, steps)
        assert torch.equal(found.long(), by_trying_every_step(codes, missed, size, H, top, steps))
        assert taken > 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equals_the_loop_in_torch(isa, bits):
    for seed, (n, k) in enumerate(SHAPES):
        codes, *others = problem(n, k, bits, seed)
        for steps in (1, max(1, k // 5), 3 * min(k, 100)):
            ours, theirs = codes.clone(), codes.clone()
            before = [t.clone() for t in others[:-1]]
            taken = cpu_descent.descend(ours, *others, steps)
            assert taken == kernels.descend_torch(theirs, *others, steps)
            assert torch.equal(ours, theirs)
            assert all(torch.equal(a, b) for a, b in zip(before, others))  # what is given stays as it is
        assert k < 7 or taken > 0


def test_products_are_rounded_before_they_are_added(isa):
    """Column 0 moves first; what that leaves in column 1 ties with column 2, unless a fused multiply-add skips a rounding."""
    n, k, h = 64, 16, 0.7310586
    g = torch.Generator().manual_seed(0)
    size, slope, cost, H = torch.rand(n, k, generator=g) + 0.5, torch.zeros(n, k), torch.full((n, k), 99.0), torch.zeros(k, k)
    size[:, 0], slope[:, 0], cost[:, 0], H[0, 0] = 1.0, -10.0, 5.0, 10.0
    slope[:, 1], cost[:, 1:3], H[0, 1] = -2.0 - torch.rand(n, generator=g), 0.0, h
    slope[:, 2] = slope[:, 1] + size[:, 1] * H[0, 1]
    codes = torch.full((n, k), 3, dtype=torch.uint8)
    assert cpu_descent.descend(codes, slope, size, cost, H, 7, 2) == 2 * n
    assert codes[:, :3].tolist() == [[4, 4, 3]] * n


def test_neither_threads_nor_strides_change_it(isa):
    codes, *others = problem(37, 100)
    expected = codes.clone()
    cpu_descent.descend(expected, *others, 30)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            wide = torch.zeros(37, 200, dtype=torch.uint8)
            wide[:, ::2] = codes
            strided = [t.T.contiguous().T if isinstance(t, torch.Tensor) else t for t in others]
            cpu_descent.descend(wide[:, ::2], *strided, 30)
            assert torch.equal(wide[:, ::2], expected) and not wide[:, 1::2].any()
    finally:
        torch.set_num_threads(threads)


def test_whole_layers_get_the_same_codes(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(300, 192, generator=g), torch.randn(50, 192, generator=g)
    H = x.T @ x / 300 + 0.3
    for spec in (QuantSpec(3, 64), QuantSpec(2, 32, False), QuantSpec(4, -1)):
        q, found = round_to_nearest(W, spec), {}
        for name in ("cpu", "torch"):
            monkeypatch.setattr(kernels, "descend", cpu_descent.descend if name == "cpu" else kernels.descend_torch)
            found[name] = descend(q, spec, W, H)
        assert found["cpu"][1] == found["torch"][1] > 0 and torch.equal(found["cpu"][0].codes, found["torch"][0].codes)


def test_what_does_not_fit_is_refused():
    codes, slope, size, cost, H, top = problem(4, 32)
    for arguments, said in [
        ((codes, slope.double(), size, cost, H), "takes float32, not torch.float64"),
        ((codes.int(), slope, size, cost, H), "codes must be torch.uint8"),
        ((codes, slope, size[:2], cost, H), r"size must be torch.float32 \[4, 32\] on the CPU; found torch.float32 \[2, 32\]"),
        ((codes, slope, size, cost.half(), H), "cost must be .* found torch.float16"),
        ((codes, slope, size, cost, H[:5]), r"H must be torch.float32 \[32, 32\]"),
    ]:
        with pytest.raises(ValueError, match=said):
            cpu_descent.descend(*arguments, top, 5)
    assert "not cuda" in cpu_descent.supports("cuda", torch.float32)
    assert cpu_descent.descend(codes[:0], slope[:0], size[:0], cost[:0], H, top, 5) == 0


def test_the_choice(monkeypatch, caplog):
    codes, *others = problem(4, 32)
    double = [t.double() if isinstance(t, torch.Tensor) else t for t in others]
    called = []
    for module, name in ((cpu_descent, "descend"), (kernels, "descend_torch")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=original: called.append(n) or f(*a))
    kernels.descend(codes.clone(), *others, 5)
    kernels.descend(codes.clone(), *double, 5)
    monkeypatch.setenv("FOEM_SOLVER", "torch")
    kernels.descend(codes.clone(), *others, 5)
    assert called == ["descend", "descend_torch", "descend_torch"]
    monkeypatch.delenv("FOEM_SOLVER")
    monkeypatch.setattr(native, "library", lambda: None)
    kernels._log_once.cache_clear()
    caplog.set_level(logging.WARNING, "foem_kernels")
    for _ in range(2):
        kernels.descend(codes.clone(), *others, 5)
    assert called[3:] == ["descend_torch"] * 2 and caplog.text.count("codes descend in torch") == 1
