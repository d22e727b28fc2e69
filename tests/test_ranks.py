"""What a rank computes: any cut of a stored linear gives the same columns and rows of its weight."""

import pytest
import torch

from foem_vllm.bits import pack_bits
from foem_vllm.errors import FoemError
from foem_vllm.format import FormatConfig, dequantize, pack, unpack
from foem_vllm.ranks import Regrouped, Share, assemble, joined, regroup, take
from foem_vllm.serving import STEP, expert_groups, kernel_groups, rank_groups
from foem_vllm.spec import Quantized, QuantSpec, group_index

N, K = 40, 200


def random_linear(spec: QuantSpec, k: int = K, seed: int = 0) -> Quantized:
    g = torch.Generator().manual_seed(seed)
    groups = spec.groups(k)
    codes = torch.randint(0, 1 << spec.bits, (N, k), generator=g, dtype=torch.uint8)
    zeros = None if spec.symmetric else torch.randint(1, 1 << spec.bits, (N, groups), generator=g, dtype=torch.uint8)
    g_idx = group_index(k, spec)[torch.randperm(k, generator=g)] if spec.desc_act else None
    return Quantized(codes, (torch.rand(N, groups, generator=g) + 0.5).half().float(), zeros, g_idx)


def weight(found: Regrouped, spec: QuantSpec, inputs: int) -> torch.Tensor:
    """[n, inputs]: what a kernel and the gathering before it compute, column by column."""
    columns = dequantize(found.q, QuantSpec(spec.bits, found.group_size))
    order = torch.arange(inputs) if found.order is None else found.order
    return torch.zeros(len(columns), inputs).index_add_(1, order, columns)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("order", ["none", "full"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, -1, 24])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_shares_make_up_the_linear(bits, group, symmetric, order, ranks):
    """50 inputs a rank: cut through words of every width and through groups; outputs in an order of their own."""
    spec = QuantSpec(bits, group, symmetric, order)
    q = random_linear(spec)
    stored, dense = pack(q, spec), dequantize(q, spec)
    outputs = torch.randperm(N, generator=torch.Generator().manual_seed(1))[: N // 2]
    for rank in range(ranks):
        start, stop = rank * K // ranks, (rank + 1) * K // ranks
        share = Share(N, K, outputs, (start, stop))
        taken = {key: take(key, t, spec, share, "layer") for key, t in stored.items()}
        assert taken["qweight"].shape == (-(-(stop - start) * bits // 32), len(outputs))
        found = regroup(assemble(taken, spec, "gptq", share, "layer"), spec)
        assert torch.equal(weight(found, spec, stop - start), dense[outputs, start:stop])
        assert found.group_size % STEP == 0 or found.q.scales.shape[1] == 1  # what every kernel takes
        if order == "none":
            assert (found.group_size, found.q.codes.shape[1]) == rank_groups(spec, start, stop)  # as the doctor predicts


def test_whole_groups_are_not_cut_and_their_order_is_left_to_the_kernel():
    spec = QuantSpec(4, 32, True, "full")
    q = random_linear(spec, 192)
    found = regroup(q, spec)
    assert found.order is None and found.group_size == 32 and torch.equal(found.q.g_idx, q.g_idx)
    plain = regroup(q._replace(g_idx=None), QuantSpec(4, 32))
    assert plain.q.g_idx is None and plain.order is None and torch.equal(plain.q.codes, q.codes)


def test_zero_points_that_are_all_the_middle_are_symmetric():
    spec = QuantSpec(4, 32, False)
    q = random_linear(spec, 192)._replace(zeros=torch.full((N, 6), 8, dtype=torch.uint8))
    assert regroup(q, spec).q.zeros is None


def test_joined():
    spec = QuantSpec(4, 32, False)
    a, b = random_linear(spec), random_linear(spec, seed=1)
    assert torch.equal(dequantize(joined([a, b]), spec), torch.cat([dequantize(a, spec), dequantize(b, spec)]))


def test_groups_for_kernels():
    assert kernel_groups([128, 128, 40]) == (128, 296) and kernel_groups([7]) == (7, 7)
    assert kernel_groups([96, 64, 128]) == (32, 288)  # cut, nothing added
    assert kernel_groups([40, 40]) == (16, 96)  # filled up
    assert rank_groups(QuantSpec(4, 128), 192, 384) == (64, 192) and rank_groups(QuantSpec(4, -1), 192, 384) == (192, 192)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_as_gptqmodel_writes_them(bits):
    """It subtracts one from all codes of a word at once, in integers of 32 bits; codes of three bits it wraps one by one."""
    raw = {"bits": bits, "group_size": 32, "sym": False, "quant_method": "gptq"}
    theirs = FormatConfig.from_json({**raw, "meta": {"quantizer": ["gptqmodel:7.7.0"]}})
    plain = FormatConfig.from_json({**raw, "meta": {"quantizer": ["another:1"]}})
    assert theirs.zero_format != plain.zero_format == theirs.checkpoint_format == "gptq"
    q = random_linear(theirs.spec)
    q.zeros[::3] = 0
    stored = pack(q, theirs.spec, "gptq_v2")
    if bits == 3:
        stored["qzeros"] = pack_bits((q.zeros.int() - 1) % 8, 3).T.contiguous()
    else:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        words = [[(int(word) - ones + 2**31) % 2**32 - 2**31 for word in row] for row in stored["qzeros"]]
        stored["qzeros"] = torch.tensor(words, dtype=torch.int32)
    share = Share(N, K, torch.tensor([1, 0, 39, 9]), (0, K))
    taken = {key: take(key, t, theirs.spec, share, "layer", theirs.zero_format) for key, t in stored.items()}
    assert torch.equal(assemble(taken, theirs.spec, theirs.zero_format, share, "layer").zeros, q.zeros[share.outputs])
    assert torch.equal(unpack(stored, theirs.spec, theirs.zero_format).zeros, q.zeros)
    with pytest.raises(FoemError, match="out of range"):
        unpack(stored, plain.spec, plain.zero_format)


def less_old_ones(words: torch.Tensor) -> torch.Tensor:
    """As GPTQModel took 1 from zero points of 3 bits before its pull request 2763: by word, with ones at every third bit from
    the third, the second and the first on."""
    ones = [sum(1 << bit for bit in range(first, 32, 3)) for first in (2, 1, 0)]
    rows = [[(int(word) - ones[i % 3] + 2**31) % 2**32 - 2**31 for i, word in enumerate(row)] for row in words]
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("release,old", [("5.0.0", True), ("5.0.0", False), ("7.7.0", False)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_of_3_bits_by_releases_of_gptqmodel(symmetric, release, old):
    spec = QuantSpec(3, 32, symmetric)
    zero_format = FormatConfig(spec, meta={"quantizer": [f"gptqmodel:{release}"]}).zero_format
    q = random_linear(spec)
    if not symmetric:
        near = torch.randn(q.zeros.shape, generator=torch.Generator().manual_seed(3)) * 1.2 + 3.5
        q = q._replace(zeros=near.round().clamp(0, 7).to(torch.uint8))
    stored = pack(q, spec, "gptq_v2")
    one_by_one = (torch.full((N, spec.groups(K)), 4) if symmetric else q.zeros.int()) - 1
    stored["qzeros"] = less_old_ones(stored["qzeros"]) if old else pack_bits(one_by_one % 8, 3).T.contiguous()
    found = unpack(stored, spec, zero_format)
    assert found.zeros is None if symmetric else torch.equal(found.zeros, q.zeros)
    share = Share(N, K, torch.tensor([5, 0, 39]), (32, 96))
    taken = {key: take(key, t, spec, share, "layer", zero_format) for key, t in stored.items()}
    zeros = assemble(taken, spec, zero_format, share, "layer").zeros
    assert zeros is None if symmetric else torch.equal(zeros, q.zeros[share.outputs])


def test_symmetric_zero_points_of_gptqmodel_are_those_of_all():
    config = FormatConfig(QuantSpec(4, 32), meta={"quantizer": "gptqmodel:7.7.0"})
    stored = pack(random_linear(config.spec), config.spec)
    assert unpack(stored, config.spec, config.zero_format).zeros is None
    assert FormatConfig(QuantSpec(4, 32), "gptq_v2", meta=config.meta).zero_format == "gptq_v2"


@pytest.mark.parametrize("counts,wanted", [
    ([[128, 64], [64, 128]], (64, 192)), ([[256, 256]], (128, 512)), ([[96, 96]], (32, 192)), ([[40, 40], [24, 57]], (16, 96)),
    ([[7]], (16, 16)), ([[48], [48]], (48, 48)), ([[16, 33], [48, 1]], (16, 64)), ([[512]], (512, 512)),
])  # fmt: skip
def test_groups_for_kernels_of_experts(counts, wanted):
    """All experts alike; sizes that triton_moe takes, by whose tests 16, 32, 64, 128 and one group are all there is."""
    assert expert_groups(counts) == wanted


@pytest.mark.parametrize("key,change,said", [
    ("scales", lambda t: t.index_fill_(1, torch.tensor(39), float("nan")), "layer.scales holds NaN"),
    ("scales", lambda t: t.half().int(), "layer.scales is torch.int32"),
    ("qweight", lambda t: t[1:], r"layer.qweight is torch.int32 \[24, 40\].*\[25, 40\]"),
    ("g_idx", lambda t: t + 7, "layer.g_idx holds 7..13, but there are 7 groups"),
    ("g_idx", lambda t: t.clamp(1), "layer.g_idx does not give every group 32 columns"),
])  # fmt: skip
def test_damage_outside_of_the_share_is_refused_too(key, change, said):
    """A rank that is not given the damaged part refuses it all the same: all ranks stop, none waits."""
    spec = QuantSpec(4, 32)
    stored = pack(random_linear(spec), spec)
    with pytest.raises(FoemError, match=said):
        take(key, change(stored[key]), spec, Share(N, K, torch.arange(4), (0, 100)), "layer")
