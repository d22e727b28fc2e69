"""Quantized experts inside vLLM: what is refused by name, parts of ranks, and whole small models against transformers.

The engine computes in float32 here, like transformers on the dequantized weights, so greedy tokens are equal and
log-probabilities differ by the order of summation only: 2.4e-6 at most as measured, of which eight times are allowed. In bfloat16
a token may be routed to another expert, which no tolerance separates from an error.
"""
from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from checkpoints import rtn, write_rtn_checkpoint  # noqa: E402
from foem_eval.dequantized import write_dequantized  # noqa: E402
from tiny_models import CALIBRATION, EVALUATION, write_model  # noqa: E402

from foem_vllm import QuantizeConfig, quantize  # noqa: E402
from foem_vllm.errors import FoemError  # noqa: E402
from foem_vllm.expert_parts import expert_specs  # noqa: E402
from foem_vllm.format import FormatConfig, QuantSpec, dequantize, pack  # noqa: E402
from foem_vllm.plugin.config import FoemConfig  # noqa: E402
from foem_vllm.plugin.moe import FoemMoEMethod  # noqa: E402

HERE = pathlib.Path(__file__).parent
NAMES = ("gate_proj", "up_proj", "down_proj")
EXPERTS, HIDDEN, INNER = 4, 64, 96


def test_specs_of_experts():
    four, eight = QuantSpec(4, 32), QuantSpec(8, 32)
    assert expert_specs("experts", 3, NAMES, lambda name: None) is None
    assert expert_specs("experts", 3, NAMES, lambda name: eight if name.endswith("down_proj") else four) == (four, eight)
    for odd, spec, said in (("1.up_proj", eight, "0.gate_proj is 4-bit group 32 sym, .*1.up_proj 8-bit"),
                            ("2.down_proj", replace(four, symmetric=False), "0.down_proj is .* sym, .*2.down_proj .* asym"),
                            ("2.down_proj", None, "0.gate_proj is .*, .*2.down_proj unquantized")):
        with pytest.raises(FoemError, match=f"model.experts: .*{said}.*one setting"):
            expert_specs("model.experts", 3, NAMES, lambda name, odd=odd, spec=spec: spec if name.endswith(odd) else four)


@pytest.fixture(scope="module")
def vllm_config():
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    config = VllmConfig()
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield config
        cleanup_dist_env_and_memory()


def stored_experts(spec, checkpoint_format="gptq"):
    """{name behind the layer's: tensor} of all experts, and their dequantized gate, up and down weights."""
    tensors, weights = {}, {name: [] for name in NAMES}
    for e in range(EXPERTS):
        for i, name in enumerate(NAMES):
            n, k = (HIDDEN, INNER) if name == "down_proj" else (INNER, HIDDEN)
            q = rtn(torch.randn(n, k, generator=torch.Generator().manual_seed(10 * e + i)) / k**0.5, spec, order=e)
            weights[name].append(dequantize(q, spec).double())
            tensors |= {f"{e}.{name}.{key}": t for key, t in pack(q, spec, checkpoint_format).items()}
    return tensors, weights


def loaded_layer(vllm_config, spec, tensors, checkpoint_format="gptq", dtype=torch.float32, **how):
    """vLLM's own layer, filled by its own loader; `quant_method` is ours."""
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory
    vllm_config.compilation_config.static_forward_context.clear()
    layer = FusedMoEFactory(num_experts=EXPERTS, top_k=2, hidden_size=HIDDEN, intermediate_size=INNER, params_dtype=dtype,
                            quant_config=FoemConfig(FormatConfig(spec, checkpoint_format)), prefix="mlp.experts",
                            **how).routed_experts
    assert isinstance(layer.quant_method, FoemMoEMethod)
    list(layer.load_weights(tensors.items()))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("spec,kind", [(QuantSpec(4, 32), "gptq"), (QuantSpec(4, 32, False, "full"), "gptq_v2"),
                                       (QuantSpec(8, -1, False), "gptq")], ids=str)
def test_layer_equals_float64(vllm_config, spec, kind):
    tensors, w = stored_experts(spec, kind)
    tensors["1.up_proj.bias"] = torch.zeros(INNER)  # as AutoGPTQ writes them
    layer = loaded_layer(vllm_config, spec, tensors, kind)
    assert not list(layer.parameters())  # nothing of the checkpoint's layout stays in memory
    g = torch.Generator().manual_seed(1)
    x, ids, p = torch.randn(9, HIDDEN, generator=g), torch.randint(0, EXPERTS, (9, 2), generator=g), torch.rand(9, 2, generator=g)
    found = layer.forward_modular(x, p, ids).double()
    for t, row in enumerate(x.double()):
        wanted = 0
        for e, share in zip(ids[t], p[t].double()):
            gate, up = w["gate_proj"][e] @ row, w["up_proj"][e] @ row
            wanted = wanted + share * (w["down_proj"][e] @ (gate * torch.sigmoid(gate) * up))
        # Sums of 64 and 96 products in float32, one after the other.
        assert (found[t] - wanted).norm() < 200 * 2**-24 * wanted.norm()


