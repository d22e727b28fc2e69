"""Read a checkpoint folder: linears, sizes, what `foem inspect` shows, and whether it holds what was computed."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib

import torch

from foem_vllm.errors import FoemError
from foem_vllm.format import TENSORS, FormatConfig, Quantized, QuantSpec, read_config, unpack
from foem_vllm.integrity import read_headers, tensor_bytes
from foem_vllm.report import REPORT_FILE
from foem_vllm.spec import group_index
from foem_vllm.stream import Weights


def digest(q: Quantized, spec: QuantSpec) -> str:
    """Hash of all that the dequantized weight follows from: codes, scales, zero points and the groups of columns."""
    k = q.codes.shape[1]
    zeros = torch.tensor([spec.mid]) if q.zeros is None else q.zeros
    g_idx = group_index(k, spec) if q.g_idx is None else q.g_idx
    whole = hashlib.blake2b(digest_size=16)
    for part in (q.codes, q.scales.to(torch.float16), zeros.to(torch.uint8), g_idx.to(torch.int32)):
        whole.update(repr(tuple(part.shape)).encode())
        whole.update(part.detach().cpu().contiguous().numpy())
    return whole.hexdigest()


def quantized_modules(names) -> list[str]:
    """Modules that have a qweight, sorted."""
    return sorted(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))


def read_linear(weights: Weights, module: str, config: FormatConfig) -> tuple[Quantized, QuantSpec]:
    """Codes and spec of one module of a checkpoint, checked."""
    spec = config.spec_for(module)
    if spec is None:
        raise FoemError(f"{module} has a qweight, but a `dynamic` rule in config.json excludes it; correct the rule")
    tensors = {key: weights.read(f"{module}.{key}") for key in TENSORS if f"{module}.{key}" in weights.files}
    return unpack(tensors, spec, config.zero_format, module), spec


def verify(folder: pathlib.Path, digests: dict[str, str]) -> None:
    """Re-open a written checkpoint: every module holds what the solver returned, none is missing.

    Raises FoemError naming the module; a failure here means a bad disk or a bug, never bad input.
    """
    config, weights = read_config(folder), Weights(folder)
    found = quantized_modules(weights.files)
    if found != sorted(digests):
        raise FoemError(
            f"{folder}: verification found {len(found)} quantized modules, expected {len(digests)}; please report this"
        )
    for module, expected in digests.items():
        q, spec = read_linear(weights, module, config)
        if digest(q, spec) != expected:
            raise FoemError(f"{module}: what was written differs from what was computed; check the disk, then please report this")


def tensor_sizes(folder: pathlib.Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name -> (shape, bytes) of every stored tensor, from the headers."""
    return {name: (shape, tensor_bytes(dtype, shape)) for name, (dtype, shape) in read_headers(folder).items()}


def storage(folder: pathlib.Path) -> dict[str, float]:
    """bytes: of all tensors; bits_per_weight: of the quantized linears, grid included; quantized_weights: how many.

    An unquantized folder gives bits_per_weight of its stored dtype.
    """
    sizes = tensor_sizes(folder)
    modules = set(quantized_modules(sizes))
    total = sum(size for _, size in sizes.values())
    if not modules:
        numbers = sum(math.prod(shape) for shape, _ in sizes.values())
        return {"bytes": total, "bits_per_weight": 8 * total / max(numbers, 1), "quantized_weights": 0}
    config = read_config(folder)
    bits = sum(
        8 * size
        for name, (_, size) in sizes.items()
        if name.rpartition(".")[0] in modules and name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx")
    )
    weights = sum(sizes[f"{m}.qweight"][0][0] * 32 // config.spec_for(m).bits * sizes[f"{m}.qweight"][0][1] for m in modules)
    return {"bytes": total, "bits_per_weight": bits / weights, "quantized_weights": weights}


def read_report(folder: pathlib.Path) -> dict:
    """foem_report.json of a checkpoint with what its files say: `storage`, and `sha256` of the shards.

    Raises FoemError when there is no report.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        raise FoemError(f"{path}: no such file; only `foem quantize` writes one")
    try:
        report = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise FoemError(f"{path}: not JSON ({error}); the file was damaged, quantize or download it again") from None
    sha256 = ((read_config(folder).meta or {}).get("foem") or {}).get("sha256", {})
    return {**report, "storage": storage(folder), "sha256": sha256}


def describe(folder: pathlib.Path) -> dict:
    """Contents of a checkpoint for `foem inspect`: format, recipe, layers (with errors where a report is there), size."""
    if not folder.is_dir():
        raise FoemError(f"{folder}: no such folder")
    config, weights = read_config(folder), Weights(folder)
    reported = read_report(folder) if (folder / REPORT_FILE).is_file() else {}
    layers = reported.get("layers", [])
    known = {layer["name"] for layer in layers}
    for module in quantized_modules(weights.files):
        if module not in known:
            q, spec = read_linear(weights, module, config)
            layers.append(
                {
                    "name": module,
                    "n": q.codes.shape[0],
                    "k": q.codes.shape[1],
                    "bits": spec.bits,
                    "group_size": spec.group_size,
                    "relative": None,
                    "notes": [],
                }
            )
    return {
        **storage(folder),
        "checkpoint_format": config.checkpoint_format,
        "recipe": (config.meta or {}).get("foem", {}),
        "by_kind": reported.get("by_kind", {}),
        "tuning": reported.get("tuning"),
        "tokens_of_experts": reported.get("tokens_of_experts", {}),
        "layers": layers,
    }
