"""The quantized experts of one mixture-of-experts layer inside vLLM: checked loading, hand-over to `foem_kernels`.

Experts are stored one by one in a checkpoint, as `experts.3.gate_proj.qweight` (or w1, w2, w3), and computed together. Each
stored tensor is kept as a linear's is (linear.py): the part for this rank, still packed, until the layer is complete. All
experts of a layer are laid out alike, since one kernel call computes them. Left out, and refused: biases of experts, activations
without a gate or with limits (gpt-oss), LoRA on experts, load balancing with redundant experts (vLLM refuses it itself).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from foem_kernels import moe

from foem_vllm.errors import FoemError
from foem_vllm.expert_parts import NO_EXPERTS, Part
from foem_vllm.format import TENSORS, Quantized, QuantSpec
from foem_vllm.plugin import compat
from foem_vllm.plugin.linear import Arrived
from foem_vllm.ranks import Regrouped, arrange, group_counts, joined, take
from foem_vllm.serving import expert_groups
from foem_vllm.spec import group_index


class FoemMoEMethod(compat.FusedMoEMethodBase):
    """specs: of the gate and up linears and of the down linears. checkpoint_format: where zero points start. name: of the
    experts, for messages."""

    def __init__(self, specs: tuple[QuantSpec, QuantSpec], checkpoint_format: str, name: str, moe_config):
        super().__init__(moe_config)
        self.specs, self.checkpoint_format, self.name = specs, checkpoint_format, name
        self.arrived: dict[tuple[int, str], Arrived] | None = {}  # by expert and vLLM's name of the shard; None: laid out

    def create_weights(
        self,
        layer,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra,
    ):
        """See vLLM. The parameters are only names for its loader to find: what they are given is kept in `arrived`.

        Raises FoemError on what no kernel computes.
        """
        config = layer.moe_config
        self.check_layer(layer, hidden_size, intermediate_size_per_partition)
        if config.ep_size > config.num_experts:
            raise FoemError(f"{self.name}: {NO_EXPERTS.format(config.ep_size, config.num_experts)}")
        inner, ranks, rank = intermediate_size_per_partition * config.tp_size, config.tp_size, config.tp_rank
        gate_up = (("w1", layer.ckpt_gate_proj_name), ("w3", layer.ckpt_up_proj_name))
        self.parts = (
            Part("w13", gate_up, self.specs[0], hidden_size, inner, False, ranks, rank),
            Part("w2", (("w2", layer.ckpt_down_proj_name),), self.specs[1], inner, hidden_size, True, ranks, rank),
        )
        self.device, self.dtype = torch.empty(0).device, params_dtype
        for part in self.parts:
            for key in TENSORS:
                dtype = torch.float32 if key == "scales" else torch.int32  # vLLM warns of what a parameter could not hold exactly
                self.register(layer, f"{part.stem}_{key}", dtype, self.loader(layer, part, key))
            # Older writers store biases of zero for experts that have none, and vLLM passes over what has no parameter.
            self.register(layer, f"{part.stem}_bias", torch.float32, self.zero_bias)
        try:
            self.kernel = moe.choose(*(part.problem(params_dtype, self.device.type) for part in self.parts))
        except ValueError as error:
            raise FoemError(f"{self.name}: {error}; leave experts out with --exclude") from None
        if layer.activation.value not in self.kernel.ACTIVATIONS:
            raise FoemError(self.refusal(f"activation {layer.activation.value}"))

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
    def register(layer, name: str, dtype: torch.dtype, loader: Callable) -> None:
        parameter = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        parameter.weight_loader = loader
        layer.register_parameter(name, parameter)

    @staticmethod
    def local(layer, expert: int) -> int:
        """The place among this rank's experts, -1 for an expert of another rank."""
        return layer._map_global_expert_id_to_local_expert_id(expert)

    def loader(self, layer, part: Part, key: str) -> Callable:
        """What vLLM calls with every expert's tensor: a function with a name, because vLLM's reloading asks for it."""

        def load(param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
            here = self.local(layer, expert_id) >= 0
            if here:
                self.load(part, key, loaded_weight, shard_id, expert_id)
            return here if return_success else None

        return load

    def load(self, part: Part, key: str, loaded: torch.Tensor, shard: str, expert: int) -> None:
        """Keep this rank's part of a stored tensor. Raises FoemError naming a tensor that is wrong."""
        if self.arrived is None:
            raise FoemError(
                f"{self.name}.{key}: its weights were laid out for the kernel already and cannot be loaded once more "
                "(reload_weights, sleep level 2); start the server again"
            )
        arrived = self.arrived.setdefault((expert, shard), self.expected(part, expert, shard))
        taken = take(key, loaded, part.spec, arrived.share, arrived.name, self.checkpoint_format)
        arrived.tensors[key] = taken.to(self.device)

    def expected(self, part: Part, expert: int, shard: str) -> Arrived:
        return Arrived(f"{self.name}.{expert}.{dict(part.linears)[shard]}", part.spec, part.share, part.share.outputs)

    def zero_bias(self, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
        if loaded_weight.any():
            raise FoemError(self.refusal(f"the bias of expert {expert_id} ({shard_id})"))
        return True if return_success else None

    def complete(self, part: Part, expert: int) -> list[Arrived]:
        """The linears of one expert that `part` computes as one. Raises FoemError naming the tensor that never came."""
        found = []
        for shard, _ in part.linears:
            arrived = self.arrived.get((expert, shard)) or self.expected(part, expert, shard)
            if missing := arrived.missing():
                raise FoemError(
                    f"{arrived.name}.{missing[0]} was not loaded: it is missing from the checkpoint, or it has another name "
                    "there; download or quantize the checkpoint again"
                )
            found.append(arrived)
        return found

    def quantized(self, arrived: list[Arrived]) -> Quantized:
        """Linears that are computed as one. Raises FoemError naming the tensor that is wrong."""
        found = [linear.quantized(self.checkpoint_format) for linear in arrived]
        first, last = found[0].g_idx, found[-1].g_idx
        if (first is None) != (last is None) or (first is not None and not torch.equal(first, last)):
            raise FoemError(
                f"{arrived[-1].name}.g_idx differs from that of {arrived[0].name.rpartition('.')[2]}, with which it is computed "
                "together; quantize again with --act-order static or none"
            )
        return joined(found)

    def process_weights_after_loading(self, layer) -> None:
        """Check, unpack, lay out for the kernel, free what waited. Raises FoemError naming the tensor that is wrong."""
        here = sorted((self.local(layer, e), e) for e in range(layer.global_num_experts))
        here = [expert for place, expert in here if place >= 0]
        layer.foem = [self.prepared(part, [self.complete(part, expert) for expert in here]) for part in self.parts]
        self.arrived = None
        for part in self.parts:
            for key in (*TENSORS, "bias"):
                delattr(layer, f"{part.stem}_{key}")

    def prepared(self, part: Part, experts: list[list[Arrived]]):
        """The kernel's layout of one linear of every expert; empties `experts` on the way."""
        start, stop = part.share.inputs
        plain = group_index(part.k, part.spec)[start:stop]
        size, columns = expert_groups([group_counts(linears[0].tensors.get("g_idx", plain)) for linears in experts])
        found: list[Regrouped] = []
        for linears in experts:
            found.append(arrange(self.quantized(linears), part.spec, size, columns))
            linears.clear()
        codes, scales, zeros = (None if found[0].q[i] is None else torch.stack([f.q[i] for f in found]) for i in range(3))
        g_idx = order = None
        if found[0].order is not None:
            order = torch.stack([f.order for f in found])
        elif any(f.q.g_idx is not None for f in found):
            plain = (torch.arange(columns, device=self.device) // size).int()
            g_idx = torch.stack([plain if f.q.g_idx is None else f.q.g_idx for f in found])
        ordered = g_idx is not None or order is not None
        problem = part.problem_of(size, columns, zeros is None, ordered, self.dtype, self.device.type)
        try:
            return self.kernel.prepare(codes, scales, zeros, g_idx, problem, gated=part.stem == "w13", order=order)
        except ValueError as error:
            raise FoemError(f"{self.name}: {error}") from None

    def get_fused_moe_quant_config(self, layer):
        """None: the kernels know what they need."""
        return None

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None) -> torch.Tensor:
        """See vLLM: x [tokens, hidden] -> this rank's part of the sum over experts, for vLLM to add up over ranks."""
        return self.kernel.experts(
            x, *layer.foem, topk_ids, topk_weights, layer.activation.value, layer.apply_router_weight_on_input, layer.expert_map
        )
