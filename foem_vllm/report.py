"""What happened to every layer: collected while quantizing, stored as foem_report.json, shown as a table."""

from __future__ import annotations

import pathlib
import platform
import re
from dataclasses import asdict, dataclass, field, fields

import torch

from foem_vllm.experts import coverage

REPORT_FILE = "foem_report.json"
HTML_FILE = "foem_report.html"  # the same as a page, see html_report


@dataclass
class LayerResult:
    """One quantized linear [n, k]. loss: tr(E H E^T) / N a calibration token, E = Q - target. relative: over the outputs' power
    (rows.power). correction: strength of the corrected target, 0 to 1. chosen: what was chosen on held-out text, and why
    (selection.Choice). descent: whether its codes were moved once more, None when not asked for."""

    name: str
    n: int
    k: int
    bits: int
    group_size: int
    loss: float | None = None
    relative: float | None = None
    damping: float | None = None
    tokens: int = 0
    notes: list[str] = field(default_factory=list)
    correction: float | None = None
    chosen: dict | None = None
    descent: bool | None = None


@dataclass
class Report:
    """layers: in the order they were solved. skipped: parameters left unquantized, with the reason. seconds: wall time.
    tuning: KL(original || quantized) on calibration text that the scales were not tuned on, before and after, nats a token; equal
    where tuning did not lower it and was dropped.
    model: what was quantized, see `source_name`. memory: bytes at most, in host memory and on the GPU. chosen_bits: see
    `sensitivity.choose_bits`, None where nothing was to choose."""

    recipe: dict
    layers: list[LayerResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tuning: dict[str, float] | None = None
    model: str = ""
    memory: dict[str, int] = field(default_factory=dict)
    chosen_bits: dict | None = None

    @classmethod
    def from_json(cls, content: dict) -> Report:
        """What `to_json` made, but for the environment and what follows from the layers."""
        kept = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        return cls(**{**kept, "layers": [LayerResult(**layer) for layer in content["layers"]]})

    def to_json(self) -> dict:
        import transformers

        from foem_vllm import __version__

        environment = {
            "foem_vllm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        return {
            "model": self.model,
            "recipe": self.recipe,
            "environment": environment,
            "seconds": self.seconds,
            "memory": self.memory,
            "tuning": self.tuning,
            "chosen_bits": self.chosen_bits,
            "by_kind": by_kind(self.layers),
            "tokens_of_experts": coverage({layer.name: layer.tokens for layer in self.layers}),
            "layers": [asdict(layer) for layer in self.layers],
            "skipped": self.skipped,
        }


def tuning_told(tuning: dict[str, float]) -> tuple[str, str]:
    """(figure, what it is) of Report.tuning, for a reader; says so where tuned scales were no better and were dropped."""
    before, after = tuning["held_out_kl_before"], tuning["held_out_kl_after"]
    what = "KL to the original on calibration text that was not tuned on, nats a token; "
    if after < before:
        return f"{before:.5f} \N{RIGHTWARDS ARROW} {after:.5f}", what + "scales tuned"
    return f"{before:.5f}", what + "tuning scales did not lower it: they stay as they were"


def by_kind(layers: list[LayerResult]) -> dict[str, dict]:
    """Per kind of linear (last two parts of its name, as mlp.up_proj, experts without their number): how many there are, their
    mean relative error and strength of correction, and how often each alpha, beta and damping was chosen on held-out text, with
    the mean gain."""
    kinds: dict[str, list[LayerResult]] = {}
    for layer in layers:
        parts = [part for part in layer.name.split(".") if not part.isdecimal()]
        kinds.setdefault(".".join(parts[-2:]), []).append(layer)

    def mean(values):
        values = [v for v in values if v is not None]
        return sum(values) / len(values) if values else None

    table = {}
    for kind, members in kinds.items():
        chosen = [m.chosen for m in members if m.chosen]
        table[kind] = {
            "linears": len(members),
            "relative": mean(m.relative for m in members),
            "correction": mean(m.correction for m in members),
        }
        if chosen:
            table[kind]["gain"] = mean(c["gain"] for c in chosen)
            for name in ("alpha", "beta", "damping"):
                values = [c[name] for c in chosen]
                table[kind][name] = {f"{v:g}": values.count(v) for v in sorted(set(values))}
    return table


def kind_table(kinds: dict[str, dict]):
    """A rich table of `by_kind`."""
    from rich.table import Table

    table = Table(title="by kind of linear: what was chosen on held-out calibration text (value x times)", title_justify="left")
    for column in ("kind", "linears", "relative error", "correction", "alpha", "beta", "damping", "held-out gain"):
        table.add_column(column, justify="left" if column == "kind" else "right", overflow="fold")
    for kind, row in kinds.items():
        counts = [", ".join(f"{v} x {n}" for v, n in row.get(name, {"-": 0}).items()) for name in ("alpha", "beta", "damping")]
        counts = ["-" if c == "- x 0" else c for c in counts]
        relative, correction, gain = (row.get(name) for name in ("relative", "correction", "gain"))
        table.add_row(
            kind,
            str(row["linears"]),
            "-" if relative is None else f"{relative:.2e}",
            "-" if correction is None else f"{correction:.2f}",
            *counts,
            "-" if gain is None else f"{gain:.1%}",
        )
    return table


def bits_table(chosen: dict):
    """A rich table of the bits that were chosen (`Report.chosen_bits`): a row a block, a column for linears that share them."""
    from rich.table import Table

    blocks: dict[str, dict[str, str]] = {}
    for group in chosen["groups"]:
        number = re.search(r"\.(\d+)\.", group["linears"][0])
        kind = ", ".join(name.rpartition(".")[2] for name in group["linears"])
        bits = str(group["bits"])
        blocks.setdefault(number[1] if number else "-", {})[kind] = bits
    kinds = list(dict.fromkeys(kind for row in blocks.values() for kind in row))
    one = chosen["one_width"]
    beside = f"; {one['expected_kl']:.4f} with {one['bits']} bits everywhere" if one else ""
    title = f"bits: {chosen['bits_per_weight']:.4f} a weight, expected KL {chosen['expected_kl']:.4f} nats a token{beside}"
    table = Table(title=title, title_justify="left")
    for column in ("block", *kinds):
        table.add_column(column, justify="right", overflow="fold")
    for number, row in blocks.items():
        table.add_row(number, *(row.get(kind, "-") for kind in kinds))
    return table


def layer_table(layers: list[dict], title: str):
    """A rich table of the report's layers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column, justify in (
        ("layer", "left"),
        ("N x K", "right"),
        ("bits", "right"),
        ("group", "right"),
        ("relative error", "right"),
        ("notes", "left"),
    ):
        table.add_column(column, justify=justify, overflow="fold")
    for row in layers:
        relative = "-" if row["relative"] is None else f"{row['relative']:.2e}"
        table.add_row(
            row["name"], f"{row['n']} x {row['k']}", str(row["bits"]), str(row["group_size"]), relative, "; ".join(row["notes"])
        )
    return table


def source_name(model: str | pathlib.Path) -> str:
    """What a report calls a model: its hub name, or the name of a local folder without the path, which says nothing elsewhere."""
    path = pathlib.Path(model)
    return path.absolute().name if path.exists() else str(model)
