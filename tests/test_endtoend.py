"""Gradients block by block against transformers' own backward pass through the whole model; scales tuned against its logits."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from foem_eval.dequantized import load_dequantized
from tiny_models import CALIBRATION, TINYLM, write_model
from transformers import AutoModelForCausalLM

from foem_vllm import QuantizeConfig, endtoend, models, quantize
from foem_vllm.format import read_config
from foem_vllm.job import calibration_tokens
from foem_vllm.stream import Weights, record_inputs

SMALL = dict(calibration=str(CALIBRATION), samples=16, seq_len=64, group_size=32, device="cpu")


def streams(folder, tokens, batch=4):
    hf_config = models.load_config(folder)
    empty = models.build_empty(hf_config, torch.float32)
    name, blocks = models.find_blocks(empty)
    weights = Weights(folder)
    inputs = record_inputs(empty, name, blocks, weights, tokens, batch, torch.float32, torch.device("cpu"))
    return empty, blocks, name, weights, inputs


@pytest.mark.parametrize("whole", [True, False])  # logits and graphs of a batch at once, or of parts of it, blocks run again
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "opt", "falcon"])  # untied, tied, soft-capped, biases, tuples
def test_guidance_equals_a_backward_pass_through_the_whole_model(arch, whole, tmp_path, monkeypatch):
    for name, value in {} if whole else dict(LOGIT_BYTES=40_000, LOGIT_TOKENS=1, PIECE=128, GRAPH_BYTES=200_000).items():
        monkeypatch.setattr(endtoend, name, value)
    folder = write_model(tmp_path / arch, arch)
    tokens = calibration_tokens(QuantizeConfig(**SMALL), folder, models.load_config(folder))
    empty, blocks, name, weights, inputs = streams(folder, tokens)
    made = []
    monkeypatch.setattr(endtoend.Segment, "__init__", functools.partialmethod(counted, made, endtoend.Segment.__init__))
    found = endtoend.guide(empty, blocks, name, weights, inputs, torch.float32)
    assert made == ([True] * 8 if whole else [False] * 16)  # 16 sequences, 2 blocks

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    outputs = {}
    for n, m in model.named_modules():
        if isinstance(m, torch.nn.Linear):
            m.register_forward_hook(lambda m, a, out, n=n: (out.retain_grad(), outputs.__setitem__(n, out))[0])
    generator = torch.Generator().manual_seed(0)
    for b, batch in enumerate(tokens.split(4)):
        logits = model(batch, use_cache=False).logits.float()
        p = logits.detach().flatten(0, 1).softmax(-1)
        u = torch.rand(len(p), 1, generator=generator)
        labels = (p.cumsum(-1) < u * p.cumsum(-1)[:, -1:]).sum(-1)
        F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
        for index, block in enumerate(found):
            for linear, batches in block.items():
                expected = outputs[f"{name}.{index}.{linear}"].grad.square().mean(-1).flatten()
                assert torch.allclose(batches[b], expected, rtol=1e-3, atol=1e-9 + 1e-4 * float(expected.mean()))
    assert len(found) == 2 and all(len(block) == len(models.find_linears(blocks[0])) for block in found)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """tinylm at 3 bits, with and without tuned scales, everything else equal."""
    root = tmp_path_factory.mktemp("tuned")
    common = dict(preset="fast", bits=3, calibration=str(CALIBRATION), samples=32, seq_len=128, device="cpu")
    return {
        tuned: (quantize(TINYLM, root / str(tuned), QuantizeConfig(**common, finetune_scales=tuned)), root / str(tuned))
        for tuned in (False, True)
    }


def divergence(folder, sequences):
    original, model = load_dequantized(TINYLM), load_dequantized(folder)
    with torch.no_grad():
        p, q = (m(sequences).logits.float().log_softmax(-1) for m in (original, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_tuned_scales_are_closer_and_codes_stay(both):
    (_, plain), (report, tuned) = both[False], both[True]
    a, b = Weights(plain), Weights(tuned)
    changed = 0
    for name in a.files:
        same = torch.equal(a.read(name), b.read(name))
        assert same or name.endswith(".scales"), f"{name} changed"
        changed += not same
    assert changed > 30
    tokens = calibration_tokens(QuantizeConfig(**read(plain)), TINYLM, models.load_config(TINYLM))
    held = tokens.view(-1, tokens.shape[1])[:: endtoend.HELD_OUT]
    before, after = report.tuning["held_out_kl_before"], report.tuning["held_out_kl_after"]
    assert after < before
    # the figures of the report are those of transformers on the two checkpoints, up to the precision it was computed in
    assert before == pytest.approx(divergence(plain, held), rel=0.03)
    assert after == pytest.approx(divergence(tuned, held), rel=0.03)


def read(folder):
    recipe = read_config(folder).meta["foem"]
    return dict(calibration=str(CALIBRATION), samples=recipe["samples"], seq_len=recipe["seq_len"], seed=recipe["seed"])


def test_what_does_not_help_held_out_text_is_not_kept(both, tmp_path, monkeypatch):
    monkeypatch.setattr(endtoend, "LEARNING_RATE", 0.5)  # every scale is thrown about
    common = dict(preset="fast", bits=3, calibration=str(CALIBRATION), samples=32, seq_len=128, device="cpu")
    report = quantize(TINYLM, tmp_path / "out", QuantizeConfig(**common, finetune_scales=True))
    assert report.tuning["held_out_kl_after"] == report.tuning["held_out_kl_before"]
    a, b = Weights(both[False][1]), Weights(tmp_path / "out")
    assert all(torch.equal(a.read(n), b.read(n)) for n in a.files)


def test_scales_are_tuned_alike_on_a_few_logits_at_a_time(tmp_path, monkeypatch):
    """In float32: products in bfloat16 round otherwise for another number of rows, most of all in AMX tiles."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    common = dict(preset="fast", bits=3, calibration=str(CALIBRATION), samples=32, seq_len=128, device="cpu")
    quantize(TINYLM, tmp_path / "plain", QuantizeConfig(**common))
    expected = quantize(TINYLM, tmp_path / "together", QuantizeConfig(**common, finetune_scales=True))
    seen = []
    monkeypatch.setattr(endtoend, "LOGIT_TOKENS", 1)
    monkeypatch.setattr(endtoend, "LOGIT_BYTES", 1_000_000)  # 61 tokens of 512
    call = endtoend.Head.__call__
    monkeypatch.setattr(endtoend.Head, "__call__", lambda self, h: seen.append(h.shape[:-1].numel()) or call(self, h))
    report = quantize(TINYLM, tmp_path / "few", QuantizeConfig(**common, finetune_scales=True))
    assert max(seen) == endtoend.tokens_at_once(models.load_config(TINYLM)) < 128
    for name, value in expected.tuning.items():
        assert report.tuning[name] == pytest.approx(value, rel=1e-3)
    tuned, together, plain = (Weights(tmp_path / name) for name in ("few", "together", "plain"))
    moved = apart = 0.0
    for name in (n for n in tuned.files if n.endswith(".scales")):
        a, b, c = (w.read(name).float() for w in (tuned, together, plain))
        moved, apart = moved + float(((b - c) / c).square().sum()), apart + float(((a - b) / c).square().sum())
    assert apart < 0.01 * moved


def counted(self, runs, real, run, hidden, keep):
    runs.append(keep)
    real(self, run, hidden, keep)


def test_best_is_deterministic_and_says_what_it_did(tmp_path, monkeypatch):
    """Also without room for the graphs of all blocks, when each is run a second time."""
    folder = write_model(tmp_path / "model", "llama")
    state = torch.random.get_rng_state()
    runs = []
    monkeypatch.setattr(endtoend.Segment, "__init__", functools.partialmethod(counted, runs, endtoend.Segment.__init__))
    for name, room in (("a", endtoend.GRAPH_BYTES), ("b", 0)):
        monkeypatch.setattr(endtoend, "GRAPH_BYTES", room)
        quantize(folder, tmp_path / name, QuantizeConfig(preset="best", **SMALL))
    assert torch.equal(state, torch.random.get_rng_state())
    assert runs == [True] * (len(runs) // 2) + [False] * (len(runs) // 2)
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert a == b
    report = json.loads((tmp_path / "a/foem_report.json").read_text())
    assert report["recipe"]["guided"] and report["recipe"]["finetune_scales"] and report["recipe"]["correct"] == "auto"
    assert set(report["tuning"]) == {"held_out_kl_before", "held_out_kl_after"}
