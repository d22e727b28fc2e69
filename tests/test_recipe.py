"""Presets, named methods, and combinations that make no sense: in Python and on the command line."""

import re

import pytest
from tiny_models import CALIBRATION, write_model
from typer.testing import CliRunner

from foem_vllm.cli import app
from foem_vllm.errors import FoemError
from foem_vllm.recipe import METHODS, PLAIN, PRESETS, QuantizeConfig, resolve


@pytest.mark.parametrize("method", [m for m in METHODS if m != "rtn"])
def test_named_methods_do_nothing_that_their_paper_does_not(method):
    recipe = resolve(QuantizeConfig(method=method))
    assert (recipe.solver.alpha, recipe.solver.beta) == METHODS[method] and recipe.solver.form == "published"
    assert recipe.spec.act_order == "none" and recipe.solver.grid == recipe.grid == "minmax"
    assert not recipe.solver.refit and recipe.correct == 0.0 and recipe.auto == () and recipe.solver.damping == 0.05
    assert recipe.needs_original == (recipe.solver.alpha > 0)
    assert recipe.stated["method"] == method and "preset" not in recipe.stated
    assert all(not recipe.stated.get(name) for name in PLAIN if name not in ("damping", "act_order", "grid"))


def test_rtn_has_no_solver_and_no_text():
    recipe = resolve(QuantizeConfig(method="rtn", bits=3))
    assert recipe.solver is None and not recipe.needs_original and recipe.correct == 0.0 and recipe.auto == ()
    assert not {"calibration", "samples", "damping", "correct", "refit", "alpha", "beta"} & set(recipe.stated)


def test_presets():
    fast, balanced, best = (resolve(QuantizeConfig(preset=p)) for p in ("fast", "balanced", "best"))
    assert set(PRESETS) == {"fast", "balanced", "best"}
    for recipe in (fast, balanced, best):
        assert recipe.solver.alpha == recipe.solver.beta == 0 and recipe.solver.damping == 0.05 and recipe.solver.refit
        assert recipe.spec.act_order == "static" and recipe.solver.grid == "search" and recipe.auto == ()
    assert fast.correct == 0.0 and not fast.needs_original and not fast.solver.descent
    assert balanced.solver.descent and best.solver.descent and best.guided and best.finetune_scales
    assert balanced.correct is None and best.correct is None and balanced.needs_original and best.needs_original
    assert resolve(QuantizeConfig()) == balanced and balanced.stated["preset"] == "balanced"
    extras = ("guided", "finetune_scales")
    assert not any(r.stated.get(e) for r in (fast, balanced) for e in extras)


def test_what_is_given_wins_over_the_preset():
    recipe = resolve(QuantizeConfig(preset="balanced", act_order="none", grid="minmax", refit=False, correct=0.5, damping=0.1))
    assert recipe.spec.act_order == "none" and recipe.grid == "minmax" and not recipe.solver.refit
    assert recipe.correct == 0.5 and recipe.solver.damping == 0.1 and recipe.stated["correct"] == 0.5
    recipe = resolve(QuantizeConfig(preset="fast", alpha=0.25, beta=0.1))
    assert (recipe.solver.alpha, recipe.solver.beta) == (0.25, 0.1) and recipe.needs_original
    extras = resolve(QuantizeConfig(method="gptq", act_order="group", grid="search", refit=True, correct="auto", damping="auto"))
    assert extras.correct is None and extras.solver.refit and extras.auto == ("damping",) and extras.needs_original
    assert (resolve(QuantizeConfig(method="foem", beta=0)).solver.beta, PLAIN["correct"]) == (0, 0.0)


@pytest.mark.parametrize("method", ["gptq", "gptaq", "foem", None])
def test_auto_is_allowed_for_every_method_that_solves(method):
    recipe = resolve(QuantizeConfig(method=method, alpha="auto", beta="auto", damping="auto", correct=0.0))
    assert recipe.auto == ("alpha", "beta", "damping") and recipe.needs_original
    assert (recipe.solver.alpha, recipe.solver.beta, recipe.solver.damping) == (0.0, 0.0, 0.05)
    assert {recipe.stated[n] for n in recipe.auto} == {"auto"}


