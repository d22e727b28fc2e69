"""Hundreds of damaged checkpoints of experts, over one rank and two: each is refused in words of ours, or served as what it says.

The damages, and the independent reader of what a checkpoint says, are those of test_fuzz; here are those that only experts have.
"""

import json
import pathlib
import re

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from safetensors.torch import load_file, save_file  # noqa: E402
from test_fuzz import DAMAGES, FILE, bad, change_config, change_header, change_tensors, checkpoints, run, says  # noqa: E402
from vllm_layers import rank_of  # noqa: E402

from foem_vllm.format import QuantSpec  # noqa: E402
from foem_vllm.plugin.config import FoemConfig  # noqa: E402

EXPERTS, HIDDEN, INNER = 3, 32, 48
NAMES = ("gate_proj", "up_proj", "down_proj")
PREFIX = "model.layers.0.mlp.experts"
SHAPES = {f"{PREFIX}.{expert}.{name}": (HIDDEN, INNER) if name == "down_proj" else (INNER, HIDDEN)
          for expert in range(EXPERTS) for name in NAMES}  # fmt: skip
FORMS = {
    "sym": (QuantSpec(4, 16), "gptq", {}),
    "asym": (QuantSpec(4, 32, False), "gptq", {}),
    "act-order": (QuantSpec(4, 16, False, "full"), "gptq_v2", {}),
    "int3": (QuantSpec(3, 16, False), "gptq_v2", {}),
    "mixed": (QuantSpec(4, 16), "gptq", {"+:.*down_proj": {"bits": 8, "group_size": -1, "sym": False}}),
}
CASES = 400


def one(r) -> str:
    """Modules of one expert, of one linear of all experts, or one module."""
    expert, name = r.randrange(EXPERTS), r.choice(NAMES)
    return r.choice((f"experts\\.{expert}\\.", f"experts\\.{expert}\\.{name}", f".*{name}"))


def rule_for_one(folder, r):
    others = {"bits": 8}, {"bits": 3}, {"group_size": 32}, {"group_size": -1}, {"sym": False}, {"desc_act": True}
    change = r.choice((*others, None))
    change_config(folder, dynamic={f"-:.*{one(r)}" if change is None else f".*{one(r)}": change or {}})


def drop(folder, r):
    """An expert, a linear of one or of all, or one of its tensors."""
    pattern = re.compile(f".*{one(r)}.*{r.choice(('', '', 'qweight', 'qzeros', 'scales', 'g_idx'))}")
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if pattern.match(name)])


def swap(folder, r):
    """The contents of two tensors of the same kind and shape, or of gate and down, whose shapes differ."""
    key = r.choice(("qweight", "qzeros", "scales", "g_idx"))
    a, b = (f"{PREFIX}.{r.randrange(EXPERTS)}.{r.choice(NAMES)}.{key}" for _ in range(2))

    def change(header):
        header[a], header[b] = header[b], header[a]

    change_header(folder, change)


def another_shape(folder, r):
    """Of all tensors of a linear, so that they agree with each other: more or fewer outputs, or inputs."""
    module, wider = f"{PREFIX}.{r.randrange(EXPERTS)}.{r.choice(NAMES)}", r.random() < 0.5

    def change(tensors):
        for key in ("qweight", "qzeros", "scales", "g_idx"):
            t, along = tensors[f"{module}.{key}"], 0 if wider else -1
            if key != "g_idx" or wider:
                tensors[f"{module}.{key}"] = torch.cat([t, t], along) if r.random() < 0.9 else t.narrow(along, 0, 1).clone()

    change_tensors(folder, change)


def order_of_one(folder, r):
    """Columns of one linear belong to the groups in another order; gate and up are then computed apart, which nobody does."""

    def change(tensors):
        name = f"{PREFIX}.{r.randrange(EXPERTS)}.{r.choice(NAMES)}.g_idx"
        tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(r.randrange(9)))]

    change_tensors(folder, change)


OWN = [rule_for_one, rule_for_one, drop, drop, swap, swap, another_shape, order_of_one]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with rank_of(1, 0, tmp_path_factory.mktemp("alone")):
        yield


@pytest.fixture(scope="module")
def bases() -> dict[str, tuple[dict, dict]]:
    return checkpoints(FORMS, SHAPES)


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows x, weights and experts of the router: every expert is asked."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, HIDDEN, generator=g), torch.rand(3, 2, generator=g), torch.tensor([[0, 1], [2, 0], [1, 2]])


def serve(folder: pathlib.Path) -> list[torch.Tensor]:
    """[output over one rank, over two], as vLLM would load the folder under --quantization foem."""
    return [sum(part(folder, ranks)) for ranks in (1, 2)]


def part(folder: pathlib.Path, ranks: int) -> list[torch.Tensor]:
    """Every rank's part of the output; no rank may refuse what another one takes."""
    from vllm.config import get_current_vllm_config
    from vllm.distributed import get_tp_group
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    config, found = FoemConfig.from_config(json.loads((folder / "config.json").read_text())), []
    config.maybe_update_config(str(folder))
    for get_tp_group().rank_in_group in range(ranks):
        get_current_vllm_config().compilation_config.static_forward_context.clear()
        sizes = dict(num_experts=EXPERTS, top_k=2, hidden_size=HIDDEN, intermediate_size=INNER, tp_size=ranks)
        layer = FusedMoEFactory(**sizes, prefix=PREFIX, params_dtype=torch.float32, quant_config=config).routed_experts
        list(layer.load_weights((name.removeprefix(f"{PREFIX}."), t) for name, t in load_file(folder / FILE).items()))
        layer.quant_method.process_weights_after_loading(layer)
        x, shares, ids = routed()
        found.append(layer.forward_modular(x, shares, ids))
    return found


def agrees(found: list[torch.Tensor], folder: pathlib.Path) -> bool:
    weights, (x, shares, ids) = says(folder, SHAPES), (t.double().numpy() for t in routed())
    y, room = np.zeros(x.shape), np.zeros(x.shape)
    with np.errstate(over="ignore"):
        for t, row in enumerate(x):
            for expert, share in zip(ids[t].astype(int), shares[t]):
                gate, up, down = (weights[f"{PREFIX}.{expert}.{name}"] for name in NAMES)
                y[t] += share * (down @ ((gate @ row) / (1 + np.exp(-gate @ row)) * (up @ row)))
                terms = np.abs(down) @ ((np.abs(gate) @ np.abs(row)) * (np.abs(up) @ np.abs(row)))
                room[t] += 1e-4 * share * (terms + terms.max())
    return all((np.abs(one.double().numpy() - y) <= room).all() for one in found)


def test_undamaged_checkpoints_are_served(alone, bases, tmp_path):
    for base, (stored, config) in bases.items():
        save_file(stored, tmp_path / FILE)
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert agrees(serve(tmp_path), tmp_path), base


def test_damaged_checkpoints_are_refused_or_served_as_what_they_say(alone, bases, tmp_path):
    results = [run(case, bases, tmp_path, OWN + DAMAGES, serve, agrees) for case in range(CASES)]
    assert not bad(results), bad(results)
    outcomes = [outcome for _, outcome in results]
    assert outcomes.count("refused") > CASES // 3 and outcomes.count("served") > CASES // 10  # the fuzz does both
