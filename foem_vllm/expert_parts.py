"""What one rank computes of the quantized experts of a layer. vLLM is not imported.

The plugin loads by it; `foem doctor` predicts with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from foem_kernels import Problem

from foem_vllm.errors import FoemError
from foem_vllm.ranks import Share
from foem_vllm.serving import cut_order_groups, expert_groups, share_counts
from foem_vllm.spec import QuantSpec

NO_EXPERTS = "{} ranks cannot share {} experts, some would have none; use a smaller --tensor-parallel-size"


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
    rank: int = 0

    @functools.cached_property
    def share(self) -> Share:
        """Of this rank, of each linear of each expert."""

        def cut(size: int) -> tuple[int, int]:
            return self.rank * size // self.ranks, (self.rank + 1) * size // self.ranks

        outputs = torch.arange(*(0, self.n) if self.rows else cut(self.n), device="cpu")
        return Share(self.n, self.k, outputs, cut(self.k) if self.rows else (0, self.k))

    def problem(self, dtype: torch.dtype, device: str) -> Problem:
        """What a kernel is asked to do, as far as the config says it: columns in activation order that ranks cut are counted on
        average, and what a g_idx does that no config speaks of is unknown."""
        start, stop = self.share.inputs
        if self.spec.desc_act and stop - start < self.k:
            grouping = cut_order_groups(self.spec, self.k, self.ranks)
        else:
            grouping = expert_groups([share_counts(self.spec, start, stop)])
        return self.problem_of(*grouping, self.spec.symmetric, self.spec.desc_act or grouping[1] > stop - start, dtype, device)

    def problem_of(self, size: int, columns: int, symmetric: bool, order: bool, dtype: torch.dtype, device: str) -> Problem:
        """Of columns in groups of `size`; order: they are not the inputs one after the other."""
        n = len(self.linears) * len(self.share.outputs)
        return Problem(n, columns, self.spec.bits, size, symmetric, dtype, device, order)
