"""The GPTQ checkpoint format: the only reader and writer of its bits, tensor names and config keys.

A quantized linear `y = W x` with W of shape [N, K] (out, in) is stored as four tensors beside each other:

======== ======= ===================== =====================================================================
name     dtype   shape                 content
======== ======= ===================== =====================================================================
qweight  int32   [ceil(K*bits/32), N]  codes, packed along K: code k of a column begins at bit `k*bits`, low bits first
qzeros   int32   [G, ceil(N*bits/32)]  zero points, packed along N; version 1 stores zero - 1, version 2 stores zero
scales   float16 [G, N]                W[n, k] = scale * (code - zero)
g_idx    int32   [K]                   the group that column k belongs to (k // group_size without activation order)
======== ======= ===================== =====================================================================

Packed words are bit streams (bits.py): 3-bit codes take 3 words for 32 codes, the layout of AutoGPTQ and GPTQModel.
Left out: other pack dtypes than int32, Marlin- and exllama-shuffled files (private layouts of one engine).
"""

from __future__ import annotations

import json
import pathlib
import re
from dataclasses import dataclass, replace

import torch

from foem_vllm.bits import pack_bits, unpack_bits
from foem_vllm.errors import FoemError
from foem_vllm.spec import Quantized, QuantSpec, group_index
from foem_vllm.zeros import CHECKPOINT_FORMATS, EARLIER_GPTQMODEL, GPTQMODEL, SINCE, stored_zeros, zero_points

PLANAR = "gptq_p"  # GPTQModel's layout in planes of bits; widths that divide a word have one plane, and are stored as version 2
TENSORS = ("qweight", "qzeros", "scales", "g_idx")
METHODS = ("gptq", "foem")
CONFIG_FILES = ("config.json", "quantize_config.json")
KEYS = {  # config keys with the names that older writers gave them
    "checkpoint_format": ("checkpoint_format", "format"),
    "bits": ("bits", "wbits", "w_bit"),
    "group_size": ("group_size", "groupsize", "q_group_size"),
}
TYPES = {"bits": int, "group_size": int, "desc_act": bool, "sym": bool, "static_groups": bool, "lm_head": bool}


def dequantize(q: Quantized, spec: QuantSpec) -> torch.Tensor:
    """[N, K] float32: scale * (code - zero)."""
    g = (group_index(q.codes.shape[1], spec) if q.g_idx is None else q.g_idx).long().to(q.codes.device)
    zeros = spec.mid if q.zeros is None else q.zeros.float()[:, g]
    return (q.codes.float() - zeros) * q.scales.float()[:, g]


def pack(q: Quantized, spec: QuantSpec, checkpoint_format: str = "gptq") -> dict[str, torch.Tensor]:
    """The four stored tensors of one linear; exact inverse of `unpack`.

    Version 1 ("gptq") cannot say "zero point 0" in a way that all readers understand (it stores -1 mod 2**bits, which
    some readers turn into 2**bits), so that combination is refused.
    """
    k = q.codes.shape[1]
    zeros = torch.full(q.scales.shape, spec.mid, dtype=torch.uint8) if q.zeros is None else q.zeros.to(torch.uint8)
    if checkpoint_format == "gptq":
        if (zeros == 0).any():
            raise FoemError("zero point 0 cannot be stored in checkpoint_format 'gptq'; write 'gptq_v2' instead")
        zeros = zeros - 1
    scales = q.scales.to(torch.float16)
    if not torch.equal(scales.to(q.scales.dtype), q.scales):
        raise FoemError("scales are not exact in float16: round them before the codes are chosen, not after")
    return {
        "qweight": pack_bits(q.codes.T, spec.bits),
        "qzeros": pack_bits(zeros, spec.bits).T.contiguous(),
        "scales": scales.T.contiguous(),
        "g_idx": group_index(k, spec) if q.g_idx is None else q.g_idx.to(torch.int32).clone(),
    }


