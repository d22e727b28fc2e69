"""Device code of triton_w4a16: imported only when a kernel is launched or compiled, because it imports triton.

Every step that moves a code from one lane to another happened offline (`triton_w4a16.shuffle`). What remains in the
kernel is elementwise (a byte gives its own two codes) or a permutation of registers within one thread, so the
dequantized tile already lies in the fragment order of the matrix instruction's operand A: bits of (row, column) of a
64 x 64 block, lowest first, are

    row    lane2 lane3 lane4 register warp0 warp1
    column register lane0 lane1 register register register

Left out: tensor descriptors, warp specialization and programmatic launch; each needs a GPU to be judged.
"""
import triton
import triton.language as tl

# Integer to float without a conversion instruction: a byte below the exponent byte of 128 (bf16, code in the low mantissa
# bits) or of 64 (fp16, code four bits up) is the number 128 + code or 64 + code. A byte yields only its own two numbers:
# the order in which Triton hands bytes to the four-byte asm is unspecified, so nothing may cross from byte to byte.
_BF16_BITS = tl.constexpr("""{ .reg .b32 t, u;
  and.b32 t, $4, 0x0F0F0F0F; shr.b32 u, $4, 4; and.b32 u, u, 0x0F0F0F0F;
  prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342;
  prmt.b32 $2, u, 0x43434343, 0x4140; prmt.b32 $3, u, 0x43434343, 0x4342; }""")
_FP16_BITS = tl.constexpr("""{ .reg .b32 t, u;
  shl.b32 t, $4, 4; and.b32 t, t, 0xF0F0F0F0; and.b32 u, $4, 0xF0F0F0F0;
  prmt.b32 $0, t, 0x54545454, 0x4140; prmt.b32 $1, t, 0x54545454, 0x4342;
  prmt.b32 $2, u, 0x54545454, 0x4140; prmt.b32 $3, u, 0x54545454, 0x4342; }""")
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
    """q uint8 -> two tensors of DTYPE, same shape: magic + low code, magic + high code; magic 128 (bf16) or 64 (fp16)."""
    if PLAIN:
        magic: tl.constexpr = 128 if DTYPE == tl.bfloat16 else 64
        low, high = ((q & 15) + magic).to(tl.float32).to(DTYPE), ((q >> 4) + magic).to(tl.float32).to(DTYPE)
    elif DTYPE == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(_BF16_BITS, "=r,=r,=r,=r,r", [q], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4)
    else:
        low, high = tl.inline_asm_elementwise(_FP16_BITS, "=r,=r,=r,=r,r", [q], (tl.float16, tl.float16), is_pure=True, pack=4)
    return low, high


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


# Sizes that follow the batch are not specialized on: no batch size may make a server stop to compile.
@triton.jit(do_not_specialize=["m_size", "tiles_per_split", "m_tiles", "n_tiles"])
def w4a16(x, w, scales, zeros, bias, y, m_size, n_size, n_padded, k_size, tiles_per_split, m_tiles, n_tiles,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
          GROUP: tl.constexpr, SCALE: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
          SPLIT: tl.constexpr, PLAIN: tl.constexpr):
    """One [BLOCK_M, BLOCK_N] tile of y over one part of K.

    x [m, k] fp16 or bf16. w [n_padded/64, k/CHUNK, 128, CHUNK/4] uint8. scales [k/GROUP, n_padded] fp16 or fp32, zeros the
    same uint8. bias [n] of x's dtype. y [m, n] of x's dtype, or with SPLIT fp32 [splits, m, n], one plane per part.
    GROUP is a multiple of BLOCK_K, 0 for one group per row. SCALE: "after" (each group's fp32 sum is scaled, BLOCK_K ==
    GROUP), "before" (the weight is), "end" (one group).
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    ROWS: tl.constexpr = BLOCK_N // 64
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK
    BYTES: tl.constexpr = CHUNK // 4
    # Four tiles of M together sweep N: x's tiles are the wider ones and stay in L2 while the weights pass by.
    pid = tl.program_id(0)
    band = 4 * n_tiles
    first_m = pid // band * 4
    band_m = tl.minimum(m_tiles - first_m, 4)
    pid_m = first_m + pid % band % band_m
    pid_n = pid % band // band_m
    split = tl.program_id(1)
    tiles = k_size // BLOCK_K
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tiles)

    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    x_ptr = x + begin * BLOCK_K + (m.to(tl.int64) * k_size)[None, :] + k[:, None]
    # Registers, from the lowest: bytes, then 64-row blocks (with 8 warps these are warps), then chunks of K.
    r = tl.arange(0, 128 * ROWS * CHUNKS)
    row_block = (pid_n * ROWS + r // 128 % ROWS).to(tl.int64) * (k_size // CHUNK)
    offset = (row_block + begin * CHUNKS + r // (128 * ROWS)) * (32 * CHUNK) + r % 128 * BYTES
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
        if GROUP > 0:
            g = tl.minimum(tile + 1, tiles - 1) // PER_GROUP
            s_next = tl.load(scales + g * n_padded + n)
            if HAS_ZEROS:
                z_next = tl.load(zeros + g * n_padded + n)
        low, high = _unpack(tl.load(w_ptr), DTYPE, PLAIN)
        a = tl.join(low, high).reshape(CHUNKS, 4 * ROWS, 8, 4, CHUNK // 16, 2, 2, 2)
        #                              k_chunk n_warp n_lane k_lane k_register n_register k_pair k_half
        a = a.permute(1, 5, 2, 0, 4, 7, 3, 6).reshape(BLOCK_N, BLOCK_K)
        MAGIC: tl.constexpr = 128.0 if DTYPE == tl.bfloat16 else 64.0
        if HAS_ZEROS:
            offset_n = (-MAGIC - z.to(tl.float32)).to(DTYPE)[:, None]
        else:
            offset_n = tl.full((1, 1), -MAGIC - 8.0, tl.float32).to(DTYPE)
        a = _fma(a, tl.full((1, 1), 1.0, tl.float32).to(DTYPE), offset_n, PLAIN)  # exact: small integers
        if SCALE == "before":
            # Two terms, because bf16 holds 8 bits of a scale: the weight is rounded once, as if scaled in fp32.
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

    mask = (n < n_size)[:, None] & mask_m
    out = m.to(tl.int64)[None, :] * n_size + n[:, None]
    if SPLIT:
        tl.store(y + split.to(tl.int64) * m_size * n_size + out, acc, mask=mask)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < n_size, other=0.0).to(tl.float32)[:, None]
        tl.store(y + out, _round(acc, DTYPE, PLAIN), mask=mask)


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
