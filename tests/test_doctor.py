"""`foem doctor`: its predictions against what the plugin, vLLM's own rules, the kernels and transformers then do."""
from __future__ import annotations

import http.server
import json
import pathlib
import threading

import foem_kernels
import pytest
import torch
from checkpoints import drop, edit_config, write_config, write_rtn_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import write_model
from typer.testing import CliRunner

from foem_vllm.cli import app
from foem_vllm.doctor import NotACheckpoint, examine
from foem_vllm.errors import FoemError
from foem_vllm.format import QuantSpec, read_config, unpack

pytestmark = pytest.mark.usefixtures("every_cpu")


@pytest.fixture
def made(untrained, tmp_path):
    def make(spec=QuantSpec(4, 64), **options) -> pathlib.Path:  # noqa: B008
        return write_rtn_checkpoint(untrained, tmp_path / "checkpoint", spec, **options)
    return make


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


RANKS = ("--device", "cpu", "--tensor-parallel-size", 2)


def shapes(found: dict) -> dict[str, tuple[int, int]]:
    return {row["name"]: (row["n"], row["k"]) for row in found["layers"]}


@pytest.mark.parametrize("spec", [QuantSpec(4, 64), QuantSpec(3, 32, False), QuantSpec(8, -1), QuantSpec(2, 64, False, "full")])
def test_layers_kernels_and_bytes_are_those_of_the_kernels(made, spec):
    folder = made(spec, lm_head=True)
    found = examine(str(folder), device="cpu")
    assert shapes(found) == {"qkv_proj": (256, 128), "o_proj": (128, 128), "gate_up_proj": (512, 128), "down_proj": (128, 256),
                             "lm_head": (256, 128)}
    assert {row["kernel"] for row in found["layers"]} == {"cpu_w4a16"} and found["ours"] == {"served": True, "why": []}
    assert all(row["bits"] == spec.bits and row["act_order"] == spec.desc_act for row in found["layers"])
    assert all(row["count"] == (1 if row["name"] == "lm_head" else 2) for row in found["layers"])
    tensors, size, shared = load_file(folder / "model.safetensors"), 0, 0
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        stored = {key: tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
        q = unpack(stored, spec, read_config(folder).checkpoint_format, name)
        prepared = foem_kernels.prepare(*q, bits=spec.bits, group_size=spec.group_size, dtype=torch.bfloat16, device="cpu")
        size += sum(t.nbytes for t in prepared.weights.values() if isinstance(t, torch.Tensor))
        shared += 4 * q.codes.shape[1] * (spec.desc_act and name.endswith(("k_proj", "v_proj", "up_proj")))
    assert found["memory"]["quantized"] == size - shared  # fused modules have one order of columns together
    rest = sum(t.numel() for name, t in tensors.items() if name.endswith(("norm.weight", "embed_tokens.weight")))
    assert found["memory"]["rest"] == 2 * rest


def test_room_for_the_kv_cache_is_what_transformers_takes(made, untrained):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(untrained, dtype=torch.bfloat16)
    cache = model(torch.arange(10)[None], use_cache=True).past_key_values
    taken = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) // 10
    memory = examine(str(made()), device="cpu", memory=10 ** 7)["memory"]
    assert memory["kv_bytes_per_token"] == taken
    assert memory["kv_tokens"] == (10 ** 7 - memory["quantized"] - memory["rest"]) // taken


