"""What stock vLLM refuses, as `foem doctor` says it without vLLM: against vLLM's own rules."""
from __future__ import annotations

import itertools

import foem_kernels
import pytest
import torch

from foem_vllm import stock
from foem_vllm.format import FormatConfig, QuantSpec
from foem_vllm.layers import FUSED, Layer, Product


@pytest.mark.parametrize("bits,sym,group,order,dynamic", [
    *itertools.product((2, 3, 4, 8), (True, False), (-1, 64), (False, True), (None,)),
    (4, True, 64, False, {"+:.*q_proj": {"bits": 3}}), (4, True, 64, False, {"-:.*q_proj": {}}),
    (4, True, 64, False, {".*q_proj": {"desc_act": True}}), (4, True, -1, True, {".*q_proj": {"group_size": 32}}),
    (4, True, 64, False, {".*q_proj": {"bits": None, "group_size": 32}}), (4, True, 64, False, {".*q_proj": {"sym": False}}),
    (4, True, 64, False, {".*vision": {"bits": 3}}), (4, True, 64, False, {".*vision": {"desc_act": True}}),
])
def test_stock_rules_of_configs_are_vllms(bits, sym, group, order, dynamic):
    """Of a model with one linear. vLLM looks at the order of columns also in rules that match nothing."""
    gptq = pytest.importorskip("vllm.model_executor.layers.quantization.auto_gptq")
    raw = {"quant_method": "gptq", "bits": bits, "sym": sym, "group_size": group, "desc_act": order, "dynamic": dynamic}

    def refused() -> bool:
        try:
            config = gptq.AutoGPTQConfig.from_config(raw)
            for rule in dynamic or {}:
                if not rule.startswith("-:"):
                    gptq.override_config(config, "model.layers.0.self_attn.q_proj")
        except ValueError:
            return True
        return False
    name, config = "model.layers.0.self_attn.q_proj", FormatConfig.from_json(raw)
    layers = []
    if spec := config.spec_for(name):
        problem = foem_kernels.Problem(64, 64, spec.bits, 64, spec.symmetric, torch.bfloat16, "cpu")
        layers = [Layer(name, {name: spec}, 64, 64, 64, (Product(spec, 64, problem),))]
    assert bool(stock.refusals(raw, config, layers, "sm_90")) == refused()


@pytest.mark.parametrize("model,fused,members", [
    *((model, name, FUSED[name]) for model, fused in stock.UNSAID.items() for name in fused),
    *((model, name, FUSED[name]) for model, name in (("K2HorizonForCausalLM", "qkv_proj"), ("LlamaForCausalLM", "gate_up_proj"))),
    *((model, fused, (fused,)) for model, fused in stock.FUSED_BEFORE.items()),
    ("Phi3ForCausalLM", "qkv_proj", ("qkv_proj",)),
])
def test_stock_finds_what_is_quantized_by_what_classes_say(model, fused, members):
    """Against vLLM's look-up, with what its class of that model says of fused modules."""
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.gptq_utils")
    from vllm import ModelRegistry
    said = getattr(ModelRegistry._try_load_model_cls(model), "packed_modules_mapping", None) or {}
    names = [f"model.layers.0.self_attn.{name}" for name in members]
    found = utils.is_layer_gptq_quantized(f"model.layers.0.self_attn.{fused}", names, said)
    spec = QuantSpec(4, 64)
    problem = foem_kernels.Problem(64, 64, 4, 64, True, torch.bfloat16, "cpu")
    layer = Layer(f"model.layers.0.self_attn.{fused}", dict.fromkeys(names, spec), 64, 64, 64, (Product(spec, 64, problem),))
    assert found == (not list(stock.fusion_refusals(layer, [model])))


def test_stock_needs_keys_that_old_configs_lack():
    assert list(stock.config_refusals({"bits": 4, "group_size": 128})) == ["the config has no desc_act and no sym"]


@pytest.mark.parametrize("bits,group", [*itertools.product((4, 8), (-1, 16, 32, 64, 128, 48))])
def test_stock_rules_of_shapes_are_vllms(every_cpu, bits, group):
    """Against the two places where vLLM's linear method refuses: its check of the width, and the choice of a kernel."""
    pytest.importorskip("vllm")
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.model_executor.layers.quantization.utils.marlin_utils import verify_marlin_supported
    from vllm.scalar_type import scalar_types
    kind = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits]
    spec = QuantSpec(bits, group)
    config = FormatConfig(spec)
    for k, n in itertools.product((128, 192, 144, 96), (64, 100, 96)):
        if group > 0 and k % group:
            continue  # refused by the loader, not by a rule
        try:
            verify_marlin_supported(kind, group)
            choose_mp_linear_kernel(MPLinearLayerConfig((k, n), (k, n), kind, torch.bfloat16, group, False))
            refused = False
        except ValueError:
            refused = True
        problem = foem_kernels.Problem(n, k, bits, k, True, torch.bfloat16, "cpu")
        name = "model.layers.0.mlp.down_proj"
        layer = Layer(name, {name: spec}, n, k, n, (Product(spec, n, problem),))
        assert bool(stock.refusals(config.to_json(), config, [layer], "cpu")) == refused, (k, n)


def test_stock_has_a_kernel_for_this_cpu_or_none():
    vllm = pytest.importorskip("vllm")
    if not vllm.platforms.current_platform.is_cpu():
        pytest.skip("needs vLLM for CPUs")
    vllm.platforms.current_platform.import_kernels()
    assert stock.multiplies() == hasattr(torch.ops._C, "cpu_gemm_wna16")


def test_stock_without_a_kernel_for_this_cpu(monkeypatch):
    monkeypatch.setattr(stock, "multiplies", lambda: False)
    spec, name = QuantSpec(4, 32), "model.layers.0.mlp.down_proj"
    config = FormatConfig(spec)
    problem = foem_kernels.Problem(64, 128, 4, 32, True, torch.bfloat16, "cpu")
    layer = Layer(name, {name: spec}, 64, 128, 64, (Product(spec, 64, problem),))
    assert stock.refusals(config.to_json(), config, [layer], "sm_90") == []
    assert "this CPU lacks AVX-512" in stock.refusals(config.to_json(), config, [layer], "cpu")[0]
