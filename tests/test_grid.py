"""The closed-form refit of scales and zero points against a scan of everything that could be stored."""

import pytest
import torch

from foem_vllm.format import QuantSpec, dequantize, group_index
from foem_vllm.grid import refit_scales, round_to_nearest
from foem_vllm.solver import SolverConfig, layer_loss, solve

BOTH = (torch.float16, torch.bfloat16)


def problem(n=4, k=32, tokens=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g, dtype=torch.float64) @ torch.randn(k, k, generator=g, dtype=torch.float64)
    x[:, 5] *= 6
    target = torch.randn(n, k, generator=g, dtype=torch.float64) ** 3 * 0.05
    return target, x


def error(q, spec, target, x):
    """[N] mean squared error of each output over raw tokens."""
    return (x @ (dequantize(q, spec).double() - target).T).square().mean(0)


def storable(dtypes, around):
    """Every value that all dtypes hold, from a fourth to four times `around`."""
    bits = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16 if torch.bfloat16 in dtypes else torch.float16).double()
    values = values[torch.isfinite(values) & (values >= torch.finfo(torch.float16).tiny) & (values <= 65280)]
    return values[(values > around / 4) & (values < around * 4)]


def scan(q, spec, target, x, dtypes):
    """One group after the other: of all storable scales, and zero points at most one away, those with the smallest error over raw
    tokens, other groups as they are."""
    scales = q.scales.double().clone()
    groups = (group_index(q.codes.shape[1], spec) if q.g_idx is None else q.g_idx).long()
    zeros = torch.full_like(scales, spec.mid) if q.zeros is None else q.zeros.double()
    for g in range(scales.shape[1]):
        for row in range(len(scales)):
            inside = groups == g
            levels = q.codes[row].double() - zeros[row, groups]
            rest = x[:, ~inside] @ (levels * scales[row, groups])[~inside] - x @ target[row]
            values = storable(dtypes, float(scales[row, g]))
            best = (rest + scales[row, g] * (x[:, inside] @ levels[inside])).square().mean()
            found = scales[row, g], zeros[row, g]
            for move in (0,) if q.zeros is None else (0, 1, -1):
                if 0 <= zeros[row, g] + move < 1 << spec.bits:
                    own = x[:, inside] @ (levels[inside] - move)
                    losses = (rest[None] + values[:, None] * own[None]).square().mean(1)
                    if losses.min() < best:
                        best, found = losses.min(), (values[losses.argmin()], zeros[row, g] + move)
            scales[row, g], zeros[row, g] = found
    return scales, zeros


CASES = [
    (True, 8, "none", (torch.float16,)),
    (False, 8, "none", (torch.float16,)),
    (False, 8, "full", (torch.float16,)),
    (True, 16, "full", BOTH),
    (True, 16, "group", BOTH),
    (False, -1, "none", BOTH),
    (True, -1, "full", (torch.float16,)),
    (False, 8, "static", BOTH),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_refit_finds_the_best_storable_grid_of_every_group(case):
    symmetric, group, order, dtypes = CASES[case]
    target, x = problem(seed=case)
    h = x.T @ x / len(x)
    spec = QuantSpec(3, group, symmetric, order)
    before = solve(target, h, spec, SolverConfig(scale_dtypes=dtypes)).quantized
    assert (before.g_idx is not None) == (order == "full" and group != -1)
    after, pull = refit_scales(before, spec, target, h, dtypes)
    scales, zeros = scan(before, spec, target, x, dtypes)
    assert torch.equal(after.scales.double(), scales)
    assert torch.equal(after.codes, before.codes) and after.g_idx is before.g_idx
    assert after.zeros is None if symmetric else torch.equal(after.zeros, zeros.to(torch.uint8))
    assert torch.allclose(pull, (target - dequantize(after, spec).double()) @ h, atol=1e-9)
    assert (error(after, spec, target, x) <= error(before, spec, target, x)).all()
    assert error(after, spec, target, x).sum() < 0.99 * error(before, spec, target, x).sum()
    for dtype in dtypes:
        assert torch.equal(after.scales.to(dtype).to(after.scales), after.scales)
    assert (after.scales > 0).all() and after.scales.dtype == before.scales.dtype


@pytest.mark.parametrize("dtypes", [(torch.float16,), BOTH])
def test_refit_never_raises_the_error(dtypes):
    """Of codes that fit another target, with scales near the smallest and largest that can be stored, dead columns."""
    for seed in range(10):
        target, x = problem(3, 32, 12, seed)
        x[:, seed] = 0
        h = x.T @ x / len(x)
        for factor in (1e-4, 1.0, 1e5):
            spec = QuantSpec(3, 8, seed % 2 == 0)
            q = round_to_nearest(factor * target.roll(1, 0), spec, dtypes)
            after, _ = refit_scales(q, spec, factor * target, h, dtypes)
            was, now = (error(each, spec, factor * target, x) for each in (q, after))
            assert (now <= was * (1 + 1e-9)).all() and torch.isfinite(after.scales).all()
            for dtype in dtypes:
                assert torch.equal(after.scales.to(dtype).double(), after.scales)
    target, x = problem(64)
    fine = round_to_nearest(target, QuantSpec(3, 8))  # a coarser storage than its scales had: some of them are better left alone
    after, _ = refit_scales(fine, QuantSpec(3, 8), target, x.T @ x / len(x), BOTH)
    was, now = (error(each, QuantSpec(3, 8), target, x) for each in (fine, after))
    assert (now <= was * (1 + 1e-9)).all()


def test_refit_leaves_groups_without_inputs_or_weights_alone():
    target, _ = problem()
    target[:, :8] = 0
    spec = QuantSpec(4, 8)
    q = round_to_nearest(target, spec)
    h = torch.eye(32, dtype=torch.float64)
    h[8:16] = 0
    after, _ = refit_scales(q, spec, target, h)
    assert torch.equal(after.scales[:, :2], q.scales[:, :2]) and not torch.equal(after.scales[:, 2:], q.scales[:, 2:])


def test_solver_refits_toward_the_target_that_it_was_given():
    target, x = problem(seed=3)
    h = x.T @ x / len(x)
    W = target + 0.02 * torch.randn(target.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    spec = QuantSpec(3, 8, True, "group")
    plain, refit = (solve(W, h, spec, SolverConfig(refit=r), target=target) for r in (False, True))
    assert torch.equal(refit.quantized.scales, refit_scales(plain.quantized, spec, target, h)[0].scales)
    after, before = (float(error(s.quantized, spec, target, x).mean()) for s in (refit, plain))
    assert after < before
    assert layer_loss(dequantize(refit.quantized, spec).double() - target, h) == pytest.approx(after)
