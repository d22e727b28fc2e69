"""Device code of triton_moe: imported only when a kernel is launched or compiled, because it imports triton.

A pair is one token with one of its top-k experts: pair = token * top_k + j. Five kernels: `sort_pairs` puts the pairs of an
expert side by side, `gather_columns` (activation order only) rearranges x, `grouped` is the product of each expert's pairs
with its weights, `activate` finishes the first product where K was split, `combine` adds up each token's pairs. The tile
arithmetic is that of triton_w4a16_device, where its register layout is explained.
"""
import triton
import triton.language as tl

from foem_kernels.triton_w4a16_device import _dot, _fma, _round, _unpack


@triton.jit
def _expert(topk_ids, expert_map, pair, mask, experts, all_experts, HAS_MAP: tl.constexpr):
    """The expert of `pair` on this rank, int32; -1 where the router or expert_map names none, or none that exists."""
    e = tl.load(topk_ids + pair, mask=mask, other=-1).to(tl.int32)
    if HAS_MAP:
        e = tl.load(expert_map + e, mask=mask & (e >= 0) & (e < all_experts), other=-1).to(tl.int32)
    return tl.where((e >= 0) & (e < experts), e, -1)


@triton.jit(do_not_specialize=["pairs", "blocks"])
def sort_pairs(topk_ids, expert_map, order, block_expert, pairs, blocks, experts, all_experts,
               BINS: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, HAS_MAP: tl.constexpr):
    """Program e writes the blocks of expert e, its pairs in their own order; program `experts` marks those that are left.

    topk_ids [pairs] integers, expert_map [all_experts] integers or None. order int32 [blocks * BLOCK_M]: pairs, and `pairs`
    itself in the rest of an expert's last block. block_expert int32 [blocks]: `experts` where there is nothing to do.
    Each program counts all pairs by itself: nothing is shared, so the order never depends on timing.
    """
    e = tl.program_id(0)
    bins = tl.arange(0, BINS)
    i = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, pairs, CHUNK):
        found = _expert(topk_ids, expert_map, start + i, start + i < pairs, experts, all_experts, HAS_MAP)
        counts += tl.histogram(found, BINS, mask=found >= 0)
    blocks_of = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(bins < e, blocks_of, 0))
    mine = tl.sum(tl.where(bins == e, blocks_of, 0))
    mine = tl.where(e == experts, blocks - first, mine)
    for start in range(0, mine, CHUNK):
        tl.store(block_expert + first + start + i, e, mask=start + i < mine)
    if e < experts:
        if mine > 0:
            seen = 0
            for start in range(0, pairs, CHUNK):
                found = _expert(topk_ids, expert_map, start + i, start + i < pairs, experts, all_experts, HAS_MAP) == e
                rank = seen + tl.cumsum(found.to(tl.int32), 0) - 1
                tl.store(order + first * BLOCK_M + rank, start + i, mask=found)
                seen += tl.sum(found.to(tl.int32))
            rest = seen + tl.arange(0, BLOCK_M)
            tl.store(order + first * BLOCK_M + rest, pairs, mask=rest < mine * BLOCK_M)


