"""Bits within a budget: the knapsack against all combinations, sizes against files, rules against vLLM's reader, expected losses
against the KL of whole models in which one group of linears is quantized."""

import itertools
import json
import math
import random
import re

import pytest
import torch
from foem_eval.dequantized import load_dequantized
from tiny_models import CALIBRATION, EVALUATION, TINYLM, write_model
from typer.testing import CliRunner

from foem_vllm import QuantizeConfig, budget, models, quantize, sensitivity
from foem_vllm.budget import Group
from foem_vllm.calibration import read_texts, sample_tokens
from foem_vllm.checkpoint import storage
from foem_vllm.cli import app
from foem_vllm.doctor import examine
from foem_vllm.errors import FoemError
from foem_vllm.expert_parts import expert_specs
from foem_vllm.format import FormatConfig, read_config
from foem_vllm.job import prepare
from foem_vllm.spec import BITS, QuantSpec
from foem_vllm.stream import record_inputs

SMALL = dict(calibration=str(CALIBRATION), samples=8, seq_len=64, group_size=32, device="cpu")


def some_groups(seed: int, count: int = 6) -> list[Group]:
    """Of random sizes and losses, which mostly fall with bits but need not be convex."""
    draw = random.Random(seed)
    made = []
    for index in range(count):
        weights = draw.randint(1, 30) * 64
        stored = {b: weights * b + draw.randint(0, weights) // 2 for b in BITS}
        losses = sorted((draw.random() ** 3 for _ in BITS), reverse=True)
        made.append(Group((str(index),), weights, stored, dict(zip(BITS, losses))))
    return made


@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_solved_exactly(seed):
    groups = some_groups(seed)
    low, high = (sum(g.stored[b] for g in groups) for b in (2, 8))
    plans = [
        (sum(g.stored[b] for g, b in zip(groups, bits)), math.fsum(g.loss[b] for g, b in zip(groups, bits)))
        for bits in itertools.product(BITS, repeat=len(groups))
    ]
    for share in (0, 0.1, 0.3, 0.5, 0.8, 1):
        allowed = int(low + share * (high - low))
        best = min(loss for stored, loss in plans if stored <= allowed)
        found = budget.least(groups, allowed)
        assert sum(g.stored[b] for g, b in zip(groups, found)) <= allowed
        assert math.fsum(g.loss[b] for g, b in zip(groups, found)) == pytest.approx(best, abs=1e-12)


def test_many_groups_are_within_the_budget_and_near_the_best(monkeypatch):
    groups = some_groups(0, 40)
    allowed = sum(g.stored[3] for g in groups)
    exact = budget.least(groups, allowed)
    monkeypatch.setattr(budget, "STATES", 200)
    rough = budget.least(groups, allowed)
    loss = [sum(g.loss[b] for g, b in zip(groups, bits)) for bits in (exact, rough)]
    assert sum(g.stored[b] for g, b in zip(groups, rough)) <= allowed
    assert loss[0] <= loss[1] < 1.05 * loss[0]
    cheapest = sum(min(g.stored.values()) for g in groups)
    assert sum(g.stored[b] for g, b in zip(groups, budget.least(groups, cheapest))) == cheapest


def equal_groups(losses: list[dict[int, float]]) -> list[Group]:
    return [Group((str(i),), 64, {b: 64 * b for b in BITS}, loss) for i, loss in enumerate(losses)]


def test_one_width_stays_unless_something_else_is_clearly_better():
    same = {2: 1.0, 3: 0.25, 4: 0.06, 8: 0.0}
    for factor, bits in ((1.0, (3, 3)), (4.2, (3, 3)), (8.0, (4, 2))):
        groups = equal_groups([{b: factor * x for b, x in same.items()}, same])
        found = budget.choose(groups, 3)
        assert found.bits == bits and found.uniform == (3, pytest.approx(0.25 * (1 + factor)))
        assert found.bits_per_weight == 3
    between = budget.choose(equal_groups([same, same]), 3.5)
    assert sorted(between.bits) == [3, 4] and between.bits_per_weight == 3.5 and between.uniform[0] == 3
    assert budget.choose(equal_groups([same, same]), 2).bits == (2, 2)
    fixed = [*equal_groups([same, same]), Group(("head",), 64, {4: 256}, {4: 0.0})]
    assert budget.choose(fixed, 3).bits == (3, 2, 4) or budget.choose(fixed, 3).bits == (2, 3, 4)
    assert budget.choose(fixed, 5).bits == (4, 4, 4) and budget.choose(fixed, 5).uniform[0] == 4
    with pytest.raises(FoemError, match="2.6667 is the least"):
        budget.choose(fixed, 2.5)


def test_budgets_out_of_reach_are_refused_with_what_is_within(tmp_path):
    model = write_model(tmp_path / "model", "llama", num_hidden_layers=1)
    with pytest.raises(FoemError, match="--bits-per-weight 2 is out of reach") as caught:
        prepare(model, QuantizeConfig(bits_per_weight=2, **SMALL))
    low, high = (re.search(pattern, str(caught.value))[1] for pattern in (r"take ([\d.]+)", r"to ([\d.]+) \(8 bits"))
    for value in (float(low), float(high)):
        assert prepare(model, QuantizeConfig(bits_per_weight=value, **SMALL)).plan.specs
    for value in (float(low) - 1e-4, float(high) + 2e-4, float("nan"), float("inf"), -1.0):
        with pytest.raises(FoemError, match="is out of reach"):
            prepare(model, QuantizeConfig(bits_per_weight=value, **SMALL))
    for options, problem in ((dict(method="rtn"), "has no meaning for --method rtn"), (dict(samples=1), "at least 2 sequences")):
        with pytest.raises(FoemError, match=problem):
            prepare(model, QuantizeConfig(**{"bits_per_weight": 3.5, **SMALL, **options}))


def random_plan(seed: int) -> dict[str, QuantSpec]:
    """Twelve layers, so that numbers are beginnings of others: of linears that are fused, linears alone, experts."""
    draw, plan = random.Random(seed), {}
    for layer in range(12):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.down_proj",),
                      ("mlp.gate_proj", "mlp.up_proj"), [f"moe.experts.{e}.{n}" for e in range(11) for n in ("w1", "w3")],
                      [f"moe.experts.{e}.w2" for e in range(11)]):  # fmt: skip
            spec = QuantSpec(draw.choice(BITS), 128)
            plan |= {f"model.layers.{layer}.{name}": spec for name in names}
    return plan


