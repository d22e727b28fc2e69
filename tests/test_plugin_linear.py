"""One quantized layer inside vLLM, without an engine: every form of checkpoint, and what is refused by name."""
import logging
import tempfile

import pytest
import torch

pytest.importorskip("vllm")

from checkpoints import rtn  # noqa: E402

from foem_vllm.errors import FoemError  # noqa: E402
from foem_vllm.format import FormatConfig, QuantSpec, dequantize, pack  # noqa: E402
from foem_vllm.plugin import linear  # noqa: E402
from foem_vllm.plugin.config import FoemConfig  # noqa: E402
from foem_vllm.plugin.linear import FoemLinearMethod, shard_modules, stored_outputs  # noqa: E402

FUSED = {"gate_up_proj": ["gate_proj", "up_proj"]}
K, N = 128, 64


@pytest.fixture(scope="module")
def single_rank():
    """vLLM's layers ask for the tensor-parallel group."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    with set_current_vllm_config(VllmConfig()), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        cleanup_dist_env_and_memory()


def empty_layer(specs, checkpoint_format="gptq", bias=True):
    """A gate_up_proj of 2 x N outputs and K inputs, made by vLLM."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear
    config = FoemConfig(FormatConfig(QuantSpec(), checkpoint_format))
    config.modules = {f"mlp.{name}": spec for name, spec in zip(FUSED["gate_up_proj"], specs) if spec}
    config.packed_modules_mapping = FUSED
    layer = MergedColumnParallelLinear(K, [N, N], bias=bias, params_dtype=torch.bfloat16, quant_config=config,
                                       prefix="mlp.gate_up_proj")
    assert isinstance(layer.quant_method, FoemLinearMethod) == any(specs)
    return layer


def fused_layer(specs, tensors_of, checkpoint_format="gptq"):
    """The same, loaded; tensors_of(i): {key: tensor} of shard i."""
    layer = empty_layer(specs, checkpoint_format)
    for shard in range(2):
        for key, tensor in tensors_of(shard).items():
            param = getattr(layer, key)
            param.weight_loader(param, tensor, shard)
    layer.bias.data.copy_(torch.arange(2 * N) / N)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def shard_tensors(spec, shard, checkpoint_format="gptq", order=0):
    """(stored tensors, weight, scale * (code - mid), what kernels may compute first) of shard 0 or 1; spec None: unquantized."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(shard))
    if spec is None:
        w = w.bfloat16().float()
        return {"weight": w.bfloat16()}, w, w
    q = rtn(w, spec, order=order)
    return pack(q, spec, checkpoint_format), dequantize(q, spec), dequantize(q._replace(zeros=None), spec)


def agrees(layer, parts) -> bool:
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(9)).bfloat16()
    y = layer(x)[0]
    w, centred = (torch.cat([p[i] for p in parts]).double() for i in (1, 2))
    exact = x.double() @ w.T + layer.bias.double()
    # Rounded are the result, before and after the bias (2**-8 each) and, in the reference kernel alone, the weight; sums are
    # float32, of codes not yet centred: up to 16 times a weight (K 2**-20).
    terms = x.double().abs() @ (w.abs() + centred.abs() + (w - centred).abs()).T
    prepared = [part.weights for part in layer.foem if not isinstance(part.weights, torch.Tensor)]
    weight = 2.0**-8 * any(p.kernel.name == "reference" for p in prepared)
    rounding = 2.0**-8 * (exact.abs() + (exact - layer.bias.double()).abs())
    return bool(((y.double() - exact).abs() <= 1.01 * (rounding + (weight + K * 2.0**-20) * terms)).all())


SPECS = [QuantSpec(4, 32), QuantSpec(4, 32, False), QuantSpec(4, 32, True, "full"), QuantSpec(8, 64, False), QuantSpec(4, -1),
         QuantSpec(8, 48), QuantSpec(2, 32), QuantSpec(2, 16, False), QuantSpec(3, 64), QuantSpec(3, 32, False, "full"),
         QuantSpec(3, -1, False), QuantSpec(4, 20, False), QuantSpec(2, 48, True, "full")]


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fused_layer_computes_both_shards(single_rank, spec, checkpoint_format):
    parts = [shard_tensors(spec, i, checkpoint_format) for i in range(2)]
    layer = fused_layer([spec] * 2, lambda i: parts[i][0], checkpoint_format)
    assert agrees(layer, parts) and len(layer.foem) == 1
    assert [name for name, _ in layer.named_parameters()] == ["bias"]  # nothing of the checkpoint's layout stays in memory
    assert layer.foem[0].weights.kernel.name != "reference"


@pytest.mark.parametrize("specs,products", [
    ([QuantSpec(4, 32), QuantSpec(8, 64, False)], 2), ([QuantSpec(4, 32), None], 2), ([None, QuantSpec(3, 128)], 2),
    ([QuantSpec(4, 32, True, "full")] * 2, 2),
], ids=str)
def test_fused_modules_may_be_quantized_differently(single_rank, specs, products):
    """Other bits, no bits at all, another order of columns: one product for each."""
    parts = [shard_tensors(spec, i, order=i) for i, spec in enumerate(specs)]
    layer = fused_layer(specs, lambda i: parts[i][0])
    assert agrees(layer, parts) and len(layer.foem) == products


def test_activation_order_is_read_from_the_data(single_rank):
    """Old configs have no desc_act: g_idx alone says it."""
    parts = [shard_tensors(QuantSpec(4, 32, True, "full"), i) for i in range(2)]
    assert agrees(fused_layer([QuantSpec(4, 32)] * 2, lambda i: parts[i][0]), parts)


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(3, 64, False)], ids=str)
def test_order_of_arrival_and_modules_fused_on_disk(single_rank, spec):
    """The four tensors of both modules at once, as Phi-3 stores them; a module's name then has no parts."""
    parts = [shard_tensors(spec, i) for i in range(2)]
    whole = rtn(torch.cat([torch.randn(N, K, generator=torch.Generator().manual_seed(i)) for i in range(2)]), spec)
    stored = pack(whole, spec)
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear
    config = FoemConfig(FormatConfig(spec))
    config.modules = {"mlp.gate_up_proj": spec}
    layer = MergedColumnParallelLinear(K, [N, N], params_dtype=torch.bfloat16, quant_config=config, prefix="mlp.gate_up_proj")
    for key in ("g_idx", "scales", "qzeros", "qweight"):
        getattr(layer, key).weight_loader(getattr(layer, key), stored[key])
    layer.bias.data.zero_()
    layer.quant_method.process_weights_after_loading(layer)
    assert agrees(layer, parts) and len(layer.foem) == 1