REFUSED = {
    "preset": (dict(preset="good"), "--preset good is unknown; choose one of fast, balanced, best"),
    "preset and method": (dict(preset="fast", method="gptq"), "--preset fast and --method gptq exclude each other"),
    "method": (dict(method="awq"), "--method awq is unknown"),
    "one sample, correct": (dict(samples=1), "--samples 1: choosing on held-out text needs at least 2"),
    "alpha and correct": (dict(alpha=0.25), "--alpha and --correct both correct"),
    "alpha and given correct": (dict(method="gptaq", correct=0.5), "--alpha and --correct both correct"),
    "alpha auto and correct": (dict(alpha="auto"), "--alpha and --correct both correct"),
    "alpha of gptq": (dict(method="gptq", alpha=0.25), "--alpha 0.25 has no meaning for --method gptq"),
    "alpha of foem": (dict(method="foem", alpha=0.25), "use --method gptaq or foem+gptaq"),
    "beta of gptaq": (dict(method="gptaq", beta=0.1), "use --method foem or foem+gptaq"),
    "beta auto of rtn": (dict(method="rtn", beta="auto"), "--beta auto has no meaning for --method rtn"),
    "rtn act_order": (dict(method="rtn", act_order="group"), "--act-order has no meaning for --method rtn"),
    "rtn refit": (dict(method="rtn", refit=True), "--refit has no meaning for --method rtn"),
    "rtn correct": (dict(method="rtn", correct=0.5), "--correct has no meaning for --method rtn"),
    "rtn correct auto": (dict(method="rtn", correct="auto"), "--correct has no meaning for --method rtn"),
    "rtn damping": (dict(method="rtn", damping=0.1), "--damp has no meaning for --method rtn"),
    "beta word": (dict(method="foem", beta="nonsense"), "beta=nonsense must lie between 0 and 1, or be auto"),
    "correct above": (dict(correct=1.5), "correct=1.5 must lie between 0 and 1"),
    "damping below": (dict(damping=-0.1), "damping=-0.1 must lie between 0 and 1"),
    "damping nan": (dict(damping=float("nan")), "damping=nan must lie"),
    "samples": (dict(samples=0), "must be at least 1 and 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    values, message = REFUSED[case]
    with pytest.raises(FoemError, match=re.escape(message)) as caught:
        resolve(QuantizeConfig(**values))
    assert "\n" not in str(caught.value)


def test_one_sample_cannot_choose_beta():
    with pytest.raises(FoemError, match="--samples 1: choosing"):
        resolve(QuantizeConfig(method="foem", beta="auto", samples=1))


def test_one_sample_is_enough_when_nothing_is_chosen():
    assert resolve(QuantizeConfig(preset="fast", samples=1)).correct == 0.0
    assert resolve(QuantizeConfig(correct=0.5, samples=1)).correct == 0.5
    assert resolve(QuantizeConfig(method="gptaq", samples=1)).solver.alpha == 0.25


def command(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


@pytest.mark.parametrize("option", ["--alpha", "--beta", "--damp", "--correct"])
def test_words_that_are_no_number_are_refused_by_the_command_line(option, tmp_path):
    done = command(tmp_path / "absent", tmp_path / "out", option, "nonsense")
    text = " ".join(re.sub(r"[^\w\s'-]", " ", done.output).split())
    assert done.exit_code == 2 and "'nonsense' is neither a number nor auto" in text and option in text
    assert not (tmp_path / "out").exists()


def test_command_line_says_what_it_was_asked_for(tmp_path):
    """--preset best on the tiniest model, and single options that reach the recipe."""
    import json

    model = write_model(tmp_path / "model", "llama", num_hidden_layers=1)
    text = ["--calibration", CALIBRATION, "--samples", 8, "--seq-len", 32, "--group-size", 32, "--device", "cpu", "-q"]
    done = command(model, tmp_path / "best", "--preset", "best", *text)
    assert done.exit_code == 0, (done.output, done.exception)
    report = json.loads((tmp_path / "best/foem_report.json").read_text())
    assert report["recipe"]["preset"] == "best" and report["recipe"]["correct"] == "auto" and len(report["layers"]) == 7
    done = command(
        model, tmp_path / "given", "--correct", 0.5, "--beta", "auto", "--no-refit", "--act-order", "none", "--damp", 0.1, *text
    )
    assert done.exit_code == 0, (done.output, done.exception)
    report = json.loads((tmp_path / "given/foem_report.json").read_text())
    recipe = report["recipe"]
    assert (recipe["correct"], recipe["beta"], recipe["act_order"], recipe["damping"]) == (0.5, "auto", "none", 0.1)
    assert "refit" not in recipe and {layer["correction"] for layer in report["layers"]} == {0.5}
    assert all(layer["damping"] == 0.1 and layer["chosen"]["scores"] for layer in report["layers"])
