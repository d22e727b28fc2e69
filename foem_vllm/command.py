"""The command that goes on with an interrupted run, for messages that end one."""

from __future__ import annotations

import os
import shlex

words: list[str] = []  # `foem` was called with; its entry point fills them in


def resume() -> str:
    """What to enter; "--resume" where this process is no `foem quantize`, or torchrun started it on several machines."""
    processes, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if "quantize" not in words or processes != here:
        return "--resume"
    start = ["foem"] if processes == 1 else ["torchrun", "--nproc-per-node", str(here), "-m", "foem_vllm"]
    return shlex.join([*start, *words, *(["--resume"] if "--resume" not in words else [])])
