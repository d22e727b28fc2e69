"""The solver against an independent float64 reference, and against properties that hold whatever the numbers are."""

import numpy as np
import pytest
import torch

from foem_vllm.errors import FoemError
from foem_vllm.format import QuantSpec, dequantize
from foem_vllm.grid import SCALE_DTYPES, find_grid, round_scales, round_to_nearest
from foem_vllm.solver import SolverConfig, blocks, factor, is_finite, layer_loss, solve, upper_inverse, visit_order


def problem(n=6, k=48, tokens=200, seed=0, drift=0.05):
    """(W, H, D) of a linear with correlated inputs, some columns much larger than others."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g, dtype=torch.float64) / k**0.5 + torch.eye(k, dtype=torch.float64)
    x = (
        torch.randn(tokens, k, generator=g, dtype=torch.float64)
        @ mix
        * (torch.rand(k, generator=g, dtype=torch.float64) * 3 + 0.1)
    )
    dx = drift * torch.randn(tokens, k, generator=g, dtype=torch.float64) + drift * x.roll(1, 1)
    w = torch.randn(n, k, generator=g, dtype=torch.float64)
    return w, x.T @ x / tokens, dx.T @ x / tokens


def reference(W, H, spec, alpha=0.0, beta=0.0, damping=0.05, form="published", D=None):
    """Column by column in float64 numpy, no blocks, the inverse of the remaining columns' H recomputed at every step.

    Uses that row j of the Cholesky factor over its diagonal is the first row of inv(H[j:, j:]) over its first entry.
    """
    W, H = W.numpy().copy(), H.numpy().copy()
    n, k = W.shape
    group = k if spec.group_size == -1 else spec.group_size
    dead = np.diag(H) == 0
    H[dead, dead] = 1
    order = np.arange(k)
    diagonal = np.diag(H)
    if spec.act_order in ("full", "static") or (spec.act_order == "group" and group == k):
        order = np.array(sorted(range(k), key=lambda j: -diagonal[j]))
    elif spec.act_order == "group":
        starts = sorted(range(0, k, group), key=lambda s: -diagonal[s : s + group].max())
        order = np.array([j for s in starts for j in sorted(range(s, s + group), key=lambda j: -diagonal[j])])
    W0, w, H = W[:, order], W[:, order].copy(), H[np.ix_(order, order)]
    H = H + damping * np.diag(H).mean() * np.eye(k)
    target, P = W0, np.zeros((k, k))
    if alpha:
        D = D.numpy()[np.ix_(order, order)]
        U = np.linalg.cholesky(np.linalg.inv(H)).T
        P = alpha * np.triu(D @ U.T, 1) @ U
        if form == "consistent":
            target = W0 + alpha * W0 @ D @ np.linalg.inv(H)
    top = (1 << spec.bits) - 1

    def grid(columns):
        low, high = np.minimum(columns.min(1), 0), np.maximum(columns.max(1), 0)
        span = 2 * np.maximum(-low, high) if spec.symmetric else high - low
        scale = np.where(span > 0, span / top, 1.0).astype(np.float16).astype(np.float64)
        return scale, np.full(n, (top + 1) / 2) if spec.symmetric else np.clip(np.round(-low / scale), 0, top)

    q, codes = np.empty_like(w), np.empty_like(w)
    for j in range(k):
        if spec.act_order == "static":
            start = order[j] // group * group
            scale, zero = grid(W[:, start : start + group])
        elif j % group == 0:
            scale, zero = grid(w[:, j : j + group])
        if beta and j and (form == "consistent" or j % 128):
            w[:, j] = (1 - beta) * w[:, j] + beta * target[:, j]
        codes[:, j] = np.clip(np.round(w[:, j] / scale) + zero, 0, top)
        q[:, j] = scale * (codes[:, j] - zero)
        error = w[:, j] - q[:, j] - beta * (w[:, j] - target[:, j])
        inverse = np.linalg.inv(H[j:, j:])[0]
        seen = w[:, j].copy()
        w[:, j + 1 :] += -np.outer(error, inverse[1:] / inverse[0]) + np.outer(seen, P[j, j + 1 :])
    out = np.empty_like(q)
    out[:, order] = q
    return torch.from_numpy(out)


FAMILY = [(0.0, 0.0), (0.25, 0.0), (0.0, 0.2), (0.25, 0.2)]


@pytest.mark.parametrize("alpha,beta", FAMILY)
@pytest.mark.parametrize("form", ["published", "consistent"])
@pytest.mark.parametrize("order", ["none", "full", "group", "static"])
@pytest.mark.parametrize("symmetric,group,bits", [(True, 16, 4), (False, 24, 3), (True, -1, 4)])
def test_equals_reference(alpha, beta, form, order, symmetric, group, bits):
    w, h, d = problem()
    spec = QuantSpec(bits, group, symmetric, order)
    solved = solve(w, h, spec, SolverConfig(alpha, beta, form=form), d)
    expected = reference(w, h, spec, alpha, beta, form=form, D=d)
    assert torch.allclose(dequantize(solved.quantized, spec).double(), expected, atol=1e-6)


@pytest.mark.parametrize("form", ["published", "consistent"])
def test_equals_reference_across_128_columns(form):
    """The published pull skips columns 128, 256, ..., the consistent one does not: they must differ there, and only there."""
    w, h, d = problem(4, 256, 900)
    spec = QuantSpec(4, 32)
    got = dequantize(solve(w, h, spec, SolverConfig(0.25, 0.2, form=form), d).quantized, spec).double()
    assert torch.allclose(got, reference(w, h, spec, 0.25, 0.2, form=form, D=d), atol=1e-6)


@pytest.mark.parametrize("alpha,beta", FAMILY)
@pytest.mark.parametrize("group", [16, 96, 384, -1])
def test_block_size_does_not_matter(alpha, beta, group):
    w, h, d = problem(5, 384, 1000)
    spec = QuantSpec(4, group, False, "full" if group == 16 else "none")
    results = [solve(w, h, spec, SolverConfig(alpha, beta, block_size=b), d).quantized for b in (1, 16, 50, 128, 1000)]
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes) and torch.equal(other.scales, results[0].scales)


@pytest.mark.parametrize("k,group,size", [(384, 16, 128), (384, 96, 128), (384, 384, 128), (300, 100, 64), (48, 48, 1)])
def test_blocks_cover_and_respect_groups(k, group, size):
    ranges = blocks(k, group, size)
    assert [i for a, b in ranges for i in range(a, b)] == list(range(k))
    for start in range(0, k, group):
        begin, end = next((a, b) for a, b in ranges if a <= start < b)
        assert start == begin or start + group <= end


def test_alpha_beta_zero_is_gptq_in_both_forms():
    w, h, d = problem()
    spec = QuantSpec(4, 16)
    plain = solve(w, h, spec)
    for form in ("published", "consistent"):
        other = solve(w, h, spec, SolverConfig(0, 0, form=form), d)
        assert torch.equal(plain.quantized.codes, other.quantized.codes)


def test_rows_do_not_interact():
    w, h, _ = problem(8)
    spec = QuantSpec(4, 16, False)
    whole = solve(w, h, spec, SolverConfig(beta=0.2)).quantized
    parts = [solve(w[i : i + 2], h, spec, SolverConfig(beta=0.2)).quantized for i in range(0, 8, 2)]
    assert torch.equal(whole.codes, torch.cat([p.codes for p in parts]))


def test_gptq_beats_rounding_to_nearest():
    w, h, _ = problem(32, 64, 400)
    for symmetric in (True, False):
        spec = QuantSpec(3, 16, symmetric)
        nearest = layer_loss(dequantize(round_to_nearest(w, spec), spec).double() - w, h)
        assert layer_loss(dequantize(solve(w, h, spec).quantized, spec).double() - w, h) < 0.8 * nearest


def test_gradient_of_unrounded_columns_is_zero():
    """GPTQ's working weights zero the layerwise gradient of what is not rounded yet (undamped H)."""
    w, h, _ = problem(4, 32)
    spec = QuantSpec(4, 8)
    q = dequantize(solve(w, h, spec, SolverConfig(damping=0.0)).quantized, spec).double()
    for j in (8, 16, 24):  # re-solving the tail exactly, given the rounded head, must reproduce the working weights' rounding
        tail = w[:, j:] - (q[:, :j] - w[:, :j]) @ h[:j, j:] @ torch.linalg.inv(h[j:, j:])
        scale, zero = find_grid(tail[:, :8], spec)
        first = (torch.clamp((tail[:, 0] / scale).round() + zero, 0, 15) - zero) * scale
        assert torch.allclose(first, q[:, j], atol=1e-6)