@pytest.mark.parametrize("seed", range(4))
def test_rules_say_the_same_to_us_and_to_vllm(seed):
    """vLLM looks up what it fuses by the fused name, GPTQModel and we by the names in the files."""
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override

    plan, base = random_plan(seed), QuantSpec(3, 128)
    dynamic = budget.rules(plan, base)
    config = FormatConfig(base, dynamic=dynamic)
    assert {name: config.spec_for(name) for name in plan} == plan
    assert len(dynamic) <= 18, "a rule a kind of linear and width"
    for layer in range(12):
        for fused, one in (("self_attn.qkv_proj", "self_attn.k_proj"), ("mlp.gate_up_proj", "mlp.up_proj"),
                           ("mlp.down_proj", "mlp.down_proj")):  # fmt: skip
            prefix = f"model.layers.{layer}."
            assert get_dynamic_override(config, prefix + fused, "bits", base.bits) == plan[prefix + one].bits
    assert config.spec_for("lm_head") == base and not budget.rules(dict.fromkeys(plan, base), base)


@pytest.mark.parametrize("arch", ["llama", "mixtral", "opt", "falcon"])
def test_checkpoints_take_what_was_allowed_and_fused_layers_agree(arch, tmp_path):
    model = write_model(tmp_path / "model", arch)
    config = QuantizeConfig(bits_per_weight=4.6, preset="fast", **SMALL)
    report = quantize(model, tmp_path / "a", config)
    quantize(model, tmp_path / "b", config)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    chosen, size = report.chosen_bits, storage(tmp_path / "a")
    assert size["bits_per_weight"] == pytest.approx(chosen["bits_per_weight"], abs=1e-9)
    assert 4.3 < size["bits_per_weight"] <= 4.6
    assert report.seconds["choosing bits"] > 0 and report.recipe["bits_per_weight"] == 4.6 and "bits" not in report.recipe
    stored, bits = read_config(tmp_path / "a"), {layer.name: layer.bits for layer in report.layers}
    assert bits == {name: stored.spec_for(name).bits for name in bits} and len(set(bits.values())) > 1
    assert sum(g["weights"] for g in chosen["groups"]) == size["quantized_weights"]
    for name in bits:
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            parent, _, last = name.rpartition(".")
            assert last not in fused or {bits[f"{parent}.{other}"] for other in fused} == {bits[name]}
    if arch == "mixtral":
        for layer in range(2):
            names = f"model.layers.{layer}.block_sparse_moe.experts", 4, ("w1", "w3", "w2")
            assert expert_specs(*names, stored.spec_for) is not None
    assert not examine(str(tmp_path / "a"))["problems"]


