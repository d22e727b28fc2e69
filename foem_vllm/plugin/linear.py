"""One quantized linear layer inside vLLM: parameters, checked loading, hand-over to `foem_kernels`.

The parameters exist only while weights are loaded. Each has a loader of ours in front of vLLM's, because vLLM's takes a prefix
of a tensor that is too large, keeps uninitialized memory for one that is missing, and overwrites the g_idx of one fused shard
with that of the next, all in silence.
"""

from __future__ import annotations

import foem_kernels
import torch

from foem_vllm.errors import FoemError
from foem_vllm.format import TENSORS, QuantSpec, stored_shapes, unpack
from foem_vllm.plugin import compat

QKV = ("q", "k", "v")


def check_partition(name: str, spec: QuantSpec, k: int, k_rank: int, parts: list[int], sharded: bool) -> None:
    """Refuse sizes whose packed words or groups would be cut in the middle.

    k: input size of the whole layer, k_rank: of this rank. parts: output sizes of the fused modules on this rank.
    sharded: whether outputs are one of several parts of a stored tensor.
    """
    codes = 32 // spec.bits
    fewer = "use a smaller --tensor-parallel-size"
    if k_rank != k:
        if spec.desc_act:
            raise FoemError(
                f"{name}: activation order (desc_act) spreads groups over all {k} inputs, which cannot be split "
                f"over ranks; {fewer}, or quantize again with --act-order static"
            )
        if k_rank % codes or (spec.group_size != -1 and k_rank % spec.group_size):
            raise FoemError(
                f"{name}: {k_rank} inputs per rank are not a multiple of group_size={spec.group_size} and of "
                f"the {codes} codes of a word; {fewer}, or quantize again with a smaller --group-size"
            )
    if sharded or len(parts) > 1:
        for part in parts:
            if part % codes:
                raise FoemError(f"{name}: {part} outputs are not a multiple of the {codes} zero points of a word; {fewer}")


