"""Gradients through the whole model with one block in memory at a time, and the two things they are used for.

* `guide`: how much each calibration token matters to each linear: the mean squared gradient of the task loss at its output
  (GuidedQuant, arXiv 2505.07004). The label is drawn from the model itself, so that the squares are those of the Fisher matrix.
* `tune_scales`: codes fixed, the scales moved down the gradient of KL(original || quantized) at the logits; kept only if that
  falls on calibration sequences that were not tuned on. The codes have seen those, so this errs on the side of no tuning.

The forward pass keeps what enters every block, and the graph of its operations where there is room for those of all blocks;
otherwise the backward pass runs each block again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from foem_vllm import distributed, models
from foem_vllm.capture import hooks
from foem_vllm.format import Quantized, QuantSpec, dequantize
from foem_vllm.grid import round_scales
from foem_vllm.stream import BlockInputs, Weights, load_block

PIECE = 1024  # tokens that a CPU takes through the whole model and back at once: its caches then hold what operations leave
LOGIT_BYTES = 8 << 20  # of logits that are made at once, but of LOGIT_TOKENS at least
LOGIT_TOKENS = 128
LOGIT_COPIES = 8  # of them at most, while they are worked on
GRAPH_BYTES = 2 << 30  # of what operations keep for their gradients, or of inputs of blocks that are run again
SEQUENCES_A_STEP = 4
HELD_OUT = 8  # one sequence in so many judges and is not tuned on
STEPS = 14  # at most; twice as many gain a third more
LEARNING_RATE = 2e-3  # relative change of a scale a step


class Head:
    """Logits from what leaves the last block: the outer model, with the blocks taken out. inputs: with which they were run."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, inputs: BlockInputs):
        self.model, self.blocks, self.inputs = model, blocks, inputs
        head = model.get_output_embeddings()
        if head is not None and head.weight.is_meta:  # tied
            head.weight = model.get_input_embeddings().weight

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [S, T, width] -> logits [S, T, vocabulary], float32."""
        for block in self.blocks:
            block.forward = lambda *_, **__: (hidden,) if self.inputs.in_tuple else hidden
        try:
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            return self.model(input_ids=tokens, use_cache=False).logits.float()
        finally:
            for block in self.blocks:
                del block.forward

    def pieces(self, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """(which tokens, their hidden states) of hidden [S, T, width], as many at a time as LOGIT_BYTES allow."""
        tokens, step = hidden.shape[:-1].numel(), tokens_at_once(self.model.config)
        if tokens <= step:
            yield slice(None), hidden
        else:
            for i in range(0, tokens, step):
                yield slice(i, i + step), hidden.flatten(0, -2)[None, i : i + step]


def tokens_at_once(config) -> int:
    """For how many tokens float32 logits are made at once."""
    return max(LOGIT_TOKENS, LOGIT_BYTES // (4 * config.get_text_config().vocab_size))


def guide(
    model: nn.Module, blocks: nn.ModuleList, blocks_name: str, weights: Weights, inputs: BlockInputs, dtype: torch.dtype
) -> list[dict[str, list[torch.Tensor]]]:
    """[block][linear][batch] -> [tokens] float32, mean squared gradient of the task loss over the linear's outputs.

    inputs: as they enter the first block; not advanced.
    """
    draws, head = torch.cat(_draws(inputs)), Head(model, blocks, inputs)
    found: list[list[dict[str, list[torch.Tensor]]]] = [[{} for _ in range(len(inputs.hidden))] for _ in blocks]
    device, pieces = inputs.hidden[0].device, pieces_of(inputs)

    def load(index: int) -> nn.Module:
        return load_block(blocks[index], f"{blocks_name}.{index}.", weights, dtype, device)

    def runs(index: int, numbers: list[int]) -> list[Callable]:
        block = loaded[index] if keep else load(index)
        return [functools.partial(_with_squares, index, block, inputs, found[index][b]) for b in numbers]

    batch, first = next(pieces)
    size = graph_bytes(functools.partial(inputs.run, 0, load(0)), first)
    keep = len(blocks) * size <= GRAPH_BYTES
    loaded = [load(index) for index in range(len(blocks))] if keep else None
    chunk = 1 if keep else max(1, GRAPH_BYTES // (len(blocks) * first.nbytes))  # each costs a pass over the model's files
    pieces = itertools.chain([(batch, first)], pieces)
    while some := list(itertools.islice(pieces, chunk)):
        numbers, hidden, segments = [b for b, _ in some], [h for _, h in some], []
        for index in range(len(blocks)):
            segments.append([Segment(run, h, keep) for run, h in zip(runs(index, numbers), hidden)])
            hidden = [s.out for s in segments[-1]]
        gradients = []
        for h in hidden:
            draw, draws = draws.tensor_split([h.shape[:-1].numel()])
            gradients.append(label_gradient(head, h, draw.to(device)))
        for index in reversed(range(len(blocks))):
            again = [None] * len(some) if keep else runs(index, numbers)
            gradients = [s.backward(g, run) for s, g, run in zip(segments.pop(), gradients, again)]
    names = [dict.fromkeys(n for squares in of for n in squares) for of in found]
    none = [torch.empty(0, device=device)]
    return [{n: [torch.cat(squares.get(n, none)) for squares in of] for n in called} for of, called in zip(found, names)]


def pieces_of(inputs: BlockInputs) -> Iterator[tuple[int, torch.Tensor]]:
    """(number of the batch, hidden states of some of its sequences)."""
    for number, hidden in enumerate(inputs.hidden):
        at_once = max(1, PIECE // hidden.shape[1]) if hidden.device.type == "cpu" else len(hidden)
        yield from ((number, piece) for piece in hidden.split(at_once))


def label_gradient(head: Head, hidden: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Gradient at `hidden`, which leaves the last block, of the summed cross-entropy of labels drawn from the model's own
    probabilities. draw: [tokens, 1] uniform numbers."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_(True)
        for which, some in head.pieces(hidden):
            logits = head(some).flatten(0, -2)
            apart = logits.detach().softmax(-1)
            up_to = apart.cumsum(-1)
            label = torch.searchsorted(up_to, draw[which] * up_to[:, -1:]).clamp_(max=up_to.shape[1] - 1)
            del up_to
            logits.backward(apart.scatter_add_(1, label, torch.full_like(draw[which], -1)))  # probabilities less the label's 1
            del logits, apart
    return hidden.grad


def _draws(inputs: BlockInputs) -> list[torch.Tensor]:
    """[tokens, 1] uniform numbers for every batch: the same for a batch whichever process runs it."""
    counts = distributed.gathered([h.shape[:-1].numel() for h in inputs.hidden])
    generator, found = torch.Generator().manual_seed(0), []
    for batch in range(len(counts[0])):
        for process, of in enumerate(counts):
            if batch < len(of):
                numbers = torch.rand(of[batch], 1, generator=generator)
                found += [numbers] if process == distributed.rank() else []
    return found


def _with_squares(
    index: int, block: nn.Module, inputs: BlockInputs, found: dict[str, list[torch.Tensor]], hidden: torch.Tensor
) -> torch.Tensor:
    """Output of the block; in the backward pass the [tokens] of every linear that was reached go to `found`, the batch's."""

    def keep(name: str) -> Callable:
        def hook(module, args, out):
            if out.requires_grad:
                out.register_hook(lambda g: found.setdefault(name, []).append(g.float().square().mean(-1).flatten()))

        return hook

    with hooks(m.register_forward_hook(keep(n)) for n, m in models.find_linears(block).items()):
        return inputs.run(index, block, hidden)