def test_float32_agrees_with_float64():
    w, h, d = problem(64, 256, 2000)
    spec = QuantSpec(4, 32)
    exact = solve(w, h, spec, SolverConfig(0.25, 0.2), d).quantized.codes
    single = solve(w.float(), h.float(), spec, SolverConfig(0.25, 0.2), d.float()).quantized.codes
    assert (exact == single).float().mean() > 0.99  # a rounding tie that falls the other way moves its row's later codes


def test_arguments_are_not_mutated_and_runs_repeat():
    w, h, d = problem()
    h[3] = h[:, 3] = 0
    copies = w.clone(), h.clone(), d.clone()
    spec = QuantSpec(4, 16, False, "full")
    first = solve(w, h, spec, SolverConfig(0.25, 0.2), d)
    state = torch.get_rng_state()
    second = solve(w, h, spec, SolverConfig(0.25, 0.2), d)
    assert all(torch.equal(a, b) for a, b in zip(copies, (w, h, d)))
    assert torch.equal(first.quantized.codes, second.quantized.codes) and torch.equal(state, torch.get_rng_state())


def test_dead_columns_keep_their_nearest_value():
    w, h, _ = problem()
    for j in (0, 7, 47):
        h[j] = h[:, j] = 0
    spec = QuantSpec(4, -1, act_order="static")
    got = dequantize(solve(w, h, spec).quantized, spec)
    nearest = dequantize(round_to_nearest(w, spec), spec)
    assert torch.equal(got[:, [0, 7, 47]], nearest[:, [0, 7, 47]])


