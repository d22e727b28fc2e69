"""Interrupted runs: what is killed at any moment goes on with --resume and ends with the bytes of a run that was not."""

import json
import pathlib
import random
import shutil
import subprocess
import sys
import time

import pytest
from tiny_models import CALIBRATION, write_model

from foem_vllm import QuantizeConfig, pipeline, quantize
from foem_vllm.errors import FoemError
from foem_vllm.writer import Writer

SMALL = dict(calibration=str(CALIBRATION), samples=8, seq_len=64, group_size=32, device="cpu")


def weights_and_config(folder: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors" or p.name.endswith("config.json")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {arch: write_model(root / arch, arch) for arch in ("llama", "qwen3_moe", "opt")}


class Stop(Exception):
    """As if the power had failed."""


def interrupted(monkeypatch, after: int, *run) -> None:
    """Run until `after` blocks are solved, then drop everything without any tidying up."""
    count = 0
    solve = pipeline.solve_block

    def solve_block(*args):
        nonlocal count
        if count == after:
            raise Stop
        count += 1
        return solve(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "solve_block", solve_block)
        with pytest.raises(Stop):
            quantize(*run)


@pytest.mark.parametrize(
    "arch, changes",
    [
        ("llama", {}),
        ("llama", dict(preset="best")),
        ("llama", dict(method="foem+gptaq")),
        ("llama", dict(method="rtn", bits=3, symmetric=False)),
        ("opt", dict(preset="fast", act_order="full")),
        ("qwen3_moe", {}),
    ],
)
def test_resumed_runs_end_with_the_same_bytes(models, arch, changes, tmp_path, monkeypatch):
    config = QuantizeConfig(**SMALL, **changes)
    whole = quantize(models[arch], tmp_path / "whole", config)
    interrupted(monkeypatch, 1, models[arch], tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    report = quantize(models[arch], tmp_path / "out", config, resume=True)
    assert weights_and_config(tmp_path / "out") == weights_and_config(tmp_path / "whole")
    assert report.layers == whole.layers and report.tuning == whole.tuning
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
    again = quantize(models[arch], tmp_path / "out", config, resume=True)  # finished: nothing is done
    assert again.layers == whole.layers and again.seconds == report.seconds


@pytest.mark.parametrize("tuned", [3, None])
def test_runs_interrupted_behind_the_tuning_of_scales(models, tuned, tmp_path, monkeypatch):
    """While tuned scales take the place of those that the journal knows, or when all have; then while those are put back."""
    config, run = QuantizeConfig(**SMALL, preset="best"), (models["llama"], tmp_path / "out")
    whole = quantize(models["llama"], tmp_path / "whole", config)
    assert whole.tuning["held_out_kl_after"] < whole.tuning["held_out_kl_before"], "scales that were not changed show nothing"
    written = 0

    def stop(*args):
        raise Stop

    def write(self, name, *args):
        nonlocal written
        written += self.untuned.is_file()
        if written > tuned:
            raise Stop
        return add(self, name, *args)

    add = Writer.add
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "add" if tuned else "finish", write if tuned else stop)
        with pytest.raises(Stop):
            quantize(*run, config)
        written = 0
        with pytest.raises(Stop):
            quantize(*run, config, resume=True)
    assert (tmp_path / ".out.partial/journal.jsonl").is_file()
    assert quantize(*run, config, resume=True).tuning == whole.tuning
    assert weights_and_config(tmp_path / "out") == weights_and_config(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_what_cannot_be_resumed_is_refused_and_kept(models, tmp_path, monkeypatch):
    config = QuantizeConfig(**SMALL)
    interrupted(monkeypatch, 1, models["llama"], tmp_path / "out", config)
    with pytest.raises(FoemError, match=r"an interrupted run is there \(finished steps: 1\); --resume"):
        quantize(models["llama"], tmp_path / "out", config)
    with pytest.raises(
        FoemError, match="other settings: bits was 4 and is 3; calibration_sha256 was .*; seed was 0 and is 1; resume"
    ):
        quantize(models["llama"], tmp_path / "out", QuantizeConfig(**SMALL, bits=3, seed=1, exclude=[]), resume=True)
    other = tmp_path / "other"
    shutil.copytree(models["llama"], other)
    (other / "model.safetensors").touch()
    with pytest.raises(FoemError, match="other settings: model was"):
        quantize(other, tmp_path / "out", config, resume=True)
    shard = tmp_path / ".out.partial/checkpoint/model.safetensors"
    content = bytearray(shard.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8:header])["model.layers.0.mlp.down_proj.scales"]["data_offsets"]
    content[header + start : header + end] = bytes(end - start)
    shard.write_bytes(content)
    with pytest.raises(FoemError, match="model.layers.0.mlp.down_proj: damaged in"):
        quantize(models["llama"], tmp_path / "out", config, resume=True)
    assert (tmp_path / ".out.partial/journal.jsonl").is_file() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "before, now, says",
    [
        (dict(method="gptq", refit=True), dict(method="gptq"), "refit was True and is None"),
        (dict(method="rtn", lm_head=True), dict(method="rtn"), "lm_head was True and is None"),
        (dict(method="rtn"), dict(method="rtn", checkpoint_format="gptq_v2"), "format was 'gptq' and is 'gptq_v2'"),
        (dict(method="rtn"), dict(method="rtn", model="opt"), "model was 'llama' and is 'opt'"),
    ],
)
def test_what_is_finished_with_other_settings_is_refused(models, before, now, says, tmp_path):
    quantize(models["llama"], tmp_path / "out", QuantizeConfig(**SMALL, **before))
    model = models[now.pop("model", "llama")]
    with pytest.raises(FoemError, match=f"finished, but with other settings: {says}; choose another output folder"):
        quantize(model, tmp_path / "out", QuantizeConfig(**SMALL, **now), resume=True)


