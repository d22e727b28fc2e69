"""Hundreds of damaged checkpoints: each is refused in words of ours, or served as what it says.

In process, through everything of ours and through vLLM's own layers, without an engine. What a checkpoint says is read by an
independent reader (numpy's bits, float64). Every case has its number as its seed, and a failure names it.
"""
import json
import pathlib
import random
import re
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from checkpoints import rtn  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from vllm_layers import block, load, rank_of  # noqa: E402

from foem_vllm.errors import FoemError  # noqa: E402
from foem_vllm.format import TENSORS, FormatConfig, QuantSpec, pack  # noqa: E402
from foem_vllm.plugin.config import FoemConfig  # noqa: E402

SIZES = dict(hidden=64, heads=2, kv_heads=1, head_dim=32, inner=96, vocab=64)
PREFIX = "model.layers.0"
SHAPES = {f"{PREFIX}.self_attn.q_proj": (64, 64), f"{PREFIX}.self_attn.k_proj": (32, 64), f"{PREFIX}.self_attn.v_proj": (32, 64),
          f"{PREFIX}.self_attn.o_proj": (64, 64), f"{PREFIX}.mlp.gate_proj": (96, 64), f"{PREFIX}.mlp.up_proj": (96, 64),
          f"{PREFIX}.mlp.down_proj": (64, 96), "lm_head": (64, 64)}  # fmt: skip
BASES = {
    "sym": (QuantSpec(4, 32), "gptq", {}),
    "asym": (QuantSpec(4, 16, False), "gptq", {}),
    "act-order": (QuantSpec(4, 32, False, "full"), "gptq_v2", {}),
    "int3": (QuantSpec(3, 32, False), "gptq_v2", {}),
    "int2": (QuantSpec(2, 16), "gptq", {}),
    "int8": (QuantSpec(8, -1), "gptq_v2", {}),
    "mixed": (QuantSpec(4, 32), "gptq", {"-:.*v_proj": {}, "+:.*up_proj": {"bits": 8, "group_size": 16, "sym": False}}),
}
CASES = 600
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def single_rank(tmp_path_factory):
    with rank_of(1, 0, tmp_path_factory.mktemp("alone")):
        yield


def checkpoints(forms: dict, shapes: dict) -> dict[str, tuple[dict, dict]]:
    """{name: (stored tensors, quantization config)} of every form, for modules of these shapes."""
    made = {}
    for base, (spec, checkpoint_format, rules) in forms.items():
        config, stored = FormatConfig(spec, checkpoint_format, True, rules), {}
        for seed, (module, shape) in enumerate(shapes.items()):
            w, found = torch.randn(shape, generator=torch.Generator().manual_seed(seed)), config.spec_for(module)
            if found is None:
                stored[f"{module}.weight"] = w
            else:
                stored |= {f"{module}.{key}": t for key, t in pack(rtn(w, found), found, checkpoint_format).items()}
        made[base] = stored, config.to_json()
    return made


@pytest.fixture(scope="module")
def bases() -> dict[str, tuple[dict, dict]]:
    return checkpoints(BASES, SHAPES)


# Every damage takes (folder, random numbers) and changes files there.

def change_tensors(folder: pathlib.Path, change) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def change_config(folder: pathlib.Path, **values) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **values}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def split(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + length]), data[8 + length:]


def change_header(folder: pathlib.Path, change) -> None:
    header, data = split((folder / FILE).read_bytes())
    change(header)
    text = json.dumps(header).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)


def flip_data(folder, r):
    data = bytearray((folder / FILE).read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(r.choice((1, 1, 1, 8))):
        data[r.randrange(start, len(data))] ^= 1 << r.randrange(8)
    (folder / FILE).write_bytes(data)


def flip_header(folder, r):
    data = bytearray((folder / FILE).read_bytes())
    data[r.randrange(0, 8 + struct.unpack("<Q", data[:8])[0])] ^= 1 << r.randrange(8)
    (folder / FILE).write_bytes(data)


def cut(folder, r):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:r.randrange(len(data))] if r.random() < 0.7 else data + bytes(r.randrange(1, 99)))


