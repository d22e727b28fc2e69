"""Check and time what runs on an NVIDIA GPU: one JSON, one exit code.

    python kernels/gpu_check.py [--dry-run] [--steps numbers,graphs,...] [--peers FOLDER] [--vllm-site FOLDER] [--out FOLDER]

Needs torch and triton, and transformers and safetensors for the quantizer; nothing need be installed. Exit 0: no step failed;
1: one did (the others ran all the same); 2: no GPU. A step that lacks what it needs is skipped with the reason, which is not
a pass. All steps together end within --budget seconds; `serve` wants a call of its own. The JSON is written after every step
and keeps the steps of earlier calls at the same commit. Timing never fails a run: a slow kernel is a result, not an error.
--dry-run names what would run and exits 0.
"""
from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]

from foem_eval.provenance import provenance  # noqa: E402
from gpu_numbers import Skip, check_graphs, check_moe, check_numbers, check_solver  # noqa: E402


def check_timing(run):
    """Our kernels beside dense bf16, tinygemm and the collected peers: kernels/bench.py --quick, whose files hold the numbers."""
    import bench
    args = bench.arguments(["--quick", "--out", str(run.args.out), "--budget", str(int(run.remaining() - 20)),
                            *(["--commit", run.args.commit] if run.args.commit else [])])
    found, missing = bench.collect(run.args.peers)
    result = bench.run_all(args, bench.contenders("cuda") + found, missing)
    wrong = [row for row in result["rows"] if row["kind"] == "ours" and row["note"]]
    return not wrong, {"ceilings": result["ceilings"], "skipped": result["skipped"], "wrong": wrong,
                       "timed": sum("us" in row for row in result["rows"])}


def check_quantizer(run):
    """The demo's model quantized on the GPU and on the CPU: codes that agree, and losses within 5 % of each other.

    Codes need not be equal: the GPU runs the blocks in the model's own dtype, the CPU in fp32, and a code that falls on the
    other side of a tie moves those after it. The loss is what the method minimizes; 5 % is a judgement, not a theorem.
    """
    from safetensors.torch import load_file

    from foem_vllm import QuantizeConfig, quantize
    tinylm = ROOT / "eval" / "tinylm"
    text = str(tinylm / "data" / "calibration.jsonl")
    rows, ok = [], True
    with tempfile.TemporaryDirectory() as folder:
        for method in ("rtn", "foem"):
            reports, codes, seconds = {}, {}, {}
            for device in ("cpu", "cuda"):
                out, started = pathlib.Path(folder) / f"{method}-{device}", time.perf_counter()
                reports[device] = quantize(tinylm / "qwen3", out, QuantizeConfig(
                    method=method, device=device, calibration=text, samples=64, seq_len=256))
                seconds[device] = time.perf_counter() - started
                codes[device] = {name: t for file in sorted(out.glob("*.safetensors")) for name, t in load_file(file).items()
                                 if name.endswith(".qweight")}
            nibbles = [sum(int(((a ^ codes["cuda"][name]) >> shift & 15 == 0).sum()) for shift in range(0, 32, 4))
                       for name, a in codes["cpu"].items()]
            losses = {device: [layer.loss for layer in r.layers if layer.loss is not None] for device, r in reports.items()}
            ratios = [b / a for a, b in zip(losses["cpu"], losses["cuda"]) if a]
            row = {"method": method, "layers": len(nibbles), "seconds": seconds,
                   "equal_codes": sum(nibbles) / (8 * sum(t.numel() for t in codes["cpu"].values())),
                   "loss_ratio_cuda_to_cpu": {"median": statistics.median(ratios), "worst": max(ratios, key=lambda r: abs(r - 1))}
                   if ratios else None}
            rows.append(row)
            ok &= codes["cpu"].keys() == codes["cuda"].keys() and all(0.95 <= r <= 1.05 for r in ratios)
            ok &= method == "foem" or row["equal_codes"] > 0.999  # no activations: only ties in the grid search can differ
            ok &= method == "rtn" or bool(ratios)
            print(f"  {row}", flush=True)
    return ok, {"rows": rows}


def check_serve(run):
    """tinylm and a Qwen3-8B of random weights in vLLM, compiled and with graphs: log-probabilities, tokens per second."""
    site = run.args.vllm_site
    if site is None or not (site / "env.sh").exists():
        raise Skip("needs --vllm-site" if site is None else f"no env.sh in {site}")
    from gpu_serve import check_serve as serve
    with tempfile.TemporaryDirectory() as work:
        return serve(site.resolve(), pathlib.Path(work), run.remaining, run.save)


