"""What `foem analyze` says: estimates with intervals, shares, a verdict, tables and a picture, from values per sequence.

The quantities are those of foem_vllm.analyze: loss changes in nats per token, squared errors per token and output.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import torch

from foem_vllm.errors import FoemError

SETTINGS = ("single", "cumulative")
TERMS = ("first_order", "second_order", "remainder")
OBJECTIVE = ("quadratic", "cross", "constant")
STEPS = (0.05, 0.1)  # of the central differences, as fractions of delta
RESAMPLES = 2000
AGREES, DISAGREES = 0.25, 0.10
LABELS = {"single": "one layer at a time", "cumulative": "cumulative, behind a quantized prefix"}


class Bootstrap:
    """95 % intervals by resampling sequences, with a generator of its own; the same resamples for every quantity."""

    def __init__(self, sequences: int):
        generator = torch.Generator().manual_seed(0)
        self.draws = torch.randint(sequences, (RESAMPLES, sequences), generator=generator)

    def _estimate(self, statistic: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> dict[str, float]:
        """statistic: means [..., M] -> [...]; values: [S, M] float64."""
        low, high = statistic(values[self.draws].mean(1)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return {"mean": float(statistic(values.mean(0))), "low": low, "high": high}

    def mean(self, values: torch.Tensor) -> dict[str, float]:
        """values: [S], at least two sequences."""
        return self._estimate(lambda m: m[..., 0], values[:, None])

    def share(self, part: list[torch.Tensor], whole: list[torch.Tensor], magnitude: bool = False) -> dict[str, float]:
        """sum of parts / sum of wholes over layers, of means over sequences (with `magnitude`: of their absolute values).

        part, whole: [S] per layer. Absolute values do not let layers cancel, but they count noise as signal.
        """
        count, size = len(part), torch.abs if magnitude else (lambda m: m)

        def ratio(means: torch.Tensor) -> torch.Tensor:
            below = size(means[..., count:]).sum(-1)
            return size(means[..., :count]).sum(-1) / below.where(below != 0, torch.inf)

        return self._estimate(ratio, torch.stack([*part, *whole], 1))


def holds_zero(estimate: dict[str, float]) -> bool:
    return estimate["low"] <= 0 <= estimate["high"]


def judge(share: dict[str, float], change: dict[str, float]) -> str:
    """Whether a first-order share of the loss change supports FOEM's story: "agrees", "disagrees" or "undecided".

    The story: after compensation the gradient at the working weights is not zero, so first-order terms are a part of the loss
    change that is worth correcting. It agrees when the 95 % interval of the share lies above AGREES (25 %) or below -25 %
    (first-order terms that lower the loss matter as much): a quarter of the effect is no detail. It disagrees when the interval
    lies within DISAGREES (10 %) of zero: then the second-order picture of GPTQ misses little. Undecided otherwise, and when the
    loss change itself cannot be told from zero, because a share of nothing means nothing.
    """
    low, high = share["low"], share["high"]
    if holds_zero(change):
        return "undecided"
    if low > AGREES or high < -AGREES:
        return "agrees"
    return "disagrees" if -DISAGREES < low and high < DISAGREES else "undecided"


def verdict(content: dict) -> list[str]:
    """The verdict in words, computed from an analysis; the rule is `judge`'s."""
    lines = []
    meaning = {
        "agrees": "this agrees with FOEM's story that first-order terms matter",
        "disagrees": "this disagrees with FOEM's story that first-order terms matter",
        "undecided": f"undecided (agreement needs an interval beyond {AGREES:.0%}, disagreement one within {DISAGREES:.0%}); "
        "more --sequences narrow it",
    }
    for setting in SETTINGS:
        sums = content["totals"][setting]
        line = f"{LABELS[setting]}: the summed loss change is {span(sums['measured'], '+.2e')} nats/token"
        if holds_zero(sums["measured"]):
            lines.append(f"{line}, which these tokens cannot tell from zero: undecided; use more --sequences")
            continue
        shares = sums["shares"]
        beyond = f"beyond noise in {sums['significant']['first_order']} of {len(content['layers'])} linears"
        lines.append(
            f"{line}; first-order terms sum to {span(sums['first_order'], '+.2e')} ({beyond}), second-order to "
            f"{span(sums['second_order'], '+.2e')}; first-order are {span(shares['first_order'], '.1%')} of it, second-order "
            f"{shares['second_order']['mean']:.1%}, remainder {shares['remainder']['mean']:.1%}: {meaning[sums['judgement']]}"
        )
    lines.append(
        "layer objective |W0 X_fp - Q X_q|^2: the first-order (cross) term is "
        f"{span(content['objective']['cross'], '.1%')} of it, the quadratic one {content['objective']['quadratic']['mean']:.1%}"
    )
    return lines