def edited(change, spec=QuantSpec(4, 32, True, "full")):  # noqa: B008
    def tensors_of(shard):
        tensors = dict(shard_tensors(spec, shard)[0])
        if shard == 1:
            change(tensors)
        return tensors
    return [spec] * 2, tensors_of


@pytest.mark.parametrize("change,said", [
    (lambda t: t.pop("qweight"), "qweight was not loaded"),
    (lambda t: t.clear(), "qweight was not loaded"),
    (lambda t: t.pop("scales"), "scales was not loaded"),
    (lambda t: t.pop("g_idx"), "g_idx was not loaded"),
    (lambda t: t.update(g_idx=t["g_idx"] + 1), "g_idx holds 1..4, but there are 4 groups"),
    (lambda t: t["g_idx"][:5].fill_(3), "g_idx does not give every group 32 columns"),
    (lambda t: t.update(qweight=torch.cat([t["qweight"]] * 2, 1)), r"qweight is torch.int32 \[16, 128\].*need.*\[16, 64\]"),
    (lambda t: t.update(scales=t["scales"].int()), "scales is torch.int32"),
    (lambda t: t["scales"].view(-1)[3:4].fill_(float("nan")), "scales holds NaN"),
    (lambda t: t["scales"].view(-1)[3:4].fill_(float("inf")), "scales holds NaN or Inf"),
    (lambda t: t["qzeros"][0, :1].fill_(0x77777778), "qzeros holds 8 where symmetric.*stores 7"),
    (lambda t: t.update(qzeros=t["qzeros"] + 0x22222222), "qzeros holds .*sym"),
])
def test_bad_tensors_are_named(single_rank, change, said):
    with pytest.raises(FoemError, match=f"mlp.up_proj.{said}"):
        fused_layer(*edited(change))


def test_unquantized_tensor_of_another_size(single_rank):
    with pytest.raises(FoemError, match=r"mlp.up_proj.weight is \[64, 64\].*makes it \[64, 128\]"):
        stored = [shard_tensors(QuantSpec(4, 32), 0)[0], {"weight": torch.zeros(64, 64)}]
        fused_layer([QuantSpec(4, 32), None], stored.__getitem__)


@pytest.fixture
def said():
    """What is logged. Not `caplog`: it sees a record twice where another test has handed our loggers to vLLM's."""
    heard, handler = [], logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    linear.logger.addHandler(handler)
    yield heard
    linear.logger.removeHandler(handler)


