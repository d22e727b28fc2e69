"""One loop for GPTQ (arXiv 2210.17323), GPTAQ (2504.02692) and FOEM (2507.11017): pure functions on tensors.

The layer has weight W0 [N, K]; its inputs are X_fp in the original model and X_q in the model whose earlier layers are
already quantized, [T, K]. With H = X_q^T X_q / T, D = (X_fp - X_q)^T X_q / T and U the upper Cholesky factor of the damped
H^-1 (H^-1 = U^T U), columns are rounded from left to right and each rounding error is spread over the columns to its right:

    w      <- w - beta (w - t)                        first-order pull toward the target t (FOEM, sec. 4, eq. 19)
    q      =  nearest grid point of w
    W[j:]  <- W[j:] - ((w - q) - beta (w - t)) / U_jj * U[j, j:]      compensation
    W[j:]  <- W[j:] + w P[j, j:],  P = alpha triu(D U^T, 1) U          drift of the inputs (GPTAQ, sec. 4)

alpha = beta = 0 is GPTQ. Where a group begins, its grid is found from weights that have seen every update of earlier columns
and not yet the pull. Two forms of FOEM:

* "published": what GPTQModel and the authors' released numbers compute: t is W0, and the first column of every 128 is not
  pulled (their pull acts inside one block only). Eq. 19 read literally would pull all remaining columns at every step.
* "consistent": every column but the first is pulled, toward the corrected target W0 + alpha W0 D H^-1.

Neither depends on `block_size`, which only says how many columns are updated together. alpha, beta and damping are chosen on
held-out tokens by `selection`, which also makes the corrected target that `solve` can be given in place of W0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from foem_kernels.solver import pick

from foem_vllm.descent import descend
from foem_vllm.errors import FoemError
from foem_vllm.format import Quantized, QuantSpec
from foem_vllm.grid import GRIDS, SCALE_DTYPES, find_grid, refit_scales

PUBLISHED_BLOCK = 128
MAX_DAMPING = 1.0
DIRECT_INVERSE = 128  # columns; more are halved


@dataclass(frozen=True)
class SolverConfig:
    """alpha, beta: see the module. damping: fraction of H's mean diagonal added to it; raised tenfold, up to 1, while
    the factorization fails; then the diagonal of H is used alone. grid: "minmax", or "search" weighted by the diagonal of
    H. refit: scales once more in closed form when all codes are known. descent: codes
    once more, one step at a time. block_size: columns updated together (speed only)."""

    alpha: float = 0.0
    beta: float = 0.0
    damping: float = 0.05
    form: str = "published"
    grid: str = "minmax"
    refit: bool = False
    descent: bool = False
    block_size: int = 128
    scale_dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES

    def __post_init__(self):
        if self.form not in ("published", "consistent"):
            raise FoemError(f"form={self.form!r} is unknown; choose published or consistent")
        if self.grid not in GRIDS:
            raise FoemError(f"grid={self.grid!r} is unknown; choose one of {', '.join(GRIDS)}")
        for name in ("alpha", "beta", "damping"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise FoemError(f"{name}={value} must lie between 0 and 1")
        if self.block_size < 1:
            raise FoemError(f"block_size={self.block_size} must be at least 1")


class Solved(NamedTuple):
    """quantized: codes and grid. damping: the fraction that was used in the end. notes: what did not go as asked. pull:
    (target - Q) H [N, K] where that is known."""

    quantized: Quantized
    damping: float
    notes: tuple[str, ...] = ()
    pull: torch.Tensor | None = None


def is_finite(t: torch.Tensor) -> bool:
    """Whether t holds neither NaN nor Inf. A finite sum says so, since it has none among its terms; only where it is not, which
    may be an overflow, are elements asked one by one: on a CPU that takes twenty times as long."""
    return bool(torch.isfinite(t.sum()) or torch.isfinite(t).all())


def factor(H: torch.Tensor, damping: float) -> tuple[torch.Tensor, float, tuple[str, ...]]:
    """(U [K, K] upper with (H + damping mean(diag H) I)^-1 = U^T U, the damping used, notes). Never fails, never NaN.

    One Cholesky of the reversed matrix and one triangular inverse: H = R R^T with R upper gives U = R^-1, without forming H^-1.
    """
    diagonal = H.diagonal()
    unit = diagonal.mean()
    tried = damping
    while tried <= MAX_DAMPING:
        damped = H.flip(0, 1)
        damped.diagonal().add_(tried * unit)
        L, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            U = upper_inverse(L.flip(0, 1))
            if is_finite(U):
                notes = (
                    () if tried == damping else (f"damping raised from {damping:g} to {tried:g}: H was not positive definite",)
                )
                return U, tried, notes
        tried = math.inf if tried == MAX_DAMPING else min(max(10 * tried, 1e-4), MAX_DAMPING)
    U = (diagonal + damping * unit).clamp(min=torch.finfo(H.dtype).tiny).rsqrt().diag()
    return U, damping, ("H could not be factored at any damping up to 1: its diagonal was used alone",)


def upper_inverse(R: torch.Tensor) -> torch.Tensor:
    """R^-1 [K, K] of an upper triangular R. Half by half, so that most of it is products of matrices: on CPUs a third of the time
    of solving for the identity's columns, and as exact."""
    k = len(R)
    if k <= DIRECT_INVERSE:
        return torch.linalg.solve_triangular(R, torch.eye(k, dtype=R.dtype, device=R.device), upper=True)
    half, inverse = k // 2, torch.zeros_like(R)
    first, last = slice(0, half), slice(half, k)
    inverse[first, first], inverse[last, last] = upper_inverse(R[first, first]), upper_inverse(R[last, last])
    inverse[first, last] = -(inverse[first, first] @ (R[first, last] @ inverse[last, last]))
    return inverse