def span(estimate: dict[str, float], form: str) -> str:
    """mean [low, high]"""
    return f"{estimate['mean']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"


def add_up(bootstrap: Bootstrap, layers: list[dict[str, torch.Tensor]]) -> dict:
    """Sums over layers, and what shares of them the terms are. layers: name of term -> [S].

    significant: how many layers have a term whose interval leaves zero out. With 42 layers and no effect at all, two would.
    """
    change = [layer["measured"] for layer in layers]
    content = {name: bootstrap.mean(sum(layer[name] for layer in layers)) for name in layers[0]}
    for key, magnitude in (("shares", False), ("magnitude_shares", True)):
        content[key] = {name: bootstrap.share([layer[name] for layer in layers], change, magnitude) for name in TERMS}
    content["significant"] = {
        name: sum(not holds_zero(bootstrap.mean(layer[name])) for layer in layers) for name in ("measured", *TERMS)
    }
    content["judgement"] = judge(content["shares"]["first_order"], content["measured"])
    return content


def kind(name: str) -> str:
    """q, k, v, o, gate, up, down, or whatever an architecture calls its linears."""
    return name.rpartition(".")[2].removesuffix("_proj")


def inside(estimates: dict[str, dict[str, float]], key: str, step: float) -> bool:
    """Whether the derivative's mean lies within the interval of the central difference with `step`."""
    difference = estimates[f"{key}_{step}"]
    return difference["low"] <= estimates[key]["mean"] <= difference["high"]


def summarize(
    terms: dict[str, dict[str, dict[str, torch.Tensor]]],
    objective: dict[str, dict[str, torch.Tensor]],
    relative: dict[str, float],
    original_loss: torch.Tensor,
    quantized_loss: torch.Tensor,
) -> dict:
    """Estimates, totals, shares and the verdict from values per sequence [S] (terms: setting -> linear -> term)."""
    bootstrap = Bootstrap(len(original_loss))
    layers = []
    for name in objective:
        layer = {"name": name, "kind": kind(name), "relative_change": relative[name]}
        for setting in SETTINGS:
            values = terms[setting][name]
            layer[setting] = {key: bootstrap.mean(value) for key, value in values.items()}
            layer[setting]["per_sequence"] = {key: values[key].tolist() for key in ("measured", *TERMS)}
            layer[setting]["inside"] = {f"{key}_{h}": inside(layer[setting], key, h) for key in TERMS[:2] for h in STEPS}
        layer["objective"] = {key: bootstrap.mean(value) for key, value in objective[name].items()}
        layers.append(layer)
    kinds = {k: [name for name in objective if kind(name) == k] for k in dict.fromkeys(map(kind, objective))}
    # Outputs of different linears have different scales: each is divided by its power before they are added up.
    scaled = {key: [values[key] / values["power"].mean() for values in objective.values()] for key in (*OBJECTIVE, "total")}
    added = sum(float(values["measured"].mean()) for values in terms["cumulative"].values())
    change = quantized_loss - original_loss
    content = {
        "loss": {
            "original": bootstrap.mean(original_loss),
            "quantized": bootstrap.mean(quantized_loss),
            "change": bootstrap.mean(change),
        },
        "telescoping": {"sum": added, "total": float(change.mean()), "difference": added - float(change.mean())},
        "totals": {setting: add_up(bootstrap, list(terms[setting].values())) for setting in SETTINGS},
        "kinds": {
            k: {setting: add_up(bootstrap, [terms[setting][name] for name in names]) for setting in SETTINGS}
            for k, names in kinds.items()
        },
        "objective": {key: bootstrap.share(scaled[key], scaled["total"]) for key in OBJECTIVE},
        "layers": layers,
    }
    return {"verdict": verdict(content), **content}


