"""One tensor-parallel rank: vLLM's linear layers loaded with every form of checkpoint, their outputs written to a file.

    python tests/parallel_layers.py RANK WORLD FOLDER
"""
import pathlib
import sys

import torch
from checkpoints import rtn
from vllm_layers import block, load, rank_of

from foem_vllm.format import FormatConfig, QuantSpec, dequantize, pack
from foem_vllm.plugin.config import FoemConfig

# Nothing is a multiple of anything: 108 inputs of down_proj a rank, one head of keys for both ranks, 1000 tokens of 1024.
SIZES = dict(hidden=192, heads=4, kv_heads=1, head_dim=32, inner=216, vocab=1000)
PREFIX = "model.layers.0"
SHAPES = {
    **{f"{PREFIX}.self_attn.{name}": shape for name, shape in
       {"q_proj": (128, 192), "k_proj": (32, 192), "v_proj": (32, 192), "o_proj": (192, 128)}.items()},
    **{f"{PREFIX}.mlp.{name}": shape for name, shape in
       {"gate_proj": (216, 192), "up_proj": (216, 192), "down_proj": (192, 216)}.items()},
    "lm_head": (1000, 192),
}  # fmt: skip
FORMS = {
    "sym": (QuantSpec(4, 32), "gptq", {}),
    "straddled": (QuantSpec(4, 128, False), "gptq", {}),
    "per row": (QuantSpec(4, -1, False), "gptq_v2", {}),
    "odd groups": (QuantSpec(4, 24), "gptq", {}),
    "act-order": (QuantSpec(4, 32, True, "full"), "gptq", {}),
    "act-order asym": (QuantSpec(4, 128, False, "full"), "gptq_v2", {}),
    "int2": (QuantSpec(2, 16, False), "gptq_v2", {}),
    "int3": (QuantSpec(3, 64), "gptq_v2", {}),
    "int3 act-order": (QuantSpec(3, 32, False, "full"), "gptq", {}),
    "int8": (QuantSpec(8, 64, False), "gptq", {}),
    "mixed": (QuantSpec(4, 64), "gptq", {r".*q_proj": {"bits": 8}, r"-:.*v_proj": {}, r".*up_proj": {"bits": 3, "sym": False},
                                         r".*down_proj": {"desc_act": True}}),
}  # fmt: skip


def checkpoint(form: str) -> tuple[FoemConfig, dict[str, torch.Tensor], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The config and stored tensors of a form, and {module: (weight, how large the terms of its product can be)} in float64."""
    spec, checkpoint_format, rules = FORMS[form]
    format_config = FormatConfig(spec, checkpoint_format, True, rules)
    config, stored, dense = FoemConfig(format_config), {}, {}
    config.modules = {module: found for module in SHAPES if (found := format_config.spec_for(module))}
    for seed, (module, shape) in enumerate(SHAPES.items()):
        w, found = torch.randn(shape, generator=torch.Generator().manual_seed(seed)), config.modules.get(module)
        if found is None:
            stored[f"{module}.weight"], dense[module] = w, (w.double(), w.double().abs())
            continue
        q = rtn(w, found)
        stored |= {f"{module}.{key}": t for key, t in pack(q, found, checkpoint_format).items()}
        w, centred = dequantize(q, found).double(), dequantize(q._replace(zeros=None), found).double()
        dense[module] = w, w.abs() + centred.abs() + (w - centred).abs()
    return config, stored, dense


def inputs(columns: int) -> torch.Tensor:
    return torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))


def outputs(form: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """{module: this rank's outputs} of one form; of row-parallel modules the sum over ranks."""
    config, stored, _ = checkpoint(form)
    layers = block(config, SIZES, torch.float32, PREFIX)
    load(layers, stored)
    found = {}
    for name, layer in layers.items():
        x = inputs(layer.input_size)
        if name == "lm_head":
            found[name] = layer.quant_method.apply(layer, x)
            continue
        k = layer.input_size_per_partition
        y = layer(x[:, rank * k : (rank + 1) * k] if k != layer.input_size else x)[0]
        parent, _, last = name.rpartition(".")
        names = config.packed_modules_mapping.get(last, [last])
        found |= {f"{parent}.{n}": part for n, part in zip(names, y.split(layer.output_partition_sizes
                                                                          if len(names) > 1 else [y.shape[1]], 1))}
        assert all(part.weights.kernel.name != "reference" for part in layer.foem if not isinstance(part.weights, torch.Tensor))
    return found


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
    with rank_of(world, rank, folder):
        torch.save({form: outputs(form, rank, world) for form in FORMS}, folder / f"{rank}.pt")
