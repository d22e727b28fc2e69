"""GPTQModel's solver on given weights and moments. Runs in GPTQModel's own environment; needs nothing of ours.

    python gptqmodel_solver.py IN.safetensors OUT.safetensors

IN holds, per case, `{case}/W` [N, K], `{case}/H` [K, K] and `{case}/D` [K, K] (float32; H and D per token), and in its
metadata a JSON list `runs` of {case, method, bits, group_size, symmetric, damping, alpha, beta, gar}. OUT gets, per run
number i, `{i}/codes` [N, K] uint8, `{i}/scales` and `{i}/zeros` [N, G] float32.
"""
from __future__ import annotations

import json
import sys

import torch
from gptqmodel import QuantizeConfig
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.looper.native_processor import NATIVE_INPUTS_STATE_KEY
from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig
from gptqmodel.quantization.foem import FOEM
from gptqmodel.quantization.gptaq import GPTAQ
from gptqmodel.quantization.gptq import GPTQ
from safetensors import safe_open
from safetensors.torch import save_file


def run(W: torch.Tensor, H: torch.Tensor, D: torch.Tensor, spec: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes [N, K] uint8, scales [N, G], zeros [N, G]) of one layer with moments per token."""
    linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=torch.float32)
    linear.weight.data = W.clone()
    module = NamedModule(linear, name="layer", full_name="layer", layer_index=0)
    module.state[NATIVE_INPUTS_STATE_KEY] = []
    method = {"gptq": {}, "gptaq": {"gptaq": GPTAQConfig(alpha=spec["alpha"])}}.get(
        spec["method"], {"foem": FOEMConfig(alpha=spec["alpha"], beta=spec["beta"])})
    config = QuantizeConfig(bits=spec["bits"], group_size=spec["group_size"], sym=spec["symmetric"], desc_act=False,
                            act_group_aware=spec["gar"], damp_percent=spec["damping"], **method)
    task = {"gptq": GPTQ, "gptaq": GPTAQ}.get(spec["method"], FOEM)(module, config)
    task.quantizer.configure(perchannel=True)
    # Their moments carry a factor of 2; neither the codes nor P depend on it. `fallback` would replace GPTQ by RTN, because
    # no tokens were counted.
    task.H, task.dXXT = 2 * H, 2 * D
    task.nsamples, task.fallback, task._hessian_dirty = 1, None, False
    Q, scales, zeros, g_idx, *_ = task.quantize()
    codes = (Q / scales[:, g_idx.long()]).round() + zeros[:, g_idx.long()]
    return codes.to(torch.uint8), scales.float(), zeros.float()


def main() -> None:
    source, destination = sys.argv[1:]
    out = {}
    with safe_open(source, "pt") as file:
        for i, spec in enumerate(json.loads(file.metadata()["runs"])):
            tensors = (file.get_tensor(f"{spec['case']}/{name}") for name in "WHD")
            for name, tensor in zip(("codes", "scales", "zeros"), run(*tensors, spec)):
                out[f"{i}/{name}"] = tensor.contiguous()
    save_file(out, destination)


if __name__ == "__main__":
    main()