def print_tables(content: dict) -> None:
    """Layers, sums by kind of layer, checks, verdict, on the terminal. Loss changes in 1e-3 nats per token."""
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def milli(estimate: dict[str, float], interval: bool = True) -> str:
        values = {key: 1e3 * value for key, value in estimate.items()}
        return span(values, "+.2f") if interval else f"{values['mean']:+.2f}"

    def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    for setting in SETTINGS:
        rows = []
        for layer in content["layers"]:
            found = layer[setting]
            within = sum(found["inside"][f"second_order_{h}"] for h in STEPS)
            rows.append(
                [layer["name"], milli(found["measured"]), *(milli(found[t], t != "remainder") for t in TERMS), f"{within}/2"]
            )
        sums = content["totals"][setting]
        rows.append(["sum", milli(sums["measured"]), *(milli(sums[t], t != "remainder") for t in TERMS), ""])
        columns = ["layer", "measured", "first order", "second order", "remainder", "checks"]
        show(f"{LABELS[setting]}: loss change, 1e-3 nats/token [95 %]", columns, rows)
    rows = []
    for setting in SETTINGS:
        for name, sums in (*((k, v[setting]) for k, v in content["kinds"].items()), ("all", content["totals"][setting])):
            shares = ["-"] * 3 if holds_zero(sums["measured"]) else [f"{sums['shares'][t]['mean']:.0%}" for t in TERMS]
            sizes = [f"{sums['magnitude_shares'][t]['mean']:.0%}" for t in TERMS]
            rows.append([f"{setting} {name}", " / ".join(shares), " / ".join(sizes), str(sums["significant"]["first_order"])])
    columns = ["kind", "of the sum", "of the sum of absolute values", "layers with a first order beyond noise"]
    show("shares: first order / second order / remainder (-: the change is not beyond noise)", columns, rows)
    rows = [
        [layer["name"], *(f"{layer['objective'][t]['mean'] / layer['objective']['power']['mean']:.2e}" for t in OBJECTIVE)]
        for layer in content["layers"]
    ]
    show("|W0 X_fp - Q X_q|^2 / |W0 X_fp|^2", ["layer", *OBJECTIVE], rows)
    telescoping = content["telescoping"]
    console.print(
        f"cumulative changes add up to {telescoping['sum']:+.6e}, the loss changes by {telescoping['total']:+.6e} nats/token",
        soft_wrap=True,
    )


def plotting():
    """matplotlib.pyplot without a display; FoemError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise FoemError("the picture needs matplotlib, which is not installed; run: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(content: dict, path: pathlib.Path) -> None:
    """Two panels, one per setting: stacked terms of every layer with the measured change and its interval."""
    pyplot = plotting()
    layers = content["layers"]
    figure, axes = pyplot.subplots(
        2, 1, figsize=(max(8, min(24, 2 + 0.24 * len(layers))), 8), sharex=True, sharey=True, layout="constrained"
    )
    colors = dict(zip(TERMS, ("#d95f02", "#4c72b0", "#999999")))
    places = range(len(layers))
    for axis, setting in zip(axes, SETTINGS):
        up, down = torch.zeros(len(layers)), torch.zeros(len(layers))
        for term in TERMS:
            height = torch.tensor([1e3 * layer[setting][term]["mean"] for layer in layers])
            base = torch.where(height >= 0, up, down)  # each sign is stacked by itself
            axis.bar(places, height.tolist(), bottom=base.tolist(), width=0.8, color=colors[term], label=term.replace("_", " "))
            up, down = up + height.clamp(min=0), down + height.clamp(max=0)
        measured = [{k: 1e3 * v for k, v in layer[setting]["measured"].items()} for layer in layers]
        bars = [[m["mean"] - m["low"] for m in measured], [m["high"] - m["mean"] for m in measured]]
        axis.errorbar(
            places, [m["mean"] for m in measured], yerr=bars, fmt="D", ms=3.5, lw=0.9, color="black", label="measured, 95 %"
        )
        axis.axhline(0, color="black", lw=0.6)
        axis.set_ylabel("loss change, 1e-3 nats/token")
        whole, first = (1e3 * content["totals"][setting][t]["mean"] for t in ("measured", "first_order"))
        axis.set_title(f"{LABELS[setting]}: sum {whole:+.1f}, of which first order {first:+.1f}", loc="left", fontsize=10)
    figure.suptitle(
        f"{content['recipe']['checkpoint']} of {content['recipe']['source']}: loss change of every quantized linear",
        x=0.01,
        ha="left",
    )
    axes[0].legend(ncols=4, frameon=False, fontsize=9)
    blocks = [next((part for part in layer["name"].split(".") if part.isdigit()), "") for layer in layers]
    few = len(layers) <= 90
    for axis in axes:
        for i in places:
            if i and blocks[i] != blocks[i - 1]:
                axis.axvline(i - 0.5, color="#dddddd", lw=0.8, zorder=0)
    shown = [i for i in places if few or i == 0 or blocks[i] != blocks[i - 1]]
    axes[1].set_xticks(shown, [f"{blocks[i]} {layers[i]['kind']}" if few else blocks[i] for i in shown], rotation=90, fontsize=8)
    axes[1].set_xlabel("block and linear, in the order of execution" if few else "block, in the order of execution")
    axes[1].set_xlim(-0.8, len(layers) - 0.2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def prepare(folder: pathlib.Path) -> None:
    """Find out before the long computation whether the results can be drawn and written."""
    plotting()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FoemError(f"--output {folder}: cannot be created ({error.strerror}); choose another folder") from None


def write(content: dict, folder: pathlib.Path) -> None:
    """analysis.json and analysis.png in `folder`."""
    text = json.dumps(content, indent=1)
    (folder / "analysis.json").write_text(text + "\n", "utf-8")
    plot(content, folder / "analysis.png")