def test_a_gpu_that_is_not_here(made, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked about this machine"))
    folder = made(QuantSpec(3, 64, False))
    assert {row["kernel"] for row in examine(str(folder), device="sm_90")["layers"]} == {"triton_w4a16"}
    old = examine(str(folder), device="sm_70", memory=10 ** 9)
    assert {row["kernel"] for row in old["layers"]} == {"reference"} and old["ours"]["served"]
    assert "triton_w4a16 needs compute capability 8.0, found 7.0" in old["layers"][0]["why_not_faster"]
    assert examine(str(folder), device="sm_90")["memory"]["kv_tokens"] is None
    with pytest.raises(FoemError, match="--device gpu: choose cpu, cuda"):
        examine(str(folder), device="gpu")


def test_ranks_cut_inputs_outputs_and_copy_heads(made):
    folder = made(QuantSpec(4, 64), lm_head=True)
    found = examine(str(folder), 2, "cpu")
    assert shapes(found) == {"qkv_proj": (64 + 2 * 64, 128), "o_proj": (128, 64), "gate_up_proj": (256, 128),
                             "down_proj": (128, 128), "lm_head": (128, 128)}  # the only kv head is on both ranks
    assert found["ours"]["served"] and found["stock"]["served"]


def test_groups_cut_by_ranks(untrained, tmp_path):
    """Groups of 128 over 64 inputs a rank: ours serves one group of 64, stock refuses."""
    found = examine(str(write_rtn_checkpoint(untrained, tmp_path / "a", QuantSpec(4, 128))), 2, "cpu")
    row = next(row for row in found["layers"] if row["name"] == "o_proj")
    assert row["group_size"] == row["k"] == 64 and found["ours"]["served"]
    assert found["stock"]["why"] == ["o_proj: 64 inputs of a rank are no whole groups of 128"]
    three = examine(str(tmp_path / "a"), 3, "cpu")
    said = [f"{p['tensor']} {p['problem']}" for p in three["problems"]]
    assert "config.json gives the model 2 attention heads, which 3 ranks cannot share evenly" in said
    assert "model.layers.1.mlp.down_proj has 256 inputs, which 3 ranks cannot share evenly" in said
    assert not three["ours"]["served"] and not three["stock"]["served"]


@pytest.mark.parametrize("config,ranks,said", [
    ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, "3 heads of keys and values, which 2 ranks can neither share"),
    ({"num_attention_heads": 12, "num_key_value_heads": 2}, 3, "2 heads of keys and values, which 3 ranks can neither share"),
    ({"num_attention_heads": 12, "num_key_value_heads": 4}, 2, None),
    ({"num_attention_heads": 8, "num_key_value_heads": 2}, 4, None),
    ({"num_attention_heads": None, "num_key_value_heads": None, "n_head": 6}, 4, "6 attention heads, which 4 ranks"),
])
def test_heads_that_ranks_cannot_share(made, config, ranks, said):
    """As vLLM's attention asserts: so many that ranks share them, or so few that they have copies."""
    folder = made()
    write_config(folder, {**json.loads((folder / "config.json").read_text()), **config})
    found = [p["problem"] for p in examine(str(folder), ranks, "cpu")["problems"] if p["tensor"] == "config.json"]
    assert found == [] if said is None else said in found[0]


@pytest.mark.parametrize("options,device,said", [
    ({"spec": QuantSpec(4, 16)}, "sm_90", "groups of 16 are not served, only of -1, 32, 64, 128"),
    ({"spec": QuantSpec(8, 64)}, "cpu", "8-bit weights are not served on CPUs"),
    ({"spec": QuantSpec(4, 64), "dynamic": {r".*\.q_proj": {"bits": 8}}}, "sm_90", "qkv_proj: vLLM fuses q_proj, k_proj, v_proj"),
    ({"spec": QuantSpec(4, 64)}, "sm_75", None),
    ({"spec": QuantSpec(4, 64)}, "sm_70", "Marlin needs compute capability 7.5, found 7.0"),
])
def test_stock_refuses_what_ours_serves(made, options, device, said):
    found = examine(str(made(**options)), device=device)
    assert found["ours"]["served"] and not found["problems"] and found["stock"]["served"] == (said is None)
    assert said is None or said in found["stock"]["why"][0]


def test_stock_does_not_look_at_the_format(made):
    folder = made()
    edit_config(folder, checkpoint_format="gptq_w")
    found = examine(str(folder), device="cpu")
    assert found["stock"]["served"] and not found["ours"]["served"] and "'gptq_w' is not read here" in found["ours"]["why"][0]


def test_planes_are_read_where_there_is_only_one(made):
    """GPTQModel's planar format differs from its version 2 at 3, 5, 6 and 7 bits only; eval's matrix serves one it wrote."""
    folder = made(QuantSpec(4, 64), checkpoint_format="gptq_v2")
    edit_config(folder, checkpoint_format="gptq_p")
    assert read_config(folder).checkpoint_format == "gptq_v2" and examine(str(folder), device="cpu")["ours"]["served"]
    edit_config(folder, dynamic={".*q_proj": {"bits": 3}})
    with pytest.raises(FoemError, match="'gptq_p' is not read here"):
        read_config(folder)