@pytest.fixture(scope="module")
def held_out():
    """[8, 256] tokens that are no calibration text, and tinylm's log-probabilities behind them."""
    tokenizer = models.load_tokenizer(TINYLM)
    tokens = sample_tokens(read_texts(str(EVALUATION)), tokenizer, 8, 256, 0, str(EVALUATION))
    with torch.no_grad():
        return tokens, load_dequantized(TINYLM)(tokens).logits.double().log_softmax(-1)


def kl_of(folder, held_out) -> float:
    tokens, p = held_out
    with torch.no_grad():
        q = load_dequantized(folder)(tokens).logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_output_head_keeps_its_bits_and_counts(tmp_path):
    model = write_model(tmp_path / "model", "llama")
    report = quantize(model, tmp_path / "out", QuantizeConfig(bits_per_weight=5.3, bits=4, lm_head=True, preset="fast", **SMALL))
    bits = {layer.name: layer.bits for layer in report.layers}
    config = read_config(tmp_path / "out")
    assert bits.pop("lm_head") == 4 and config.spec_for("lm_head").bits == 4 and len(set(bits.values())) > 1
    assert {name: config.spec_for(name).bits for name in bits} == bits
    size = storage(tmp_path / "out")["bits_per_weight"]
    assert size == pytest.approx(report.chosen_bits["bits_per_weight"], abs=1e-9) and 5.1 < size <= 5.3
    with pytest.raises(FoemError, match="out of reach: these linears take 4"):  # the head does not go below its four bits
        quantize(model, tmp_path / "less", QuantizeConfig(bits_per_weight=3.5, bits=4, lm_head=True, preset="fast", **SMALL))


def test_what_is_expected_is_what_whole_models_lose(held_out, tmp_path):
    """One group of tinylm quantized and all else as it was, beside what the group was expected to lose: on other text, in
    float32, by transformers. Their order is what bits are chosen by."""
    text = dict(calibration=str(CALIBRATION), samples=32, seq_len=128, device="cpu", preset="fast")
    job = prepare(TINYLM, QuantizeConfig(bits_per_weight=3.5, **text))
    with torch.no_grad():
        where = job.empty, job.blocks_name, job.blocks, job.weights
        groups = sensitivity.measure(job, record_inputs(*where, job.tokens(), 8, job.dtype, job.device))
    assert len(groups) == 24 and {name for g in groups for name in g.names} == job.plan.specs.keys()
    for group in groups:
        assert group.loss[2] > 2.5 * group.loss[3] > 6 * group.loss[4] > 60 * group.loss[8] > 0
    expected, found = [], []
    for number, bits in ((0, 3), (1, 3), (3, 4), (9, 3), (12, 2), (16, 4), (21, 2), (22, 3)):
        others = f"^(?!({'|'.join(map(re.escape, groups[number].names))})$)"
        quantize(TINYLM, tmp_path / str(number), QuantizeConfig(bits=bits, exclude=[others], **text))
        expected.append(groups[number].loss[bits])
        found.append(kl_of(tmp_path / str(number), held_out))
    ratios = torch.tensor(found) / torch.tensor(expected)
    logs = torch.tensor([expected, found]).log()
    print("measured over expected:", ratios, "correlation of logarithms:", torch.corrcoef(logs)[0, 1])
    assert 0.5 < ratios.min() and ratios.max() < 2 and torch.corrcoef(logs)[0, 1] > 0.97


def test_command_line_shows_what_was_chosen(tmp_path):
    model = write_model(tmp_path / "model", "qwen3")
    text = ["--calibration", str(CALIBRATION), "--samples", "8", "--seq-len", "64", "--group-size", "32", "--device", "cpu"]
    done = CliRunner().invoke(app, ["quantize", str(model), str(tmp_path / "out"), "--bits-per-weight", "5", *text])
    assert done.exit_code == 0, (done.output, done.exception)
    assert re.search(r"bits: [45]\.\d+ a weight, expected KL \d\.\d+ nats a token", done.output)
    report = json.loads((tmp_path / "out/foem_report.json").read_text())
    rows = [re.findall(r"\d+", line) for line in done.output.splitlines() if line.startswith("│")]
    bits = [str(g["bits"]) for g in report["chosen_bits"]["groups"]]
    assert rows == [["0", *bits[:4]], ["1", *bits[4:]]]
