"""More of a model than the linears of its blocks: the output head, other layers, other files."""

import functools
import inspect
import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import CALIBRATION, CONFIGS, VISION_CONFIGS, write_model

from foem_vllm import QuantizeConfig, head, models, pipeline, quantize
from foem_vllm.calibration import read_texts, sample_tokens
from foem_vllm.checkpoint import read_linear
from foem_vllm.doctor import examine
from foem_vllm.errors import FoemError
from foem_vllm.format import QuantSpec, dequantize, read_config
from foem_vllm.grid import round_to_nearest
from foem_vllm.solver import SolverConfig, solve
from foem_vllm.stream import Weights

SMALL = dict(calibration=str(CALIBRATION), samples=8, seq_len=64, group_size=32, device="cpu")
pytestmark = pytest.mark.usefixtures("every_cpu")


def values(folder) -> dict[str, torch.Tensor]:
    """{module: what its codes stand for}."""
    config, weights = read_config(folder), Weights(folder)
    modules = [n.removesuffix(".qweight") for n in weights.files if n.endswith(".qweight")]
    return {m: dequantize(*read_linear(weights, m, config)) for m in modules}


def dense(source, checkpoint=None):
    """transformers' model in float32, with the dequantized weights of the blocks' linears of a checkpoint."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for name, value in values(checkpoint).items() if checkpoint else ():
        if name not in ("lm_head", "embed_out"):
            model.get_submodule(name).weight.data.copy_(value)
    return model


@torch.no_grad()
def fed_to_head(model, source) -> torch.Tensor:
    """[tokens, K] float64, over the calibration text."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1).double()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model(sample_tokens(read_texts(str(CALIBRATION)), tokenizer, 8, 64, 0), use_cache=False)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("arch", ["qwen3", "llama", "falcon", "gemma3", "gpt_neox"])  # gpt_neox: called embed_out in the files
def test_head_is_what_the_solver_makes_of_what_transformers_feeds_it(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(head, "ROWS", 1000)  # 4096 rows in five pieces
    source, out = write_model(tmp_path / "model", arch), tmp_path / "out"
    report = quantize(source, out, QuantizeConfig(**SMALL, method="foem", lm_head=True))
    x = fed_to_head(dense(source, out), source)
    weight = dense(source).get_output_embeddings().weight.detach().double()
    expected = solve(weight, x.T @ x / len(x), QuantSpec(4, 32), SolverConfig(beta=0.2)).quantized
    stored = "embed_out" if arch == "gpt_neox" else "lm_head"
    got, spec = read_linear(Weights(out), stored, read_config(out))
    assert spec == QuantSpec(4, 32)
    assert (got.codes == expected.codes).float().mean() > 0.99  # float32 against float64 activations
    assert (report.layers[-1].name, report.layers[-1].n, report.layers[-1].tokens) == (stored, 4096, 512)
    error = dequantize(got, spec).double() - weight
    loss = float(((error @ (x.T @ x / len(x))) * error).sum() / len(weight))
    assert report.layers[-1].loss == pytest.approx(loss, rel=1e-3)


def test_corrected_head_is_closer_to_the_original_logits(tmp_path):
    source = write_model(tmp_path / "model", "llama")
    for name, strength in (("plain", 0.0), ("corrected", 1.0)):
        quantize(source, tmp_path / name, QuantizeConfig(**SMALL, method="gptq", bits=2, lm_head=True, correct=strength))
    wanted, off = dense(source), {}
    logits = fed_to_head(wanted, source) @ wanted.lm_head.weight.detach().double().T
    for name in ("plain", "corrected"):
        x = fed_to_head(dense(source, tmp_path / name), source)
        off[name] = float((x @ values(tmp_path / name)["lm_head"].double().T - logits).square().mean())
    blocks = load_file(tmp_path / "plain/model.safetensors"), load_file(tmp_path / "corrected/model.safetensors")
    assert not torch.equal(*(b["lm_head.qweight"] for b in blocks))
    assert off["corrected"] < 0.9 * off["plain"]


@pytest.mark.parametrize("arch, nested", [("qwen3", False), ("llama", False)])
def test_tied_embedding_stays_and_the_checkpoint_is_untied(arch, nested, tmp_path):
    source, out = write_model(tmp_path / "model", arch), tmp_path / "out"
    quantize(source, out, QuantizeConfig(method="rtn", group_size=32, lm_head=True))
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["quantization_config"]["lm_head"] is True
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert "lm_head.weight" not in after
    weight = before.get("lm_head.weight", before["model.embed_tokens.weight"])
    expected = dequantize(round_to_nearest(weight, QuantSpec(4, 32)), QuantSpec(4, 32))
    assert torch.equal(values(out)["lm_head"], expected)


def test_rows_in_pieces_give_the_codes_of_all_at_once(tmp_path, monkeypatch):
    source = write_model(tmp_path / "model", "qwen3")
    for name, rows in (("whole", 4096), ("pieces", 512)):
        monkeypatch.setattr(head, "ROWS", rows)
        # Nothing is left open that would be chosen by other rows.
        options = dict(method="gptq", grid="search", act_order="full", descent=True, refit=True)
        quantize(source, tmp_path / name, QuantizeConfig(**SMALL, **options, lm_head=True))
    whole, pieces = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "pieces"))
    assert all(torch.equal(whole[key], pieces[key]) for key in whole)


