"""Device code of triton_solver: imported only when a kernel is launched or compiled, because it imports triton.

Compiled without contraction of a * b + c (enable_fp_fusion=False): `tl.fma` stands where torch rounds once on a GPU (addr),
separate operators where it rounds twice, so that both give the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def _row(row, i, k, columns):
    """What is right of the diagonal in row i of a matrix [columns, columns]: [BLOCK], zero elsewhere and beyond the last row."""
    return tl.load(row + k, mask=(k > i) & (k < columns), other=0.0)


# n_size is not specialized on either: its divisibility would give each thread four neighbouring rows, whose divisions come
# one after the other. So each has one row, a fourth of the columns with 8 rows a program, and two shuffles find a column.
@triton.jit(do_not_specialize=["n_size", "columns", "first", "period"])
def round_columns(w, V, P, points, errors, seen, scales, zeros, groups, target, alpha, beta, n_size, columns, first, period,
                  stride_v, stride_p, MID: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SYMMETRIC: tl.constexpr,
                  PULLS: tl.constexpr, DRIFTS: tl.constexpr):
    """The columns of a block, one after the other, for ROWS rows of the layer: see triton_solver.quantize_block.

    fp32: w, points, errors, seen, target [columns, n]; V, P [columns, columns] with row strides; scales, zeros [groups, n];
    alpha, beta [n]. groups [columns] int32. columns <= BLOCK, a power of 2.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = n < n_size
    k = tl.arange(0, BLOCK)
    # Columns as they stand now: those to the right are corrected whenever one is rounded.
    tile = tl.load(w + k[:, None] * n_size + n[None, :], mask=(k < columns)[:, None] & inside[None, :], other=0.0)
    if PULLS:
        strength = tl.load(beta + n, mask=inside, other=0.0)
    if DRIFTS:
        share = tl.load(alpha + n, mask=inside, other=0.0)

    v_next = _row(V, 0, k, columns)
    if DRIFTS:
        p_next = _row(P, 0, k, columns)
    for i in range(columns):
        here = i * n_size + n
        group = tl.load(groups + i).to(tl.int64) * n_size + n
        scale = tl.load(scales + group, mask=inside, other=1.0)
        v = v_next  # nothing else of a step is known before the last one is over, so its row is fetched meanwhile
        V += stride_v
        v_next = _row(V, i + 1, k, columns)
        column = tl.sum(tl.where((k == i)[:, None], tile, 0.0), 0)
        if PULLS:
            toward = tl.load(target + here, mask=inside, other=0.0)
            if (first + i) % period != 0:
                column -= strength * (column - toward)
        # To the nearest integer, half to even: beside 1.5 * 2**23 no bit below 1 is left. Beyond 2**22 the clamp decides.
        point = tl.div_rn(column, scale) + 12582912.0 - 12582912.0
        if SYMMETRIC:
            point = tl.minimum(tl.maximum(point, -MID), MID - 1)
        else:
            zero = tl.load(zeros + group, mask=inside, other=0.0)
            point = tl.minimum(tl.maximum(point, -zero), 2 * MID - 1 - zero)
        error = tl.fma(-point, scale, column)
        if PULLS:
            error -= strength * (column - toward)
        tl.store(points + here, point, mask=inside)
        tl.store(errors + here, error, mask=inside)
        tile = tl.fma(-v[:, None], error[None, :], tile)
        if DRIFTS:
            p = p_next
            P += stride_p
            p_next = _row(P, i + 1, k, columns)
            drift = column * share
            tl.store(seen + here, drift, mask=inside)
            tile = tl.fma(p[:, None], drift[None, :], tile)
