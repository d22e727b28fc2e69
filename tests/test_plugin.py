"""The plugin without an engine: what it claims, which layers it quantizes how, what it refuses and in which words."""
import copy
import json
import logging
import os
import pathlib
import struct
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm")

from checkpoints import edit_config, write_config, write_rtn_checkpoint  # noqa: E402

import foem_vllm.plugin as plugin  # noqa: E402
from foem_vllm.errors import FoemError  # noqa: E402
from foem_vllm.format import FormatConfig, QuantSpec  # noqa: E402
from foem_vllm.integrity import file_digest, read_headers, verify_files  # noqa: E402
from foem_vllm.plugin import compat  # noqa: E402
from foem_vllm.plugin.config import FoemConfig  # noqa: E402
from foem_vllm.serving import quantized_modules  # noqa: E402

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture
def checkpoint(tmp_path, untrained):
    def write(spec=QuantSpec(4, 32), **options):  # noqa: B008
        return write_rtn_checkpoint(untrained, tmp_path / "checkpoint", spec, **options)
    return write


def load(folder) -> FoemConfig:
    """The config as vLLM creates it from a local folder."""
    config = FoemConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.maybe_update_config(str(folder))
    return config


@pytest.mark.parametrize("change,user,claimed", [
    ({}, "foem", True), ({}, None, False), ({}, "gptq", False), ({}, "auto_gptq", False),
    ({"meta": {"foem": {}}}, None, True), ({"meta": {"foem": {}}}, "foem", True),
    ({"meta": {"foem": {}}}, "gptq", False), ({"meta": {"foem": {}}}, "auto_gptq", False),
    ({"quant_method": "foem"}, "foem", True), ({"quant_method": "awq"}, "foem", False),
    ({"quant_method": "awq", "meta": {"foem": {}}}, None, False),
    ({"quant_method": ""}, "foem", True), ({"quant_method": ""}, None, False), ({"quant_method": ""}, "gptq", False),
    ({"quant_method": "", "method": "gptq"}, "foem", True), ({"quant_method": "", "method": "awq"}, "foem", False),
    ({"quant_method": "", "bits": None}, "foem", False),
    ({"meta": None}, None, False), ({"meta": "foem"}, None, False), ({"meta": ["foem"]}, None, False),
])
def test_claims_only_what_is_ours(change, user, claimed):
    found = FoemConfig.override_quantization_method({**GPTQ, **change}, user, hf_config=None, something_new=1)
    assert found == ("foem" if claimed else None)


@pytest.mark.parametrize("nonsense", [None, [], "gptq", {}, {"quant_method": 3}])
def test_claiming_never_raises(nonsense):
    assert FoemConfig.override_quantization_method(nonsense, "foem") is None


def test_stock_methods_still_get_their_checkpoints():
    """vLLM asks custom configs first; an explicit wish for the stock path must reach it, also for a foem checkpoint."""
    from vllm.model_executor.layers.quantization import get_quantization_config
    plugin.register()
    assert get_quantization_config("foem") is FoemConfig
    stock = get_quantization_config("gptq")
    assert stock.override_quantization_method({**GPTQ, "meta": {"foem": {}}}, "gptq") == "auto_gptq"


def test_register_twice_is_quiet_and_entry_point_exists(caplog):
    from importlib.metadata import entry_points
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "foem"]
    register = found.load()
    register()
    with caplog.at_level(logging.DEBUG):
        register()
    assert register is plugin.register and not caplog.records


def test_vllm_versions():
    assert plugin.version_warning("0.31.0") is None and plugin.version_warning("0.33.2+cpu") is None
    for other in ("0.30.1", "0.34.0", "1.0", "dev"):
        assert other in plugin.version_warning(other) and "install" in plugin.version_warning(other)
    assert plugin.version_warning(compat.VERSION) is None


