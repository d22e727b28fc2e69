"""Methods beside each other on held-out text: KL to the original, loss and agreement, mean and spread over calibration seeds.

    python eval/compare_methods.py [--bits 4] [--group-size 128] [--seeds 0 1 2] [--methods rtn gptq gptaq foem foem+gptaq]

Writes eval/results/<model>_w<bits>g<group>.json and prints a table. GPTQ is the base of the paired differences: the same
sequences and, seed by seed, the same calibration tokens.
"""
from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile

from foem_eval.dequantized import load_dequantized
from foem_eval.divergence import measure, read_sequences
from foem_eval.provenance import provenance
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from transformers.utils import logging

from foem_vllm import QuantizeConfig, quantize

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT / "eval/tinylm/data"
METHODS = "rtn rtn/none/search gptq gptaq foem foem+gptaq gptq/group/search foem/group/search foem+gptaq/group/search"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "eval/tinylm/qwen3")
    parser.add_argument("--methods", nargs="+", default=METHODS.split(),
                        help="METHOD, METHOD/ACT_ORDER or METHOD/ACT_ORDER/GRID")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=128, help="held-out sequences of 512 tokens")
    args = parser.parse_args()
    logging.disable_progress_bar()
    sequences = read_sequences(AutoTokenizer.from_pretrained(args.model), DATA / "evaluation.jsonl", 512, limit=args.sequences)
    original = load_dequantized(args.model)
    found = {}
    for seed in args.seeds:
        models = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in args.methods:
                method, order, grid = (*name.split("/"), *("none", "minmax")[name.count("/"):])
                if method == "rtn" and seed != args.seeds[0]:
                    continue  # RTN reads no text
                out = pathlib.Path(folder) / name.replace("/", "-")
                config = QuantizeConfig(method, args.bits, args.group_size, act_order=order, grid=grid, seed=seed,
                                        calibration=str(DATA / "calibration.jsonl"), samples=args.samples, seq_len=args.seq_len)
                quantize(args.model, out, config)
                models[name] = load_dequantized(out)
        found[seed] = measure(original, models, sequences)
        print(f"seed {seed}: " + ", ".join(f"{name} {d.kl.mean():.5f}" for name, d in found[seed].items()), flush=True)

    rows = []
    for name in ("original", *args.methods):
        runs = [found[seed][name] for seed in args.seeds if name in found[seed]]
        row = {"method": name, "seeds": len(runs)}
        for key in ("kl", "loss", "agreement"):
            means = [float(getattr(run, key).mean()) for run in runs]
            row |= {key: statistics.mean(means), f"{key}_spread": max(means) - min(means)}
        if "gptq" in args.methods and len(runs) == len(args.seeds) and name != "original":
            pairs = [float((found[s][name].kl - found[s]["gptq"].kl).mean()) for s in args.seeds]
            row |= {"kl_minus_gptq": statistics.mean(pairs), "kl_minus_gptq_by_seed": pairs}
        rows.append(row)
    table = Table(title=f"{args.model.name}, W{args.bits} g{args.group_size}, {args.sequences} x 512 held-out tokens")
    for column in ("method", "KL, mean of seeds", "max - min", "KL - GPTQ's", "loss", "same top 1"):
        table.add_column(column, justify="right")
    for row in rows:
        difference = f"{row['kl_minus_gptq']:+.5f}" if "kl_minus_gptq" in row else "-"
        table.add_row(row["method"], f"{row['kl']:.5f}", f"{row['kl_spread']:.5f}", difference, f"{row['loss']:.4f}",
                      f"{row['agreement']:.2%}")
    Console().print(table)
    path = ROOT / f"eval/results/{args.model.name}_w{args.bits}g{args.group_size}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**provenance(), "samples": args.samples, "seq_len": args.seq_len, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
