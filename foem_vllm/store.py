"""Where activations wait: on the device that made them, in host memory, or in a file, each while there is room.

The hidden states of a calibration text are a few gigabytes for a large model, and several of them are needed at once. They are
put away batch by batch and fetched batch by batch, so that what has no room in memory costs a read and a write, not the run.
"""

from __future__ import annotations

import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator

import torch

from foem_vllm.errors import FoemError


def available_memory(group: pathlib.Path = pathlib.Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that can be had now: what the system and the control group of this process still allow. Copies of
    files that were read, weights for instance, count among what the group has, but give way."""
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    try:
        limit, held = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - held + int(parts["active_file"]) + int(parts["inactive_file"]))
    except (OSError, ValueError):  # no control group, or one without a limit
        pass
    return free


def held_at_most() -> int:
    """Bytes of host memory that this process has held at most. (What getrusage says of a process begins with its parent's.)"""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


class Store:
    """host, device: bytes that may be held in host memory and, for tensors on another device, there; beyond them tensors go into
    an unnamed file in `folder`, which disappears with the process. Without limits everything stays where it is."""

    def __init__(self, folder: pathlib.Path | None = None, host: float = math.inf, device: float = math.inf):
        self.folder, self.room = folder, {"host": host, "device": device}
        self.spilled = 0  # bytes of the file that are in use
        self._file = None
        self._end = 0
        self._holes: dict[int, list[int]] = {}  # size -> offsets that are free again

    def put(self, tensor: torch.Tensor) -> Held:
        """Put a tensor away; dropping what is returned frees its room."""
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type != "cpu":
            if self.room["device"] >= size:
                return Held(self, "device", size, tensor, tensor)
            home, tensor = tensor, tensor.cpu()
        else:
            home = tensor
        if self.room["host"] >= size:
            return Held(self, "host", size, home, tensor)
        return Held(self, "file", size, home, self._write(tensor, size))

    def _write(self, tensor: torch.Tensor, size: int) -> int:
        holes = self._holes.get(size)
        offset = holes.pop() if holes else self._end
        self._end = max(self._end, offset + size)
        data = memoryview(_bytes(tensor.contiguous()))
        at = offset
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)
            while data:
                written = os.pwrite(self._file.fileno(), data, at)
                data, at = data[written:], at + written
        except OSError as error:
            raise FoemError(
                f"{self.folder}: activations that have no room in memory could not be written ({error}); free some space, or "
                "lower --samples or --seq-len"
            ) from error
        self.spilled += size
        return offset

    def read(self, offset: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype)
        data = memoryview(_bytes(out))
        while data:
            count = os.preadv(self._file.fileno(), [data], offset)
            data, offset = data[count:], offset + count
        return out

    def release(self, offset: int, size: int) -> None:
        self.spilled -= size
        self._holes.setdefault(size, []).append(offset)


class Held:
    """One tensor that is put away."""

    def __init__(self, store: Store, place: str, size: int, home: torch.Tensor, content: torch.Tensor | int):
        self._store, self._place, self._size, self._content = store, place, size, content
        self._like = home.device, home.shape, home.dtype
        if place != "file":
            store.room[place] -= size

    def get(self) -> torch.Tensor:
        """The tensor, on the device that it came from. Not to be written to."""
        device, shape, dtype = self._like
        content = self._store.read(self._content, shape, dtype) if self._place == "file" else self._content
        return content.to(device)

    def __del__(self):
        if self._place == "file":
            self._store.release(self._content, self._size)
        else:
            self._store.room[self._place] += self._size


class Batches:
    """A list of tensors that are put away."""

    def __init__(self, store: Store, tensors: Iterable[torch.Tensor | Held] = ()):
        self.store = store
        self._held = [t if isinstance(t, Held) else store.put(t) for t in tensors]

    def fork(self) -> Batches:
        """Another list of the same tensors."""
        return Batches(self.store, self._held)

    def append(self, tensor: torch.Tensor) -> None:
        self._held.append(self.store.put(tensor))

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (held.get() for held in self._held)

    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        return [held.get() for held in self._held[index]] if isinstance(index, slice) else self._held[index].get()

    def __setitem__(self, index: int, tensor: torch.Tensor | Held) -> None:
        self._held[index] = None  # its room is free for what comes
        self._held[index] = tensor if isinstance(tensor, Held) else self.store.put(tensor)


def _bytes(tensor: torch.Tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy()
