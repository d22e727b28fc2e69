"""The results of `foem compare` as tables and plots. Everything is computed from the values per sequence in results.json."""
from __future__ import annotations

import csv
import math
import pathlib
import re
import statistics

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from foem_eval.divergence import bootstrap

# Key of a row -> (heading, how a value is written).
COLUMNS = {
    "method": ("method", "{}"), "bits": ("W", "{}"), "seeds": ("seeds", "{}"), "kl": ("KL", "{:.5f}"),
    "kl_spread": ("max - min", "{:.5f}"), "loss_increase": ("loss +", "{:.4f}"), "loss_increase_spread": ("max - min", "{:.4f}"),
    "perplexity": ("ppl", "{:.3f}"), "agreement": ("same top 1", "{:.2%}"), "quantize_seconds": ("quantize, s", "{:.1f}"),
    "process_seconds": ("process, s", "{:.1f}"), "bits_per_weight": ("bits/weight", "{:.3f}"), "megabytes": ("MB", "{:.1f}")}
PAIRED = {"kl_difference": ("KL - base's", "{:+.5f}"), "kl_difference_95": ("95 %", "{}"),
          "kl_ratio": ("KL / base's", "{:.3f}"), "kl_ratio_95": ("95 %", "{}")}
SECONDS = ("quantize, s: ours the whole of quantize(), reading and writing included, start-up not; peers what they print of "
           "their own quantize step. process, s: a peer's whole process with start-up, loading and saving.")
MARKERS = "osD^vP*X<>hd8p"


def rows_of(results: dict, baseline: str | None = None) -> list[dict]:
    """One row for every bits and method: means over seeds, spreads (max - min over seeds of the means over sequences), seconds.

    With `baseline` the paired differences and ratios to that method at the same bits, and their 95 % intervals (lists of two).
    """
    original = statistics.fmean(results["original"]["loss"])
    groups: dict[tuple[int, str], list[dict]] = {}
    for run in results["runs"]:
        groups.setdefault((run["bits"], run["method"]), []).append(run)
    rows = []
    for (bits, method), runs in sorted(groups.items(), key=lambda item: -item[0][0]):
        kl, loss, agreement = ([statistics.fmean(run[name]) for run in runs] for name in ("kl", "loss", "agreement"))
        perplexity = [math.exp(v) for v in loss]
        row = {"method": method, "bits": bits, "seeds": len(runs), "kl": statistics.fmean(kl), "kl_range": [min(kl), max(kl)],
               "loss_increase": statistics.fmean(loss) - original, "perplexity": statistics.fmean(perplexity),
               "perplexity_range": [min(perplexity), max(perplexity)], "agreement": statistics.fmean(agreement)}
        if len(runs) > 1:  # the spread of one seed is unknown, not zero
            row |= {"kl_spread": max(kl) - min(kl), "loss_increase_spread": max(loss) - min(loss)}
        for name in ("quantize_seconds", "process_seconds", "bits_per_weight", "bytes"):
            values = [run[name] for run in runs if name in run]
            row[name] = type(values[0])(statistics.fmean(values)) if values else None
        row["megabytes"] = row["bytes"] / 1e6
        if baseline and method != baseline and (bits, baseline) in groups:
            row |= paired(runs, groups[bits, baseline])
        rows.append(row)
    return rows


def paired(runs: list[dict], base: list[dict]) -> dict:
    """The paired columns of one row, from the seeds that both have; a run without a seed stands for every seed."""
    a, b = ({run["seed"]: run["kl"] for run in group} for group in (runs, base))
    if None not in a and None not in b:
        common = sorted(a.keys() & b.keys())
        if not common:
            return {}
        a, b = ({seed: values[seed] for seed in common} for values in (a, b))
    found = bootstrap(*(torch.tensor(list(values.values()), dtype=torch.float64) for values in (a, b)))
    return {"kl_difference": found.difference, "kl_difference_95": list(found.difference_interval),
            "kl_ratio": found.ratio, "kl_ratio_95": list(found.ratio_interval)}


def cells(row: dict, columns: dict) -> list[str]:
    found = []
    for key, (_, form) in columns.items():
        value = row.get(key)
        if isinstance(value, list):
            value = " .. ".join(("{:+.5f}" if key == "kl_difference_95" else "{:.3f}").format(v) for v in value)
        found.append("-" if value is None else form.format(value))
    return found


