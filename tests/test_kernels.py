"""Registry, reference and what every kernel owes its callers, over each kernel of foem_kernels.KERNELS that runs here."""
import itertools
import logging

import foem_kernels
import pytest
import torch
from foem_kernels import KERNELS, Problem, choose, registry

UNIT = {torch.float32: 2.0 ** -24, torch.float16: 2.0 ** -11, torch.bfloat16: 2.0 ** -8}
N, K = 64, 256


def problem(**change):
    values = {"n": N, "k": K, "bits": 4, "group_size": 64, "symmetric": True, "dtype": torch.bfloat16, "device": "cpu"}
    return Problem(**(values | change))


def runnable():
    """(kernel name, dtype, symmetric, group size, act-order) of every combination that a kernel supports on this machine."""
    for kernel, dtype, symmetric, g, order in itertools.product(
            KERNELS, UNIT, (True, False), (32, 128, K), (False, True)):
        if kernel.supports(problem(dtype=dtype, symmetric=symmetric, group_size=g, act_order=order)) is None:
            yield kernel.name, dtype, symmetric, g, order


RUNNABLE = list(runnable())
ONE_EACH = list({case[0]: case for case in RUNNABLE}.values())


def weights(dtype, symmetric=True, g=64, order=False, bits=4, n=N, k=K, seed=0):
    r = torch.Generator().manual_seed(seed)
    groups = -(-k // g)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=r)
    scales = (torch.rand(n, groups, generator=r) * 0.02 + 0.001).half().float()
    zeros = None if symmetric else torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8, generator=r)
    g_idx = (torch.arange(k) // g)[torch.randperm(k, generator=r)].int() if order else None
    bias = torch.randn(n, generator=r).to(dtype)
    return codes, scales, zeros, g_idx, bias


def prepared(name, dtype, symmetric, g, order):
    codes, scales, zeros, g_idx, bias = weights(dtype, symmetric, g, order)
    return foem_kernels.prepare(codes, scales, zeros, g_idx, bits=4, group_size=g, dtype=dtype, device="cpu", kernel=name), bias


def activations(dtype, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def check(y, x, codes, scales, zeros, g_idx, bias, bits=4):
    """Against float64, element by element.

    A kernel may round the scale and the offset (mid - zero) * scale to the activations' dtype, then the weight, then the
    result; it adds up in fp32. Each step contributes one unit roundoff of what it rounds.
    """
    k, u, mid = codes.shape[1], UNIT[y.dtype], 1 << bits - 1
    group = torch.arange(k) // -(-k // scales.shape[1]) if g_idx is None else g_idx.long()
    s = scales.double()[:, group]
    z = torch.full_like(s, mid) if zeros is None else zeros.double()[:, group]
    w = s * (codes.double() - z)
    rounded = s * ((codes.double() - mid).abs() + (mid - z).abs()) + w.abs()
    x = x.double()
    y64, magnitude = x @ w.T + bias.double(), x.abs() @ rounded.T + bias.double().abs()
    error = 1.01 * u * (x.abs() @ rounded.T) + (k + 2) * 2.0 ** -24 * magnitude
    worst = ((y.double() - y64).abs() / (error + u * (y64.abs() + error) + 2.0 ** -24)).max()
    assert worst <= 1, f"{worst:.2f} x the bound"


@pytest.mark.parametrize("case", RUNNABLE, ids=str)
@pytest.mark.parametrize("m", [1, 5, 33])
def test_against_float64(case, m):
    name, dtype, symmetric, g, order = case
    p, bias = prepared(*case)
    assert p.kernel.name == name
    x = activations(dtype, m, K)
    check(foem_kernels.gemm(x, p, bias), x, *weights(dtype, symmetric, g, order))


@pytest.mark.parametrize("case", RUNNABLE, ids=str)
def test_integers_come_out_exact(case):
    """Small integers and scales that are powers of two leave nothing to round before the result, in any order of summation."""
    name, dtype, symmetric, g, order = case
    codes, scales, zeros, g_idx, _ = weights(dtype, symmetric, g, order)
    scales = 2.0 ** -torch.randint(0, 3, scales.shape, generator=torch.Generator().manual_seed(2)).float()
    x = torch.randint(-3, 4, (3, K), generator=torch.Generator().manual_seed(3))
    p = foem_kernels.prepare(codes, scales, zeros, g_idx, bits=4, group_size=g, dtype=dtype, device="cpu", kernel=name)
    group = torch.arange(K) // g if g_idx is None else g_idx.long()
    w = scales.double()[:, group] * (codes.double() - (8 if zeros is None else zeros.double()[:, group]))
    assert torch.equal(foem_kernels.gemm(x.to(dtype), p), (x.double() @ w.T).to(dtype))


@pytest.mark.parametrize("bits, k, g", [(2, 256, 64), (3, 256, 32), (8, 256, 64), (4, 100, 64), (3, 40, 40)])
def test_reference_takes_any_width_and_ragged_groups(bits, k, g):
    codes, scales, zeros, _, bias = weights(torch.float32, False, g, bits=bits, k=k)
    p = foem_kernels.prepare(codes, scales, zeros, bits=bits, group_size=g, dtype=torch.float32, device="cpu", kernel="reference")
    x = activations(torch.float32, 4, k)
    group = (torch.arange(k) // g).int()
    check(foem_kernels.gemm(x, p, bias), x, codes, scales, zeros, group, bias, bits)


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
class TestEveryKernel:
    def test_no_rows(self, case):
        p, bias = prepared(*case)
        assert foem_kernels.gemm(torch.empty(0, K, dtype=case[1]), p, bias).shape == (0, N)
        assert foem_kernels.gemm(torch.empty(2, 0, K, dtype=case[1]), p, bias).shape == (2, 0, N)

    def test_leading_dimensions_and_strides(self, case):
        p, bias = prepared(*case)
        x = activations(case[1], 2, 3, K)
        wanted = foem_kernels.gemm(x.view(6, K), p, bias)
        assert torch.equal(foem_kernels.gemm(x, p, bias), wanted.view(2, 3, N))
        spread = torch.empty(2, 3, 2 * K, dtype=case[1])[..., ::2].copy_(x)
        assert not spread.is_contiguous()
        assert torch.equal(foem_kernels.gemm(spread, p, bias), wanted.view(2, 3, N))
        assert torch.equal(foem_kernels.gemm(x[0, 0], p, bias), foem_kernels.gemm(x[0, :1], p, bias)[0])

    def test_bad_rows_stay_alone(self, case):
        p, bias = prepared(*case)
        x = activations(case[1], 5, K)
        wanted = foem_kernels.gemm(x, p, bias)
        x[1, 3], x[3, 200] = float("inf"), float("nan")
        y = foem_kernels.gemm(x, p, bias)
        assert torch.equal(y[[0, 2, 4]], wanted[[0, 2, 4]])
        assert not y[1].isfinite().any() and y[3].isnan().all()

    def test_nothing_is_mutated(self, case):
        name, dtype, symmetric, g, order = case
        given = weights(dtype, symmetric, g, order)
        kept = [None if t is None else t.clone() for t in given]
        x = activations(dtype, 3, K)
        x_kept = x.clone()
        p = foem_kernels.prepare(*given[:4], bits=4, group_size=g, dtype=dtype, device="cpu", kernel=name)
        first = foem_kernels.gemm(x, p, given[4])
        assert torch.equal(foem_kernels.gemm(x, p, given[4]), first)
        assert torch.equal(x, x_kept) and all(a is b is None or torch.equal(a, b) for a, b in zip(given, kept))

    def test_wrong_activations_are_named(self, case):
        p, _ = prepared(*case)
        with pytest.raises(ValueError, match=r"\[2, 255\].*256"):
            foem_kernels.gemm(torch.empty(2, K - 1, dtype=case[1]), p)
        with pytest.raises(ValueError, match="float64"):
            foem_kernels.gemm(torch.empty(2, K, dtype=torch.float64), p)


@pytest.mark.parametrize("change, message", [
    ({"codes": torch.full((N, K), 16, dtype=torch.uint8)}, "below 16"),
    ({"codes": torch.zeros(N, K, dtype=torch.int32)}, "uint8"),
    ({"scales": torch.ones(N, 3)}, r"scales is \[64, 3\].*\[64, 4\]"), ({"zeros": torch.ones(4, N)}, r"zeros is \[4, 64\]"),
    ({"g_idx": torch.full((K,), 4)}, "0..3"), ({"g_idx": torch.zeros(K - 1)}, r"\[256\]")])
def test_prepare_refuses_what_does_not_fit(change, message):
    given = dict(zip(("codes", "scales", "zeros", "g_idx"), weights(torch.bfloat16))) | change
    with pytest.raises(ValueError, match=message):
        foem_kernels.prepare(**given, bits=4, group_size=64, dtype=torch.bfloat16, device="cpu")


def test_one_group_per_row_has_two_spellings():
    codes, scales, zeros, _, _ = weights(torch.float32, False, K)
    a, b = (foem_kernels.prepare(codes, scales, zeros, bits=4, group_size=g, dtype=torch.float32, device="cpu") for g in (-1, K))
    assert a.problem == b.problem and a.problem.groups == 1


def test_an_unknown_kernel_is_refused_with_the_names(monkeypatch):
    with pytest.raises(ValueError, match="'marlin' does not exist.*triton_w4a16, cuda_w4a16, cpu_w4a16, reference"):
        choose(problem(), "marlin")
    monkeypatch.setenv("FOEM_KERNEL", "marlin")
    with pytest.raises(ValueError, match="does not exist"):
        choose(problem())


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_forced_kernel_runs_or_raises(monkeypatch, kernel):
    impossible = problem(bits=3, group_size=48, device="meta")
    for p in (problem(), impossible):
        reason = kernel.supports(p)
        if reason is None:
            assert choose(p, kernel.name) is kernel
            continue
        monkeypatch.setenv("FOEM_KERNEL", kernel.name)
        for force in (kernel.name, None):
            with pytest.raises(ValueError) as caught:
                choose(p, force)
            assert f"{kernel.name}: {reason}" in str(caught.value)
    assert (kernel.supports(impossible) is None) == (kernel.name == "reference")


def test_the_slow_choice_warns_once_with_every_reason(monkeypatch, caplog):
    monkeypatch.setattr(registry, "_logged", set())
    monkeypatch.delenv("FOEM_KERNEL", raising=False)
    caplog.set_level(logging.INFO, "foem_kernels")
    p = problem(group_size=20)
    for _ in range(3):
        assert choose(p).name == "reference"
    choose(problem(group_size=20, n=2 * N))  # another layer of the same kind is no news
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    for kernel in KERNELS[:-1]:
        assert f"{kernel.name}: {kernel.supports(p)}" in caplog.text


def test_each_kind_of_problem_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(registry, "_logged", set())
    caplog.set_level(logging.INFO, "foem_kernels")
    for g in (32, 64, 32, 64):
        choose(problem(group_size=g), "reference")
    assert [record.levelno for record in caplog.records] == [logging.INFO] * 2


def test_reasons_fit_one_line():
    for kernel, dtype, g, bits in itertools.product(KERNELS, UNIT, (32, 48, 100, K), (3, 4)):
        for device in ("cpu", "cuda"):
            reason = kernel.supports(problem(dtype=dtype, group_size=g, bits=bits, device=device))
            assert reason is None or reason and "\n" not in reason


def test_import_needs_no_triton():
    import subprocess
    import sys
    code = "import sys; sys.modules['triton'] = None\nimport foem_kernels; print([k.name for k in foem_kernels.KERNELS])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "triton_w4a16" in done.stdout, done.stderr


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("n,k,g", [(N, K, 64), (100, 192, 192), (40, 320, 32), (128, 96, 16)])
def test_size_is_what_the_layout_takes(kernel, n, k, g):
    """For every width, symmetry and order; layouts are plain torch, so those of GPU kernels can be made here too."""
    for bits, symmetric, order in itertools.product((2, 3, 4, 8), (True, False), (False, True)):
        p = problem(n=n, k=k, group_size=g, bits=bits, symmetric=symmetric, act_order=order, device="cpu")
        on_gpu = problem(n=n, k=k, group_size=g, bits=bits, symmetric=symmetric, act_order=order, device="sm_90")
        if kernel.supports(p) and kernel.supports(on_gpu):
            continue
        codes, scales, zeros, g_idx, _ = weights(torch.bfloat16, symmetric, g, order, bits, n, k)
        found = kernel.prepare(codes, scales, zeros, g_idx, p)
        assert kernel.size(p) == sum(t.nbytes for t in found.values() if isinstance(t, torch.Tensor)), p


def test_kernels_answer_for_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked about this machine"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = {device: choose(problem(device=device)).name for device in ("sm_75", "sm_80", "sm_90", "sm_100", "sm_90a")}
    assert found == {"sm_75": "reference", "sm_80": "triton_w4a16", "sm_90": "triton_w4a16", "sm_100": "triton_w4a16",
                     "sm_90a": "triton_w4a16"}
    (triton, old), *_ = registry.survey(problem(device="sm_75"))
    assert triton.name == "triton_w4a16" and old == "needs compute capability 8.0, found 7.5"
