"""`foem analyze` against references that share no code with it: full gradients in float64, transformers, closed forms."""

import json
import pathlib
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from checkpoints import rtn, write_config
from foem_eval.dequantized import load_dequantized
from safetensors.torch import load_file, save_file
from tiny_models import EVALUATION, write_model
from typer.testing import CliRunner

from foem_vllm import QuantizeConfig, analysis_report, quantize
from foem_vllm.analysis_report import judge
from foem_vllm.analyze import analyze
from foem_vllm.calibration import read_texts, sample_tokens
from foem_vllm.checkpoint import read_linear
from foem_vllm.cli import app
from foem_vllm.errors import FoemError
from foem_vllm.format import FormatConfig, QuantSpec, dequantize, pack, read_config
from foem_vllm.stream import Weights

TEXT = dict(text=str(EVALUATION), sequences=4, seq_len=48, seed=3, device="cpu")
RTN = QuantizeConfig(method="rtn", group_size=32, device="cpu")


def tokens_of(folder, **changes) -> torch.Tensor:
    """[S, T]: the tokens that `analyze` uses."""
    options = {**TEXT, **changes}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return sample_tokens(read_texts(options["text"]), tokenizer, options["sequences"], options["seq_len"], options["seed"])


def load(folder, dtype=torch.float64):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def weights_of(out) -> dict[str, torch.Tensor]:
    """Module -> dequantized weight [N, K]."""
    config, packed = read_config(out), Weights(out)
    names = [n.removesuffix(".qweight") for n in packed.files if n.endswith(".qweight")]
    return {name: dequantize(*read_linear(packed, name, config)) for name in names}


def losses(model, tokens) -> torch.Tensor:
    """[S]: next-token loss of every sequence."""
    logits = model(tokens).logits[:, :-1].double()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def values(analysis, setting, term) -> dict[str, torch.Tensor]:
    return {la["name"]: torch.tensor(la[setting]["per_sequence"][term], dtype=torch.float64) for la in analysis["layers"]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(original, checkpoint, analysis) of two random layers."""
    folder = tmp_path_factory.mktemp("pair")
    source, out = write_model(folder / "model", "qwen3"), folder / "out"
    quantize(source, out, RTN)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    analysis = analyze(out, source, **TEXT)
    assert torch.equal(torch.get_rng_state(), state), "the global random state changed"
    return source, out, analysis


def test_terms_add_up(pair):
    """Measured = first + second + remainder for every linear and sequence; the order is the model's."""
    analysis = pair[2]
    kinds = [layer["kind"] for layer in analysis["layers"]]
    assert kinds == ["q", "k", "v", "o", "gate", "up", "down"] * 2
    for setting in ("single", "cumulative"):
        for layer in analysis["layers"]:
            terms = {name: torch.tensor(v, dtype=torch.float64) for name, v in layer[setting]["per_sequence"].items()}
            parts = terms["first_order"] + terms["second_order"] + terms["remainder"]
            torch.testing.assert_close(parts, terms["measured"], rtol=0, atol=1e-12)
            assert layer[setting]["measured"]["mean"] == pytest.approx(float(terms["measured"].mean()), abs=1e-12)
            assert layer[setting]["measured"]["low"] <= layer[setting]["measured"]["mean"] <= layer[setting]["measured"]["high"]
    first = analysis["layers"][0]
    assert first["single"]["measured"] == first["cumulative"]["measured"], "the first linear has no prefix"


@pytest.mark.parametrize(
    "arch, lm_head",
    [("qwen3", False), ("gemma2", False), ("phi3", False), ("opt", False), ("gpt_neox", False), ("qwen3", True), ("gpt2", True)],
)
def test_cumulative_changes_telescope(arch, lm_head, pair, tmp_path):
    """They add up to the loss change that transformers finds for the whole dequantized checkpoint, sequence by sequence. Heads
    are those of models that tie them; GPT-2's linears are stored transposed, on the hub by shorter names."""
    if (arch, lm_head) == ("qwen3", False):
        source, out, analysis = pair
    else:
        source, out = write_model(tmp_path / "model", arch), tmp_path / "out"
        if arch == "gpt2":
            short = {name.removeprefix("transformer."): t for name, t in load_file(source / "model.safetensors").items()}
            save_file(short, source / "model.safetensors", metadata={"format": "pt"})
        quantize(source, out, replace(RTN, lm_head=lm_head))
        analysis = analyze(out, source, **TEXT)
    tokens = tokens_of(source)
    original, quantized = load(source, torch.float32), load_dequantized(out)
    quantized.set_attn_implementation("eager")
    with torch.no_grad():
        expected = losses(quantized, tokens).double() - losses(original, tokens).double()
    found = sum(values(analysis, "cumulative", "measured").values())
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)
    assert analysis["telescoping"]["total"] == pytest.approx(float(expected.mean()), abs=2e-5)
    assert abs(analysis["telescoping"]["difference"]) < 2e-5