def test_no_tokens_is_rounding_to_nearest():
    w, h, _ = problem()
    spec = QuantSpec(4, 16, False)
    assert torch.equal(solve(w, torch.zeros_like(h), spec).quantized.codes, round_to_nearest(w, spec).codes)


def test_damping_escalates_instead_of_failing():
    w, h, _ = problem()
    indefinite = h - 0.3 * h.diagonal().mean() * torch.eye(48, dtype=h.dtype)
    solved = solve(w, indefinite, QuantSpec(4, 16))
    assert solved.damping > 0.05 and "raised" in solved.notes[0]
    _, damping, notes = factor(indefinite, 0.2)  # ten times as much would be beyond the limit, which itself is tried
    assert damping == 1 and "raised from 0.2 to 1" in notes[0]
    hopeless = -h + torch.diag(3 * h.diagonal())
    hopeless[0, 1] = hopeless[1, 0] = 1e6
    _, _, notes = factor(hopeless, 0.05)
    assert "diagonal" in notes[0]
    q = solve(w, hopeless, QuantSpec(4, 16)).quantized
    assert torch.isfinite(q.scales).all()


def test_factor_is_the_cholesky_factor_of_the_inverse():
    _, h, _ = problem()
    u, damping, notes = factor(h, 0.01)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(48, dtype=h.dtype)
    assert damping == 0.01 and not notes and torch.equal(u, u.triu())
    assert torch.allclose(u.T @ u @ damped, torch.eye(48, dtype=h.dtype), atol=1e-10)


