"""kernels/gpu_check.py and its steps where there is no GPU: the plan, a refusal that cannot be taken for a pass, what becomes
of steps that fail, are late or lack something; the number steps on the CPU's kernels; what is served, made small."""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
import types
from unittest import mock

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "kernels" / "gpu_check.py"
sys.path[:0] = [str(ROOT / "kernels")]

import gpu_check  # noqa: E402
import gpu_numbers  # noqa: E402
import gpu_serve  # noqa: E402
from gpu_check import Step  # noqa: E402

import foem_vllm.solver  # noqa: E402

SMALL = dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
             intermediate_size=384, vocab_size=512, max_position_embeddings=512)


def run(*arguments):
    # Without PYTHONPATH and from elsewhere, because the script must find the repository by itself; with any GPU hidden.
    environment = {key: v for key, v in os.environ.items() if key != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd="/", env=environment, capture_output=True, text=True,
                          timeout=240)


def test_dry_run_names_every_step_as_skipped():
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    skipped = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("skipped") and "needs a GPU" in line]
    assert skipped == ["numbers", "graphs", "moe", "solver", "timing", "quantizer", "serve"]
    assert "needs a GPU and --vllm-site" in done.stdout and "passed" not in done.stdout.lower()


@pytest.mark.skipif(bool(torch.version.hip), reason="CUDA_VISIBLE_DEVICES hides no AMD GPU")
def test_without_a_gpu_it_refuses(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    out = capsys.readouterr()
    assert "no NVIDIA GPU is visible" in out.err and not out.out


def test_unknown_steps_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run", "--steps", "numbers,speed"])
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == 2 and "unknown step speed" in capsys.readouterr().err


# --- the runner -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def steps(monkeypatch, tmp_path):
    """run_steps over made-up steps: (exit code, what is in the file)."""
    def good(run):
        """Passes."""
        return True, {"n": 1}

    def bad(run):
        """Fails."""
        return False, {"n": 2}

    def crashes(run):
        """Crashes."""
        run.save({"half": 3})
        raise RuntimeError("boom")

    def lacks(run):
        """Lacks something."""
        raise gpu_numbers.Skip("no such thing")

    def slow(run):
        """Too slow."""
        run.save({"half": 4})
        time.sleep(30)
    made = {f.__name__: Step(f, 1 if f is slow else 60) for f in (good, bad, crashes, lacks, slow)}
    monkeypatch.setattr(gpu_check, "STEPS", made)

    def call(names, commit="c1", budget=100.0):
        args = argparse.Namespace(out=tmp_path, budget=budget)
        code = gpu_check.run_steps(names, args, {"gpu": "Some GPU 1", "commit": commit, "command": "x"})
        return code, json.loads((tmp_path / "gpu_check_some_gpu_1.json").read_text())["steps"]
    return call


def test_every_outcome_is_told_apart(steps):
    code, found = steps(["good", "lacks", "bad", "crashes"])
    assert code == 1 and {name: step["status"] for name, step in found.items()} == {
        "good": "passed", "lacks": "skipped", "bad": "failed", "crashes": "failed"}
    assert found["lacks"]["reason"] == "no such thing" and found["good"]["n"] == 1
    assert found["crashes"]["half"] == 3 and "boom" in found["crashes"]["crashed"]
    assert steps(["good", "lacks"])[0] == 0


def test_a_late_step_is_stopped_and_keeps_what_it_saved(steps):
    started = time.monotonic()
    code, found = steps(["slow", "good"])
    assert time.monotonic() - started < 20 and code == 1 and found["good"]["status"] == "passed"
    assert found["slow"]["status"] == "failed" and found["slow"]["half"] == 4 and "not done after 1 s" in found["slow"]["crashed"]


def test_steps_that_do_not_fit_any_more_are_named(steps):
    code, found = steps(["good"], budget=5)
    assert code == 0 and found["good"] == {"command": "x", "status": "skipped", "seconds": 0,
                                           "reason": "out of time; run it with --steps good"}


def test_earlier_steps_stay_only_at_the_same_commit(steps):
    steps(["good"])
    assert set(steps(["bad"])[1]) == {"good", "bad"}
    assert set(steps(["bad"], commit="c2")[1]) == {"bad"}


def test_serve_without_its_site_is_skipped(tmp_path):
    for site, reason in ((None, "needs --vllm-site"), (tmp_path, f"no env.sh in {tmp_path}")):
        found = gpu_check.run_step(gpu_check.STEPS["serve"], argparse.Namespace(vllm_site=site), 60, print)
        assert found["status"] == "skipped" and found["reason"] == reason


# --- the number steps, on the CPU's kernels -----------------------------------------------------------------------------------

class Replay:
    """A CUDA graph without CUDA: replays into the same result."""

    def __init__(self, function, result):
        self.function, self.result = function, result

    def replay(self):
        self.result.copy_(self.function())


def capture(function):
    result = function()
    return Replay(function, result), result


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(gpu_numbers, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_numbers, "capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_numbers, "CHECKED", [(64, 128, (32, 128), (False, True), (1, 5))])
    monkeypatch.setattr(gpu_numbers, "OTHER_BITS", [(8, 32, 64, (64,), (False,), (1, 5))])
    return types.SimpleNamespace(save=lambda found: None)


def test_numbers_of_right_kernels(on_cpu):
    _, found = gpu_numbers.check_numbers(on_cpu)
    assert found["failures"] == 0 and "triton_w4a16" in found["not_supported"]
    # groups x orders x symmetric x dtypes at 4 bits, symmetric x dtypes at 8
    assert [sum(r["kernel"] == "reference" and r["bits"] == bits for r in found["rows"]) for bits in (4, 8)] == [16, 4]
    assert all(0 < r["of_bound"] <= 1 and r["relative"] < 5e-3 and not r["wrong_integers"] for r in found["rows"])


@pytest.mark.parametrize("damage", ["one element", "spreads nan", "unsteady"])
def test_numbers_of_wrong_kernels(on_cpu, monkeypatch, damage):
    reference = next(k for k in gpu_numbers.KERNELS if k.name == "reference")
    calls = iter(range(10 ** 6))

    def gemm(x, weights, p, bias):
        y = type(reference).gemm(reference, x, weights, p, bias)
        if damage == "one element":
            y[-1, 3] += 1
        elif damage == "spreads nan" and x.isnan().any():
            y[:] = float("nan")
        elif damage == "unsteady":
            y[0, 0] *= 1 + next(calls) % 2 * 2.0 ** -7
        return y
    broken = mock.Mock(supports=reference.supports, prepare=reference.prepare, gemm=gemm)
    broken.name = "broken"
    monkeypatch.setattr(gpu_numbers, "KERNELS", (broken,))
    monkeypatch.setattr(gpu_numbers.foem_kernels.registry, "KERNELS", (broken,))
    monkeypatch.setattr(gpu_numbers, "CHECKED", [(64, 128, (32,), (False,), (5,))])
    passed, found = gpu_numbers.check_numbers(on_cpu)
    assert not passed and found["failures"] == len(found["rows"]) > 0


def test_graphs_of_the_cpu_kernels(on_cpu):
    """On a CPU whose torch lacks the int4 operator no kernel is left to check, and that is not a pass."""
    passed, found = gpu_numbers.check_graphs(on_cpu)
    assert passed == bool(found["rows"]) and all(r["replay_equal"] and r["compiled_equal"] for r in found["rows"])


def test_solver_step_compares_two_loops(on_cpu, monkeypatch):
    loops = pytest.importorskip("foem_kernels.solver")
    monkeypatch.setattr(gpu_numbers, "SOLVED", 256)
    monkeypatch.setattr(gpu_numbers, "FUSED", "torch")
    monkeypatch.setenv("FOEM_SOLVER", "torch")
    monkeypatch.setattr(gpu_numbers.importlib.util, "find_spec", lambda name: name)
    passed, found = gpu_numbers.check_solver(on_cpu)
    assert passed and [r["equal_codes"] for r in found["rows"]] == [1, 1, 1] and os.environ["FOEM_SOLVER"] == "torch"

    def worse(*args, solve=foem_vllm.solver.solve):
        solved = solve(*args)
        codes = solved.quantized.codes if next(calls) % 8 < 4 else solved.quantized.codes ^ 1
        return solved._replace(quantized=solved.quantized._replace(codes=codes))
    calls = iter(range(100))
    monkeypatch.setattr(gpu_numbers, "FUSED", "cpu")
    monkeypatch.setattr(foem_vllm.solver, "solve", worse)
    monkeypatch.setattr(foem_vllm.solver, "pick", lambda *_: loops.quantize_block, raising=False)
    passed, found = gpu_numbers.check_solver(on_cpu)
    assert not passed and max(r["equal_codes"] for r in found["rows"]) < 0.1
    monkeypatch.setattr(gpu_numbers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(gpu_numbers.Skip):
        gpu_numbers.check_solver(on_cpu)


def test_experts_by_torch_follow_the_definition():
    torch.manual_seed(0)
    x, share = torch.randn(5, 8), torch.rand(5, 2)
    w = [[torch.randn(12, 8).double() for _ in range(4)], [torch.randn(8, 6).double() for _ in range(4)]]
    ids = torch.tensor([[0, 3], [3, 1], [1, 0], [0, 1], [3, 0]])
    wanted = torch.zeros(5, 8, dtype=torch.float64)
    for t in range(5):
        for j in range(2):
            both = w[0][ids[t, j]] @ x[t].double()
            gate, up = both[:6], both[6:]
            wanted[t] += share[t, j] * (w[1][ids[t, j]] @ (gate / (1 + torch.exp(-gate)) * up))
    torch.testing.assert_close(gpu_numbers.moe_by_torch(x, w, ids, share, torch.float64), wanted)


# --- serving ----------------------------------------------------------------------------------------------------------------

def test_random_checkpoint_is_one_that_we_and_transformers_read(tmp_path):
    from foem_eval.dequantized import load_dequantized

    from foem_vllm.checkpoint import describe
    gpu_serve.write_random_checkpoint(tmp_path / "q", True, "cpu", **SMALL)
    found = describe(tmp_path / "q")
    assert len(found["layers"]) == 2 * 7 and found["quantized_weights"] == 2 * 256 * (256 + 128 + 128 + 256 + 3 * 384)
    model = load_dequantized(tmp_path / "q")
    (lp,) = gpu_serve.logprobs(model, [[3, 1, 4, 1, 5, 9, 2, 6] * 8])
    # of 512 tokens, logits about 2 apart: neither flat nor certain, so that a wrong kernel shows
    assert lp.shape == (63,) and torch.isfinite(lp).all() and 1 < float(lp.std()) < 4
    gpu_serve.write_random_checkpoint(tmp_path / "plain", False, "cpu", **SMALL)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["Qwen3ForCausalLM"]
    assert [p.name for p in (tmp_path / "plain").glob("*.safetensors")] == []


def test_plugin_path_is_the_working_tree_with_its_entry_point(tmp_path):
    folder = gpu_serve.plugin_path(tmp_path / "path")
    program = ("import foem_vllm, foem_kernels, importlib.metadata as m, importlib.util; print([e.value for d in "
               "m.distributions(path=[__import__('sys').argv[1]]) for e in d.entry_points if e.group == 'vllm.general_plugins'], "
               "foem_vllm.__file__.startswith(__import__('sys').argv[1]))")
    done = subprocess.run([sys.executable, "-c", program, folder], cwd=tmp_path, env={**os.environ, "PYTHONPATH": folder},
                          capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['foem_vllm.plugin:register'] True", done.stderr
    assert gpu_serve.plugin_path(tmp_path / "path") == folder


def test_an_engine_that_hangs_is_stopped_and_one_that_dies_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_serve, "plugin_path", str)
    (tmp_path / "env.sh").write_text('echo "foem kernel some_kernel for 4-bit"; sleep 60')
    started = time.monotonic()
    found = gpu_serve.run_engine({}, tmp_path, tmp_path, "hangs", 1)
    assert time.monotonic() - started < 20 and found["error"].startswith("stopped after 1 s")
    assert found["kernels"] == ["some_kernel"]
    (tmp_path / "env.sh").write_text("echo nothing here; exit 3")
    assert gpu_serve.run_engine({}, tmp_path, tmp_path, "dies", 30)["error"] == "exit code 3: ...nothing here\n"


RIGHT = {"quantization": "foem", "graphs": "FULL_AND_PIECEWISE", "compilation": "VLLM_COMPILE", "kernels": ["triton_w4a16"],
         "logprobs": [[-1.0, -2.0]]}


@pytest.mark.parametrize("change, said", [
    ({}, None), ({"quantization": "gptq"}, "the plugin did not serve it"), ({"graphs": "NONE"}, "no graphs"),
    ({"compilation": "NONE"}, "no compilation"), ({"kernels": ["reference"]}, "kernels: "), ({"kernels": []}, "kernels: "),
    ({"error": "exit code 1"}, "exit code 1"), ({"logprobs": [[-1.0, -2.4]]}, "more than the tolerance"),
    ({"logprobs": [[-1.0, float("nan")]]}, "more than the tolerance")])
def test_what_was_served_is_judged(change, said):
    found = gpu_serve.judge_tinylm({**RIGHT, **change}, [torch.tensor([-1.1, -2.1])], 0.2)
    assert found["passed"] == (said is None) and "logprobs" not in found
    assert said is None or any(said in problem for problem in found["problems"])


def test_engines_are_compared_where_both_have_a_number():
    foem = {"decode_tokens_per_second": {"1": 300.0, "16": 800.0}, "prefill_tokens_per_second": 90.0, "logprobs": [[-1.0, -2.0]]}
    gptq = {"decode_tokens_per_second": {"1": 200.0}, "prefill_tokens_per_second": 100.0, "logprobs": [[-1.5, -2.0]]}
    assert gpu_serve.compare({"foem": foem, "gptq": gptq}) == {
        "decode, batch 1, over gptq": 1.5, "prefill over gptq": 0.9, "logprob difference to gptq": {"mean": 0.25, "max": 0.5}}
    assert gpu_serve.compare({"foem": foem}) == {} and gpu_serve.compare({}) == {}
