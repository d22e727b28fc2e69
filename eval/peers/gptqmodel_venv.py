"""A virtual environment of its own for GPTQModel: it needs newer torch and transformers than vLLM's CPU build allows.

Standard library only: whoever compares imports it from this project's environment.
"""
from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import venv

GPTQMODEL = "7.7.0"
DEFAULT = pathlib.Path(__file__).resolve().parents[2] / "out/gptqmodel-venv"


def ensure(folder: pathlib.Path = DEFAULT) -> pathlib.Path:
    """The Python of an environment with GPTQModel, made at `folder` when there is none (about 6 GB, some minutes)."""
    python = folder / "bin/python"
    if not python.is_file():
        print(f"installing gptqmodel {GPTQMODEL} into {folder} (once, some minutes)", flush=True)
        venv.create(folder, with_pip=True)
    found = subprocess.run([python, "-c", "from importlib.metadata import version; print(version('gptqmodel'))"],
                           capture_output=True, text=True).stdout.strip()
    if found != GPTQMODEL:
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", f"gptqmodel=={GPTQMODEL}"], text=True,
                              capture_output=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
            sys.exit(f"gptqmodel {GPTQMODEL} could not be installed into {folder}:\n" + "\n".join(errors[-20:]) +
                     "\ncheck the network and the free disk space (6 GB), then run this again")
    return python


def environment() -> dict[str, str]:
    """os.environ with as many GPTQModel workers as cores: on two cores its default refuses to start."""
    return {"GPTQMODEL_CPU_WORKERS": str(os.cpu_count() or 1), **os.environ}