def test_a_vllm_that_cannot_be_imported_is_one_clear_line(tmp_path):
    """A stand-in `vllm` without the modules that we need, in a process of its own."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("__version__ = '9.9'\n")
    done = subprocess.run([sys.executable, "-c", "import foem_vllm.plugin as p; p.register()"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=300)
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert "not available" in done.stderr and "pip install" in done.stderr


def test_names_that_moved_say_what_to_install(monkeypatch):
    monkeypatch.setitem(compat._LATER, "LinearBase", "vllm.no_such_module")
    with pytest.raises(FoemError, match="pip install"):
        compat.LinearBase  # noqa: B018


def test_logs_appear_in_vllm_log(caplog):
    plugin.register()
    vllm_log = logging.getLogger("vllm")
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    vllm_log.addHandler(handler)
    try:
        vllm_log.setLevel(logging.INFO)
        logging.getLogger("foem_kernels").info("chosen")
        logging.getLogger("foem_kernels").debug("detail")
    finally:
        vllm_log.removeHandler(handler)
    assert [r.getMessage() for r in records] == ["chosen"]


def test_bits():
    for bits in (2, 3, 4, 8):
        assert FoemConfig.from_config({**GPTQ, "bits": bits}).format_config.spec.bits == bits
    with pytest.raises(FoemError, match="bits=5"):
        FoemConfig.from_config({**GPTQ, "bits": 5})


def test_g_idx_reaches_the_layers():
    kept = list(FoemConfig.get_checkpoint_weight_mapper().apply([("model.layers.0.mlp.up_proj.g_idx", torch.zeros(1))]))
    assert [name for name, _ in kept] == ["model.layers.0.mlp.up_proj.g_idx"]


def specs(config: FoemConfig, prefix: str) -> list[QuantSpec | None]:
    return list(config.specs_for(prefix).values())


def test_modules_and_fusion(checkpoint):
    config = load(checkpoint(dynamic={r"-:.*layers\.0\.mlp": {}, r"+:.*layers\.1\.self_attn": {"bits": 8, "group_size": 64}}))
    config.packed_modules_mapping = FUSED
    assert specs(config, "model.layers.0.mlp.gate_up_proj") == [None] * 2
    assert specs(config, "model.layers.0.self_attn.qkv_proj") == [QuantSpec(4, 32)] * 3
    assert specs(config, "model.layers.1.self_attn.qkv_proj") == [QuantSpec(8, 64)] * 3
    assert specs(config, "model.layers.1.self_attn.o_proj") == [QuantSpec(8, 64)]
    assert specs(config, "lm_head") == [None]


@pytest.mark.parametrize("rule,found", [
    ({"-:.*up_proj": {}}, [QuantSpec(4, 32), None]), ({"+:.*up_proj": {"bits": 8}}, [QuantSpec(4, 32), QuantSpec(8, 32)]),
    ({".*gate_proj": {"group_size": 64, "sym": False}}, [QuantSpec(4, 64, False), QuantSpec(4, 32)]),
])
def test_fused_modules_may_differ(checkpoint, rule, found):
    config = load(checkpoint(dynamic=rule))
    config.packed_modules_mapping = FUSED
    assert specs(config, "model.layers.0.mlp.gate_up_proj") == found
    assert list(config.specs_for("model.layers.0.mlp.gate_up_proj")) == [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up")]


def test_rules_follow_checkpoint_names_when_vllm_renames(checkpoint):
    config = load(checkpoint(dynamic={r"-:model\.layers\.0\.": {}}))
    config.apply_vllm_mapper(compat.WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    config.packed_modules_mapping = FUSED
    assert specs(config, "language_model.model.layers.0.self_attn.qkv_proj") == [None] * 3
    assert specs(config, "language_model.model.layers.1.self_attn.qkv_proj") == [QuantSpec(4, 32)] * 3


def rewrite(folder: pathlib.Path, change) -> None:
    """Apply `change` to the tensors of a checkpoint, and write it back."""
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("change,said", [
    (lambda t: t.pop(f"{Q}.scales"), "q_proj.scales is missing"),
    (lambda t: t.pop(f"{Q}.qzeros"), "q_proj.qzeros is missing"),
    (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].long()}), "q_proj.qweight is I64"),
    (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:-1].clone()}), "q_proj.scales is F16"),
])
def test_incomplete_checkpoint(checkpoint, change, said):
    folder = checkpoint()
    rewrite(folder, change)
    with pytest.raises(FoemError, match=said):
        load(folder)


@pytest.mark.parametrize("change", [{"bits": 8}, {"group_size": 64}, {"group_size": -1}])
def test_config_that_does_not_describe_the_weights(checkpoint, change):
    folder = checkpoint()
    edit_config(folder, **change)
    with pytest.raises(FoemError, match=r"proj\.\w+ is .* but bits=\d.*correct"):
        load(folder)


def test_rule_that_excludes_a_quantized_module(checkpoint):
    folder = checkpoint()
    edit_config(folder, dynamic={"-:.*o_proj": {}})
    with pytest.raises(FoemError, match="o_proj.qweight is quantized, but a `dynamic` rule"):
        load(folder)


def test_checkpoint_without_quantized_tensors(checkpoint):
    with pytest.raises(FoemError, match="qweight is the name of no tensor.*without --quantization"):
        quantized_modules({"model.norm.weight": ("BF16", (8,))}, FormatConfig(QuantSpec()), "here")


def test_dynamic_rule_with_impossible_bits(checkpoint):
    folder = checkpoint()
    edit_config(folder, dynamic={".*o_proj": {"bits": 5}})
    with pytest.raises(FoemError, match="rule '.\\*o_proj': bits=5"):
        load(folder)


@pytest.mark.parametrize("keep", [4, 100, -1, -4096])
def test_truncated_file(checkpoint, keep):
    file = checkpoint() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FoemError, match=r"model\.safetensors.*(truncated|cut off).*again"):
        load(file.parent)


def test_damaged_header(checkpoint):
    file = checkpoint() / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(FoemError, match="header is damaged"):
        load(file.parent)
    file.write_bytes(struct.pack("<Q", 2) + b"{}")
    assert read_headers(file.parent) == {}


@pytest.mark.parametrize("change,said", [
    (lambda h: h[f"{Q}.qweight"].update(shape=[16, 64]), "q_proj.qweight is I32 .16, 64., but its bytes are"),
    (lambda h: h[f"{Q}.scales"].update(dtype="F32"), "q_proj.scales is F32"),
    (lambda h: h[f"{Q}.qweight"].update(shape=[-16, -128]), "q_proj.qweight is I32"),
    (lambda h: h.pop(f"{Q}.qweight"), "begins at byte"),
    (lambda h: h[f"{Q}.qweight"].pop("shape"), "header is damaged"),
    (lambda h: h.update({f"{Q}.qweight": 3}), "header is damaged"),
])
def test_header_that_lies(checkpoint, change, said):
    file = checkpoint() / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length:])
    with pytest.raises(FoemError, match=said):
        load(file.parent)


@pytest.mark.parametrize("names,said", [
    ({f"{Q}.absent": "model.safetensors"}, "holds no .*q_proj.absent"), ({}, "names no file"), ({"a": 3}, "is missing"),
    (["a"], "no readable weight_map"), (None, "no readable weight_map"),
])
def test_index_that_lies(checkpoint, names, said):
    folder = checkpoint()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(FoemError, match=said):
        load(folder)


def test_missing_shard(checkpoint):
    folder = checkpoint()
    write_config(folder, json.loads((folder / "config.json").read_text()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(FoemError, match="model-00001-of-00002.safetensors is missing"):
        load(folder)


def test_checksums(checkpoint, monkeypatch):
    folder = checkpoint(foem=True)
    meta = json.loads((folder / "config.json").read_text())["quantization_config"]["meta"]
    assert verify_files(folder, meta) == 1 and verify_files(folder, None) == 0 and verify_files(folder, {"foem": {}}) == 0
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(FoemError, match=r"model\.safetensors has sha256.*FOEM_SKIP_CHECKSUM"):
        load(folder)
    monkeypatch.setenv("FOEM_SKIP_CHECKSUM", "1")
    load(folder)
    monkeypatch.delenv("FOEM_SKIP_CHECKSUM")
    file.unlink()
    with pytest.raises(FoemError, match="missing"):
        verify_files(folder, meta)


def test_digest_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_config_survives_copies(checkpoint):
    """vLLM deep-copies and pickles its configs on the way to its workers."""
    config = load(checkpoint())
    again = copy.deepcopy(config)
    assert again.modules == config.modules and again.format_config == config.format_config


def test_only_compat_imports_vllm():
    root = pathlib.Path(plugin.__file__).parent
    for path in (*root.glob("*.py"), *root.parent.glob("*.py")):
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        imports = [line for line in lines if line.startswith(("import vllm", "from vllm"))]
        assert path.name == "compat.py" or not imports, path
