"""One quantized linear layer inside vLLM: our own loading, hand-over to `foem_kernels`.

vLLM's parameter classes cut stored tensors at whole words and groups, take a prefix of a tensor that is too large, keep
uninitialized memory for one that is missing, and overwrite the g_idx of one fused module with that of the next, all in silence.
So they are not used. Each stored tensor comes to us whole; the part for this rank is cut out by codes (ranks.py) and waits,
still packed, until the layer is complete. Which outputs are ours is what vLLM alone knows (fused modules, heads that several
ranks share, padded vocabularies): we ask by sending a vector of output numbers the way of a bias.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import foem_kernels
import torch

from foem_vllm.errors import FoemError
from foem_vllm.format import TENSORS
from foem_vllm.plugin import compat
from foem_vllm.plugin.filled import check_bias, watch_bias
from foem_vllm.ranks import Share, assemble, joined, regroup, take
from foem_vllm.spec import Quantized, QuantSpec
from foem_vllm.zeros import symmetric_format

logger = logging.getLogger("foem_vllm")

QKV = ("q", "k", "v")


def shard_modules(shard, modules: int) -> range | None:
    """Which of a layer's fused modules vLLM loads as `shard` (None, an index, a tuple, "q", "k" or "v"); None: unknown."""
    if shard is None:
        return range(modules)
    found = [QKV.index(i) if i in QKV else i for i in (shard if isinstance(shard, tuple) else (shard,))]
    known = all(isinstance(i, int) and i < modules for i in found)
    return range(found[0], found[-1] + 1) if known else None