def write(results: dict, out: pathlib.Path, baseline: str | None = None) -> None:
    """table.md, table.csv and the plots into `out`; the table also to the terminal."""
    rows = rows_of(results, baseline)
    columns = {**COLUMNS, **(PAIRED if baseline else {})}
    settings, original = results["settings"], results["original"]
    title = (f"{settings['model']}, g{settings['group_size']}, {settings['measured']} x {settings['sequence_length']} held-out "
             f"tokens (split {settings['split']}), calibrated on {settings['samples']} x {settings['seq_len']}")
    perplexity = math.exp(statistics.fmean(original["loss"]))
    notes = [f"The original: perplexity {perplexity:.3f}, {original['bits_per_weight']:.3f} bits a weight, "
             f"{original['bytes']:,} bytes.",
             "KL(original || quantized) and loss in nats per token, means over seeds; max - min over seeds.", SECONDS]
    if baseline:
        notes.append(f"Base of the paired columns: {baseline}. Intervals: bootstrap over seeds and sequences.")
    commits = sorted({run["commit"] for run in results["runs"]})
    notes.append(f"Commit{'s' * (len(commits) > 1)} {', '.join(commits)}; {results['machine']}.")

    lines = [f"# {title}", "", "| " + " | ".join(heading for heading, _ in columns.values()) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cells(row, columns)) + " |" for row in rows]
    (out / "table.md").write_text("\n".join([*lines, "", *(f"{note}\n" for note in notes)]), "utf-8")
    with (out / "table.csv").open("w", encoding="utf-8", newline="") as file:
        flat = [{k: v for key, value in row.items() for k, v in
                 (((f"{key}_low", value[0]), (f"{key}_high", value[1])) if isinstance(value, list) else ((key, value),))}
                for row in rows]
        table = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
        table.writeheader()
        table.writerows(flat)

    table = Table(title=title, caption="\n".join(notes), caption_justify="left")
    for heading, _ in columns.values():
        named = heading == "method"
        table.add_column(heading, justify="left" if named else "right", overflow="fold", no_wrap=named)
    for row in rows:
        table.add_row(*cells(row, columns))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own, and 80 columns would cut the numbers
        console = Console(width=220)
    console.print(table)
    plot_bits(rows, "perplexity", "perplexity", out / "perplexity_by_bits.png", perplexity)
    plot_bits(rows, "kl", "KL(original || quantized), nats per token", out / "kl_by_bits.png")
    plot_layers(results, out / "layer_errors.png")
    print(f"numbers and plots in {out}")


def style(names: list[str]) -> dict[str, dict]:
    """A colour and a marker for every method, the same in all plots."""
    return {name: {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)}


def plot_bits(rows: list[dict], key: str, label: str, path: pathlib.Path, original: float | None = None) -> None:
    """`key` of every row against its bits per weight; bars from the lowest seed to the highest."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(row["method"] for row in rows))
    for name, look in style(names).items():
        own = [row for row in rows if row["method"] == name]
        bars = [[row[key] - row[f"{key}_range"][0] for row in own], [row[f"{key}_range"][1] - row[key] for row in own]]
        axes.errorbar([row["bits_per_weight"] for row in own], [row[key] for row in own], yerr=torch.tensor(bars).clamp(min=0),
                      label=name, linestyle="none", markersize=7, alpha=0.8, capsize=3, **look)
    if original is not None:
        axes.axhline(original, color="grey", linestyle="--", linewidth=1, label="original")
    axes.set(xlabel="bits per quantized weight, grid included", ylabel=label, yscale="log")
    axes.yaxis.set_major_formatter("{x:.3g}")  # not in powers of ten: there is one such on the axis, or none
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.grid(True, which="both", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=130)


def plot_layers(results: dict, path: pathlib.Path) -> None:
    """Relative error of every linear, in the order of solving, mean over seeds; one panel a number of bits."""
    names = list(dict.fromkeys(run["method"] for run in results["runs"]))
    without = [name for name in names if not any(run.get("layers") for run in results["runs"] if run["method"] == name)]
    bits = sorted({run["bits"] for run in results["runs"] if run.get("layers")}, reverse=True)
    path.unlink(missing_ok=True)
    if not bits:
        print(f"no {path.name}: {', '.join(without)} report no errors of layers")
        return
    figure = Figure(figsize=(11, 1 + 4 * len(bits)), layout="constrained")
    for axes, width in zip(figure.subplots(len(bits), squeeze=False)[:, 0], bits):
        for name, look in style(names).items():
            runs = [r["layers"] for r in results["runs"] if (r["method"], r["bits"]) == (name, width) and r.get("layers")]
            if runs:
                axes.plot([statistics.fmean(run[layer] for run in runs) for layer in runs[0]], label=name, markersize=4,
                          linewidth=1, alpha=0.8, **look)
        order = list(next(run["layers"] for run in results["runs"] if run["bits"] == width and run.get("layers")))
        blocks = [match[1] if (match := re.search(r"\.(\d+)\.", layer)) else layer for layer in order]
        starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
        starts = starts[:: 1 + len(starts) // 40]
        axes.set_xticks(starts, [blocks[i] for i in starts])
        axes.set(title=f"W{width}", xlabel="linears in the order of solving, by block", yscale="log",
                 ylabel="squared output error / output power")
        axes.grid(True, alpha=0.3)
        axes.legend(loc="best", fontsize="x-small")
    if without:
        figure.supxlabel(f"left out, because they report no errors of layers: {', '.join(without)}", fontsize="small")
    figure.savefig(path, dpi=130)