def test_a_run_in_another_format_is_not_resumed(models, tmp_path, monkeypatch):
    interrupted(
        monkeypatch, 1, models["llama"], tmp_path / "out", QuantizeConfig(**SMALL, method="rtn", checkpoint_format="gptq_v2")
    )
    with pytest.raises(FoemError, match="other settings: format was 'gptq_v2' and is 'gptq'; resume with"):
        quantize(models["llama"], tmp_path / "out", QuantizeConfig(**SMALL, method="rtn"), resume=True)


def test_resume_with_nothing_to_resume_starts(models, tmp_path):
    quantize(models["llama"], tmp_path / "out", QuantizeConfig(**SMALL, method="rtn"), resume=True)
    assert (tmp_path / "out/model.safetensors").is_file()


def test_two_processes_do_not_write_one_checkpoint(models, tmp_path, monkeypatch):
    config = QuantizeConfig(**SMALL)
    solve = pipeline.solve_block

    def solve_block(*args):
        if not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            with pytest.raises(FoemError, match="another process is writing it"):
                quantize(models["llama"], tmp_path / "out", config, resume=True)
        return solve(*args)

    monkeypatch.setattr(pipeline, "solve_block", solve_block)
    quantize(models["llama"], tmp_path / "out", config)
    assert (tmp_path / "out/model.safetensors").is_file()


def test_killed_at_random_moments(models, tmp_path):
    """kill -9, again and again, until a run gets through."""
    command = [sys.executable, "-m", "foem_vllm.cli", "quantize", str(models["llama"]), str(tmp_path / "out"), "-q", "--resume"]
    command += ["--calibration", str(CALIBRATION), "--samples", "32", "--seq-len", "128", "--group-size", "32", "--device", "cpu"]
    rng, journal = random.Random(0), tmp_path / ".out.partial/journal.jsonl"
    for _ in range(3):
        process = subprocess.Popen(command)
        while not journal.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random())
        process.kill()
        process.wait()
    assert subprocess.run(command).returncode == 0
    whole = QuantizeConfig(**{**SMALL, "samples": 32, "seq_len": 128})
    quantize(models["llama"], tmp_path / "whole", whole)
    assert weights_and_config(tmp_path / "out") == weights_and_config(tmp_path / "whole")
