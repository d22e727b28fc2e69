"""lm-eval's task and command line, dequantized checkpoints, divergence, child processes."""
from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from foem_eval import processes
from foem_eval.dequantized import is_quantized, load_dequantized, write_dequantized
from foem_eval.divergence import measure, paired_difference, read_sequences
from foem_eval.evaluate import command, evaluate, print_table
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from foem_vllm.checkpoint import storage
from foem_vllm.errors import FoemError
from foem_vllm.format import QuantSpec, dequantize, pack, read_config, unpack
from foem_vllm.grid import round_to_nearest
from foem_vllm.pipeline import quantize
from foem_vllm.recipe import QuantizeConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
EVALUATION = ROOT / "eval/tinylm/data/evaluation.jsonl"
CONTEXT = 512


@pytest.fixture(scope="module")
def rounded(tinylm, tmp_path_factory) -> pathlib.Path:
    """tinylm at W4 g128, round to nearest."""
    out = tmp_path_factory.mktemp("eval") / "rtn"
    text = str(ROOT / "eval/tinylm/data/calibration.jsonl")
    quantize(tinylm, out, QuantizeConfig(method="rtn", calibration=text, samples=2, seq_len=64))
    return out


def rolling_log_likelihood(model, ids: list[int], prefix: int) -> float:
    """Sum of log-probabilities of `ids`, the way lm-eval rolls: windows of CONTEXT predicted tokens, no overlap but for the last,
    whose context is as full as it can be; each window is preceded by one token, the first by `prefix`."""
    total, done = 0.0, 0
    while done < len(ids):
        count = min(CONTEXT, len(ids) - done)
        end = done + count
        begin = max(0, end - CONTEXT) if done else 0
        inputs = ([prefix] + ids)[begin:end]  # position i of this list predicts ids[begin + i]
        logits = model(torch.tensor([inputs])).logits[0].float().log_softmax(-1)
        total += float(logits[range(done - begin, end - begin), ids[done:end]].sum())
        done = end
    return total


