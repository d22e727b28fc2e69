"""The CPU kernel against float64, within bounds that follow from what it rounds."""
import itertools

import foem_kernels
import pytest
import torch
from foem_kernels import Problem
from foem_kernels.cpu_w4a16 import CpuW4A16, has_wna16, layout, tinygemm_group

KERNEL = CpuW4A16()

try:
    import vllm.platforms
    vllm.platforms.current_platform.import_kernels()
except ImportError:
    pass
needs_wna16 = pytest.mark.skipif(not has_wna16(), reason="vLLM's CPU extension is not installed")


def problem(n, k, group, dtype=torch.bfloat16, symmetric=True, act_order=False, bits=4, device="cpu"):
    return Problem(n, k, bits, group, symmetric, dtype, device, act_order)


def make(p: Problem, seed: int = 0):
    """codes [n, k], scales [n, g] exact in fp16, zeros, g_idx."""
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (p.n, p.k), dtype=torch.uint8, generator=gen)
    scales = (torch.rand(p.n, p.groups, generator=gen) * 0.01 + 0.002).half().float()
    zeros = None if p.symmetric else torch.randint(0, 16, (p.n, p.groups), dtype=torch.uint8, generator=gen)
    g_idx = (torch.arange(p.k) // p.group_size)[torch.randperm(p.k, generator=gen)].int() if p.act_order else None
    return codes, scales, zeros, g_idx


def expected(x, codes, scales, zeros, g_idx, p: Problem):
    """(y, bound) in float64, by a loop over groups that shares no code with the kernels.

    Bound, with u the unit roundoff of the dtype: u |y| for the result; the two operators round the scale and the offset
    (8 - zero) * scale, or the scale and the weight: at most u |x| (|s (q-8)| + |s (8-z)|) or 2u |x| |w|. The sum of both covers
    either. fp32 accumulation adds K 2**-24 of the same sum; 1.01 is for products of two roundings.
    """
    y = torch.zeros(x.shape[0], p.n, dtype=torch.float64)
    terms = torch.zeros_like(y)
    for g in range(p.groups):
        columns = torch.arange(g * p.group_size, (g + 1) * p.group_size) if g_idx is None else (g_idx == g).nonzero()[:, 0]
        q, s = codes[:, columns].double(), scales[:, g:g + 1].double()
        z = 8.0 if zeros is None else zeros[:, g:g + 1].double()
        xg = x[:, columns].double()
        y += xg @ (s * (q - z)).T
        terms += xg.abs() @ (s * ((q - 8).abs() + abs(8 - z) + (q - z).abs())).T
    u = torch.finfo(p.dtype).eps / 2
    return y, 1.01 * (u * y.abs() + (u + p.k * 2.0**-24) * terms)


def assert_close(p: Problem, m: int, bias: bool = False, shift: float = 0.0):
    parts = make(p)
    x = (torch.randn(m, p.k, generator=torch.Generator().manual_seed(1)) + shift).to(p.dtype)
    w = foem_kernels.prepare(*parts, bits=4, group_size=p.group_size, dtype=p.dtype, device="cpu", kernel="cpu_w4a16")
    b = torch.randn(p.n).to(p.dtype) if bias else None
    y, bound = expected(x, *parts, p)
    if bias:
        y = y + b.double()
        bound = bound + 2 * torch.finfo(p.dtype).eps * (y.abs() + b.double().abs())
    out = foem_kernels.gemm(x, w, b)
    assert out.dtype == p.dtype and out.shape == (m, p.n)
    error = (out.double() - y).abs()
    assert bool((error <= bound).all()), f"{float((error / bound).max()):.2f} times the bound"


@pytest.mark.parametrize("symmetric,act_order", list(itertools.product((True, False), (False, True))))
@pytest.mark.parametrize("group", [32, 64, 128, 256, 512])
def test_bf16(group, symmetric, act_order):
    p = problem(48, 512, group, symmetric=symmetric, act_order=act_order)
    assert layout(p) == ("tinygemm", "")
    for m in (1, 3, 4, 5, 17, 64):
        assert_close(p, m)


@needs_wna16
@pytest.mark.parametrize("symmetric,act_order", list(itertools.product((True, False), (False, True))))
@pytest.mark.parametrize("group", [16, 32, 128, 512])
def test_fp16(group, symmetric, act_order):
    p = problem(64, 512, group, torch.float16, symmetric, act_order)
    assert layout(p) == ("wna16", "")
    for m in (1, 5, 64):
        assert_close(p, m, bias=m == 5)


@needs_wna16
def test_bf16_group_that_only_wna16_takes():
    p = problem(64, 480, 48, symmetric=False)
    assert layout(p) == ("wna16", "")
    assert_close(p, 7)


@pytest.mark.parametrize("shape", [(16, 32, 32), (48, 96, 96), (6144, 1024, 128), (1024, 3072, 128), (80, 160, 160)])
def test_shapes(shape):
    assert_close(problem(*shape), 3, bias=True)


def test_activations_with_a_large_mean_do_not_cancel_badly():
    """The offset of an asymmetric group meets the sum of its activations: the worst case for a rounded offset."""
    assert_close(problem(64, 512, 128, symmetric=False), 4, shift=3.0)


def test_relative_error_is_that_of_dense_bf16():
    """Two independent roundings (scale, result) of u/sqrt(3) at most each; dense bf16 has the same two (weight, result)."""
    p = problem(1024, 1024, 128)
    parts = make(p)
    x = torch.randn(8, p.k, generator=torch.Generator().manual_seed(2)).bfloat16()
    w = foem_kernels.prepare(*parts, bits=4, group_size=128, dtype=p.dtype, device="cpu", kernel="cpu_w4a16")
    y, _ = expected(x, *parts, p)
    error = float((foem_kernels.gemm(x, w).double() - y).norm() / y.norm())
    assert error < (2 / 3) ** 0.5 * 2.0**-8


def test_three_dimensions_and_no_rows():
    p = problem(32, 64, 32)
    w = foem_kernels.prepare(*make(p), bits=4, group_size=32, dtype=p.dtype, device="cpu", kernel="cpu_w4a16")
    x = torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(foem_kernels.gemm(x, w)[1, 2], foem_kernels.gemm(x[1, 2:3], w)[0])
    assert foem_kernels.gemm(x[:0], w).shape == (0, 3, 32)


@pytest.mark.parametrize("act_order", [False, True])
def test_compile_keeps_one_graph(act_order):
    p = problem(32, 64, 32, act_order=act_order)
    w = foem_kernels.prepare(*make(p), bits=4, group_size=32, dtype=p.dtype, device="cpu", kernel="cpu_w4a16")
    compiled = torch.compile(lambda x: foem_kernels.gemm(x, w) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (2, 3, 5):
        x = torch.randn(m, 64).bfloat16()
        assert torch.equal(compiled(x), foem_kernels.gemm(x, w) * 2)


def test_operator_registration_is_consistent():
    p = problem(32, 64, 32, symmetric=False)
    w = KERNEL.prepare(*make(p), p)
    torch.library.opcheck(torch.ops.foem.cpu_w4a16.default, (torch.randn(3, 64).bfloat16(), w["weight"], w["scales"], w["zeros"],
                                                             w["order"], None, w["group"], p.n),
                          test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("p,said", [
    (problem(32, 64, 32, device="cuda"), "cpu"),
    (problem(32, 64, 32, bits=8), "4-bit"),
    (problem(32, 80, 32), "whole groups"),
    (problem(24, 64, 32), "N % 16"),
    (problem(32, 64, 32, torch.float32), "bfloat16"),
])
def test_refusals_say_why(p, said):
    assert said in KERNEL.supports(p)
    with pytest.raises(ValueError, match="cpu_w4a16"):
        foem_kernels.choose(p, "cpu_w4a16")


def test_uneven_activation_order_is_refused():
    p = problem(32, 64, 32, act_order=True)
    codes, scales, zeros, g_idx = make(p)
    g_idx[g_idx == 1] = 0
    with pytest.raises(ValueError, match="32 columns"):
        KERNEL.prepare(codes, scales, zeros, g_idx, p)


def test_group_choice():
    assert [tinygemm_group(g) for g in (32, 96, 128, 384, 4096, 48)] == [32, 32, 128, 128, 256, None]