@pytest.mark.parametrize("setting", ["single", "cumulative"])
@pytest.mark.parametrize("position", [1, 4, 9, 13])
def test_derivatives_equal_full_gradient_and_hessian_product(setting, position, pair):
    """<grad, delta> and delta^T Hess delta / 2 from the whole gradient of the weight, in float64, per sequence."""
    source, out, analysis = pair
    model, quantized, tokens = load(source), weights_of(out), tokens_of(source)
    model.requires_grad_(False)
    order = [layer["name"] for layer in analysis["layers"]]
    if setting == "cumulative":
        for name in order[:position]:
            model.get_submodule(name).weight.copy_(quantized[name])
    name = order[position]
    weight = model.get_submodule(name).weight.requires_grad_()
    delta = quantized[name].double() - weight.detach()
    for s in range(len(tokens)):
        (gradient,) = torch.autograd.grad(losses(model, tokens[s : s + 1]).sum(), weight, create_graph=True)
        (product,) = torch.autograd.grad((gradient * delta).sum(), weight)
        expected = {"first_order": (gradient.detach() * delta).sum(), "second_order": (product * delta).sum() / 2}
        for term, value in expected.items():
            assert float(values(analysis, setting, term)[name][s]) == pytest.approx(float(value), rel=1e-3, abs=1e-6)


def test_central_differences_confirm_the_derivatives(pair):
    """Both ways agree for every linear, and the report says where one lies outside the other's interval."""
    for layer in pair[2]["layers"]:
        for setting in ("single", "cumulative"):
            found = layer[setting]
            for term, noise in (("first_order", 3e-5), ("second_order", 6e-4)):  # float32 losses over 2 l and 2 l^2
                for step in (0.05, 0.1):
                    difference = found[f"{term}_{step}"]
                    assert found[term]["mean"] == pytest.approx(difference["mean"], rel=0.05, abs=noise)
                    inside = difference["low"] <= found[term]["mean"] <= difference["high"]
                    assert found["inside"][f"{term}_{step}"] == inside
    sums = pair[2]["totals"]["single"]
    assert sums["second_order_0.1"]["low"] <= sums["second_order"]["mean"] <= sums["second_order_0.1"]["high"]


def test_layer_objective_splits_exactly(pair):
    """Quadratic + cross + constant = |W0 X_fp - Q X_q|^2, each equal to a float64 computation on transformers' activations."""
    source, out, analysis = pair
    quantized, tokens = weights_of(out), tokens_of(source)
    models = {"fp": load(source), "q": load(source)}
    for name, weight in quantized.items():  # what runs after a linear does not change its input
        models["q"].get_submodule(name).weight.data.copy_(weight)
    for layer in analysis["layers"]:
        inputs = {}
        for key, model in models.items():
            linear = model.get_submodule(layer["name"])
            handle = linear.register_forward_pre_hook(lambda m, args, key=key, to=inputs: to.update({key: args[0]}))
            with torch.no_grad():
                model(tokens)
            handle.remove()
        w0, q = models["fp"].get_submodule(layer["name"]).weight.data, quantized[layer["name"]].double()
        drift, error = (inputs["fp"] - inputs["q"]) @ w0.T, inputs["q"] @ (q - w0).T
        expected = {
            "quadratic": (error**2).mean(),
            "cross": (-2 * drift * error).mean(),
            "constant": (drift**2).mean(),
            "total": ((inputs["fp"] @ w0.T - inputs["q"] @ q.T) ** 2).mean(),
            "power": ((inputs["fp"] @ w0.T) ** 2).mean(),
        }
        found = {key: estimate["mean"] for key, estimate in layer["objective"].items()}
        for key, value in expected.items():
            assert found[key] == pytest.approx(float(value), rel=1e-4, abs=1e-5 * found["total"]), (layer["name"], key)
        assert found["quadratic"] + found["cross"] + found["constant"] == pytest.approx(found["total"], rel=1e-4)
    assert any(abs(la["objective"]["cross"]["mean"]) > 1e-3 * la["objective"]["total"]["mean"] for la in analysis["layers"])


