"""Experts of mixture-of-experts models, linear by linear.

transformers holds the experts of a layer in two 3-D parameters, while checkpoints name the linears of every expert, and whoever
serves them expects those names. `separate` puts a module with a linear each in the place of the fused one, so that all that
knows linears knows experts. Left out, and reported as not quantized: experts with biases, without a gate, with limits on it, or
stored transposed, interleaved or fused (gpt-oss, Llama 4).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from foem_vllm import distributed
from foem_vllm.capture import Moments, hooks, observe
from foem_vllm.errors import FoemError
from foem_vllm.stream import StopForward, Weights

LINEARS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # gate, up and down, as checkpoints name them
Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class SeparateExperts(nn.Module):
    """What transformers' fused experts compute, of linears called `{expert}.{name}`, names: of gate, up and down."""

    def __init__(self, fused: nn.Module, names: tuple[str, str, str]):
        super().__init__()
        self.names, self.act_fn = names, fused.act_fn
        self.count, double, hidden = fused.gate_up_proj.shape
        where = {"bias": False, "device": fused.gate_up_proj.device, "dtype": fused.gate_up_proj.dtype}
        sizes = (hidden, double // 2), (hidden, double // 2), (double // 2, hidden)
        for expert in range(self.count):
            linears = {name: nn.Linear(k, n, **where).requires_grad_(False) for name, (k, n) in zip(names, sizes)}
            self.add_module(str(expert), nn.ModuleDict(linears))

    def one(self, expert: int, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor):
        """(tokens routed to the expert, what it adds to each). hidden_states [T, H]; index, weights [T, k]."""
        token, place = torch.where(index == expert)
        gate, up, down = (self._modules[str(expert)][name] for name in self.names)
        rows = hidden_states[token]
        return token, down(self.act_fn(gate(rows)) * up(rows)) * weights[token, place, None]

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if 0 <= expert < self.count:
                token, out = self.one(expert, hidden_states, top_k_index, top_k_weights)
                total.index_add_(0, token, out.to(total.dtype))
        return total

    def stages(self) -> Iterator[tuple[int, list[str]]]:
        """(expert, names of its linears that share an input), in the order in which they are called."""
        gate, up, down = self.names
        for expert in range(self.count):
            yield expert, [f"{expert}.{gate}", f"{expert}.{up}"]
            yield expert, [f"{expert}.{down}"]


def is_fused(module: nn.Module) -> bool:
    """Whether transformers says of the module that it is what `SeparateExperts` computes."""
    plain = all(getattr(module, name, None) is value for name, value in
                (("has_gate", True), ("has_bias", False), ("is_transposed", False), ("is_concatenated", True)))  # fmt: skip
    gate = getattr(type(module), "_apply_gate", None)
    return plain and getattr(gate, "__name__", "") == "_default_apply_gate" and hasattr(module, "act_fn")


def separate(model: nn.Module, weights: Weights) -> None:
    """Replace fused experts whose linears are stored one by one; `weights` then answers to the model's names of modules.

    Mixtral's files, for instance, say `block_sparse_moe.experts.0.w1` where its model says `mlp.experts.gate_up_proj`.
    """
    for path, module in list(model.named_modules()):
        if not is_fused(module):
            continue
        parent, _, last = path.rpartition(".")
        outer, _, name = parent.rpartition(".")
        pattern = re.compile(rf"{re.escape(outer)}\.(\w+)\.{last}\.0\.(\w+)\.weight")
        found = [match.groups() for match in map(pattern.fullmatch, weights.files) if match]
        stored = {folder for folder, _ in found}
        names = next((names for names in LINEARS if set(names) == {linear for _, linear in found}), None)
        if names is None or len(stored) != 1:
            continue
        setattr(model.get_submodule(parent), last, SeparateExperts(module, names))
        weights.rename(f"{outer}.{stored.pop()}.", f"{outer}.{name}.")


def find(block: nn.Module) -> dict[str, SeparateExperts]:
    """Name in the block -> its separate experts."""
    return {name: m for name, m in block.named_modules() if isinstance(m, SeparateExperts)}


def check_whole(blocks_name: str, blocks: nn.ModuleList, chosen: set[str]) -> None:
    """FoemError when some experts of a layer are to be quantized and others not: none of the engines computes them together."""
    for index, block in enumerate(blocks):
        for name, module in find(block).items():
            linears = [f"{blocks_name}.{index}.{name}.{linear}" for _, stage in module.stages() for linear in stage]
            left = [linear for linear in linears if linear not in chosen]
            if left and len(left) < len(linears):
                other = next(linear for linear in linears if linear in chosen)
                raise FoemError(
                    f"{left[0]} would stay as it is and {other} be quantized, but the experts of a layer are computed together; "
                    "let --exclude match all of them or none"
                )


def exclusion_rules(names: Iterable[str]) -> dict[str, dict]:
    """`dynamic` rules that exclude these modules, one for all experts of a layer."""
    expert = re.compile(r"(experts\\\.)\d+(\\\.)")  # as re.escape writes it
    patterns = [expert.sub(r"\1[0-9]+\2", re.escape(name)) for name in names]
    return {f"-:{pattern}$": {} for pattern in patterns}


def recorded_calls(module: SeparateExperts, run: Callable[[int], object], batches: int) -> list[Call]:
    """(hidden states, index, weights) with which `run(batch)` calls the experts, batch by batch; the runs are cut short there."""
    calls: list[Call] = []

    def hook(_, args, kwargs):
        calls.append(tuple(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values()))
        raise StopForward

    with hooks([module.register_forward_pre_hook(hook, with_kwargs=True)]):
        for batch in range(batches):
            try:
                run(batch)
            except StopForward:
                pass
    return calls


def moments_of(
    module: SeparateExperts,
    expert: int,
    linear: str,
    calls: list[Call],
    folds: int,
    untouched: SeparateExperts | None = None,
    original: list[torch.Tensor] | None = None,
) -> tuple[Moments, int]:
    """(moments of what feeds `linear` of the expert, how many tokens were routed to it).

    untouched, original: the same experts in the original model and the hidden states that they got there; the drift is then that
    of the same tokens, whatever the original router made of them. An expert with fewer tokens T than it has inputs K is shown
    all tokens too, weighted as K - T: its second moment is shrunk towards what it would be fed by the layer's mean token.
    """
    k = module.get_submodule(linear).in_features
    tokens = round(distributed.total(sum(int((index == expert).sum()) for _, index, _ in calls)))
    parts = [(b, slice(None), None) for b in range(len(calls))]
    share, extra = 1.0, 0.0
    if tokens < k:
        everything = round(distributed.total(sum(len(hidden) for hidden, _, _ in calls)))
        step = max(1, everything // (4 * k))
        thinned = round(distributed.total(sum(len(hidden[::step]) for hidden, _, _ in calls)))
        share = (tokens + thinned) / k  # so that the mean is (T of the routed + (K - T) of the others) / K
        extra = share * (k - tokens) / thinned
        parts += [(b, slice(None, None, step), expert) for b in range(len(calls))]
    moments = Moments(k, calls[0][0].device, folds, cross=original is not None)
    for b, rows, everyone in parts:
        hidden, index, weights = (t[rows] for t in calls[b])
        if everyone is not None:
            index, weights = torch.full_like(index[:, :1], expert), torch.ones_like(weights[:, :1])
        if not bool((index == expert).any()):
            continue
        now = observe(module, {linear}, lambda h=hidden, i=index, w=weights: module.one(expert, h, i, w))[linear]
        then = None
        if original is not None:
            before = original[b][rows]
            then = observe(untouched, {linear}, lambda h=before, i=index, w=weights: untouched.one(expert, h, i, w))[linear]
        counts = None if extra == 0 else torch.full((len(now),), share if everyone is None else extra, device=now.device)
        moments.add(distributed.number(b) % folds, now, now, then, counts)
    return moments.gather(), tokens


def coverage(tokens: dict[str, int]) -> dict[str, list[int]]:
    """{module of experts: tokens that were routed to each}, from {linear: tokens} of all linears; empty without any tokens."""
    table: dict[str, dict[int, int]] = {}
    for name, count in tokens.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.\w+", name):
            table.setdefault(match[1], {})[int(match[2])] = count
    return {name: [counts[expert] for expert in sorted(counts)] for name, counts in table.items() if any(counts.values())}
