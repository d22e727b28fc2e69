"""Bits for every linear within a storage budget: what they cost, which together lose least, and rules for them.

What a choice loses is measured by `sensitivity`; here is arithmetic on it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from foem_vllm.errors import FoemError
from foem_vllm.format import stored_shapes
from foem_vllm.layers import FUSED
from foem_vllm.spec import BITS, QuantSpec

CLEAR_GAIN = 0.1  # of the expected loss: within it, what one width everywhere loses is not known to be more
STATES = 1 << 14  # sums that are kept apart; models are built of equal blocks, so there are seldom as many

Linear = tuple[QuantSpec, int, int]  # with outputs and inputs


@dataclass(frozen=True)
class Group:
    """Linears that are served together, hence with the same bits.

    names: in full. weights: how many. stored: {bits: what all tensors of the linears take in the checkpoint, in bits}, of one
    width only where there is nothing to choose. loss: {bits: what they are expected to add to KL(original || quantized), nats}.
    """

    names: tuple[str, ...]
    weights: int
    stored: Mapping[int, int]
    loss: Mapping[int, float]

    def width(self, bits: int) -> int:
        """What the group takes when everything that can takes `bits`."""
        return bits if bits in self.stored else next(iter(self.stored))

    def __add__(self, other: Group) -> Group:
        stored = {bits: size + other.stored[bits] for bits, size in self.stored.items()}
        loss = {bits: value + other.loss[bits] for bits, value in self.loss.items()}
        return Group(self.names + other.names, self.weights + other.weights, stored, loss)


@dataclass(frozen=True)
class Choice:
    """bits: of every group. bits_per_weight: what they take, as `foem inspect` counts. loss: the sum of what is expected of them;
    uniform: (bits, loss) of the widest single width within the budget, None where there is none."""

    bits: tuple[int, ...]
    bits_per_weight: float
    loss: float
    uniform: tuple[int, float] | None


def stored_bits(spec: QuantSpec, n: int, k: int) -> int:
    """What a quantized linear [n, k] takes in the checkpoint: codes, scales in float16, zero points and g_idx."""
    return sum((32 if dtype is torch.int32 else 16) * math.prod(shape) for shape, dtype in stored_shapes(spec, k, n).values())


def check(chosen: Iterable[Linear], fixed: Iterable[Linear], bits_per_weight: float) -> None:
    """FoemError when linears cannot take that many bits a weight on average; fixed: those that keep their spec's bits."""
    chosen, fixed = list(chosen), list(fixed)
    weights = sum(n * k for _, n, k in chosen + fixed)
    rest = sum(stored_bits(*linear) for linear in fixed)
    low, high = ((rest + sum(stored_bits(replace(s, bits=b), n, k) for s, n, k in chosen)) / weights for b in (BITS[0], BITS[-1]))
    if not low <= bits_per_weight <= high:
        low, high = math.ceil(low * 1e4) / 1e4, math.floor(high * 1e4) / 1e4
        raise FoemError(
            f"--bits-per-weight {bits_per_weight:g} is out of reach: these linears take {low:.4f} ({BITS[0]} bits everywhere, "
            f"scales included) to {high:.4f} ({BITS[-1]} bits); give a number between"
        )


def choose(groups: list[Group], bits_per_weight: float) -> Choice:
    """The bits of every group that are expected to lose least within the budget. FoemError when there are none.

    One width everywhere is kept where it fits and nothing else is expected to lose less by CLEAR_GAIN.
    """
    weights = sum(g.weights for g in groups)
    budget = math.floor(bits_per_weight * weights)
    if (fewest := sum(min(g.stored.values()) for g in groups)) > budget:
        raise FoemError(
            f"--bits-per-weight {bits_per_weight:g}: linears that no calibration token reaches keep --bits, so that "
            f"{math.ceil(fewest / weights * 1e4) / 1e4:.4f} is the least; give that, or more --samples"
        )
    uniform = [b for b in BITS if sum(g.stored[g.width(b)] for g in groups) <= budget]
    bits, plain = tuple(least(groups, budget)), None
    if uniform:
        same = tuple(g.width(uniform[-1]) for g in groups)
        plain = uniform[-1], sum(g.loss[b] for g, b in zip(groups, same))
        if sum(g.loss[b] for g, b in zip(groups, bits)) >= (1 - CLEAR_GAIN) * plain[1]:
            bits = same
    stored, loss = (sum(values) for values in zip(*((g.stored[b], g.loss[b]) for g, b in zip(groups, bits))))
    return Choice(bits, stored / weights, loss, plain)


