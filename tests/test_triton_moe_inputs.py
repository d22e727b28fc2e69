"""The grouped Triton kernel: its layouts and launches by themselves, and what it refuses. Numbers: test_triton_moe.py."""
import math

import pytest
import torch
from foem_kernels.problem import Problem
from foem_kernels.triton_moe import experts, grouped_configuration, interleave, most_blocks, prepare, supports
from test_triton_moe import Case, data, prepared


def test_interleave_puts_a_gate_and_its_up_eight_rows_apart():
    gate = torch.arange(1, 41)
    rows = interleave(torch.cat([gate, -gate])[:, None])[:, 0]
    assert rows.shape == (128,) and rows[80:].eq(0).all()
    assert rows.view(-1, 2, 8)[:5, 0].flatten().tolist() == gate.tolist()
    assert rows.view(-1, 2, 8)[:5, 1].flatten().tolist() == (-gate).tolist()


@pytest.mark.parametrize("counts, block_m", [((1, 1, 1), 16), ((17, 1, 0), 16), ((33, 33, 2), 32), ((64,), 64), ((5, 0, 0), 4)])
def test_no_routing_needs_more_blocks_than_there_is_room_for(counts, block_m):
    assert sum(math.ceil(c / block_m) for c in counts) <= most_blocks(sum(counts), len(counts), block_m)


def test_configurations_agree_on_the_block_of_rows_and_split_only_what_is_small():
    for e in (8, 64, 128, 256):
        for k in (1, 2, 8):
            for tokens in (1, 3, 16, 64, 256, 1024, 4096):
                for capability in ((8, 0), (9, 0), (10, 0)):
                    up, down = (grouped_configuration(tokens * k, e, e, *shape, 128, capability)
                                for shape in ((1536, 2048), (2048, 768)))
                    assert up.block_m == down.block_m
                    mean = tokens * k / e
                    assert up.block_m == 128 or mean + 2 * math.sqrt(mean) <= up.block_m
                    assert up.splits == 1 or min(e, tokens * k) * 12 * up.splits <= 3 * 132, "split beyond one wave"


@pytest.mark.parametrize("change, reason", [
    ({"bits": 8}, "4-bit"), ({"dtype": torch.float32}, "float16 or bfloat16"), ({"group_size": 48}, "groups of 16"),
    ({"k": 100, "group_size": 100}, "divisible by 16"), ({"k": 96, "group_size": 64}, "divisible"),
    ({"device": "cpu"}, "CUDA device")])
def test_refuses_with_a_reason(monkeypatch, change, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    values = {"n": 64, "k": 128, "bits": 4, "group_size": 64, "symmetric": True, "dtype": torch.float16, "device": "cuda"}
    p = Problem(**(values | change))
    assert reason in supports(p)
    with pytest.raises(ValueError, match=reason):
        prepare(torch.zeros(2, p.n, p.k, dtype=torch.uint8), torch.ones(2, p.n, p.groups), None, None, p)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = Case(4, 3, 2, 64, 32, 32, "float16")
    x, w13, w2, ids, weights, _ = data(case)
    return x, *prepared(case, w13, w2), ids, weights


@pytest.mark.parametrize("place, value, message", [
    (0, lambda t: t.float(), "float32"), (0, lambda t: t[:, :48], r"\[3, 48\].*64"), (3, lambda t: t[:2], r"topk_ids \[2, 2\]"),
    (3, lambda t: t.float(), "must be integers"), (4, lambda t: t[:, :1], r"topk_weights \[3, 1\]"),
    (4, lambda t: t.int(), "int32"), (1, lambda w: w | {"n": 128}, r"w13 is \[4, 128, 64\]"),
    (2, lambda w: w | {"w": w["w"][:3]}, r"w2 \[3, 64, 32\]")])
def test_what_does_not_fit_is_named(small, place, value, message):
    given = [value(t) if i == place else t for i, t in enumerate(small)]
    with pytest.raises(ValueError, match=message):
        experts(*given)


def test_unknown_activation_is_refused(small):
    with pytest.raises(ValueError, match="'relu2'.*silu, gelu, gelu_tanh"):
        experts(*small, "relu2")


@pytest.mark.parametrize("change, message", [
    ({"scales": torch.ones(4, 64, 3)}, r"scales is \[4, 64, 3\].*\[4, 64, 2\]"), ({"g_idx": torch.zeros(64)}, r"g_idx is \[64\]"),
    ({"g_idx": torch.zeros(4, 64)}, "g_idx gives groups 0 to 64 columns"),
    ({"codes": torch.zeros(4, 63, 64, dtype=torch.uint8)}, r"codes is \[4, 63, 64\]")])
def test_prepare_refuses_what_does_not_fit(monkeypatch, change, message):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    given = {"codes": torch.zeros(4, 64, 64, dtype=torch.uint8), "scales": torch.ones(4, 64, 2), "zeros": None, "g_idx": None}
    with pytest.raises(ValueError, match=message):
        prepare(**(given | change), p=Problem(64, 64, 4, 32, True, torch.float16, "cpu"))


def test_gate_and_up_must_be_equally_many(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="found 63"):
        prepare(torch.zeros(2, 63, 32, dtype=torch.uint8), torch.ones(2, 63, 1), None, None,
                Problem(63, 32, 4, 32, True, torch.float16, "cpu"), gated=True)
