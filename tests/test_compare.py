"""foem compare: names of methods, parts of the evaluation text, intervals, resuming, tables, and what it says about bad input."""
from __future__ import annotations

import csv
import json
import pathlib
import sys
import venv

import foem_eval
import pytest
import torch
from foem_eval import compare_tables
from foem_eval.compare import Comparison, compare
from foem_eval.dequantized import load_dequantized
from foem_eval.divergence import Remembered, bootstrap, measure, ratio_of_all, read_sequences
from foem_eval.methods import parse, run_peer, split
from foem_eval.peers import environments
from safetensors.torch import save_file
from tiny_models import CALIBRATION, EVALUATION, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from foem_vllm import cli
from foem_vllm.errors import FoemError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("compare") / "model", "qwen3", torch.bfloat16)


@pytest.fixture
def comparison(model, tmp_path) -> Comparison:
    return Comparison(model=str(model), evaluation=str(EVALUATION), group_size=32, calibration=str(CALIBRATION), samples=4,
                      seq_len=32, sequences=3, sequence_length=48, methods=["rtn,gptq"], seeds=[0, 1], out=tmp_path / "out",
                      device="cpu")


# Names of methods

def test_a_comma_separates_methods_and_their_options():
    assert split(["rtn,foem:beta=0.1,act_order=group", "gptqmodel:gptq, rtn"]) == \
        ["rtn", "foem:beta=0.1,act_order=group", "gptqmodel:gptq"]


def test_options_have_the_types_of_the_config():
    text = "foem+gptaq:beta=0.1,alpha=none,symmetric=false,group_size=64,act_order=group,exclude=k_proj|v_proj"
    config = parse(text).config(bits=3)
    assert (config.method, config.bits, config.group_size) == ("foem+gptaq", 3, 64)
    assert config.beta == 0.1 and config.alpha is None and config.symmetric is False
    assert parse("balanced:act_order=none").config().act_order == "none"  # an order, not "as the preset says"
    assert config.act_order == "group" and config.exclude == ["k_proj|v_proj"]


def test_presets_are_methods_too_and_values_may_be_auto():
    config = parse("fast:grid=minmax,damping=auto").config(bits=4)
    assert (config.preset, config.method, config.grid, config.damping) == ("fast", None, "minmax", "auto")


def test_peers_and_their_options():
    assert (parse("gptqmodel:foem").peer, parse("gptqmodel:foem").name) == ("gptqmodel", "foem")
    assert parse("autoround:iters=50").options == (("iters", 50),) and parse("autoround").options == ()


@pytest.mark.parametrize("text, message", [
    ("awq", "unknown method; choose among rtn, gptq.*gptqmodel:gptq.*autoround"),
    ("gptqmodel:awq", "unknown method"), ("gptqmodel", "unknown method"), ("beta=1", "unknown method"),
    ("foem:gamma=1", "'gamma=1' is no FIELD=VALUE; fields are .*act_order.*beta"),
    ("foem:beta", "'beta' is no FIELD=VALUE"), ("foem:group_size=x", "group_size=x is not int"),
    ("foem:symmetric=1", "symmetric=1 is not bool"), ("foem:bits=3", "bits is decided by --bits"),
    ("autoround:lr=1", "'lr=1' is no option of autoround"), ("autoround:iters=x", "is no option of autoround")])
def test_unknown_names_say_what_there_is(text, message):
    with pytest.raises(FoemError, match=message):
        parse(text)


# Text

def test_dev_and_test_parts_share_no_window_and_together_are_all(tinylm):
    tokenizer = AutoTokenizer.from_pretrained(tinylm)
    every, dev, test = (read_sequences(tokenizer, EVALUATION, 512, part=part, dev=40) for part in ("all", "dev", "test"))
    assert torch.equal(dev, read_sequences(tokenizer, EVALUATION, 512, limit=40))
    assert len(dev) == 40 and len(dev) + len(test) == len(every)
    rows = [{tuple(row) for row in part.tolist()} for part in (dev, test, every)]
    assert rows[0].isdisjoint(rows[1]) and rows[0] | rows[1] == rows[2]
    some = read_sequences(tokenizer, EVALUATION, 512, limit=5, part="test", dev=40)
    assert len(some) == 5 and {tuple(row) for row in some.tolist()} <= rows[1]


