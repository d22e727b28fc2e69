"""Blocks solved with everything switched on: carried activations, corrected targets, choices, routed experts."""

import functools

import pytest
import torch
import transformers
from tiny_models import CALIBRATION, CONFIGS, write_model
from torch import nn

from foem_vllm import QuantizeConfig, capture, pipeline, quantize, selection
from foem_vllm.block import BlockSolver
from foem_vllm.calibration import read_texts, sample_tokens
from foem_vllm.checkpoint import read_linear
from foem_vllm.errors import FoemError
from foem_vllm.format import QuantSpec, dequantize, read_config
from foem_vllm.recipe import resolve
from foem_vllm.selection import GRID
from foem_vllm.solver import SolverConfig, solve
from foem_vllm.stream import BlockInputs, Weights

SMALL = dict(preset="balanced", calibration=str(CALIBRATION), samples=8, seq_len=64, group_size=32, device="cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


@functools.cache
def tokens_of(folder, samples=8, seq_len=64):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return sample_tokens(read_texts(str(CALIBRATION)), tokenizer, samples, seq_len, 0)


def load(source, checkpoint=None, names=lambda name: True):
    """The model in float32 by transformers, with the dequantized weights of those linears that are wanted."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if checkpoint:
        config, weights = read_config(checkpoint), Weights(checkpoint)
        for name in (n.removesuffix(".qweight") for n in weights.files if n.endswith(".qweight")):
            if names(name):
                model.get_submodule(name).weight.data.copy_(dequantize(*read_linear(weights, name, config)))
    return model


@torch.no_grad()
def seen_by(model, names, tokens):
    """name -> what feeds that module, [tokens, K]; "name." -> what leaves it."""
    found = {}

    def keep(name, value):
        value = value[0] if isinstance(value, tuple) else value
        found[name] = value.reshape(-1, value.shape[-1]).double()

    handles = []
    for name in names:
        module = model.get_submodule(name.rstrip("."))
        if name.endswith("."):
            handles.append(module.register_forward_hook(lambda m, args, out, name=name: keep(name, out)))
        else:
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: keep(name, args)))
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture
def spy(monkeypatch):
    """.solver: the last one made; .after, .original: hidden states after every block; .known: parts that were not run again."""

    class Spy(BlockSolver):
        def solve(self, index, *rest):
            Spy.solver = self
            if index == 0:
                Spy.after, Spy.original = [], []
            yield from super().solve(index, *rest)
            for stream, kept in ((self.inputs, Spy.after), (self.original, Spy.original)):
                if stream:
                    kept.append(torch.cat([h.reshape(-1, h.shape[-1]) for h in stream.hidden]).double())

    def add(self, part, outputs):
        Spy.known.append(part.name)
        real(self, part, outputs)

    Spy.known = []
    real = capture.Known.add
    monkeypatch.setattr(capture.Known, "add", add)
    monkeypatch.setattr(pipeline, "BlockSolver", Spy)
    return Spy


CARRIED = {
    "llama": ("llama", {}, ["self_attn", "mlp"]),
    "llama without room": ("llama", dict(activation_memory=0), ["self_attn", "mlp"]),
    "llama fast": ("llama", dict(preset="fast"), ["self_attn", "mlp"]),
    "llama without attention": ("llama", dict(exclude=["self_attn"]), ["mlp"]),
    "opt": ("opt", {}, ["self_attn"]),
    "gpt_neox": ("gpt_neox", {}, ["attention", "mlp"]),
    "gpt_neox without last": ("gpt_neox", dict(exclude=["4h_to_h"]), ["attention"]),
    "gemma2": ("gemma2", {}, ["self_attn", "mlp"]),
}


@pytest.mark.parametrize("case", CARRIED)
def test_carried_activations_are_those_of_the_quantized_model(case, spy, tmp_path):
    """Also where parts of a block are not run again but their outputs kept."""
    arch, changes, parts = CARRIED[case]
    source = write_model(tmp_path / "model", arch)
    quantize(source, tmp_path / "out", QuantizeConfig(**{**SMALL, **changes}))
    assert spy.known == 2 * parts
    blocks = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}.get(arch, "model.layers")
    tokens = tokens_of(source)
    for checkpoint, streams in ((tmp_path / "out", spy.after), (None, spy.original)):
        expected = seen_by(load(source, checkpoint), [f"{blocks}.0.", f"{blocks}.1."], tokens)
        for found, wanted in zip(streams, expected.values()):
            assert (found - wanted).norm() < 1e-5 * wanted.norm()
    # and the two streams really differ
    assert (spy.after[1] - expected[f"{blocks}.1."]).norm() > 1e-3 * expected[f"{blocks}.1."].norm()


def test_carried_activations_in_bfloat16(spy, tmp_path):
    source = write_model(tmp_path / "model", "llama", torch.bfloat16)
    quantize(source, tmp_path / "out", QuantizeConfig(**SMALL))
    wanted, original = (
        seen_by(load(source, c), ["model.layers.1."], tokens_of(source))["model.layers.1."] for c in (tmp_path / "out", None)
    )
    assert (spy.after[1] - wanted).norm() < min(0.03 * wanted.norm(), 0.5 * (original - wanted).norm())


def ridge_correction(weight, x, missing, damping=0.05):
    ridge = damping * float(x.square().mean()) * len(x)
    rows = torch.cat([x, ridge**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([missing, torch.zeros(x.shape[1], len(weight), dtype=x.dtype)])).solution.T


@pytest.mark.parametrize("stage", ["o_proj", "down_proj", "qkv"])
def test_fixed_strength_is_used_as_given_and_aims_at_the_original_stream(llama, stage, tmp_path):
    """Block 1, from activations of two transformers models: W + 0.5 C with C by least squares, then the plain solver."""
    changes = dict(correct=0.5, act_order="none", grid="minmax", refit=False, descent=False)
    report = quantize(llama, tmp_path / "out", QuantizeConfig(**{**SMALL, **changes}))
    assert report.recipe["correct"] == 0.5 and {layer.correction for layer in report.layers} == {0.5}
    prefix = "model.layers.1."
    names, place = {
        "qkv": ([f"self_attn.{n}_proj" for n in "qkv"], None),
        "o_proj": (["self_attn.o_proj"], "post_attention_layernorm"),
        "down_proj": (["mlp.down_proj"], "."),
    }[stage]
    order = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
    earlier = order[: order.index(names[0])] if names[0] in order else order
    now = load(llama, tmp_path / "out", lambda n: not n.startswith(prefix) or n.removeprefix(prefix) in earlier)
    feeds, joins = prefix + names[0], None if place is None else prefix.rstrip(".") + "." * (place != ".") + place
    wanted = [feeds] + ([joins] if joins else [])
    q, fp = (seen_by(m, wanted, tokens_of(llama)) for m in (now, load(llama)))
    weight = torch.cat([now.get_submodule(prefix + n).weight.detach().double() for n in names])
    x = q[feeds]
    missing = fp[joins] - q[joins] if joins else (fp[feeds] - x) @ weight.T
    target = weight + 0.5 * ridge_correction(weight, x, missing)
    spec = QuantSpec(4, 32)
    expected, plain = (solve(weight, x.T @ x / len(x), spec, SolverConfig(), target=t).quantized.codes for t in (target, None))
    stored = Weights(tmp_path / "out"), read_config(tmp_path / "out")
    got = torch.cat([read_linear(stored[0], prefix + n, stored[1])[0].codes for n in names])
    assert (got == expected).float().mean() > 0.99 > (got == plain).float().mean() + 0.01


def test_correction_brings_the_trained_model_closer(tinylm, spy, tmp_path):
    changes = dict(bits=3, samples=16, group_size=-1, exclude=[r"layers\.[3-5]\."])
    errors = {}
    for correct in ("auto", 0.0):
        report = quantize(tinylm, tmp_path / str(correct), QuantizeConfig(**{**SMALL, **changes, "correct": correct}))
        original = spy.original[-1] if spy.original else original  # noqa: F821  the auto run comes first
        errors[correct] = float((spy.after[-1] - original).norm() / original.norm())
        strengths = [layer.correction for layer in report.layers]
        assert all(s == 0 for s in strengths) if correct == 0.0 else max(strengths) > 0.3 and all(0 <= s <= 1 for s in strengths)
    assert errors["auto"] < 0.9 * errors[0.0], errors


def test_chosen_settings_are_reported_and_the_same_every_time(llama, tmp_path):
    changes = dict(beta="auto", damping="auto")
    for name in "ab":
        report = quantize(llama, tmp_path / name, QuantizeConfig(**{**SMALL, **changes}))
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert a == b
    for layer in report.layers:
        chosen = layer.chosen
        assert chosen["alpha"] == 0 and chosen["beta"] in GRID["beta"] and layer.damping == chosen["damping"]
        candidates = {(s["beta"], s["damping"]) for s in chosen["scores"]}
        assert candidates == {(b, d) for b in GRID["beta"] for d in GRID["damping"]} and len(chosen["scores"]) == len(candidates)
        score = {(s["beta"], s["damping"]): s for s in chosen["scores"]}
        assert score[0.0, 0.05]["score"] == 0
        assert score[chosen["beta"], chosen["damping"]]["score"] == pytest.approx(-chosen["gain"], abs=1e-12)
        assert chosen["gain"] >= -1e-12
    assert report.recipe["beta"] == report.recipe["damping"] == "auto"


def test_where_nothing_clearly_helps_auto_is_gptq_to_the_byte(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "CLEAR_GAIN", 10)
    common = {**SMALL, "preset": None, "method": "gptq"}
    for name, auto in (("plain", {}), ("auto", dict(alpha="auto", beta="auto", damping="auto"))):
        quantize(llama, tmp_path / name, QuantizeConfig(**common, **auto))
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("plain", "auto"))
    assert a == b


def test_alpha_can_be_chosen(llama, tmp_path):
    report = quantize(llama, tmp_path / "out", QuantizeConfig(**{**SMALL, "preset": None, "method": "gptq", "alpha": "auto"}))
    assert all({s["alpha"] for s in layer.chosen["scores"]} == set(GRID["alpha"]) for layer in report.layers)
    assert any(layer.chosen["alpha"] > 0 for layer in report.layers) and {layer.correction for layer in report.layers} == {0.0}


@pytest.mark.parametrize("arch", CONFIGS)
def test_every_architecture_with_the_balanced_preset(arch, tmp_path):
    source = write_model(tmp_path / "model", arch)
    report = quantize(source, tmp_path / "out", QuantizeConfig(**SMALL))
    linears = [n for n, m in load(source).named_modules() if isinstance(m, nn.Linear) and n.count(".") > 2]
    assert {layer.name for layer in report.layers} == set(linears)
    assert all(0 < layer.relative < 0.05 and 0 <= layer.correction <= 1 and not layer.notes for layer in report.layers)
    assert any(layer.correction > 0 for layer in report.layers)


class Routed(nn.Module):
    """Adds what an expert makes of the tokens whose first feature is positive; the expert is not called when there is none."""

    def __init__(self, fickle=False):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.expert, self.shared = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        for linear in (self.expert, self.shared):
            linear.weight.data = torch.randn(32, 32, generator=g)
        self.router = self.shared.weight.data.clone() if fickle else None  # routes nothing once `shared` is quantized

    def forward(self, hidden):
        routed = (hidden[..., 0] > 0) & (self.router is None or torch.equal(self.shared.weight, self.router))
        out = hidden + 0.5 * self.shared(hidden)
        if routed.any():
            out = out.index_put((routed,), self.expert(hidden[routed]), accumulate=True)
        return out


def routed_run(preset, hidden, original, fickle=False):
    recipe = resolve(QuantizeConfig(preset=preset, group_size=32))
    calls = [{4: ((), {})}]
    streams = BlockInputs(list(hidden), calls), BlockInputs(list(original), calls) if recipe.needs_original else None
    solver = BlockSolver(recipe, (torch.float16,), *streams)
    block, untouched = Routed(fickle), Routed(fickle)
    with torch.no_grad():
        results = list(solver.solve(0, block, untouched, "m.0.", dict.fromkeys(("m.0.expert", "m.0.shared"), QuantSpec(4, 32))))
        expected = torch.cat([block(h) for h in hidden])
    assert torch.allclose(torch.cat(streams[0].hidden[:]), expected, atol=1e-5)
    assert not torch.equal(block.expert.weight, untouched.expert.weight)
    return {r.name: r for r, _ in results}, block


def batches(*positive):
    g = torch.Generator().manual_seed(1)
    hidden = [torch.randn(4, 8, 32, generator=g) for _ in positive]
    for h, share in zip(hidden, positive):
        h[..., 0] = (torch.arange(32).view(4, 8) < 32 * share).float() * 2 - 1
    return hidden


def test_an_expert_that_a_batch_does_not_reach():
    for preset in ("fast", "balanced"):
        hidden = batches(0.5, 0.0, 0.25, 0.0)
        results, _ = routed_run(preset, hidden, [h + 0.01 for h in hidden])
        assert results["m.0.expert"].tokens == 24 and results["m.0.shared"].tokens == 128
        assert not results["m.0.expert"].notes


def test_an_expert_that_nothing_reaches_is_rounded_to_nearest():
    hidden = batches(0.0, 0.0)
    for preset in ("fast", "balanced"):
        results, _ = routed_run(preset, hidden, [h + 0.01 for h in hidden])
        assert results["m.0.expert"].tokens == 0 and "no calibration token" in results["m.0.expert"].notes[0]
        assert not results["m.0.shared"].notes
    results, _ = routed_run("fast", batches(0.5, 0.5), hidden, fickle=True)
    assert results["m.0.expert"].tokens == 0 and "no calibration token" in results["m.0.expert"].notes[0]


def test_an_expert_that_gets_other_tokens_than_in_the_original_model():
    hidden = batches(0.5, 0.5)
    for other in (0.25, 0.0):
        original = batches(0.5, other)
        with pytest.raises(FoemError, match="m.0.expert: other tokens reach it than in the original model"):
            routed_run("balanced", hidden, original)
        with pytest.raises(FoemError, match="m.0.expert: other tokens"):
            routed_run("balanced", original, hidden)
        routed_run("fast", hidden, original)
