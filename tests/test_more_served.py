"""More than the linears of blocks, quantized and served by vLLM, beside transformers on the dequantized weights."""

import pathlib
import shutil

import pytest
import torch
from checkpoints import edit_config, write_rtn_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import CALIBRATION, write_model

from foem_vllm import QuantizeConfig, quantize
from foem_vllm.doctor import examine
from foem_vllm.spec import QuantSpec

pytest.importorskip("vllm")
from foem_eval.dequantized import load_dequantized  # noqa: E402
from foem_eval.offline import STRICT, serve  # noqa: E402

from foem_vllm.plugin import compat  # noqa: E402

WIDE = dict(hidden_size=128, intermediate_size=256)  # heads 32 wide, the least that vLLM computes on CPUs
CASES = {  # name: architecture, its sizes, what is asked of the quantizer
    "tied head": ("qwen3", {**WIDE, "head_dim": 32}, {"lm_head": True}),
    "untied head": ("llama", WIDE, {"lm_head": True}),
    "renamed head": ("gpt_neox", WIDE, {"lm_head": True}),
    "fused on disk otherwise": ("glm4", WIDE, {}),
    "fused unsaid": ("stablelm", WIDE, {"lm_head": True}),
    "rearranged": ("bloom", {}, {}),
    "conv1d": ("gpt2", {}, {"lm_head": True}),
    "conv1d in parts": ("gpt2", {}, {"exclude": ["h.0.mlp", "h.1.attn"]}),
}
SAME = 1e-4  # nats
LACKING = {  # name: tensors that are not there, the layer that vLLM makes of them
    "no o_proj": ("model.layers.1.self_attn.o_proj.", "model.layers.1.self_attn.o_proj.weight"),
    "no layer": ("model.layers.1.", "model.layers.1."),
    "no embedding": ("model.embed_tokens.", "VocabParallelEmbedding.weight"),
    "no bias": ("model.layers.1.self_attn.k_proj.bias", "model.layers.1.self_attn.qkv_proj.bias"),
}
WHOLE = "rearranged, but quantized"
UNNAMED = "fused unsaid, unnamed"  # the same again, its config without quant_method and with biases of zero that nobody has
BIASED = "bias unsaid"
NO_NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    return torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(texts, tmp_path_factory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("more")
    for name, (arch, sizes, options) in CASES.items():
        source = write_model(root / f"{name} model", arch, **sizes)
        config = QuantizeConfig(
            preset="fast", group_size=32, calibration=str(CALIBRATION), samples=8, seq_len=64, device="cpu", **options
        )
        quantize(source, root / name, config)
    source = write_model(root / "lacking model", "llama", attention_bias=True, **WIDE)
    for name, (prefix, _) in (*LACKING.items(), ("no norm", (NO_NORM, NO_NORM))):
        path = write_rtn_checkpoint(source, root / name, QuantSpec(4, 32)) / "model.safetensors"
        save_file({n: t for n, t in load_file(path).items() if not n.startswith(prefix)}, path, {"format": "pt"})
    write_rtn_checkpoint(root / "rearranged model", root / WHOLE, QuantSpec(4, 32))
    for name, copied, value in ((UNNAMED, "fused unsaid", 0), (BIASED, "untied head", 1)):
        shutil.copytree(root / copied, root / name)
        tensors = load_file(root / name / "model.safetensors")
        tensors["model.layers.1.self_attn.o_proj.bias"] = torch.full((128,), float(value))
        save_file(tensors, root / name / "model.safetensors", {"format": "pt"})
        edit_config(root / name, meta={}, **({"quant_method": ""} if name == UNNAMED else {}))
    save_file({"texts": texts}, root / "tokens.safetensors")
    return {name: root / name for name in (*CASES, *LACKING, "no norm", WHOLE, UNNAMED, BIASED)}


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory) -> dict[str, dict]:
    names = [*CASES, *LACKING, WHOLE, UNNAMED, BIASED]
    return serve(names, folders["no norm"].parent, tmp_path_factory.mktemp("answers"), dtype="float32")


@pytest.mark.parametrize("name", CASES)
def test_served_as_transformers_computes_it(name, folders, texts, answers):
    if CASES[name][0] == "gpt_neox" and compat.RELEASE < (0, 32):
        assert "rows in another order as if they were not packed; use vLLM 0.32 or newer" in answers[name]["refused"]
        return
    assert "refused" not in answers[name], answers[name]
    model = load_dequantized(folders[name])
    if name == "rearranged":  # transformers approximates the function by tanh, vLLM does not
        for block in model.transformer.h:
            block.mlp.gelu_impl = torch.nn.GELU()
    with torch.no_grad():
        table = model(texts).logits.log_softmax(-1)
    expected = table[:, :-1].gather(2, texts[:, 1:, None])[..., 0]
    assert (torch.tensor(answers[name]["logprobs"]) - expected).abs().max() < SAME


@pytest.mark.parametrize("name", LACKING)
def test_what_the_checkpoint_lacks_is_refused_by_name(name, answers):
    """vLLM itself looks for missing weights only in models without quantization, and would serve what the memory held."""
    assert "was not loaded" in answers[name]["refused"] and LACKING[name][1] in answers[name]["refused"], answers[name]


def test_what_vllm_itself_would_refuse_or_pass_over(answers, folders):
    assert answers[UNNAMED] == answers["fused unsaid"]
    said = "model.layers.1.self_attn.o_proj.bias is in the checkpoint, but the model's config.json makes the layer one without"
    assert said in answers[BIASED]["refused"], answers[BIASED]
    said = "h.0.self_attention.query_key_value is quantized, but vLLM's BloomForCausalLM puts its rows in another order"
    assert said in answers[WHOLE]["refused"] and said in examine(str(folders[WHOLE]), device="cpu")["ours"]["why"][0]


def test_vllm_looks_for_every_weight_when_asked(folders, answers, tmp_path):
    """README's way to have norms looked for: it knows our tensors, those of a quantized head too, and finds the one missing."""
    names = ["tied head", "untied head", "no norm"]
    found = serve(names, folders["no norm"].parent, tmp_path, dtype="float32", **STRICT)
    assert found["tied head"] == answers["tied head"] and found["untied head"] == answers["untied head"]
    assert NO_NORM in found["no norm"]["refused"], found["no norm"]
