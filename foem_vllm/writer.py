"""Write a quantized checkpoint folder so that it is either whole or absent, and so that an interrupted run can go on.

What will be stored is known before the first block, so the files are laid out at once, at their full size (a disk that is too
small shows then, not at the last block), and every tensor is written to its place. All of it happens in a hidden folder beside
the target, `.NAME.partial`: the checkpoint, which is renamed at the very end, and a journal, which says what is safely there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from foem_vllm import command, distributed
from foem_vllm.checkpoint import digest, read_report, verify
from foem_vllm.errors import FoemError
from foem_vllm.format import TENSORS, FormatConfig, Quantized, QuantSpec, pack, stored_shapes, unpack
from foem_vllm.html_report import render
from foem_vllm.integrity import INDEX, file_digest, tensor_bytes
from foem_vllm.model_card import model_card
from foem_vllm.report import HTML_FILE, REPORT_FILE

SHARD_BYTES = 2 * 1024**3
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")
OURS = ("config.json", "quantize_config.json", INDEX, "README.md", REPORT_FILE, HTML_FILE)
log = logging.getLogger("foem_vllm")
DTYPES = {torch.int32: "I32", None: "F16"}  # as safetensors calls those of `stored_shapes`; scales are written in float16
Header = tuple[str, tuple[int, ...]]  # a tensor's dtype, as safetensors calls it, and shape


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


def headers_of(module: str, spec: QuantSpec, k: int, n: int) -> dict[str, Header]:
    """What is stored of a quantized linear [n, k]."""
    return {f"{module}.{key}": (DTYPES[dtype], shape) for key, (shape, dtype) in stored_shapes(spec, k, n).items()}


def lay_out(tensors: dict[str, Header], shard_bytes: int) -> dict[str, dict[str, Header]]:
    """{file: its tensors, in the order of their bytes}: filled in the given order; in a file wide dtypes first, so that all
    are aligned."""
    shards: list[dict[str, Header]] = [{}]
    filled = 0
    for name, header in tensors.items():
        size = tensor_bytes(*header)
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = header
        filled += size
    shards = [dict(sorted(s.items(), key=lambda item: (-tensor_bytes(item[1][0], (1,)), item[0]))) for s in shards]
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def differences(before: dict, now: dict) -> str:
    """What is not the same in two dictionaries, for a message; empty when nothing is."""
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys)


class Writer:
    """The checkpoint that is being written into `out`. Use as a context manager: what is left of a run that fails is removed,
    unless its journal has entries and it can be resumed."""

    def __init__(self, out: pathlib.Path):
        self.out = out.absolute()
        self.partial = self.out.parent / f".{self.out.name}.partial"
        self.folder = self.partial / "checkpoint"
        self.untuned = self.partial / "untuned.safetensors"
        self.entries: list[dict] = []
        self.digests: dict[str, str] = {}
        self.places: dict[str, tuple[str, int, Header]] = {}
        self._journal = None
        self._files: dict[str, int] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error) -> None:
        self._close()
        if self._journal is None:
            return
        self._journal.close()
        if self.entries:
            log.warning(
                "%s: what is finished is kept there (steps: %d); go on with: %s",
                self.partial,
                len(self.entries),
                command.resume(),
            )
        else:
            shutil.rmtree(self.partial, ignore_errors=True)

    def earlier(self) -> dict:
        """The identity of an interrupted run that can be resumed; empty where there is none."""
        journal = self.partial / "journal.jsonl"
        lines = journal.read_bytes().split(b"\n")[:-1] if journal.is_file() else []
        return json.loads(lines[0]) if len(lines) > 1 else {}

    def tidy(self) -> None:
        """Do what a run left undone that was killed between the last renames, or behind them: what it was about to replace is
        back at its place, what it has no use for is gone."""
        if not self.partial.is_dir():
            return
        replaced = self.partial / "replaced"
        with contextlib.suppress(BlockingIOError), open(self.partial / "journal.jsonl", "ab") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it is being written right now
            if replaced.is_dir() and not self.out.exists():
                replaced.rename(self.out)
            elif (self.out / REPORT_FILE).is_file() and not self.folder.exists():
                shutil.rmtree(self.partial, ignore_errors=True)

    def open(self, identity: dict, tensors: dict[str, Header], resume: bool = False) -> None:
        """Lay the files out, or find them as an earlier run left them: its entries of the journal are then in `entries`.

        identity: what decides the result, compared with the earlier run's. Raises FoemError when that differs, when there is
        an earlier run and `resume` is not asked for, when another process is at it, and when the disk is too small.
        """
        shards = lay_out(tensors, SHARD_BYTES)
        self.places = dict(_places(shards))
        found = self._lock(identity)
        if found is None:
            self._start(identity, shards)
        elif not resume:
            self._journal = self._journal.close()  # nothing of it is to be removed
            raise FoemError(
                f"{self.partial}: an interrupted run is there (finished steps: {len(found)}); --resume goes on with it, or "
                "remove that folder"
            )
        else:
            self.entries = found
            for entry in found:
                self.digests.update(entry["digests"])
        self._files = {name: os.open(self.folder / name, os.O_RDWR) for name in shards}
        if self.untuned.is_file():
            self._restore()
        distributed.agreed(self.entries)

    def _lock(self, identity: dict) -> list[dict] | None:
        """Entries of the journal that is there, compared with `identity`; None when there are none. Locks it for this process."""
        with disk_errors(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            self._journal = open(self.partial / "journal.jsonl", "a+b", buffering=0)  # closing it must not fail on a full disk
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._journal = self._journal.close()
            raise FoemError(f"{self.partial}: another process is writing it; wait, or choose another output folder") from None
        self._journal.seek(0)
        lines, good = [], 0
        for line in self._journal:
            if not line.endswith(b"\n"):
                break  # torn when the run was interrupted
            lines.append(json.loads(line))
            good += len(line)
        self._journal.truncate(good)
        if len(lines) < 2:
            return None
        if differing := differences(lines[0], json.loads(json.dumps(identity))):
            self._journal = self._journal.close()
            raise FoemError(
                f"{self.partial}: the interrupted run there had other settings: {differing}; resume with the same "
                "ones, or remove that folder"
            )
        return lines[1:]

    def _start(self, identity: dict, shards: dict[str, dict[str, Header]]) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.untuned.unlink(missing_ok=True)
        self._journal.truncate(0)
        sizes = {name: _head(tensors)[1] for name, tensors in shards.items()}
        check_space(self.out, sum(sizes.values()))
        with disk_errors(self.partial):
            self.folder.mkdir()
            for name, tensors in shards.items():
                with open(self.folder / name, "wb") as file:
                    file.write(_head(tensors)[0])
                    file.flush()
                    os.posix_fallocate(file.fileno(), 0, sizes[name])
                    os.fsync(file.fileno())
            self._note(identity)

    def _note(self, line: dict) -> None:
        data = memoryview(json.dumps(line).encode() + b"\n")
        while data:
            data = data[self._journal.write(data) :]
        os.fsync(self._journal.fileno())

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor to its place; one that is not of the layout's dtype and shape is a bug."""
        file, offset, (dtype, shape) = self.places[name]
        data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        if tuple(tensor.shape) != shape or len(data) != tensor_bytes(dtype, shape):
            raise FoemError(f"{name}: laid out as {dtype} {list(shape)}, but {tensor.dtype} {list(tensor.shape)} was made")
        with disk_errors(self.partial):
            while data:
                written = os.pwrite(self._files[file], data, offset)
                data, offset = data[written:], offset + written

    def add_linear(self, module: str, q: Quantized, spec: QuantSpec, checkpoint_format: str) -> None:
        """The four tensors of a quantized linear; remembers what they must dequantize to."""
        q = Quantized(*(None if t is None else t.cpu() for t in q))
        for key, tensor in pack(q, spec, checkpoint_format).items():
            self.add(f"{module}.{key}", tensor)
        self.digests[module] = digest(q, spec)

    def done(self, entry: dict, modules: Iterable[str]) -> None:
        """What was added up to here is safe: a run that is resumed finds `entry` and the digests of `modules` in the journal."""
        with disk_errors(self.partial):
            for file in self._files.values():
                os.fsync(file)
            entry = {**entry, "digests": {module: self.digests[module] for module in modules}}
            self._note(entry)
        self.entries.append(entry)

    def _stored(self, name: str) -> torch.Tensor:
        """A tensor of a quantized linear, as the files have it."""
        file, offset, (dtype, shape) = self.places[name]
        data = bytearray(tensor_bytes(dtype, shape))
        os.preadv(self._files[file], [data], offset)
        return torch.frombuffer(data, dtype={"I32": torch.int32, "F16": torch.float16}[dtype]).view(shape)

    def set_aside(self, modules: Iterable[str]) -> None:
        """Keep the scales of linears that the journal has, before others take their place: a run that is resumed needs these."""
        new = self.untuned.with_suffix(".new")
        with disk_errors(self.partial):
            save_file({f"{m}.scales": self._stored(f"{m}.scales") for m in modules}, new)
            self._sync(new)
            new.rename(self.untuned)
            self._sync(self.partial)

    def _restore(self) -> None:
        """Put scales back that were set aside: what is in the files is then what the journal says."""
        with disk_errors(self.partial):
            for name, scales in load_file(self.untuned).items():
                self.add(name, scales)
            for file in self._files.values():
                os.fsync(file)
            self.untuned.unlink()

    def _sync(self, path: pathlib.Path) -> None:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)

    def read_linear(self, module: str, spec: QuantSpec, checkpoint_format: str) -> Quantized:
        """What an interrupted run has written of a linear. Raises FoemError when it is not what the journal says."""
        q = unpack({key: self._stored(f"{module}.{key}") for key in TENSORS}, spec, checkpoint_format, module)
        if digest(q, spec) != self.digests[module]:
            raise FoemError(f"{module}: damaged in {self.folder}; remove {self.partial} and start again")
        return distributed.agreed(q)

    def finish(self, source: pathlib.Path, config: dict, quantization: FormatConfig, report: dict) -> None:
        """Write config, index, reports and model card, copy the tokenizer's files, verify, rename.

        Raises FoemError when the disk is full or gives back something else than was written.
        """
        with disk_errors(self.partial):
            for file in self._files.values():
                os.fsync(file)
            self._close()
            files = sorted({file for file, _, _ in self.places.values()})
            if len(files) > 1:
                write_json(self.folder / INDEX, self._index())
            quantization.meta.setdefault("foem", {})["sha256"] = {name: file_digest(self.folder / name) for name in files}
            section = quantization.to_json()
            write_json(self.folder / "config.json", {**config, "quantization_config": section})
            write_json(self.folder / "quantize_config.json", section)
            write_json(self.folder / REPORT_FILE, report)
            content = read_report(self.folder)
            (self.folder / HTML_FILE).write_text(render(content), "utf-8")
            (self.folder / "README.md").write_text(model_card(content), "utf-8")
            for file in sorted(source.iterdir()):
                if _belongs(file):
                    shutil.copyfile(file, self.folder / file.name)
        verify(self.folder, self.digests)
        self._replace()

    def _index(self) -> dict:
        total = sum(tensor_bytes(*header) for _, _, header in self.places.values())
        weight_map = {name: file for name, (file, _, _) in sorted(self.places.items())}
        return {"metadata": {"total_size": total}, "weight_map": weight_map}

    def _replace(self) -> None:
        """The checkpoint takes the place of what is at `out`: an empty folder, or the checkpoint that it was made from."""
        with disk_errors(self.partial):
            if self.out.is_dir():
                self.out.rename(self.partial / "replaced")
            self.folder.rename(self.out)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.entries = []

    def _close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}