@pytest.mark.parametrize("change,said", [
    (lambda t: t.pop("2.down_proj.qweight"), "2.down_proj.qweight was not loaded"),
    (lambda t: t.pop("3.up_proj.g_idx"), "3.up_proj.g_idx was not loaded"),
    (lambda t: t.update({"1.up_proj.g_idx": t["1.up_proj.g_idx"].flip(0)}), "1.up_proj.g_idx differs from that of gate_proj"),
    (lambda t: t.update({"1.up_proj.scales": t["1.up_proj.scales"][:, :32]}), r"1.up_proj.scales is .*\[2, 32\].*\[2, 96\]"),
    (lambda t: t.update({"0.gate_proj.qweight": t["0.gate_proj.qweight"].float()}), "0.gate_proj.qweight is torch.float32"),
    (lambda t: t["2.gate_proj.scales"].view(-1)[3:4].fill_(float("nan")), "2.gate_proj.scales holds NaN"),
    (lambda t: t["3.down_proj.qzeros"][1, 2:3].add_(1), "3.down_proj.qzeros holds 8.*stores 7"),
    (lambda t: t["3.down_proj.g_idx"].add_(1), "3.down_proj.g_idx holds"),
    (lambda t: t.update({"1.down_proj.bias": torch.ones(HIDDEN)}), "the bias of expert 1"),
])
def test_bad_tensors_are_named(vllm_config, change, said):
    spec = QuantSpec(4, 32, True, "full")
    tensors, _ = stored_experts(spec)
    change(tensors)
    with pytest.raises(FoemError, match=f"mlp.experts.*{said}"):
        loaded_layer(vllm_config, spec, tensors)


def test_what_no_kernel_computes_is_refused(vllm_config, monkeypatch):
    tensors, _ = stored_experts(QuantSpec(4, 32))
    for how, said in ((dict(has_bias=True), "biases of experts"), (dict(activation="swigluoai"), "activation swigluoai"),
                      (dict(swiglu_limit=7.0), "limits of the activation")):
        with pytest.raises(FoemError, match=f"mlp.experts: {said}.*--exclude experts"):
            loaded_layer(vllm_config, QuantSpec(4, 32), tensors, **how)
    monkeypatch.setenv("FOEM_KERNEL", "reference")
    with pytest.raises(FoemError, match="mlp.experts: kernel 'reference' does not compute experts; unset FOEM_KERNEL"):
        loaded_layer(vllm_config, QuantSpec(4, 32), tensors)
    monkeypatch.setenv("FOEM_KERNEL", "triton_w4a16")
    with pytest.raises(FoemError, match="mlp.experts: no kernel computes experts .*triton_w4a16"):
        loaded_layer(vllm_config, QuantSpec(4, 32), tensors)


EXCLUDED = {"dynamic": {r"-:.*layers\.0\..*experts": {}, r".*experts.*down_proj": {"bits": 8}}}
RANKS = {"tensor_parallel_size": 2}
OURS = {"foem": True}  # written by `foem quantize`
VARIANTS = {  # architecture, spec, checkpoint format, rules, how it is served
    "qwen3_moe mixed": ("qwen3_moe", QuantSpec(4, 32, False), "gptq_v2", EXCLUDED, {}),
    "mixtral act-order over ranks": ("mixtral", QuantSpec(4, 32, False, "full"), "gptq_v2", {}, RANKS),
    "qwen3_moe expert parallel": ("qwen3_moe", QuantSpec(4, 32), "gptq", OURS, {**RANKS, "enable_expert_parallel": True}),
}
ENV = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
       "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("experts"), {}
    sources = {arch: write_model(root / arch, arch) for arch in ("qwen3_moe", "mixtral")}
    for name, (arch, spec, kind, rules, _) in VARIANTS.items():
        made[name] = root / name
        if rules is OURS:
            quantize(sources[arch], made[name], QuantizeConfig(preset="balanced", group_size=32, calibration=str(CALIBRATION),
                                                               samples=8, seq_len=64, device="cpu"))
            write_dequantized(made[name], made[name] / "dense", torch.float32)
        else:
            write_rtn_checkpoint(sources[arch], made[name], spec, kind, **rules)
    return made


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory):
    texts = [json.loads(line)["text"][:200] for line in EVALUATION.read_text("utf-8").splitlines()[:3]]
    jobs = [{"model": str(folders[name]), "quantization": "foem", "dtype": "float32", "max_model_len": 128, **how}
            for name, (*_, how) in VARIANTS.items()]
    asked = {"prompts": [t[:40] for t in texts], "texts": texts, "max_tokens": NEW_TOKENS}
    out = tmp_path_factory.mktemp("offline") / "answers"
    done = subprocess.run([sys.executable, str(HERE / "offline_llm.py"), json.dumps(jobs), json.dumps(asked), str(out)],
                          env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {**dict(zip(VARIANTS, map(json.loads, out.read_text().splitlines()))), "log": done.stdout + done.stderr}


@pytest.mark.parametrize("name", VARIANTS)
def test_engine_equals_transformers_on_dequantized_weights(name, folders, answers):
    from transformers import AutoModelForCausalLM
    answer = answers[name]
    model = AutoModelForCausalLM.from_pretrained(folders[name] / "dense", dtype=torch.float32).eval()

    def logprobs(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    for ids, found in zip(answer["texts"], answer["logprobs"]):
        expected = logprobs(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (torch.tensor(found) - expected).abs().max() < 2e-5
    for prompt, greedy in zip(answer["prompts"], answer["greedy"]):
        best = logprobs(prompt + greedy)[len(prompt) - 1:-1]
        assert len(greedy) == NEW_TOKENS and best.argmax(1).tolist() == greedy


def test_experts_took_the_intended_path(answers):
    assert all(answers[name]["quantization"] == "foem" for name in VARIANTS)
    for said in ("foem experts on cpu_w4a16: 4-bit group 32 and 4-bit group 32 symmetric", "asymmetric act-order",
                 "4-bit group 32 and 8-bit group 32 asymmetric", "Expert parallelism is enabled"):
        assert said in answers["log"], said