def edit_header(folder, r):
    def change(header):
        names = sorted(header)
        info, other = header[r.choice(names)], header[r.choice(names)]
        kind = r.randrange(7)
        if kind == 0:
            info["shape"] = info["shape"][::-1]
        elif kind == 1:
            info["dtype"] = r.choice(("I32", "F16", "F32", "U8", "X9", 3, None))
        elif kind == 2:
            info["data_offsets"], other["data_offsets"] = other["data_offsets"], info["data_offsets"]
        elif kind == 3:
            info["shape"] = r.choice(([], [-1, -64], [info["shape"][0] // 2, 2, *info["shape"][1:]], "64", [0, 64], [1e9, 1]))
        elif kind == 4:
            info["data_offsets"] = [info["data_offsets"][0] + r.choice((-8, 8)), info["data_offsets"][1]]
        elif kind == 5:
            header[r.choice(names) + r.choice(("x", ".qweight", ""))] = header.pop(r.choice(names))
        else:
            del info[r.choice(sorted(info))]
    change_header(folder, change)


def edit_config(folder, r):
    key, values = r.choice([
        ("bits", (2, 3, 4, 8, 5, 16, "4", None, True, 4.5)), ("group_size", (16, 32, 64, -1, 0, -2, 1 << 40, "32", None, True)),
        ("sym", (True, False, "absent", "false", None)), ("desc_act", (True, False, "absent", "true")),
        ("checkpoint_format", ("gptq", "gptq_v2", "absent", "marlin", 2, [])), ("pack_dtype", ("int16", "absent", 7)),
        ("quant_method", ("awq", "absent", "GPTQ", None)), ("lm_head", (False, "absent", "yes")), ("static_groups", (True, 1)),
        ("dynamic", ({"-:.*q_proj": {}}, {".*": {"bits": 3}}, {"+:(": {}}, ["x"], {".*mlp": 3}, {".*": {"group_size": "8"}}, "x",
                     {".*o_proj": {"sym": False}}, {".*": {"bits": 7}}, {"nothing": {"bits": 2}})),
        ("meta", (None, [], "foem", {"foem": {"sha256": {FILE: "0"}}}, {"foem": {"sha256": {"other": "0"}}})),
        ("is_marlin_format", (True,)), ("wbits", (4, 8)), ("groupsize", (128,)),
    ])
    change_config(folder, **{key: r.choice(values)})


def edit_tensor(folder, r):
    def change(tensors):
        name = r.choice(sorted(tensors))
        t, kind = tensors[name].clone(), r.randrange(8)
        if kind == 0:
            tensors.pop(name)
            return
        flat = t.view(-1)
        if name.endswith("g_idx"):
            new = [t.flip(0), t + 1, t[torch.randperm(len(t), generator=torch.Generator().manual_seed(r.randrange(99)))],
                   torch.zeros_like(t), t - 1, t[:-1], t.long(), torch.full_like(t, -2**31)][kind]
        elif t.is_floating_point():
            new = [t, t * float("nan"), t.float(), t.double(), t[:-1], -t, torch.zeros_like(t), t.int()][kind]
            if kind == 0:
                flat[r.randrange(flat.numel())] = r.choice((float("inf"), float("nan"), -1.0, 0.0))
        elif name.endswith("qzeros"):
            new = [t, t + 0x11111111, torch.full_like(t, -1), torch.zeros_like(t), t.T.contiguous(), t.to(torch.int16), t[1:],
                   torch.full_like(t, 0x77777777)][kind]
            flat[r.randrange(flat.numel())] = r.randrange(-2**31, 2**31)
        else:
            new = [t, t.flip(1), t.T.contiguous(), t.float(), t[1:], torch.cat([t, t]), t.view(-1), ~t][kind]
        tensors[name] = new.contiguous()
    change_tensors(folder, change)


def lose_modules(folder, r):
    """All tensors of some linears, as with a shard that is not there and an index that does not know of it."""
    def change(tensors):
        lost = r.sample(sorted({name.rpartition(".")[0] for name in tensors}), r.choice((1, 1, 2, 4)))
        for name in [name for name in tensors if name.rpartition(".")[0] in lost]:
            tensors.pop(name)
    change_tensors(folder, change)


def other_version(folder, r):
    """All zero points of all modules as the other checkpoint_format stores them; the config stays."""
    step = 1 if json.loads((folder / "config.json").read_text())["checkpoint_format"] == "gptq" else -1

    def change(tensors):
        for name in [name for name in tensors if name.endswith("qzeros")]:
            words, n = tensors[name].numpy().T, tensors[name.replace("qzeros", "scales")].shape[1]
            bits = len(words) * 32 // n
            codes = (read_bits(words, bits, n).astype(np.int64) + step).clip(0, (1 << bits) - 1)
            tensors[name] = torch.from_numpy(write_bits(codes, bits).T.copy())
    change_tensors(folder, change)


def damage_index(folder, r):
    names = {name: FILE for name in load_file(folder / FILE)}
    kind = r.randrange(5)
    if kind == 0:
        names["model.norm.weight"] = "model-00002-of-00002.safetensors"
    elif kind == 1:
        names[f"{PREFIX}.mlp.absent_proj.qweight"] = FILE
    elif kind == 2:
        names = {}
    text = json.dumps({"weight_map": names if kind < 4 else r.choice([[FILE], 3, None, {"a": 7}])})
    (folder / INDEX).write_text(text[:-3] if kind == 3 else text)


DAMAGES = [flip_data, flip_data, flip_header, cut, edit_header, edit_header, edit_config, edit_config, edit_config, edit_tensor,
           edit_tensor, edit_tensor, lose_modules, other_version, damage_index]


# The independent reader.

def read_bits(words: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """[words, columns] int32 -> codes [rows, columns], bit by bit."""
    stream = np.unpackbits(np.ascontiguousarray(words.T).view(np.uint8), axis=1, bitorder="little")[:, :rows * bits]
    return (stream.reshape(words.shape[1], rows, bits) << np.arange(bits)).sum(-1).T


def write_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    stream = (codes.T[..., None] >> np.arange(bits) & 1).astype(np.uint8).reshape(codes.shape[1], -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view(np.int32).T


def says(folder: pathlib.Path, shapes: dict) -> dict[str, np.ndarray]:
    """{module: weight in float64} of what a checkpoint says, for those that no rule of ours has to refuse."""
    config, tensors, weights = json.loads((folder / "config.json").read_text()), load_file(folder / FILE), {}
    for module, (n, k) in shapes.items():
        found = {key: t for key in TENSORS if (t := tensors.get(f"{module}.{key}")) is not None}
        if not found:
            weights[module] = tensors[f"{module}.weight"].double().numpy()
            continue
        bits = found["qweight"].shape[0] * 32 // k
        codes, zeros = read_bits(found["qweight"].numpy(), bits, k).T, read_bits(found["qzeros"].numpy().T, bits, n)
        first = zeros.flat[0]
        if (zeros == first).all() and first in (2 ** (bits - 1) - 1, 2 ** (bits - 1)) and setting(config, module, "sym"):
            zeros = np.full_like(zeros, 2 ** (bits - 1))
        elif config.get("checkpoint_format", "gptq") == "gptq":
            zeros = zeros + 1
        scales = found["scales"].double().numpy().T
        size, groups = setting(config, module, "group_size"), scales.shape[1]
        size = size if type(size) is int and size > 0 and -(-k // size) == groups else -(-k // groups)
        g = found["g_idx"].numpy() if "g_idx" in found else np.arange(k) // size
        weights[module] = (codes - zeros[:, g]) * scales[:, g]
    return weights


def setting(config: dict, module: str, key: str):
    """What the config says of one module: its first rule for it, else the value for all."""
    for rule, values in (config.get("dynamic") or {}).items():
        if re.match(rule.removeprefix("+:"), module):
            return values.get(key, config.get(key))
    return config.get(key)


def serve(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """{served layer: its output}, as vLLM would load the folder under --quantization foem."""
    config = FoemConfig.from_config(json.loads((folder / "config.json").read_text()))
    config.maybe_update_config(str(folder))
    layers = block(config, SIZES, torch.float32, PREFIX)
    if not hasattr(layers["lm_head"].quant_method, "specs"):
        raise FoemError("lm_head is not quantized: vLLM then looks for its weight")
    load(layers, load_file(folder / FILE))
    return {name: layer.quant_method.apply(layer, inputs(layer.input_size)) for name, layer in layers.items()}


def inputs(columns: int) -> torch.Tensor:
    return torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))


def agrees(found: dict[str, torch.Tensor], folder: pathlib.Path) -> bool:
    weights = says(folder, SHAPES)
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, y in found.items():
        parent, _, last = name.rpartition(".")
        w = np.concatenate([weights[f"{parent}.{part}" if parent else part] for part in fused.get(last, (last,))])
        x = inputs(w.shape[1]).double().numpy()
        room = 1e-4 * (np.abs(x) @ np.abs(w).T + np.abs(w).max(1))  # float32 sums of up to 255 codes a scale
        if not (np.abs(y.double().numpy() - x @ w.T) <= room).all():
            return False
    return True


def run(case: int, bases: dict, folder: pathlib.Path, damages: list, serve, agrees) -> tuple[str, str]:
    """(what was done, what came of it). serve(folder) -> outputs; agrees(outputs, folder): whether they are what it says."""
    r = random.Random(case)
    base, damage = r.choice(sorted(bases)), r.choice(damages)
    stored, config = bases[base]
    save_file(stored, folder / FILE)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).unlink(missing_ok=True)
    damage(folder, r)
    what = f"case {case}: {damage.__name__} of {base}"
    try:
        found = serve(folder)
    except FoemError as error:
        assert len(str(error)) > 30, what
        return what, "refused"
    except (KeyError, AttributeError) as error:  # a tensor that no layer has; vLLM stops there too
        assert "header" in what or "edit_tensor" in what, (what, error)
        return what, "unknown tensor"
    except Exception as error:
        return what, f"raised {type(error).__name__}: {error}"
    return what, "served" if agrees(found, folder) else "SERVED AS GARBAGE"


def bad(results: list[tuple[str, str]]) -> str:
    """The cases that should not be, a line each."""
    fine = ("refused", "served", "unknown tensor")
    return "\n".join(f"{what}: {outcome}" for what, outcome in results if outcome not in fine)


def test_undamaged_checkpoints_are_served(single_rank, bases, tmp_path):
    for base, (stored, config) in bases.items():
        save_file(stored, tmp_path / FILE)
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert agrees(serve(tmp_path), tmp_path), base


def test_damaged_checkpoints_are_refused_or_served_as_what_they_say(single_rank, bases, tmp_path):
    results = [run(case, bases, tmp_path, DAMAGES, serve, agrees) for case in range(CASES)]
    assert not bad(results), bad(results)
    lies = [outcome for what, outcome in results if re.search("other_version of (asym|act-order|int3)", what)]
    assert lies and set(lies) == {"refused"}
    outcomes = [outcome for _, outcome in results]
    assert outcomes.count("refused") > CASES // 3 and outcomes.count("served") > CASES // 10  # the fuzz does both
