"""What kernels/bench.py times: one quantized layer, and a Contender for every way to multiply with it.

To add a way, add a Contender to `contenders`: everything else (weight sets, errors, timing, tables) follows from its fields.
"""
from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import foem_kernels
import torch
from bench_report import AS_GIVEN
from foem_kernels import KERNELS, Problem, native
from foem_kernels.cpu_w4a16 import CpuW4A16

from foem_vllm.format import pack_bits

# An error above this is not rounding (`errors` says of what): the largest relative error of one rounding to the dtype.
# Roundings of weight, scale, partial sums and result are independent and each has an rms of 0.4 of that, so six of them fit.
# fp32 rounds every addition: 2**-24 each, in random directions, for K up to 2**16.
UNIT = {torch.bfloat16: 2.0 ** -8, torch.float16: 2.0 ** -11, torch.float32: 2.0 ** -16}
WORST = 16  # units: the same six roundings 6.5 standard deviations out, which 1e9 outputs do not reach


@dataclass(frozen=True)
class Layer:
    """W [n, k] = scale * (code - 8). codes: uint8 [n, k]; scales: float32 [n, k / group_size], exact in bf16 and in fp16."""

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    def weight(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """`rows` of W, exact in float32 and float64."""
        groups = self.codes[rows].reshape(-1, self.k // self.group_size, self.group_size).to(torch.float32)
        return ((groups - 8) * self.scales[rows][..., None]).reshape(-1, self.k).to(dtype)

    def problem(self, dtype: torch.dtype) -> Problem:
        return Problem(self.n, self.k, 4, self.group_size, True, dtype, self.codes.device.type)


def random_layer(n: int, k: int, device: str, group_size: int = 128, seed: int = 0) -> Layer:
    r = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device, generator=r)
    scales = torch.rand(n, k // group_size, device=device, generator=r) * 0.02 + 0.001
    return Layer(codes, scales.bfloat16().float(), group_size)


@dataclass(frozen=True)
class Contender:
    """One way to compute y [m, n] = x [m, k] W^T.

    kind: "ours", "dense" or "peer". supports: None, or why it cannot. prepare: a Layer -> weights in a private layout (tensors
    in dicts, tuples, lists or modules), done once. call: (x, weights) -> y. dtype: of x and y. best_of: variants of one
    kernel that share this name; of those only the fastest is reported. activations: what is done to x before it is multiplied.
    """

    name: str
    kind: str
    supports: Callable[[Problem], str | None]
    prepare: Callable[[Layer], Any]
    call: Callable[[torch.Tensor, Any], torch.Tensor]
    dtype: torch.dtype = torch.bfloat16
    best_of: str | None = None
    activations: str = AS_GIVEN


def tensors(weights) -> list[torch.Tensor]:
    if isinstance(weights, torch.Tensor):
        return [weights]
    if isinstance(weights, torch.nn.Module):
        return list(weights.parameters())
    if hasattr(weights, "tensors"):
        return weights.tensors()
    values = weights.values() if isinstance(weights, dict) else weights if isinstance(weights, (list, tuple)) else ()
    return [t for value in values for t in tensors(value)]


def stored_bytes(weights) -> int:
    return sum(t.numel() * t.element_size() for t in tensors(weights))


def clone(weights):
    """The same in other memory; what is neither tensor nor container of tensors is shared."""
    if hasattr(weights, "clone"):
        return weights.clone()
    if isinstance(weights, torch.nn.Module):
        return copy.deepcopy(weights)
    if isinstance(weights, dict):
        return {key: clone(value) for key, value in weights.items()}
    if isinstance(weights, tuple) and hasattr(weights, "_fields"):
        return type(weights)(*map(clone, weights))
    return type(weights)(map(clone, weights)) if isinstance(weights, (list, tuple)) else weights


def reference(x: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T [m, n] and the norms of W's rows [n], in float64."""
    y = torch.empty(x.shape[0], layer.n, dtype=torch.float64, device=x.device)
    norms = torch.empty(layer.n, dtype=torch.float64, device=x.device)
    for start in range(0, layer.n, 4096):
        rows = slice(start, start + 4096)
        w = layer.weight(torch.float64, rows)
        y[:, rows], norms[rows] = x.double() @ w.T, w.norm(dim=1)
    return y, norms


def errors(y: torch.Tensor, wanted: torch.Tensor, norms: torch.Tensor, rounding: float = 0.0) -> tuple[float, float, str | None]:
    """Relative error in the Frobenius norm; the worst element's over its standard deviation; None, or what is wrong.

    With x standard normal, y_ij has the standard deviation |w_j|: relative to that a wrong element shows in any company.
    rounding: what a kernel that rounds x adds to the unit, see `int8_rounding`.
    """
    if y.shape != wanted.shape:
        return float("nan"), float("nan"), f"wrong: {list(y.shape)} instead of {list(wanted.shape)}"
    difference, unit = (y.double() - wanted).abs(), UNIT[y.dtype] + rounding
    relative, worst = float(difference.norm() / wanted.norm()), float((difference / norms).max())
    if relative <= unit and worst <= WORST * unit:  # false for NaN
        return relative, worst, None
    return relative, worst, f"wrong: relative error {relative:.1e} (limit {unit:.1e}), worst {worst:.1e} ({WORST * unit:.1e})"


def int8_rounding(x: torch.Tensor) -> float:
    """The relative error of y when every element of x is half a step of its int8 grid off: the most that rounding can do.

    A grid of 255 steps reaches to the largest element of a token, at most: finer grids, of blocks, err less.
    """
    return float((x.abs().amax(1).double() / 254).norm() * x.shape[1] ** 0.5 / x.double().norm())


def gptq_words(layer: Layer) -> torch.Tensor:
    """Codes as checkpoints store them: int32 [k/8, n], eight codes of a column in a word, the first in the low bits."""
    return pack_bits(layer.codes.T, 4)


def group_scales(layer: Layer, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[k / group_size, n] of dtype, contiguous."""
    return layer.scales.T.to(dtype).contiguous()


def always(p: Problem) -> None:
    return None


def ours(kernel) -> Contender:
    def prepare(layer):
        return foem_kernels.prepare(layer.codes, layer.scales, bits=4, group_size=layer.group_size, dtype=torch.bfloat16,
                                    device=layer.codes.device, kernel=kernel.name)
    return Contender(kernel.name, "ours", kernel.supports, prepare, foem_kernels.gemm)


def ours_int8(kernel) -> Contender:
    """The CPU kernel with activations rounded to int8: what FOEM_CPU_ACT=int8 asks for when weights are laid out."""
    exact = ours(kernel)

    def supports(p):
        if reason := kernel.supports(p):
            return reason
        return None if native.library().foem_cpu_has_int8() else "needs AVX-512 VNNI"

    def prepare(layer):
        before = os.environ.get("FOEM_CPU_ACT")
        os.environ["FOEM_CPU_ACT"] = "int8"
        try:
            return exact.prepare(layer)
        finally:
            os.environ.pop("FOEM_CPU_ACT")
            if before is not None:
                os.environ["FOEM_CPU_ACT"] = before
    return replace(exact, name=f"{kernel.name} int8", supports=supports, prepare=prepare, activations="int8 a token")


def dense(name: str, dtype: torch.dtype) -> Contender:
    return Contender(name, "dense", always, partial(Layer.weight, dtype=dtype), torch.nn.functional.linear, dtype)


def tinygemm() -> Contender:
    """torch's own int4 product on a GPU: W = (code - 8) * scale + zero."""
    def supports(p):
        fits = p.n % 8 == 0 and p.k % 128 == 0 and p.group_size in (32, 64, 128, 256)
        return None if fits else "needs N % 8 == 0, K % 128 == 0 and groups of 32, 64, 128 or 256"

    def prepare(layer):
        scales = group_scales(layer)
        return {"w": torch.ops.aten._convert_weight_to_int4pack(byte_pairs(layer.codes, first_high=True), 8),
                "scales": torch.stack([scales, torch.zeros_like(scales)], -1), "group_size": layer.group_size}

    def call(x, w):
        return torch.ops.aten._weight_int4pack_mm(x, w["w"], w["group_size"], w["scales"])
    return Contender("tinygemm", "peer", supports, prepare, call)


def byte_pairs(codes: torch.Tensor, first_high: bool) -> torch.Tensor:
    """Neighbouring codes (uint8 [n, k], below 16) in a byte: uint8 [n, k/2]."""
    even, odd = codes[:, ::2], codes[:, 1::2]
    return (even << 4 | odd if first_high else odd << 4 | even).contiguous()


def torch_int4_cpu() -> Contender:
    def supports(p):
        if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            return "needs AVX2 or AVX-512"
        return None if p.n % 16 == 0 and p.group_size in (32, 64, 128, 256) else "needs N % 16 == 0 and groups of 32 to 256"

    def prepare(layer):
        scales = group_scales(layer)
        return {"w": torch.ops.aten._convert_weight_to_int4pack_for_cpu(layer.codes.int(), 1),
                "scales": torch.stack([scales, torch.zeros_like(scales)], -1), "group_size": layer.group_size}

    def call(x, w):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, w["w"], w["group_size"], w["scales"])
    return Contender("torch int4pack", "peer", supports, prepare, call)


def vllm_cpu() -> Contender:
    """vLLM's product for GPTQ weights on a CPU, without its AMX form (which rounds x to int8)."""
    def supports(p):
        if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
            return "vLLM's CPU build is not installed"
        return None if p.n % 32 == 0 and p.k % 32 == 0 else "needs N and K multiples of 32"

    def prepare(layer):
        # blocks of 16 outputs, in each [k, 2] words of eight outputs
        words = pack_bits(layer.codes, 4).view(layer.n // 16, 2, layer.k).permute(0, 2, 1).reshape(layer.n // 16, -1)
        return {"w": words.contiguous(), "scales": group_scales(layer)}

    def call(x, w):
        y = x.new_empty(x.shape[0], w["scales"].shape[1])
        torch.ops._C.cpu_gemm_wna16(x, w["w"], y, w["scales"], None, None, 8, "vec")
        return y
    return Contender("vLLM cpu_gemm_wna16", "peer", supports, prepare, call)


def load_vllm_cpu() -> None:
    """Register vLLM's CPU operators where vLLM is installed; without it vllm_cpu().supports says so."""
    try:
        import vllm.platforms
        vllm.platforms.current_platform.import_kernels()
    except ImportError:
        pass


def contenders(device: str) -> list[Contender]:
    """Everything that needs nothing collected or built. The torch reference is left out: it is the oracle, not a contestant."""
    kernels = [ours(kernel) for kernel in KERNELS if kernel.name != "reference"]
    if device == "cuda":
        return [dense("dense bf16", torch.bfloat16), *kernels, tinygemm()]
    return [dense("dense bf16", torch.bfloat16), dense("dense fp32", torch.float32), *kernels, ours_int8(CpuW4A16()),
            torch_int4_cpu(), vllm_cpu()]
