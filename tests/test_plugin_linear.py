"""One quantized layer inside vLLM, without an engine: loading, what is refused by name, tensor-parallel sizes."""
import tempfile

import pytest
import torch

pytest.importorskip("vllm")

from checkpoints import rtn  # noqa: E402

from foem_vllm.errors import FoemError  # noqa: E402
from foem_vllm.format import FormatConfig, QuantSpec, dequantize, pack  # noqa: E402
from foem_vllm.plugin.config import FoemConfig  # noqa: E402
from foem_vllm.plugin.linear import FoemLinearMethod, check_partition, shard_outputs  # noqa: E402

FUSED = {"gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def single_rank():
    """vLLM's parameter classes ask for the tensor-parallel group."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    with set_current_vllm_config(VllmConfig()), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        cleanup_dist_env_and_memory()


def fused_layer(spec, tensors_of, checkpoint_format="gptq"):
    """A gate_up_proj of 2 x 64 outputs and 128 inputs, loaded by vLLM's own layer; tensors_of(i): {key: tensor} of shard i."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear
    config = FoemConfig(FormatConfig(spec, checkpoint_format))
    config.packed_modules_mapping = FUSED
    layer = MergedColumnParallelLinear(128, [64, 64], bias=False, params_dtype=torch.bfloat16, quant_config=config,
                                       prefix="mlp.gate_up_proj")
    assert isinstance(layer.quant_method, FoemLinearMethod)
    for shard in range(2):
        for key, tensor in tensors_of(shard).items():
            param = getattr(layer, key)
            param.weight_loader(param, tensor, shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def shard_tensors(spec, shard, checkpoint_format="gptq"):
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(shard))
    q = rtn(w, spec)
    centred = dequantize(q._replace(zeros=None), spec)  # scale * (code - mid): what the int4 operator computes first
    return pack(q, spec, checkpoint_format), dequantize(q, spec), centred


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(4, 32, False), QuantSpec(4, 32, True, "full"),
                                  QuantSpec(8, 64, False), QuantSpec(4, -1), QuantSpec(8, 48)], ids=str)
def test_fused_layer_computes_both_shards(single_rank, spec):
    parts = [shard_tensors(spec, i) for i in range(2)]
    layer = fused_layer(spec, lambda i: parts[i][0])
    x = torch.randn(3, 128).bfloat16()
    y = layer(x)[0]
    w, centred = (torch.cat([p[i] for p in parts]).double() for i in (1, 2))
    exact = x.double() @ w.T
    # Rounded are the result (2**-8) and, in the reference kernel alone, the weight; sums are float32, of codes not yet centred:
    # up to 16 times a weight (K 2**-20).
    terms = x.double().abs() @ (w.abs() + centred.abs() + (w - centred).abs()).T
    weight = 2.0**-8 * (layer.foem.kernel.name == "reference")
    assert bool(((y.double() - exact).abs() <= 1.01 * (2.0**-8 * exact.abs() + (weight + 128 * 2.0**-20) * terms)).all())
    assert not list(layer.parameters())  # nothing of the checkpoint's layout stays in memory


def edited(change, spec=QuantSpec(4, 32, True, "full")):  # noqa: B008
    def tensors_of(shard):
        tensors = dict(shard_tensors(spec, shard)[0])
        if shard == 1:
            change(tensors)
        return tensors
    return spec, tensors_of


@pytest.mark.parametrize("change,said", [
    (lambda t: t.pop("qweight"), "qweight was not loaded"),
    (lambda t: t.pop("g_idx"), "g_idx was not loaded"),
    (lambda t: t.update(g_idx=t["g_idx"].flip(0)), "g_idx .shard 1. differs"),
    (lambda t: t.update(g_idx=t["g_idx"] + 1), "g_idx"),
    (lambda t: t.update(qweight=torch.cat([t["qweight"]] * 2, 1)),
     r"qweight .shard 1. is torch.int32 \[16, 128\].*different models"),
    (lambda t: t.update(scales=t["scales"].int()), "scales .shard 1. is torch.int32"),
    (lambda t: t["scales"].view(-1)[3:4].fill_(float("nan")), "scales holds NaN"),
    (lambda t: t.update(qzeros=t["qzeros"] + 0x11111111), "qzeros holds 8.*stores 7"),
])
def test_bad_tensors_are_named(single_rank, change, said):
    with pytest.raises(FoemError, match=f"mlp.gate_up_proj.{said}"):
        fused_layer(*edited(change))


def test_wrong_zero_convention_both_ways(single_rank):
    spec = QuantSpec(4, 32)
    for written, claimed in (("gptq", "gptq_v2"), ("gptq_v2", "gptq")):
        with pytest.raises(FoemError, match="qzeros holds.*checkpoint_format"):
            fused_layer(spec, lambda i, w=written: shard_tensors(spec, i, w)[0], claimed)


def test_forced_kernel_that_cannot_run(single_rank, monkeypatch):
    monkeypatch.setenv("FOEM_KERNEL", "cuda_w4a16")
    with pytest.raises(FoemError, match="mlp.gate_up_proj: kernel 'cuda_w4a16' cannot run .*unset FOEM_KERNEL"):
        fused_layer(*edited(lambda t: None, QuantSpec(8, 32)))


@pytest.mark.parametrize("args,said", [
    ((QuantSpec(4, 128), 768, 384, [256], False), None),
    ((QuantSpec(4, -1), 768, 96, [256], False), None),
    ((QuantSpec(4, 128), 768, 192, [256], False), "192 inputs per rank"),
    ((QuantSpec(4, -1), 768, 12, [256], False), "12 inputs per rank"),
    ((QuantSpec(4, 64, True, "full"), 768, 384, [256], False), "activation order"),
    ((QuantSpec(4, 64), 768, 768, [12, 12], True), "12 outputs"),
    ((QuantSpec(4, 64), 768, 768, [12], False), None),
    ((QuantSpec(8, 64), 768, 768, [12, 12], True), None),
])
def test_tensor_parallel_sizes(args, said):
    if said is None:
        check_partition("layer", *args)
    else:
        with pytest.raises(FoemError, match=f"layer: .*{said}.*tensor-parallel-size"):
            check_partition("layer", *args)


def test_outputs_of_a_stored_tensor():
    layer = torch.nn.Module()
    assert shard_outputs(layer, [64, 64], 4, 1) == 256 and shard_outputs(layer, [64, 64], 4, None) == 512
    assert shard_outputs(layer, [64, 32, 32], 4, (0, 1)) == 384
    assert shard_outputs(layer, [64], 1, None) == 64
    layer.num_kv_head_replicas = 2
    assert [shard_outputs(layer, [64, 64, 64], 4, s) for s in "qkv"] == [256, 128, 128]
