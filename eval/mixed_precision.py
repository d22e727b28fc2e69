"""Bits chosen within a budget beside one width everywhere: tinylm and the Llama-style model, KL and perplexity on held-out text.

    make mixed-precision                      # eval/results/mixed_precision; goes on where it stopped
    python eval/mixed_precision.py --table    # of what is measured so far

Quantizes what OUT/MODEL/results.json lacks (as `foem compare`), then writes table.md, table.csv and kl_by_bits.png into OUT.
Two of the budgets are what 3 and 4 bits everywhere take: there the choice stands beside one width of no smaller size, paired. The
line: what a budget would have were the logarithm of KL a straight line between the two widths beside it; below 1 is below it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import pathlib
import statistics

import torch
from foem_eval.compare import RESULTS_FILE, Comparison, compare
from foem_eval.divergence import Bootstrap, bootstrap
from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).parent
MODELS = {"qwen3": "tinylm", "llama": "Llama-style"}
BUDGETS = ("2.5", "3", "3.2422", "3.5", "4", "4.25", "5")  # 3.2422 and 4.25: 3 and 4 bits everywhere at g128, as below
SIZE_DIGITS = 4  # of bits a weight
COLUMNS = {
    "model": "{}",
    "bits": "{}",
    "bits/weight": f"{{:.{SIZE_DIGITS}f}}",
    "seeds": "{}",
    "KL": "{:.5f}",
    "KL of seeds": "{}",
    "loss +": "{:.4f}",
    "ppl": "{:.3f}",
    "same top 1": "{:.2%}",
    "over the line": "{}",
    "over one width": "{}",
    "loss - its": "{}",
}


def measure(model: str, out: pathlib.Path, seeds: list[int]) -> None:
    data = HERE / "tinylm/data"
    common = dict(
        model=str(HERE / "tinylm" / model),
        evaluation=str(data / "evaluation.jsonl"),
        split="test",
        sequences=64,
        out=out,
        calibration=str(data / "calibration.jsonl"),
        samples=128,
        seq_len=256,
        seeds=seeds,
        resume=True,
    )
    compare(Comparison(**common, methods=["balanced"], bits=[2, 3, 4, 8]))
    compare(Comparison(**common, methods=[f"balanced:bits_per_weight={b}" for b in BUDGETS], bits=[4]))


def budget_of(run: dict) -> str:
    """The bits a weight that a run was given, "" for one width everywhere."""
    return run["method"].partition("bits_per_weight=")[2]


def paired(row: dict, other: dict, key: str) -> Bootstrap:
    """row's values against other's, over the seeds that both were measured with."""
    values = [{run["seed"]: run[key] for run in r["runs"]} for r in (row, other)]
    seeds = sorted(values[0].keys() & values[1].keys())
    return bootstrap(*(torch.tensor([own[seed] for seed in seeds]) for own in values))


def rows_of(name: str, results: dict) -> list[dict]:
    original = statistics.fmean(results["original"]["loss"])
    groups: dict[str, list[dict]] = {}
    for run in results["runs"]:
        budget = budget_of(run)
        groups.setdefault(f"within {budget}" if budget else f"{run['bits']} everywhere", []).append(run)
    rows = []
    for bits, runs in groups.items():
        mean = {key: [statistics.fmean(run[key]) for run in runs] for key in ("kl", "loss", "agreement")}
        rows.append(
            {
                "model": name,
                "bits": bits,
                "bits/weight": statistics.fmean(run["bits_per_weight"] for run in runs),
                "seeds": len(runs),
                "KL": statistics.fmean(mean["kl"]),
                "KL of seeds": f"{min(mean['kl']):.5f} .. {max(mean['kl']):.5f}",
                "loss +": statistics.fmean(mean["loss"]) - original,
                "ppl": statistics.fmean(map(math.exp, mean["loss"])),
                "same top 1": statistics.fmean(mean["agreement"]),
                "over the line": "-",
                "over one width": "-",
                "loss - its": "-",
                "budget": budget_of(runs[0]),
                "runs": runs,
            }
        )
    rows.sort(key=lambda row: (row["bits/weight"], row["bits"]))
    one = [row for row in rows if not row["budget"]]
    for row in rows:
        if row["budget"]:
            low = max((r for r in one if r["bits/weight"] <= row["bits/weight"]), key=lambda r: r["bits/weight"])
            high = min((r for r in one if r["bits/weight"] >= row["bits/weight"]), key=lambda r: r["bits/weight"])
            width = high["bits/weight"] - low["bits/weight"]
            share = (row["bits/weight"] - low["bits/weight"]) / width if width else 0
            row["over the line"] = f"{row['KL'] / (low['KL'] ** (1 - share) * high['KL'] ** share):.3f}"
            for same in one:
                if round(same["bits/weight"], SIZE_DIGITS) == float(row["budget"]):
                    kl, loss = (paired(row, same, key) for key in ("kl", "loss"))
                    row["over one width"] = "{:.3f} ({:.3f} .. {:.3f})".format(kl.ratio, *kl.ratio_interval)
                    row["loss - its"] = "{:+.4f} ({:+.4f} .. {:+.4f})".format(loss.difference, *loss.difference_interval)
    return rows


def write(found: dict[str, dict], out: pathlib.Path) -> None:
    rows = [row for name, results in found.items() for row in rows_of(MODELS[name], results)]
    first = next(iter(found.values()))
    settings = first["settings"]
    commits = sorted({run["commit"] for results in found.values() for run in results["runs"]})
    lines = [
        f"# Preset balanced, g{settings['group_size']}: bits chosen within a budget beside one width everywhere",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(form.format(row[key]) for key, form in COLUMNS.items()) + " |" for row in rows),
        "",
        f"`make mixed-precision`; {settings['measured']} x {settings['sequence_length']} held-out tokens (split "
        f"{settings['split']}), calibrated on {settings['samples']} x {settings['seq_len']}.",
        "",
        "KL(original || quantized) and loss in nats per token, means over calibration seeds. Over the line: KL over that of a",
        "line between the widths on either side, on a logarithmic axis. Over one width: KL over that of one width everywhere",
        "which takes all of the budget; loss less its; in brackets 95 % of a bootstrap over seeds and sequences, paired.",
        "",
        f"Commits {', '.join(commits)}; {first['machine']}.",
    ]
    (out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    with (out / "table.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(COLUMNS), extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    figure = Figure(figsize=(11, 8), layout="constrained")
    for column, name in enumerate(found):
        own = [row for row in rows if row["model"] == MODELS[name]]
        for line, (key, label) in enumerate((("KL", "KL(original || quantized), nats per token"), ("ppl", "perplexity"))):
            axes = figure.add_subplot(2, len(found), 1 + line * len(found) + column)
            for text, kind, style in (("one width everywhere", "everywhere", "s--"), ("chosen within a budget", "within", "o-")):
                points = [(row["bits/weight"], row[key]) for row in own if kind in row["bits"]]
                axes.plot(*zip(*points), style, label=text, markersize=6, linewidth=1.2)
            axes.set(
                title=MODELS[name] if line == 0 else None,
                xlabel="bits a quantized weight, grid included",
                ylabel=label,
                xlim=(2, 5.6),
                yscale="log" if key == "KL" else "linear",
            )
            if key == "ppl":
                axes.axhline(
                    math.exp(statistics.fmean(found[name]["original"]["loss"])), color="grey", linewidth=1, label="original"
                )
            axes.grid(True, which="both", alpha=0.3)
            axes.legend()
    figure.savefig(out / "kl_by_bits.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results/mixed_precision")
    parser.add_argument("--seeds", type=lambda text: list(map(int, text.split(","))), default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table of what is there")
    given = parser.parse_args()
    if not given.table:
        for model in MODELS:
            measure(model, given.out / model, given.seeds)
    write({model: json.loads((given.out / model / RESULTS_FILE).read_text("utf-8")) for model in MODELS}, given.out)


if __name__ == "__main__":
    main()
