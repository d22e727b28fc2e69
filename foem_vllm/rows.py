"""One matrix: what held-out text chooses for it, then its rows, all at once or some at a time. Rows do not interact."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

from foem_vllm import capture, distributed, selection
from foem_vllm.format import Quantized, QuantSpec, dequantize
from foem_vllm.recipe import Recipe
from foem_vllm.report import LayerResult
from foem_vllm.solver import Solved, SolverConfig, layer_loss, solve

POWER_ROWS = 256  # tell the power of a linear's output closely enough for what errors are compared with


@dataclass(frozen=True)
class Settled:
    """How a matrix is solved: what the recipe says, and what held-out text chose. damping, strength: of its target's correction.
    descent: whether codes are moved once more, None when not asked for."""

    solver: SolverConfig
    damping: float
    strength: float
    choice: selection.Choice | None
    descent: bool | None

    def describe(self, result: LayerResult, damping: float, tokens: int) -> None:
        result.damping, result.tokens, result.correction, result.descent = damping, tokens, self.strength, self.descent
        result.chosen = None if self.choice is None else asdict(self.choice)


def settle(
    W: torch.Tensor, folds: list[capture.Means], spec: QuantSpec, recipe: Recipe, scale_dtypes: tuple[torch.dtype, ...]
) -> Settled:
    """Choose what the recipe leaves open for W [N, K]: a matrix, or rows that stand for a larger one.

    folds: of the text, to judge by; none are needed where the recipe leaves nothing open.
    """
    solver, strength, choice = replace(recipe.solver, scale_dtypes=scale_dtypes), recipe.correct, None
    correction = None
    if strength is None:
        strength, correction = selection.fit_strength(W, folds, solver.damping)
    if recipe.auto:
        choice = selection.choose(W, folds, spec, solver, recipe.auto, strength)
        solver = replace(solver, alpha=choice.alpha, beta=choice.beta, damping=choice.damping)
    if solver.damping != recipe.solver.damping:
        correction = None
    descent = selection.descent_helps(W, folds, spec, solver, strength, correction) if solver.descent else None
    strength, choice, descent, solver = distributed.agreed((strength, choice, descent, solver))
    solver = replace(solver, descent=bool(descent))
    return Settled(solver, recipe.solver.damping, strength, choice, descent)


class SolvedRows(NamedTuple):
    """solved: codes and grid. after: [N, K] what they stand for. losses: [N] squared error of every output, a token."""

    solved: Solved
    after: torch.Tensor
    losses: torch.Tensor


def power(W: torch.Tensor, means: capture.Means) -> float:
    """Mean square of what a linear with weight W [N, K] puts out, over POWER_ROWS of its outputs, evenly spread."""
    some = W[selection.spread(len(W), POWER_ROWS).to(W.device)].to(means.h)
    return layer_loss(some, means.h)


def solve_shared(W: torch.Tensor, means: capture.Means, spec: QuantSpec, settled: Settled) -> SolvedRows:
    """`solve_rows` of the whole matrix, some rows by each process."""
    if distributed.size() == 1:
        return solve_rows(W, means, spec, settled)
    n = len(W)
    mine = torch.arange(n, device=W.device)[distributed.share(n)]
    part = solve_rows(W[mine], selection.of_rows([means], mine)[0], spec, settled)
    solved = part.solved._replace(
        quantized=Quantized(*(t if t is None or t.ndim == 1 else distributed.joined(t, n) for t in part.solved.quantized))
    )
    return SolvedRows(solved, *(distributed.joined(t, n) for t in (part.after, part.losses)))


def solve_rows(W: torch.Tensor, means: capture.Means, spec: QuantSpec, settled: Settled) -> SolvedRows:
    """W: [N, K] float32, any rows of the matrix that was settled."""
    target = selection.correct(W, [means], settled.damping, settled.strength).target
    solved = solve(W, means.h, spec, settled.solver, means.d, target)
    after = dequantize(solved.quantized, spec)
    missed = target - after
    pull = missed @ means.h if solved.pull is None else solved.pull
    return SolvedRows(solved._replace(pull=None), after, (pull * missed).sum(1))
