"""Bad models, bad options, full disks, interrupted runs: one line that says what to do, and nothing half-written."""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import CALIBRATION, TINYLM, write_model

from foem_vllm import QuantizeConfig, quantize
from foem_vllm.errors import FoemError

SMALL = dict(method="foem", calibration=str(CALIBRATION), samples=8, seq_len=64, group_size=32, device="cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


def cli(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "foem_vllm.cli", "quantize", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


def copy_of(model, folder, **tensors):
    shutil.copytree(model, folder)
    if tensors:
        weights = load_file(folder / "model.safetensors")
        for name, change in tensors.items():
            weights[name.replace("__", ".")] = change(weights[name.replace("__", ".")])
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def spoil(t):
    t = t.clone()
    t[0, 0] = float("nan")
    return t


BAD_MODELS = {
    "missing": (lambda m, t: t / "absent", "no such folder"),
    "empty": (lambda m, t: (t / "empty").mkdir() or t / "empty", "no config.json"),
    "no weights": (lambda m, t: [copy_of(m, t / "m"), (t / "m/model.safetensors").unlink()] and t / "m", "no .safetensors"),
    "not causal": (
        lambda m, t: edit_config(copy_of(m, t / "m"), architectures=["T5ForConditionalGeneration"], model_type="t5"),
        "not a causal language model",
    ),
    "quantized": (
        lambda m, t: edit_config(copy_of(m, t / "m"), quantization_config={"quant_method": "awq"}),
        "already quantized (awq)",
    ),
    "broken json": (lambda m, t: (copy_of(m, t / "m") / "config.json").write_text("{") and t / "m", "not valid JSON"),
    "truncated": (
        lambda m, t: os.truncate(copy_of(m, t / "m") / "model.safetensors", 100_000) or t / "m",
        "was cut off or damaged",
    ),
    "other shapes": (lambda m, t: edit_config(copy_of(m, t / "m"), intermediate_size=256), "mlp.gate_proj.weight is [128, 64]"),
    "nan weights": (
        lambda m, t: copy_of(m, t / "m", model__layers__1__mlp__up_proj__weight=spoil),
        "model.layers.1.mlp.up_proj.weight: NaN or Inf in the weights",
    ),
    "overflow": (
        lambda m, t: copy_of(m, t / "m", model__layers__0__input_layernorm__weight=lambda w: w * 1e38),
        "model.layers.0.self_attn.q_proj",
    ),
    "no tokenizer": (
        lambda m, t: (
            [copy_of(m, t / "m"), (t / "m/tokenizer.json").unlink(), (t / "m/tokenizer_config.json").unlink()] and t / "m"
        ),
        "no tokenizer",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(case, llama, tmp_path):
    make, message = BAD_MODELS[case]
    model = make(llama, tmp_path)
    with pytest.raises(FoemError) as caught:
        quantize(model, tmp_path / "out", QuantizeConfig(**SMALL))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    for left in tmp_path.glob(".out*"):  # found in a later block: what is finished can be resumed
        assert (left / "journal.jsonl").read_text().count("\n") > 1


def text_file(folder: pathlib.Path, name: str, content: str) -> str:
    (folder / name).write_text(content)
    return str(folder / name)


BAD_OPTIONS = {
    "group": (lambda t: dict(group_size=48), "model.layers.0.self_attn.q_proj has 64 input columns"),
    "method": (lambda t: dict(method="gptqq"), "--method gptqq is unknown"),
    "beta of gptq": (lambda t: dict(method="gptq", beta=0.1), "--beta 0.1 has no meaning for --method gptq"),
    "alpha of foem": (lambda t: dict(method="foem", alpha=0.1), "--alpha 0.1 has no meaning"),
    "bits": (lambda t: dict(bits=5), "bits=5"),
    "grid": (lambda t: dict(grid="mse"), "--grid mse is unknown"),
    "order of rtn": (lambda t: dict(method="rtn", act_order="full"), "--act-order"),
    "v1 asymmetric": (lambda t: dict(symmetric=False, checkpoint_format="gptq"), "gptq_v2"),
    "missing text": (lambda t: dict(calibration=str(t / "absent.jsonl")), "absent.jsonl: no such file"),
    "empty text": (lambda t: dict(calibration=text_file(t, "e.jsonl", "")), "e.jsonl: the file is empty"),
    "no field": (
        lambda t: dict(calibration=text_file(t, "f.jsonl", '{"text": "a"}\n{"body": "b"}\n')),
        "line 2 is not a JSON object",
    ),
    "little text": (
        lambda t: dict(calibration=text_file(t, "s.txt", "a few words")),
        "tokens, but --samples 8 x --seq-len 64 need 512",
    ),
    "unknown file": (lambda t: dict(calibration=text_file(t, "s.docx", "a few words").replace(str(t), str(t))), "s.docx"),
    "too long": (lambda t: dict(seq_len=1024), "context of 128"),
    "device": (lambda t: dict(device="cuda:7"), "--device cuda:7"),
    "everything excluded": (lambda t: dict(exclude=["."]), "no linear is left"),
    "regex": (lambda t: dict(exclude=["("]), "not a regular expression"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case, llama, tmp_path):
    make, message = BAD_OPTIONS[case]
    with pytest.raises(FoemError) as caught:
        quantize(llama, tmp_path / "out", QuantizeConfig(**{**SMALL, **make(tmp_path)}))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_output_folder_that_is_not_empty(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("kept")
    done = cli(llama, tmp_path / "out", "--method", "rtn", "--group-size", 32)
    assert done.returncode == 1 and "exists and is not empty" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "out/precious").read_text() == "kept"


def test_disk_full_while_saving(llama, tmp_path):
    """A file-size limit makes the kernel refuse the shard the way a full disk does (EFBIG instead of ENOSPC)."""
    done = cli(
        llama,
        tmp_path / "out",
        "--method",
        "rtn",
        "--group-size",
        32,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},  # Python cuts compiled modules off at the limit, and then reads them
    )
    assert done.returncode == 1, done.stderr
    assert "disk is full" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_killed_before_its_first_block_leaves_nothing(tmp_path):
    """SIGTERM once the hidden folder is there: it goes away, and the target never appears."""
    command = [sys.executable, "-m", "foem_vllm.cli", "quantize", str(TINYLM), str(tmp_path / "out"), "-q"]
    process = subprocess.Popen([*command, "--calibration", str(CALIBRATION), "--samples", "128", "--seq-len", "256"])
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 143 and not list(tmp_path.iterdir())


def test_disk_too_small_is_noticed_before(llama, tmp_path):
    from foem_vllm.writer import check_space

    with pytest.raises(FoemError, match="free, but the checkpoint needs about"):
        check_space(tmp_path / "out", 1 << 60)
