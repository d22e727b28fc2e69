"""Second moments of bfloat16 activations in C against float64."""

import pytest
import torch
from foem_kernels import cpu_moments

from foem_vllm.capture import Moments

REASON = cpu_moments.supports("cpu", torch.bfloat16)
needs_bf16 = pytest.mark.skipif(REASON is not None, reason=f"cpu_moments {REASON}")

@pytest.fixture(params=["", "avx512_bf16"], ids=["best", "avx512_bf16"], autouse=True)
def isa(request, monkeypatch):
    """With AMX's tiles where the CPU has them, and without."""
    if request.param and REASON is None:
        monkeypatch.setenv("FOEM_CPU_ISA", request.param)
    else:
        monkeypatch.delenv("FOEM_CPU_ISA", raising=False)


SHAPES = [(1, 1, 1), (2, 32, 32), (3, 33, 5), (257, 31, 64), (600, 96, 40), (1025, 130, 97)]


def tensors(t, k, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, then, now = (torch.randn(t, size, generator=generator) for size in (k, n, n))
    return x.bfloat16(), (then * 3).bfloat16(), (then * 3 + now / 3).bfloat16(), torch.rand(t, generator=generator)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@needs_bf16
@pytest.mark.parametrize("t, k, n", SHAPES)
def test_products_of_x_alone_are_exact_and_added_in_float32(t, k, n):
    x, *_ = tensors(t, k, n)
    gram = torch.full((k, k), 0.5)
    cpu_moments.add(gram, x)
    assert relative((gram - 0.5).triu(), (x.double().T @ x.double()).triu()) < 2e-6


@needs_bf16
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("t, k, n", SHAPES)
def test_differences_and_weights_are_rounded_to_bfloat16_and_nothing_else_is(t, k, n, weighted):
    x, then, now, weights = tensors(t, k, n)
    gram, cross = torch.zeros(k, k), torch.ones(n, k)
    cpu_moments.add(gram, x, cross, then, now, weights if weighted else None)
    root = weights.sqrt()[:, None] if weighted else torch.ones(t, 1)
    drift = ((then.float() - now.float()) * root).bfloat16().double()
    inputs = (x.float() * root).bfloat16().double()
    assert relative(gram.triu(), (inputs.T @ inputs).triu()) < 2e-6
    assert relative(cross - 1, drift.T @ inputs) < 2e-6
    # And that rounding is what the docstring says: 2^-9 of each product's factors.
    heavy = x.double() * weights[:, None].double() if weighted else x.double()
    size = (then.double() - now.double()).abs().T @ heavy.abs()
    assert (((cross - 1).double() - (then.double() - now.double()).T @ heavy).abs() <= 2 * 2.0**-8 * size + 1e-6).all()


@needs_bf16
def test_the_number_of_threads_and_strides_change_no_bit():
    x, then, now, weights = tensors(515, 200, 70)
    wide = torch.zeros(515, 300, dtype=torch.bfloat16)
    wide[:, 50:250] = x
    results, before = [], torch.get_num_threads()
    try:
        for threads, given in ((1, x), (2, x), (3, wide[:, 50:250]), (2, x.T.contiguous().T)):
            torch.set_num_threads(threads)
            gram, cross = torch.zeros(200, 200), torch.zeros(70, 200)
            cpu_moments.add(gram, given, cross, then, now, weights)
            results.append((gram, cross))
    finally:
        torch.set_num_threads(before)
    for gram, cross in results[1:]:
        assert torch.equal(gram, results[0][0]) and torch.equal(cross, results[0][1])


@needs_bf16
def test_a_bad_column_spoils_only_its_own_sums_and_no_tokens_add_nothing():
    x, *_ = tensors(40, 50, 1)
    clean = torch.zeros(50, 50)
    cpu_moments.add(clean, x)
    x[7, 49] = float("inf")
    gram = torch.zeros(50, 50)
    cpu_moments.add(gram, x)
    assert torch.equal(gram[:49, :49].triu(), clean[:49, :49].triu()) and not gram[:, 49].isfinite().any()
    cpu_moments.add(gram, x[:0])


@needs_bf16
def test_refusals_name_what_is_wrong():
    x, then, now, weights = tensors(8, 4, 3)
    gram, cross = torch.zeros(4, 4), torch.zeros(3, 4)
    for arguments, said in [
        ((gram, x.float()), "takes bfloat16, not torch.float32"),
        ((gram[:3], x), r"gram must be torch.float32 \[4, 4\]"),
        ((gram, x, cross, then), "cross needs then and now"),
        ((gram, x, cross, then, now[:, :2]), r"now must be torch.bfloat16 \[8, 3\]"),
        ((gram, x, cross.double(), then, now), r"cross must be torch.float32 \[3, 4\]"),
        ((gram, x, None, None, None, weights[1:]), r"weights must be torch.float32 \[8\]"),
        ((torch.zeros(4, 8)[:, :4], x), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=said):
            cpu_moments.add(*arguments)


@needs_bf16
def test_products_of_torch_before_and_after_are_the_same():
    x, *_ = tensors(512, 256, 1)  # torch may use AMX too, in a configuration of its own
    before = x.T @ x
    cpu_moments.add(torch.zeros(256, 256), x)
    assert torch.equal(x.T @ x, before)


def test_another_device_dtype_or_instruction_set_is_named(monkeypatch):
    assert "not cuda" in cpu_moments.supports("cuda", torch.bfloat16)
    assert "float16" in cpu_moments.supports("cpu", torch.float16)
    monkeypatch.setenv("FOEM_CPU_ISA", "portable")
    assert "AVX-512 BF16" in cpu_moments.supports("cpu", torch.bfloat16)


@pytest.mark.parametrize("cross, weighted", [(False, False), (True, False), (True, True)])
def test_moments_come_out_alike_with_and_without_the_instructions(monkeypatch, cross, weighted):
    x, then, now, weights = tensors(900, 48, 48)
    found = []
    for portable in (False, True):
        if portable:
            monkeypatch.setenv("FOEM_CPU_ISA", "portable")
        moments = Moments(48, torch.device("cpu"), 2, cross)
        for fold, rows in enumerate((slice(0, 400), slice(400, 900))):
            moments.add(fold, x[None, rows], now[None, rows], then[None, rows], weights[rows] if weighted else None)
        found.append(moments.means())
    heavy = x.double() * (weights.double()[:, None] if weighted else 1)
    for means in found:
        assert means.tokens == 900
        assert relative(means.h, heavy.T @ x.double() / 900) < (2e-3 if weighted else 2e-6)
        if cross:
            assert relative(means.d, (then.double() - now.double()).T @ heavy / 900) < 4e-3
