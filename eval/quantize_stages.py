"""What `foem quantize` is made of: processor seconds of its stages, on the models of foem_eval.peers.quantize_time.

    python eval/quantize_stages.py [--work out/quantize_time]    -> eval/results/quantize_stages.{json,md}

foem_report.json tells solving from the rest; here solving is taken apart too, by scale_stages. One process per case and
preset. `start`: imports; `other`: what belongs to no stage (tokens, trial runs, hooks, verifying).
"""
from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

from foem_eval.peers.quantize_time import CASES, OURS, TEXT, folder_of, model_of, prepare  # noqa: E402
from foem_eval.provenance import provenance  # noqa: E402

RESULT = ROOT / "eval/results/quantize_stages.json"
PRODUCTS = {"forward", "moments", "rows", "factor"}  # matrix products, and factorizations, which are made of them
LIMIT = 0.2  # of the time, for anything else
MEASURED = [name for name, case in CASES.items() if set(OURS) <= set(case.tools)]


def measure(name: str, preset: str, work: pathlib.Path) -> dict[str, float]:
    """Processor seconds by stage of one run, in this process."""
    from scale_stages import Stopwatch

    from foem_vllm import QuantizeConfig, quantize
    case = CASES[name]
    config = QuantizeConfig(preset=preset, calibration=str(TEXT), samples=case.samples, seq_len=case.length, device="cpu")
    with Stopwatch() as watch, tempfile.TemporaryDirectory() as scratch:
        start = time.process_time()
        quantize(model_of(name, folder_of(name, work)), pathlib.Path(scratch) / "out", config)
        total = time.process_time()
    return {**watch.seconds, "start": start, "other": total - start - sum(watch.seconds.values())}


def markdown(content: dict) -> str:
    runs = content["runs"]
    stages = sorted({s for run in runs for s in run["seconds"]}, key=lambda s: -max(run["seconds"][s] for run in runs))
    lines = [f"`{content['command']}`, commit {content['commit']}, {content['machine']}.", "",
             "Processor seconds of all threads, and their share; stages "
             f"that are no matrix products and take more than {LIMIT:.0%} are bold.", "",
             "| stage | " + " | ".join(f"{run['case']}, {run['preset']}" for run in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    for stage in stages:
        cells = []
        for run in runs:
            share = run["seconds"][stage] / sum(run["seconds"].values())
            cell = f"{run['seconds'][stage]:.2f} ({share:.0%})"
            cells.append(f"**{cell}**" if share > LIMIT and stage not in PRODUCTS else cell)
        lines.append(f"| {stage}{' (matrix products)' if stage in PRODUCTS else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "out/quantize_time")
    parser.add_argument("--run", nargs=2, metavar=("CASE", "PRESET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return print(json.dumps(measure(*args.run, args.work)))
    runs = []
    for name in MEASURED:
        prepare(name, folder_of(name, args.work))
        for preset in ("fast", "balanced"):
            command = [sys.executable, __file__, "--work", args.work, "--run", name, preset]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append({"case": name, "preset": preset, "seconds": json.loads(done.stdout.splitlines()[-1])})
    content = {**provenance(), "runs": runs}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(markdown(content))


if __name__ == "__main__":
    main()