def test_a_text_file_is_one_document(tinylm, tmp_path):
    tokenizer, text = AutoTokenizer.from_pretrained(tinylm), "Every good boy does fine.\n" * 20
    (tmp_path / "held-out.txt").write_text(text)
    found = read_sequences(tokenizer, tmp_path / "held-out.txt", 16)
    assert torch.equal(found[0], torch.tensor(tokenizer(text)["input_ids"][:16]))


# Intervals

def test_a_constant_difference_is_certain():
    b = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) + 1
    found = bootstrap(b + 0.25, b)
    assert found.difference == pytest.approx(0.25)
    assert found.difference_interval == pytest.approx((0.25, 0.25))
    found = bootstrap(3 * b, b)
    assert found.ratio == pytest.approx(3) and found.ratio_interval == pytest.approx((3, 3))


def test_the_interval_over_sequences_is_that_of_the_normal_distribution():
    g = torch.Generator().manual_seed(2)
    b = torch.rand(1, 400, generator=g) + 1
    a = b + 0.1 + 0.05 * torch.randn(1, 400, generator=g)
    low, high = bootstrap(a, b).difference_interval
    mean, error = float((a - b).mean()), float((a - b).std() / 20)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert bootstrap(a, b).difference_interval == (low, high)  # the generator is fixed


def test_seeds_are_resampled_too_and_sequences_alike_for_all_of_them():
    # Only the seed matters: with two seeds, differences 0 and 1, the means 0, 1/2 and 1 come up with 1/4, 1/2 and 1/4.
    b = torch.ones(2, 50)
    found = bootstrap(b + torch.tensor([[0.0], [1.0]]), b)
    assert found.difference == pytest.approx(0.5) and found.difference_interval == pytest.approx((0, 1))
    # Only the sequence matters: more seeds do not make it surer, because all of them see the same sequences.
    d = torch.randn(1, 100, generator=torch.Generator().manual_seed(3))
    one, four = (bootstrap(b[:1].repeat(n, 2) + d, b[:1].repeat(n, 2)).difference_interval for n in (1, 4))
    assert four[1] - four[0] == pytest.approx(one[1] - one[0], rel=0.05)


def test_one_run_stands_for_every_seed_but_other_shapes_are_refused():
    a, b = torch.rand(3, 20) + 1, torch.rand(1, 20) + 1
    assert bootstrap(a, b) == bootstrap(a, b.repeat(3, 1))
    for other in (torch.rand(2, 20), torch.rand(3, 19)):
        with pytest.raises(ValueError, match="not of the same seeds and sequences"):
            bootstrap(a, other)


def test_ratios_of_several_models_are_drawn_together():
    b = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) + 1
    assert ratio_of_all([(2 * b, b), (8 * b, b)]) == (pytest.approx(4), pytest.approx((4, 4)))
    a = torch.rand(2, 30, generator=torch.Generator().manual_seed(2)) + 1
    assert ratio_of_all([(a, b), (b, a)]) == (pytest.approx(1), pytest.approx((1, 1)))  # what one gains the other loses
    found, one = ratio_of_all([(a, b), (a, b)]), bootstrap(a, b)  # nothing new in the second
    assert found == (pytest.approx(one.ratio), pytest.approx(one.ratio_interval))


def test_remembered_logits_are_the_models_and_stop_at_the_budget(model):
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    calls = []
    plain.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.arange(60).view(3, 20)
    remembered = Remembered(plain, budget=2 * 20 * 4096 * 4)  # two sequences of 20 tokens, float32
    first, again = (measure(remembered, {}, ids)["original"].loss for _ in range(2))
    assert torch.equal(first, again) and torch.equal(first, measure(plain, {}, ids)["original"].loss)
    assert len(calls) == 3 + 1 + 3  # the third sequence does not fit


# The comparison itself