def test_symmetric_zeros_of_the_other_version_are_resolved_and_said(single_rank, said):
    """vLLM never reads them, so files with a wrong checkpoint_format circulate; a symmetric zero point can only be the middle."""
    spec = QuantSpec(4, 32)
    linear.say_relabelled.cache_clear()
    for written, claimed in (("gptq", "gptq_v2"), ("gptq_v2", "gptq")):
        parts = [shard_tensors(spec, i, written) for i in range(2)]
        assert agrees(fused_layer([spec] * 2, lambda i, p=parts: p[i][0], claimed), parts)
    assert len(said) == 2 and "says checkpoint_format 'gptq_v2', but symmetric zero points are stored as in 'gptq'" in said[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("written,claimed", [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_asymmetric_zeros_of_the_other_version_are_refused(single_rank, written, claimed, bits):
    """Off by one, every weight of a matrix lies one step too high or too low: no trained matrix does."""
    spec = QuantSpec(bits, 32, False)
    parts = [shard_tensors(spec, i, written)[0] for i in range(2)]
    if claimed == "gptq":  # else it is refused for a stored value that version 1 does not have
        parts = [pack(rtn(torch.randn(N, K), spec)._replace(zeros=torch.full((N, 4), 1, dtype=torch.uint8)), spec, written)
                 if bits == 2 else p for p in parts]
    with pytest.raises(FoemError, match="mlp.gate_proj.qzeros.*(stored as|quantize again with checkpoint_format)"):
        fused_layer([spec] * 2, lambda i: parts[i], claimed)


def test_zero_points_out_of_range(single_rank):
    spec = QuantSpec(4, 32, False)
    with pytest.raises(FoemError, match="mlp.up_proj.qzeros holds 15.*zero point 16, out of range.*gptq_v2"):
        fused_layer(*edited(lambda t: t["qzeros"][1, 2:3].fill_(0x333333F3), spec))


def test_loading_a_second_time_is_refused(single_rank):
    """vLLM's own way of reloading: its loaders come back, but what the kernel laid out cannot be taken apart."""
    from vllm.model_executor.model_loader.reload import layerwise
    tensors = shard_tensors(QuantSpec(4, 32), 0)[0]
    layer = empty_layer([QuantSpec(4, 32)] * 2)
    layerwise.record_metadata_for_reloading(layer)
    for shard in range(2):
        for key, tensor in tensors.items():
            getattr(layer, key).weight_loader(getattr(layer, key), tensor, shard)
        layer.bias.weight_loader(layer.bias, torch.ones(N), shard)
    layer.quant_method.process_weights_after_loading(layer)
    layerwise.initialize_layerwise_reload(layer)
    with pytest.raises(FoemError, match=r"mlp.gate_up_proj.qweight: .* sleep level 2\); start the server again"):
        layer.qweight.weight_loader(layer.qweight, tensors["qweight"], 0)


def test_forced_kernel_that_cannot_run(single_rank, monkeypatch):
    monkeypatch.setenv("FOEM_KERNEL", "cuda_w4a16")
    with pytest.raises(FoemError, match="mlp.gate_up_proj: kernel 'cuda_w4a16' cannot run .*unset FOEM_KERNEL"):
        fused_layer(*edited(lambda t: None, QuantSpec(8, 32)))


def test_outputs_of_a_stored_tensor():
    layer = torch.nn.Module()
    assert stored_outputs(layer, [64, 64], 4) == [256, 256] and stored_outputs(layer, [64], 1) == [64]
    layer.num_kv_head_replicas = 2
    assert stored_outputs(layer, [64, 64, 64], 4) == [256, 128, 128]
    layer.org_vocab_size = 1000
    assert stored_outputs(layer, [512], 2) == [1000]


def test_modules_of_a_shard():
    assert [list(shard_modules(s, 3)) for s in (None, 1, "v", (0, 1))] == [[0, 1, 2], [1], [2], [0, 1]]
    assert shard_modules("index_q", 3) is None and shard_modules(3, 3) is None


# Layers that are not quantized, of a checkpoint that lacks them

def plain_layer(kind: str):
    """An unquantized layer of a quantized model, made by vLLM, and the tensors that fill it: [(tensor, shard)]."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    config = FoemConfig(FormatConfig(QuantSpec()))
    config.modules, config.packed_modules_mapping = {"mlp.other": QuantSpec()}, FUSED
    options = dict(params_dtype=torch.bfloat16, quant_config=config)
    if kind == "fused":
        layer = MergedColumnParallelLinear(K, [N, N], bias=False, prefix="mlp.gate_up_proj", **options)
        return layer, [(torch.ones(N, K), 0), (torch.ones(N, K), 1)]
    if kind == "row":
        return RowParallelLinear(K, N, bias=False, prefix="mlp.down_proj", **options), [(torch.ones(N, K), None)]
    made = {"embedding": VocabParallelEmbedding, "head": ParallelLMHead}[kind]
    return made(100, K, prefix=kind, **options), [(torch.ones(100, K), None)]  # padded to 128 rows


@pytest.mark.parametrize("kind", ["fused", "row", "embedding", "head"])
def test_unquantized_layers_that_the_checkpoint_lacks_are_refused(single_rank, kind):
    """vLLM leaves them as their memory was; what it makes when all is there stays as it is."""
    for lacking in (True, False):
        layer, tensors = plain_layer(kind)
        for tensor, shard in tensors[lacking:]:
            layer.weight.weight_loader(layer.weight, tensor, *(() if shard is None else (shard,)))
        if lacking:
            with pytest.raises(FoemError, match=r"weight was not loaded, or only a part of it.*download or quantize"):
                layer.quant_method.process_weights_after_loading(layer)
    layer.quant_method.process_weights_after_loading(layer)
    if kind == "embedding":
        assert torch.equal(layer(torch.tensor([3, 99])).float(), torch.ones(2, K))
    elif kind != "head":
        assert torch.equal(layer(torch.ones(2, K, dtype=torch.bfloat16))[0].float().unique(), torch.tensor([float(K)]))


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), None], ids=str)
@pytest.mark.parametrize("has,stored,said", [
    (True, (1.0, 0.0), None), (True, (1.0,), "gate_up_proj.bias was not loaded, or only a part of it.*download or quantize"),
    (True, (), "gate_up_proj.bias was not loaded"), (False, (), None), (False, (0.0, 0.0), None),
    (False, (0.0, 1.0), "gate_up_proj.bias is in the checkpoint, but the model's config.json makes the layer one without bias"),
])
def test_biases_are_those_of_the_checkpoint(single_rank, spec, has, stored, said):
    """vLLM leaves one that is missing as its memory was, and passes over one that the model has not."""
    layer = empty_layer([spec] * 2, bias=has)

    def load():
        for shard in range(2):
            for key, tensor in shard_tensors(spec, shard)[0].items():
                getattr(layer, key).weight_loader(getattr(layer, key), tensor, shard)
        for shard, value in enumerate(stored):
            layer.bias.weight_loader(layer.bias, torch.full((N,), value), shard)
        layer.quant_method.process_weights_after_loading(layer)
    if said:
        with pytest.raises(FoemError, match=said):
            load()
        return
    load()
    x = torch.ones(1, K, dtype=torch.bfloat16)
    assert "register_parameter" not in vars(layer) and dict(layer.named_parameters()).get("bias", layer.bias) is layer.bias
    expected = layer(x)[0] - (layer.bias if has else 0)
    assert layer.bias is None or torch.equal(layer.bias.float(), torch.tensor(stored).repeat_interleave(N))
    exact = (x.float() @ torch.cat([shard_tensors(spec, shard)[1] for shard in range(2)]).T)
    assert (expected.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("stored,warned", [("mlp.gate_proj", False), ("mlp.key_value", True), ("attn.key_value", False)])
def test_modules_that_no_layer_is_made_of_are_said(single_rank, said, stored, warned):
    """Beside layers that vLLM has made; others may be of a tower or a stage that it has not."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    config = FoemConfig(FormatConfig(QuantSpec()))
    config.modules = {"mlp.up_proj": QuantSpec(), stored: QuantSpec()}
    config.packed_modules_mapping = FUSED
    MergedColumnParallelLinear(K, [N, N], bias=False, prefix="mlp.gate_up_proj", quant_config=config)
    assert not said
    ParallelLMHead(100, K, prefix="head", quant_config=config)
    assert len(said) == warned and all(f"{stored}, the first of 1, is quantized" in line for line in said)


def test_embeddings_may_come_from_another_model_while_drafting(single_rank, monkeypatch):
    """vLLM gives a model that drafts the other's embedding and head, but only when both are loaded."""
    from types import SimpleNamespace

    from foem_vllm.plugin import compat
    engine = SimpleNamespace(speculative_config=object())
    monkeypatch.setattr(compat, "get_current_vllm_config_or_none", lambda: engine, raising=False)
    for kind in ("embedding", "head"):
        layer, _ = plain_layer(kind)
        layer.quant_method.process_weights_after_loading(layer)
    layer, _ = plain_layer("row")
    with pytest.raises(FoemError, match="was not loaded"):
        layer.quant_method.process_weights_after_loading(layer)
