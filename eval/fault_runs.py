"""Runs of `foem quantize` that something is done to, and what they leave behind.

A run is a process forked from one that has imported everything and then calls the command line's entry point: seconds of imports
are saved, and the moments at which it is killed fall into the work. What is done to it from inside happens at a moment that the
run itself reaches, in its own process, before the work of that moment begins.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from foem_vllm import cli, pipeline, writer
from foem_vllm.checkpoint import describe
from foem_vllm.errors import FoemError
from foem_vllm.format import read_config
from foem_vllm.integrity import verify_files
from foem_vllm.stream import BlockInputs

WRITES = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.copyfile", "shutil.rmtree")
REMOVALS = ("os.rmdir", "os.remove")


class Done(NamedTuple):
    """code: as the shell gives it, minus the signal's number where one ended the process."""

    code: int
    said: str
    seconds: float

    @property
    def message(self) -> str:
        """The last line that is a message, without the folder of the run."""
        lines = [line for line in self.said.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("foem: error: ")]
        return (errors or lines or [""])[-1]


def start(words: list[str], log: pathlib.Path, prepare: Callable[[], None] | None = None) -> int:
    """Fork a process that runs `foem` with these words; prepare: called in it before. Returns its number."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.argv = ["foem", *words]
        if prepare:
            prepare()
        cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(
    words: list[str], prepare: Callable[[], None] | None = None, after: float | None = None, with_signal: int = signal.SIGKILL
) -> Done:
    """Run `foem` to its end; after: seconds after which it gets a signal."""
    out = pathlib.Path(words[2])
    log = out.parent.parent / f"{out.parent.name}.log"
    begun = time.perf_counter()
    pid = start(words, log, prepare)
    if after is not None:
        time.sleep(after)
        os.kill(pid, with_signal)
    _, status = os.waitpid(pid, 0)
    return Done(os.waitstatus_to_exitcode(status), log.read_text(), time.perf_counter() - begun)


def intact(folder: pathlib.Path) -> bool:
    """Whether a folder is a checkpoint whose files are those that were written."""
    try:
        return verify_files(folder, read_config(folder).meta) > 0 and bool(describe(folder)["layers"])
    except (FoemError, OSError, ValueError):
        return False


def left(out: pathlib.Path) -> str:
    """What a run has left, in words; "HALF-WRITTEN" in them is what must never be."""
    found = []
    if out.is_dir():
        found.append("whole checkpoint" if intact(out) else "HALF-WRITTEN checkpoint")
    partial = writer.Writer(out).partial
    if partial.exists():
        journal = partial / "journal.jsonl"
        steps = max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0
        found.append(f"{steps} finished steps to resume")
        if (partial / "checkpoint/config.json").exists() and not intact(partial / "checkpoint"):
            found.append("not yet named config.json beside it")
    return " and ".join(found) or "nothing"


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """Weights and configs."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors" or p.name.endswith("config.json")}


def before_block(index: int, action: Callable[[], None]) -> Callable[[], None]:
    """For `start`: when block number `index` is about to be solved, the blocks before it being finished."""

    def prepare() -> None:
        solve = pipeline.solve_block

        def solve_block(job, solver, out, number, kept):
            if number == index:
                action()
            return solve(job, solver, out, number, kept)

        pipeline.solve_block = solve_block

    return prepare


def before_finish(action: Callable[[], None]) -> Callable[[], None]:
    """For `start`: when all weights are written, before config, reports and model card."""

    def prepare() -> None:
        finish = writer.Writer.finish

        def hooked(self, *args):
            action()
            return finish(self, *args)

        writer.Writer.finish = hooked

    return prepare


def at_operation(number: int, parent: pathlib.Path) -> Callable[[], None]:
    """For `start`: kill -9 right before the `number`-th time that the run makes, writes through to the disk, renames or removes
    something in `parent`."""

    def prepare() -> None:
        count = 0

        def one_more() -> None:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event: str, args: tuple) -> None:
            inside = event in REMOVALS or str(args[0] if args else "").startswith(str(parent))  # removals name no folder
            if event in WRITES and inside and (event != "open" or set(str(args[1])) & set("wax+")):
                one_more()

        def counted(call: Callable) -> Callable:
            return lambda *args: (one_more(), call(*args))[1]

        os.fsync, os.posix_fallocate = counted(os.fsync), counted(os.posix_fallocate)
        sys.addaudithook(audit)

    return prepare


def small_device(sequences: int, index: int = 0) -> Callable[[], None]:
    """For `start`: as on a device that from block `index` on has room for the forward pass of so many sequences."""

    def prepare() -> None:
        run_block = BlockInputs.run

        def limited(self, number, block, hidden):
            if number >= index and len(hidden) > sequences:
                raise torch.OutOfMemoryError(f"CUDA out of memory: no room for {len(hidden)} sequences (injected)")
            return run_block(self, number, block, hidden)

        BlockInputs.run = limited

    return prepare


@contextlib.contextmanager
def small_disk(parent: pathlib.Path, size: str, *options: str) -> Iterator[pathlib.Path]:
    """A folder that is a file system of its own with so much room."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", str(parent)], check=True)
    try:
        yield parent
    finally:
        subprocess.run(["umount", str(parent)], check=True)


def fill(parent: pathlib.Path) -> None:
    """Write until nothing more goes in."""
    with contextlib.suppress(OSError), open(parent / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