@pytest.mark.parametrize("k", [1, 128, 129, 300, 515])
def test_an_upper_triangular_matrix_is_inverted_half_by_half(k):
    x = torch.randn(2 * k, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64) * torch.logspace(0, -3, k)
    R = torch.linalg.cholesky(x.T @ x / len(x) + 1e-4 * torch.eye(k)).T
    for dtype, near in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        found = upper_inverse(R.to(dtype))
        assert found.dtype == dtype and torch.equal(found, found.triu())
        assert (found.double() @ R - torch.eye(k)).abs().max() < near


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, 512, -1])
@pytest.mark.parametrize("order", ["none", "full", "group", "static"])
def test_group_sizes_and_orders_give_valid_codes(group, order):
    w, h, _ = problem(3, 512, 700)
    spec = QuantSpec(4, group, True, order)
    q = solve(w, h, spec, SolverConfig(beta=0.2)).quantized
    assert q.codes.dtype == torch.uint8 and int(q.codes.max()) < 16 and q.scales.shape == (3, spec.groups(512))
    assert (q.g_idx is not None) == (spec.desc_act and group < 512)
    if q.g_idx is not None:
        assert torch.equal(torch.bincount(q.g_idx.long()), torch.full((512 // group,), group))


def test_group_aware_order_keeps_groups_together():
    diagonal = torch.tensor([1.0, 5, 2, 2, 9, 1, 3, 4])
    assert visit_order(diagonal, QuantSpec(4, 4, act_order="group")).tolist() == [4, 7, 6, 5, 1, 2, 3, 0]
    assert visit_order(diagonal, QuantSpec(4, 4, act_order="full")).tolist() == [4, 1, 7, 6, 2, 3, 0, 5]


@pytest.mark.parametrize("symmetric", [True, False])
def test_grid_search_is_the_best_of_its_candidates(symmetric):
    """Brute force in Python, row by row, with weighted columns; and the whole solver profits on the loss it minimizes."""
    g = torch.Generator().manual_seed(3)
    w, weight = torch.randn(6, 32, generator=g, dtype=torch.float64) ** 3, torch.rand(32, generator=g, dtype=torch.float64)
    scale, zero = find_grid(w, QuantSpec(3, 32, symmetric), search=True, importance=weight)
    for row, s, z in zip(w.tolist(), scale.tolist(), zero.tolist()):
        best = None
        for i in range(26):
            low, high = min(min(row), 0) * (1 - 0.02 * i), max(max(row), 0) * (1 - 0.02 * i)
            span = 2 * max(-low, high) if symmetric else high - low
            one = float(np.float16(span / 7))
            origin = 4 if symmetric else min(max(round(-low / one), 0), 7)
            values = [one * (min(max(round(v / one) + origin, 0), 7) - origin) for v in row]
            error = sum(h * (a - b) ** 2 for a, b, h in zip(values, row, weight.tolist()))
            if best is None or error < best[0] - 1e-12:
                best = (error, one, origin)
        assert (s, z) == best[1:]


def test_grid_search_lowers_the_layer_loss():
    w, h, _ = problem(32, 128, 1000)
    for order in ("none", "group", "static", "full"):
        spec = QuantSpec(3, 32, act_order=order)
        q = [solve(w**3, h, spec, SolverConfig(grid=grid)).quantized for grid in ("search", "minmax")]
        searched, plain = (layer_loss(dequantize(each, spec).double() - w**3, h) for each in q)
        assert searched < 0.95 * plain


@pytest.mark.parametrize("dtypes", [(torch.float16,), (torch.float16, torch.bfloat16)])
def test_scales_are_exact_in_the_stored_dtypes(dtypes):
    scales = torch.cat([torch.logspace(-12, 6, 1000), torch.tensor([0.0, 1e-30, 65504.0])])
    rounded = round_scales(scales, dtypes)
    assert (rounded > 0).all() and torch.isfinite(rounded).all()
    for dtype in dtypes:
        assert torch.equal(rounded.to(dtype).float(), rounded)
    inside = (scales > 1e-4) & (scales < 6e4)
    assert ((rounded / scales - 1).abs()[inside] <= 2.0 ** (-8 if torch.bfloat16 in dtypes else -11)).all()
    assert SCALE_DTYPES == (torch.float16,)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(spec=QuantSpec(4, 32)), "48 columns are not a multiple of group_size 32"),
        (dict(config=SolverConfig(alpha=0.25)), "cross moment"),
    ],
)
def test_bad_arguments(arguments, message):
    w, h, _ = problem()
    with pytest.raises(FoemError, match=message):
        solve(w, h, **{"spec": QuantSpec(4, 16), **arguments})


@pytest.mark.parametrize(
    "values",
    [dict(alpha=2.0), dict(beta=-0.1), dict(damping=float("nan")), dict(form="eq19"), dict(grid="mse"), dict(block_size=0)],
)
def test_bad_configs(values):
    with pytest.raises(FoemError, match=next(iter(values))):
        SolverConfig(**values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_found_and_an_overflow_of_the_sum_is_not(dtype):
    huge = torch.full((300, 70), torch.finfo(dtype).max, dtype=dtype)
    assert not huge.sum().isfinite() and is_finite(huge) and is_finite(huge[:0]) and is_finite(-huge.T)
    for values in ((torch.nan,), (torch.inf,), (-torch.inf,), (torch.inf, -torch.inf)):
        for t in (torch.randn(300, 70).to(dtype), huge.clone()):
            t[299, 68 : 68 + len(values)] = torch.tensor(values, dtype=dtype)
            assert not is_finite(t) and not is_finite(t.T)


def test_non_finite_input_is_named():
    w, h, _ = problem()
    w[0, 0] = float("nan")
    with pytest.raises(FoemError, match="weights: NaN"):
        solve(w, h, QuantSpec(4, 16))
