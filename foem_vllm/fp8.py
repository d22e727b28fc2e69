"""Weights stored in 8-bit floating point, read as what they stand for: the value times its scale, in bfloat16.

Two ways of storing them: `quant_method` fp8 (DeepSeek, Qwen3-FP8: one scale a block, or one a tensor) and compressed-tensors'
float-quantized (one a tensor, an output or a block). Left out, and refused: everything with fewer bits, and packed formats.
"""

from __future__ import annotations

import torch

from foem_vllm.errors import FoemError

DTYPES = ("F8_E4M3", "F8_E5M2")
SCALES = ("weight_scale_inv", "weight_scale")
OTHERS = ("input_scale", "output_scale", "k_scale", "v_scale")  # of activations: not needed, and not true of another model
Header = tuple[str, tuple[int, ...]]


def block_size(config: dict, where: str) -> tuple[int, int] | None:
    """(outputs, inputs) that share a scale, None where the scales' shapes say it all; config: a quantization_config.

    Raises FoemError when that is not of a kind that is read here.
    """
    method = str(config.get("quant_method", "unknown"))
    if method == "fp8":
        size = config.get("weight_block_size")
        return tuple(size) if size else None
    groups = [group.get("weights") or {} for group in (config.get("config_groups") or {}).values()]
    plain = groups and all(w.get("type") == "float" and w.get("num_bits") == 8 for w in groups)
    if method == "compressed-tensors" and config.get("format") == "float-quantized" and plain:
        sizes = {tuple(w["block_structure"]) for w in groups if w.get("block_structure")}
        if len(sizes) < 2:
            return next(iter(sizes), None)
    raise FoemError(f"{where}: the weights are already quantized ({method}); start from the original model")


def find_scales(headers: dict[str, Header], where: str) -> dict[str, str]:
    """{weight stored in 8 bits: its scale}. Raises FoemError when one has none."""
    found = {}
    for name, (dtype, _) in headers.items():
        if dtype not in DTYPES:
            continue
        scales = [f"{name.removesuffix('weight')}{key}" for key in SCALES if name.endswith(".weight")]
        scale = next((s for s in scales if s in headers), None)
        if scale is None:
            raise FoemError(f"{where}: {name} is {dtype}, but has no {' or '.join(SCALES)}; download the model again")
        found[name] = scale
    return found


def dequantized(name: str, value: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """value [N, K] times scale: one number, one an output ([N] or [N, 1]), or one a block ([N / n, K / k], rounded up).

    Returns bfloat16. Raises FoemError when the shapes do not fit.
    """
    n, k = value.shape
    scale = scale.float()
    if scale.numel() > 1 and scale.shape not in ((n,), (n, 1)):
        if block is None or scale.shape != (-(-n // block[0]), -(-k // block[1])):
            raise FoemError(
                f"{name} is {[n, k]}, but its scale {list(scale.shape)}, with blocks of {block}; config.json and weights are of "
                "different models: download both again"
            )
        scale = scale.repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]
    elif scale.numel() > 1:
        scale = scale.view(n, 1)
    return (value.float() * scale).to(torch.bfloat16)
