"""Write a quantized checkpoint folder so that it is either whole or absent, and read it back to prove it.

Shards are written into a hidden folder beside the target, which is renamed at the very end: an interrupted run leaves nothing
that loads. Left out so far: resuming (the hidden folder is removed on failure).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import tempfile

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from foem_vllm.errors import FoemError
from foem_vllm.format import TENSORS, FormatConfig, Quantized, QuantSpec, dequantize, pack, read_config, unpack
from foem_vllm.html_report import render
from foem_vllm.integrity import file_digest, read_headers
from foem_vllm.model_card import model_card
from foem_vllm.report import HTML_FILE, REPORT_FILE
from foem_vllm.stream import Weights

SHARD_BYTES = 2 * 1024**3
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")
OURS = ("config.json", "quantize_config.json", "model.safetensors.index.json", "README.md", REPORT_FILE, HTML_FILE)


def check_output(out: pathlib.Path) -> None:
    """Refuse an output folder that exists and is not empty, or whose parent cannot be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FoemError(f"{out}: exists and is not empty; choose another output folder or remove this one")
    parent = next(p for p in (out.absolute().parent, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise FoemError(f"{parent}: not writable; choose another output folder")


def check_space(out: pathlib.Path, needed: int) -> None:
    """Refuse to start when the disk cannot hold `needed` bytes."""
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise FoemError(
            f"{parent}: {free / 1e9:.2f} GB free, but the checkpoint needs about {needed / 1e9:.2f} GB; free some space or "
            "choose another output folder"
        )


def digest(q: Quantized, spec: QuantSpec) -> str:
    """Hash of the dequantized weight, bit for bit."""
    return hashlib.blake2b(dequantize(q, spec).cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


class Writer:
    """Collects tensors into shards under a hidden folder; `finish` completes and renames it. Use as a context manager."""

    def __init__(self, out: pathlib.Path, shard_bytes: int = SHARD_BYTES):
        check_output(out)
        self.out, self.shard_bytes = out.absolute(), shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.bytes = self.total = 0
        self.shards: list[list[str]] = []
        self.digests: dict[str, str] = {}

    def __enter__(self) -> Writer:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{self.out.name}.partial-", dir=self.out.parent))
        return self

    def __exit__(self, *error) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.bytes + size > self.shard_bytes:
            self._flush()
        self.pending[name] = tensor
        self.bytes += size
        self.total += size

    def add_linear(self, module: str, q: Quantized, spec: QuantSpec, checkpoint_format: str) -> None:
        """The four tensors of a quantized linear; remembers what they must dequantize to."""
        q = Quantized(*(None if t is None else t.cpu() for t in q))
        for key, tensor in pack(q, spec, checkpoint_format).items():
            self.add(f"{module}.{key}", tensor)
        self.digests[module] = digest(q, spec)

    def _path(self, shard: int) -> pathlib.Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def _flush(self) -> None:
        if not self.pending:
            return
        with disk_errors(self.folder):
            save_file(self.pending, self._path(len(self.shards)), metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending, self.bytes = {}, 0

    def finish(self, source: pathlib.Path, config: dict, quantization: FormatConfig, report: dict) -> None:
        """Name the shards, write config, index, reports and model card, copy the tokenizer's files, verify, rename."""
        self._flush()
        weight_map, digests = {}, {}
        with disk_errors(self.folder):
            for i, names in enumerate(self.shards):
                final = (
                    "model.safetensors" if len(self.shards) == 1 else f"model-{i + 1:05d}-of-{len(self.shards):05d}.safetensors"
                )
                self._path(i).rename(self.folder / final)
                weight_map.update(dict.fromkeys(names, final))
                digests[final] = file_digest(self.folder / final)
            if len(self.shards) > 1:
                write_json(
                    self.folder / "model.safetensors.index.json",
                    {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))},
                )
            quantization.meta.setdefault("foem", {})["sha256"] = digests
            section = quantization.to_json()
            write_json(self.folder / "config.json", {**config, "quantization_config": section})
            write_json(self.folder / "quantize_config.json", section)
            write_json(self.folder / REPORT_FILE, report)
            content = read_report(self.folder)
            (self.folder / HTML_FILE).write_text(render(content), "utf-8")
            (self.folder / "README.md").write_text(model_card(content), "utf-8")
            for file in sorted(source.iterdir()):
                if (
                    file.is_file()
                    and file.suffix not in WEIGHT_SUFFIXES
                    and file.name not in OURS
                    and not file.name.endswith(".index.json")
                ):
                    shutil.copyfile(file, self.folder / file.name)
        verify(self.folder, self.digests)
        umask = os.umask(0)
        os.umask(umask)
        self.folder.chmod(0o777 & ~umask)  # mkdtemp made it private
        if self.out.is_dir():
            self.out.rmdir()
        self.folder.rename(self.out)


class disk_errors:
    """Turn a failed write into one line with the remedy."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, (OSError, SafetensorError)):
            return
        code = getattr(error, "errno", None)
        full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
            f"os error {c}" in str(error) for c in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        )
        what = "the disk is full" if full else f"writing failed ({error})"
        raise FoemError(
            f"{self.folder.parent}: {what}; nothing was kept, free some space or choose another output folder"
        ) from error


def write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def quantized_modules(names) -> list[str]:
    """Modules that have a qweight, sorted."""
    return sorted(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))


def read_linear(weights: Weights, module: str, config: FormatConfig) -> tuple[Quantized, QuantSpec]:
    """Codes and spec of one module of a checkpoint, checked."""
    spec = config.spec_for(module)
    if spec is None:
        raise FoemError(f"{module} has a qweight, but a `dynamic` rule in config.json excludes it; correct the rule")
    tensors = {key: weights.read(f"{module}.{key}") for key in TENSORS if f"{module}.{key}" in weights.files}
    return unpack(tensors, spec, config.checkpoint_format, module), spec


def verify(folder: pathlib.Path, digests: dict[str, str]) -> None:
    """Re-open a written checkpoint: every module dequantizes to what the solver returned, none is missing.

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
    sizes = {}
    for name, (dtype, shape) in read_headers(folder).items():
        bits = re.search(r"\d+", dtype)  # BF16, I32, F8_E4M3; BOOL takes a byte
        sizes[name] = shape, math.prod(shape) * (int(bits.group()) if bits else 8) // 8
    return sizes


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
    report = folder / REPORT_FILE
    reported = json.loads(report.read_text("utf-8")) if report.is_file() else {}
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
