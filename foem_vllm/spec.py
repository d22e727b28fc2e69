"""What a quantized linear is: how it is quantized, and its codes and grid. No files, no layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from foem_vllm.errors import FoemError

BITS = (2, 3, 4, 8)
ACT_ORDERS = ("none", "full", "group", "static")


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
    return torch.arange(k, dtype=torch.int32) // (k if spec.group_size == -1 else min(spec.group_size, max(k, 1)))
