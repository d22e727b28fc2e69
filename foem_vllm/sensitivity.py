"""What each linear loses at each number of bits, measured on calibration text that its codes have not seen.

Behind errors e_o at a linear's outputs the model's loss is expected to grow by 1/2 sum_o g_o^2 e_o^2 a token (the diagonal of the
Fisher matrix, whose g^2 `endtoend.guide` finds), and KL(original || quantized) by as much. With E the error of the solved weights
and H the second moment of the inputs on held-out text that is 1/2 mean(g^2) tr(E H E^T). Every linear is judged by itself, in the
original model: what errors do to each other, and what later linears make up for, is left out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import nn

from foem_vllm import budget, capture, endtoend, experts, models
from foem_vllm.format import dequantize
from foem_vllm.job import Job
from foem_vllm.layers import EXPERT, EXPERT_NAMES
from foem_vllm.selection import FOLDS, ROWS, spread
from foem_vllm.solver import solve
from foem_vllm.spec import BITS, QuantSpec
from foem_vllm.stream import BlockInputs

DOWN = {down for _, _, down in EXPERT_NAMES}


def choose_bits(job: Job, inputs: BlockInputs) -> dict:
    """Give every linear of the job's plan its bits, within the recipe's bits a weight; returns what was chosen, for the report.

    inputs: see `measure`.
    """
    groups = measure(job, inputs)
    choice = budget.choose(groups, job.recipe.bits_per_weight)
    for group, bits in zip(groups, choice.bits):
        job.plan.specs |= {name: replace(job.plan.specs[name], bits=bits) for name in group.names}
    stored = [[re.sub(r"(\.experts)\.\d+\.", r"\1.*.", job.weights.stored_name(name)) for name in g.names] for g in groups]
    return {
        "bits_per_weight": choice.bits_per_weight,
        "expected_kl": choice.loss,
        "one_width": choice.uniform and {"bits": choice.uniform[0], "expected_kl": choice.uniform[1]},
        "groups": [
            {
                "linears": list(dict.fromkeys(names)),
                "weights": group.weights,
                "bits": bits,
                "expected_kl": {str(b): loss for b, loss in group.loss.items()},
            }
            for names, group, bits in zip(stored, groups, choice.bits)
        ],
    }


def measure(job: Job, inputs: BlockInputs) -> list[budget.Group]:
    """The linears of the plan, in groups that are served together, with what every number of bits costs and loses.

    inputs: the calibration text as it enters the first block, in two batches or more; not advanced. Every fourth batch judges
    (the last where there are fewer), the others make codes. One pass over the model, and one back for the batches that judge.
    In memory: moments of all inputs of one block, and what `endtoend.guide` keeps. The output head, and linears that no token
    reaches, keep their bits.
    """
    judge = min(len(inputs.hidden), FOLDS) - 1
    judging = BlockInputs([inputs.hidden[b] for b in range(judge, len(inputs.hidden), FOLDS)], inputs.calls)
    squares = endtoend.guide(job.empty, job.blocks, job.blocks_name, job.weights, judging, job.dtype)
    tokens = sum(h.shape[:-1].numel() for h in judging.hidden)
    stream, found = inputs.fork(), {}
    for index in range(len(job.blocks)):
        block, prefix = job.load(index), job.prefix(index)
        linears = {n: m for n, m in models.find_linears(block).items() if prefix + n in job.plan.specs}
        for stage, moments in fed(index, block, linears, stream):
            members = {n: linears[n] for n in stage}
            rates = {n: sum(float(s.sum()) for s in squares[index].get(n, ())) / tokens for n in stage}
            match = EXPERT.fullmatch(stage[0])
            key = prefix, *((match["block"], match["name"] in DOWN) if match else stage)
            widths = BITS if moments.tokens or match else (job.recipe.spec.bits,)
            one = budget.Group(
                tuple(prefix + n for n in stage),
                sum(m.weight.numel() for m in members.values()),
                {b: sum(budget.stored_bits(spec_of(job, b), *m.weight.shape) for m in members.values()) for b in widths},
                expected(job, members, rates, moments, judge, widths),
            )
            found[key] = found[key] + one if key in found else one
    return [*found.values(), *output_head(job)]


def output_head(job: Job) -> list[budget.Group]:
    """The head, where the plan has it: it keeps its bits, and nothing is expected of its errors."""
    if not job.plan.head:
        return []
    spec, weight = job.plan.specs[job.plan.head], job.empty.get_submodule(job.plan.head).weight
    return [
        budget.Group((job.plan.head,), weight.numel(), {spec.bits: budget.stored_bits(spec, *weight.shape)}, {spec.bits: 0.0})
    ]


def spec_of(job: Job, bits: int) -> QuantSpec:
    return replace(job.recipe.spec, bits=bits)


def fed(
    index: int, block: nn.Module, linears: dict[str, nn.Linear], stream: BlockInputs
) -> Iterator[tuple[list[str], capture.Moments]]:
    """(names of linears that are fed the same, the moments of what that is, in FOLDS parts); then the stream is advanced.

    vLLM fuses only what is fed the same. Linears that no token of the first batch reaches stand alone, perhaps without tokens.
    """
    run = functools.partial(stream.call, index, block)
    batches = range(len(stream.hidden))
    separate = experts.find(block)
    plain = {n: m for n, m in linears.items() if not any(n.startswith(f"{name}.") for name in separate)}
    stages = capture.find_stages(plain, functools.partial(run, 0))
    reached = {n for stage in stages for n in stage}
    stages += [[n] for n in plain if n not in reached]
    sums = [capture.Moments(plain[s[0]].in_features, stream.hidden[0].device, FOLDS) for s in stages]
    for name, module in separate.items():
        calls = experts.recorded_calls(module, run, len(batches))
        for expert, stage in module.stages():
            members = [f"{name}.{n}" for n in stage if f"{name}.{n}" in linears]
            if members:
                yield members, experts.moments_of(module, expert, stage[0], calls, FOLDS)[0]
    for b in batches:
        seen = capture.observe(block, {"", *(s[0] for s in stages)}, functools.partial(run, b))
        stream.hidden[b] = seen.pop("")
        for stage, moments in zip(stages, sums):
            if stage[0] in seen:
                moments.add(b % FOLDS, seen[stage[0]])
    yield from zip(stages, sums)


def expected(
    job: Job,
    linears: dict[str, nn.Linear],
    rates: dict[str, float],
    moments: capture.Moments,
    judge: int,
    widths: Iterable[int],
) -> dict[int, float]:
    """{bits: what linears with the same input are expected to add to the loss together}. rates: name -> mean(g^2).

    At most ROWS rows of each are solved and stand for all.
    """
    seen, held = moments.means([i for i in range(FOLDS) if i != judge], ", ".join(linears)), moments.means([judge])
    rows = {n: m.weight[spread(m.out_features, ROWS).to(m.weight.device)].float() for n, m in linears.items()}
    W = torch.cat(list(rows.values()))
    each = torch.cat([torch.full((len(r),), rates[n] * linears[n].out_features / len(r)) for n, r in rows.items()]).to(W)
    solver = replace(job.recipe.solver, alpha=0.0, descent=False, scale_dtypes=job.scale_dtypes)
    found = {}
    for bits in widths:
        spec = spec_of(job, bits)
        E = dequantize(solve(W, seen.h, spec, solver).quantized, spec).to(W) - W
        found[bits] = 0.5 * float((each * ((E @ held.h) * E).sum(1)).sum())
    return found
