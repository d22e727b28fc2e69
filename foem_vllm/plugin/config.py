"""Which layers of a model are quantized and how: vLLM's `QuantizationConfig` over `foem_vllm.format.FormatConfig`.

vLLM creates it from config.json, lets it look at the checkpoint (`maybe_update_config`) and then asks it for the method of
every layer. The look at the checkpoint is where bad files are refused: before anything is loaded, by name.
"""

from __future__ import annotations

import logging
import pathlib

import torch

from foem_vllm.errors import FoemError
from foem_vllm.format import FormatConfig, QuantSpec, stored_shapes
from foem_vllm.integrity import read_headers, verify_files
from foem_vllm.plugin import compat

logger = logging.getLogger("foem_vllm")

SERVED_BITS = (4, 8)
QUANT_METHODS = ("gptq", "foem")
Headers = dict[str, tuple[str, tuple[int, ...]]]


def check_bits(spec: QuantSpec, where: str) -> None:
    if spec.bits not in SERVED_BITS:
        raise FoemError(
            f"{where}: {spec.bits}-bit weights are not served, only {' and '.join(map(str, SERVED_BITS))}-bit; "
            f"quantize again with --bits {SERVED_BITS[0]}"
        )


def quantized_modules(headers: Headers, config: FormatConfig, where: str) -> dict[str, QuantSpec]:
    """{module: spec} of the modules with a qweight, checked: complete, and with the shapes that the config describes.

    headers: {tensor: (safetensors dtype, shape)}. Raises FoemError naming the tensor.
    """
    found = {}
    for tensor in headers:
        module, _, key = tensor.rpartition(".")
        if key != "qweight":
            continue
        spec = config.spec_for(module)
        if spec is None:
            raise FoemError(
                f"{where}: a `dynamic` rule of config.json excludes {module}, but {tensor} is quantized; "
                "config.json belongs to other weights"
            )
        check_bits(spec, f"{where}: {module}")
        packed = headers[tensor][1]
        k = headers[f"{module}.g_idx"][1][0] if f"{module}.g_idx" in headers else packed[0] * 32 // spec.bits
        for key, (shape, dtype) in stored_shapes(spec, k, packed[-1]).items():
            stored = headers.get(f"{module}.{key}")
            if stored is None:
                if key == "g_idx" and not spec.desc_act:
                    continue
                raise FoemError(f"{where}: {module}.{key} is missing; download or quantize the checkpoint again")
            if stored[1] != shape or (dtype is torch.int32 and stored[0] != "I32"):
                raise FoemError(
                    f"{where}: {module}.{key} is {stored[0]} {list(stored[1])}, but bits={spec.bits} and group_size="
                    f"{spec.group_size} need {'I32' if dtype else 'floating point'} {list(shape)}; correct bits and "
                    "group_size in config.json, or download the checkpoint again"
                )
        found[module] = spec
    if headers and not found:
        raise FoemError(
            f"{where}: config.json says GPTQ, but no tensor is called *.qweight; serve it without --quantization, "
            "or quantize it with `foem quantize`"
        )
    return found


class FoemConfig(compat.QuantizationConfig):
    """vLLM's view of a GPTQ checkpoint. `modules`: {vLLM module before fusion: spec}, None while unknown."""

    def __init__(self, format_config: FormatConfig):
        super().__init__()
        self.format_config = format_config
        self.modules: dict[str, QuantSpec] | None = None

    def __repr__(self) -> str:
        return f"FoemConfig({self.format_config.spec}, {self.format_config.checkpoint_format})"

    @classmethod
    def get_name(cls) -> str:
        return "foem"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # the reference kernel runs everywhere; faster ones say themselves what they need

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict) -> FoemConfig:
        """Raises FoemError on another method, on bits that are not served, and on impossible values."""
        parsed = FormatConfig.from_json(config, "quantization_config")
        check_bits(parsed.spec, "quantization_config")
        return cls(parsed)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None, **kwargs) -> str | None:
        """Claim a GPTQ checkpoint when the user asks for foem, or when foem wrote it and the user asks for nothing.

        vLLM asks this for every quantized checkpoint, ours or not, so nothing may raise.
        """
        if not isinstance(hf_quant_cfg, dict) or str(hf_quant_cfg.get("quant_method", "")).lower() not in QUANT_METHODS:
            return None
        meta = hf_quant_cfg.get("meta")
        ours = isinstance(meta, dict) and "foem" in meta
        return "foem" if user_quant == "foem" or (user_quant is None and ours) else None

    @staticmethod
    def get_checkpoint_weight_mapper():
        """Nothing is dropped; the base class drops g_idx, without which activation-ordered weights are garbage."""
        return compat.WeightsMapper()

    def maybe_update_config(self, model_name: str, hf_config=None, revision: str | None = None) -> None:
        """Read the checkpoint's headers and compare its checksums; from here on `modules` is known.

        Raises FoemError on damaged or incomplete files and on a config that does not describe them. A model named by hub id
        has its files checked by the hub's own checksums.
        """
        local = pathlib.Path(model_name).is_dir()
        headers = read_headers(model_name) if local else compat.hub_headers(model_name, revision)
        modules = quantized_modules(headers, self.format_config, model_name)
        if local and (compared := verify_files(model_name, self.format_config.meta)):
            logger.info("foem: %d file(s) of %s match their checksums", compared, model_name)
        self.modules = modules or None

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        if self.modules is not None:
            self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def spec_for(self, prefix: str) -> QuantSpec | None:
        """The spec of vLLM's module `prefix`, which may be several modules of the checkpoint fused; None when unquantized.

        Raises FoemError when the fused modules do not agree: one kernel call serves them all.
        """
        parent, _, last = prefix.rpartition(".")
        shards = [f"{parent}.{shard}" if parent else shard for shard in self.packed_modules_mapping.get(last, [last])]
        if self.modules is None:
            specs = {shard: self.format_config.spec_for(shard) for shard in shards}
        else:
            specs = {shard: self.modules.get(shard) for shard in shards}
        if len(set(specs.values())) > 1:
            said = ", ".join(
                f"{shard.rpartition('.')[2]} {'unquantized' if s is None else f'{s.bits}-bit group {s.group_size}'}"
                f"{'' if s is None else ' sym' if s.symmetric else ' asym'}"
                for shard, s in specs.items()
            )
            raise FoemError(
                f"{prefix}: vLLM fuses modules that the checkpoint quantizes differently ({said}); "
                "quantize again with one setting for all of them"
            )
        return next(iter(specs.values()))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        """See vLLM. None for layers that are no linear. Raises FoemError on mixture-of-experts layers with quantized experts."""
        from foem_vllm.plugin.linear import FoemLinearMethod

        if isinstance(layer, compat.RoutedExperts):
            if self.modules is None or any(name.startswith(f"{prefix}.") for name in self.modules):
                raise FoemError(
                    f"{prefix}: quantized mixture-of-experts layers are not supported by --quantization foem yet; "
                    "serve this checkpoint with --quantization gptq"
                )
            return compat.UnquantizedFusedMoEMethod(layer.moe_config)
        head = isinstance(layer, compat.ParallelLMHead)
        if not head and not isinstance(layer, compat.LinearBase):
            return None
        spec = self.spec_for(prefix)
        if head and self.modules is None and not self.format_config.lm_head:
            spec = None
        if spec is None:
            return None if head else compat.UnquantizedLinearMethod()
        check_bits(spec, prefix)
        return FoemLinearMethod(spec, self.format_config.checkpoint_format, prefix)
