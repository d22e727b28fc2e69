"""Every import from vLLM, and nothing else: what a new vLLM release can break is in this file.

The first names are what registering needs. The others load on first use (`_LATER`), because they cost seconds and vLLM calls
`register` in each of its processes, also in those that never build a model.
"""

from __future__ import annotations

import importlib
import logging
import re

import vllm
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from foem_vllm.errors import FoemError

VERSION = vllm.__version__
RELEASE = tuple(map(int, re.findall(r"\d+", VERSION)[:2]))

_LINEAR = "vllm.model_executor.layers.linear"
_LATER = {
    "LinearBase": _LINEAR,
    "LinearMethodBase": _LINEAR,
    "UnquantizedLinearMethod": _LINEAR,
    "ParallelLMHead": "vllm.model_executor.layers.vocab_parallel_embedding",
    "VocabParallelEmbedding": "vllm.model_executor.layers.vocab_parallel_embedding",
    "UnquantizedEmbeddingMethod": "vllm.model_executor.layers.vocab_parallel_embedding",
    "RoutedExperts": "vllm.model_executor.layers.fused_moe",
    "FusedMoEMethodBase": "vllm.model_executor.layers.fused_moe",
    "UnquantizedFusedMoEMethod": "vllm.model_executor.layers.fused_moe",
    "WeightsMapper": "vllm.model_executor.models.utils",
    "get_current_vllm_config_or_none": "vllm.config",
    "get_safetensors_params_metadata": "vllm.transformers_utils.config",
}
__all__ = ["QuantizationConfig", "RELEASE", "VERSION", "hub_headers", "register_quantization_config", "share_log", *_LATER]


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(name)
    try:
        return getattr(importlib.import_module(_LATER[name]), name)
    except (ImportError, AttributeError) as error:
        raise FoemError(
            f"vLLM {VERSION} has no {_LATER[name]}.{name} ({error}); install a version that foem-vllm is "
            "tested with: pip install 'foem-vllm[gpu]' or 'foem-vllm[cpu]'"
        ) from None


def hub_headers(model: str, revision: str | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (safetensors dtype, shape)} of a model named by hub id; empty when the hub and its cache do not say."""
    found = __getattr__("get_safetensors_params_metadata")(model, revision=revision)
    return {name: (info["dtype"], tuple(info["shape"])) for name, info in found.items()}


class VllmLog(logging.Handler):
    """Hands records to vLLM's logger. Resolved per record, because vLLM configures its logger after plugins are loaded."""

    def emit(self, record: logging.LogRecord) -> None:
        target = logging.getLogger("vllm")
        if target.isEnabledFor(record.levelno):
            target.handle(record)


def share_log(*names: str) -> None:
    """Let the loggers `names` speak through vLLM's: vLLM configures only its own, so ours would stay silent."""
    for name in names:
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(VllmLog())
            logger.setLevel(logging.DEBUG)  # vLLM's own level decides
            logger.propagate = False
