"""Options that several commands of `foem` take, and how options of a kind are declared."""

from __future__ import annotations

from typing import Annotated

import typer

from foem_vllm.recipe import AUTO, QuantizeConfig

DEFAULTS = QuantizeConfig()


def _number_or_auto(value: str) -> float | str:
    if value == AUTO:
        return value
    try:
        return float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a number nor {AUTO}") from None


def method_option(*flags: str, **how) -> typer.models.OptionInfo:
    return typer.Option(*flags, rich_help_panel="Method", **how)


def calibration_option(*flags: str, **how) -> typer.models.OptionInfo:
    return typer.Option(*flags, rich_help_panel="Calibration", **how)


def auto_option(help: str) -> typer.models.OptionInfo:
    return method_option(help=help, parser=_number_or_auto, metavar="NUMBER|auto")


# What several commands take.
Model = Annotated[str, typer.Argument(help="Model folder, or hub name such as Qwen/Qwen3-0.6B.")]
GroupSize = Annotated[int, method_option(help="Columns that share a scale; -1 for a whole row.")]
Source = Annotated[str, calibration_option("--calibration", help="Hub data set, or a .txt, .jsonl, .json.gz or .parquet file.")]
Samples = Annotated[int, calibration_option(help="Sequences.")]
SeqLen = Annotated[int, calibration_option(help="Tokens a sequence.")]
TextColumn = Annotated[str, calibration_option(help="Field or column that holds the text.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU where there is one.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no tables.")]
