"""The C code of the CPU kernels under AddressSanitizer and UBSan, on buffers that end where data does; more: `make sanitize`."""

import os
import pathlib
import shutil
import subprocess

import foem_kernels
import pytest
import torch

HERE, KERNELS = pathlib.Path(__file__).parent, pathlib.Path(foem_kernels.__file__).parent
FLAGS = ["-O1", "-g", "-std=gnu11", "-fopenmp", "-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
@pytest.mark.parametrize("source, problems", [("native", 60), ("moments", 60), ("grid", 100), ("descent", 300)])
def test_no_memory_error_and_no_undefined_behaviour(tmp_path, source, problems):
    program = tmp_path / "fuzz"
    subprocess.run(["gcc", *FLAGS, f"-I{KERNELS}", str(HERE / f"{source}_fuzz.c"), "-lm", "-o", str(program)], check=True)
    # vLLM's CPU platform puts its allocator into LD_PRELOAD of the process that imports it; ASan's own must come first.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([str(program), str(problems)], capture_output=True, text=True, env=environment)
    if source == "moments" and not torch.cpu._is_avx512_bf16_supported():
        assert done.returncode == 0 and "nothing to do" in done.stdout, done.stdout + done.stderr
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0 and f"{problems} problems" in done.stdout, done.stdout + done.stderr
