"""One tensor-parallel rank: vLLM's experts layer loaded with every form of checkpoint, its outputs and layouts written to a file.

    python tests/parallel_experts.py RANK WORLD FOLDER
"""

import itertools
import pathlib
import sys
from collections.abc import Callable

import torch
from checkpoints import rtn
from vllm_layers import rank_of

from foem_vllm.format import FormatConfig, QuantSpec, dequantize, pack
from foem_vllm.plugin.config import FoemConfig

# Nothing is a multiple of anything: 100 or 50 inputs of down_proj a rank, and unequally many experts.
EXPERTS, HIDDEN, INNER = 5, 72, 200
PREFIX = "model.layers.0.mlp.experts"
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
DOWN = r".*down_proj"
FORMS = {
    "sym": (QuantSpec(4, 24), "gptq", {}),
    "straddled": (QuantSpec(4, 128, False), "gptq", {}),
    "per row": (QuantSpec(4, -1, False), "gptq_v2", {}),
    "whole": (QuantSpec(4, 8), "gptq", {DOWN: {"group_size": 40}}),
    "act-order": (QuantSpec(4, 32, True, "full"), "gptq", {}),
    "act-order asym": (QuantSpec(4, 128, False, "full"), "gptq_v2", {}),
    "int2": (QuantSpec(2, 16, False), "gptq_v2", {}),
    "int3 act-order": (QuantSpec(3, 40, False, "full"), "gptq", {}),
    "int8": (QuantSpec(8, 64, False), "gptq", {}),
    "mixed": (QuantSpec(4, 64), "gptq", {DOWN: {"bits": 8, "desc_act": True, "sym": False}}),
}


def checkpoint(form: str) -> tuple[FormatConfig, dict[str, torch.Tensor], dict[str, list]]:
    """The config and stored tensors of a form, and {linear: the weight of every expert in float64}."""
    spec, checkpoint_format, rules = FORMS[form]
    config, stored, dense = FormatConfig(spec, checkpoint_format, False, rules), {}, {name: [] for name in SHAPES}
    for expert in range(EXPERTS):
        for seed, (name, (n, k)) in enumerate(SHAPES.items()):
            module = f"{PREFIX}.{expert}.{name}"
            w = torch.randn(n, k, generator=torch.Generator().manual_seed(10 * expert + seed)) / k**0.5
            q = rtn(w, config.spec_for(module), order=expert)
            dense[name].append(dequantize(q, config.spec_for(module)).double())
            stored |= {f"{module}.{key}": t for key, t in pack(q, config.spec_for(module), checkpoint_format).items()}
    return config, stored, dense


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows x, weights and experts of the router."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(9, HIDDEN, generator=g), torch.rand(9, 2, generator=g), torch.randint(0, EXPERTS, (9, 2), generator=g)


def exact(dense: dict[str, list]) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output in float64, and how large its terms are."""
    x, shares, ids = routed()
    y, terms = torch.zeros(2, *x.shape, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for expert, share in zip(ids[t], shares[t].double()):
            gate, up, down = (dense[name][expert] for name in SHAPES)
            h = (gate @ row) * torch.sigmoid(gate @ row) * (up @ row)
            y[t] += share * (down @ h)
            terms[t] += share * (down.abs() @ ((gate.abs() @ row.abs()) * (up.abs() @ row.abs())))
    return y, terms


def loaded(form: str, ranks: int = 1, expert_parallel: bool = False, change: Callable[[dict], None] = lambda stored: None):
    """vLLM's own experts, filled by its own loader. change: what is done to the stored tensors before."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    vllm_config = get_current_vllm_config()
    vllm_config.compilation_config.static_forward_context.clear()
    vllm_config.parallel_config.enable_expert_parallel = expert_parallel
    config, stored, _ = checkpoint(form)
    change(stored)
    sizes = dict(num_experts=EXPERTS, top_k=2, hidden_size=HIDDEN, intermediate_size=INNER, tp_size=ranks)
    layer = FusedMoEFactory(**sizes, prefix=PREFIX, params_dtype=torch.float32, quant_config=FoemConfig(config)).routed_experts
    list(layer.load_weights((name.removeprefix(f"{PREFIX}."), t) for name, t in stored.items()))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def outcomes(ranks: int) -> dict[tuple[str, bool], dict]:
    """{(form, expert parallel): this rank's part of the output, and per linear the kernel's problem and the bytes it takes}."""
    found = {}
    for form, expert_parallel in itertools.product(FORMS, (False, True)):
        layer = loaded(form, ranks, expert_parallel)
        x, shares, ids = routed()
        layouts = [(w["problem"], sum(t.nbytes for t in w.values() if isinstance(t, torch.Tensor))) for w in layer.foem]
        found[form, expert_parallel] = {"y": layer.forward_modular(x, shares, ids), "layouts": layouts}
    return found


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
    with rank_of(world, rank, folder):
        torch.save(outcomes(world), folder / f"{rank}.pt")
