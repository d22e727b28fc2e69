"""The CPU kernel against float64, on every instruction set of this machine, within bounds that follow from what it rounds."""

import pathlib
import random

import foem_kernels
import pytest
import torch
from foem_kernels import Problem, native
from foem_kernels.cpu_w4a16 import CpuW4A16, stored_bits

KERNEL = CpuW4A16()
FOLDER = pathlib.Path(foem_kernels.__file__).parent
pytestmark = pytest.mark.skipif(native.library() is None, reason="the CPU kernels were not compiled (no C compiler?)")
AVAILABLE = native.INSTRUCTION_SETS[: native.library().foem_cpu_isa() + 1] if native.library() else ()
needs_int8 = pytest.mark.skipif(
    native.library() is None or not native.library().foem_cpu_has_int8(), reason="this CPU has no AVX-512 VNNI"
)


@pytest.fixture(params=native.INSTRUCTION_SETS)
def isa(request, monkeypatch):
    if request.param not in AVAILABLE:
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("FOEM_CPU_ISA", request.param)
    return request.param


def problem(n, k, group, dtype=torch.bfloat16, symmetric=True, act_order=False, bits=4, device="cpu"):
    return Problem(n, k, bits, group, symmetric, dtype, device, act_order)


def make(p: Problem, seed: int = 0):
    """codes [n, k], scales [n, g] exact in fp16, zeros, g_idx."""
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << p.bits, (p.n, p.k), dtype=torch.uint8, generator=gen)
    scales = (torch.rand(p.n, p.groups, generator=gen) * 0.01 + 0.002).half().float()
    zeros = None if p.symmetric else torch.randint(0, 1 << p.bits, (p.n, p.groups), dtype=torch.uint8, generator=gen)
    g_idx = (torch.arange(p.k) // p.group_size)[torch.randperm(p.k, generator=gen)].int() if p.act_order else None
    return codes, scales, zeros, g_idx


def expected(x, codes, scales, zeros, g_idx, p: Problem):
    """(y, bound) in float64, by a loop over groups that shares no code with the kernel.

    Bound, with u the unit roundoff of the result: u |y| for the result, and K 2**-24 of |x| scale (code + zero), the terms that
    are added up in float32; nothing else is rounded. 1.01 is for products of two roundings.
    """
    y = torch.zeros(x.shape[0], p.n, dtype=torch.float64)
    terms = torch.zeros_like(y)
    for g in range(p.groups):
        last = min((g + 1) * p.group_size, p.k)
        columns = torch.arange(g * p.group_size, last) if g_idx is None else (g_idx == g).nonzero()[:, 0]
        q, s = codes[:, columns].double(), scales[:, g : g + 1].double()
        z = float(p.mid) if zeros is None else zeros[:, g : g + 1].double()
        xg = x[:, columns].double()
        y += xg @ (s * (q - z)).T
        terms += xg.abs() @ (s * (q + z)).T
    u = torch.finfo(p.dtype).eps / 2
    return y, 1.01 * (u * y.abs() + p.k * 2.0**-24 * terms) + torch.finfo(p.dtype).tiny


def assert_close(p: Problem, m: int, bias: bool = False, shift: float = 0.0):
    parts = make(p)
    gen = torch.Generator().manual_seed(1)
    x = (torch.randn(m, p.k, generator=gen) + shift).to(p.dtype)
    w = foem_kernels.prepare(*parts, bits=p.bits, group_size=p.group_size, dtype=p.dtype, device="cpu", kernel="cpu_w4a16")
    b = torch.randn(p.n, generator=gen).to(p.dtype) if bias else None
    y, bound = expected(x, *parts, p)
    if bias:
        y += b.double()
        bound += torch.finfo(p.dtype).eps * b.double().abs()
    found = foem_kernels.gemm(x, w, b)
    assert found.dtype == p.dtype and found.shape == (m, p.n)
    worst = ((found.double() - y).abs() / bound).max()
    assert worst <= 1, f"{p}, {m} rows: {worst:.3f} of the bound"


CASES = [
    problem(64, 256, 128),
    problem(33, 128, 32, torch.float16, symmetric=False),
    problem(96, 192, 64, torch.float32),
    problem(5, 77, 77, symmetric=False),
    problem(50, 200, 40, torch.float16),
    problem(40, 128, 128, act_order=True),
    problem(40, 160, 32, torch.float32, symmetric=False, act_order=True),
    problem(31, 96, 24, bits=8),
    problem(64, 68, 68, torch.float16, symmetric=False, bits=8),
    problem(32, 64, 4, torch.float32, bits=8),
    problem(48, 128, 64, symmetric=False, bits=3),
    problem(48, 128, 64, torch.float16, bits=2),
    problem(34, 100, 64, torch.float32),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_equals_float64(case, isa):
    for m, bias in ((1, False), (2, True), (3, False), (7, True), (12, False), (29, True)):
        assert_close(CASES[case], m, bias)


def test_more_rows_than_are_converted_at_a_time(isa):
    assert_close(problem(33, 64, 32), 500)


def test_activations_far_from_zero(isa):
    """Their sum is multiplied by the zero point and taken off again."""
    for dtype in (torch.float32, torch.bfloat16):
        assert_close(problem(64, 512, 128, dtype, symmetric=False), 3, shift=50.0)


def test_random_shapes(isa):
    choice = random.Random(AVAILABLE.index(isa))
    for _ in range(40):
        bits = choice.choice((2, 3, 4, 4, 4, 8))
        group = choice.choice((8, 16, 24, 32, 64, 128, 256))
        groups = choice.randint(1, 5)
        act_order = choice.random() < 0.3
        k = group * groups if act_order or choice.random() < 0.7 else max(1, group * groups - choice.randint(1, group - 1))
        dtype = choice.choice((torch.float32, torch.float16, torch.bfloat16))
        p = problem(choice.randint(1, 130), k, min(group, k), dtype, choice.random() < 0.5, act_order, bits)
        if KERNEL.supports(p):
            assert p.groups > 1 and p.group_size % 8
            continue
        assert_close(p, choice.choice((1, 2, 4, 5, 9, 17)), choice.random() < 0.5)


def test_any_strides_and_alignment(isa):
    p = problem(40, 64, 32)
    parts = make(p)
    w = foem_kernels.prepare(*parts, bits=4, group_size=32, dtype=p.dtype, device="cpu", kernel="cpu_w4a16")
    storage = torch.randn(10 * 64 + 1).to(p.dtype)
    x = storage[1:].view(10, 64)  # two bytes off any alignment
    wanted = foem_kernels.gemm(x.clone(), w)
    assert torch.equal(foem_kernels.gemm(x, w), wanted)
    assert torch.equal(foem_kernels.gemm(x.T.contiguous().T, w), wanted)
    assert torch.equal(foem_kernels.gemm(x.repeat(1, 2)[:, :64], w), wanted)
    assert torch.equal(foem_kernels.gemm(x.view(2, 5, 64), w), wanted.view(2, 5, 40))
    assert foem_kernels.gemm(x[:0], w).shape == (0, 40)


def test_rows_with_inf_or_nan_leave_the_others_alone(isa):
    for dtype in (torch.float32, torch.bfloat16):
        p = problem(40, 64, 32, dtype)
        w = foem_kernels.prepare(*make(p), bits=4, group_size=32, dtype=dtype, device="cpu", kernel="cpu_w4a16")
        x = torch.randn(13, 64).to(dtype)
        wanted = foem_kernels.gemm(x, w)
        x[3, 5], x[7, 60] = float("inf"), float("nan")
        found = foem_kernels.gemm(x, w)
        others = [i for i in range(13) if i not in (3, 7)]
        assert torch.equal(found[others], wanted[others])
        assert not torch.isfinite(found[3]).any() and torch.isnan(found[7]).all()


def test_same_result_on_any_number_of_threads(isa):
    p = problem(200, 256, 64, torch.float16, symmetric=False)
    w = foem_kernels.prepare(*make(p), bits=4, group_size=64, dtype=p.dtype, device="cpu", kernel="cpu_w4a16")
    x, before = torch.randn(30, 256).half(), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(foem_kernels.gemm(x, w))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_int8
def test_int8_activations(monkeypatch):
    """Within half a step of each element's quantization, and only where they were asked for."""
    monkeypatch.setenv("FOEM_CPU_ACT", "int8")
    for p in (
        problem(40, 256, 64), problem(64, 128, 128, torch.float32, symmetric=False), problem(33, 96, 32, act_order=True),
        problem(40, 256, 64, bits=8), problem(70, 512, 512, torch.float16, symmetric=False, bits=8),
    ):  # fmt: skip
        parts = make(p)
        x = torch.randn(14, p.k, generator=torch.Generator().manual_seed(1)).to(p.dtype)
        x[2] = 0
        w = foem_kernels.prepare(*parts, bits=p.bits, group_size=p.group_size, dtype=p.dtype, device="cpu", kernel="cpu_w4a16")
        y, bound = expected(x, *parts, p)
        step = x.double().abs().amax(1, keepdim=True) / 127
        size = expected(torch.ones(1, p.k), *parts, p)[1] * 0
        for g in range(p.groups):
            columns = (torch.arange(p.k) // p.group_size if parts[3] is None else parts[3]) == g
            zero = float(p.mid) if parts[2] is None else parts[2][:, g : g + 1].double()
            size += ((parts[0][:, columns].double() - zero).abs() * parts[1][:, g : g + 1].double()).sum(1)
        found = foem_kernels.gemm(x, w).double()
        assert ((found - y).abs() <= bound + 0.5001 * step * size).all()
        assert not (found - y).abs().le(bound).all()  # it really was quantized
        assert (found[2] == 0).all()


def test_what_is_forced_and_cannot_run_is_refused(monkeypatch):
    p = problem(32, 64, 32)
    monkeypatch.setenv("FOEM_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match="FOEM_CPU_ISA=avx1024: choose one of portable"):
        foem_kernels.prepare(*make(p), bits=4, group_size=32, dtype=p.dtype, device="cpu", kernel="cpu_w4a16")
    monkeypatch.delenv("FOEM_CPU_ISA")
    monkeypatch.setenv("FOEM_CPU_ACT", "int4")
    with pytest.raises(ValueError, match="FOEM_CPU_ACT=int4: choose exact or int8"):
        foem_kernels.prepare(*make(p), bits=4, group_size=32, dtype=p.dtype, device="cpu", kernel="cpu_w4a16")


@pytest.mark.parametrize(
    "p, reason",
    [
        (problem(32, 64, 32, device="cuda"), "runs on cpu, not cuda"),
        (problem(32, 64, 32, bits=5), "not 5-bit"),
        (problem(32, 64, 32, torch.float64), "not torch.float64"),
        (problem(32, 60, 20), "needs a group_size that 8 divides, or one group per row, not 20"),
        (problem(32, 60, 6, bits=8), "that 4 divides"),
        (problem(32, 60, 32, act_order=True), "whole groups with act-order"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(p, reason):
    assert reason in KERNEL.supports(p)


def test_activation_order_with_uneven_groups_is_refused():
    p = problem(32, 64, 32, act_order=True)
    codes, scales, zeros, g_idx = make(p)
    g_idx[:] = 0
    with pytest.raises(ValueError, match="g_idx does not give every group 32 columns"):
        foem_kernels.prepare(codes, scales, zeros, g_idx, bits=4, group_size=32, dtype=p.dtype, device="cpu", kernel="cpu_w4a16")


def test_without_the_library_it_says_why(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert "not compiled" in KERNEL.supports(problem(32, 64, 32))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_memory_is_that_of_the_stored_codes(bits):
    p = problem(128, 512, 128, bits=bits)
    w = KERNEL.prepare(*make(p), p)
    assert w["weight"].numel() * 4 == 128 * 512 * stored_bits(bits) // 8 and w["scales"].numel() * 4 == 128 * 4 * 4


def test_torch_knows_the_operator():
    p = problem(40, 64, 32, symmetric=False, act_order=True)
    w = KERNEL.prepare(*make(p), p)
    arguments = (w["weight"], w["scales"], w["zeros"], w["order"], torch.randn(40).bfloat16(), 40, 4, 32, 8.0, w["isa"], False)
    torch.library.opcheck(torch.ops.foem.cpu_w4a16.default, (torch.randn(3, 64).bfloat16(), *arguments))

    def around(x):
        return torch.ops.foem.cpu_w4a16(x * 2, *arguments) + 1

    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(torch.compile(around, fullgraph=True, dynamic=True, backend="eager")(x), around(x))
