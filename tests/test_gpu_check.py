"""kernels/gpu_check.py where there is no GPU: the plan, and a refusal that cannot be taken for a pass."""
import os
import pathlib
import subprocess
import sys

import pytest
import torch

SCRIPT = pathlib.Path(__file__).parents[1] / "kernels" / "gpu_check.py"


def run(*arguments):
    # Without PYTHONPATH and from elsewhere, because the script must find the repository by itself; with any GPU hidden.
    environment = {key: v for key, v in os.environ.items() if key != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd="/", env=environment, capture_output=True, text=True,
                          timeout=240)


def test_dry_run_names_every_step_as_skipped():
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    skipped = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("skipped") and "needs a GPU" in line]
    assert skipped == ["numbers", "graphs", "timing", "quantizer"]
    assert "passed" not in done.stdout


@pytest.mark.skipif(bool(torch.version.hip), reason="CUDA_VISIBLE_DEVICES hides no AMD GPU")
def test_without_a_gpu_it_refuses():
    done = run()
    assert done.returncode == 2 and "no NVIDIA GPU is visible" in done.stderr and not done.stdout


def test_unknown_steps_are_refused():
    done = run("--dry-run", "--steps", "numbers,speed")
    assert done.returncode == 2 and "unknown step speed" in done.stderr