def write_head_checkpoint(source: pathlib.Path, out: pathlib.Path, q, spec: QuantSpec) -> pathlib.Path:
    """`source` with nothing but its output head quantized."""
    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    tensors.pop("lm_head.weight")
    tensors.update({f"lm_head.{key}": t for key, t in pack(q, spec).items()})
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text("utf-8"))
    write_config(out, {**config, "quantization_config": FormatConfig(spec, "gptq", True).to_json()})
    return out


def head_problem(source) -> tuple[torch.Tensor, torch.Tensor]:
    """(X [S, T-1, K] float64: inputs of the head; targets [S, T-1]): softmax regression, solvable on paper."""
    model, tokens = load(source), tokens_of(source)
    with torch.no_grad():
        return model.model(tokens).last_hidden_state[:, :-1], tokens[:, 1:]


def head_gradients(x: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[S, N, K]: the gradient (p - y) x^T / T of every sequence's loss in the head's weight, in closed form."""
    errors = (x @ weight.T).softmax(-1) - F.one_hot(targets, len(weight))
    return errors.transpose(1, 2) @ x / x.shape[1]


def test_planted_gradient_is_found(tmp_path):
    """delta along the negative gradient: first-order terms are the loss change, and the verdict says so."""
    source = write_model(tmp_path / "model", "llama")
    w0 = load_file(source / "model.safetensors")["lm_head.weight"].double()
    x, targets = head_problem(source)
    gradients = head_gradients(x, targets, w0)
    spec = QuantSpec(8, 16)
    along = gradients.mean(0) / gradients.mean(0).norm()
    q = rtn((w0 - 0.05 * along).float(), spec)
    delta = dequantize(q, spec).double() - w0
    analysis = analyze(write_head_checkpoint(source, tmp_path / "out", q, spec), source, **TEXT)
    found = values(analysis, "single", "first_order")["lm_head"]
    torch.testing.assert_close(found, (gradients * delta).sum((1, 2)), rtol=1e-4, atol=1e-6)
    for setting in ("single", "cumulative"):
        sums = analysis["totals"][setting]
        assert sums["measured"]["mean"] < 0 and sums["shares"]["first_order"]["low"] > 0.8
        assert sums["magnitude_shares"]["first_order"]["mean"] > 0.8
        assert sums["judgement"] == "agrees"
    assert all("agrees" in line and "disagrees" not in line for line in analysis["verdict"][:2])


def test_planted_orthogonal_change_has_no_first_order(tmp_path):
    """delta orthogonal to the gradient of every sequence: all of the loss change is curvature, and the verdict says so.

    The original is moved instead of the checkpoint: W0 = Q - delta, and since the gradient moves with it, repeatedly.
    """
    source = write_model(tmp_path / "model", "llama")
    tensors = load_file(source / "model.safetensors")
    x, targets = head_problem(source)
    spec = QuantSpec(8, 32)
    q = rtn(tensors["lm_head.weight"], spec)
    end = dequantize(q, spec).double()
    delta = torch.randn(end.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    delta *= 0.1 * end.norm() / delta.norm()
    for _ in range(20):
        gradients = head_gradients(x, targets, end - delta).flatten(1)
        basis = torch.linalg.qr(gradients.T).Q
        delta = (delta.flatten() - basis @ (basis.T @ delta.flatten())).view_as(delta)
    tensors["lm_head.weight"] = (end - delta).float()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    analysis = analyze(write_head_checkpoint(source, tmp_path / "out", q, spec), source, **TEXT)
    sums = analysis["totals"]["single"]
    assert sums["measured"]["mean"] > 1e-3 and sums["second_order"]["mean"] > 1e-3
    assert abs(sums["shares"]["first_order"]["mean"]) < 0.01
    assert sums["judgement"] == "disagrees"
    assert all("disagrees" in line for line in analysis["verdict"][:2])


def test_trained_model(tinylm, tmp_path):
    """Two linears of tinylm: the independent loss change, small remainders, the same result a second time."""
    out, names = tmp_path / "out", ("model.layers.4.self_attn.o_proj", "model.layers.5.mlp.down_proj")
    quantize(tinylm, out, QuantizeConfig(method="rtn", device="cpu"))
    options = {**TEXT, "sequences": 3, "seq_len": 64, "only": lambda name: name in names}
    first, second = (analyze(out, tinylm, **options) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    model, tokens = load(tinylm, torch.float32), tokens_of(tinylm, sequences=3, seq_len=64)
    with torch.no_grad():
        before = losses(model, tokens).double()
        for name in names:
            model.get_submodule(name).weight.copy_(weights_of(out)[name])
        expected = losses(model, tokens).double() - before
    torch.testing.assert_close(sum(values(first, "cumulative", "measured").values()), expected, rtol=1e-3, atol=1e-5)
    assert first["loss"]["original"]["mean"] == pytest.approx(float(before.mean()), abs=1e-5)
    for layer in first["layers"]:
        rest = abs(layer["single"]["remainder"]["mean"])
        assert rest < 0.2 * sum(abs(layer["single"][t]["mean"]) for t in ("first_order", "second_order"))


def test_rule_of_the_verdict():
    """The thresholds, and that a share of nothing decides nothing."""

    def estimate(low, high):
        return {"mean": (low + high) / 2, "low": low, "high": high}

    change = estimate(0.01, 0.02)
    assert judge(estimate(0.26, 0.5), change) == "agrees"
    assert judge(estimate(-0.5, -0.26), change) == "agrees"
    assert judge(estimate(0.24, 0.5), change) == "undecided"
    assert judge(estimate(-0.09, 0.09), change) == "disagrees"
    assert judge(estimate(-0.09, 0.11), change) == judge(estimate(-0.11, 0.09), change) == "undecided"
    assert judge(estimate(0.26, 0.5), estimate(-0.01, 0.02)) == "undecided"


def test_command_writes_json_and_picture(pair, tmp_path):
    """The command's files, tables and verdict."""
    pytest.importorskip("matplotlib")
    source, out, analysis = pair
    args = ["analyze", str(out), "--source", str(source), "--text", TEXT["text"], "--sequences", "4", "--seq-len", "48"]
    result = CliRunner().invoke(app, [*args, "--seed", "3", "--device", "cpu", "--output", str(tmp_path / "new/folder")])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "new/folder/analysis.json").read_text("utf-8"))
    assert content["layers"] == analysis["layers"] and content["verdict"] == analysis["verdict"]
    assert (tmp_path / "new/folder/analysis.png").read_bytes().startswith(b"\x89PNG")
    assert content["verdict"][0] in result.output and "model.layers.1.mlp.down_proj" in result.output


