"""Time `foem quantize` and GPTQModel on the same model and the same token sequences, alternating; medians and their ratio.

    python -m foem_eval.peers.gptqmodel_time [--peers-folder DIR] [--repeats 3] [--methods gptq foem]

Whole processes are timed, start-up and saving included, since that is what a user waits for; GPTQModel's own times for loading,
quantizing and saving stand beside. Writes eval/results/gptqmodel_time.json and prints a table.
"""
from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile
import time

from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoTokenizer

from foem_eval import processes
from foem_eval.peers import environments
from foem_eval.provenance import provenance
from foem_vllm import calibration

ROOT = pathlib.Path(__file__).resolve().parents[3]
TEXT = ROOT / "eval/tinylm/data/calibration.jsonl"


def timed(command: list, log: pathlib.Path, env: dict | None = None) -> tuple[float, str]:
    """(seconds, standard output) of one process; its failure ends the comparison with the last lines it wrote."""
    start = time.perf_counter()
    done = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with exit code {done.returncode}:\n{processes.tail(log)}")
    return seconds, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-folder", type=pathlib.Path, default=environments.FOLDER, help="where peers are, or go")
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "eval/tinylm/qwen3")
    parser.add_argument("--methods", nargs="+", default=["gptq", "foem"], choices=["gptq", "gptaq", "foem", "foem+gptaq"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path, default=ROOT / "eval/results/gptqmodel_time.json")
    args = parser.parse_args()
    python = environments.ensure("gptqmodel", args.peers_folder)
    tokens = calibration.sample_tokens(calibration.read_texts(str(TEXT)), AutoTokenizer.from_pretrained(args.model),
                                       args.samples, args.seq_len, 0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        save_file({"input_ids": tokens.contiguous()}, work / "tokens.safetensors")
        for method in args.methods:
            ours, theirs, parts = [], [], []
            for i in range(args.repeats):
                foem = [processes.tool("foem"), "quantize", args.model, work / f"ours-{method}-{i}", "--quiet",
                        "--method", method, "--calibration", TEXT, "--samples", args.samples, "--seq-len", args.seq_len,
                        "--seed", 0]
                ours.append(timed(foem, work / "log")[0])
                peer = [python, environments.HERE / "gptqmodel_quantize.py", args.model,
                        work / f"theirs-{method}-{i}", work / "tokens.safetensors", "--method", method, "--reorder", "off"]
                seconds, out = timed(peer, work / "log", environments.environment())
                theirs.append(seconds)
                parts.append(next(json.loads(line) for line in out.splitlines()[::-1] if line.startswith('{"method"')))
                print(f"{method} {i + 1}/{args.repeats}: foem {ours[-1]:.1f} s, gptqmodel {theirs[-1]:.1f} s", flush=True)
            rows.append({"method": method, "ours_s": ours, "gptqmodel_s": theirs, "gptqmodel_parts": parts,
                         "ratio": statistics.median(theirs) / statistics.median(ours)})
    table = Table(title=f"{args.model.name}, W4 g128, {args.samples} x {args.seq_len} tokens, median of {args.repeats}")
    for column in ("method", "foem quantize, s", f"GPTQModel {environments.VERSIONS['gptqmodel']}, s", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        medians = (f"{statistics.median(row[key]):.1f}" for key in ("ours_s", "gptqmodel_s"))
        table.add_row(row["method"], *medians, f"{row['ratio']:.1f}")
    Console().print(table)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**provenance(), "gptqmodel": environments.VERSIONS['gptqmodel'], "samples": args.samples,
                                     "seq_len": args.seq_len, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
