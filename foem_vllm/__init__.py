"""FOEM INT4 quantization of causal LMs into GPTQ-format checkpoints, and the vLLM plugin that serves them.

from foem_vllm import QuantizeConfig, quantize
report = quantize("Qwen/Qwen3-0.6B", "out", QuantizeConfig(method="foem", calibration="text.jsonl"))
"""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

from foem_vllm.errors import FoemError

try:
    __version__ = _version("foem-vllm")
except PackageNotFoundError:  # used from a source tree, without installation
    __version__ = "0+source"


def __getattr__(name: str):
    # Imported on first use: the plugin loads this package in every vLLM process and needs none of the quantizer.
    if name in ("quantize", "QuantizeConfig"):
        import importlib

        module = importlib.import_module("foem_vllm.pipeline" if name == "quantize" else "foem_vllm.recipe")
        return getattr(module, name)
    raise AttributeError(f"module 'foem_vllm' has no attribute {name!r}")


__all__ = ["FoemError", "QuantizeConfig", "__version__", "quantize"]
