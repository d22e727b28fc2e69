"""README.md of a checkpoint: the hub's front matter, and what a reader of the model's page wants to know, from the report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from foem_vllm.report import HTML_FILE, REPORT_FILE

WORST = 5  # linears that are named

PAGE = """\
---
{front}
---

# {name}, quantized with foem-vllm

GPTQ-format INT{bits} weights: {megabytes:.1f} MB in all, {bits_per_weight:.2f} bits a quantized weight, scales included.
{linears} linears, {method}. What was chosen for each, its error and the time it took: `{page}`, for programs `{report}`.

## Serve

    vllm serve THIS_FOLDER --quantization foem

## Errors

{errors}

## Calibration text and licence

{text}

The licence of this model is unknown: those of the original model and of that text were not among what was read. Look them up
before you publish it.

## Recipe

{recipe}
"""


def model_card(report: dict) -> str:
    """Markdown. report: see checkpoint.read_report."""
    recipe, storage = report["recipe"], report["storage"]
    widths = sorted({layer["bits"] for layer in report["layers"]})
    preset = f"preset {recipe['preset']} of method" if "preset" in recipe else "method"
    return PAGE.format(
        front=front_matter(report.get("model", ""), widths),
        name=plain(report.get("model", "").split("/")[-1] or "A model"),
        bits=" and INT".join(map(str, widths)),
        megabytes=storage["bytes"] / 1e6,
        bits_per_weight=storage["bits_per_weight"],
        linears=len(report["layers"]),
        method=f"{preset} {code(recipe['method'])}",
        page=HTML_FILE,
        report=REPORT_FILE,
        errors=errors(report["layers"]),
        text=calibration(recipe),
        recipe=table(["setting", "value"], recipe.items()),
    )


def front_matter(source: str, widths: list[int]) -> str:
    """YAML; JSON is YAML, and quotes what needs it. base_model only where the model has a hub name."""
    base = {"base_model": source, "base_model_relation": "quantized"} if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else {}
    content = {
        **base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gptq", *(f"{bits}-bit" for bits in widths), "foem"],
    }
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in content.items())


def errors(layers: list[dict]) -> str:
    known = sorted((x for x in layers if x["relative"] is not None), key=lambda x: x["relative"], reverse=True)
    if not known:
        return "Rounded to nearest without calibration text, so no error of a layer is known."
    mean = sum(x["relative"] for x in known) / len(known)
    rows = [(x["name"], f"{x['relative']:.2e}", x["bits"]) for x in known[:WORST]]
    what = (
        f"Power of a linear's output error over power of its output, on the calibration text: {mean:.2e} on average. The worst:"
    )
    return f"{what}\n\n{table(['linear', 'relative error', 'bits'], rows)}"


def calibration(recipe: dict) -> str:
    if "calibration" not in recipe:
        return "No calibration text was read."
    return (
        f"{recipe['samples']} sequences of {recipe['seq_len']} tokens from {code(recipe['calibration'])}, sha256 of the tokens "
        f"`{recipe['calibration_sha256']}`."
    )


def table(columns: list[str], rows: Iterable[tuple]) -> str:
    """The first column in code, so that names keep their underscores."""
    body = [f"| {code(first)} | {' | '.join(map(plain, rest))} |" for first, *rest in rows]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *body])


def plain(value: object) -> str:
    """Text on one line that Markdown takes as it is."""
    return re.sub(r"([\\`*_<>\[\]|#&])", r"\\\1", " ".join(str(value).split()))


def code(value: object) -> str:
    """The same in code; a table would end at a bare |."""
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("|", "\\|") + "`"