def test_heads_that_cannot_be_served_are_refused(tmp_path):
    for arch, message in {"opt": "head of opt models only unquantized", "gemma2": "gemma2"}.items():
        source = write_model(tmp_path / arch, arch)
        with pytest.raises(FoemError, match=message):
            quantize(source, tmp_path / "out", QuantizeConfig(method="rtn", group_size=32, lm_head=True))
    with pytest.raises(FoemError, match="--exclude head leaves lm_head as it is"):
        source = write_model(tmp_path / "llama", "llama")
        quantize(source, tmp_path / "out", QuantizeConfig(method="rtn", group_size=32, lm_head=True, exclude=["head"]))


def test_refused_heads_are_those_that_vllm_builds_without_a_quantization_config():
    registry = pytest.importorskip("vllm.model_executor.models.registry")
    for arch, (config, _) in CONFIGS.items():
        config = getattr(transformers, config)()
        name = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
        classes = registry.ModelRegistry._try_load_model_cls(name).__mro__
        source = "".join(inspect.getsource(c) for c in classes if c.__module__.startswith("vllm.model_executor.models"))
        made = re.search(r"ParallelLMHead\(.*?\n +\)", source, re.DOTALL)
        assert (config.model_type in models.DENSE_HEADS) == (made is None or "quant_config=" not in made[0]), arch


def test_doctor_knows_the_head(tmp_path):
    source, out = write_model(tmp_path / "model", "qwen3", dtype=torch.bfloat16), tmp_path / "out"
    quantize(source, out, QuantizeConfig(method="rtn", group_size=32, lm_head=True))
    found = examine(str(out), device="cpu")
    assert found["ours"]["served"] and found["stock"]["served"]
    row = next(row for row in found["layers"] if row["name"] == "lm_head")
    assert (row["n"], row["k"], row["count"]) == (4096, 64, 1)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["lm_head"] = False
    (out / "config.json").write_text(json.dumps(config))
    assert "config does not say so" in examine(str(out), device="cpu")["stock"]["why"][0]


