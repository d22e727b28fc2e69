"""Which layers of a model are quantized and how: vLLM's `QuantizationConfig` over `foem_vllm.format.FormatConfig`.

vLLM creates it from config.json, lets it look at the checkpoint (`maybe_update_config`) and then asks it for the method of
every layer. The look at the checkpoint is where bad files are refused: before anything is loaded, by name.
"""

from __future__ import annotations

import functools
import logging
import pathlib

import torch

from foem_vllm.errors import FoemError
from foem_vllm.expert_parts import expert_specs
from foem_vllm.format import METHODS, FormatConfig, first_of, method_of
from foem_vllm.integrity import read_headers, verify_files
from foem_vllm.layers import FUSED
from foem_vllm.plugin import compat
from foem_vllm.serving import fused_specs, quantized_modules, rearranged_findings
from foem_vllm.spec import QuantSpec

logger = logging.getLogger("foem_vllm")


class FoemConfig(compat.QuantizationConfig):
    """vLLM's view of a GPTQ checkpoint. `modules`: {vLLM module before fusion: spec}, None while unknown."""

    def __init__(self, format_config: FormatConfig):
        super().__init__()
        self.format_config = format_config
        self.modules: dict[str, QuantSpec] | None = None
        self.linears: dict[str, tuple[str, ...]] = {}  # {layer that vLLM made: modules of the checkpoint that it is made of}

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
        """Raises FoemError on another method and on impossible values."""
        return cls(FormatConfig.from_json(config, "quantization_config"))

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None, **kwargs) -> str | None:
        """Claim a GPTQ checkpoint when the user asks for foem, or when foem wrote it and the user asks for nothing.

        vLLM asks this for every quantized checkpoint, ours or not, so nothing may raise. Where a config names no method, vLLM
        makes it "".
        """
        if not isinstance(hf_quant_cfg, dict) or method_of(hf_quant_cfg) not in METHODS:
            return None
        if not hf_quant_cfg.get("quant_method") and first_of(hf_quant_cfg, "bits") is None:
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
        for finding in rearranged_findings(modules, getattr(hf_config, "architectures", None) or (), compat.RELEASE):
            raise FoemError(f"{model_name}: {finding}")
        if local and (compared := verify_files(model_name, self.format_config.meta)):
            logger.info("foem: %d file(s) of %s match their checksums", compared, model_name)
        self.modules = modules or None

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Call modules what vLLM calls them. It is asked about tensors: some of its rules hold only for what follows a dot."""
        if self.modules is not None:
            mapped = hf_to_vllm_mapper.apply_dict({f"{name}.qweight": spec for name, spec in self.modules.items()})
            self.modules = {name.removesuffix(".qweight"): spec for name, spec in mapped.items()}

    def specs_for(self, prefix: str) -> dict[str, QuantSpec | None]:
        """{checkpoint module: its spec} of what is fused into vLLM's module `prefix`; None when unquantized.

        What is stored counts, not what the model class says: there are classes that say nothing of what they fuse (StableLM),
        and some that speak of modules which their checkpoints have fused already (GLM-4).
        """
        if self.modules is None:
            return fused_specs(prefix, self.packed_modules_mapping, self.format_config.spec_for)
        said = fused_specs(prefix, self.packed_modules_mapping, self.modules.get)
        stored = (fused_specs(prefix, packed, self.modules.get) for packed in ({}, self.packed_modules_mapping, FUSED))
        return next((specs for specs in stored if any(specs.values())), said)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        """See vLLM. None for layers that are neither linear, nor embeddings, nor experts."""
        from foem_vllm.plugin.filled import filled
        from foem_vllm.plugin.linear import FoemLinearMethod

        ask_for_amx()
        if isinstance(layer, compat.RoutedExperts):
            return self.experts_method(layer, prefix)
        head = isinstance(layer, compat.ParallelLMHead)
        if not isinstance(layer, (compat.LinearBase, compat.VocabParallelEmbedding)):
            return None
        specs = self.specs_for(prefix)
        if head and self.modules is None and not self.format_config.lm_head:
            specs = {}
        if head:
            self.say_unclaimed()
        if isinstance(layer, compat.LinearBase):
            self.linears[prefix] = tuple(specs)
            if not any(specs.values()):
                return filled(compat.UnquantizedLinearMethod(), prefix)
        elif not (head and any(specs.values())):
            engine = compat.get_current_vllm_config_or_none()
            # A model that drafts has no embedding and head of its own, but is given those of the other when both are loaded.
            drafted = engine is not None and engine.speculative_config is not None
            return None if drafted else filled(compat.UnquantizedEmbeddingMethod(), prefix)
        return FoemLinearMethod(specs, self.format_config.zero_format, prefix)

    def say_unclaimed(self) -> None:
        """Warn of a quantized module beside linears that vLLM has made, of which none is made of it: loading will fail.

        Asked for when the head is made, usually behind all blocks. Only a warning, because a model may leave weights out.
        """
        beside = {prefix.rpartition(".")[0] for prefix in self.linears}
        claimed = {module for modules in self.linears.values() for module in modules}
        lost = [m for m in self.modules or () if m.rpartition(".")[0] in beside and m not in claimed]
        if lost:
            logger.warning(
                "foem: %s, the first of %d, is quantized in the checkpoint, but no linear of vLLM's model is known to be made of "
                "it; where loading fails of that, this model cannot be served with --quantization foem",
                lost[0],
                len(lost),
            )

    def experts_method(self, layer: torch.nn.Module, prefix: str):
        """The method of a layer's routed experts. Raises FoemError when they are not all quantized alike."""
        from foem_vllm.plugin.moe import FoemMoEMethod

        gate = layer.ckpt_gate_proj_name
        names = gate, layer.ckpt_up_proj_name or gate, layer.ckpt_down_proj_name
        known = self.format_config.spec_for if self.modules is None else self.modules.get
        specs = expert_specs(prefix, layer.moe_config.num_logical_experts, names, known)
        if specs is None:
            return compat.UnquantizedFusedMoEMethod(layer.moe_config)
        return FoemMoEMethod(specs, self.format_config.zero_format, prefix, layer.moe_config)


@functools.cache
def ask_for_amx() -> None:
    """Have Linux let this process use AMX, where the CPU has it.

    vLLM's attention on CPUs uses it in bfloat16, and counts on oneDNN, which multiplies the weights that are not quantized, to
    have asked. Where every linear before the first attention is ours nobody has, and the first request would end in SIGILL.
    """
    torch.cpu._init_amx()