def copy_with(folder: pathlib.Path, to: pathlib.Path, **changes) -> pathlib.Path:
    """A copy of a checkpoint with some tensors replaced (None: removed)."""
    shutil.copytree(folder, to)
    tensors = {**load_file(folder / "model.safetensors"), **{k.replace("__", "."): v for k, v in changes.items()}}
    kept = {k: v for k, v in tensors.items() if v is not None}
    save_file(kept, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_bad_input_is_refused(pair, tmp_path, monkeypatch):
    """One line that says what, where and what to do, before anything long is computed."""
    source, out, _ = pair

    def refused(message, folder=out, origin=source, **changes):
        with pytest.raises(FoemError, match=message) as error:
            analyze(folder, origin, **{**TEXT, **changes})
        assert "\n" not in str(error.value) and "--calibration" not in str(error.value)

    refused("no such folder", folder=tmp_path / "nothing")
    refused("not a GPTQ checkpoint", folder=source)
    refused("already quantized", origin=out)
    refused("give more text", sequences=100000)
    refused("--text .*no such file", text=str(tmp_path / "none.jsonl"))
    refused("at least 2", sequences=1)
    refused("--seq-len 4096 is longer", seq_len=4096)
    refused("but .* in the original", origin=write_model(tmp_path / "wide", "qwen3", intermediate_size=192))
    refused("embed_tokens.weight is .* in the original", origin=write_model(tmp_path / "vocabulary", "qwen3", vocab_size=5000))
    shallow = write_model(tmp_path / "shallow", "qwen3", num_hidden_layers=1)
    refused("layers.1.* is quantized, but the original has no", origin=shallow)
    small = load_file(source / "model.safetensors")
    small |= {"model.norm.weight": small["model.norm.weight"].to(torch.float8_e4m3fn)}
    shutil.copytree(source, tmp_path / "small")
    save_file(small, tmp_path / "small/model.safetensors", metadata={"format": "pt"})
    refused("weights in 8-bit floating point; give the same model in 16 or 32 bits", origin=tmp_path / "small")
    refused("holds other values", origin=write_model(tmp_path / "seed", "qwen3", seed=1))
    codes = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.scales"]
    far = copy_with(out, tmp_path / "far", model__layers__0__mlp__up_proj__scales=codes * 8)
    refused("up_proj differs from the original by more", folder=far)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FoemError, match="pip install matplotlib"):
        analysis_report.prepare(tmp_path / "output")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(FoemError, match="--output"):
        analysis_report.prepare(tmp_path / "file")
