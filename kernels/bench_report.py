"""What becomes of kernels/bench.py's measurements: comparisons, a table per shape, CSV, JSON and a plot.

A row is a dict: shape, n, k, m, kernel, kind, best_of, activations ("as given", or how they are rounded), note (None, or why
there is no time), and as far as it got
    bytes            of weights, x and y
    error, worst     against float64: relative, Frobenius norm; of the worst element over its standard deviation
    us               median of the rounds; us_min, us_max: the fastest and the slowest
    GB/s, TFLOP/s    of those bytes and of 2 m n k operations
    of_floor         1 is what the measured ceilings allow at best
    x_dense          above 1: faster than dense bf16
    x_best_peer      above 1: faster than the fastest kind "peer" of this shape and m; peers that round activations compete only
                     with kernels that do too
"""
from __future__ import annotations

import csv
import json
import pathlib

COLUMNS = ("device", "commit", "shape", "n", "k", "m", "kernel", "kind", "activations", "us", "us_min", "us_max", "GB/s",
           "TFLOP/s", "of_floor", "x_dense", "x_best_peer", "error", "worst", "bytes", "note")
DENSE = "dense bf16"
AS_GIVEN = "as given"


def compare(rows: list[dict]) -> list[dict]:
    """The rows of one shape and m, variants reduced to the fastest, with x_dense and x_best_peer where they have `us`."""
    kept = [row for row in rows if not row.get("best_of")]
    for family in dict.fromkeys(row["best_of"] for row in rows if row.get("best_of")):
        variants = [row for row in rows if row.get("best_of") == family]
        best = min(variants, key=lambda row: row.get("us", float("inf")))
        if "us" in best:
            best = {**best, "note": f"of {len(variants)}: {best['kernel']}"}
        kept.append({**best, "kernel": family})
    times = {row["kernel"]: row["us"] for row in kept if "us" in row}
    for row in kept:
        if "us" in row:
            peers = [other["us"] for other in kept if "us" in other and other["kind"] == "peer"
                     and (other["activations"] == AS_GIVEN or row["activations"] != AS_GIVEN)]
            row["x_dense"] = times[DENSE] / row["us"] if DENSE in times else None
            row["x_best_peer"] = min(peers) / row["us"] if peers else None
    return kept


def table(shape: str, n: int, k: int, rows: list[dict]) -> None:
    """One line per m: microseconds, the fastest marked, and the speed-up over dense."""
    from rich.console import Console
    from rich.table import Table
    rows = [row for row in rows if row["shape"] == shape]
    names = [name for name in dict.fromkeys(row["kernel"] for row in rows)
             if any("us" in row or row["note"].startswith(("wrong", "failed")) for row in rows if row["kernel"] == name)]
    shown = Table("M", *names, title=f"{shape}: {n} x {k}, microseconds (x {DENSE})", title_justify="left")
    for m in dict.fromkeys(row["m"] for row in rows):
        found = {row["kernel"]: row for row in rows if row["m"] == m}
        fastest = min((row["us"] for row in found.values() if "us" in row), default=None)
        shown.add_row(str(m), *(cell(found.get(name), fastest) for name in names))
    # a width of its own: a pipe has none, and a table cut at 80 columns is worthless
    Console(width=8 + sum(max(len(name), 18) + 3 for name in names)).print(shown)
    notes = [f"{row['kernel']}: activations rounded to {row['activations']}" for row in rows if row["activations"] != AS_GIVEN]
    notes += [f"{row['kernel']}: {row['note']}" for row in rows if row["note"] and "us" not in row]
    for note in dict.fromkeys(notes):
        print(f"  {note}")


def cell(row: dict | None, fastest: float | None) -> str:
    if row is None or "us" not in row:
        return "-" if row is None else row["note"].partition(":")[0]
    ratio = f" ({row['x_dense']:.2f})" if row["x_dense"] else ""
    return f"{row['us']:.1f}{ratio}{' *' if row['us'] == fastest else ''}"


def write(path: pathlib.Path, result: dict) -> None:
    """PATH.json and PATH.csv."""
    path.with_name(path.name + ".json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    with path.with_name(path.name + ".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in result["rows"]:
            rounded = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow({**rounded, "device": result["device"], "commit": result["commit"]})


def plot(path: pathlib.Path, result: dict) -> None:
    """PATH.png: speed-up over dense against m, a panel per shape, with what the measured ceilings allow."""
    from matplotlib.figure import Figure
    rows = [row for row in result["rows"] if row.get("x_dense")]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    if not shapes:
        return
    columns = min(4, len(shapes))
    lines = -(-len(shapes) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines + 0.8), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    names = list(dict.fromkeys(row["kernel"] for row in rows if row["kernel"] != DENSE))
    for shape, ax in zip(shapes, axes):
        here = [row for row in rows if row["shape"] == shape]
        for i, name in enumerate(names):
            points = [(row["m"], row["x_dense"]) for row in here if row["kernel"] == name]
            ours = any(row["kind"] == "ours" for row in here if row["kernel"] == name)
            ax.plot(*zip(*points) if points else ([], []), marker="o", markersize=3, color=f"C{i}", label=name,
                    linewidth=2.2 if ours else 1)
        limit = [(row["m"], row["x_dense"] / row["of_floor"]) for row in here if row["kernel"] == DENSE]
        if limit:
            ax.plot(*zip(*limit), "k--", linewidth=0.8, label="measured ceilings")
        ax.axhline(1, color="gray", linewidth=0.8)
        ax.set(title=f"{shape} ({here[0]['n']} x {here[0]['k']})", xscale="log", yscale="log", xlabel="M")
        ax.set_xscale("log", base=2)
    for ax in list(axes):
        ax.set_visible(False)
    first = figure.axes[0]
    first.set_ylabel(f"speed-up over {DENSE}")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"{result['device']}, commit {result['commit']}", fontsize=9)
    figure.savefig(path.with_name(path.name + ".png"), dpi=120)
