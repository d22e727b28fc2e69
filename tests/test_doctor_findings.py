"""What `foem doctor` finds wrong with a checkpoint, beside what the plugin then refuses."""
from __future__ import annotations

import json
import pathlib

import pytest
import torch
from checkpoints import drop, edit_config, write_config, write_rtn_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import write_model

from foem_vllm.doctor import examine, number
from foem_vllm.errors import FoemError
from foem_vllm.format import QuantSpec

pytestmark = pytest.mark.usefixtures("every_cpu")


@pytest.fixture
def made(untrained, tmp_path):
    def make(spec=QuantSpec(4, 64), **options) -> pathlib.Path:  # noqa: B008
        return write_rtn_checkpoint(untrained, tmp_path / "checkpoint", spec, **options)
    return make


def cut(folder: pathlib.Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "sound": lambda folder: None,
    "missing": lambda folder: drop(folder, "model.layers.0.mlp.up_proj.scales", "model.layers.1.mlp.down_proj.qzeros"),
    "bits": lambda folder: edit_config(folder, bits=8),
    "group": lambda folder: edit_config(folder, group_size=32),
    "method": lambda folder: edit_config(folder, checkpoint_format="marlin"),
    "value": lambda folder: edit_config(folder, desc_act="false"),
    "excluded": lambda folder: edit_config(folder, dynamic={"-:.*up_proj": {}}),
    "cut": cut,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_refuses_what_the_plugin_refuses(damage, made):
    """Every finding of the doctor's; the plugin, which stops at the first one, says that one."""
    pytest.importorskip("vllm")
    from foem_vllm.plugin.config import FoemConfig
    folder = made()
    DAMAGE[damage](folder)
    found = examine(str(folder), device="cpu")
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    try:
        FoemConfig.from_config(raw).maybe_update_config(str(folder))
        refused = None
    except FoemError as error:
        refused = str(error)
    assert found["ours"]["served"] == (refused is None)
    if refused is not None:
        first = found["problems"][0]
        assert first["problem"] in refused and first["remedy"] in refused
        assert found["stock"]["served"] == (damage == "method")  # which stock ignores
    assert len(found["problems"]) == {"sound": 0, "missing": 2, "cut": 1, "method": 1, "value": 1, "excluded": 2}.get(
        damage, len(found["problems"]))


def test_every_damaged_file_is_named(untrained, tmp_path):
    folder = write_rtn_checkpoint(untrained, tmp_path / "a", QuantSpec(4, 64))
    tensors = list(load_file(folder / "model.safetensors").items())
    for i in range(3):
        save_file(dict(tensors[i::3]), folder / f"part{i}.safetensors")
    (folder / "model.safetensors").unlink()
    for i in (0, 2):
        path = folder / f"part{i}.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    problems = examine(str(folder), device="cpu")["problems"]
    assert [pathlib.Path(p["tensor"]).name for p in problems] == ["part0.safetensors", "part2.safetensors"]


@pytest.mark.parametrize("lacks,said", [
    (["model.layers.1.self_attn.o_proj."], ["model.layers.1.self_attn.o_proj is missing"]),
    (["model.layers.1."], ["model.layers.1 has no tensors"]),
    (["model.layers.0."], ["model.layers.0 has no tensors"]),
    (["model.layers.0.mlp.", "model.layers.0.input_layernorm."],
     [f"model.layers.0.{m} is missing" for m in ("input_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")]),
])
def test_layers_that_the_checkpoint_lacks(made, lacks, said):
    folder = made()
    drop(folder, *(name for name in load_file(folder / "model.safetensors") if name.startswith(tuple(lacks))))
    found = examine(str(folder), device="cpu")
    assert [f"{p['tensor']} {p['problem']}" for p in found["problems"]] == said and not found["ours"]["served"]


def ends(folder: pathlib.Path, drops: tuple, **changes) -> list[str]:
    """What the doctor says when tensors are dropped and keys of config.json changed."""
    drop(folder, *drops)
    write_config(folder, {**json.loads((folder / "config.json").read_text()), **changes})
    found = examine(str(folder), device="cpu")
    assert found["ours"]["served"] == found["stock"]["served"] == (not found["problems"])
    return [f"{p['tensor']} {p['problem']}" for p in found["problems"]]


@pytest.mark.parametrize("drops,changes,said", [
    ((), {}, []), (("lm_head.weight",), {}, ["lm_head.weight is missing, although config.json says tie_word_embeddings false"]),
    (("lm_head.weight",), {"tie_word_embeddings": True}, []), (("lm_head.weight",), {"tie_word_embeddings": None}, []),
    (("lm_head.weight",), {"architectures": ["LlamaModel"]}, []),
    (("model.embed_tokens.weight",), {}, ["embed_tokens.weight is missing"]),
    ((), {"vocab_size": 4000}, ["model.embed_tokens.weight is [4096, 64], but config.json says 4000 for the vocabulary"]),
    ((), {"hidden_size": 128}, ["model.embed_tokens.weight is [4096, 64], but config.json says 128 for the width"]),
    ((), {"hidden_size": 128, "word_embed_proj_dim": 64}, []),
])
def test_embedding_and_head(drops, changes, said, tmp_path):
    source = write_model(tmp_path / "source", "llama")
    folder = write_rtn_checkpoint(source, tmp_path / "a", QuantSpec(4, 32))
    config = json.loads((folder / "config.json").read_text())
    changes = {"tie_word_embeddings": False} | changes
    if changes["tie_word_embeddings"] is None:  # most configs of tied models do not say so
        config.pop("tie_word_embeddings", None)
        write_config(folder, config)
        del changes["tie_word_embeddings"]
    assert ends(folder, drops, **changes) == said


def test_a_weight_beside_quantized_ones_of_the_same_module(made):
    folder = made()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(128, 256)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = examine(str(folder), device="cpu")
    assert [p["tensor"] for p in found["problems"]] == ["model.layers.1.mlp.down_proj.weight"] and not found["ours"]["served"]


def test_a_layer_that_drafts_is_a_stack_of_its_own(made):
    """As Qwen3-Next stores it: the config's number of layers is not that of `mtp.layers`."""
    folder = made()
    tensors = load_file(folder / "model.safetensors")
    drafting = {name.replace("model.layers.0", "mtp.layers.0"): t.clone() for name, t in tensors.items() if "layers.0" in name}
    save_file({**tensors, **drafting}, folder / "model.safetensors", {"format": "pt"})
    assert examine(str(folder), device="cpu")["problems"] == []


def test_experts_that_the_checkpoint_lacks(tmp_path):
    """How many there must be is said by the config."""
    folder = write_rtn_checkpoint(write_model(tmp_path / "source", "qwen3_moe"), tmp_path / "a", QuantSpec(4, 32))
    last = number(json.loads((folder / "config.json").read_text()), "experts") - 1
    drop(folder, *(name for name in load_file(folder / "model.safetensors") if f"experts.{last}." in name))
    found = examine(str(folder), device="cpu")
    assert not found["ours"]["served"] and f"experts.{last}." in found["problems"][0]["problem"]


def test_experts_of_other_names(tmp_path):
    folder = write_rtn_checkpoint(write_model(tmp_path / "source", "mixtral"), tmp_path / "a", QuantSpec(4, 32))
    renamed = {n.replace(".w1.", ".linear."): t for n, t in load_file(folder / "model.safetensors").items()}
    renamed = {n.replace(".w2.", ".linear_1.").replace(".w3.", ".linear_v."): t for n, t in renamed.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    found = examine(str(folder), device="cpu")
    assert not found["ours"]["served"] and "has experts of linear, linear_1, linear_v, not of" in found["ours"]["why"][0]
