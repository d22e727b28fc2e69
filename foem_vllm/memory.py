"""When memory runs out: smaller batches of text while nothing is finished, else a message that says what to change."""

from __future__ import annotations

import gc
import logging
import pathlib
from collections.abc import Callable
from typing import TypeVar

import torch

from foem_vllm import command, distributed
from foem_vllm.errors import FoemError

SMALLER = (1, 2, 4)  # batches are that much smaller in the first attempt, the second, the third
SAID = ("llocate memory", "ALLOC_FAILED")  # by torch, the system and cuBLAS, in errors that have no type of their own
log = logging.getLogger("foem_vllm")
T = TypeVar("T")


def ran_out(error: BaseException) -> str | None:
    """Which memory was not to be had, "device" or "host"; None for every other error."""
    if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
        return "device"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError | OSError) and any(s in str(error) for s in SAID)):
        return "host"
    return None


def with_smaller_batches(run: Callable[[int], T], partial: pathlib.Path) -> T:
    """run(1); where memory runs out before there is anything to resume in `partial`, run(2), then run(4).

    Raises FoemError when that is not enough. Several processes are not started again: the others would wait for this one.
    """
    for smaller in SMALLER:
        try:
            return run(smaller)
        except Exception as error:
            if (kind := ran_out(error)) is None:
                raise
            said = f"{distributed.who()}out of {kind} memory ({str(error).splitlines()[0] if str(error) else 'MemoryError'})"
            if smaller == SMALLER[-1] or partial.exists() or distributed.size() > 1:
                raise FoemError(f"{said}; {advice(partial)}") from error
            log.warning("%s; once more with batches half the size", said)
        gc.collect()  # only now: the error held all that the attempt had in memory
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def advice(partial: pathlib.Path) -> str:
    less = "fewer --samples, a shorter --seq-len or less --activation-memory"
    if not partial.exists():
        return f"use {less}"
    return f"free some, or use less --activation-memory, and go on with: {command.resume()}; or remove {partial} and use {less}"
