"""The whole quantizer on small models of several architectures."""

import gc
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import CALIBRATION, CONFIGS, TINYLM, write_model

from foem_vllm import QuantizeConfig, quantize, writer
from foem_vllm.calibration import read_texts, sample_tokens
from foem_vllm.checkpoint import describe, read_linear, storage
from foem_vllm.format import QuantSpec, dequantize, read_config
from foem_vllm.grid import round_to_nearest
from foem_vllm.solver import SolverConfig, solve
from foem_vllm.stream import Weights

SMALL = dict(method="foem", calibration=str(CALIBRATION), samples=8, seq_len=64, group_size=32, device="cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


def dequantized(folder):
    config, weights = read_config(folder), Weights(folder)
    modules = [n.removesuffix(".qweight") for n in weights.files if n.endswith(".qweight")]
    return {m: dequantize(*read_linear(weights, m, config)) for m in modules}


@pytest.mark.parametrize("arch", CONFIGS)
def test_architectures(arch, tmp_path):
    """Every linear of every block is quantized, everything else is copied byte for byte, and errors stay small."""
    source = write_model(tmp_path / "model", arch)
    report = quantize(source, tmp_path / "out", QuantizeConfig(**SMALL))
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    linears = dequantized(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    expected = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.count(".") > 2}
    assert set(linears) == expected == {layer.name for layer in report.layers}
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module in linears:
            assert f"{name}" not in after
            assert (linears[module] - tensor).norm() / tensor.norm() < 0.2
        else:
            assert torch.equal(after[name], tensor)
    assert all(0 < layer.relative < 0.05 for layer in report.layers), report.layers
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_first_layer_equals_solver_on_transformers_activations(tmp_path):
    """The pipeline's Hessian is checked against activations that transformers' own full model produces."""
    source = write_model(tmp_path / "model", "qwen3")
    quantize(source, tmp_path / "out", QuantizeConfig(**SMALL, beta=0.2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokens = sample_tokens(read_texts(str(CALIBRATION)), tokenizer, 8, 64, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen = []
    layer = model.model.layers[0].mlp.down_proj
    attention = dequantized(tmp_path / "out")
    for name, weight in attention.items():  # everything before down_proj in block 0 is quantized when its turn comes
        if name.startswith("model.layers.0.") and "down_proj" not in name:
            model.get_submodule(name).weight.data.copy_(weight)
    layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 128).double()))
    with torch.no_grad():
        model(tokens)
    x = torch.cat(seen)
    expected = solve(layer.weight.detach().double(), x.T @ x / len(x), QuantSpec(4, 32), SolverConfig(beta=0.2)).quantized
    got = read_linear(Weights(tmp_path / "out"), "model.layers.0.mlp.down_proj", read_config(tmp_path / "out"))[0]
    assert torch.equal(got.scales[:, 0].float(), expected.scales[:, 0].float())
    assert (got.codes == expected.codes).float().mean() > 0.99  # float32 against float64 activations


def test_full_precision_stream_sees_the_untouched_model(tmp_path):
    """alpha > 0 on block 1: D from two full transformers models, one original, one with block 0 and qkv quantized."""
    source = write_model(tmp_path / "model", "llama")
    quantize(source, tmp_path / "out", QuantizeConfig(**{**SMALL, "method": "gptaq", "group_size": 64}))
    tokens = sample_tokens(read_texts(str(CALIBRATION)), transformers.AutoTokenizer.from_pretrained(source), 8, 64, 0)
    inputs = []
    for quantized in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        if quantized:
            for name, weight in dequantized(tmp_path / "out").items():
                if name.startswith("model.layers.0."):
                    model.get_submodule(name).weight.data.copy_(weight)
        model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
            lambda m, a: inputs.append(a[0].reshape(-1, 64).double())
        )
        with torch.no_grad():
            model(tokens)
    fp, q = inputs
    weight = torch.cat([model.model.layers[1].self_attn.get_submodule(f"{p}_proj").weight.detach().double() for p in "qkv"])
    expected = solve(
        weight, q.T @ q / len(q), QuantSpec(4, 64), SolverConfig(alpha=0.25), (fp - q).T @ q / len(q)
    ).quantized.codes
    got = torch.cat(
        [
            read_linear(Weights(tmp_path / "out"), f"model.layers.1.self_attn.{p}_proj", read_config(tmp_path / "out"))[0].codes
            for p in "qkv"
        ]
    )
    assert (got == expected).float().mean() > 0.99