def stored_shapes(spec: QuantSpec, k: int, n: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype (None: any floating point) of the stored tensors of a linear [n, k]."""
    g = spec.groups(k)
    return {
        "qweight": ((-(-k * spec.bits // 32), n), torch.int32),
        "qzeros": ((g, -(-n * spec.bits // 32)), torch.int32),
        "scales": ((g, n), None),
        "g_idx": ((k,), torch.int32),
    }


def check(tensors: dict[str, torch.Tensor], spec: QuantSpec, checkpoint_format: str, name: str, k: int, n: int) -> None:
    """Refuse stored tensors of a linear [n, k] that do not fit `spec`: shapes, dtypes, scales, g_idx, zero points.

    Raises FoemError naming the tensor. Symmetric kernels never read qzeros, which is why files with a wrong
    `checkpoint_format` circulate: symmetric zero points are therefore checked against the convention.
    """
    for key in TENSORS:
        if key in tensors:
            check_shape(key, tensors[key], spec, name, k, n)
        elif key != "g_idx":
            raise FoemError(f"{name}.{key} is missing from the checkpoint; download or quantize it again")
    check_scales(tensors["scales"], name)
    if "g_idx" in tensors:
        check_g_idx(tensors["g_idx"], spec, name)
    zero_points(stored_zeros(tensors["qzeros"], spec, checkpoint_format, n), spec, checkpoint_format, name)


def check_shape(key: str, t: torch.Tensor, spec: QuantSpec, name: str, k: int, n: int) -> None:
    """Refuse `t` as the stored tensor `key` of a linear [n, k] when its shape or dtype is another."""
    shape, dtype = stored_shapes(spec, k, n)[key]
    if tuple(t.shape) != shape or (t.dtype != dtype if dtype else not t.is_floating_point()):
        raise FoemError(
            f"{name}.{key} is {t.dtype} {list(t.shape)}, but bits={spec.bits}, group_size={spec.group_size} "
            f"need {dtype or 'floating point'} {list(shape)}; correct bits and group_size in config.json, or download it again "
            "with the weights"
        )


def check_scales(scales: torch.Tensor, name: str) -> None:
    if not torch.isfinite(scales).all():
        raise FoemError(f"{name}.scales holds NaN or Inf; the file is damaged, download or quantize it again")


def check_g_idx(g_idx: torch.Tensor, spec: QuantSpec, name: str) -> None:
    """Every group index in range; every group with as many columns as it must have."""
    k = g_idx.numel()
    groups = spec.groups(k)
    if g_idx.numel() and (int(g_idx.min()) < 0 or int(g_idx.max()) >= groups):
        raise FoemError(
            f"{name}.g_idx holds {int(g_idx.min())}..{int(g_idx.max())}, but there are {groups} groups; "
            "correct group_size in config.json, or download the damaged file again"
        )
    if not torch.equal(
        torch.bincount(g_idx.long().cpu(), minlength=groups), torch.bincount(group_index(k, spec).long(), minlength=groups)
    ):
        raise FoemError(
            f"{name}.g_idx does not give every group {spec.group_size} columns; "
            "correct group_size in config.json, or download the damaged file again"
        )


def unpack(
    tensors: dict[str, torch.Tensor], spec: QuantSpec, checkpoint_format: str = "gptq", name: str = "tensor", k: int | None = None
) -> Quantized:
    """Codes and grid of one linear from its stored tensors, checked first (see `check`).

    K is read from g_idx; without one pass `k`. Symmetric zeros come back as None, a trivial g_idx as None.
    """
    if k is None:
        k = tensors["g_idx"].numel() if "g_idx" in tensors else tensors["qweight"].shape[0] * 32 // spec.bits
    n = tensors["scales"].shape[-1] if "scales" in tensors else tensors["qweight"].shape[1]
    check(tensors, spec, checkpoint_format, name, k, n)
    codes = unpack_bits(tensors["qweight"], spec.bits, k).T.contiguous()
    zeros = zero_points(stored_zeros(tensors["qzeros"], spec, checkpoint_format, n), spec, checkpoint_format, name)
    g_idx = tensors.get("g_idx")
    if g_idx is not None and torch.equal(g_idx.cpu(), group_index(k, spec)):
        g_idx = None
    return Quantized(codes, tensors["scales"].T.contiguous(), zeros, g_idx)


@dataclass(frozen=True)
class FormatConfig:
    """`quantization_config` of a checkpoint: the default spec, exceptions, and where the zero points start."""

    spec: QuantSpec
    checkpoint_format: str = "gptq"
    lm_head: bool = False
    dynamic: dict | None = None
    meta: dict | None = None

    @property
    def zero_format(self) -> str:
        """How zero points are stored, for those who read them: `checkpoint_format`, or one of GPTQModel's ways."""
        writers = self.meta.get("quantizer") if isinstance(self.meta, dict) else None
        writers = map(str, writers if isinstance(writers, list) else [writers])
        release = next((w.removeprefix("gptqmodel:") for w in writers if w.startswith("gptqmodel:")), None)
        if release is None or self.checkpoint_format != "gptq":
            return self.checkpoint_format
        found = re.match(r"(\d+)\.(\d+)", release)
        return EARLIER_GPTQMODEL if found and tuple(map(int, found.groups())) < SINCE else GPTQMODEL

    def spec_for(self, module: str) -> QuantSpec | None:
        """The spec of the module called `module`, or None when a `dynamic` rule ("-:regex") excludes it.

        Rules are tried in order and the first match counts, as in GPTQModel: "-:regex" excludes, "+:regex" or a bare
        regex overrides bits, group_size, sym and desc_act. Regexes match from the beginning of the name. The only group of a
        module has no order. Raises FoemError when a rule sets impossible values.
        """
        spec = self.spec
        for rule, override in (self.dynamic or {}).items():
            if rule.startswith("-:"):
                if re.match(rule[2:], module):
                    return None
            elif re.match(rule.removeprefix("+:"), module):
                given = {key: value for key, value in override.items() if value is not None}
                order = spec.act_order
                if "desc_act" in given:
                    order = "full" if given["desc_act"] else "none"
                try:
                    spec = replace(
                        spec,
                        bits=given.get("bits", spec.bits),
                        group_size=given.get("group_size", spec.group_size),
                        symmetric=given.get("sym", spec.symmetric),
                        act_order=order,
                    )
                except FoemError as error:
                    raise FoemError(f"`dynamic` rule {rule!r}: {error}") from None
                break
        return replace(spec, act_order="none") if spec.group_size == -1 else spec

    def to_json(self) -> dict:
        """The `quantization_config` dictionary of config.json (GPTQModel's keys)."""
        spec = self.spec
        return {
            "quant_method": "gptq",
            "bits": spec.bits,
            "group_size": spec.group_size,
            "desc_act": spec.desc_act,
            "sym": spec.symmetric,
            "static_groups": spec.act_order == "static",
            "lm_head": self.lm_head,
            "checkpoint_format": self.checkpoint_format,
            "pack_dtype": "int32",
            "true_sequential": True,
            **({"dynamic": self.dynamic} if self.dynamic else {}),
            "meta": self.meta or {},
        }

    @classmethod
    def from_json(cls, config: dict, where: str = "config.json") -> FormatConfig:
        """Read a `quantization_config` dictionary of any writer of GPTQ tensors.

        AutoGPTQ, GPTQModel, Optimum and AutoRound's GPTQ export write the same keys beside their own; older files have other
        names for some (KEYS), no `desc_act` and no `sym`: the tensors say both (g_idx and qzeros), so without `sym` zero points
        are read. Raises FoemError on another quantization method, format or pack dtype, on missing or impossible values and on
        `dynamic` rules that are no regular expressions.
        """
        if not isinstance(config, dict):
            raise FoemError(f"{where}: the quantization config is {type(config).__name__}, not an object; the file is damaged")
        method = method_of(config)
        if method not in METHODS:
            raise FoemError(
                f"{where}: quant_method is {method!r}, not 'gptq'; this checkpoint is of another kind, serve it without "
                "--quantization foem"
            )
        checkpoint_format = first_of(config, "checkpoint_format", "gptq")
        if checkpoint_format == PLANAR and all(bits in (2, 4, 8) for bits in widths(config)):
            checkpoint_format = "gptq_v2"
        if config.get("is_marlin_format"):
            checkpoint_format = "marlin"
        if checkpoint_format not in CHECKPOINT_FORMATS:
            raise FoemError(
                f"{where}: checkpoint_format {checkpoint_format!r} is not read here; use one of {', '.join(CHECKPOINT_FORMATS)}"
            )
        if config.get("pack_dtype", "int32") not in ("int32", None):
            raise FoemError(f"{where}: pack_dtype {config['pack_dtype']!r} is not read here; quantize again with int32")
        values = {**config, "bits": first_of(config, "bits"), "group_size": first_of(config, "group_size", -1)}
        check_values(values, where)
        if values["bits"] is None:
            raise FoemError(f"{where}: there is no `bits` (nor `wbits`); the config is incomplete")
        desc_act = bool(config.get("desc_act"))
        order = "static" if config.get("static_groups") else "full" if desc_act else "none"
        try:
            spec = QuantSpec(values["bits"], values["group_size"], bool(config.get("sym", False)), order)
        except FoemError as error:
            raise FoemError(f"{where}: {error}") from None
        check_rules(config.get("dynamic"), where)
        return cls(spec, checkpoint_format, bool(config.get("lm_head")), config.get("dynamic") or None, config.get("meta"))


def method_of(config: dict) -> str:
    """The quantization method that a config names, in small letters; older writers named none, or called the key `method`."""
    return str(config.get("quant_method") or config.get("method") or "gptq").lower()


def widths(config: dict) -> list:
    """All `bits` that a config names, also those of its rules; not checked."""
    rules = config.get("dynamic")
    overrides = [rule for rule in rules.values() if isinstance(rule, dict)] if isinstance(rules, dict) else []
    return [first_of(config, "bits"), *(rule["bits"] for rule in overrides if rule.get("bits") is not None)]


def first_of(config: dict, key: str, default=None):
    """The value of `key`, or of one of its older names; None counts as absent."""
    return next((config[name] for name in KEYS.get(key, (key,)) if config.get(name) is not None), default)


def check_values(values: dict, where: str) -> None:
    """Refuse config values of another type than their key has: a string "false" would count as true."""
    for key, kind in TYPES.items():
        found = values.get(key)
        if found is not None and type(found) is not kind:
            raise FoemError(f"{where}: {key}={found!r} must be {'true or false' if kind is bool else 'an integer'}; correct it")


def check_rules(dynamic: dict | None, where: str) -> None:
    """Refuse `dynamic` rules that are not {regular expression: {key: value}}."""
    if not isinstance(dynamic, dict | None):
        raise FoemError(f"{where}: `dynamic` is {type(dynamic).__name__}, not an object of rules; correct it")
    for rule, override in (dynamic or {}).items():
        try:
            re.compile(rule[2:] if rule[:2] in ("-:", "+:") else rule)
        except re.error as error:
            raise FoemError(f"{where}: `dynamic` rule {rule!r} is not a regular expression ({error}); correct it") from None
        if not isinstance(override, dict) and not rule.startswith("-:"):
            raise FoemError(f"{where}: `dynamic` rule {rule!r} must hold an object of overrides, not {override!r}; correct it")
        if isinstance(override, dict):
            check_values(override, f"{where}: `dynamic` rule {rule!r}")


def stored_config(content: dict) -> dict | None:
    """The quantization config in a config.json: of the model, or of its language model, where vLLM looks too."""
    text = content.get("text_config")
    return content.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)


def read_config(folder: str | pathlib.Path) -> FormatConfig:
    """The quantization config of a checkpoint folder: `quantization_config` in config.json, else quantize_config.json.

    Raises FoemError when there is neither, or when the JSON is damaged.
    """
    for name in CONFIG_FILES:
        path = pathlib.Path(folder) / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise FoemError(f"{path}: not valid JSON ({error}); the file is damaged, download it again") from None
        found = stored_config(content) if name == "config.json" else content
        if found:
            return FormatConfig.from_json(found, str(path))
    raise FoemError(
        f"{folder}: no quantization_config in config.json and no quantize_config.json; this is not a GPTQ checkpoint "
        "(quantize it with `foem quantize`)"
    )
