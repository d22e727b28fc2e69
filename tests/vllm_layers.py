"""vLLM's own linear layers under --quantization foem without an engine: made, loaded and run as a model does it."""
from __future__ import annotations

import contextlib
import pathlib

import torch

from foem_vllm.plugin.config import FoemConfig

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v"),
          "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}


@contextlib.contextmanager
def rank_of(world: int, rank: int, folder: pathlib.Path):
    """vLLM's layers ask for the tensor-parallel group; processes meet in `folder`."""
    from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    config = VllmConfig()
    config.parallel_config = ParallelConfig(tensor_parallel_size=world)
    with set_current_vllm_config(config):
        init_distributed_environment(world, rank, f"file://{folder}/rendezvous", rank, "gloo")
        initialize_model_parallel(world, 1)
        yield
        cleanup_dist_env_and_memory()


def block(config: FoemConfig, sizes: dict, dtype: torch.dtype, prefix: str = "model.layers.0") -> dict[str, torch.nn.Module]:
    """{name in the model: layer} of one decoder block and the head. sizes: hidden, heads, kv_heads, head_dim, inner, vocab."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    config.packed_modules_mapping = PACKED
    hidden, heads, width = sizes["hidden"], sizes["heads"], sizes["head_dim"]
    shared = dict(bias=False, params_dtype=dtype, quant_config=config)
    names = [f"{prefix}.{name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")]
    return {
        names[0]: QKVParallelLinear(hidden, width, heads, sizes["kv_heads"], prefix=names[0], **shared),
        names[1]: RowParallelLinear(heads * width, hidden, prefix=names[1], **shared),
        names[2]: MergedColumnParallelLinear(hidden, [sizes["inner"]] * 2, prefix=names[2], **shared),
        names[3]: RowParallelLinear(sizes["inner"], hidden, prefix=names[3], **shared),
        "lm_head": ParallelLMHead(sizes["vocab"], hidden, prefix="lm_head", params_dtype=dtype, quant_config=config),
    }


def load(layers: dict[str, torch.nn.Module], tensors: dict[str, torch.Tensor]) -> None:
    """Hand every tensor to the parameter that vLLM's models would; KeyError for one that no layer has, as there."""
    for name, tensor in tensors.items():
        module, _, key = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        fused, shard = SHARDS.get(last, (last, None))
        param = dict(layers[f"{parent}.{fused}" if parent else fused].named_parameters())[key]
        param.weight_loader(param, tensor, *(() if shard is None else (shard,)))
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)
