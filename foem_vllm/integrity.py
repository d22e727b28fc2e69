"""Whether the files of a checkpoint are the ones that were written: checksums, and safetensors headers against file sizes.

Plain standard library: it runs in vLLM's front end before anything is loaded. Checksums cover what shapes cannot, such as a
flipped bit in a code; headers cover truncation also for checkpoints that carry no checksums.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import re
import struct
from concurrent.futures import ThreadPoolExecutor

from foem_vllm.errors import FoemError

INDEX = "model.safetensors.index.json"


def file_digest(path: str | pathlib.Path) -> str:
    """The sha256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def verify_files(folder: str | pathlib.Path, meta: dict | None) -> int:
    """Compare files of `folder` with `meta["foem"]["sha256"]`, {file name: sha256}; returns how many were compared.

    meta: the `meta` dictionary of quantization_config; without checksums in it nothing is compared. FOEM_SKIP_CHECKSUM=1
    skips the comparison. Raises FoemError naming the first file that is missing or differs.
    """
    foem = meta.get("foem") if isinstance(meta, dict) else None
    expected = foem.get("sha256") if isinstance(foem, dict) else None
    if not isinstance(expected, dict) or os.environ.get("FOEM_SKIP_CHECKSUM") == "1":
        return 0
    paths = {name: pathlib.Path(folder) / name for name in sorted(expected)}
    for path in paths.values():
        if not path.is_file():
            raise FoemError(f"{path} is missing, but config.json lists its checksum; download or quantize the checkpoint again")
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        for name, found in zip(paths, pool.map(file_digest, paths.values())):
            if found != expected[name]:
                raise FoemError(
                    f"{paths[name]} has sha256 {found[:12]}..., but config.json expects {str(expected[name])[:12]}...; "
                    "the file was damaged or changed, download or quantize it again (FOEM_SKIP_CHECKSUM=1 loads it anyway)"
                )
    return len(paths)


def weight_map(folder: pathlib.Path) -> dict[str, str] | None:
    """{tensor: file} of the index, None when there is none. Raises FoemError when it is damaged or names a missing file.

    AutoGPTQ called its shards, and their index, after the number of bits and the group size.
    """
    index = folder / INDEX
    if not index.is_file():
        others = list(folder.glob("*.safetensors.index.json"))
        if len(others) != 1:
            return None
        index = others[0]
    try:
        names = json.loads(index.read_text("utf-8"))["weight_map"]
        files = set(names.values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FoemError(f"{index}: no readable weight_map ({error!r}); the file is damaged, download it again") from None
    if not files:
        raise FoemError(f"{index} names no file; it is damaged, download it again")
    for name in files:
        if not isinstance(name, str) or not (folder / name).is_file():
            raise FoemError(f"{folder / str(name)} is missing, but {index.name} names it; download it again")
    return names


def weight_files(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files that hold the weights: those of the index, or all of them when there is none."""
    folder = pathlib.Path(folder)
    names = weight_map(folder)
    return sorted(folder.glob("*.safetensors")) if names is None else [folder / name for name in sorted(set(names.values()))]


def read_header(path: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (safetensors dtype, shape)} of one file.

    Raises FoemError when the file is shorter or longer than it says, and on a tensor whose bytes are not those of its shape.
    """
    size = path.stat().st_size
    again = "download or quantize it again"
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
        if not 0 < length <= size - 8:
            raise FoemError(f"{path} is truncated: {size} bytes do not hold its header; {again}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: (info["dtype"], tuple(info["shape"])) for name, info in header.items()}
            spans = {name: tuple(map(int, info["data_offsets"])) for name, info in header.items()}
            wrong = next((name for name in spans if not _fits(*tensors[name], *spans[name])), None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FoemError(f"{path}: the safetensors header is damaged ({error!r}); {again}") from None
    if wrong is not None:
        raise FoemError(
            f"{path}: {wrong} is {tensors[wrong][0]} {list(tensors[wrong][1])}, but its bytes are {list(spans[wrong])}; the "
            f"header is damaged, {again}"
        )
    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != end:
            raise FoemError(f"{path}: {name} begins at byte {start}, but byte {end} is next; the header is damaged, {again}")
        end = stop
    if 8 + length + end != size:
        raise FoemError(
            f"{path} is {size} bytes, but its header describes {8 + length + end}; it was cut off or damaged, {again}"
        )
    return tensors


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; dtype as safetensors calls it (BF16, I32, F8_E4M3; BOOL takes a byte)."""
    bits = re.search(r"\d+", dtype)
    return math.prod(shape) * (int(bits[0]) if bits else 8) // 8


def _fits(dtype: str, shape: tuple[int, ...], start: int, stop: int) -> bool:
    """Whether a tensor's bytes start .. stop are as many as its shape needs; True for dtypes that are not known here."""
    bits = re.search(r"\d+", dtype)
    if min(start, stop - start, *shape, 0) < 0:
        return False
    width = {"BOOL": 1}.get(dtype) or (int(bits[0]) / 8 if bits else None)
    return width is None or stop - start == math.prod(shape) * width


def read_headers(folder: str | pathlib.Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (safetensors dtype, shape)} of a whole checkpoint folder; empty when it holds no safetensors.

    Raises FoemError on damaged files (see `read_header`), and on an index that names a tensor or a file that is not there.
    """
    folder = pathlib.Path(folder)
    found = {path.name: read_header(path) for path in weight_files(folder)}
    for tensor, name in (weight_map(folder) or {}).items():
        if tensor not in found[name]:
            raise FoemError(f"{folder / name} holds no {tensor}, but {INDEX} says so; download both again")
    return {tensor: info for tensors in found.values() for tensor, info in tensors.items()}
