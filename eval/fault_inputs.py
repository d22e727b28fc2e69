"""Models and texts that make trouble, for faults.py: each ends in a right checkpoint or a clear error."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from tiny_models import CALIBRATION

if TYPE_CHECKING:
    from faults import Bench


def numbers(bench: Bench) -> None:
    """Inputs on which second moments are singular, zero or not finite."""

    def overflow(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.input_layernorm.weight"] *= 1e38

    def same_columns(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")):
                weight[1::2] = weight[::2]
            elif "embed" in name:
                weight[:, 1::2] = weight[:, ::2]

    def dead_columns(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if name.endswith("layernorm.weight"):
                weights[name][::4] = 0

    def dead_input(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.input_layernorm.weight"].zero_()

    bench.failing("activations that are not finite, in block 1", "NaN or Inf", model=edited(bench, overflow))
    for what, edit in (
        ("every input column twice (Hessian of half the rank)", same_columns),
        ("every fourth input column zero", dead_columns),
        ("all inputs of a block's attention zero", dead_input),
    ):
        for preset in ("balanced", "best"):
            bench.surviving(f"{what}, {preset}", edited(bench, edit), "--preset", preset)
    bench.surviving("every input column twice, --damp 0", edited(bench, same_columns), "--damp", "0")


def texts(bench: Bench) -> None:
    def file(name: str, documents: list[str]) -> tuple[str, str]:
        path = bench.folder / name
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        return "--calibration", str(path)

    document = json.loads(CALIBRATION.read_text().splitlines()[0])["text"] * 4
    model = bench.folder / "dense"
    one_token = file("one.jsonl", ["the " * 4000])
    bench.surviving("calibration text of one token (Hessian of rank one, or nearly)", model, *one_token)
    bench.surviving("the same with --damp 0", model, *one_token, "--damp", "0")
    bench.surviving("one calibration text, 64 times", model, *file("same.jsonl", [document] * 64))
    bench.surviving("calibration texts, two of three empty", model, *file("some.jsonl", [document, "", ""] * 64))
    bench.failing("only empty calibration texts", "0 tokens, but", options=file("empty.jsonl", [""] * 64))


def edited(bench: Bench, edit: Callable[[dict[str, torch.Tensor]], None]) -> pathlib.Path:
    """The dense model with other weights."""
    model = bench.new() / "model"
    shutil.copytree(bench.folder / "dense", model)
    weights = load_file(model / "model.safetensors")
    edit(weights)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return model
