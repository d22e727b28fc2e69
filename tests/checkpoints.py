"""GPTQ checkpoints for tests, rounded to nearest: every variant of the format in a second, without calibration."""
from __future__ import annotations

import json
import pathlib
import re
import shutil

import torch
from safetensors.torch import load_file, save_file

from foem_vllm.format import FormatConfig, Quantized, QuantSpec, dequantize, pack
from foem_vllm.integrity import file_digest

LINEARS = (  # ends of their names
    "_proj", "_proj_with_mqa", ".w1", ".w2", ".w3", ".query_key_value", ".dense", ".dense_h_to_4h", ".dense_4h_to_h",
)  # fmt: skip


def rtn(w: torch.Tensor, spec: QuantSpec, smallest_zero: int = 1, order: int = 0) -> Quantized:
    """w [N, K] -> codes, fp16 scales, zeros of at least `smallest_zero`; act_order "full" permutes groups over K, by `order`."""
    n, k = w.shape
    groups, top = spec.groups(k), (1 << spec.bits) - 1
    size = k if spec.group_size == -1 else spec.group_size
    g_idx = torch.arange(k) // size
    if spec.desc_act:
        # Equal K, equal order: fused modules agree.
        g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k + order))]
    scales, zeros = torch.empty(n, groups), torch.full((n, groups), float(spec.mid))
    for g in range(groups):
        part = w[:, g_idx == g].float()
        if spec.symmetric:
            scales[:, g] = part.abs().amax(1) / (top - spec.mid)
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, g] = ((high - low) / (top - smallest_zero)).clamp(min=2**-14)  # rows of padding tokens are zero
            zeros[:, g] = (-low / scales[:, g]).round().clamp(smallest_zero, top)
    scales = scales.half().float().clamp(min=2**-14)
    codes = (w.float() / scales[:, g_idx] + zeros[:, g_idx]).round().clamp(0, top)
    return Quantized(codes.to(torch.uint8), scales, None if spec.symmetric else zeros.to(torch.uint8),
                     g_idx.int() if spec.desc_act else None)


def write_rtn_checkpoint(src: pathlib.Path, out: pathlib.Path, spec: QuantSpec, checkpoint_format: str = "gptq", *,
                         foem: bool = False, lm_head: bool = False, dynamic: dict | None = None) -> pathlib.Path:
    """Quantize the linears of `src` (one model.safetensors) into `out`; `out`/dense gets them dequantized, in float32.

    foem: write `meta.foem` with checksums, as `foem quantize` does. lm_head: untie and quantize it too. dynamic: rules.
    """
    dense_dir = out / "dense"
    dense_dir.mkdir(parents=True)
    tensors = load_file(src / "model.safetensors")
    config = json.loads((src / "config.json").read_text("utf-8"))
    if lm_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        config["tie_word_embeddings"] = False
    rules = FormatConfig(spec, checkpoint_format, lm_head, dynamic)
    stored, dense = {}, {}
    for name, w in tensors.items():
        module = name.removesuffix(".weight")
        linear = module.endswith(LINEARS) or (lm_head and module == "lm_head")
        chosen = rules.spec_for(module) if linear else None
        if chosen is None:
            stored[name], dense[name] = w, w.float()
            continue
        expert = re.search(r"experts\.(\d+)", module)  # each has its own order of columns
        q = rtn(w, chosen, 1 if checkpoint_format == "gptq" else 0, int(expert[1]) if expert else 0)
        dense[name] = dequantize(q, chosen)
        stored.update({f"{module}.{key}": t for key, t in pack(q, chosen, checkpoint_format).items()})
    for path in src.iterdir():
        if path.is_file() and path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, out)
            shutil.copy(path, dense_dir)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, dense_dir / "model.safetensors", metadata={"format": "pt"})
    meta = {"foem": {"sha256": {"model.safetensors": file_digest(out / "model.safetensors")}}} if foem else None
    write_config(out, {**config, "quantization_config": FormatConfig(spec, checkpoint_format, lm_head, dynamic, meta).to_json()})
    write_config(dense_dir, {**config, "dtype": "float32"})
    return out


def write_config(folder: pathlib.Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")


def edit_config(folder: pathlib.Path, **changes) -> None:
    """Change keys of quantization_config in `folder`."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"].update(changes)
    write_config(folder, config)


def drop(folder: pathlib.Path, *names: str) -> None:
    """Remove tensors from the only file of `folder`."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name not in names}, folder / "model.safetensors", {"format": "pt"})