def stored_outputs(layer: torch.nn.Module, parts: list[int], ranks: int) -> list[int]:
    """Outputs of every fused module as the checkpoint stores it.

    parts: outputs of the fused modules on this rank. ranks: how many ranks share the outputs, 1 for row-parallel layers.
    """
    if hasattr(layer, "org_vocab_size"):
        return [layer.org_vocab_size]
    sizes = [part * ranks for part in parts]
    if len(parts) == 3 and (replicas := getattr(layer, "num_kv_head_replicas", 1)) > 1:
        sizes[1:] = [size // replicas for size in sizes[1:]]
    return sizes


@functools.cache
def say_relabelled(declared: str, found: str) -> None:
    logger.warning(
        "foem: config.json says checkpoint_format %r, but symmetric zero points are stored as in %r; a symmetric zero point is "
        "the middle of the codes, so they are read as that",
        declared,
        found,
    )


class Arrived:
    """What came under one shard id, cut for this rank. places [n]: where its outputs go among those of the layer."""

    def __init__(self, name: str, spec: QuantSpec | None, share: Share, places: torch.Tensor):
        self.name, self.spec, self.share, self.places = name, spec, share, places
        self.tensors: dict[str, torch.Tensor] = {}

    def missing(self) -> list[str]:
        if self.spec is None:
            return [] if "weight" in self.tensors else ["weight"]
        return [key for key in TENSORS if key not in self.tensors and (key != "g_idx" or self.spec.desc_act)]

    def quantized(self, checkpoint_format: str) -> Quantized:
        found = symmetric_format(self.tensors["qzeros"], self.spec) if self.spec.symmetric else None
        if found is not None and (found == "gptq_v2") != (checkpoint_format == "gptq_v2"):
            say_relabelled(checkpoint_format, found)
            checkpoint_format = found
        return assemble(self.tensors, self.spec, checkpoint_format, self.share, self.name)


class Part(NamedTuple):
    """Consecutive outputs start .. stop of a layer that one product computes. weights: prepared, or dense [n, K].

    order: [K'] int64, the inputs that the product takes; None: all as they are.
    """

    start: int
    stop: int
    weights: Any
    order: torch.Tensor | None

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if isinstance(self.weights, torch.Tensor):
            return torch.nn.functional.linear(x, self.weights, bias)
        return foem_kernels.gemm(x if self.order is None else x.index_select(-1, self.order), self.weights, bias)


class FoemLinearMethod(compat.LinearMethodBase):
    """specs: {checkpoint module: how it is quantized, or None} of the modules fused into the layer, in order.

    checkpoint_format: where zero points start. name: the layer, for messages.
    """

    def __init__(self, specs: dict[str, QuantSpec | None], checkpoint_format: str, name: str):
        self.names, self.specs = list(specs), list(specs.values())
        self.checkpoint_format, self.name = checkpoint_format, name
        self.arrived: dict[Any, Arrived] | None = {}  # None: everything came and was laid out

    def create_weights(
        self,
        layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra,
    ):
        """See vLLM. The parameters are only names for its loader to find: what they are given is kept in `arrived`."""
        self.parts, self.ranks = output_partition_sizes, output_size // sum(output_partition_sizes)
        self.k_rank, self.k, self.dtype = input_size_per_partition, input_size, params_dtype
        if len(self.specs) != len(self.parts):  # modules that the checkpoint has fused already, all or some of them
            if len(set(self.specs)) > 1:
                raise FoemError(f"{self.name}: {', '.join(self.names)} are quantized differently, but stored fused otherwise "
                                "than vLLM fuses them; quantize again with one setting for all of them")  # fmt: skip
            self.names = (self.names if len(self.names) == 1 else [self.name]) * len(self.parts)
            self.specs = self.specs[:1] * len(self.parts)
        self.device = torch.empty(0).device
        for key in (*TENSORS, "weight"):
            if key == "weight" and None not in self.specs:
                continue
            # vLLM warns of every tensor that its parameter could not hold exactly.
            dtype = self.dtype if key == "weight" else torch.float32 if key == "scales" else torch.int32
            param = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            param.weight_loader = self.loader(layer, key, extra["weight_loader"])
            if key != "g_idx":
                param.output_dim = int(key != "weight")  # models that store fused modules in another order rearrange it
            layer.register_parameter(key, param)
        watch_bias(layer, self.name)

    def loader(self, layer, key: str, route) -> Callable:
        """The loader of one parameter: a function with a name, because vLLM's reloading asks for it."""

        def load(param, loaded, shard=None, **kwargs):
            self.load(layer, key, route, loaded, kwargs.get("loaded_shard_id", shard))

        return load

    def load(self, layer, key: str, route, loaded: torch.Tensor, shard) -> None:
        """Keep this rank's part of a stored tensor. route: vLLM's loader. Raises FoemError naming a tensor that is wrong."""
        if self.arrived is None:
            raise FoemError(
                f"{self.name}.{key}: its weights were laid out for the kernel already and cannot be loaded once more "
                "(reload_weights, sleep level 2); start the server again"
            )
        if shard not in self.arrived:
            self.arrived[shard] = self.expect(layer, route, shard)
        arrived = self.arrived[shard]
        spec, share = arrived.spec, arrived.share
        if (key == "weight") != (spec is None):
            raise FoemError(
                f"{arrived.name}.{key} is in the checkpoint, but its config makes the module "
                f"{'unquantized' if spec is None else f'{spec.bits}-bit'}; config.json belongs to other weights: download "
                "both again"
            )
        if spec is not None:
            taken = take(key, loaded, spec, share, arrived.name, self.checkpoint_format)
        elif tuple(loaded.shape) != (share.n, share.k):
            raise FoemError(
                f"{arrived.name}.weight is {list(loaded.shape)} in the checkpoint, but the model's config.json makes it "
                f"{[share.n, share.k]}; config.json and weights are of different models: download both again"
            )
        else:
            taken = loaded[share.outputs, slice(*share.inputs)].to(self.dtype)
        arrived.tensors[key] = taken.to(self.device)

    def expect(self, layer, route, shard) -> Arrived:
        """What of the stored tensors that come as `shard` is for this rank; route: vLLM's loader of a bias of this layer."""
        modules = shard_modules(shard, len(self.parts))
        if modules is None:
            raise FoemError(f"{self.name}: vLLM loads a part called {shard!r}, which foem does not know; serve it without foem")
        n = sum(stored_outputs(layer, self.parts, self.ranks)[i] for i in modules)
        names = {self.names[i] for i in modules}
        name = self.names[modules[0]] if len(names) == 1 else self.name
        probe = torch.nn.Parameter(torch.full((sum(self.parts),), -1, device="cpu"), requires_grad=False)
        probe.output_dim = 0
        route(probe, torch.arange(n, device="cpu"), *(() if shard is None else (shard,)))
        places = (probe.data >= 0).nonzero()[:, 0]
        start = layer.tp_rank * self.k_rank if self.k_rank != self.k else 0
        share = Share(n, self.k, probe.data[places], (start, start + self.k_rank))
        return Arrived(name, self.specs[modules[0]], share, places)

    def process_weights_after_loading(self, layer) -> None:
        """Check, unpack, lay out for a kernel, free the parameters. Raises FoemError naming the tensor that is wrong."""
        check_bias(layer, self.name)
        pieces = self.complete()
        self.arrived = None
        groups: list[tuple[QuantSpec | None, list, int, int]] = []
        begin = 0
        for piece in pieces:
            end = begin + len(piece.places)
            content = piece.tensors["weight"] if piece.spec is None else piece.quantized(self.checkpoint_format)
            if groups and self.fit(groups[-1], piece.spec, content):
                spec, contents, first, _ = groups[-1]
                groups[-1] = (spec, [*contents, content], first, end)
            else:
                groups.append((piece.spec, [content], begin, end))
            begin = end
        layer.foem = [self.prepared(*group) for group in groups]
        for key in (*TENSORS, "weight"):
            if key in layer._parameters:
                delattr(layer, key)
        layer.qweight = torch.empty(0, device=self.device)  # LoRA asks it for the device

    def complete(self) -> list[Arrived]:
        """What arrived, in the order of the layer's outputs; raises FoemError when something never came."""
        pieces = sorted(self.arrived.values(), key=lambda piece: int(piece.places[0]) if len(piece.places) else 0)
        places = torch.cat([piece.places for piece in pieces]) if pieces else torch.empty(0)
        came = {i for shard in self.arrived for i in shard_modules(shard, len(self.parts))}
        absent = [i for i in range(len(self.parts)) if i not in came]
        missing = [f"{self.names[i]}.{TENSORS[0] if self.specs[i] else 'weight'}" for i in absent]
        missing += [f"{piece.name}.{key}" for piece in pieces for key in piece.missing()]
        if missing or not torch.equal(places, torch.arange(sum(self.parts))):
            raise FoemError(
                f"{(missing or [self.name])[0]} was not loaded: it is missing from the checkpoint, or it has another "
                "name there; download or quantize the checkpoint again"
            )
        return pieces

    @staticmethod
    def fit(group: tuple, spec: QuantSpec | None, content) -> bool:
        """Whether one product can compute `content` with what is in `group`: same spec, same order of columns."""
        if spec != group[0] or spec is None:
            return spec == group[0]
        a, b = group[1][-1].g_idx, content.g_idx
        return (a is None) == (b is None) and (a is None or torch.equal(a, b))

    def prepared(self, spec: QuantSpec | None, contents: list, start: int, stop: int) -> Part:
        if spec is None:
            return Part(start, stop, torch.cat(contents), None)
        (codes, scales, zeros, g_idx), group_size, order = regroup(joined(contents), spec)
        try:
            weights = foem_kernels.prepare(
                codes, scales, zeros, g_idx, bits=spec.bits, group_size=group_size, dtype=self.dtype, device=self.device
            )
        except ValueError as error:
            raise FoemError(f"{self.name}: {error}") from None
        return Part(start, stop, weights, order)

    def apply(self, layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See vLLM. One product for all modules that are quantized alike, else one after the other."""
        outputs = [part(x, None if bias is None else bias[part.start : part.stop]) for part in layer.foem]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
