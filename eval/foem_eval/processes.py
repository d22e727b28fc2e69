"""Child processes that never outlive us: lm-eval runs and a `vllm serve`. vLLM starts an engine process of its own, so a child is
always stopped with its whole process group."""
from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

from foem_vllm.errors import FoemError

TAIL = 25
GRACE = 15  # seconds between asking a process group to end and killing it


def environment() -> dict[str, str]:
    """os.environ for a vLLM process. On a CPU vLLM reserves half of the memory for its cache unless told otherwise."""
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}


def tool(name: str) -> str:
    """The console script `name` of the environment that runs us, even when that environment is not activated."""
    return str(pathlib.Path(sys.executable).parent / name)


def tail(log: pathlib.Path, lines: int = TAIL) -> str:
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-lines:])


@contextlib.contextmanager
def group(command: Sequence[str], log: pathlib.Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """Start `command` in a process group of its own, output appended to `log`; the group is gone when the block is left, also
    by an exception or Ctrl-C. env: None for that of a vLLM process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment() if env is None else env,
                                   start_new_session=True)
    try:
        yield process
    finally:
        stop_group(process)


def stop_group(process: subprocess.Popen) -> None:
    """SIGTERM to the group, SIGKILL after GRACE seconds. Members that the leader left behind are stopped too."""
    for signal_number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        end = time.monotonic() + patience
        try:
            os.killpg(process.pid, signal_number)
            while time.monotonic() < end:
                process.poll()  # reaps the leader, or its group would exist forever
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return


def run(command: Sequence[str], log: pathlib.Path, survives_signal: bool = False, env: dict[str, str] | None = None) -> int:
    """Run to the end and return the exit code; a failure raises FoemError with the last lines of its output.

    survives_signal: return a negative code (the process was killed by a signal) instead of raising.
    """
    with group(command, log, env) as process:
        code = process.wait()
    if code < 0 and survives_signal:
        return code
    if code:
        raise FoemError(f"{pathlib.Path(command[0]).name} ended with exit code {code}; the last lines of {log}:\n{tail(log)}")
    return code


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def vllm_server(model: str, log: pathlib.Path, *arguments: str, deadline: float = 300) -> Iterator[str]:
    """`vllm serve model arguments...` on a free local port; yields the base URL of its OpenAI API once it answers.

    Raises FoemError with the log's end when it stops before, or does not answer within `deadline` seconds.
    """
    port = free_port()
    command = [tool("vllm"), "serve", model, "--host", "127.0.0.1", "--port", str(port), *arguments]
    with group(command, log) as process:
        end = time.monotonic() + deadline
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None:
                raise FoemError(f"vllm serve stopped with exit code {process.returncode}; the last lines of {log}:\n{tail(log)}")
            if time.monotonic() > end:
                raise FoemError(f"vllm serve did not answer within {deadline:.0f} s; the last lines of {log}:\n{tail(log)}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
