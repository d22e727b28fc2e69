"""Quantize a model with GPTQModel in many configurations, and say what each checkpoint means. Runs in GPTQModel's environment.

    python gptqmodel_matrix.py FOLDER

FOLDER holds models and tokens.safetensors (`calibration` and `texts`, int64 [sequences, length]) and jobs.json: [{"name",
"model", "config" or null}]. model: its folder there; config: of GPTQModel's QuantizeConfig; null: FOLDER/name was written by
somebody else. Writes the checkpoints FOLDER/name and FOLDER/name.json: `refused` with GPTQModel's reason, or `logprobs` of every
token of the texts given those before it, on GPTQModel's own dequantized weights (its torch kernel, scales widened to float32) in
float32. What has a result already is left alone.
"""
from __future__ import annotations

import gc
import json
import pathlib
import shutil
import sys
import time

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors.torch import load_file


def write(source: pathlib.Path, out: pathlib.Path, config: dict, ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = GPTQModel.load(str(source), QuantizeConfig(**config), device="cpu")
    model.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids], batch_size=1,
                   calibration_sort=None)
    model.save(str(out))


def relabelled(checkpoint: pathlib.Path) -> pathlib.Path:
    """A copy of somebody else's checkpoint that says it is GPTQModel's: asymmetric ones of others it does not read."""
    copy = checkpoint.with_name(f"{checkpoint.name}.relabelled")
    shutil.copytree(checkpoint, copy, dirs_exist_ok=True)
    for file in ("config.json", "quantize_config.json"):
        if (copy / file).is_file():
            content = json.loads((copy / file).read_text())
            content.get("quantization_config", content)["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
            (copy / file).write_text(json.dumps(content))
    return copy


@torch.no_grad()
def dequantized(checkpoint: pathlib.Path) -> torch.nn.Module:
    """The model with an ordinary float32 linear in place of every quantized one."""
    model = GPTQModel.load(str(checkpoint), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseQuantLinear):
            module.scales = module.scales.float()
            weight = module.dequantize_weight().T
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
            linear.weight.copy_(weight)
            if module.bias is not None:
                linear.bias.copy_(module.bias)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, linear)
    return model.float().eval()


@torch.no_grad()
def chosen(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[texts, length - 1]: log-probability of every token given those before it."""
    return model(ids).logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


def run(folder: pathlib.Path, job: dict, tokens: dict[str, torch.Tensor]) -> dict:
    out, start = folder / job["name"], time.perf_counter()
    if job["config"] is not None:
        shutil.rmtree(out, ignore_errors=True)
        try:
            write(folder / job["model"], out, job["config"], tokens["calibration"])
        except Exception as error:  # whatever it is, it is why this checkpoint does not exist
            return {"refused": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - start
    try:
        model = dequantized(out if job["config"] is not None else relabelled(out))
    except Exception as error:
        return {"unread": f"{type(error).__name__}: {error}", "seconds": seconds}
    return {"seconds": seconds, "logprobs": chosen(model, tokens["texts"]).tolist()}


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    tokens = load_file(folder / "tokens.safetensors")
    for job in json.loads((folder / "jobs.json").read_text()):
        result = folder / f"{job['name']}.json"
        if not result.is_file():
            result.write_text(json.dumps(run(folder, job, tokens)))
            gc.collect()


if __name__ == "__main__":
    main()
