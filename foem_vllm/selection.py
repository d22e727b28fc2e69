"""What a layer's calibration text decides about how the layer is solved: alpha, beta, damping, and how far to correct the target.

In-sample loss always rises with beta and damping, so it cannot choose them. The text is divided into folds; what all others
suggest is judged on one, for each of them in turn (cross-validation: with half of the text left out it would ask for too much
shrinkage). The score of Q = W + E is the layer's
true objective on tokens that did not make it, up to a constant:

    |Y_fp - Q X_q|^2 / T = tr(E H E^T) - 2 tr(G E^T) + constant,  H = X_q^T X_q / T,  G = (Y_fp - W X_q)^T X_q / T

G comes from the drift of the inputs, G = W D, or of the residual stream behind the linear (see capture.find_sum).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from foem_vllm.capture import Means
from foem_vllm.format import QuantSpec, dequantize
from foem_vllm.solver import SolverConfig, finish, solve

FOLDS = 4
ROWS = 256  # of a layer are enough to judge three numbers by
CLEAR_GAIN = 0.01  # of GPTQ's layer loss: what is left of less, after it was searched for, is noise at the model's output
FEW_ROWS = 64  # and these for one number, or a yes or no
GRID = {"alpha": (0.0, 0.125, 0.25, 0.5, 1.0), "beta": (0.0, 0.05, 0.1, 0.2), "damping": (0.02, 0.05, 0.1, 0.2)}
PLAIN = {"alpha": 0.0, "beta": 0.0, "damping": 0.05}


@dataclass
class Choice:
    """alpha, beta, damping: chosen. gain: held-out score of GPTQ minus theirs, over GPTQ's layer loss (above 0: better).
    scores: [{alpha, beta, damping, score, error}], score less GPTQ's over the same, error the standard error of that. The layer
    loss is that of rounding, |(Q - target) X_q|^2: the score lacks a constant, so it is no unit where inputs drift."""

    alpha: float
    beta: float
    damping: float
    gain: float = 0.0
    scores: list[dict] = field(default_factory=list)


class Correction(NamedTuple):
    """target: [N, K]. strength: the fitted factor, 0 .. 1, of the full correction G H^-1."""

    target: torch.Tensor
    strength: float


def merge(parts: list[Means]) -> Means:
    """Moments of several parts of the text together."""
    if len(parts) == 1:
        return parts[0]
    tokens = sum(p.tokens for p in parts)

    def mean(name):
        first, *others = (getattr(p, name) for p in parts)
        if first is None:
            return None
        found = first * (parts[0].tokens / tokens)
        for p, other in zip(parts[1:], others):
            found.add_(other, alpha=p.tokens / tokens)
        return found

    return Means(mean("h"), mean("d"), mean("g"), tokens)


def splits(folds: list[Means]) -> list[tuple[list[Means], list[Means]]]:
    """[(what suggests, what judges)]; empty when there is only one fold."""
    if len(folds) < 2:
        return []
    return [(folds[:i] + folds[i + 1 :], [folds[i]]) for i in range(len(folds))]


def drift(W: torch.Tensor, means: Means) -> torch.Tensor | None:
    """G [N, K] of the module's docstring."""
    if means.g is not None:
        return torch.addmm(means.g, W.to(means.h), means.h, alpha=-1)
    return None if means.d is None else W.to(means.d) @ means.d


def spread(n: int, count: int) -> torch.Tensor:
    """Indices of at most `count` of n rows, evenly spread."""
    return torch.linspace(0, n - 1, min(n, count)).round().long()


def of_rows(folds: list[Means], rows: torch.Tensor) -> list[Means]:
    """What the folds say about some rows of a layer."""
    return [f if f.g is None else f._replace(g=f.g[rows]) for f in folds]


def full_correction(W: torch.Tensor, means: Means, damping: float) -> torch.Tensor:
    """G (H + damping mean(diag H) I)^-1 [N, K]: what least squares adds to W so that W X_q comes closest to Y_fp."""
    h = means.h
    # One column can dwarf the rest; a layer that is fed nothing has no correction.
    ridge = (damping * h.diagonal().mean()).clamp(min=torch.finfo(h.dtype).tiny)
    damped = h.clone()
    damped.diagonal().add_(ridge)
    L, info = torch.linalg.cholesky_ex(damped)
    if info != 0:
        return torch.zeros_like(W, dtype=h.dtype)
    return torch.cholesky_solve(drift(W, means).T, L).T


def fit_strength(W: torch.Tensor, folds: list[Means], damping: float) -> tuple[float, torch.Tensor | None]:
    """(how far to correct the target of W [N, K], the full correction of FEW_ROWS of its rows that lacks the last fold).

    Fitted to the folds that did not make the correction C: <G_v, C> / <C H_v, C>, clamped to 0 .. 1 (METHOD: alpha*).
    """
    toward = length = 0.0
    C, rows = None, spread(len(W), FEW_ROWS).to(W.device)
    for suggests, judges in splits(of_rows(folds, rows)):
        C, held = full_correction(W[rows], merge(suggests), damping), merge(judges)
        toward += float((drift(W[rows], held) * C).sum())
        length += float(((C @ held.h) * C).sum())
    return min(max(toward / length, 0.0), 1.0) if length > 0 else 0.0, C