def test_the_task_gives_the_perplexity_of_the_shipped_text(tinylm):
    limit = 2
    row, = evaluate([tinylm], "tinylm", max_model_len=CONTEXT, backend="hf", limit=limit,
                    storage=lambda m: storage(pathlib.Path(m)))
    texts = [json.loads(line)["text"] for line in EVALUATION.open(encoding="utf-8")][:limit]
    tokenizer = AutoTokenizer.from_pretrained(tinylm)
    model = AutoModelForCausalLM.from_pretrained(tinylm, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        likelihood = sum(rolling_log_likelihood(model, tokenizer(t)["input_ids"], tokenizer.eos_token_id) for t in texts)
    per_byte = -likelihood / sum(len(t.encode()) for t in texts)
    assert row["tinylm/bits_per_byte"] == pytest.approx(per_byte / torch.tensor(2.0).log().item(), rel=2e-3)
    assert row["tinylm/byte_perplexity"] == pytest.approx(float(torch.tensor(per_byte).exp()), rel=2e-3)
    assert row["bits_per_weight"] == 16
    assert row["bytes"] == sum(t.nbytes for t in load_file(tinylm / "model.safetensors").values())


def test_the_task_is_found_from_any_folder_without_network(tmp_path):
    code = ("import sys; from lm_eval.tasks import TaskManager\n"
            "task = TaskManager(include_path=sys.argv[1]).load_task_or_group(['tinylm'])['tinylm']\n"
            "docs = list(task.test_docs()); print(len(docs), task.doc_to_target(docs[0]) == docs[0]['text'])")
    done = subprocess.run([sys.executable, "-c", code, ROOT / "eval/foem_eval/tasks"], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == [str(len(EVALUATION.read_text("utf-8").splitlines())), "True"]


def test_lm_eval_lines_are_those_of_the_readme():
    line = command("OUT", "tinylm", "o", None, 512, "vllm", "foem", None)
    assert line[1:5] == ["--model", "vllm", "--model_args",
                         "pretrained=OUT,dtype=bfloat16,max_model_len=512,enforce_eager=True,quantization=foem"]
    assert "quantization" not in " ".join(command("OUT", "tinylm", "o", None, 512, "vllm", None, 3))
    for backend in ("vllm", "hf"):
        assert "dtype=float32" in command("OUT", "tinylm", "o", None, 512, backend, None, None, "float32")[4].split(",")
    with pytest.raises(FoemError, match="choose vllm or hf"):
        command("OUT", "tinylm", "o", None, 512, "tgi", None, None)


def test_a_failing_run_shows_the_end_of_its_log(tmp_path):
    with pytest.raises(FoemError, match="(?s)lm-eval ended with exit code.*last lines"):
        evaluate([tmp_path / "no-such-model"], "tinylm", backend="hf", limit=1)


def test_dequantized_weights_are_those_of_the_format(tinylm, rounded):
    assert is_quantized(rounded) and not is_quantized(tinylm)
    model, stored, config = load_dequantized(rounded), load_file(rounded / "model.safetensors"), read_config(rounded)
    name = "model.layers.3.mlp.down_proj"
    tensors = {key: stored[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
    expected = dequantize(unpack(tensors, config.spec), config.spec)
    found = model.get_submodule(name).weight.detach()
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    original = load_dequantized(tinylm)
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    before = original.get_submodule(name).weight.detach()
    assert 0 < float((found - before).norm() / before.norm()) < 0.15


def test_a_sharded_checkpoint_with_parts_of_a_linear_in_two_shards(rounded, tmp_path):
    """Single and sharded folders give the same model, wherever the four tensors of a linear lie."""
    tensors = load_file(rounded / "model.safetensors")
    parts = {f"model-0000{i + 1}-of-00002.safetensors": {n: t for j, (n, t) in enumerate(sorted(tensors.items())) if j % 2 == i}
             for i in range(2)}
    for name, part in parts.items():
        save_file(part, tmp_path / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: name for name, part in parts.items() for n in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((rounded / "config.json").read_text())
    one, two = load_dequantized(rounded).state_dict(), load_dequantized(tmp_path).state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_an_asymmetric_8_bit_module_is_dequantized_too(untrained, tmp_path):
    tensors = load_file(untrained / "model.safetensors")
    spec, name = QuantSpec(8, 64, symmetric=False), "model.layers.0.mlp.up_proj"
    q = round_to_nearest(tensors.pop(f"{name}.weight").float(), spec)
    save_file({**tensors, **{f"{name}.{k}": t for k, t in pack(q, spec, "gptq_v2").items()}}, tmp_path / "model.safetensors")
    config = json.loads((untrained / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": False,
                                     "checkpoint_format": "gptq_v2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_dequantized(tmp_path, tmp_path / "plain", torch.float32)
    assert torch.equal(load_file(tmp_path / "plain/model.safetensors")[f"{name}.weight"], dequantize(q, spec))
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_divergence_of_a_model_from_itself_is_zero_and_of_a_rounded_one_is_not(tinylm, rounded):
    sequences = read_sequences(AutoTokenizer.from_pretrained(tinylm), EVALUATION, 128, limit=6)
    original, quantized = load_dequantized(tinylm), load_dequantized(rounded)
    found = measure(original, {"same": original, "rounded": quantized}, sequences)
    assert float(found["same"].kl.abs().max()) == 0 and float(found["same"].agreement.min()) == 1
    assert torch.equal(found["same"].loss, found["original"].loss)
    assert (found["rounded"].kl > 0).all()

    # Independently, for one sequence: torch's own KL, and the loss that transformers returns.
    with torch.inference_mode():
        ids = sequences[2:3]
        p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (original, quantized))
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
        loss = quantized(ids, labels=ids).loss
    assert float(found["rounded"].kl[2]) == pytest.approx(float(kl), rel=1e-3)
    assert float(found["rounded"].loss[2]) == pytest.approx(float(loss), rel=1e-5)
    mean, error = paired_difference(found["rounded"].kl, found["same"].kl)
    assert mean == pytest.approx(found["rounded"].summary()["kl"]) and error == pytest.approx(found["rounded"].summary()["kl_se"])


def test_sequences_are_seeded_windows_of_the_text(tinylm, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tinylm)
    every = read_sequences(tokenizer, EVALUATION, 64)
    first, again, other = (read_sequences(tokenizer, EVALUATION, 64, limit=5, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (5, 64)
    assert all((every == row).all(1).any() for row in first)
    (tmp_path / "short.jsonl").write_text('{"text": "too short"}\n')
    with pytest.raises(ValueError, match="give a longer text"):
        read_sequences(tokenizer, tmp_path / "short.jsonl", 64)


def test_a_process_group_is_gone_afterwards_even_a_grandchild_that_ignores_sigterm(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 1)
    grandchild = ("import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                  "print(os.getpid(), flush=True); time.sleep(60)")
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    log = tmp_path / "log"
    pids = []
    with pytest.raises(KeyboardInterrupt), processes.group([sys.executable, "-c", parent], log):
        deadline = time.monotonic() + 30
        while not pids:
            assert time.monotonic() < deadline, "the grandchild never said its number"
            time.sleep(0.05)
            pids = [int(line) for line in log.read_text().splitlines() if line.isdigit()]
        assert running(pids[0]), "it sleeps for a minute: nothing but the group's end can have ended it"
        raise KeyboardInterrupt
    pid, = pids
    time.sleep(0.2)
    assert not running(pid)


def running(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_that_stops_shows_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "tool", lambda name: "/bin/false")
    with pytest.raises(FoemError, match="vllm serve stopped with exit code 1"), processes.vllm_server("m", tmp_path / "log"):
        pass


def test_the_table_has_a_column_for_every_metric(capsys):
    print_table([{"model": "a", "tinylm/word_perplexity": 12.5, "bytes": 10**6, "seconds": 3.0},
                 {"model": "b", "label": "B", "tinylm/word_perplexity": 13.5, "kl": 0.0123, "seconds": 4.0}])
    printed = capsys.readouterr().out
    for text in ("12.5000", "13.5000", "1,000,000", "0.01230", "B"):
        assert text in printed


def test_interrupt_signal_is_not_needed_for_stopping(tmp_path):
    """A child that ended by itself leaves nothing to stop; stopping it again is harmless."""
    with processes.group([sys.executable, "-c", "pass"], tmp_path / "log") as process:
        assert process.wait(60) == 0
    processes.stop_group(process)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
