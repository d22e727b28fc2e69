"""--redo: some linears of a finished checkpoint once more."""

import pytest
import torch
from safetensors.torch import load_file
from test_resume import SMALL, interrupted, weights_and_config
from tiny_models import write_model

from foem_vllm import QuantizeConfig, quantize
from foem_vllm.checkpoint import read_linear
from foem_vllm.errors import FoemError
from foem_vllm.format import read_config
from foem_vllm.report import Report
from foem_vllm.stream import Weights

DOWN_AND_O = "down_proj|layers.0.*o_proj"
DOWN = r"layers\.1\.mlp\.down_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


def codes(folder):
    return {name: t for name, t in load_file(folder / "model.safetensors").items() if name.endswith("qweight")}


def test_the_same_again_gives_the_same_bytes(llama, tmp_path):
    """down_proj is the last linear of the last block: what feeds it is what fed it the first time."""
    report = quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL))
    before = (tmp_path / "out/model.safetensors").read_bytes()
    again = quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL), redo=DOWN)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert {layer.name: layer for layer in again.layers} == {layer.name: layer for layer in report.layers}
    assert again.recipe == {**report.recipe, "redone": [{"pattern": DOWN}]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_other_settings_for_some(llama, tmp_path):
    quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL, preset="fast", lm_head=True, exclude=["o_proj"]))
    before = codes(tmp_path / "out")
    report = quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL, method="gptq", lm_head=True, bits=8), redo=DOWN_AND_O)
    after, config = codes(tmp_path / "out"), read_config(tmp_path / "out")
    changed = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
    expected = {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)} | {"model.layers.0.self_attn.o_proj"}
    assert changed == {f"{name}.qweight" for name in expected}
    assert {name for name in expected if config.spec_for(name).bits == 8} == expected
    assert config.spec_for("model.layers.0.mlp.up_proj").bits == 4 and config.lm_head
    assert config.spec_for("model.layers.1.self_attn.o_proj") is None
    assert config.meta["foem"]["redone"][0]["bits"] == 8 and report.skipped["model.layers.1.self_attn.o_proj"]
    weights = load_file(llama / "model.safetensors")
    stored = Weights(tmp_path / "out")
    for name in expected:
        q, spec = read_linear(stored, name, config)
        dense = (q.codes.float() - 128) * q.scales.float().repeat_interleave(32, 1)
        assert spec.bits == 8 and (dense - weights[f"{name}.weight"]).norm() < 0.02 * weights[f"{name}.weight"].norm()


def test_an_interrupted_redo_goes_on(llama, tmp_path, monkeypatch):
    first, second = QuantizeConfig(**SMALL, preset="fast"), QuantizeConfig(**SMALL, seed=1)
    for name in ("out", "whole"):
        quantize(llama, tmp_path / name, first)
    quantize(llama, tmp_path / "whole", second, redo="mlp")
    before = weights_and_config(tmp_path / "out")
    interrupted(monkeypatch, 1, llama, tmp_path / "out", second, False, False, "mlp")
    assert weights_and_config(tmp_path / "out") == before, "the old checkpoint stands until the new one is whole"
    quantize(llama, tmp_path / "out", second, resume=True, redo="mlp")
    assert weights_and_config(tmp_path / "out") == weights_and_config(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes, pattern, message",
    [
        ({}, "nothing", "finds none of the linears, which are called model.layers.0"),
        ({}, "(", "not a regular expression"),
        (dict(symmetric=False), "mlp", "give --format gptq, and the same symmetry"),
        (dict(preset="best"), "mlp", "of the whole model"),
        (dict(exclude=["q_proj"]), "mlp", "layers.0.self_attn.q_proj is quantized there"),
        (dict(group_size=64), "mlp", "group_size is 32 there, and would be 64 in what is quantized again; give the same"),
        (dict(act_order="full"), "mlp", "desc_act is False there, and would be True"),
    ],
)
def test_what_makes_no_sense_is_refused(llama, tmp_path, changes, pattern, message):
    quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL, method="rtn"))
    before = weights_and_config(tmp_path / "out")
    with pytest.raises(FoemError) as error:
        quantize(llama, tmp_path / "out", QuantizeConfig(**{**SMALL, **changes}), redo=pattern)
    assert message in str(error.value) and weights_and_config(tmp_path / "out") == before


def test_another_model_of_the_same_shape_is_refused(llama, tmp_path):
    quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL, method="rtn"))
    other = write_model(tmp_path / "other", "llama", seed=1)
    with pytest.raises(FoemError, match="lm_head.weight is not there as it is in .*other; give the model"):
        quantize(other, tmp_path / "out", QuantizeConfig(**SMALL), redo="mlp")


def test_a_head_that_is_not_quantized_stays_so_unless_found(llama, tmp_path):
    quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL, method="rtn"))
    for pattern in (DOWN, "lm_head"):
        quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL, method="gptq", lm_head=True), redo=pattern)
        assert read_config(tmp_path / "out").lm_head == (pattern == "lm_head")


def test_damaged_and_absent_checkpoints_are_refused(llama, tmp_path):
    with pytest.raises(FoemError, match="no finished checkpoint of foem-vllm"):
        quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL), redo="mlp")
    quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL, method="rtn"))
    shard = tmp_path / "out/model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(FoemError, match="sha256"):
        quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL), redo="mlp")


def test_a_report_survives_being_written(llama, tmp_path):
    report = quantize(llama, tmp_path / "out", QuantizeConfig(**SMALL))
    assert Report.from_json(report.to_json()) == report