def correct(W: torch.Tensor, folds: list[Means], damping: float, strength: float | None = None) -> Correction:
    """The corrected target W + strength G H^-1 (QEP, arXiv 2504.09629; Qronos, 2505.11695) of W [N, K]; None: fitted."""
    strength = fit_strength(W, folds, damping)[0] if strength is None else strength
    if strength == 0.0 or not folds:
        return Correction(W, 0.0)
    return Correction(W.to(folds[0].h) + strength * full_correction(W, merge(folds), damping), strength)


def score(E: torch.Tensor, W: torch.Tensor, means: Means) -> torch.Tensor:
    """[N] objective of the module's docstring for E = Q - W [N, K], a row each."""
    found = ((E @ means.h) * E).sum(1)
    g = drift(W, means)
    return found if g is None else found - 2 * (g * E).sum(1)


def choose(
    W: torch.Tensor, folds: list[Means], spec: QuantSpec, config: SolverConfig, auto: tuple[str, ...], strength: float = 0.0
) -> Choice:
    """alpha, beta and damping for W [N, K]; those not in `auto` stay as config has them. strength: of the target's correction.

    Every combination in GRID is solved without one fold and scored on it, for each fold. Among those whose score is within
    one standard error (over held-out folds, of the paired difference) of the best, the one closest to plain GPTQ is taken, and
    plain GPTQ itself unless that is better by CLEAR_GAIN and by two standard errors. With fewer than two folds, as when few
    tokens are routed to an expert, nothing is chosen.
    """
    if len(folds) < 2:
        return Choice(config.alpha, config.beta, config.damping)
    axes = [GRID[name] if name in auto else (getattr(config, name),) for name in PLAIN]
    candidates = sorted(itertools.product(*axes), key=lambda c: (sum(a != b for a, b in zip(c, PLAIN.values())), c))
    picked = spread(len(W), ROWS).to(W.device)
    rows, folds = W[picked].to(folds[0].h), of_rows(folds, picked)
    results, losses = {c: [] for c in candidates}, []  # losses: of the first candidate, plain GPTQ
    for suggests, judges in splits(folds):
        means = merge(suggests)
        target = correct(rows, [means], config.damping, strength).target if strength else rows
        for damping in sorted({c[2] for c in candidates}):
            same = [c for c in candidates if c[2] == damping]
            stacked = target.repeat(len(same), 1)
            alpha, beta = (torch.tensor([c[i] for c in same]).to(rows).repeat_interleave(len(rows)) for i in (0, 1))
            solved = solve(
                stacked, means.h, spec, replace(config, damping=damping, alpha=0.0, beta=0.0), means.d,
                alpha=alpha if alpha.any() else None, beta=beta if beta.any() else None,
            )  # fmt: skip
            for c, q in zip(same, dequantize(solved.quantized, spec).to(rows).split(len(rows))):
                results[c] += [float(score(q - rows, rows, j).mean()) for j in judges]
                if c == candidates[0]:
                    losses += [float((((q - target) @ j.h) * (q - target)).sum(1).mean()) for j in judges]
    table = {c: torch.tensor(v, dtype=torch.float64) for c, v in results.items()}
    plain = table[candidates[0]]
    best = min(candidates, key=lambda c: table[c].mean())
    chosen = next(c for c in candidates if (table[c] - table[best]).mean() <= standard_error(table[c] - table[best]))
    unit = torch.tensor(losses, dtype=torch.float64).mean().clamp(min=1e-30)
    gain = plain - table[chosen]
    if gain.mean() < max(CLEAR_GAIN * unit, 2 * standard_error(gain)):
        chosen = candidates[0]
    scores = []
    for c in candidates:
        against = (table[c] - plain) / unit
        scores.append({**dict(zip(PLAIN, c)), "score": float(against.mean()), "error": float(standard_error(against))})
    return Choice(*chosen, gain=float((plain - table[chosen]).mean() / unit), scores=scores)


def descent_helps(
    W: torch.Tensor,
    folds: list[Means],
    spec: QuantSpec,
    config: SolverConfig,
    strength: float = 0.0,
    correction: torch.Tensor | None = None,
) -> bool:
    """Whether coordinate descent on the codes of W [N, K] lowers the score on a fold that it has not seen (the last one).

    Nor have the codes that it starts from: against codes made with that fold, no descent looks good on it. correction: from
    `fit_strength` where that was called with the same damping.
    """
    if len(folds) < 2:
        return False
    rows = spread(len(W), FEW_ROWS).to(W.device)
    W, folds = W[rows].to(folds[0].h), of_rows(folds, rows)
    seen, held = merge(folds[:-1]), folds[-1]
    if strength and correction is None:
        correction = full_correction(W, seen, config.damping)
    target = W + strength * correction if strength else W
    start = solve(W, seen.h, spec, replace(config, descent=False, refit=False), seen.d, target).quantized
    results = (finish(start, spec, target, seen.h, replace(config, descent=descent))[0] for descent in (False, True))
    before, after = (score(dequantize(q, spec).to(W) - W, W, held).sum() for q in results)
    return bool(after < before)


def standard_error(differences: torch.Tensor) -> torch.Tensor:
    return differences.std() / len(differences) ** 0.5 if len(differences) > 1 else torch.tensor(0.0)
