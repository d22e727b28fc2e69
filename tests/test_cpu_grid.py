"""The search for the best grid in C against every level's error in float64, and against the loop in torch."""

import logging

import pytest
import torch
from foem_kernels import cpu_grid, native
from foem_kernels import grid as kernels

from foem_vllm.format import QuantSpec
from foem_vllm.grid import SHRINK, find_grid
from foem_vllm.solver import SolverConfig, solve

pytestmark = pytest.mark.skipif(native.library() is None, reason="the CPU kernels were not compiled (no C compiler?)")
ISAS = native.INSTRUCTION_SETS[: native._best() + 1] if native.library() else ()
SHAPES = [(1, 1, 16), (5, 3, 32), (16, 1, 128), (17, 2, 130), (33, 1, 1), (7, 2, 512), (2, 1, 3000)]  # rows, groups, g


def problem(rows, groups, g, bits, asymmetric, levels=26, seed=0):
    """w [rows, groups, g], scales (of float16) and zeros [levels, rows, groups], importance [groups, g]; float32."""
    r = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, groups, g, generator=r) ** 3 * 0.02
    shrink = torch.tensor(SHRINK[:levels])[:, None, None]
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    span = high - low if asymmetric else 2 * torch.maximum(-low, high)
    scales = (shrink * span / ((1 << bits) - 1)).clamp(min=2**-14).half().float()
    zeros = (-shrink * low / scales).round().clamp(0, (1 << bits) - 1) if asymmetric else None
    return w, scales, zeros, torch.rand(groups, g, generator=r) ** 2


def errors(w, scales, zeros, bits, importance):
    """[levels, rows, groups] in float64."""
    w, s = w.double(), scales.double()[..., None]
    z = torch.tensor(float(1 << (bits - 1))) if zeros is None else zeros.double()[..., None]
    codes = (torch.round(w / s) + z).clamp(0, (1 << bits) - 1)
    weight = 1.0 if importance is None else importance.double()
    return (((codes - z) * s - w) ** 2 * weight).sum(-1)


def resolution(bits):
    """How far float32 may be off, relative to a range's error. A quotient of up to 2^(bits-1) is rounded by d = 2^(bits-25) at
    most, so that near the middle of two points the wrong one may be taken: (1/2 + d)^2 instead of (1/2 - d)^2, 1 + 8 d times as
    much. The error, its square and its weight are each rounded as well."""
    return 2.0 ** (bits - 22) + 2.0**-20


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("FOEM_CPU_ISA", request.param)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_finds_the_least_error(isa, bits, asymmetric):
    """Of all levels, or one that float32 cannot tell from it; where there are none such, the very one, as in torch."""
    told = []
    for shape in SHAPES:
        w, scales, zeros, importance = problem(*shape, bits, asymmetric)
        for weight in (importance, importance[0], None):
            found = errors(w, scales, zeros, bits, weight)
            level = cpu_grid.search(w, scales, zeros, bits, weight)
            near = found <= found.amin(0) * (1 + resolution(bits))
            clear = near.sum(0) == 1
            told.append(clear.flatten())
            assert near.gather(0, level[None]).all()
            assert torch.equal(level[clear], found.argmin(0)[clear])
            reference = kernels.search_torch(w, scales, zeros, bits, weight)
            assert torch.equal(level[clear], reference[clear])
    assert torch.cat(told).float().mean() > 0.7  # ranges of one weight have many equal levels


@pytest.mark.parametrize("asymmetric", [False, True])
def test_instruction_sets_threads_and_strides_find_the_same(monkeypatch, asymmetric):
    w, scales, zeros, importance = problem(203, 3, 144, 3, asymmetric)
    padded = torch.full((203, 5, 150), torch.nan)
    padded[:, 1:4, 2:146] = w
    columns = w.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    results, before = [], torch.get_num_threads()
    try:
        for threads, name in ((1, ISAS[0]), *((2, name) for name in ISAS), (3, ISAS[-1])):
            torch.set_num_threads(threads)
            monkeypatch.setenv("FOEM_CPU_ISA", name)
            results += [cpu_grid.search(t, scales, zeros, 3, importance) for t in (w, padded[:, 1:4, 2:146], columns)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, results[0]) for each in results) and results[0].unique().numel() > 10


