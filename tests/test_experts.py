"""Experts quantized one by one: against transformers' fused experts, against sums in float64, in whole small models."""
from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import transformers
from foem_eval.dequantized import load_dequantized
from test_block import batches, routed_run, tokens_of
from tiny_models import CALIBRATION, write_model
from torch import nn

from foem_vllm import QuantizeConfig, experts, models, pipeline, quantize
from foem_vllm.block import BlockSolver
from foem_vllm.checkpoint import describe
from foem_vllm.errors import FoemError
from foem_vllm.format import read_config
from foem_vllm.stream import Weights, fill

ARCHS = {"qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), 8), "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), 4)}
SMALL = dict(calibration=str(CALIBRATION), samples=8, seq_len=64, group_size=32, device="cpu")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {arch: write_model(tmp_path_factory.mktemp(arch), arch) for arch in ARCHS}


def separated(source, dtype=torch.float64):
    """(transformers' model, the same of separate experts, filled from the same files)."""
    how = {"dtype": dtype, "experts_implementation": "eager"}  # the only one that knows float64
    original = transformers.AutoModelForCausalLM.from_pretrained(source, **how).eval()
    model, weights = models.build_empty(original.config, dtype), Weights(source)
    experts.separate(model, weights)
    fill(model, "", weights, dtype, torch.device("cpu"))
    return original, model


@pytest.mark.parametrize("arch", ARCHS)
def test_separate_experts_are_the_fused_ones(arch, sources):
    original, model = separated(sources[arch])
    tokens = tokens_of(sources[arch])[:2]
    with torch.no_grad():
        wanted, found = original(tokens).logits, model(tokens).logits
    assert (found - wanted).norm() < 1e-13 * wanted.norm()
    assert len(experts.find(model)) == 2 and not any(experts.is_fused(m) for m in model.modules())


def test_only_what_is_known_to_be_the_same_is_separated(sources):
    model = models.build_empty(transformers.AutoConfig.from_pretrained(sources["mixtral"]), torch.float32)
    fused = model.model.layers[0].mlp.experts
    assert experts.is_fused(fused)
    for name, value in (("has_bias", True), ("is_transposed", True), ("is_concatenated", False), ("has_gate", False)):
        odd = copy.copy(fused)
        setattr(odd, name, value)
        assert not experts.is_fused(odd)
    weights = Weights(sources["mixtral"])
    weights.rename("model.layers.0.block_sparse_moe.experts.", "model.layers.0.block_sparse_moe.other.")
    experts.separate(model, weights)  # its linears are not stored one by one
    assert model.model.layers[0].mlp.experts is fused and len(experts.find(model)) == 1


@pytest.fixture(scope="module")
def layer(sources):
    """(separate experts, others that differ, calls, hidden states of the original model). Expert 2 gets no tokens, 1 few."""
    moved, module = (separated(sources["mixtral"], torch.float32)[1].model.layers[0].mlp.experts for _ in range(2))
    g = torch.Generator().manual_seed(0)
    for p in moved.parameters():
        p.data += 0.1 * p.std() * torch.randn(p.shape, generator=g)
    calls, original = [], []
    for b in range(3):
        hidden = torch.randn(100, 64, generator=g)
        index = torch.stack([torch.full((100,), 0), torch.full((100,), 3)], 1)
        index[b::40, 1] = 1
        calls.append((hidden, index, torch.rand(100, 2, generator=g)))
        original.append(hidden + 0.1 * torch.randn(100, 64, generator=g))
    return module, moved, calls, original


def fed(module, expert, linear, hidden):
    """What reaches a linear of an expert, in float64, from any hidden states."""
    gate, up, _ = (module.get_submodule(f"{expert}.{name}").weight.double() for name in module.names)
    if linear != module.names[2]:
        return hidden.double()
    return nn.functional.silu(hidden.double() @ gate.T) * (hidden.double() @ up.T)


@pytest.mark.parametrize("expert", [0, 1, 2])
@pytest.mark.parametrize("linear", ["w1", "w2"])
def test_moments_of_an_expert(layer, expert, linear):
    """Second moment and drift are those of the tokens that the router gave it, shrunk towards those of all tokens when few."""
    module, moved, calls, original = layer
    routed = [(index == expert).any(1) for _, index, _ in calls]
    moments, tokens = experts.moments_of(module, expert, f"{expert}.{linear}", calls, 2, moved, original)
    assert tokens == sum(int(r.sum()) for r in routed) == {0: 300, 1: 9, 2: 0}[expert]

    def mean(keep):
        x = torch.cat([fed(module, expert, linear, h[k]) for (h, _, _), k in zip(calls, keep)])
        then = torch.cat([fed(moved, expert, linear, h[k]) for h, k in zip(original, keep)])
        return (x.T @ x / max(len(x), 1), (then - x).T @ x / max(len(x), 1))

    k = module.get_submodule(f"{expert}.{linear}").in_features
    share = min(tokens / k, 1)
    step = max(1, 300 // (4 * k))
    everyone = [torch.arange(100) % step == 0] * 3
    found = moments.means()
    for mine, own, all_tokens in zip((found.h, found.d), mean(routed), mean(everyone)):
        wanted = share * own + (1 - share) * all_tokens
        assert (mine - wanted).norm() < 1e-5 * wanted.norm()
    if expert == 0:
        assert [f.tokens for f in moments.folds()] == [200, 100]


def hidden_states(model, tokens):
    """What leaves every block, [tokens, H]."""
    found = []
    handles = [b.register_forward_hook(lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out))
               for b in model.model.layers]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return [h.flatten(0, -2).double() for h in found]


