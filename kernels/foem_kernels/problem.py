"""What a kernel is asked to do, and what it must offer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Problem:
    """One quantized linear `y = x W^T (+ bias)`: W [n, k] of `bits`-bit codes, a scale (and zero) per `group_size` columns.

    group_size: 1 .. k (never -1; one group per row is group_size == k). dtype: of x, y, bias. act_order: columns belong
    to groups by g_idx instead of k // group_size. device: "cpu" or "cuda"; or the architecture of a GPU that need not be here,
    such as "sm_90", which `Kernel.supports` and `Kernel.size` answer for.
    """

    n: int
    k: int
    bits: int
    group_size: int
    symmetric: bool
    dtype: torch.dtype
    device: str
    act_order: bool = False

    @property
    def groups(self) -> int:
        return -(-self.k // self.group_size)

    @property
    def mid(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    @property
    def elsewhere(self) -> bool:
        """Whether the device is named by its architecture, so that what is installed here says nothing about it."""
        return self.device.startswith("sm_")


def gpu_refusal(device: str, least: tuple[int, int] = (8, 0)) -> str | None:
    """None when `device` is an NVIDIA GPU of at least that compute capability, else the reason why not, in one line."""
    if named := re.fullmatch(r"sm_(\d+)(\d)[af]?", device):
        major, minor = map(int, named.groups())
    elif device != "cuda":
        return f"needs a CUDA device, not {device}"
    elif not torch.cuda.is_available() or torch.version.hip:
        return "no NVIDIA GPU is visible"
    else:
        major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) >= least else f"needs compute capability {least[0]}.{least[1]}, found {major}.{minor}"


class Kernel(Protocol):
    """One way to compute the product. Instances hold no state; `prepare`'s result holds all of it."""

    name: str

    def supports(self, p: Problem) -> str | None:
        """None when this kernel computes `p` right, else the reason why not, in one line."""

    def prepare(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, g_idx: torch.Tensor | None, p: Problem
    ) -> dict[str, Any]:
        """This kernel's private layout of codes [n, k] uint8, scales and zeros [n, groups], g_idx [k]; done once, at load."""

    def size(self, p: Problem) -> int:
        """Bytes that this layout takes in memory, of scales that float16 holds."""

    def gemm(self, x: torch.Tensor, weights: dict[str, Any], p: Problem, bias: torch.Tensor | None) -> torch.Tensor:
        """x [m, k] of p.dtype, contiguous, m >= 1 -> [m, n] of p.dtype."""