def test_what_only_weights_can_show_is_a_note(untrained, tmp_path):
    """Version 1 of the format cannot say zero point 0; the kinds without that trouble have no note."""
    notes = [examine(str(write_rtn_checkpoint(untrained, tmp_path / f"{sym}{kind}", QuantSpec(2, 64, sym), kind)))["notes"]
             for sym, kind in ((False, "gptq"), (True, "gptq"), (False, "gptq_v2"))]
    assert "cannot say zero point 0" in notes[0][0] and notes[1:] == [[], []]


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral"])
def test_experts(arch, tmp_path):
    source = write_model(tmp_path / "source", arch)
    found = examine(str(write_rtn_checkpoint(source, tmp_path / "a", QuantSpec(4, 32, False))), 2, "cpu")
    rows = {row["name"]: row for row in found["layers"]}
    inner = {"qwen3_moe": 64, "mixtral": 128}[arch]
    assert (rows["experts gate_up"]["n"], rows["experts gate_up"]["k"]) == (inner, 64)  # half of gate and half of up
    assert (rows["experts down"]["n"], rows["experts down"]["k"]) == (64, inner // 2)
    assert rows["experts down"]["kernel"] == "cpu_w4a16" and found["ours"]["served"]
    if not torch.cpu._is_amx_tile_supported():
        assert "asymmetric" in found["stock"]["why"][0]
    apart = examine(str(tmp_path / "a"), 2, "cpu", expert_parallel=True)
    whole = {row["name"]: row for row in apart["layers"]}
    assert (whole["experts gate_up"]["n"], whole["experts gate_up"]["k"]) == (2 * inner, 64)
    assert (whole["experts down"]["n"], whole["experts down"]["k"]) == (64, inner) and whole["qkv_proj"] == rows["qkv_proj"]
    assert apart["ours"]["served"] and "experts out" in run(tmp_path / "a", *RANKS, "--enable-expert-parallel").stdout
    three = examine(str(write_rtn_checkpoint(source, tmp_path / "c", QuantSpec(3, 32))), device="sm_90")
    assert "takes 4-bit codes, not 3-bit" in three["problems"][0]["problem"] and not three["ours"]["served"]


def test_configs_that_do_not_say_how_they_are_quantized(made):
    """Ours serves them when asked to, as test_plugin's claims say; vLLM itself fails on null."""
    folder = made()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["quant_method"]
    write_config(folder, config)
    found = examine(str(folder), device="cpu")
    assert found["ours"]["served"] and found["stock"]["why"] == ["the config has no quant_method"]
    edit_config(folder, quant_method=None)
    null = examine(str(folder), device="cpu")
    assert null["ours"]["why"] == ['config.json says quant_method null, on which vLLM fails; write "quant_method": "gptq"']
    write_config(folder, {k: v for k, v in config.items() if k != "quantization_config"})
    (folder / "quantize_config.json").write_text(json.dumps(config["quantization_config"]))
    alone = examine(str(folder), device="cpu")
    assert alone["ours"]["served"] and alone["stock"]["served"]


def test_latent_attention_over_ranks(tmp_path):
    """What leads to the latent vectors is on every rank whole, also where the ranks do not divide it, and fused."""
    source = write_model(tmp_path / "source", "deepseek_v2")
    found = examine(str(write_rtn_checkpoint(source, tmp_path / "a", QuantSpec(4, 32))), 4, "cpu")
    assert shapes(found)["fused_qkv_a_proj"] == (128 + 512 + 64, 64) and shapes(found)["q_b_proj"] == (192, 128)
    assert shapes(found)["o_proj"] == (64, 128) and found["ours"]["served"]


def test_weights_that_do_not_fit(made):
    found = examine(str(made()), device="cpu", memory=100_000)
    assert not found["ours"]["served"] and not found["stock"]["served"]
    assert "leave no room for a token's keys and values; use a larger" in found["ours"]["why"][0]


def test_heads_fused_on_disk_that_ranks_have_copies_of(tmp_path):
    """6 query heads of 32 and one of keys and values over two ranks: 3 and a copy of both."""
    source = write_model(tmp_path / "source", "phi3", hidden_size=192, num_attention_heads=6, num_key_value_heads=1)
    found = examine(str(write_rtn_checkpoint(source, tmp_path / "a", QuantSpec(4, 32))), 2, "cpu")
    assert shapes(found)["qkv_proj"] == (3 * 32 + 2 * 32, 192)


def test_config_of_a_language_model_inside(made):
    folder = made()
    config = json.loads((folder / "config.json").read_text())
    inside = {"quantization_config": config["quantization_config"]}
    write_config(folder, {**config, "quantization_config": None, "text_config": inside})
    (folder / "quantize_config.json").unlink(missing_ok=True)
    assert read_config(folder).spec == QuantSpec(4, 64) and examine(str(folder), device="cpu")["method"] == "gptq"


def test_shards_by_their_older_names(made):
    """AutoGPTQ's index, with one of the shards that it names not there."""
    folder = made()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"gptq_model-4bit-64g-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        save_file({n: t for n, t in tensors.items() if (".1." in n) == bool(i)}, folder / name)
    index = {"weight_map": {n: names[".1." in n] for n in tensors}}
    (folder / "gptq_model-4bit-64g.safetensors.index.json").write_text(json.dumps(index))
    assert examine(str(folder), device="cpu")["ours"]["served"]
    (folder / names[1]).unlink()
    assert f"{names[1]} is missing" in " ".join(examine(str(folder), device="cpu")["ours"]["why"])


def test_commands_exit_codes_and_json(made, untrained, tmp_path):
    folder = made(QuantSpec(3, 64))
    fine = run(folder, "--device", "cpu", "--memory", "0.1")
    assert fine.exit_code == 0 and "cpu_w4a16" in fine.stdout and "--quantization foem: serves it" in fine.stdout
    assert "does not serve it: 3-bit symmetric weights are not served" in fine.stdout
    parsed = run(folder, "--device", "cpu", "--json")
    assert parsed.exit_code == 0 and json.loads(parsed.stdout) == examine(str(folder), device="cpu")
    drop(folder, "model.layers.0.mlp.up_proj.scales")
    broken = run(folder)
    assert broken.exit_code == 1 and "problem: model.layers.0.mlp.up_proj.scales is missing; download" in broken.stdout
    assert run(tmp_path).exit_code == 2 and run("no/such/model/here").exit_code == 2
    plain = run(untrained)
    assert plain.exit_code == 0 and "not quantized (bfloat16); vLLM serves it as it is" in plain.stdout
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, {**config, "quantization_config": {"quant_method": "awq", "bits": 4}})
    other = run(folder)
    assert other.exit_code == 0 and "quantized with awq, not GPTQ; serve it without --quantization foem" in other.stdout
    (folder / "config.json").write_text("{")
    with pytest.raises(NotACheckpoint, match="not valid JSON"):
        examine(str(folder))


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: a repository's list of files, and the files, in parts."""

    folder: pathlib.Path
    asked: list

    def do_GET(self):
        commit = "0" * 40
        if self.path.startswith("/api/models/"):
            files = [path for path in self.folder.iterdir() if path.is_file()]
            tree = [{"type": "file", "path": path.name, "oid": commit, "size": path.stat().st_size} for path in files]
            about = {"id": "some/model", "sha": commit, "siblings": [{"rfilename": path.name} for path in files]}
            body = json.dumps(tree if "/tree/" in self.path else about).encode()
            return self.reply(200, body, {"Content-Type": "application/json"})
        path = self.folder / self.path.rpartition("/")[2]
        if not path.is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        body = path.read_bytes()
        headers = {"ETag": f'"{path.name}"', "X-Repo-Commit": commit}
        if asked := self.headers.get("Range"):
            start, stop = asked.removeprefix("bytes=").split("-")
            body = body[int(start):int(stop) + 1]
        if self.command == "GET":
            self.asked.append((path.name, len(body)))
        self.reply(206 if asked else 200, body, headers)

    do_HEAD = do_GET

    def reply(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_hub_repositories_are_read_without_their_weights(tinylm, tmp_path, monkeypatch):
    from huggingface_hub import constants
    folder = write_rtn_checkpoint(tinylm, tmp_path / "checkpoint", QuantSpec(4, 64))
    handler = type("Handler", (Hub,), {"folder": folder, "asked": []})
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        changes = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
                   "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": False}
        for name, value in changes.items():
            monkeypatch.setattr(constants, name, value)
        found = examine("some/model", device="cpu")
        server.shutdown()
    assert found == {**examine(str(folder), device="cpu"), "model": "some/model"}
    assert sum(size for name, size in handler.asked if name.endswith(".safetensors")) < 200_000
    assert (folder / "model.safetensors").stat().st_size > 2_000_000