def test_rtn_needs_no_text_and_rounds_to_nearest(llama, tmp_path):
    quantize(llama, tmp_path / "out", QuantizeConfig(method="rtn", group_size=32, calibration="absent.jsonl"))
    weight = load_file(llama / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    expected = dequantize(round_to_nearest(weight, QuantSpec(4, 32)), QuantSpec(4, 32))
    assert torch.equal(dequantized(tmp_path / "out")["model.layers.1.mlp.up_proj"], expected)


@pytest.mark.parametrize(
    "changes",
    [
        dict(bits=2),
        dict(bits=3, symmetric=False),
        dict(bits=8),
        dict(group_size=-1),
        dict(act_order="full"),
        dict(act_order="group"),
        dict(act_order="static"),
        dict(method="foem+gptaq", form="consistent"),
        dict(method="gptq", symmetric=False, checkpoint_format="gptq_v2"),
        dict(grid="search", act_order="group"),
        dict(method="rtn", grid="search"),
    ],
)
def test_options(llama, changes, tmp_path):
    quantize(llama, tmp_path / "out", QuantizeConfig(**{**SMALL, **changes}))
    config = read_config(tmp_path / "out")
    assert config.spec.bits == changes.get("bits", 4) and config.spec.symmetric == changes.get("symmetric", True)
    assert config.checkpoint_format == ("gptq" if config.spec.symmetric else "gptq_v2")
    assert config.meta["foem"]["method"] == changes.get("method", "foem")
    content = describe(tmp_path / "out")
    group = 64 if changes.get("group_size") == -1 else 32
    grid_bits = (16 + config.spec.bits) / group  # scale and zero point, averaged over columns
    assert (
        config.spec.bits < content["bits_per_weight"] < config.spec.bits + grid_bits + 32 / 64 + 0.01
    )  # g_idx: an int32 a column
    assert len(content["layers"]) == 14


def test_same_seed_same_bytes_and_random_state_untouched(llama, tmp_path):
    state = torch.get_rng_state()
    for name in ("a", "b"):
        quantize(llama, tmp_path / name, QuantizeConfig(**SMALL))
    quantize(llama, tmp_path / "c", QuantizeConfig(**{**SMALL, "seed": 1}))
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b and a != c
    assert torch.equal(state, torch.get_rng_state())


def test_report_is_grouped_by_kind_of_linear(llama, tmp_path):
    report = quantize(llama, tmp_path / "out", QuantizeConfig(**{**SMALL, "method": "gptq", "beta": "auto", "damping": "auto"}))
    kinds = json.loads((tmp_path / "out/foem_report.json").read_text())["by_kind"]
    assert set(kinds) == {".".join(layer.name.split(".")[-2:]) for layer in report.layers}
    down = [layer for layer in report.layers if layer.name.endswith("mlp.down_proj")]
    row = kinds["mlp.down_proj"]
    assert row["linears"] == len(down) == 2 and row["relative"] == pytest.approx(sum(layer.relative for layer in down) / 2)
    for name in ("beta", "damping"):
        assert sum(row[name].values()) == 2 and all(f"{layer.chosen[name]:g}" in row[name] for layer in down)
    shown = subprocess.run(
        [sys.executable, "-m", "foem_vllm.cli", "inspect", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert "by kind of linear" in shown.stdout and "mlp.down_proj" in shown.stdout


def test_sharded_input_and_output(llama, tmp_path, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    assert (tmp_path / "model/model.safetensors.index.json").is_file()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / file, tmp_path / "model" / file)
    monkeypatch.setattr(writer, "SHARD_BYTES", 200_000)
    quantize(tmp_path / "model", tmp_path / "out", QuantizeConfig(**SMALL))
    monkeypatch.undo()
    quantize(llama, tmp_path / "whole", QuantizeConfig(**SMALL))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "whole/model.safetensors")
    assert set(index["weight_map"]) == set(whole) and len(set(index["weight_map"].values())) > 1
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], whole[name])
    assert index["metadata"]["total_size"] == storage(tmp_path / "whole")["bytes"]


def test_excluded_modules_stay(llama, tmp_path):
    report = quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL, exclude=[r"down_proj", r"layers\.0\.self_attn"]))
    after = load_file(tmp_path / "out/model.safetensors")
    before = load_file(llama / "model.safetensors")
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
        assert torch.equal(after[name + ".weight"], before[name + ".weight"])
        assert "excluded" in report.skipped[name] and read_config(tmp_path / "out").spec_for(name) is None
    assert read_config(tmp_path / "out").spec_for("model.layers.1.self_attn.q_proj") == QuantSpec(4, 32)


def test_transformers_loads_what_the_config_says(llama, tmp_path):
    quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.quantization_config["quant_method"] == "gptq" and config.quantization_config["desc_act"] is False
    assert json.loads((tmp_path / "out/quantize_config.json").read_text()) == config.quantization_config


# ---------------------------------------------------------------- bad input, through the command line


def test_cli_quantize_and_inspect(tmp_path):
    command = [sys.executable, "-m", "foem_vllm.cli", "quantize", str(TINYLM), str(tmp_path / "out")]
    command += ["--calibration", str(CALIBRATION), "--samples", "8", "--seq-len", "64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "42 linears, 4.25 bits per weight" in done.stdout and "--quantization foem" in done.stdout
    shown = subprocess.run(
        [sys.executable, "-m", "foem_vllm.cli", "inspect", str(tmp_path / "out"), "--json"], capture_output=True, text=True
    )
    content = json.loads(shown.stdout)
    assert len(content["layers"]) == 42
    assert content["recipe"]["preset"] == "balanced" and content["recipe"]["seed"] == 0 and content["layers"][0]["relative"] > 0


@pytest.mark.parametrize("words", ["", " --trust-remote-code"])
def test_transformers_is_kept_from_importing_what_quantizing_does_not_need(words):
    """scikit-learn, unless the model brings code that may want it."""
    script = (
        f"import sys; sys.argv = 'foem quantize model out{words}'.split()\n"
        "from foem_vllm import cli; cli.app = lambda: None; cli.main()\n"
        "import transformers.generation.candidate_generator\n"
        "print([name for name in sys.modules if name.startswith('sklearn.')][:1])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ("sklearn." in done.stdout) == bool(words), done.stdout


def test_the_collector_is_left_as_it_was():
    from foem_vllm.job import without_collector

    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with without_collector():
                assert not gc.isenabled()
            assert gc.isenabled() == enabled and not gc.get_freeze_count()
        finally:
            gc.enable()
