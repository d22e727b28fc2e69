"""The quantized experts of one mixture-of-experts layer inside vLLM: parameters, checked loading, hand-over to `foem_kernels`.

Experts are stored one by one in a checkpoint, as `experts.3.gate_proj.qweight` (or w1, w2, w3), and computed together. As for
linears the parameters exist only while weights are loaded, and each has a loader of ours instead of vLLM's, which sees no wrong
shape of an expert and no missing one. Left out, and refused: biases of experts, activations without a gate or with limits
(gpt-oss), LoRA on experts, load balancing with redundant experts (vLLM refuses it itself).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from foem_kernels import moe

from foem_vllm.errors import FoemError
from foem_vllm.expert_parts import REMEDY, Part
from foem_vllm.format import Quantized, QuantSpec, group_index, stored_shapes, unpack
from foem_vllm.plugin import compat


class FoemMoEMethod(compat.FusedMoEMethodBase):
    """specs: of the gate and up linears and of the down linears. checkpoint_format: where zero points start. name: of the
    experts, for messages."""

    def __init__(self, specs: tuple[QuantSpec, QuantSpec], checkpoint_format: str, name: str, moe_config):
        super().__init__(moe_config)
        self.specs, self.checkpoint_format, self.name = specs, checkpoint_format, name

    def create_weights(
        self,
        layer,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra,
    ):
        """See vLLM. Scales wait in float32, whatever the checkpoint holds. Raises FoemError on what no kernel computes."""
        config = layer.moe_config
        self.check_layer(layer, hidden_size, intermediate_size_per_partition)
        inner, ranks, rank = intermediate_size_per_partition * config.tp_size, config.tp_size, config.tp_rank
        gate_up = (("w1", layer.ckpt_gate_proj_name), ("w3", layer.ckpt_up_proj_name))
        self.parts = (
            Part("w13", gate_up, self.specs[0], hidden_size, inner, False, ranks, rank),
            Part("w2", (("w2", layer.ckpt_down_proj_name),), self.specs[1], inner, hidden_size, True, ranks, rank),
        )
        for part in self.parts:
            part.check(self.name)
        self.seen = set()  # (expert, shard, key)
        for part in self.parts:
            for key, (shape, dtype) in stored_shapes(part.spec_rank, part.k_rank, part.n_rank).items():
                data = torch.zeros(num_experts, len(part.linears), *shape, dtype=dtype or torch.float32)
                self.register(layer, f"{part.stem}_{key}", data, self.loader(layer, part, key))
            # Older writers store biases of zero for experts that have none, and vLLM passes over what has no parameter.
            self.register(layer, f"{part.stem}_bias", torch.empty(0), self.zero_bias)
        device = layer.w13_qweight.device.type
        try:
            self.kernel = moe.choose(*(part.problem(params_dtype, device) for part in self.parts))
        except ValueError as error:
            raise FoemError(f"{self.name}: {error}; {REMEDY if ranks > 1 else 'leave experts out with --exclude'}") from None
        if layer.activation.value not in self.kernel.ACTIVATIONS:
            raise FoemError(self.refusal(f"activation {layer.activation.value}"))
        self.dtype = params_dtype

    def check_layer(self, layer, hidden: int, inner: int) -> None:
        """Refuse layers that compute something else than gate, up and down."""
        config = layer.moe_config
        reasons = {
            "experts without a gate": not config.is_act_and_mul,
            "biases of experts": config.has_bias,
            "limits of the activation": any(v is not None for v in (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta)),
            "LoRA adapters on experts": config.is_lora_enabled,
            "padded sizes": (hidden, inner) != (config.hidden_dim_unpadded, config.intermediate_size_per_partition_unpadded),
        }
        for reason, found in reasons.items():
            if found:
                raise FoemError(self.refusal(reason))

    def refusal(self, what: str) -> str:
        return (
            f"{self.name}: {what} cannot be computed for quantized experts by --quantization foem; try --quantization gptq, or "
            "quantize again with --exclude experts"
        )

    @staticmethod
    def register(layer, name: str, data: torch.Tensor, loader: Callable) -> None:
        parameter = torch.nn.Parameter(data, requires_grad=False)
        parameter.weight_loader = loader
        layer.register_parameter(name, parameter)

    @staticmethod
    def local(layer, expert: int) -> int:
        """The place among this rank's experts, -1 for an expert of another rank."""
        return layer._map_global_expert_id_to_local_expert_id(expert)

    def loader(self, layer, part: Part, key: str):
        """What vLLM calls with every expert's tensor: checks it whole, keeps this rank's part, notes that it came."""
        shape, dtype = stored_shapes(part.spec, part.k, part.n)[key]
        order = [shard for shard, _ in part.linears]

        def load(param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
            if (local := self.local(layer, expert_id)) < 0:
                return False if return_success else None
            where = f"{self.name}.{expert_id}.{dict(part.linears)[shard_id]}.{key}"
            wrong_dtype = loaded_weight.dtype != dtype if dtype else not loaded_weight.is_floating_point()
            if tuple(loaded_weight.shape) != shape or wrong_dtype:
                raise FoemError(
                    f"{where} is {loaded_weight.dtype} {list(loaded_weight.shape)} in the checkpoint, but the model's "
                    f"config.json makes it {dtype or 'floating point'} {list(shape)}; config.json and weights are of different "
                    "models"
                )
            param.data[local, order.index(shard_id)].copy_(part.slice(key, loaded_weight, where))
            self.seen.add((expert_id, shard_id, key))
            return True if return_success else None

        return load

    def zero_bias(self, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
        if loaded_weight.any():
            raise FoemError(self.refusal(f"the bias of expert {expert_id} ({shard_id})"))
        return True if return_success else None

    def quantized(self, layer, part: Part, expert: int) -> Quantized:
        """One expert's linears of `part` as one, checked. Raises FoemError naming the tensor that is wrong or never came."""
        found = []
        for place, (shard, linear) in enumerate(part.linears):
            name, tensors = f"{self.name}.{expert}.{linear}", {}
            for key in stored_shapes(part.spec, part.k, part.n):
                if (expert, shard, key) in self.seen:
                    tensors[key] = getattr(layer, f"{part.stem}_{key}").data[self.local(layer, expert), place]
                elif key != "g_idx" or part.spec.desc_act:
                    raise FoemError(
                        f"{name}.{key} was not loaded: it is missing from the checkpoint, or it has another name there; "
                        "download or quantize the checkpoint again"
                    )
            found.append(unpack(tensors, part.spec_rank, self.checkpoint_format, name, part.k_rank))
        first, last = found[0], found[-1]
        if first.g_idx is not last.g_idx and not (
            first.g_idx is not None and last.g_idx is not None and torch.equal(first.g_idx, last.g_idx)
        ):
            raise FoemError(
                f"{self.name}.{expert}.{part.linears[-1][1]}.g_idx differs from that of {part.linears[0][1]}, with which it is "
                "computed together; quantize again with --act-order static or none"
            )
        zeros = None if first.zeros is None else torch.cat([q.zeros for q in found])
        return Quantized(torch.cat([q.codes for q in found]), torch.cat([q.scales for q in found]), zeros, first.g_idx)

    def process_weights_after_loading(self, layer) -> None:
        """Check, unpack, lay out for the kernel, free the parameters. Raises FoemError naming the tensor that is wrong."""
        layer.foem = []
        for part in self.parts:
            here = sorted((self.local(layer, e), e) for e in range(layer.global_num_experts))
            qs = [self.quantized(layer, part, expert) for place, expert in here if place >= 0]
            device = qs[0].codes.device
            g_idx = None
            if any(q.g_idx is not None for q in qs):
                plain = group_index(part.k_rank, part.spec_rank).to(device)
                g_idx = torch.stack([plain if q.g_idx is None else q.g_idx for q in qs])
            codes, scales, zeros = (None if qs[0][i] is None else torch.stack([q[i] for q in qs]) for i in range(3))
            problem = replace(part.problem(self.dtype, device.type), act_order=g_idx is not None)
            try:
                layer.foem.append(self.kernel.prepare(codes, scales, zeros, g_idx, problem, gated=part.stem == "w13"))
            except ValueError as error:
                raise FoemError(f"{self.name}: {error}") from None
            for key in (*stored_shapes(part.spec, part.k, part.n), "bias"):
                delattr(layer, f"{part.stem}_{key}")

    def get_fused_moe_quant_config(self, layer):
        """None: the kernels know what they need."""
        return None

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None) -> torch.Tensor:
        """See vLLM: x [tokens, hidden] -> this rank's part of the sum over experts, for vLLM to add up over ranks."""
        return self.kernel.experts(
            x, *layer.foem, topk_ids, topk_weights, layer.activation.value, layer.apply_router_weight_on_input, layer.expert_map
        )