@pytest.mark.parametrize("shape", [(40,), (9, 40), (3, 4, 2, 40)])
def test_any_number_of_dimensions(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for part in (w, w.flip(0), w[..., ::2], w.T.contiguous().T if w.dim() == 2 else w):
        for importance in (None, torch.linspace(0, 1, part.shape[-1])):
            spec = QuantSpec(4, part.shape[-1], False)
            single, double = (
                find_grid(t, spec, search=True, importance=None if importance is None else importance.to(t))
                for t in (part, part.double())
            )
            assert single[0].shape == part.shape[:-1] and single[0].dtype == torch.float32
            assert all(torch.equal(a.double(), b) for a, b in zip(single, double))


def test_equal_errors_leave_the_widest_range(isa):
    spec = QuantSpec(4, 32)
    w = torch.randn(20, 32)
    w[3] = 0
    scale, _ = find_grid(w, spec, search=True)
    assert scale[3] == 1
    assert torch.equal(find_grid(w, spec, search=True, importance=torch.zeros(32))[0], find_grid(w, spec)[0])
    huge = torch.full((3, 32), 3e38)  # its squared errors are infinite at every level
    assert torch.equal(find_grid(huge, spec, search=True)[0], find_grid(huge, spec)[0])
    scales = torch.ones(30, 20)
    scales[7] = scales[19] = 2.0**-3  # twice the same, the best
    assert (cpu_grid.search(torch.rand(20, 32) - 0.5, scales, None, 4) == 7).all()


@pytest.mark.parametrize("order", ["none", "group", "static", "full"])
def test_whole_layers_get_the_same_grid(order, monkeypatch):
    r = torch.Generator().manual_seed(0)
    x, W = torch.randn(500, 256, generator=r), torch.randn(70, 256, generator=r)
    for spec in (QuantSpec(4, 64, True, order), QuantSpec(3, 128, False, order), QuantSpec(4, -1, True, order)):
        codes = {}
        for name in ("torch", "cpu"):
            monkeypatch.setattr(kernels, "search", cpu_grid.search if name == "cpu" else kernels.search_torch)
            codes[name] = solve(W, x.T @ x / 500, spec, SolverConfig(grid="search")).quantized
        assert torch.equal(codes["torch"].codes, codes["cpu"].codes)
        assert torch.equal(codes["torch"].scales, codes["cpu"].scales)


def test_what_does_not_fit_is_refused():
    w, scales, zeros, importance = problem(4, 3, 32, 4, True)
    for arguments, said in [
        ((w.double(), scales, zeros, 4), "takes float32, not torch.float64"),
        ((w, scales.repeat(2, 1, 1), zeros, 4), "1 to 32 levels, not 52"),
        ((w, scales[:0], zeros, 4), "1 to 32 levels, not 0"),
        ((w, scales[:, :3], zeros, 4), r"scales must be torch.float32 \[26, 4, 3\] on the CPU; found torch.float32 \[26, 3, 3\]"),
        ((w, scales, zeros.double(), 4), r"zeros must be .* found torch.float64"),
        ((w, scales, zeros, 4, importance[:2]), r"importance must be torch.float32 \[3, 32\]"),
    ]:
        with pytest.raises(ValueError, match=said):
            cpu_grid.search(*arguments)
    assert "not cuda" in cpu_grid.supports("cuda", torch.float32)
    assert cpu_grid.search(w[:0], scales[:, :0], None, 4).shape == (0, 3)


def test_the_choice(monkeypatch, caplog):
    arguments = problem(4, 3, 32, 4, False)
    called = []
    for module, name in ((cpu_grid, "search"), (kernels, "search_torch")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=original: called.append(n) or f(*a))
    w, scales, _, importance = arguments
    kernels.search(w, scales, None, 4, importance)
    kernels.search(w.double(), scales.double(), None, 4, importance.double())
    monkeypatch.setenv("FOEM_SOLVER", "torch")
    kernels.search(w, scales, None, 4, importance)
    assert called == ["search", "search_torch", "search_torch"]
    monkeypatch.delenv("FOEM_SOLVER")
    monkeypatch.setattr(native, "library", lambda: None)
    kernels._log_once.cache_clear()
    caplog.set_level(logging.WARNING, "foem_kernels")
    for _ in range(2):
        kernels.search(w, scales, None, 4, importance)
    assert called[3:] == ["search_torch"] * 2 and caplog.text.count("grids are searched in torch") == 1