class Silent:
    """Stands for the writer in processes other than the first, which alone writes: what that found of an earlier run is known
    here too."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error) -> None:
        pass

    def open(self, *_) -> None:
        self.entries = distributed.agreed(None)

    def read_linear(self, *_) -> Quantized:
        return distributed.agreed(None)

    def add(self, *_) -> None:
        pass

    add_linear = done = finish = tidy = add

    def earlier(self) -> dict:
        return {}


def _belongs(file: pathlib.Path) -> bool:
    """Whether a file of the original model goes into the checkpoint as it is."""
    others = file.suffix in WEIGHT_SUFFIXES or file.name in OURS or file.name.endswith(".index.json")
    return file.is_file() and not others


def _head(tensors: dict[str, Header]) -> tuple[bytes, int]:
    """(the beginning of a safetensors file with these tensors, size of the whole file)."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def _places(shards: dict[str, dict[str, Header]]):
    """(tensor, (file, offset of its bytes, header)) of every tensor."""
    for file, tensors in shards.items():
        offset = len(_head(tensors)[0])
        for name, header in tensors.items():
            yield name, (file, offset, header)
            offset += tensor_bytes(*header)


class disk_errors:
    """Turn a failed write into one line with the remedy."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, (OSError, SafetensorError)):
            return
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full = getattr(error, "errno", None) in codes or any(f"os error {code}" in str(error) for code in codes)
        what = "the disk is full" if full else f"writing failed ({error})"
        raise FoemError(f"{self.folder.parent}: {what}; free some space or choose another output folder") from error


def write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
