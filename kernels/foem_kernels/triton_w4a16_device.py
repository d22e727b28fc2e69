"""Device code of triton_w4a16: imported only when a kernel is launched or compiled, because it imports triton.

Every step that moves a code from one lane to another happened offline (`triton_w4a16.shuffle`). What remains in the
kernel is elementwise (a byte gives its own two codes) or a permutation of registers within one thread, so the
dequantized tile already lies in the fragment order of the matrix instruction's operand A: bits of (row, column) of a
64 x 64 block, lowest first, are

    row    lane2 lane3 lane4 register warp0 warp1
    column register lane0 lane1 register register register

Left out: tensor descriptors for weights (they spare no instruction), warp specialization and programmatic launch.
"""
import triton
import triton.language as tl

from foem_kernels.triton_w4a16 import unpack_asm

# Integer to float without a conversion instruction: a byte below the exponent byte of 128 (bf16, code in the low mantissa
# bits), of 64 (fp16, code four bits up) or of 1024 (fp16, eight bits) is the number magic + code. The mantissa of bf16 is too
# short for eight bits: those become fp32 numbers 2**23 + code. A byte yields only its own numbers: the order in which Triton
# hands bytes to the four-byte asm is unspecified, so nothing may cross from byte to byte.
_BF16_2 = tl.constexpr(unpack_asm((0, 2, 4, 6), 0x03, 0x43))
_BF16_4 = tl.constexpr(unpack_asm((0, 4), 0x0F, 0x43))
_FP16_2 = tl.constexpr(unpack_asm((-4, -2, 0, 2), 0x30, 0x54))
_FP16_4 = tl.constexpr(unpack_asm((-4, 0), 0xF0, 0x54))
_FP16_8 = tl.constexpr(unpack_asm((0,), 0xFF, 0x64))
_FP32_8 = tl.constexpr(" ".join(f"prmt.b32 ${i}, $4, 0x4B000000, 0x744{i};" for i in range(4)))
# fma is the one packed bf16 operation that sm_80 has too; a * 1 + b and a * b + (-0) round once, like add and mul.
_BF16_FMA = tl.constexpr("fma.rn.bf16x2 $0, $1, $2, $3;")
_FP16_FMA = tl.constexpr("fma.rn.f16x2 $0, $1, $2, $3;")


