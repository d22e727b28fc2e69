"""A virtual environment of its own for every peer: they need other torch and transformers versions than vLLM allows.

Standard library only, FoemError apart: whoever compares imports it from this project's environment.
"""
from __future__ import annotations

import os
import pathlib
import subprocess
import venv

from foem_vllm.errors import FoemError

VERSIONS = {"gptqmodel": "7.7.0", "autoround": "0.16.1", "llmcompressor": "0.14.0.1"}
PACKAGES = {"gptqmodel": "gptqmodel", "autoround": "auto-round", "llmcompressor": "llmcompressor"}  # what pip calls them
FOLDER = pathlib.Path.home() / ".cache/foem-vllm/peers"
HERE = pathlib.Path(__file__).resolve().parent


def ensure(name: str, folder: str | pathlib.Path = FOLDER) -> pathlib.Path:
    """The Python of an environment with the pinned version of peer `name`, at folder/name.

    Made when there is none (about 6 GB, some minutes); another version that is found there is replaced. Raises FoemError when
    it cannot be made.
    """
    version, place = VERSIONS[name], pathlib.Path(folder).expanduser().absolute() / name
    requirement, python = f"{PACKAGES[name]}=={version}", place / "bin/python"
    if not python.is_file():
        print(f"installing {requirement} into {place} (once, some minutes)", flush=True)
        try:
            venv.create(place, with_pip=True)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            raise FoemError(f"{place}: no environment for {requirement} can be made there ({error}); give --peers-folder a "
                            "folder you may write to, with 6 GB free") from None
    probe = [python, "-c", f"from importlib.metadata import version; print(version({PACKAGES[name]!r}))"]
    if subprocess.run(probe, capture_output=True, text=True).stdout.strip() != version:
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], text=True, capture_output=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
            raise FoemError(f"{place}: pip could not install {requirement} ({errors[-1] if errors else 'no reason given'}); "
                            f"check the network and the free disk space (6 GB), or install it by hand: {python} -m pip install "
                            f"{requirement}")
    return python


def environment() -> dict[str, str]:
    """os.environ with as many GPTQModel workers as cores: on two cores its default refuses to start."""
    return {"GPTQMODEL_CPU_WORKERS": str(os.cpu_count() or 1), "TOKENIZERS_PARALLELISM": "false", **os.environ}
