"""The output head as one more linear: calibrated on what the last norm feeds it in the quantized model, some rows at a time.

It has as many outputs as the vocabulary has tokens, and rows do not interact: what is chosen on held-out text is chosen for some
of them, and what is computed in float32 is never larger than ROWS of them. Scales tuned end to end leave it alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from foem_vllm import capture, distributed, selection
from foem_vllm.endtoend import Head
from foem_vllm.format import Quantized, QuantSpec
from foem_vllm.grid import round_to_nearest
from foem_vllm.job import Job
from foem_vllm.report import LayerResult
from foem_vllm.rows import Settled, power, settle, solve_shared
from foem_vllm.stream import BlockInputs

ROWS = 8192  # solved together


def quantize_head(job: Job, inputs: BlockInputs | None, original: BlockInputs | None) -> tuple[LayerResult, Quantized]:
    """Quantize the head that the plan names. inputs: hidden states that leave the last block of the quantized model, original: of
    the original one; None as in `BlockSolver`."""
    name, spec = job.plan.head, job.plan.specs[job.plan.head]
    weight = job.weights.read(stored_weight(job))
    n, k = weight.shape
    result = LayerResult(job.weights.stored_name(name), n, k, spec.bits, spec.group_size)
    if inputs is None:
        search = job.recipe.grid == "search"
        return result, joined([round_to_nearest(w, spec, job.scale_dtypes, search) for w in pieces(weight, job.device)])
    moments = collect(job, inputs, original)
    some = weight[selection.spread(n, ROWS)].to(job.device, torch.float32)
    means = moments.means(name=result.name)
    folds = moments.folds() if job.recipe.judged else moments.forget()
    settled = settle(some, folds, spec, job.recipe, job.scale_dtypes)
    del some, folds
    return result, solve(weight, means, spec, settled, result, job.device)


def stored_weight(job: Job) -> str:
    """The name of the head's weight; of the embedding's where they are tied and stored once."""
    own = f"{job.plan.head}.weight"
    if own in job.weights.files:
        return own
    embedding = job.empty.get_input_embeddings()
    return next(f"{name}.weight" for name, module in job.empty.named_modules() if module is embedding)


def pieces(weight: torch.Tensor, device: torch.device) -> Iterator[torch.Tensor]:
    """The rows of a weight, ROWS at a time, in float32."""
    return (rows.to(device, torch.float32) for rows in weight.split(ROWS))


def collect(job: Job, inputs: BlockInputs, original: BlockInputs | None) -> capture.Moments:
    """Moments of what feeds the head, and of its drift where there is an original stream."""
    outer, name = Head(job.empty, job.blocks, inputs), job.plan.head

    def fed(hidden: torch.Tensor) -> torch.Tensor:
        return capture.observe(job.empty, {name}, functools.partial(outer, hidden))[name]

    moments = capture.Moments(job.empty.get_submodule(name).in_features, job.device, selection.FOLDS, original is not None)
    for b, hidden in enumerate(inputs.hidden):
        now = fed(hidden)
        fold = distributed.number(b) % selection.FOLDS
        moments.add(fold, now, now, fed(original.hidden[b]) if original else None)
    return moments.gather()


def solve(
    weight: torch.Tensor, means: capture.Means, spec: QuantSpec, settled: Settled, result: LayerResult, device: torch.device
) -> Quantized:
    """Codes and grid of weight [N, K]; what is known of the errors is noted in `result`."""
    found, loss = [], 0.0
    for rows in pieces(weight, device):
        solved, _, losses = solve_shared(rows, means, spec, settled)
        found.append(solved.quantized)
        loss += float(losses.sum())
    settled.describe(result, solved.damping, means.tokens)
    result.notes += solved.notes
    result.loss = loss / len(weight)
    result.relative = result.loss / max(power(weight, means), 1e-30)
    return joined(found)


def joined(parts: list[Quantized]) -> Quantized:
    """Of consecutive rows, whose columns are in the same order."""
    return Quantized(*(None if p[0] is None else p[0] if p[0].ndim == 1 else torch.cat(p).cpu() for p in zip(*parts)))
