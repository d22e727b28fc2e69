"""Several processes that quantize one model together: which part of the text each of them runs, and what they exchange.

`torchrun --nproc-per-node N -m foem_vllm quantize ...` starts them, on one machine or more; starting, restarting and ending them
is torchrun's business. Batches of the calibration text are dealt out in turn, moments are added up over all, and each process
solves some rows of every matrix. Only process 0 writes. Without torchrun there is one process, and everything here does nothing.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from foem_vllm import command
from foem_vllm.errors import FoemError

WAIT = datetime.timedelta(days=7)  # torchrun ends the others when one has died; a slow disk is no reason to
T = TypeVar("T")


def started() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if started() else 0


def size() -> int:
    return dist.get_world_size() if started() else 1


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """How many of the processes share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if started() else 1


def who() -> str:
    """What a message that only this process gives begins with; empty where it is alone."""
    return f"process {os.environ.get('RANK', 0)} of {os.environ['WORLD_SIZE']}: " if size() > 1 else ""


def start(device: torch.device) -> None:
    """Join the others, if torchrun started this process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or started():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _exchange(dist.init_process_group, "nccl" if device.type == "cuda" else "gloo", timeout=WAIT)


def stop() -> None:
    if started():
        dist.destroy_process_group()


def number(batch: int) -> int:
    """Which batch of the whole text this process's batch number `batch` is."""
    return rank() + batch * size()


def total(value: float) -> float:
    """The sum of a number over all processes."""
    return sum(gathered(value))


def total_(tensor: torch.Tensor) -> None:
    """Replace a tensor by its sum over all processes."""
    if size() > 1:
        _exchange(dist.all_reduce, tensor)


def gathered(value: T) -> list[T]:
    """What each process has."""
    if size() == 1:
        return [value]
    found = [None] * size()
    _exchange(dist.all_gather_object, found, value)
    return found


def agreed(value: T) -> T:
    """What process 0 has."""
    if size() == 1:
        return value
    found = [value]
    _exchange(dist.broadcast_object_list, found, 0)
    return found[0]


def share(rows: int) -> slice:
    """The rows of a matrix that this process solves."""
    return slice(rows * rank() // size(), rows * (rank() + 1) // size())


def joined(part: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, ...] from every process's share of them."""
    if size() == 1:
        return part
    parts = []
    for r in range(size()):
        count = rows * (r + 1) // size() - rows * r // size()
        parts.append(part.contiguous() if r == rank() else part.new_empty(count, *part.shape[1:]))
        _exchange(dist.broadcast, parts[-1], r)
    return torch.cat(parts)


def sent(tensor: torch.Tensor | None, source: int, like: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """Process 0 gets the tensor of process `source`; like: an empty one for it."""
    if source == 0 or rank() not in (0, source):
        return tensor if rank() == 0 else None
    if rank() == source:
        _exchange(dist.send, tensor.contiguous(), 0)
        return None
    found = like()
    _exchange(dist.recv, found, source)
    return found


def _exchange(call: Callable, *args, **options) -> None:
    try:
        call(*args, **options)
    except RuntimeError as error:
        me = f"process {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)}"
        raise FoemError(
            f"{me}: another process has ended or cannot be reached ({str(error).splitlines()[0]}); torchrun says which; finished "
            f"blocks are kept, start all of them again with: {command.resume()}"
        ) from error