class Segment:
    """One block on one batch: its output, then the gradient at its input from that at its output."""

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, keep: bool):
        """keep: the graph, rather than run again in `backward`."""
        with torch.set_grad_enabled(keep):
            self._in = hidden.detach().requires_grad_(keep)
            self._graph = run(self._in)
        self.out = self._graph.detach()
        if not keep:
            self._graph = None

    def backward(self, gradient: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
        """run: as before; not needed where the graph was kept."""
        self.out = None
        if self._graph is None:
            with torch.enable_grad():
                self._in.requires_grad_(True)
                self._graph = run(self._in)
        self._graph.backward(gradient)
        self._graph = None
        return self._in.grad


def graph_bytes(run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> int:
    """What run(hidden) keeps for its gradient, weights included."""
    sizes: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(hidden.detach().requires_grad_(True))
    return max(1, sum(sizes.values()))


class Tuned(NamedTuple):
    """scales: name -> [N, G] of what was accepted. before, after: KL in nats a token on the held-out sequences."""

    scales: dict[str, torch.Tensor]
    before: float
    after: float


def tune_scales(
    model: nn.Module,
    blocks: nn.ModuleList,
    blocks_name: str,
    weights: Weights,
    inputs: BlockInputs,
    goal: list[torch.Tensor],
    quantized: dict[str, Quantized],
    specs: dict[str, QuantSpec],
    dtype: torch.dtype,
    scale_dtypes: tuple[torch.dtype, ...],
    seed: int = 0,
    step_done: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Scales of `quantized` (full name -> codes and grid) that bring the logits closer to those of the original model.

    inputs: as they enter the first block. goal: batches [S, T, width] that leave the original model's last block. In memory:
    codes at a byte a weight, scales with Adam's two moments, one block of weights, the hidden states of one step.
    """
    device = inputs.hidden[0].device
    head = Head(model, blocks, inputs)
    stack = _Stack(blocks, blocks_name, weights, quantized, specs, dtype, device)
    sequences = [(b, s) for b, h in enumerate(inputs.hidden) for s in range(len(h))]
    held, tuned_on = sequences[::HELD_OUT], [p for i, p in enumerate(sequences) if i % HELD_OUT]
    if not tuned_on:
        return Tuned({n: q.scales for n, q in quantized.items()}, float("nan"), float("nan"))

    def pick(batches: list[torch.Tensor], part: list[tuple[int, int]]) -> torch.Tensor:
        return torch.stack([batches[b][s] for b, s in part])

    def divergence(part: list[tuple[int, int]], hidden: torch.Tensor) -> float:
        """Where hidden wants a gradient it is given that."""
        total = 0.0
        for (_, wanted), (_, some) in zip(head.pieces(pick(goal, part)), head.pieces(hidden)):
            target = head(wanted).log_softmax(-1)
            apart = (target.exp() * (target - head(some).log_softmax(-1))).sum(-1).mean()
            apart = apart * (some.shape[:-1].numel() / hidden.shape[:-1].numel())
            if apart.requires_grad:
                apart.backward()
            total += float(apart.detach())
        return total

    def run(index: int) -> Callable:
        return functools.partial(inputs.run, index, stack.at(index))

    def judge() -> float:
        total = 0.0
        for part in _parts(held):
            hidden = pick(inputs.hidden, part)
            for index in range(len(blocks)):
                hidden = run(index)(hidden)
            total += divergence(part, hidden) * len(part)
        return total / len(held)

    keep = len(blocks) * graph_bytes(run(0), pick(inputs.hidden, tuned_on[:SEQUENCES_A_STEP])) <= GRAPH_BYTES
    before = judge()
    step_done("tuning scales")
    generator = torch.Generator().manual_seed(seed)
    order = [tuned_on[i] for i in torch.randperm(len(tuned_on), generator=generator).tolist()]
    parts = list(_parts(order))[:STEPS]
    for step, part in enumerate(parts):
        hidden, segments = pick(inputs.hidden, part), []
        for index in range(len(blocks)):
            segments.append(Segment(run(index), hidden, keep))
            hidden = segments[-1].out
        with torch.enable_grad():
            hidden = hidden.requires_grad_(True)
            divergence(part, hidden)
        gradient = hidden.grad
        rate = LEARNING_RATE * min(1.0, (step + 1) / 5) * (1 - step / len(parts))
        for index in reversed(range(len(blocks))):
            gradient = segments.pop().backward(gradient, run(index))
            stack.update(index, rate, step + 1)
    tuned = stack.rounded(scale_dtypes)
    stack.use(tuned)
    after = judge()
    if after < before:
        return Tuned(tuned, before, after)
    return Tuned({n: q.scales for n, q in quantized.items()}, before, before)


def _parts(sequences: list) -> Iterator[list]:
    for i in range(0, len(sequences), SEQUENCES_A_STEP):
        yield sequences[i : i + SEQUENCES_A_STEP]


class _Grid(torch.autograd.Function):
    """`dequantize` with scales times factors [N, G], for groups of inputs in their order: it keeps nothing but the codes."""

    @staticmethod
    def forward(ctx, factors: torch.Tensor, q: Quantized, spec: QuantSpec) -> torch.Tensor:
        ctx.q, ctx.spec = q, spec
        return _steps(q, spec).mul_((q.scales.float() * factors)[..., None]).flatten(1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        steps = _steps(ctx.q, ctx.spec)
        return steps.mul_(gradient.view_as(steps)).sum(-1) * ctx.q.scales.float(), None, None


def _steps(q: Quantized, spec: QuantSpec) -> torch.Tensor:
    """[N, G, group] float32: code - zero."""
    steps = q.codes.view(*q.scales.shape, -1).float()
    return steps.sub_(spec.mid if q.zeros is None else q.zeros.float()[..., None])


class _Stack:
    """The quantized model as codes, scales and one relative factor a scale; a block's weights exist only while it is run."""

    def __init__(self, blocks, blocks_name, weights, quantized, specs, dtype, device):
        self.blocks, self.specs, self.dtype = blocks, specs, dtype
        self.names: list[dict[str, str]] = []  # block -> parameter -> full name of its linear
        self.rest: list[dict[str, torch.Tensor]] = []
        self.quantized, self.factors, self.moments = quantized, {}, {}
        for index, template in enumerate(blocks):
            prefix = f"{blocks_name}.{index}."
            names = {f"{n}.weight": prefix + n for n in models.find_linears(template) if prefix + n in quantized}
            self.names.append(names)
            filled = load_block(template, prefix, weights, dtype, device)
            self.rest.append({n: p for n, p in filled.named_parameters() if n not in names})
            self.rest[-1] |= dict(filled.named_buffers())
            for name in names.values():
                factor = torch.ones_like(quantized[name].scales, dtype=torch.float32, device=device)
                self.factors[name] = factor.requires_grad_(True)
                self.moments[name] = (torch.zeros_like(factor), torch.zeros_like(factor))

    def at(self, index: int) -> Callable:
        """Block number `index`, to be called as the block itself."""

        def call(*args, **kwargs):
            parameters = dict(self.rest[index])
            for parameter, name in self.names[index].items():
                q, spec, factors = self.quantized[name], self.specs[name], self.factors[name]
                if q.g_idx is None:
                    weight = _Grid.apply(factors, q, spec)
                else:
                    weight = dequantize(q._replace(scales=q.scales.float() * factors), spec)
                parameters[parameter] = weight.to(self.dtype)
            return functional_call(self.blocks[index], parameters, args, kwargs)

        return call

    def update(self, index: int, rate: float, step: int) -> None:
        """One step of Adam on the factors of a block, whose gradients are then dropped."""
        for name in self.names[index].values():
            factor, (first, second) = self.factors[name], self.moments[name]
            if factor.grad is None:
                continue
            first.lerp_(factor.grad, 0.1)
            second.lerp_(factor.grad.square(), 0.05)
            move = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-12)
            factor.data.sub_(rate * move).clamp_(min=0.1)
            factor.grad = None

    def rounded(self, scale_dtypes: tuple[torch.dtype, ...]) -> dict[str, torch.Tensor]:
        """name -> [N, G] scales, at values that the checkpoint holds exactly."""
        return {
            n: round_scales(self.quantized[n].scales.float() * f.detach(), scale_dtypes).to(self.quantized[n].scales.dtype)
            for n, f in self.factors.items()
        }

    def use(self, scales: dict[str, torch.Tensor]) -> None:
        """Run with these scales, as they will be stored."""
        self.factors = {n: scales[n].float() / self.quantized[n].scales.float() for n in self.factors}