def test_compare_measures_resumes_and_extends(comparison, capsys):
    c = comparison
    found = compare(c)
    stored = json.loads((c.out / "results.json").read_text())
    assert stored == found
    assert [(r["method"], r["seed"]) for r in stored["runs"]] == [("rtn", None), ("gptq", 0), ("gptq", 1)]
    by = {(r["method"], r["seed"]): r for r in stored["runs"]}
    assert all(len(r[name]) == 3 for r in stored["runs"] for name in ("kl", "loss", "agreement"))
    assert all(by["gptq", 0][name] != by["gptq", 1][name] for name in ("kl", "calibration_sha256"))
    assert by["gptq", 0]["kl"] != by["rtn", None]["kl"]
    assert len(by["gptq", 0]["layers"]) == 14 and by["rtn", None]["layers"] == {}
    assert 4 < by["gptq", 0]["bits_per_weight"] < 6 and by["gptq", 0]["quantize_seconds"] > 0
    assert sorted(p.name for p in c.out.iterdir()) == ["kl_by_bits.png", "layer_errors.png", "perplexity_by_bits.png",
                                                      "results.json", "table.csv", "table.md"]
    table = (c.out / "table.md").read_text()
    assert "| gptq | 4 | 2 |" in table and "gptq" in capsys.readouterr().out

    # The same command computes nothing; what is missing is added; a run of another commit counts only with --resume.
    stamp = (c.out / "results.json").stat().st_mtime_ns
    assert compare(c) == found and (c.out / "results.json").stat().st_mtime_ns == stamp
    c.methods, c.seeds, c.baseline, c.keep = ["rtn", "foem:beta=0.1,act_order=group"], [1], "rtn", True
    more = compare(c)
    assert [r["method"] for r in more["runs"]] == ["rtn", "gptq", "gptq", "foem:beta=0.1,act_order=group"]
    assert more["runs"][:3] == found["runs"]
    kept = load_dequantized(c.out / "checkpoints/foem_beta=0.1_act_order=group-w4-s1")
    sequences = read_sequences(AutoTokenizer.from_pretrained(c.model), EVALUATION, 48, limit=3)
    again = measure(load_dequantized(c.model), {"kept": kept}, sequences)
    assert more["runs"][3]["kl"] == pytest.approx(again["kept"].kl.tolist(), rel=1e-5)
    assert more["runs"][3]["loss"] == pytest.approx(again["kept"].loss.tolist(), rel=1e-5)
    assert more["original"]["loss"] == pytest.approx(again["original"].loss.tolist(), rel=1e-5)
    with (c.out / "table.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["rtn"]["kl_ratio"] == "" and rows["gptq"]["seeds"] == "2"
    gptq = rows["gptq"]
    assert float(gptq["kl_ratio_95_low"]) <= float(gptq["kl_ratio"]) <= float(gptq["kl_ratio_95_high"])
    assert float(gptq["kl_ratio"]) == pytest.approx(float(gptq["kl"]) / float(rows["rtn"]["kl"]))
    results = json.loads((c.out / "results.json").read_text())
    for run in results["runs"]:
        run["commit"] = "elsewhere"
    (c.out / "results.json").write_text(json.dumps(results))
    c.methods, c.resume, c.keep = ["rtn"], True, False
    assert {r["commit"] for r in compare(c)["runs"]} == {"elsewhere"}
    c.resume = False
    again = compare(c)["runs"]
    assert [r["method"] for r in again if r["commit"] != "elsewhere"] == ["rtn"] and len(again) == 4
    assert {r["method"]: r["kl"] for r in again}["rtn"] == by["rtn", None]["kl"]

    c.samples = 5
    with pytest.raises(FoemError, match=r"other settings \(samples 4, now 5\)"):
        compare(c)


def test_an_interrupted_comparison_keeps_what_is_done(comparison, monkeypatch):
    import foem_eval.compare as module
    quantize, calls = module.quantize, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return quantize(*args)
    monkeypatch.setattr(module, "quantize", interrupted)
    comparison.seeds = [0]
    with pytest.raises(KeyboardInterrupt):
        compare(comparison)
    assert sorted(p.name for p in comparison.out.iterdir()) == ["results.json"]
    monkeypatch.setattr(module, "quantize", quantize)
    assert [r["method"] for r in compare(comparison)["runs"]] == ["rtn", "gptq"]
    assert len(calls) == 2


def test_numbers_of_a_row():
    run = {"bits": 4, "agreement": [1.0, 0.5], "quantize_seconds": 2.0, "bits_per_weight": 4.25, "bytes": 100}
    results = {"original": {"loss": [1.0, 2.0]}, "runs": [
        {**run, "method": "a", "seed": 0, "kl": [0.1, 0.3], "loss": [1.5, 2.5]},
        {**run, "method": "a", "seed": 1, "kl": [0.3, 0.5], "loss": [1.7, 2.7], "quantize_seconds": 4.0},
        {**run, "method": "b", "seed": None, "kl": [0.1, 0.1], "loss": [1.0, 2.0]}]}
    a, b = compare_tables.rows_of(results, "b")
    assert a["kl"] == pytest.approx(0.3) and a["kl_spread"] == pytest.approx(0.2) and "kl_spread" not in b
    assert a["loss_increase"] == pytest.approx(0.6) and a["loss_increase_spread"] == pytest.approx(0.2)
    assert a["perplexity"] == pytest.approx(torch.tensor([2.0, 2.2]).exp().mean().item())
    assert a["quantize_seconds"] == 3 and a["process_seconds"] is None and a["agreement"] == 0.75
    assert a["kl_difference"] == pytest.approx(0.2) and a["kl_ratio"] == pytest.approx(3) and "kl_ratio" not in b


# Bad input: one line, nothing written

@pytest.mark.parametrize("change, message", [
    ({"methods": ["rtn", "awq"]}, "--methods awq: unknown method"), ({"methods": []}, "--methods names none"),
    ({"methods": ["rtn:act_order=group"]}, "--methods rtn:act_order=group: .*no meaning"),
    ({"methods": ["foem:beta=x"]}, "--methods foem:beta=x: beta=x must lie between 0 and 1, or be auto"),
    ({"bits": [5]}, "--bits 5: cannot be stored"), ({"evaluation": None}, "--evaluation is missing: give a .txt"),
    ({"evaluation": "nowhere.jsonl"}, "--evaluation nowhere.jsonl: no such file"),
    ({"split": "train"}, "--split train: unknown"), ({"sequences": 0}, "must be at least 1"),
    ({"sequence_length": 512}, "longer than this model's context of 128"),
    ({"split": "test", "dev_sequences": 10**6}, "leaves none for the test part"),
    ({"baseline": "gptaq"}, r"--baseline gptaq is not among the methods \(gptq, rtn\)")])
def test_bad_settings_are_refused_before_anything_is_written(comparison, change, message):
    for name, value in change.items():
        setattr(comparison, name, value)
    with pytest.raises(FoemError, match=message):
        compare(comparison)
    assert not comparison.out.exists()


def test_a_file_in_the_place_of_the_results_is_refused(comparison):
    comparison.out.write_text("in the way")
    with pytest.raises(FoemError, match="--out .*cannot be made"):
        compare(comparison)


def test_a_short_evaluation_text_is_refused(comparison, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "too short"}\n')
    comparison.evaluation = str(tmp_path / "short.jsonl")
    with pytest.raises(FoemError, match="--evaluation .*one sequence needs 48; give a longer text"):
        compare(comparison)


def test_a_peer_environment_that_cannot_be_made_says_what_to_do(comparison, tmp_path):
    (tmp_path / "file").write_text("in the way")
    comparison.methods, comparison.peers_folder = ["gptqmodel:gptq"], tmp_path / "file"
    with pytest.raises(FoemError, match="gptqmodel==.*give --peers-folder a folder you may write to"):
        compare(comparison)


def test_a_peer_that_fails_shows_the_end_of_its_output(model, tmp_path):
    python, tokens, log = pathlib.Path(sys.executable), tmp_path / "tokens", tmp_path / "log"
    save_file({"input_ids": torch.zeros(2, 8, dtype=torch.int64)}, tokens)
    with pytest.raises(FoemError, match="(?s)exit code 1; the last lines of .*log:.*No module named 'auto_round'"):
        run_peer(parse("autoround"), python, model, tmp_path / "out", tokens, [], log)


def test_a_peer_that_pip_cannot_install_says_what_to_do(tmp_path):
    venv.create(tmp_path / "autoround", with_pip=False)
    with pytest.raises(FoemError, match="pip could not install auto-round==.*check the network"):
        environments.ensure("autoround", tmp_path)


def test_the_command_line_splits_its_lists(model, tmp_path, monkeypatch, capsys):
    line = ["compare", str(model), "--out", str(tmp_path / "out"), "--methods", "rtn,awq", "--bits"]
    for bits, message in (("4,3", "--methods awq: unknown method"), ("four", "--bits four: not a comma-separated list")):
        monkeypatch.setattr("sys.argv", ["foem", *line, bits])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 1 and message in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_command(model, tmp_path, monkeypatch, capsys):
    for name in ("compare", "compare_tables"):
        monkeypatch.delitem(sys.modules, f"foem_eval.{name}")
        monkeypatch.delattr(foem_eval, name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("sys.argv", ["foem", "compare", str(model), "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "needs matplotlib, which is not installed; pip install 'foem-vllm[eval]'" in capsys.readouterr().err
