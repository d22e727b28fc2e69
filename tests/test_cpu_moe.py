"""Experts on the CPU against a loop over tokens and experts in float64."""

import pytest
import torch
from foem_kernels import Problem, cpu_moe, native, pages
from foem_kernels.cpu_w4a16 import CpuW4A16

pytestmark = pytest.mark.skipif(native.library() is None, reason="the CPU kernels were not compiled (no C compiler?)")


def linear(e, n, k, group, bits, asymmetric, ordered, dtype, seed):
    """(what prepare takes, dequantized [E, n, k] in float64)."""
    g = torch.Generator().manual_seed(seed)
    p = Problem(n, k, bits, group, not asymmetric, dtype, "cpu", ordered)
    codes = torch.randint(0, 1 << bits, (e, n, k), dtype=torch.uint8, generator=g)
    scales = (torch.rand(e, n, p.groups, generator=g) * 0.02 + 0.005).half().float()
    zeros = torch.randint(0, 1 << bits, (e, n, p.groups), dtype=torch.uint8, generator=g) if asymmetric else None
    plain = torch.arange(k) // group
    g_idx = torch.stack([plain[torch.randperm(k, generator=g)] for _ in range(e)]).int() if ordered else None
    W = torch.empty(e, n, k, dtype=torch.float64)
    for i in range(e):
        column = plain if g_idx is None else g_idx[i].long()
        zero = float(p.mid) if zeros is None else zeros[i].double()[:, column]
        W[i] = (codes[i].double() - zero) * scales[i].double()[:, column]
    return (codes, scales, zeros, g_idx, p), W


def expected(x, up, down, ids, weights, activation, on_input, expert_map, dtype):
    """[T, hidden] float64, and what may be rounded: once after each step, in units of dtype's roundoff."""
    f = {"silu": lambda v: v * torch.sigmoid(v), "relu": lambda v: v.clamp(min=0)}
    f |= {"gelu": lambda v: v * 0.5 * (1 + torch.erf(v / 2**0.5))}
    f |= {"gelu_tanh": lambda v: v * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)))}
    y, slack = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    unit = torch.finfo(dtype).eps / 2
    for t in range(len(x)):
        for j in range(ids.shape[1]):
            e = int(ids[t, j])
            if expert_map is not None:
                e = int(expert_map[e]) if 0 <= e < len(expert_map) else -1
            if not 0 <= e < len(up):
                continue
            w, row = float(weights[t, j]), x[t].double()
            h = up[e] @ (row * w if on_input else row)
            gate, lift = h.chunk(2)
            a = f[activation](gate) * lift
            # Inputs and both halves are rounded (the slopes of these activations stay below 1.2), then their product.
            first = 2 * unit * (up[e].abs() @ (row * (w if on_input else 1)).abs())
            moved = 1.2 * first.chunk(2)[0] * lift.abs() + f[activation](gate).abs() * first.chunk(2)[1] + unit * a.abs()
            scale = 1.0 if on_input else w
            y[t] += scale * (down[e] @ a)
            slack[t] += abs(scale) * (down[e].abs() @ (1.5 * moved) + unit * (down[e] @ a).abs())
    return y, slack + unit * y.abs() + 1e-6


CASES = [
    (8, 40, 32, 32, 4, False, False, torch.bfloat16, 2, "silu", False),
    (16, 64, 48, 16, 4, True, False, torch.float16, 8, "gelu", False),
    (4, 32, 64, 32, 8, False, True, torch.float32, 1, "gelu_tanh", True),
    (128, 32, 16, 16, 3, True, False, torch.bfloat16, 4, "relu", False),
    (9, 24, 24, 24, 2, False, False, torch.float32, 3, "silu", True),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("routing", ["mixed", "one", "mapped"])
def test_equals_float64(case, routing):
    e, hidden, inner, group, bits, asymmetric, ordered, dtype, top_k, activation, on_input = CASES[case]
    first, up = linear(e, 2 * inner, hidden, group if hidden % group == 0 else hidden, bits, asymmetric, ordered, dtype, 1)
    second, down = linear(e, hidden, inner, group, bits, asymmetric, ordered, dtype, 2)
    w13, w2, seen = cpu_moe.prepare(*first, gated=True), cpu_moe.prepare(*second), 0.0
    for tokens in (1, 3, 21):
        g = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, hidden, generator=g).to(dtype)
        ids = torch.stack([torch.randperm(e, generator=g)[:top_k] for _ in range(tokens)])
        ids = torch.full_like(ids, 2) if routing == "one" else ids
        weights = torch.rand(tokens, top_k, generator=g)
        expert_map = None
        if routing == "mapped":  # half of twice as many experts are here, in another order; some ids are no expert's
            expert_map = torch.full((2 * e,), -1)
            expert_map[torch.randperm(2 * e, generator=g)[:e]] = torch.randperm(e, generator=g)
            ids = torch.randint(-1, 2 * e + 1, ids.shape, generator=g)
        y, slack = expected(x, up, down, ids, weights, activation, on_input, expert_map, dtype)
        found = cpu_moe.experts(x, w13, w2, ids, weights, activation, on_input, expert_map)
        assert found.dtype == dtype and ((found.double() - y).abs() <= slack).all(), ((found.double() - y).abs() / slack).max()
        seen = max(seen, float((y.abs() / slack).max()))
    assert seen > 3  # the bound is smaller than what it bounds


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_columns_are_gathered_from_fewer_inputs(bits):
    """As a rank has to that gets some columns of every group: groups are filled up with columns of no weight."""
    e, hidden, inner = 4, 40, 24
    g, plain, made = torch.Generator().manual_seed(3), [], []
    for n, k, gated in ((2 * inner, hidden, True), (hidden, inner, False)):
        (codes, scales, _, _, p), W = linear(e, n, k, 8, bits, False, False, torch.float32, k)
        plain.append(W)
        columns = torch.stack([torch.cat([torch.arange(k), torch.randint(0, k, (8,), generator=g)]) for _ in range(e)])
        codes = torch.cat([codes, torch.full((e, n, 8), p.mid, dtype=torch.uint8)], 2)
        p = Problem(n, k + 8, bits, 8, True, torch.float32, "cpu", True)
        made.append(cpu_moe.prepare(codes, torch.cat([scales, scales[..., :1]], 2), None, None, p, gated=gated, order=columns))
    x, ids, weights = torch.randn(5, hidden), torch.randint(0, e, (5, 2)), torch.rand(5, 2)
    y, slack = expected(x, *plain, ids, weights, "silu", False, None, torch.float32)
    assert ((cpu_moe.experts(x, *made, ids, weights).double() - y).abs() <= slack).all()


