"""What --dry-run says is what then happens."""

import json
import subprocess
import sys

import pytest
from tiny_models import CALIBRATION, TINYLM, write_model

from foem_vllm import QuantizeConfig, preflight, quantize
from foem_vllm.checkpoint import storage
from foem_vllm.errors import FoemError

SMALL = dict(calibration=str(CALIBRATION), samples=8, seq_len=64, group_size=32, device="cpu")


@pytest.mark.parametrize(
    "arch, changes",
    [
        ("llama", {}),
        ("llama", dict(preset="best", lm_head=True)),
        ("qwen3_moe", dict(exclude=["self_attn"])),
        ("opt", dict(method="rtn")),
    ],
)
def test_layers_and_size_are_those_of_the_run(arch, changes, tmp_path):
    source, config = write_model(tmp_path / "model", arch), QuantizeConfig(**{**SMALL, **changes})
    found = preflight.examine(source, tmp_path / "out", config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"], "nothing is written"
    report = quantize(source, tmp_path / "out", config)
    assert sum(row["linears"] for row in found["linears"]) == len(report.layers)
    shapes = {(row["n"], row["k"]) for row in found["linears"]}
    assert shapes == {(layer.n, layer.k) for layer in report.layers}
    assert {name for names in found["skipped"].values() for name in names} == set(report.skipped)
    assert found["needs"]["disk"] == storage(tmp_path / "out")["bytes"]
    stages = found["needs"]["seconds"]
    assert all(value >= 0 for value in stages.values())
    assert ("gradients" in stages, "forward" in stages) == (changes.get("preset") == "best", changes.get("method") != "rtn")


def test_bits_that_are_yet_to_be_chosen(tmp_path, capsys):
    source = write_model(tmp_path / "model", "llama")
    config = QuantizeConfig(**SMALL, preset="fast", bits_per_weight=4.9, lm_head=True)
    found = preflight.examine(source, tmp_path / "out", config)
    quantize(source, tmp_path / "out", config)
    written = storage(tmp_path / "out")["bytes"]
    assert 0.95 * found["needs"]["disk"] < written <= found["needs"]["disk"]
    assert {row["kind"]: row["bits"] for row in found["linears"]}.items() >= {"lm_head": 4, "mlp.down_proj": None}.items()
    preflight.print_plan(found)
    assert "chosen" in capsys.readouterr().out


def test_memory_is_foretold(tmp_path):
    """In processes of their own, because a peak is that of a process."""
    options = ["--calibration", str(CALIBRATION), "--samples", "64", "--seq-len", "256", "--device", "cpu"]
    run = [sys.executable, "-m", "foem_vllm", "quantize", str(TINYLM), str(tmp_path / "out"), *options]
    code = (
        "import sys, json; from foem_vllm import QuantizeConfig, preflight; print(json.dumps(preflight.examine(*sys.argv[1:3], "
    )
    code += "QuantizeConfig(calibration=sys.argv[3], samples=64, seq_len=256, device='cpu'))['needs']))"
    told = subprocess.run([sys.executable, "-c", code, str(TINYLM), str(tmp_path / "out"), str(CALIBRATION)], capture_output=True)
    needs = json.loads(told.stdout)
    subprocess.run([*run, "--quiet"], check=True)
    peak = json.loads((tmp_path / "out/foem_report.json").read_text())["memory"]["host"]
    assert 0.9 * peak < needs["host"] < 2 * peak
    shown = subprocess.run(
        [*run[: -len(options) - 1], str(tmp_path / "new"), *options, "--dry-run"], capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "mlp.down_proj" in shown.stdout and "time: about" in shown.stdout and not (tmp_path / "new").exists()


def test_what_has_no_room_is_foretold(tmp_path):
    source = write_model(tmp_path / "model", "llama")
    needs = preflight.examine(source, tmp_path / "out", QuantizeConfig(**SMALL, activation_memory=0.0))["needs"]
    assert needs["spilled"] == needs["activations"] > 0


def test_bad_input_is_refused_as_by_the_run(tmp_path):
    source = write_model(tmp_path / "model", "llama")
    with pytest.raises(FoemError, match="longer than this model's context"):
        preflight.examine(source, tmp_path / "out", QuantizeConfig(**{**SMALL, "seq_len": 1 << 20}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    with pytest.raises(FoemError, match="exists and is not empty"):
        preflight.examine(source, tmp_path / "out", QuantizeConfig(**SMALL))