@triton.jit
def _round(a, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """fp32 -> DTYPE, to nearest, ties to even."""
    if PLAIN and DTYPE == tl.bfloat16:  # the interpreter truncates
        bits = a.to(tl.uint32, bitcast=True)
        bits = tl.where(a == a, bits + 0x7FFF + (bits >> 16 & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return a.to(DTYPE)


@triton.jit
def _unpack(q, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """q uint8 of 4-bit codes -> two tensors of DTYPE, same shape: magic + low code, magic + high code."""
    if PLAIN:
        magic: tl.constexpr = 128 if DTYPE == tl.bfloat16 else 64
        low, high = ((q & 15) + magic).to(tl.float32).to(DTYPE), ((q >> 4) + magic).to(tl.float32).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(_BF16_4, "=r,=r,=r,=r,r", [q], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4)
    else:
        low, high = tl.inline_asm_elementwise(_FP16_4, "=r,=r,=r,=r,r", [q], (tl.float16, tl.float16), is_pure=True, pack=4)
    return low, high


@triton.jit
def _unpack2(q, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """`_unpack` for 2-bit codes: four tensors, the lowest code's first."""
    if PLAIN:
        magic: tl.constexpr = 128 if DTYPE == tl.bfloat16 else 64
        c0, c1 = ((q & 3) + magic).to(tl.float32).to(DTYPE), ((q >> 2 & 3) + magic).to(tl.float32).to(DTYPE)
        c2, c3 = ((q >> 4 & 3) + magic).to(tl.float32).to(DTYPE), ((q >> 6) + magic).to(tl.float32).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(_BF16_2, "=r,=r,=r,=r,=r,=r,=r,=r,r", [q],
                                                   (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4)
    else:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(_FP16_2, "=r,=r,=r,=r,=r,=r,=r,=r,r", [q],
                                                   (tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4)
    return c0, c1, c2, c3


@triton.jit
def _unpack8(q, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """q uint8 -> 1024 + q in fp16, or for bf16 2**23 + q in fp32."""
    if PLAIN:
        a = q.to(tl.float32) + 8388608.0 if DTYPE == tl.bfloat16 else (q.to(tl.float32) + 1024.0).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        a = tl.inline_asm_elementwise(_FP32_8, "=r,=r,=r,=r,r", [q], tl.float32, is_pure=True, pack=4)
    else:
        a = tl.inline_asm_elementwise(_FP16_8, "=r,=r,r", [q], tl.float16, is_pure=True, pack=4)
    return a


@triton.jit
def _tile(q, BITS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
          PLAIN: tl.constexpr):
    """q uint8 [128 * ROWS * CHUNKS, bytes of a chunk] as loaded -> [64 * ROWS, CHUNKS * CHUNK] of magic + code."""
    if BITS == 8:  #                     k_chunk n_warp n_lane k_lane k_register n_register k_half k_pair
        a = _unpack8(q, DTYPE, PLAIN).reshape(CHUNKS, 4 * ROWS, 8, 4, CHUNK // 16, 2, 2, 2)
        a = a.permute(1, 5, 2, 0, 4, 6, 3, 7)
    elif BITS == 2:
        c0, c1, c2, c3 = _unpack2(q, DTYPE, PLAIN)
        a = tl.join(tl.join(c0, c1), tl.join(c2, c3)).reshape(CHUNKS, 4 * ROWS, 8, 4, CHUNK // 16, 2, 2, 2)
        #   k_chunk n_warp n_lane k_lane k_register k_pair k_half n_register
        a = a.permute(1, 7, 2, 0, 4, 6, 3, 5)
    else:
        low, high = _unpack(q, DTYPE, PLAIN)
        a = tl.join(low, high).reshape(CHUNKS, 4 * ROWS, 8, 4, CHUNK // 16, 2, 2, 2)
        #   k_chunk n_warp n_lane k_lane k_register n_register k_pair k_half
        a = a.permute(1, 5, 2, 0, 4, 7, 3, 6)
    return a.reshape(64 * ROWS, CHUNKS * CHUNK)


@triton.jit
def _weights(q, s, z, BITS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, SCALED: tl.constexpr,
             DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """code - zero, or if SCALED scale * (code - zero) rounded once, [64 * ROWS, CHUNKS * CHUNK] of DTYPE.

    q as `_tile` takes it; s fp16 or fp32, z uint8 or None: [64 * ROWS].
    """
    a = _tile(q, BITS, ROWS, CHUNKS, CHUNK, DTYPE, PLAIN)
    WIDE: tl.constexpr = BITS == 8 and DTYPE == tl.bfloat16
    MAGIC: tl.constexpr = 8388608.0 if WIDE else 1024.0 if BITS == 8 else 128.0 if DTYPE == tl.bfloat16 else 64.0
    MID: tl.constexpr = 2 ** (BITS - 1)
    if z is None:
        offset_n = tl.full((1, 1), -MAGIC - MID, tl.float32)
    else:
        offset_n = (-MAGIC - z.to(tl.float32))[:, None]
    if WIDE:  # fp32 until here
        a += offset_n
        if SCALED:
            a *= s.to(tl.float32)[:, None]
        w = _round(a, DTYPE, PLAIN)
    else:
        w = _fma(a, tl.full((1, 1), 1.0, tl.float32).to(DTYPE), offset_n.to(DTYPE), PLAIN)  # exact: small integers
        if SCALED:
            # Two terms, because bf16 holds 8 bits of a scale: the weight is rounded once, as if scaled in fp32.
            exact = s.to(tl.float32)[:, None]
            main = _round(exact, DTYPE, PLAIN)
            rest = _round(exact - main.to(tl.float32), DTYPE, PLAIN)
            w = _fma(w, main, _fma(w, rest, tl.full((1, 1), -0.0, tl.float32).to(DTYPE), PLAIN), PLAIN)
    return w


@triton.jit
def _fma(a, b, c, PLAIN: tl.constexpr):
    """a * b + c, broadcast, in the dtype of the three, which is a packed one."""
    if PLAIN:
        return _round(a.to(tl.float32) * b.to(tl.float32) + c.to(tl.float32), a.dtype, PLAIN)
    asm: tl.constexpr = _BF16_FMA if a.dtype == tl.bfloat16 else _FP16_FMA
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, c], dtype=a.dtype, is_pure=True, pack=2)


@triton.jit
def _dot(a, b, acc, PLAIN: tl.constexpr):
    if PLAIN:  # the interpreter multiplies the bit patterns of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _part(item, x, w, scales, zeros, bias, y, m_size, n_size, n_padded, k_size, k_padded, tiles_per_split, m_tiles, n_tiles,
          BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
          GROUP: tl.constexpr, SCALE: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, TAIL: tl.constexpr,
          SPLIT: tl.constexpr, TMA: tl.constexpr, PLAIN: tl.constexpr):
    """Item `item` of `w4a16`: one [BLOCK_M, BLOCK_N] tile of y over one part of K, all tiles of the first part first."""
    DTYPE: tl.constexpr = x.dtype if TMA else x.dtype.element_ty
    ROWS: tl.constexpr = BLOCK_N // 64
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK
    STORED: tl.constexpr = 4 if BITS == 3 else BITS
    BYTES: tl.constexpr = CHUNK * STORED // 16
    # Four tiles of M together sweep N: x's tiles are the wider ones and stay in L2 while the weights pass by.
    split = item // (m_tiles * n_tiles) if SPLIT else 0
    pid = item % (m_tiles * n_tiles) if SPLIT else item
    band = 4 * n_tiles
    first_m = pid // band * 4
    band_m = tl.minimum(m_tiles - first_m, 4)
    pid_m = first_m + pid % band % band_m
    pid_n = pid % band // band_m
    tiles = tl.cdiv(k_size, BLOCK_K)
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tiles)
    # No part of K is empty. Without the promise the way around the loop makes ptxas wait for each wgmma before the next.
    tl.assume(begin < end)

    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    if not TMA:
        x_ptr = x + begin * BLOCK_K + (m.to(tl.int64) * k_size)[None, :] + k[:, None]
    # Registers, from the lowest: bytes, then 64-row blocks (with 8 warps these are warps), then chunks of K.
    r = tl.arange(0, 128 * ROWS * CHUNKS)
    row_block = (pid_n * ROWS + r // 128 % ROWS).to(tl.int64) * (k_padded // CHUNK)
    offset = (row_block + begin * CHUNKS + r // (128 * ROWS)) * (128 * BYTES) + r % 128 * BYTES
    w_ptr = w + offset[:, None] + tl.arange(0, BYTES)[None, :]
    mask_m = (m < m_size)[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    PER_GROUP: tl.constexpr = GROUP // BLOCK_K if GROUP > 0 else 1
    # Loads of scales feed no matrix operand in the "after" form, so Triton does not pipeline them: fetch one tile ahead.
    g = begin // PER_GROUP if GROUP > 0 else 0
    s_next = tl.load(scales + g * n_padded + n)
    if HAS_ZEROS:
        z_next = tl.load(zeros + g * n_padded + n)
    for tile in range(begin, end):
        s = s_next
        if HAS_ZEROS:
            z = z_next
        else:
            z = None
        if GROUP > 0:
            g = tl.minimum(tile + 1, tiles - 1) // PER_GROUP
            s_next = tl.load(scales + g * n_padded + n)
            if HAS_ZEROS:
                z_next = tl.load(zeros + g * n_padded + n)
        a = _weights(tl.load(w_ptr), s, z, BITS, ROWS, CHUNKS, CHUNK, SCALE == "before", DTYPE, PLAIN)
        if TMA:  # zeros beyond m and k
            xt = x.load([pid_m * BLOCK_M, tile * BLOCK_K]).T
        elif TAIL:
            xt = tl.load(x_ptr, mask=mask_m & (k < k_size - tile * BLOCK_K)[:, None], other=0.0)
        else:
            xt = tl.load(x_ptr, mask=mask_m, other=0.0)
        if SCALE == "after":
            acc += _dot(a, xt, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PLAIN) * s.to(tl.float32)[:, None]
        else:
            acc = _dot(a, xt, acc, PLAIN)
        if not TMA:
            x_ptr += BLOCK_K
        w_ptr += CHUNKS * 128 * BYTES
    if SCALE == "end":
        acc *= s_next.to(tl.float32)[:, None]

    mask = (n < n_size)[:, None] & mask_m
    out = m.to(tl.int64)[None, :] * n_size + n[:, None]
    if SPLIT:
        tl.store(y + split.to(tl.int64) * m_size * n_size + out, acc, mask=mask)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < n_size, other=0.0).to(tl.float32)[:, None]
        tl.store(y + out, _round(acc, DTYPE, PLAIN), mask=mask)


# Sizes that follow the batch are not specialized on: no batch size may make a server stop to compile.
@triton.jit(do_not_specialize=["m_size", "tiles_per_split", "m_tiles", "n_tiles", "items"])
def w4a16(x, w, scales, zeros, bias, y, m_size, n_size, n_padded, k_size, k_padded, tiles_per_split, m_tiles, n_tiles, items,
          BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
          GROUP: tl.constexpr, SCALE: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, TAIL: tl.constexpr,
          SPLIT: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr, PLAIN: tl.constexpr):
    """y = x W^T + bias, or with SPLIT its parts: `items` tiles of y times parts of K, one to a program or, if PERSISTENT,
    every num_programs-th from its own on.

    x [m, k] fp16 or bf16, if TMA a descriptor of it with blocks [BLOCK_M, BLOCK_K]. w [n_padded/64, k_padded/CHUNK, 128, bytes]
    uint8, as `shuffle` stores BITS. scales [k_padded/GROUP, n_padded] fp16 or fp32, zeros the same uint8. bias [n] of x's
    dtype. y [m, n] of x's dtype, or with SPLIT fp32 [splits, m, n], one plane per part.
    GROUP is a multiple of BLOCK_K, 0 for one group per row. SCALE: "after" (the fp32 sum of a tile is scaled), "before" (the
    weight is), "end" (one group). TAIL: k is no multiple of BLOCK_K, the last tile reads zeros for x.
    """
    if PERSISTENT:
        # Flattened: one loop over the rounds of all tiles, so the next tile's loads are under way while one is stored.
        for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=True):
            _part(item, x, w, scales, zeros, bias, y, m_size, n_size, n_padded, k_size, k_padded, tiles_per_split, m_tiles,
                  n_tiles, BITS, BLOCK_M, BLOCK_N, BLOCK_K, CHUNK, GROUP, SCALE, HAS_ZEROS, HAS_BIAS, TAIL, SPLIT, TMA, PLAIN)
    else:
        _part(tl.program_id(0), x, w, scales, zeros, bias, y, m_size, n_size, n_padded, k_size, k_padded, tiles_per_split,
              m_tiles, n_tiles, BITS, BLOCK_M, BLOCK_N, BLOCK_K, CHUNK, GROUP, SCALE, HAS_ZEROS, HAS_BIAS, TAIL, SPLIT, TMA,
              PLAIN)


@triton.jit(do_not_specialize=["m_size"])
def reduce_splits(partial, bias, y, m_size, n_size, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
                  PLAIN: tl.constexpr):
    """y [m, n] = sum over SPLITS, always in the same order, of partial fp32 [SPLITS, m, n], + bias [n]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = m_size.to(tl.int64) * n_size
    mask = i < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(partial + split * size + i, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + i % n_size, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + i, _round(acc, y.dtype.element_ty, PLAIN), mask=mask)
