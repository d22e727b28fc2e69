"""Quantized checkpoints as ordinary floating-point models: what transformers can run anywhere, and the reference for serving.

Every module that has a `qweight` gets its `weight` back, scale * (code - zero); all other tensors pass through. Names stay as
they are stored, so transformers applies its own renaming and fusing (MoE experts, for instance).
"""
from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import torch
from safetensors.torch import save_file

from foem_vllm import models
from foem_vllm.checkpoint import quantized_modules, read_linear
from foem_vllm.format import CONFIG_FILES, TENSORS, dequantize, read_config
from foem_vllm.stream import Weights


def is_quantized(folder: str | pathlib.Path) -> bool:
    """Whether the folder's config.json (or a quantize_config.json) declares quantized weights. False for hub names."""
    folder = pathlib.Path(folder)
    config = folder / CONFIG_FILES[0]
    return (folder / CONFIG_FILES[1]).is_file() or (
        config.is_file() and bool(json.loads(config.read_text("utf-8")).get("quantization_config")))


def write_dequantized(folder: str | pathlib.Path, out: str | pathlib.Path, dtype: torch.dtype) -> None:
    """Write `out`: the checkpoint `folder` with weights in `dtype`, one shard per shard, config without quantization.

    Holds one dequantized shard in memory. Raises FoemError on a damaged checkpoint (see foem_vllm.format.check).
    """
    folder, out = pathlib.Path(folder), pathlib.Path(out)
    config, weights, transposed = read_config(folder), Weights(folder), stored_transposed(folder)
    modules = set(quantized_modules(weights.files))
    packed = {f"{module}.{key}" for module in modules for key in TENSORS}
    out.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for path in sorted(set(weights.files.values())):
        shard = {}
        for name in (n for n, p in weights.files.items() if p == path):
            if name not in packed:
                value = weights.read(name)
                shard[name] = value.to(dtype) if value.is_floating_point() else value
            elif name.endswith(".qweight"):
                module = name.removesuffix(".qweight")
                value = dequantize(*read_linear(weights, module, config)).to(dtype)
                shard[f"{module}.weight"] = value.T if module in transposed else value
        save_file({name: t.contiguous() for name, t in shard.items()}, out / path.name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, path.name)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    elif (only := next(iter(weight_map.values()))) != "model.safetensors":
        (out / only).rename(out / "model.safetensors")
    model_config = json.loads((folder / "config.json").read_text("utf-8"))
    model_config.pop("quantization_config", None)
    model_config.pop("torch_dtype", None)
    model_config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(model_config, indent=2))
    for path in folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model", ".py") and not (out / path.name).exists() \
                and path.name not in ("quantize_config.json", "model.safetensors.index.json"):
            shutil.copyfile(path, out / path.name)


def stored_transposed(folder: pathlib.Path) -> set[str]:
    """Modules whose weight transformers wants [K, N]. Models that bring their own code are taken to have none."""
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    if raw.get("auto_map"):
        return set()
    from transformers import AutoConfig
    raw.pop("quantization_config", None)
    return set(models.find_transposed(models.build_empty(AutoConfig.for_model(**raw), torch.float32)))


@contextlib.contextmanager
def dequantized_folder(folder: str | pathlib.Path, dtype: torch.dtype = torch.bfloat16) -> Iterator[str]:
    """A folder that transformers loads: a temporary dequantized copy, or `folder` itself when it is not quantized."""
    if not is_quantized(folder):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory(prefix="foem-dequantized-") as copy:
        write_dequantized(folder, copy, dtype)
        yield copy


def load_dequantized(folder: str | pathlib.Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
                     trust_remote_code: bool = False):
    """The causal LM in `folder`, quantized or not, as a transformers model in `dtype`, in evaluation mode.

    float32 shows the quantization alone; bfloat16 adds the rounding of dequantized weights that a serving engine may also do.
    """
    from transformers import AutoConfig
    with dequantized_folder(folder, dtype) as plain:
        config = AutoConfig.from_pretrained(plain, trust_remote_code=trust_remote_code)
        model = models.auto_class(config).from_pretrained(plain, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.to(device).eval()