def visit_order(diagonal: torch.Tensor, spec: QuantSpec) -> torch.Tensor | None:
    """[K] the order in which columns are rounded, most important (largest H_jj) first; None for left to right.

    "group" (GAR, as in GPTQModel): groups by their most important column, columns inside each by their own, so that groups
    stay contiguous.
    """
    if spec.act_order == "none":
        return None
    if spec.act_order != "group" or spec.group_size == -1:
        return torch.argsort(diagonal, descending=True, stable=True)
    grouped = diagonal.view(-1, spec.group_size)
    inside = torch.argsort(grouped, dim=1, descending=True, stable=True)
    inside = inside + spec.group_size * torch.arange(len(grouped), device=diagonal.device)[:, None]
    return inside[torch.argsort(grouped.amax(1), descending=True, stable=True)].flatten()


def blocks(k: int, group: int, block_size: int) -> list[tuple[int, int]]:
    """Column ranges such that every group that begins inside a range also ends there, or begins with it."""
    step = group * max(1, block_size // group) if group < block_size else block_size
    ranges = []
    for begin in range(0, k, max(group, step)):
        end = min(k, begin + max(group, step))
        ranges += [(i, min(i + step, end)) for i in range(begin, end, step)]
    return ranges


def solve(
    W: torch.Tensor,
    H: torch.Tensor,
    spec: QuantSpec,
    config: SolverConfig = SolverConfig(),  # noqa: B008 (frozen)
    D: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> Solved:
    """Quantize one linear (or several with the same inputs, stacked along N: rows do not interact).

    W: [N, K]. H: [K, K], whose dtype the computation is done in. D: [K, K], needed when alpha > 0. target: [N, K] what Q shall
    come close to, W when None. alpha, beta: [N], one value a row instead of config's. Nothing is mutated. Columns that no input
    reaches (H_jj = 0) are rounded to nearest. Raises FoemError when K is not a multiple of the group size, or when W, H, D or
    target is not finite.
    """
    n, k = W.shape
    group = k if spec.group_size == -1 else spec.group_size
    if k % group:
        raise FoemError(f"{k} columns are not a multiple of group_size {group}; choose a group size that divides {k}, or -1")
    alpha, beta = config.alpha if alpha is None else alpha.to(H), config.beta if beta is None else beta.to(H)
    drifts, pulls = (isinstance(v, torch.Tensor) or v > 0 for v in (alpha, beta))
    if drifts and D is None:
        raise FoemError("alpha > 0 needs the cross moment D of original and quantized inputs")
    for name, t in (("weights", W), ("H", H), ("D", D), ("target", target)):
        if t is not None and not is_finite(t):
            raise FoemError(f"{name}: NaN or Inf found")

    dtype, device = H.dtype, H.device
    W0 = aim = (W if target is None else target).to(device, dtype)
    dead = H.diagonal() == 0
    H1 = H + torch.diag(dead.to(dtype))
    order = visit_order(H1.diagonal(), spec)
    if order is not None:
        W0, H1 = W0[:, order], H1[order][:, order]
        D = D[order][:, order] if D is not None else None
    U, damping, notes = factor(H1, config.damping)
    P = ((D.to(dtype) @ U.T).triu(1) @ U).contiguous() if drifts else None

    # Columns of W are rows here, so that each is contiguous.
    w, target = W0.T.contiguous().clone(), W0.T.contiguous()
    if drifts and pulls and config.form == "consistent":
        target = target + alpha * (((W0 @ D.to(dtype)) @ U.T) @ U).T
    unpulled = PUBLISHED_BLOCK if config.form == "published" else k
    static, search = spec.act_order == "static", config.grid == "search"
    scales = torch.empty(k // group, n, dtype=dtype, device=device)
    zeros = torch.empty_like(scales)
    if static:
        grid = find_grid(aim.view(n, -1, group), spec, config.scale_dtypes, search, H.diagonal().view(-1, group))
        scales, zeros = grid[0].T.contiguous(), grid[1].T.contiguous()
    column_group = ((order if static and order is not None else torch.arange(k, device=device)) // group).int()
    points = torch.empty_like(w)  # codes - zero
    # Where a group's grid is found from weights that have seen all updates, a block must not go beyond the group.
    width = config.block_size if static else min(config.block_size, group)
    V, quantize_block = (U / U.diagonal()[:, None]).contiguous(), pick(device, dtype, width)
    for begin, end in blocks(k, group, width):
        block = slice(begin, end)
        if not static and begin % group == 0:
            g, importance = begin // group, H1.diagonal()[begin : begin + group]
            scales[g], zeros[g] = find_grid(w[begin : begin + group].T, spec, config.scale_dtypes, search, importance)
        errors = torch.empty_like(w[block])
        seen = torch.empty_like(errors) if drifts else None
        quantize_block(
            w[block], V[block, block], points[block], errors, scales, None if spec.symmetric else zeros, column_group[block],
            spec.bits, beta=beta, target=target[block] if pulls else None, first=begin, unpulled=unpulled,
            P=P[block, block] if drifts else None, alpha=alpha, seen=seen,
        )  # fmt: skip
        w[end:].addmm_(V[block, end:].T, errors, alpha=-1)
        if drifts:
            w[end:].addmm_(P[block, end:].T, seen)

    g_idx = None
    if order is not None:
        back = torch.argsort(order)
        points = points[back]
        if spec.act_order == "group" and group != k:
            place = torch.argsort(order[::group] // group)
            scales, zeros = scales[place], zeros[place]
        elif spec.act_order == "full" and group != k:
            g_idx = (back // group).to(torch.int32)
    group_of = torch.arange(k, device=device) // group if g_idx is None else g_idx.long()
    codes = points.add_(spec.mid if spec.symmetric else zeros[group_of])
    quantized = Quantized(
        codes.T.to(torch.uint8, memory_format=torch.contiguous_format),
        scales.T.contiguous(),
        None if spec.symmetric else zeros.T.contiguous().to(torch.uint8),
        g_idx,
    )
    quantized, pull = finish(quantized, spec, aim, H, config)
    return Solved(quantized, damping, notes, pull)


def finish(
    q: Quantized, spec: QuantSpec, target: torch.Tensor, H: torch.Tensor, config: SolverConfig
) -> tuple[Quantized, torch.Tensor | None]:
    """(q after what config has in store for codes that are all known, (target - Q) H of it where known): descent, then refit."""
    if config.descent:
        q, _ = descend(q, spec, target, H)
    return refit_scales(q, spec, target, H, config.scale_dtypes) if config.refit else (q, None)


def layer_loss(delta: torch.Tensor, H: torch.Tensor) -> float:
    """tr(delta H delta^T) / N: mean squared error of an output, per token and row, for inputs with moment H."""
    return float(((delta @ H) * delta).sum() / delta.shape[0])
