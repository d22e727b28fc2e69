"""Where a measured table comes from: the command, the commit and the machine that made it."""
from __future__ import annotations

import datetime
import os
import pathlib
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "vllm", "lm_eval", "triton")
TABLES = (":(top,exclude)eval/results", ":(top,exclude)kernels/results")


def provenance() -> dict:
    """{"command", "commit", "date", "machine", "versions"}; commit ends in "+" when the working tree has changes, other than of
    tables like the one that is being made."""
    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", pathlib.Path(__file__).parent, *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            pass
    here, changed = pathlib.Path.cwd(), git("status", "--porcelain", "-uno", "--", ":/", *TABLES)
    words = [os.path.relpath(a, here) if os.path.isabs(a) and pathlib.Path(a).is_relative_to(here) else a for a in sys.argv]
    return {"command": " ".join(["python", *words]),
            "commit": git("rev-parse", "--short=12", "HEAD") + ("+" if changed else ""),
            "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions}


def missing(names: list[str], rows: dict[str, dict], commit: str, any_commit: bool) -> list[str]:
    """The names whose row, with the "commit" that measured it, is not there yet: of this commit, or with `any_commit` of any."""
    return [name for name in names if name not in rows or not (any_commit or rows[name].get("commit") == commit)]


def of_commits(rows: dict[str, dict]) -> str:
    """Which commits measured a table's rows, in words."""
    commits = sorted({row["commit"] for row in rows.values()})
    return f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def machine() -> str:
    """Processor, cores, memory and GPU, in words."""
    names = []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    words = [names[0] if names else platform.processor() or platform.machine(), f"{os.cpu_count()} cores", f"{memory:.0f} GiB"]
    import torch
    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join(words)