def without_prefix(source):
    """The same model as older files have it: names without the prefix of the model, buffers that nobody reads."""
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(source / "model.safetensors").items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize("older", [False, True])
def test_conv1d_is_a_linear_with_a_transposed_weight(older, tmp_path):
    source, out = write_model(tmp_path / "model", "gpt2"), tmp_path / "out"
    before = load_file(source / "model.safetensors")
    report = quantize(
        without_prefix(source) if older else source, out, QuantizeConfig(**SMALL, method="gptq", exclude=["c_proj"])
    )
    assert {layer.name for layer in report.layers} == {
        f"transformer.h.{i}.{n}" for i in (0, 1) for n in ("attn.c_attn", "mlp.c_fc")
    }
    after = load_file(out / "model.safetensors")
    for name, value in values(out).items():
        assert (value.T - before[f"{name}.weight"]).norm() < 0.2 * before[f"{name}.weight"].norm()
        assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])
    for name in ("transformer.h.1.mlp.c_proj.weight", "transformer.wte.weight"):
        assert torch.equal(after[name], before[name])
    assert sorted(report.skipped) == [f"transformer.h.{i}.{n}.c_proj" for i in (0, 1) for n in ("attn", "mlp")]
    x = []
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.transformer.h[0].attn.c_attn.register_forward_pre_hook(lambda m, args: x.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(sample_tokens(read_texts(str(CALIBRATION)), transformers.AutoTokenizer.from_pretrained(source), 8, 64, 0))
    x = torch.cat(x)
    weight = model.transformer.h[0].attn.c_attn.weight.detach().double().T
    expected = solve(weight, x.T @ x / len(x), QuantSpec(4, 32), SolverConfig()).quantized
    got, _ = read_linear(Weights(out), "transformer.h.0.attn.c_attn", read_config(out))
    assert (got.codes == expected.codes).float().mean() > 0.99


@pytest.mark.parametrize("arch", VISION_CONFIGS)
def test_language_part_of_an_image_text_model(arch, tmp_path):
    """Everything beside it stays, byte for byte, and rules say so under the names of transformers and of vLLM."""
    source, out = write_model(tmp_path / "model", arch), tmp_path / "out"
    report = quantize(source, out, QuantizeConfig(**SMALL, method="gptq", lm_head=True))
    before, after, linears = load_file(source / "model.safetensors"), load_file(out / "model.safetensors"), values(out)
    own = "lm_head" if arch == "gemma3_vision" else "language_model.lm_head"  # tied and called so in no file; untied
    assert set(linears) == {name.removesuffix(".weight") for name in before if re.search(r"language_model.*_proj", name)} | {own}
    for name in before:
        if name.removesuffix(".weight") not in linears:
            assert torch.equal(after[name], before[name])
    assert report.skipped == {"vision_tower": "vision", "multi_modal_projector": "vision"}
    config = read_config(out)
    for name in ("vision_tower.vision_model.encoder.layers.0.mlp.fc1", "model.vision_tower.encoder.layers.0.mlp.fc1"):
        assert config.spec_for(name) is None
    assert config.spec_for("language_model.model.layers.0.mlp.up_proj") == QuantSpec(4, 32)
    raw = json.loads((out / "config.json").read_text())
    assert raw["tie_word_embeddings"] is raw["text_config"]["tie_word_embeddings"] is False

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    layer, x = model.model.language_model.layers[0].self_attn.q_proj, []
    layer.register_forward_pre_hook(lambda m, args: x.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(sample_tokens(read_texts(str(CALIBRATION)), tokenizer, 8, 64, 0))
    x = torch.cat(x)
    expected = solve(layer.weight.detach().double(), x.T @ x / len(x), QuantSpec(4, 32), SolverConfig()).quantized
    got, _ = read_linear(Weights(out), "language_model.model.layers.0.self_attn.q_proj", config)
    assert (got.codes == expected.codes).float().mean() > 0.99


def in_8_bits(folder, kind):
    """(folder with the linears of a model in 8-bit floating point, folder with what they stand for in bfloat16)."""
    source = write_model(folder / "model", "llama", dtype=torch.bfloat16)
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    small, plain = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight, (n, k) = tensors[name].float(), tensors[name].shape
        if kind == "block":  # of 48 x 40, the last ones smaller
            rows, columns = torch.arange(n) // 48, torch.arange(k) // 40
            scale = torch.stack([torch.stack([weight[rows == r][:, columns == c].abs().max() for c in columns.unique()])
                                 for r in rows.unique()]) / 448  # fmt: skip
            whole = scale[rows][:, columns]
        else:
            scale = (weight.abs().amax(1, keepdim=True) if kind == "row" else weight.abs().max()[None]) / 448
            whole = scale
        codes = (weight / whole).to(torch.float8_e4m3fn)
        module = name.removesuffix("weight")
        small |= {name: codes, module + ("weight_scale_inv" if kind == "block" else "weight_scale"): scale}
        small[module + "input_scale"] = torch.ones(1)
        plain[name] = (codes.double() * whole.double()).to(torch.bfloat16)
    group = {"weights": {"type": "float", "num_bits": 8, "strategy": "channel" if kind == "row" else "tensor"}}
    section = {
        "block": {"quant_method": "fp8", "weight_block_size": [48, 40], "activation_scheme": "dynamic"},
        "tensor": {"quant_method": "fp8"},
        "row": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}},
    }[kind]
    for name, stored, extra in (("small", small, {"quantization_config": section}), ("plain", plain, {})):
        shutil.copytree(source, folder / name)
        save_file(stored, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({**config, **extra}))
    return folder / "small", folder / "plain"