@pytest.mark.parametrize("how", [dict(method="rtn"), dict(method="gptq"), dict(preset="fast"), dict(preset="balanced"),
                                 dict(preset="best")], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_whole_models(arch, how, sources, tmp_path, monkeypatch):
    """Stored under the names of the source; carried activations are those of transformers on the dequantized checkpoint."""
    carried = []

    class Spy(BlockSolver):
        def solve(self, index, *rest):
            yield from super().solve(index, *rest)
            carried.append(torch.cat([h.flatten(0, -2) for h in self.inputs.hidden]).double() if self.inputs else None)

    monkeypatch.setattr(pipeline, "BlockSolver", Spy)
    report = quantize(sources[arch], tmp_path / "out", QuantizeConfig(**SMALL, **how))
    parent, names, count = ARCHS[arch]
    linear = re.compile(r"_proj|w[123]")
    expected = {name.removesuffix(".weight") for name in Weights(sources[arch]).files if linear.search(name)}
    assert {layer.name for layer in report.layers} == expected
    stored = Weights(tmp_path / "out").files
    assert {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")} == expected
    assert f"model.layers.1.{parent}.gate.weight" in stored  # the router stays, and rules say so
    assert read_config(tmp_path / "out").spec_for(f"model.layers.1.{parent}.gate") is None
    table = describe(tmp_path / "out")["tokens_of_experts"]
    if "method" in how and how["method"] == "rtn":
        assert not table
        return
    for counts in table.values():
        assert len(counts) == count and sum(counts) == 2 * 8 * 64
    assert list(table) == [f"model.layers.{i}.{parent}.experts" for i in range(2)]
    for layer in report.layers:
        few = layer.tokens < layer.k
        assert any("shrunk" in note for note in layer.notes) == few and layer.relative < 0.05
    if how.get("preset") != "best":  # whose scales are tuned afterwards
        model = load_dequantized(tmp_path / "out")
        for found, wanted in zip(carried, hidden_states(model, tokens_of(sources[arch]))):
            assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_better_than_rounding(sources, tmp_path):
    """Held-out KL divergence from the original, 3 bits."""
    tokens = tokens_of(sources["qwen3_moe"], 24, 64)[8:]
    original = transformers.AutoModelForCausalLM.from_pretrained(sources["qwen3_moe"], dtype=torch.float32).eval()
    found = {}
    for name, how in {"rtn": dict(method="rtn"), "gptq": dict(method="gptq"), "balanced": dict(preset="balanced")}.items():
        quantize(sources["qwen3_moe"], tmp_path / name, QuantizeConfig(**SMALL, **how, bits=3))
        with torch.no_grad():
            p, q = (m(tokens).logits.log_softmax(-1) for m in (original, load_dequantized(tmp_path / name)))
        found[name] = float((p.exp() * (p - q)).sum(-1).mean())
    assert found["balanced"] < found["gptq"] < 0.9 * found["rtn"], found


def test_experts_are_excluded_together(sources, tmp_path):
    config = QuantizeConfig(method="rtn", **{**SMALL, "calibration": None}, exclude=[r"layers\.0\.block_sparse_moe"])
    quantize(sources["mixtral"], tmp_path / "out", config)
    rules = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["dynamic"]
    assert len(rules) == 3 + 2  # w1, w2 and w3 of all experts, and two routers
    config = read_config(tmp_path / "out")
    for block, expert, excluded in ((0, 0, True), (0, 3, True), (1, 0, False)):
        assert (config.spec_for(f"model.layers.{block}.block_sparse_moe.experts.{expert}.w2") is None) == excluded
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in Weights(tmp_path / "out").files
    with pytest.raises(FoemError, match=r"experts\.1\.w2 would stay as it is.*all of them or none"):
        quantize(sources["mixtral"], tmp_path / "no", QuantizeConfig(method="rtn", **SMALL, exclude=[r"experts\.1\.w2"]))


def test_routers_that_are_linears_stay():
    block = nn.Module()
    block.mlp, block.attn = nn.Module(), nn.Linear(8, 8)
    block.mlp.gate, block.mlp.shared_expert_gate = nn.Linear(8, 4, bias=False), nn.Linear(8, 1)
    block.mlp.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    assert set(models.find_linears(block)) == {"attn", "mlp.experts.0", "mlp.experts.1"}
    assert set(models.find_unquantizable(block)) == {"mlp.gate.weight", "mlp.shared_expert_gate.weight"}


def test_modules_of_their_own_that_only_a_later_batch_reaches():
    hidden = batches(0.0, 0.0, 0.5)
    for preset in ("fast", "balanced"):
        results, _ = routed_run(preset, hidden, [h + 0.01 for h in hidden])
        assert results["m.0.expert"].tokens == 16 and not results["m.0.expert"].notes
