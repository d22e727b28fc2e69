"""Whether vLLM's own GPTQ serves a checkpoint: the rules of `--quantization gptq` in vLLM 0.32, written down.

Rules follow from the config and the layers' shapes; vLLM is not imported. What it refuses is refused before or while weights are
loaded; nothing here is about speed. Left out: ROCm, XPU and TPU, Exllama (float16 only), optional packages (Conch, Humming).
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping, Sequence

import torch

from foem_vllm.format import FormatConfig
from foem_vllm.layers import Experts, Layer

NEEDED = ("bits", "group_size", "desc_act", "sym")
TYPES = ((4, True), (8, True))  # (bits, sym)
GROUPS = (-1, 32, 64, 128)
CPU_STEP = 32  # cpu_gemm_wna16 takes inputs and outputs in multiples of it
VOCABULARY_STEP = 64
LEAST_CAPABILITY = (7, 5)
UNSAID = {  # {model: what it fuses without its class saying so}
    "GPTJForCausalLM": ("qkv_proj",),
    "IQuestLoopCoderForCausalLM": ("qkv_proj", "gate_up_proj"),
    "K2HorizonForCausalLM": ("gate_up_proj",),
    "KimiLinearForCausalLM": ("gate_up_proj",),
    "OrionForCausalLM": ("qkv_proj", "gate_up_proj"),
    "StableLmForCausalLM": ("qkv_proj", "gate_up_proj"),
    "Step3TextForCausalLM": ("gate_up_proj",),
}
FUSED_BEFORE = {"Glm4ForCausalLM": "gate_up_proj"}  # {model: fused on disk, although its class speaks of it as of two}


def refusals(
    raw: Mapping, config: FormatConfig, layers: Sequence[Layer | Experts], device: str, architectures: Sequence[str] = ()
) -> list[str]:
    """Every reason why stock vLLM does not serve it; empty: it does. raw: the quantization config as it is stored.

    layers: as one rank computes them. device: "cpu", "cuda" or an architecture. architectures: of the model.
    """
    found = [*config_refusals(raw)]
    if not found:  # else no layer is ever looked at
        for layer in layers:
            if isinstance(layer, Experts):
                found += experts_refusals(layer, device)
            else:
                found += [*layer_refusals(raw, config, layer, device), *fusion_refusals(layer, architectures)]
    return list(dict.fromkeys(found))


def config_refusals(raw: Mapping) -> Iterator[str]:
    """What vLLM refuses before it knows a layer. It looks at the order of columns in all rules, whether they match something."""
    missing = [key for key in NEEDED if key not in raw]
    if missing:
        yield f"the config has no {' and no '.join(missing)}"
        return
    for rule, override in {"": {}, **(raw.get("dynamic") or {})}.items():
        order, group = (override.get(key, raw[key]) for key in ("desc_act", "group_size"))
        if order and group != -1 and not rule.startswith("-:"):
            where = f" (rule {rule!r})" if rule else ""
            yield f"activation order (desc_act) with groups is no longer served{where}"
    if (raw["bits"], raw["sym"]) not in TYPES:
        yield type_refusal(raw["bits"], raw["sym"])


def type_refusal(bits: int, sym: bool) -> str:
    return f"{bits}-bit {'symmetric' if sym else 'asymmetric'} weights are not served, only symmetric 4 and 8 bits"


def layer_refusals(raw: Mapping, config: FormatConfig, layer: Layer, device: str) -> Iterator[str]:
    """vLLM looks rules up by the fused name, and knows one spec for all that is fused."""
    kind = layer.kind
    names = ", ".join(member.rpartition(".")[2] for member in layer.members)
    if set(layer.members.values()) != {config.spec_for(layer.name)}:
        yield f"{kind}: vLLM fuses {names}, whose rules it looks up as those of {kind}"
        return
    spec = layer.parts[0].spec
    if (spec.bits, spec.symmetric) not in TYPES:
        yield f"{kind}: {type_refusal(spec.bits, spec.symmetric)}"
        return
    if layer.head and not raw.get("lm_head"):
        yield f"{kind} is quantized, but the config does not say so (lm_head)"
    if layer.head and layer.stored_n % VOCABULARY_STEP:
        yield f"{kind}: a quantized head needs a vocabulary that {VOCABULARY_STEP} divides, not {layer.stored_n}"
    if spec.group_size not in GROUPS:
        yield f"groups of {spec.group_size} are not served, only of {', '.join(map(str, GROUPS))}"
    if spec.group_size > 0 and layer.k % spec.group_size:
        yield f"{kind}: {layer.k} inputs of a rank are no whole groups of {spec.group_size}"
    if device == "cpu" and spec.bits != 4:
        yield f"{spec.bits}-bit weights are not served on CPUs"
    if device == "cpu":
        for what, size in (("inputs", layer.k), ("outputs", layer.n)):
            if size % CPU_STEP:
                yield f"{kind}: {size} {what} of a rank are no multiple of {CPU_STEP}"
        if not multiplies():
            yield "this CPU lacks AVX-512, and vLLM's kernels for such CPUs have none for 4-bit weights"
    elif (capability := capability_of(device)) is not None and capability < LEAST_CAPABILITY:
        yield "Marlin needs compute capability 7.5, found {}.{}".format(*capability)


def fusion_refusals(layer: Layer, architectures: Sequence[str]) -> Iterator[str]:
    """vLLM looks up by the names that its model class says are fused whether a layer is quantized in the checkpoint."""
    for model in architectures:
        unsaid = layer.kind in UNSAID.get(model, ()) and len(layer.members) > 1
        if unsaid or (layer.kind == FUSED_BEFORE.get(model) and len(layer.members) == 1):
            yield f"{layer.kind}: vLLM's {model} does not find it among the quantized modules, by the names it has there"


def experts_refusals(experts: Experts, device: str) -> Iterator[str]:
    for bits, sym in {(part.spec.bits, part.spec.symmetric) for part in experts.parts}.difference(TYPES):
        yield f"{experts.kind}: {type_refusal(bits, sym)}"
    if device == "cpu" and not torch.cpu._is_amx_tile_supported():
        yield f"{experts.kind}: quantized experts are served only on CPUs with AMX"
    if device == "cpu" and any(part.spec.bits != 4 for part in experts.parts):
        yield f"{experts.kind}: only 4-bit experts are served on CPUs"


def multiplies() -> bool:
    """Whether stock vLLM has a kernel for 4-bit weights on this CPU. Where not, it starts, and fails in the first request."""
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_supported()


def capability_of(device: str) -> tuple[int, int] | None:
    """Of a named architecture, or of this machine's GPU; None where there is none."""
    if named := re.fullmatch(r"sm_(\d+)(\d)[af]?", device):
        return int(named[1]), int(named[2])
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None