@triton.jit
def gather_columns(x, perm, topk_ids, expert_map, y, inputs, k_size, experts, all_experts, PAIRS_PER_ROW: tl.constexpr,
                   BLOCK: tl.constexpr, HAS_MAP: tl.constexpr):
    """y [pairs, k] = columns of x [pairs / PAIRS_PER_ROW, inputs], those that perm int32 [experts, k] names for the pair's
    expert."""
    pair = tl.program_id(0).to(tl.int64)
    e = _expert(topk_ids, expert_map, pair, True, experts, all_experts, HAS_MAP)
    if e >= 0:
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        column = tl.load(perm + e.to(tl.int64) * k_size + k, mask=k < k_size, other=0)
        tl.store(y + pair * k_size + k, tl.load(x + pair // PAIRS_PER_ROW * inputs + column), mask=k < k_size)


@triton.jit
def _gate(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) * up, fp32. gelu_tanh by way of the logistic function: 1 + tanh(a) is 2 / (1 + exp(-2a))."""
    if ACTIVATION == "gelu":
        gate = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        gate = gate / (1 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        tl.static_assert(ACTIVATION == "silu")
        gate = gate / (1 + tl.exp(-gate))
    return gate * up


# Sizes that follow the batch are not specialized on: no batch size may make a server stop to compile.
@triton.jit(do_not_specialize=["pairs", "tiles_per_split", "m_blocks", "n_tiles"])
def grouped(x, w, scales, zeros, pair_weights, order, block_expert, y, pairs, n_size, n_padded, k_size, experts, tiles_per_split,
            m_blocks, n_tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
            GROUP: tl.constexpr, SCALE: tl.constexpr, HAS_ZEROS: tl.constexpr, WEIGHTED: tl.constexpr,
            PAIRS_PER_ROW: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, PLAIN: tl.constexpr):
    """One [BLOCK_N, BLOCK_M] tile of one expert's product with its pairs, over one part of K.

    x [pairs / PAIRS_PER_ROW, k] fp16 or bf16. w [experts, n_padded/64, k/CHUNK, 128, CHUNK/4] uint8. scales
    [experts, k/GROUP, n_padded] fp16 or fp32, zeros the same uint8. order, block_expert: of `sort_pairs`. y, at the pair's own
    row: [pairs, n] of x's dtype, or with SPLIT fp32 [splits, pairs, n]. With ACTIVATION rows 8 .. 15 of each 16 rows of w
    are the up rows of the 8 gate rows before them, and n_size counts results. pair_weights [pairs]: multiplies the product
    (before the activation) if WEIGHTED. GROUP, SCALE: as in triton_w4a16_device.w4a16.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    ROWS: tl.constexpr = BLOCK_N // 64
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK
    BYTES: tl.constexpr = CHUNK // 4
    # Four blocks of pairs together sweep N: where they belong to one expert, its weights are read once for all four.
    pid = tl.program_id(0)
    band = 4 * n_tiles
    first_m = pid // band * 4
    band_m = tl.minimum(m_blocks - first_m, 4)
    pid_m = first_m + pid % band % band_m
    pid_n = pid % band // band_m
    e = tl.load(block_expert + pid_m)
    if e >= experts:
        return
    split = tl.program_id(1)
    tiles = k_size // BLOCK_K
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tiles)
    tl.assume(begin < end)  # as in triton_w4a16_device: keeps several wgmma under way

    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = tl.load(order + pid_m * BLOCK_M + tl.arange(0, BLOCK_M))
    mask_m = (pair < pairs)[None, :]
    k = tl.arange(0, BLOCK_K)
    x_ptr = x + begin * BLOCK_K + ((pair // PAIRS_PER_ROW).to(tl.int64) * k_size)[None, :] + k[:, None]
    r = tl.arange(0, 128 * ROWS * CHUNKS)
    row_block = (e * (n_padded // 64) + pid_n * ROWS + r // 128 % ROWS).to(tl.int64) * (k_size // CHUNK)
    offset = (row_block + begin * CHUNKS + r // (128 * ROWS)) * (32 * CHUNK) + r % 128 * BYTES
    w_ptr = w + offset[:, None] + tl.arange(0, BYTES)[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    PER_GROUP: tl.constexpr = GROUP // BLOCK_K if GROUP > 0 else 1
    g = begin // PER_GROUP if GROUP > 0 else 0
    first_group = e.to(tl.int64) * (tiles // PER_GROUP if GROUP > 0 else 1)
    scales += first_group * n_padded
    s_next = tl.load(scales + g * n_padded + n)
    if HAS_ZEROS:
        zeros += first_group * n_padded
        z_next = tl.load(zeros + g * n_padded + n)
    for tile in range(begin, end):
        s = s_next
        if HAS_ZEROS:
            z = z_next
        if GROUP > 0:
            g = tl.minimum(tile + 1, tiles - 1) // PER_GROUP
            s_next = tl.load(scales + g * n_padded + n)
            if HAS_ZEROS:
                z_next = tl.load(zeros + g * n_padded + n)
        low, high = _unpack(tl.load(w_ptr), DTYPE, PLAIN)
        a = tl.join(low, high).reshape(CHUNKS, 4 * ROWS, 8, 4, CHUNK // 16, 2, 2, 2)
        a = a.permute(1, 5, 2, 0, 4, 7, 3, 6).reshape(BLOCK_N, BLOCK_K)
        MAGIC: tl.constexpr = 128.0 if DTYPE == tl.bfloat16 else 64.0
        if HAS_ZEROS:
            offset_n = (-MAGIC - z.to(tl.float32)).to(DTYPE)[:, None]
        else:
            offset_n = tl.full((1, 1), -MAGIC - 8.0, tl.float32).to(DTYPE)
        a = _fma(a, tl.full((1, 1), 1.0, tl.float32).to(DTYPE), offset_n, PLAIN)
        if SCALE == "before":
            exact = s.to(tl.float32)[:, None]
            main = _round(exact, DTYPE, PLAIN)
            rest = _round(exact - main.to(tl.float32), DTYPE, PLAIN)
            a = _fma(a, main, _fma(a, rest, tl.full((1, 1), -0.0, tl.float32).to(DTYPE), PLAIN), PLAIN)
        xt = tl.load(x_ptr, mask=mask_m, other=0.0)
        if SCALE == "after":
            acc += _dot(a, xt, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PLAIN) * s.to(tl.float32)[:, None]
        else:
            acc = _dot(a, xt, acc, PLAIN)
        x_ptr += BLOCK_K
        w_ptr += CHUNKS * 32 * CHUNK
    if SCALE == "end":
        acc *= s_next.to(tl.float32)[:, None]

    row = pair.to(tl.int64)[None, :] * n_size
    if SPLIT:
        tl.store(y + split.to(tl.int64) * pairs * n_size + row + n[:, None], acc, mask=(n < n_size)[:, None] & mask_m)
    else:
        if WEIGHTED:
            acc *= tl.load(pair_weights + pair, mask=pair < pairs, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION != "":
            # Row bit 3 tells gate from up. In mma's and wgmma's sums it is a register, so both are in one thread.
            gate, up = tl.split(acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
            acc = _gate(gate, up, ACTIVATION).reshape(BLOCK_N // 2, BLOCK_M)
            n = pid_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        tl.store(y + row + n[:, None], _round(acc, DTYPE, PLAIN), mask=(n < n_size)[:, None] & mask_m)


@triton.jit(do_not_specialize=["pairs"])
def activate(partial, pair_weights, y, pairs, n_size, n_padded, SPLITS: tl.constexpr, WEIGHTED: tl.constexpr,
             ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PLAIN: tl.constexpr):
    """y [pairs, n] = activation(gate) * up of the sum, always in the same order, of partial fp32 [SPLITS, pairs, n_padded]."""
    pair = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < n_size
    gate, up = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        row = partial + (pairs.to(tl.int64) * split + pair) * n_padded + n // 8 * 16 + n % 8
        gate += tl.load(row, mask=mask, other=0.0)
        up += tl.load(row + 8, mask=mask, other=0.0)
    if WEIGHTED:
        weight = tl.load(pair_weights + pair).to(tl.float32)
        gate, up = gate * weight, up * weight
    tl.store(y + pair * n_size + n, _round(_gate(gate, up, ACTIVATION), y.dtype.element_ty, PLAIN), mask=mask)


@triton.jit(do_not_specialize=["pairs"])
def combine(partial, pair_weights, topk_ids, expert_map, y, pairs, n_size, experts, all_experts, TOP_K: tl.constexpr,
            SPLITS: tl.constexpr, WEIGHTED: tl.constexpr, HAS_MAP: tl.constexpr, BLOCK: tl.constexpr, PLAIN: tl.constexpr):
    """y [pairs / TOP_K, n]: sum over each token's pairs, then over SPLITS, always in the same order, of partial
    [SPLITS, pairs, n] fp32 or y's dtype, each times its weight if WEIGHTED; pairs without an expert on this rank count zero."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        here = _expert(topk_ids, expert_map, pair, True, experts, all_experts, HAS_MAP) >= 0
        total = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLITS):
            row = partial + (pairs.to(tl.int64) * split + pair) * n_size
            total += tl.load(row + n, mask=n < tl.where(here, n_size, 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            total *= tl.where(here, tl.load(pair_weights + pair).to(tl.float32), 0.0)
        acc += total
    tl.store(y + token * n_size + n, _round(acc, y.dtype.element_ty, PLAIN), mask=n < n_size)
