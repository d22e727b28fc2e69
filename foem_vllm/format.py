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

The bit stream runs on across words, so 3-bit codes take 3 words for 32 codes, the layout of AutoGPTQ and GPTQModel.
Left out: other pack dtypes than int32, Marlin- and exllama-shuffled files (private layouts of one engine).
"""

from __future__ import annotations

import json
import pathlib
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from foem_vllm.errors import FoemError

BITS = (2, 3, 4, 8)
ACT_ORDERS = ("none", "full", "group", "static")
CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
TENSORS = ("qweight", "qzeros", "scales", "g_idx")
CONFIG_FILES = ("config.json", "quantize_config.json")


@dataclass(frozen=True)
class QuantSpec:
    """How one linear is quantized.

    bits: 2, 3, 4 or 8. group_size: columns that share a scale, -1 for all of them. symmetric: the zero point is
    2**(bits-1) everywhere. act_order: order in which the solver visits columns: "none"; "full" (desc_act: groups follow
    the order, g_idx is needed to serve); "group" (GAR: groups stay contiguous); "static" (scales fixed beforehand).
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: str = "none"

    def __post_init__(self):
        if self.bits not in BITS:
            raise FoemError(f"bits={self.bits} is not a GPTQ width; choose one of {', '.join(map(str, BITS))}")
        if self.group_size != -1 and self.group_size < 1:
            raise FoemError(f"group_size={self.group_size} must be positive, or -1 for one group per row")
        if self.act_order not in ACT_ORDERS:
            raise FoemError(f"act_order={self.act_order!r} is unknown; choose one of {', '.join(ACT_ORDERS)}")

    @property
    def mid(self) -> int:
        """The symmetric zero point."""
        return 1 << (self.bits - 1)

    @property
    def desc_act(self) -> bool:
        """Whether the checkpoint needs its g_idx: only dynamic groups in activation order do."""
        return self.act_order == "full" and self.group_size != -1

    def groups(self, k: int) -> int:
        return 1 if self.group_size == -1 else -(-k // self.group_size)


class Quantized(NamedTuple):
    """Integer codes of one linear [N, K] with its grid.

    codes: [N, K] uint8. scales: [N, G] floating point, values that fp16 holds exactly. zeros: [N, G] uint8, or None when
    symmetric (2**(bits-1) everywhere). g_idx: [K] int32, or None when column k belongs to group k // group_size.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None


def group_index(k: int, spec: QuantSpec) -> torch.Tensor:
    """[K] int32: the group of every column without activation order."""
    return torch.arange(k, dtype=torch.int32) // (k if spec.group_size == -1 else spec.group_size)


def dequantize(q: Quantized, spec: QuantSpec) -> torch.Tensor:
    """[N, K] float32: scale * (code - zero)."""
    g = (group_index(q.codes.shape[1], spec) if q.g_idx is None else q.g_idx).long().to(q.codes.device)
    zeros = spec.mid if q.zeros is None else q.zeros.float()[:, g]
    return (q.codes.float() - zeros) * q.scales.float()[:, g]


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [R, C] (integers below 2**bits) along the first dimension: int32 [ceil(R*bits/32), C].

    >>> pack_bits(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8), 4).tolist()
    [[49, 66]]
    """
    rows, columns = codes.shape
    padded = torch.zeros(-(-rows // 32) * 32, columns, dtype=torch.int64, device=codes.device)
    padded[:rows] = codes
    padded = padded.view(-1, 32, columns)
    words = torch.zeros(padded.shape[0], bits, columns, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= padded[:, i] << shift
        if shift + bits > 32:
            words[:, word + 1] |= padded[:, i] >> (32 - shift)
    words = words.view(-1, columns)[: -(-rows * bits // 32)] & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_bits(words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Inverse of `pack_bits`: uint8 [rows, C] from int32 [ceil(rows*bits/32), C]."""
    needed, columns = -(-rows // 32) * bits, words.shape[1]
    padded = torch.zeros(needed, columns, dtype=torch.int64, device=words.device)
    padded[: words.shape[0]] = words.long() & 0xFFFFFFFF
    padded = padded.view(-1, bits, columns)
    codes = torch.empty(padded.shape[0], 32, columns, dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = padded[:, word] >> shift
        if shift + bits > 32:
            value = value | padded[:, word + 1] << (32 - shift)
        codes[:, i] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(-1, columns)[:rows].contiguous()


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
    for key, (shape, dtype) in stored_shapes(spec, k, n).items():
        if key not in tensors:
            if key == "g_idx":
                continue
            raise FoemError(f"{name}.{key} is missing from the checkpoint; download or quantize it again")
        t = tensors[key]
        if tuple(t.shape) != shape or (dtype and t.dtype != dtype):
            raise FoemError(
                f"{name}.{key} is {t.dtype} {list(t.shape)}, but bits={spec.bits}, group_size={spec.group_size} "
                f"need {dtype or 'floating point'} {list(shape)}; the config does not describe these weights"
            )
    scales = tensors["scales"]
    if not scales.is_floating_point() or not torch.isfinite(scales).all():
        raise FoemError(f"{name}.scales holds NaN or Inf; the file is damaged, download or quantize it again")
    if "g_idx" in tensors:
        check_g_idx(tensors["g_idx"], spec, name)
    if spec.symmetric:
        zeros = unpack_bits(tensors["qzeros"].T, spec.bits, n)
        stored = spec.mid - (checkpoint_format == "gptq")
        if (zeros != stored).any():
            found = int(zeros[zeros != stored][0])
            raise FoemError(
                f"{name}.qzeros holds {found} where symmetric checkpoint_format {checkpoint_format!r} stores {stored}; "
                "correct `sym` or `checkpoint_format` in config.json, or download the file again"
            )


def check_g_idx(g_idx: torch.Tensor, spec: QuantSpec, name: str) -> None:
    """Every group index in range; every group with as many columns as it must have."""
    k = g_idx.numel()
    groups = spec.groups(k)
    if g_idx.numel() and (int(g_idx.min()) < 0 or int(g_idx.max()) >= groups):
        raise FoemError(
            f"{name}.g_idx holds {int(g_idx.min())}..{int(g_idx.max())}, but there are {groups} groups; "
            "the file is damaged or group_size in config.json is wrong"
        )
    if not torch.equal(
        torch.bincount(g_idx.long().cpu(), minlength=groups), torch.bincount(group_index(k, spec).long(), minlength=groups)
    ):
        raise FoemError(
            f"{name}.g_idx does not give every group {spec.group_size} columns; "
            "the file is damaged or group_size in config.json is wrong"
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
    zeros = None
    if not spec.symmetric:
        zeros = unpack_bits(tensors["qzeros"].T, spec.bits, n)
        if checkpoint_format == "gptq":
            zeros = (zeros + 1) & ((1 << spec.bits) - 1)
    g_idx = tensors.get("g_idx")
    if g_idx is not None and torch.equal(g_idx.cpu(), group_index(k, spec)):
        g_idx = None
    return Quantized(unpack_bits(tensors["qweight"], spec.bits, k).T.contiguous(), tensors["scales"].T.contiguous(), zeros, g_idx)


@dataclass(frozen=True)
class FormatConfig:
    """`quantization_config` of a checkpoint: the default spec, exceptions, and where the zero points start."""

    spec: QuantSpec
    checkpoint_format: str = "gptq"
    lm_head: bool = False
    dynamic: dict | None = None
    meta: dict | None = None

    def spec_for(self, module: str) -> QuantSpec | None:
        """The spec of the module called `module`, or None when a `dynamic` rule ("-:regex") excludes it.

        Rules are tried in order and the first match counts, as in GPTQModel: "-:regex" excludes, "+:regex" or a bare
        regex overrides bits, group_size, sym and desc_act. Regexes match from the beginning of the name.
        """
        for rule, override in (self.dynamic or {}).items():
            if rule.startswith("-:"):
                if re.match(rule[2:], module):
                    return None
            elif re.match(rule.removeprefix("+:"), module):
                order = self.spec.act_order
                if "desc_act" in override:
                    order = "full" if override["desc_act"] else "none"
                return replace(
                    self.spec,
                    bits=override.get("bits", self.spec.bits),
                    group_size=override.get("group_size", self.spec.group_size),
                    symmetric=override.get("sym", self.spec.symmetric),
                    act_order=order,
                )
        return self.spec

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
        """Read a `quantization_config` dictionary, also of older writers (`wbits`, no `desc_act`).

        Raises FoemError on another quantization method, format or pack dtype, and on missing or impossible values.
        """
        method = str(config.get("quant_method", "gptq")).lower()
        if method not in ("gptq", "foem"):
            raise FoemError(
                f"{where}: quant_method is {method!r}, not 'gptq'; this checkpoint is of another kind, serve it without "
                "--quantization foem"
            )
        checkpoint_format = config.get("checkpoint_format") or config.get("format") or "gptq"
        if checkpoint_format not in CHECKPOINT_FORMATS:
            raise FoemError(
                f"{where}: checkpoint_format {checkpoint_format!r} is not read here; use one of {', '.join(CHECKPOINT_FORMATS)}"
            )
        if config.get("pack_dtype", "int32") not in ("int32", None):
            raise FoemError(f"{where}: pack_dtype {config['pack_dtype']!r} is not read here; quantize again with int32")
        bits = config.get("bits", config.get("wbits"))
        group_size = config.get("group_size", config.get("groupsize", -1))
        if not isinstance(bits, int) or not isinstance(group_size, int):
            raise FoemError(f"{where}: bits={bits!r} and group_size={group_size!r} must be integers; the config is incomplete")
        desc_act = bool(config.get("desc_act", False)) and group_size != -1
        order = "full" if desc_act else "static" if config.get("static_groups") else "none"
        try:
            spec = QuantSpec(bits, group_size, bool(config.get("sym", True)), order)
        except FoemError as error:
            raise FoemError(f"{where}: {error}") from None
        return cls(spec, checkpoint_format, bool(config.get("lm_head", False)), config.get("dynamic") or None, config.get("meta"))


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
        found = content.get("quantization_config") if name == "config.json" else content
        if found:
            return FormatConfig.from_json(found, str(path))
    raise FoemError(
        f"{folder}: no quantization_config in config.json and no quantize_config.json; this is not a GPTQ checkpoint "
        "(quantize it with `foem quantize`)"
    )