def shard_outputs(layer: torch.nn.Module, parts: list[int], ranks: int, shard) -> int:
    """Outputs of the checkpoint tensor that is loaded as `shard` (None, an index, a tuple, "q", "k" or "v").

    parts: outputs of the fused modules on this rank. ranks: how many ranks share the outputs, 1 for row-parallel layers.
    """
    if hasattr(layer, "org_vocab_size"):
        return layer.org_vocab_size
    sizes = [part * ranks for part in parts]
    if len(parts) == 3 and (replicas := getattr(layer, "num_kv_head_replicas", 1)) > 1:
        sizes[1:] = [size // replicas for size in sizes[1:]]
    if shard is None:
        return sum(sizes)
    return sum(sizes[QKV.index(i) if i in QKV else i] for i in (shard if isinstance(shard, tuple) else (shard,)))


def load_head(param: torch.nn.Parameter, loaded: torch.Tensor, layer: torch.nn.Module, codes: int) -> None:
    """Load a tensor of a quantized lm_head. vLLM pads the vocabulary and its own loader pads the wrong dimension.

    Padded outputs repeat the last one: vLLM cuts their logits off, and their zero points must only be valid.
    """
    start, stop = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
    if start % codes or stop % codes:
        raise FoemError(
            f"lm_head: the vocabulary is cut at {start}..{stop}, not at a multiple of the {codes} zero points "
            "of a word; use --tensor-parallel-size 1, or quantize again without lm_head"
        )
    if getattr(param, "packed_dim", 0) == 1:
        start, stop = start // codes, stop // codes
    param.data[:, : stop - start] = loaded[:, start:stop]
    param.data[:, stop - start :] = loaded[:, stop - 1 : stop]


@compat.register_weight_loader_v2_supported_method
class FoemLinearMethod(compat.LinearMethodBase):
    """spec: of this layer. checkpoint_format: where zero points start. name: the module, for messages."""

    def __init__(self, spec: QuantSpec, checkpoint_format: str, name: str):
        self.spec, self.checkpoint_format, self.name = spec, checkpoint_format, name

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
        """See vLLM. Scales wait in float32, whatever the checkpoint holds: the model's dtype would round them."""
        spec, parts, k = self.spec, output_partition_sizes, input_size_per_partition
        self.ranks = output_size // sum(parts)
        check_partition(self.name, spec, input_size, k, parts, self.ranks > 1)
        codes = 32 // spec.bits
        shapes = stored_shapes(spec, k, sum(parts))
        whole = k != input_size and spec.group_size == -1  # every rank needs the one scale of a row
        self.k, self.seen, self.dtype = k, {key: set() for key in TENSORS}, params_dtype
        self.parts, self.input_size = parts, input_size

        def parameter(cls, key, dtype, **dims):
            data = torch.zeros(shapes[key][0], dtype=dtype)
            layer.register_parameter(key, cls(data=data, weight_loader=self.loader(layer, key, extra["weight_loader"]), **dims))

        packed = {"output_dim": 1, "packed_factor": codes}
        parameter(compat.PackedvLLMParameter, "qweight", torch.int32, input_dim=0, packed_dim=0, **packed)
        parameter(compat.RowvLLMParameter, "g_idx", torch.int32, input_dim=0)
        if whole:
            parameter(compat.PackedColumnParameter, "qzeros", torch.int32, packed_dim=1, **packed)
            parameter(compat.ChannelQuantScaleParameter, "scales", torch.float32, output_dim=1)
        else:
            parameter(compat.PackedvLLMParameter, "qzeros", torch.int32, input_dim=0, packed_dim=1, **packed)
            parameter(compat.GroupQuantScaleParameter, "scales", torch.float32, input_dim=0, output_dim=1)

    def loader(self, layer, key: str, load):
        """vLLM's loader `load` behind a check of the tensor; notes what was loaded."""

        def checked(param, loaded: torch.Tensor, shard=None, **kwargs):
            shard = kwargs.pop("loaded_shard_id", shard)
            where = f"{self.name}.{key}" + ("" if shard is None else f" (shard {shard})")
            outputs = shard_outputs(layer, self.parts, self.ranks, shard)
            shape, dtype = stored_shapes(self.spec, self.input_size, outputs)[key]
            if tuple(loaded.shape) != shape or (loaded.dtype != dtype if dtype else not loaded.is_floating_point()):
                raise FoemError(
                    f"{where} is {loaded.dtype} {list(loaded.shape)} in the checkpoint, but the model's config.json "
                    f"makes it {dtype or 'floating point'} {list(shape)}; config.json and weights are of "
                    "different models"
                )
            before = param.data.clone() if key == "g_idx" and self.seen[key] else None
            if key != "g_idx" and hasattr(layer, "shard_indices"):
                load_head(param, loaded, layer, 32 // self.spec.bits)
            else:
                load(param, loaded, *(() if shard is None else (shard,)), **kwargs)
            if before is not None and not torch.equal(before, param.data):
                raise FoemError(
                    f"{where} differs from that of the modules it is fused with; their activation orders must be "
                    "the same, quantize again with --act-order static or none"
                )
            self.seen[key].update(range(len(self.parts)) if shard is None else shard if isinstance(shard, tuple) else (shard,))

        return checked

    def tensors(self, layer) -> dict[str, torch.Tensor]:
        """The loaded tensors; raises FoemError when one never came."""
        needed = [key for key in TENSORS if key != "g_idx" or self.spec.desc_act or self.seen[key]]
        for key in needed:
            if len(self.seen[key]) != len(self.parts):
                raise FoemError(
                    f"{self.name}.{key} was not loaded: it is missing from the checkpoint, or it has another "
                    "name there; download or quantize the checkpoint again"
                )
        found = {key: getattr(layer, key).data for key in needed}
        if "g_idx" in found and self.k != self.input_size and self.spec.group_size != -1:
            found["g_idx"] = found["g_idx"] - layer.tp_rank * (self.k // self.spec.group_size)
        return found

    def process_weights_after_loading(self, layer) -> None:
        """Check, unpack, lay out for a kernel, free the parameters. Raises FoemError naming the tensor that is wrong."""
        tensors = self.tensors(layer)
        q = unpack(tensors, self.spec, self.checkpoint_format, self.name, self.k)
        device = tensors["qweight"].device
        try:
            layer.foem = foem_kernels.prepare(
                *q, bits=self.spec.bits, group_size=self.spec.group_size, dtype=self.dtype, device=device
            )
        except ValueError as error:
            raise FoemError(f"{self.name}: {error}") from None
        for key in TENSORS:
            delattr(layer, key)

    def apply(self, layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return foem_kernels.gemm(x, layer.foem, bias)
