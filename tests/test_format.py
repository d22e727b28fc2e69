"""The checkpoint bits against hand-made examples, compressed-tensors and vLLM."""

import json

import pytest
import torch

from foem_vllm.bits import slice_bits
from foem_vllm.errors import FoemError
from foem_vllm.format import (
    FormatConfig,
    Quantized,
    QuantSpec,
    check,
    dequantize,
    group_index,
    pack,
    pack_bits,
    read_config,
    unpack,
    unpack_bits,
)

SHAPES = [(32, 8), (64, 1), (1, 1), (37, 5), (96, 33), (256, 128)]


def random_quantized(n, k, spec, seed=0):
    g = torch.Generator().manual_seed(seed)
    groups = spec.groups(k)
    codes = torch.randint(0, 1 << spec.bits, (n, k), generator=g, dtype=torch.uint8)
    scales = (torch.rand(n, groups, generator=g) + 0.5).half().float()
    zeros = None if spec.symmetric else torch.randint(1, 1 << spec.bits, (n, groups), generator=g, dtype=torch.uint8)
    g_idx = group_index(k, spec)[torch.randperm(k, generator=g)] if spec.desc_act else None
    return Quantized(codes, scales, zeros, g_idx)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_bits_round_trip(bits, shape):
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (-(-shape[0] * bits // 32), shape[1])
    assert torch.equal(unpack_bits(words, bits, shape[0]), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pack_bits_is_a_little_endian_bit_stream(bits):
    """Independent of the implementation: one Python integer per column, code k at bit k * bits."""
    codes = torch.randint(0, 1 << bits, (64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    words = pack_bits(codes, bits)
    for column in range(3):
        stream = sum(int(c) << (i * bits) for i, c in enumerate(codes[:, column]))
        expected = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(words.shape[0])]
        assert [int(w) & 0xFFFFFFFF for w in words[:, column]] == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("start,stop", [(0, 96), (0, 50), (32, 96), (33, 64), (5, 6), (50, 96), (64, 64)])
def test_slice_bits(bits, start, stop):
    codes = torch.randint(0, 1 << bits, (96, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    words = slice_bits(pack_bits(codes, bits), bits, start, stop)
    assert words.shape == (-(-(stop - start) * bits // 32), 5)
    assert torch.equal(unpack_bits(words, bits, stop - start), codes[start:stop])


def test_two_by_eight_by_hand():
    """W [2, 8], one group, 4 bits, symmetric: every stored word worked out on paper."""
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [15, 14, 13, 12, 11, 10, 9, 8]], dtype=torch.uint8)
    q = Quantized(codes, torch.tensor([[0.5], [0.25]]))
    spec = QuantSpec(4, 8)
    stored = pack(q, spec, "gptq")
    assert [int(w) & 0xFFFFFFFF for w in stored["qweight"].flatten()] == [0x76543210, 0x89ABCDEF]
    assert stored["qzeros"].tolist() == [[0x77]]  # version 1 stores 8 - 1
    assert pack(q, spec, "gptq_v2")["qzeros"].tolist() == [[0x88]]
    assert stored["scales"].tolist() == [[0.5, 0.25]] and stored["scales"].dtype == torch.float16
    assert stored["g_idx"].tolist() == [0] * 8
    assert dequantize(q, spec).tolist() == [[-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5], [1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25, 0]]


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "n,k,group,order",
    [(8, 64, 32, "none"), (5, 96, 32, "full"), (33, 40, -1, "none"), (7, 37, -1, "none"), (16, 128, 16, "group")],
)
def test_pack_unpack_are_inverse(n, k, group, order, bits, symmetric, checkpoint_format):
    spec = QuantSpec(bits, group, symmetric, order)
    q = random_quantized(n, k, spec)
    back = unpack(pack(q, spec, checkpoint_format), spec, checkpoint_format)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scales.float(), q.scales)
    assert (back.zeros is None) == symmetric and (symmetric or torch.equal(back.zeros, q.zeros))
    assert (back.g_idx is None) == (q.g_idx is None) and (q.g_idx is None or torch.equal(back.g_idx, q.g_idx))
    assert torch.equal(dequantize(back, spec), dequantize(q, spec))


@pytest.mark.parametrize("bits", [4, 8])
def test_against_compressed_tensors(bits):
    """Its signed int codes packed along K, transposed, are our qweight."""
    pack_quantized = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized", reason="compressed-tensors not installed"
    )
    codes = torch.randint(0, 1 << bits, (24, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    theirs = pack_quantized.pack_to_int32(signed, bits)
    assert torch.equal(pack_bits(codes.T, bits), theirs.T)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_against_vllm(bits):
    """vLLM's own GPTQ packing of the same codes, and its reading of ours."""
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.quant_utils", reason="vLLM not installed")
    codes = torch.randint(0, 1 << bits, (48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    theirs = utils.gptq_pack(codes.T.int().contiguous(), bits, 64, 48)
    ours = pack_bits(codes.T, bits)
    assert torch.equal(ours, theirs)
    if bits in (4, 8):
        from vllm.scalar_type import scalar_types

        kind = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits]
        assert torch.equal(utils.unpack_quantized_values_into_int32(ours, kind, 0), codes.T.int())


def test_zero_point_zero_needs_version_2():
    spec = QuantSpec(4, 8, symmetric=False)
    q = Quantized(torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1), torch.tensor([[0], [3]], dtype=torch.uint8))
    with pytest.raises(FoemError, match="gptq_v2"):
        pack(q, spec, "gptq")
    assert torch.equal(unpack(pack(q, spec, "gptq_v2"), spec, "gptq_v2").zeros, q.zeros)


def test_inexact_scales_are_refused():
    q = Quantized(torch.zeros(1, 8, dtype=torch.uint8), torch.tensor([[0.1]]))
    with pytest.raises(FoemError, match="float16"):
        pack(q, QuantSpec(4, 8))


def broken(change):
    spec = QuantSpec(4, 32)
    tensors = pack(random_quantized(8, 64, spec), spec)
    change(tensors)
    return tensors, spec


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.update(qweight=t["qweight"][:-1]), r"layer\.qweight.*\[8, 8\]"),
        (lambda t: t.update(qweight=t["qweight"].float()), r"layer\.qweight"),
        (lambda t: t.pop("qzeros"), r"layer\.qzeros is missing"),
        (lambda t: t.update(scales=t["scales"][:1]), r"layer\.scales"),
        (lambda t: t["scales"].fill_(float("nan")), r"layer\.scales holds NaN"),
        (lambda t: t["qzeros"].fill_(-2004318072), r"layer\.qzeros holds 8 where symmetric checkpoint_format 'gptq' stores 7"),
        (lambda t: t["g_idx"].fill_(5), r"layer\.g_idx holds 5"),
        (lambda t: t["g_idx"].fill_(0), r"layer\.g_idx does not give every group 32 columns"),
    ],
)
def test_damaged_tensors_are_refused(change, message):
    tensors, spec = broken(change)
    with pytest.raises(FoemError, match=message):
        check(tensors, spec, "gptq", "layer", 64, 8)


def test_config_round_trip():
    config = FormatConfig(QuantSpec(3, 64, False, "full"), "gptq_v2", True, {"-:lm_head": {}}, {"foem": {"beta": 0.2}})
    assert FormatConfig.from_json(config.to_json()) == config


WRITERS = {  # what each writes beside the keys that matter, shortened; the values are those of published checkpoints
    "GPTQ-for-LLaMa": ({"wbits": 4, "groupsize": 128}, QuantSpec(4, 128, False)),
    "AutoGPTQ 0.2": ({"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": True, "sym": True, "true_sequential": True,
                      "model_name_or_path": None, "model_file_base_name": "gptq_model-4bit-128g"},
                     QuantSpec(4, 128, True, "full")),
    "AutoGPTQ 0.7": ({"bits": 3, "group_size": -1, "desc_act": True, "static_groups": False, "sym": False, "quant_method": "gptq",
                      "checkpoint_format": "gptq", "is_marlin_format": False}, QuantSpec(3, -1, False, "full")),
    "static groups": ({"bits": 4, "group_size": 64, "desc_act": True, "static_groups": True, "sym": True},
                      QuantSpec(4, 64, True, "static")),
    "Optimum": ({"batch_size": 1, "bits": 4, "block_name_to_quantize": "model.decoder.layers", "cache_block_outputs": True,
                 "damp_percent": 0.1, "dataset": "c4", "desc_act": False, "exllama_config": {"version": 1}, "group_size": 128,
                 "max_input_length": None, "meta": None, "model_seqlen": 2048, "modules_in_block_to_quantize": None,
                 "quant_method": "gptq", "sym": True, "tokenizer": None, "use_exllama": True}, QuantSpec(4, 128)),
    "AutoRound": ({"autoround_version": "0.5.1", "bits": 2, "block_name_to_quantize": "model.layers", "damp_percent": 0.01,
                   "data_type": "int", "desc_act": False, "enable_quanted_input": True, "group_size": 32, "iters": 200,
                   "provider": "auto-round", "quant_method": "gptq", "sym": False, "true_sequential": False},
                  QuantSpec(2, 32, False)),
    "GPTQModel": ({"bits": 4, "checkpoint_format": "gptq", "desc_act": False, "dynamic": {"-:.*lm_head": {}}, "group_size": 128,
                   "lm_head": False, "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_auto_increment": 0.01}, "method": "gptq",
                   "pack_dtype": "int32", "quant_method": "gptq", "sym": True}, QuantSpec(4, 128)),
    "GPTQModel 1": ({"bits": 8, "format": "gptq_v2", "group_size": 32, "sym": False}, QuantSpec(8, 32, False)),
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
def test_configs_of_all_writers(writer, tmp_path):
    """Read as they are, from config.json and from a quantize_config.json alone."""
    config, spec = WRITERS[writer]
    read = FormatConfig.from_json(config)
    assert read.spec == spec and read.checkpoint_format == ("gptq_v2" if writer == "GPTQModel 1" else "gptq")
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert read_config(tmp_path) == read


def test_dynamic_rules():
    config = FormatConfig(
        QuantSpec(), dynamic={r"-:.*\.1\.": {}, r"+:.*down_proj": {"bits": 8, "group_size": 32}, r".*up": {"sym": False}}
    )
    assert config.spec_for("layers.1.mlp.down_proj") is None
    assert config.spec_for("layers.0.mlp.down_proj") == QuantSpec(8, 32)
    assert config.spec_for("layers.0.mlp.up_proj") == QuantSpec(symmetric=False)
    assert config.spec_for("layers.0.self_attn.q_proj") == QuantSpec()
    ordered = {"bits": 4, "sym": True, "group_size": -1, "desc_act": True, "dynamic": {".*down": {"group_size": 32}}}
    assert FormatConfig.from_json(ordered).spec_for("layers.0.mlp.down_proj") == QuantSpec(4, 32, True, "full")
    assert FormatConfig.from_json(ordered).spec_for("layers.0.mlp.up_proj") == QuantSpec(4, -1)  # one group: nothing to order
    with pytest.raises(FoemError, match="rule 'q': bits=16"):
        FormatConfig(QuantSpec(), dynamic={"q": {"bits": 16}}).spec_for("q_proj")


@pytest.mark.parametrize(
    "config,message",
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"bits": 5, "group_size": 128}, "bits=5"),
        ({"group_size": 128}, "incomplete"),
        ({"bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "marlin"),
        ({"bits": 4, "group_size": 0}, "group_size=0"),
        ({"bits": 4, "group_size": 128, "pack_dtype": "int16"}, "pack_dtype"),
        ({"bits": 4, "group_size": 128, "is_marlin_format": True}, "marlin"),
        ({"bits": "4", "group_size": 128}, "bits='4' must be an integer"),
        ({"bits": True, "group_size": 128}, "bits=True must be an integer"),
        ({"bits": 4, "sym": "false"}, "sym='false' must be true or false"),
        ({"bits": 4, "dynamic": {"+:(": {}}}, "rule '.:.' is not a regular expression"),
        ({"bits": 4, "dynamic": {"up": 8}}, "rule 'up' must hold an object"),
        ({"bits": 4, "dynamic": {"up": {"bits": "8"}}}, "rule 'up': bits='8' must be an integer"),
        ({"bits": 4, "dynamic": ["up"]}, "`dynamic` is list"),
        ("gptq", "is str, not an object"),
    ],
)
def test_configs_that_lie_are_refused(config, message):
    with pytest.raises(FoemError, match=message):
        FormatConfig.from_json(config)


def test_read_config_errors(tmp_path):
    with pytest.raises(FoemError, match="not a GPTQ checkpoint"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FoemError, match="not valid JSON"):
        read_config(tmp_path)