class Step(NamedTuple):
    """seconds: at most, where other steps run in the same call."""
    check: Callable
    seconds: int
    needs: str = "a GPU"


STEPS = {"numbers": Step(check_numbers, 200), "graphs": Step(check_graphs, 60), "moe": Step(check_moe, 60),
         "solver": Step(check_solver, 40), "timing": Step(check_timing, 120), "quantizer": Step(check_quantizer, 90),
         "serve": Step(check_serve, 560, "a GPU and --vllm-site")}


class Run:
    """What a step is given. remaining(): its seconds. save(found): keep what it has found so far."""

    def __init__(self, args, seconds: float, save: Callable[[dict], None]):
        self.args, self.save, self.end = args, save, time.perf_counter() + seconds

    def remaining(self) -> float:
        return self.end - time.perf_counter()


def run_step(step: Step, args, seconds: float, save: Callable[[dict], None]) -> dict:
    """{"status": "passed", "failed" or "skipped", "seconds", ...}. The step is interrupted when its time is over."""
    def late(*_):
        raise TimeoutError(f"not done after {seconds:.0f} s")
    partial = {}

    def keep(found):
        partial.update(found)
        save(partial)
    started, before = time.perf_counter(), signal.signal(signal.SIGALRM, late)
    signal.alarm(max(1, math.ceil(seconds)))
    try:
        passed, found = step.check(Run(args, seconds, keep))
        found["status"] = "passed" if passed else "failed"
    except Skip as reason:
        found = {"status": "skipped", "reason": str(reason)}
    except Exception:  # reported as a failure: the other steps still have something to say
        found = {**partial, "status": "failed", "crashed": traceback.format_exc()}
        traceback.print_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def machine(args):
    properties = torch.cuda.get_device_properties(0)
    origin = provenance()
    return {**origin, "commit": origin["commit"] or args.commit or "unknown", "gpu": properties.name,
            "capability": list(torch.cuda.get_device_capability(0)), "sms": properties.multi_processor_count,
            "memory_GiB": round(properties.total_memory / 2 ** 30, 1), "cuda": torch.version.cuda}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="name the steps, run none; needs no GPU")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"some of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all steps (default: 570)")
    parser.add_argument("--peers", type=pathlib.Path, help="folder of compiled peers for `timing`, see bench_peers.py")
    parser.add_argument("--vllm-site", type=pathlib.Path, help="folder with vLLM and env.sh for `serve`, see gpu_serve.py")
    parser.add_argument("--commit", help="to note where the folder is no git checkout")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "eval" / "results",
                        help="folder of the JSON (default: eval/results)")
    args = parser.parse_args()
    steps = args.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"unknown step {', '.join(sorted(unknown))}; choose from {', '.join(STEPS)}")
    if args.dry_run:
        print("dry run: nothing is checked")
        for step in steps:
            print(f"skipped {step} (needs {STEPS[step].needs}): {STEPS[step].check.__doc__.splitlines()[0]}")
        return 0
    if not torch.cuda.is_available() or torch.version.hip:
        print("gpu_check: no NVIDIA GPU is visible to torch; run it where there is one, or see the plan with --dry-run",
              file=sys.stderr)
        return 2
    return run_steps(steps, args, machine(args))


def run_steps(steps: list[str], args, origin: dict) -> int:
    """The exit code. One file per GPU; steps that an earlier call ran at the same commit stay in it."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu_check_{re.sub(r'[^a-z0-9]+', '_', origin['gpu'].lower()).strip('_')}.json"
    earlier = json.loads(path.read_text("utf-8")) if path.exists() else {}
    kept = earlier["steps"] if earlier.get("machine", {}).get("commit") == origin["commit"] else {}
    result, end = {"machine": origin, "steps": kept}, time.perf_counter() + args.budget

    def save(step, found):
        result["steps"][step] = {"command": origin["command"], **found}
        path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for step in steps:
        print(f"{step}: {STEPS[step].check.__doc__.splitlines()[0]}", flush=True)
        left = end - time.perf_counter()
        if left < 15:
            found = {"status": "skipped", "reason": f"out of time; run it with --steps {step}", "seconds": 0}
        else:
            seconds = left if len(steps) == 1 else min(left, STEPS[step].seconds)
            found = run_step(STEPS[step], args, seconds, lambda found, step=step: save(step, {"status": "unfinished", **found}))
        save(step, found)
        print(f"{step}: {found['status'].upper()} in {found['seconds']} s {found.get('reason', '')}", flush=True)
    print(f"wrote {path}")
    return int(any(result["steps"][step]["status"] == "failed" for step in steps))


if __name__ == "__main__":
    sys.exit(main())
