"""What one rank computes of the quantized experts of a layer, and which it cannot. vLLM is not imported.

The plugin loads by it and refuses with it; `foem doctor` predicts with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from foem_kernels import Problem

from foem_vllm.errors import FoemError
from foem_vllm.format import QuantSpec, group_index

REMEDY = "use --enable-expert-parallel or a smaller --tensor-parallel-size"


def expert_specs(
    prefix: str, experts: int, names: tuple[str, str, str], spec_for: Callable[[str], QuantSpec | None]
) -> tuple[QuantSpec, QuantSpec] | None:
    """(spec of all gate and up linears, of all down linears) of the experts in vLLM's module `prefix`; None when unquantized.

    names: of gate, up and down. spec_for: of a module `{prefix}.{expert}.{name}`.
    Raises FoemError naming two modules that differ, since one kernel call computes them all.
    """
    gate, up, down = ([f"{prefix}.{expert}.{name}" for expert in range(experts)] for name in names)
    specs = {module: spec_for(module) for module in (*gate, *up, *down)}
    bare = [module for module, spec in specs.items() if spec is None]
    if len(bare) == len(specs):
        return None
    kinds = [[next(m for m in specs if m not in bare), bare[0]]] if bare else [gate + up, down]
    for first, *others in kinds:
        for other in others:
            if specs[other] != specs[first]:
                raise FoemError(
                    f"{prefix}: vLLM computes all experts of a layer together, but the checkpoint quantizes them differently "
                    f"({first} is {_say(specs[first])}, {other} {_say(specs[other])}); quantize again with one setting for all"
                )
    return specs[gate[0]], specs[down[0]]


def _say(spec: QuantSpec | None) -> str:
    if spec is None:
        return "unquantized"
    order = " desc_act" if spec.desc_act else ""
    return f"{spec.bits}-bit group {spec.group_size} {'sym' if spec.symmetric else 'asym'}{order}"


@dataclass(frozen=True)
class Part:
    """One linear of every expert. linears: (vLLM's name of a shard, the checkpoint's of its linear). k, n: input and output size
    of each in the checkpoint; ranks: how many share its outputs (or, with `rows`, its inputs), and rank: which this one is."""

    stem: str
    linears: tuple[tuple[str, str], ...]
    spec: QuantSpec
    k: int
    n: int
    rows: bool
    ranks: int
    rank: int

    @property
    def k_rank(self) -> int:
        return self.k // self.ranks if self.rows else self.k

    @property
    def n_rank(self) -> int:
        return self.n if self.rows else self.n // self.ranks

    @property
    def spec_rank(self) -> QuantSpec:
        """The spec of this rank's part: where ranks cut through groups, groups are as large as still fits."""
        size = self.spec.group_size
        return self.spec if size == -1 or not self.rows else replace(self.spec, group_size=math.gcd(size, self.k_rank))

    def problem(self, dtype: torch.dtype, device: str) -> Problem:
        spec, k = self.spec_rank, self.k_rank
        size = k if spec.group_size == -1 else spec.group_size
        return Problem(len(self.linears) * self.n_rank, k, spec.bits, size, spec.symmetric, dtype, device, spec.desc_act)

    def check(self, where: str) -> None:
        """Refuse sizes whose packed words would be cut in the middle, and orders of columns that cannot be cut at all."""
        if self.ranks == 1:
            return
        if self.rows and self.spec.desc_act:
            raise FoemError(
                f"{where}: activation order (desc_act) spreads the groups of {self.linears[0][1]} over all {self.k} inputs, "
                f"which cannot be split over ranks; {REMEDY}"
            )
        size = self.k_rank if self.rows else self.n_rank
        if size * self.spec.bits % 32:
            raise FoemError(
                f"{where}: {size} {'inputs' if self.rows else 'outputs'} of {self.linears[0][1]} per rank are no whole words of "
                f"{self.spec.bits}-bit codes; {REMEDY}"
            )

    def slice(self, key: str, loaded: torch.Tensor, where: str) -> torch.Tensor:
        """This rank's part of a stored tensor of one expert's linear. Raises FoemError where an activation order is cut."""
        bits, k, n = self.spec.bits, self.k_rank, self.n_rank
        if self.ranks == 1 or (key == "g_idx" and not self.rows):
            return loaded
        if not self.rows:
            width = n * bits // 32 if key == "qzeros" else n
            return loaded[:, self.rank * width : (self.rank + 1) * width]
        if key == "qweight":
            words = k * bits // 32
            return loaded[self.rank * words : (self.rank + 1) * words]
        if key == "g_idx":
            if not torch.equal(loaded, group_index(self.k, self.spec).to(loaded.device)):
                raise FoemError(f"{where}: columns in activation order cannot be split over ranks; {REMEDY}")
            return group_index(k, self.spec_rank)
        size = k if self.spec.group_size == -1 else self.spec_rank.group_size
        first = self.rank * k + torch.arange(0, k, size)  # columns; the groups of this rank begin there
        return loaded[first // (self.k if self.spec.group_size == -1 else self.spec.group_size)]