@pytest.mark.parametrize("kind", ["block", "row", "tensor"])
def test_weights_in_8_bits_are_read_as_what_they_stand_for(kind, tmp_path):
    """The same bytes as from a model that was dequantized before, also of what is left out."""
    for folder in in_8_bits(tmp_path, kind):
        quantize(folder, tmp_path / f"{folder.name}-out", QuantizeConfig(**SMALL, preset="balanced", exclude=["o_proj"]))
    small, plain = (load_file(tmp_path / f"{name}-out/model.safetensors") for name in ("small", "plain"))
    assert small.keys() == plain.keys() and small["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert all(torch.equal(small[name], plain[name]) for name in plain)
    configs = [json.loads((tmp_path / f"{name}-out/config.json").read_text()) for name in ("small", "plain")]
    assert all(c["quantization_config"]["quant_method"] == "gptq" for c in configs)


def test_other_quantized_sources_are_refused(tmp_path):
    small, _ = in_8_bits(tmp_path, "block")
    config = json.loads((small / "config.json").read_text())
    run = functools.partial(quantize, small, tmp_path / "out", QuantizeConfig(method="rtn", group_size=32))
    tensors = load_file(small / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    with pytest.raises(FoemError, match=r"layers.0.mlp.up_proj.weight is F8_E4M3, but has no weight_scale_inv"):
        run()
    for section in ({"quant_method": "awq"}, {"quant_method": "compressed-tensors", "format": "pack-quantized"}):
        (small / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
        with pytest.raises(FoemError, match="already quantized .*; start from the original model"):
            run()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sources_of_any_dtype(dtype, tmp_path):
    """What stays keeps its dtype; scales are values that it and float16, in which they are stored, both hold."""
    source, out = write_model(tmp_path / "model", "qwen3", dtype=dtype), tmp_path / "out"
    quantize(source, out, QuantizeConfig(method="rtn", group_size=32))
    before, after, found = load_file(source / "model.safetensors"), load_file(out / "model.safetensors"), values(out)
    for name in before:
        module = name.removesuffix(".weight")
        if module in found:
            scales = after[f"{module}.scales"]
            assert scales.dtype == torch.float16 and torch.equal(scales.float(), scales.to(dtype).float())
            step = scales.T.double().repeat_interleave(32, 1)
            nearest = (before[name].double() / step).round().clamp(-8, 7) * step
            assert torch.allclose((found[module] - before[name]).abs().double(), (nearest - before[name]).abs(), atol=1e-6)
        else:
            assert after[name].dtype == dtype and torch.equal(after[name], before[name])


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_on_request(tmp_path):
    """And is copied beside the weights, which are those of the same model without code of its own."""
    source, own = write_model(tmp_path / "model", "llama"), tmp_path / "own"
    shutil.copytree(source, own)
    (own / "own_code.py").write_text(CODE)
    config = json.loads((own / "config.json").read_text())
    classes = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(FoemError, match="brings its own Python code; read it, then pass --trust-remote-code"):
        quantize(own, tmp_path / "out", QuantizeConfig(**SMALL, method="gptq"))
    quantize(own, tmp_path / "out", QuantizeConfig(**SMALL, method="gptq", trust_remote_code=True))
    quantize(source, tmp_path / "plain", QuantizeConfig(**SMALL, method="gptq"))
    found, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    assert (tmp_path / "out/own_code.py").read_text() == CODE


@pytest.mark.parametrize("where", ["quantize_head", "Writer.finish"])  # just before the head, and behind it
def test_interrupted_runs_go_on_with_the_head(where, tmp_path, monkeypatch):
    source, config = write_model(tmp_path / "model", "qwen3"), QuantizeConfig(**SMALL, method="gptq", lm_head=True)
    quantize(source, tmp_path / "whole", config)

    def stop(*_):
        raise KeyboardInterrupt

    calls = []
    real = pipeline.quantize_head
    with monkeypatch.context() as patch:
        patch.setattr(f"foem_vllm.pipeline.{where}", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out", config)
    monkeypatch.setattr(pipeline, "quantize_head", lambda *a: calls.append(a) or real(*a))
    quantize(source, tmp_path / "out", config, resume=True)
    assert len(calls) == (where == "quantize_head")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