def least(groups: list[Group], budget: int) -> list[int]:
    """The knapsack: bits of every group with the least sum of losses that are stored in `budget` bits.

    Exact: all sums worth keeping are carried from group to group. Where there are more than STATES of them, the best of each
    STATES-th of the budget is.

    >>> a, b = (Group(("a",), 8, {2: 2, 4: 4}, {2: 9.0, 4: 1.0}), Group(("b",), 8, {2: 2, 4: 4}, {2: 3.0, 4: 2.0}))
    >>> least([a, b], 6), least([a, b], 5), least([a, b], 8)
    ([4, 2], [2, 2], [4, 4])
    """
    to_come = list(itertools.accumulate((min(g.stored.values()) for g in reversed(groups)), initial=0))[-2::-1]
    spent, lost, steps = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64), []
    for group, reserved in zip(groups, to_come):
        stored = torch.tensor(list(group.stored.values()))
        loss = torch.tensor([group.loss[b] for b in group.stored], dtype=torch.float64)
        sums, losses = (spent[:, None] + stored).flatten(), (lost[:, None] + loss).flatten()
        keep = worth_keeping(sums, losses, budget - reserved)
        spent, lost = sums[keep], losses[keep]
        steps.append(keep)
    found, state = [], len(spent) - 1
    for group, keep in zip(reversed(groups), reversed(steps)):
        state, width = divmod(int(keep[state]), len(group.stored))
        found.append(list(group.stored)[width])
    return found[::-1]


def worth_keeping(sums: torch.Tensor, losses: torch.Tensor, budget: int) -> torch.Tensor:
    """Indices, in the order of sums [S] int64, of those within the budget that lose less [S] than every smaller one."""
    order = torch.argsort(losses, stable=True)
    order = order[torch.argsort(sums[order], stable=True)]
    order = order[sums[order] <= budget]
    before = torch.cat([torch.full((1,), math.inf, dtype=losses.dtype), losses[order].cummin(0).values[:-1]])
    order = order[losses[order] < before]
    if len(order) > STATES:
        cells = sums[order] * STATES // (budget + 1)
        order = order[torch.cat([cells[1:] != cells[:-1], torch.ones(1, dtype=torch.bool)]) | (torch.arange(len(order)) == 0)]
    return order


def rules(specs: Mapping[str, QuantSpec], base: QuantSpec) -> dict[str, dict]:
    """`dynamic` rules for the linears, by their names in the files, whose bits are not those of `base`.

    A rule for linears of one module and of all layers where they share their bits; experts of a layer are one. It also matches
    the name that vLLM gives to what it fuses, by which vLLM's own GPTQ looks rules up.

    >>> eight, four = QuantSpec(8), QuantSpec(4)
    >>> rules({"h.0.mlp.gate_proj": eight, "h.0.mlp.up_proj": eight, "h.0.o_proj": four, "h.1.o_proj": eight}, four)
    {'h\\\\.0\\\\.mlp\\\\.(gate_proj|up_proj|gate_up_proj)$': {'bits': 8}, 'h\\\\.1\\\\.o_proj$': {'bits': 8}}
    """
    found: dict[str, dict] = {}
    layers: dict[tuple[str, str, str, int], list[str]] = {}  # (before the layer's number, module, linear, bits) -> numbers
    for name, spec in specs.items():
        if spec.bits != base.bits:
            layer = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name)
            if layer is None:  # the output head
                found[re.escape(name) + "$"] = {"bits": spec.bits}
                continue
            start, number, rest = layer.groups()
            module, _, last = rest.rpartition(".")
            module = re.sub(r"(experts)\\\.\d+$", r"\1\\.[0-9]+", re.escape(module))
            numbers = layers.setdefault((start, module, last, spec.bits), [])
            if number not in numbers:
                numbers.append(number)
    kinds: dict[tuple, list[str]] = {}
    for (start, module, last, bits), numbers in layers.items():
        kinds.setdefault((start, tuple(numbers), module, bits), []).append(last)
    for (start, numbers, module, bits), names in kinds.items():
        names = [*names, *(fused for fused, members in FUSED.items() if set(members) <= set(names))]
        parts = [re.escape(start), any_of(numbers), *([module] if module else []), any_of(names)]
        found["\\.".join(parts) + "$"] = {"bits": bits}
    return found


def any_of(words: Iterable[str]) -> str:
    words = list(map(re.escape, words))
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"
