"""Several processes make what one makes, up to the rounding of sums that are added in another order."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_models import CALIBRATION, write_model

from foem_vllm import QuantizeConfig, quantize
from foem_vllm.checkpoint import quantized_modules, read_linear
from foem_vllm.format import dequantize, read_config
from foem_vllm.stream import Weights

SETTINGS = dict(samples=24, seq_len=64, group_size=32)
OPTIONS = [word for key, value in SETTINGS.items() for word in (f"--{key.replace('_', '-')}", str(value))]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "foem_vllm"]


def command(source, out, *options):
    return [
        *TORCHRUN,
        "quantize",
        str(source),
        str(out),
        "--calibration",
        str(CALIBRATION),
        "--device",
        "cpu",
        *OPTIONS,
        *options,
    ]


def weights(folder):
    config, stored = read_config(folder), Weights(folder)
    return {m: dequantize(*read_linear(stored, m, config)) for m in quantized_modules(stored.files)}


@pytest.mark.parametrize("arch, preset, options", [("llama", "best", ["--lm-head"]), ("qwen3_moe", "balanced", [])])
def test_two_processes_make_what_one_makes(arch, preset, options, tmp_path):
    source = write_model(tmp_path / "model", arch)
    done = subprocess.run(
        command(source, tmp_path / "two", "--preset", preset, *options), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: vllm serve") == 1, "only one process speaks"
    config = QuantizeConfig(**SETTINGS, preset=preset, calibration=str(CALIBRATION), device="cpu", lm_head=bool(options))
    one = quantize(source, tmp_path / "one", config)
    two = json.loads((tmp_path / "two/foem_report.json").read_text())
    assert [layer["name"] for layer in two["layers"]] == [layer.name for layer in one.layers]
    for a, b in zip(one.layers, two["layers"]):
        assert a.tokens == b["tokens"] and a.damping == b["damping"] and a.descent == b["descent"], a.name
        assert b["loss"] == pytest.approx(a.loss, rel=0.05), a.name
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    original = Weights(source)
    same = torch.cat([(first[m] == second[m]).flatten() for m in first]).float().mean()
    assert same > 0.9, f"{same:.3f} of the weights"
    for name in first:
        weight = original.read(f"{name}.weight") if f"{name}.weight" in original.files else None
        if weight is not None:  # what differs are ties: neither is nearer to the original
            errors = [float((w - weight).norm() / weight.norm()) for w in (first[name], second[name])]
            assert errors[1] == pytest.approx(errors[0], rel=0.05), name


def test_when_one_process_dies_the_others_end_and_the_run_goes_on(tmp_path):
    source = write_model(tmp_path / "model", "llama")
    options = ["--samples", "64", "--seq-len", "128", "--quiet"]
    process = subprocess.Popen(command(source, tmp_path / "out", *options), stderr=subprocess.PIPE, text=True)
    journal = tmp_path / ".out.partial/journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") > 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    second = next(pid for pid in children(process.pid) if environment(pid).get("RANK") == "1")
    os.kill(second, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and "--resume" in said, said
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command(source, tmp_path / "out", *options, "--resume"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    subprocess.run(command(source, tmp_path / "whole", *options), check=True, timeout=120)
    whole, resumed = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out"))
    assert whole == resumed


def children(pid: int) -> list[int]:
    text = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in text.split()]


def environment(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return dict(item.split("=", 1) for item in file.read().decode(errors="replace").split("\0") if "=" in item)


def test_too_many_processes_for_the_text(tmp_path):
    source = write_model(tmp_path / "model", "llama")
    done = subprocess.run(
        command(source, tmp_path / "out", "--samples", "1", "--preset", "fast"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and "2 processes share 1 batches of calibration text" in done.stderr