@pytest.mark.parametrize("bits,n", [(4, 40), (8, 64), (3, 128)])
def test_each_expert_lies_as_a_linear_does(bits, n):
    (codes, scales, zeros, g_idx, p), _ = linear(3, n, 64, 32, bits, True, True, torch.float32, 5)
    found = cpu_moe.prepare(codes, scales, zeros, g_idx, p)
    for e in range(3):
        alone = CpuW4A16().prepare(codes[e], scales[e], zeros[e], g_idx[e], p)
        assert all(torch.equal(found[key][e], alone[key]) for key in ("weight", "scales", "zeros", "order"))
    assert found["weight"].untyped_storage().nbytes() >= pages.ARENA  # in huge pages, where a linear's are


def test_no_tokens_and_bad_rows():
    first, _ = linear(4, 32, 16, 16, 4, False, False, torch.bfloat16, 1)
    second, _ = linear(4, 16, 16, 16, 4, False, False, torch.bfloat16, 2)
    w13, w2 = cpu_moe.prepare(*first, gated=True), cpu_moe.prepare(*second)
    x, ids, weights = torch.randn(5, 16).bfloat16(), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    assert cpu_moe.experts(x[:0], w13, w2, ids[:0], weights[:0]).shape == (0, 16)
    wanted = cpu_moe.experts(x, w13, w2, ids, weights)
    x[3, 2] = float("nan")
    found = cpu_moe.experts(x, w13, w2, ids, weights)
    assert torch.isnan(found[3]).all() and torch.equal(found[[0, 1, 2, 4]], wanted[[0, 1, 2, 4]])


@pytest.mark.parametrize("case", [1, 2])
def test_is_one_op_for_torch_compile(case):
    """Any number of tokens and any routing in one graph; schema, fake implementation and real one agree."""
    e, hidden, inner, group, bits, asymmetric, ordered, dtype, top_k, activation, on_input = CASES[case]
    w13 = cpu_moe.prepare(*linear(e, 2 * inner, hidden, group, bits, asymmetric, ordered, dtype, 1)[0], gated=True)
    w2 = cpu_moe.prepare(*linear(e, hidden, inner, group, bits, asymmetric, ordered, dtype, 2)[0])

    def layer(x, ids, weights):
        return cpu_moe.experts(x, w13, w2, ids, weights, activation, on_input, None) + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (7, 3, 30):
        x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, top_k)
        ids = torch.randint(0, e, (tokens, top_k))
        assert torch.equal(compiled(x, ids, weights), layer(x, ids, weights))
    arguments = [v for w in (w13, w2) for v in (w["weight"], w["scales"], w["zeros"], w["order"], cpu_moe._sizes(w))]
    torch.library.opcheck(torch.ops.foem.cpu_moe, (x, *arguments, ids, weights, activation, on_input, None),
                          test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused():
    first, _ = linear(4, 32, 16, 16, 4, False, False, torch.bfloat16, 1)
    second, _ = linear(4, 16, 16, 16, 4, False, False, torch.bfloat16, 2)
    w13, w2 = cpu_moe.prepare(*first, gated=True), cpu_moe.prepare(*second)
    x, ids, weights = torch.randn(5, 16).bfloat16(), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    for change, message in (
        (dict(activation="swish"), "activation 'swish' is not supported; there are silu"),
        (dict(x=x.float()), "x is torch.float32"),
        (dict(w2=w13), "w13 is .4, 32, 16., w2 .4, 32, 16."),
        (dict(topk_weights=weights[:, :1]), "must both be .5, k."),
    ):
        with pytest.raises(ValueError, match=message):
            cpu_moe.experts(**{**dict(x=x, w13=w13, w2=w2, topk_ids=ids, topk_weights=weights), **change})
    with pytest.raises(ValueError, match="scales is .4, 16, 1., but 4 experts"):
        cpu_moe.prepare(first[0], second[1], *first[2:])
    with pytest.raises(ValueError, match="cpu_moe cannot run"):
        cpu_moe.prepare(*linear(2, 8, 40, 20, 4, False, False, torch.float32, 1)[0])
