"""Coordinate descent against trying every single step, in float64; and the decision to use it against raw held-out data."""

import pytest
import torch

from foem_vllm import descent
from foem_vllm.descent import descend
from foem_vllm.format import Quantized, QuantSpec, dequantize
from foem_vllm.grid import round_to_nearest
from foem_vllm.selection import descent_helps, merge, score, splits
from foem_vllm.solver import SolverConfig, layer_loss, solve


def layer(n=5, k=24, tokens=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g, dtype=torch.float64) @ (torch.eye(k) + 0.4 * torch.randn(k, k, generator=g)).double()
    return torch.randn(n, k, generator=g, dtype=torch.float64), x.T @ x / tokens, x


def by_trying_everything(q, spec, target, H, steps):
    """Each row: the single step up or down that lowers the loss most, again and again."""
    codes = q.codes.clone().long()

    def loss(row, changed):
        e = dequantize(q._replace(codes=changed.to(torch.uint8)), spec).double()[row] - target[row]
        return float(e @ H @ e)

    for row in range(len(codes)):
        for _ in range(steps):
            now, best = loss(row, codes), None
            for j in range(codes.shape[1]):
                for step in (-1, 1):
                    if 0 <= codes[row, j] + step <= (1 << spec.bits) - 1:
                        other = codes.clone()
                        other[row, j] += step
                        value = loss(row, other)
                        if value < now - 1e-12 and (best is None or value < best[0]):
                            best = value, other
            if best is None:
                break
            codes = best[1]
    return codes


@pytest.mark.parametrize("spec", [QuantSpec(3, 8), QuantSpec(4, -1), QuantSpec(2, 8, False), QuantSpec(3, 8, True, "full")])
def test_equals_trying_every_step(spec):
    W, H, _ = layer()
    q = solve(W, H, spec).quantized if spec.act_order == "full" else round_to_nearest(W, spec)
    found, taken = descend(q, spec, W, H)
    assert taken > 0 and torch.equal(found.codes.long(), by_trying_everything(q, spec, W, H, round(descent.STEPS * 24)))
    assert layer_loss(dequantize(found, spec).double() - W, H) < layer_loss(dequantize(q, spec).double() - W, H)
    assert int(found.codes.max()) < 1 << spec.bits
    assert all(a is b for a, b in zip(found[1:], q[1:]))  # the grid stays


def test_nothing_moves_where_rounding_to_nearest_is_best():
    W, H, _ = layer()
    q = round_to_nearest(W, QuantSpec(4, 8))
    found, taken = descend(q, QuantSpec(4, 8), W, torch.diag(H.diagonal()))
    assert taken == 0 and torch.equal(found.codes, q.codes)


def test_a_row_moves_at_most_so_many_columns(monkeypatch):
    W, H, _ = layer(n=3, k=64, tokens=80)
    spec = QuantSpec(2, 16)
    q = round_to_nearest(W, spec)
    monkeypatch.setattr(descent, "STEPS", 2 / 64)
    found, taken = descend(q, spec, W, H)
    assert taken <= 6 and int((found.codes != q.codes).sum(1).max()) <= 2


def test_codes_at_the_edge_of_the_grid_stay_on_it():
    H = torch.full((4, 4), 0.9, dtype=torch.float64) + 0.1 * torch.eye(4)
    q = Quantized(torch.zeros(1, 4, dtype=torch.uint8), torch.ones(1, 1), None)
    found, _ = descend(q, QuantSpec(2, 4), torch.full((1, 4), -9.0, dtype=torch.float64), H)
    assert torch.equal(found.codes, q.codes)


def test_used_where_a_fold_that_did_not_make_it_agrees():
    """Few tokens a column: the descent fits them and is refused; many: it is accepted. Both as raw held-out outputs say."""
    from test_selection import Text

    decisions = []
    for tokens, seed in ((32, 0), (32, 1), (32, 2), (4000, 3), (4000, 4)):
        text = Text(tokens, seed, kind="d", model=seed)
        folds = text.folds(tokens // 4, tokens // 2, 3 * tokens // 4)
        config, spec = SolverConfig(), QuantSpec(3, 8)
        made = merge(folds[:-1])
        plain = solve(text.W, made.h, spec, config).quantized
        moved, _ = descend(plain, spec, text.W, made.h)
        x, y = text.x[3 * tokens // 4 :], text.y[3 * tokens // 4 :]
        errors = [float((y - x @ dequantize(q, spec).double().T).square().sum()) for q in (plain, moved)]
        decision = descent_helps(text.W, folds, spec, config)
        assert decision == (errors[1] < errors[0])
        decisions.append(decision)
    assert decisions[-1] and not all(decisions)
    assert not descent_helps(text.W, folds[:1], spec, config)  # nothing to judge by
    assert splits(folds) and score(torch.zeros_like(text.W), text.W, folds[0]).abs().max() == 0
