// INT4 weights times a few rows (M <= 32) of fp16 or bf16 activations: y = x W^T + bias, summed in fp32.
//
// The product is transposed: the weights are operand A of mma.m16n8k16, 8 rows of x are one column tile of operand B. The
// weights lie in memory as triton_w4a16.shuffle stores them, so a thread's 16 bytes are its own fragments of 4 products.
//
// A block of 8 warps works on a tile of TILE_N rows of W by TILE_K columns a step: each warp takes 64 rows by 64 columns, so
// that one fragment of x serves four of W. Steps are numbered along K first, then along N, and every thread block takes an
// equally long run of them (stream-K); its copies run STAGES - 1 steps ahead, across the borders of tiles. A tile that
// several blocks share is summed by the last of them to arrive, always in the order of K: no result depends on timing.
//
// No header is included, so that NVRTC needs no include path. The part between `#ifdef __CUDACC__` and `#endif` is all that
// is not plain C++; a host compiler takes the rest once those functions are defined some other way.

struct Arguments {        // everything is contiguous and 16-byte aligned
  const char* x;          // fp16 or bf16 [m, k]
  const char* w;          // uint8 [n_padded / 64, 32 k]: blocks of 64 rows
  const char* scales;     // fp16 or fp32 [groups, n_padded]
  const char* zeros;      // uint8 [groups, n_padded], or null
  const char* bias;       // x's type [n], or null
  char* y;                // x's type [m, n]
  float* partial;         // [2 * thread blocks, TOKENS * TILE_N] scratch
  unsigned* counters;     // [tiles of N], zero before and after
  int m, n, n_padded, k;  // n_padded a multiple of 128, k of 64 and of the group
};

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int grid_size() { return gridDim.x; }
DEVICE void sync_threads() { __syncthreads(); }
DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
DEVICE unsigned address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory by one thread, in groups that are waited for in order.
DEVICE void copy_16(char* to, const char* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// A whole row by the copy engine, which reports its bytes to a barrier in shared memory (sm_90).
DEVICE void copy_bulk(char* to, const char* from, int bytes, unsigned long long* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)),
               "l"(from), "r"(bytes), "r"(address(barrier)) : "memory");
}
DEVICE void barrier_init(unsigned long long* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barrier)) : "memory");
}
DEVICE void barrier_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void barrier_expect(unsigned long long* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(unsigned long long* barrier, int parity) {
  unsigned done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(address(barrier)), "r"(parity) : "memory");
  } while (!done);
}
// Programmatic dependent launch (sm_90); without its launch attribute both do nothing.
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

DEVICE unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) { return __byte_perm(a, b, selector); }
template <bool BF16> DEVICE unsigned fma2(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  if constexpr (BF16) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <bool BF16> DEVICE float to_float(unsigned short h) {
  float f;
  if constexpr (BF16) f = __uint_as_float((unsigned)h << 16);
  else asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
template <bool BF16> DEVICE unsigned short from_float(float f) {
  unsigned short h;
  if constexpr (BF16) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
// Four 8 x 8 matrices; lane i gives row i % 8 of matrix i / 8 and receives elements 2 (i % 4) and + 1 of row i / 4 of each.
DEVICE void load_matrices(const char* row, unsigned& a, unsigned& b, unsigned& c, unsigned& d) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address(row)) : "memory");
}
template <bool BF16> DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if constexpr (BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE unsigned arrive(unsigned* counter) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
DEVICE float load_from_l2(const float* p) {
  float f;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(f) : "l"(p) : "memory");
  return f;
}
#endif

// Both halves of a word: minus (128 + zero) in bf16, minus (64 + zero) in fp16; zero below 64.
template <bool BF16> DEVICE unsigned offset_of(unsigned zero) {
  const unsigned both = zero << 16 | zero;
  return BF16 ? 0xC300C300u | both : 0xD400D400u | both << 4;
}

// Operand A's four registers from the eight codes of one thread in a 16 x 16 block: code - zero, exactly.
// Byte (2 row_half + column) holds two codes, 8 columns apart. Put under the exponent byte of 128 (bf16) or, four bits up,
// of 64 (fp16), a code is the number 128 + code or 64 + code. offset: `offset_of` of the zeros of rows r and r + 8.
template <bool BF16> DEVICE void dequantize(unsigned codes, const unsigned (&offset)[2], unsigned (&a)[4]) {
  const unsigned magic = BF16 ? 0x43434343u : 0x54545454u, one = BF16 ? 0x3F803F80u : 0x3C003C00u;
  const unsigned low = BF16 ? codes & 0x0F0F0F0Fu : codes << 4 & 0xF0F0F0F0u;
  const unsigned high = BF16 ? codes >> 4 & 0x0F0F0F0Fu : codes & 0xF0F0F0F0u;
  a[0] = fma2<BF16>(permute_bytes(low, magic, 0x4140), one, offset[0]);
  a[1] = fma2<BF16>(permute_bytes(low, magic, 0x4342), one, offset[1]);
  a[2] = fma2<BF16>(permute_bytes(high, magic, 0x4140), one, offset[0]);
  a[3] = fma2<BF16>(permute_bytes(high, magic, 0x4342), one, offset[1]);
}

// BF16: x's type is bf16, not fp16. COLUMN_TILES: rows of x / 8, rounded up. GROUP: 32, 64, 128, or 0 for one per row.
// WIDE: scales are fp32, not fp16. BULK: codes come by the copy engine of sm_90.
template <bool BF16, int COLUMN_TILES, int GROUP, bool ZEROS, bool WIDE, int STAGES, bool BULK> struct W4A16 {
  static constexpr int WARPS = 8, THREADS = 32 * WARPS, TOKENS = 8 * COLUMN_TILES, GROUP_SIZE = GROUP;
  // More rows of W share a tile of x where x is wide, to read it less often from L2.
  static constexpr int BLOCKS = COLUMN_TILES <= 2 ? 2 : 4, SLICES = WARPS / BLOCKS;
  static constexpr int TILE_N = 64 * BLOCKS, TILE_K = 64 * SLICES;
  static constexpr int X_ROW = 2 * TILE_K + 16;  // 16 bytes apart in the banks, so that load_matrices meets no conflict
  static constexpr int GROUPS = GROUP == 0 || GROUP > TILE_K ? 1 : TILE_K / GROUP, SCALE_BYTES = WIDE ? 4 : 2;
  // One stage of shared memory: codes, x, scales, zeros.
  static constexpr int X = 32 * TILE_K * BLOCKS, SCALES = X + TOKENS * X_ROW;
  static constexpr int ZERO_POINTS = SCALES + GROUPS * TILE_N * SCALE_BYTES;
  static constexpr int STAGE = (ZERO_POINTS + (ZEROS ? GROUPS * TILE_N : 0) + 127) / 128 * 128;
  // Sums of warps: the 4 floats keep the writes of a warp in different banks.
  static constexpr int SUM_ROW = TILE_N + 4, SUMS = SLICES / 2 * TOKENS * SUM_ROW;
  static constexpr int CONTROL = 128;  // a barrier for each stage, then the flag of `finish`
  static constexpr int SHARED = CONTROL + STAGES * STAGE + SUMS * 4;
  static_assert(STAGES >= 2 && STAGES <= 12);

  const Arguments& a;
  int lane, slice, block;                               // of this thread; slice of K and block of 64 rows within the tile
  int k_tiles, steps;                                   // of the whole product
  float acc[4][COLUMN_TILES][4];                        // by 16 rows of W, 8 rows of x, element of the fragment

  DEVICE static unsigned long long* full() { return (unsigned long long*)shared_memory(); }  // [STAGES] BULK: codes have landed
  DEVICE static char* stage_at(int i) { return shared_memory() + CONTROL + i * STAGE; }
  DEVICE static float* sums() { return (float*)stage_at(STAGES); }                           // [SLICES / 2, TOKENS, SUM_ROW]

  struct Tile { int n, k; };  // first row of W, first column
  DEVICE Tile tile_of(int step) const { return {step / k_tiles * TILE_N, step % k_tiles * TILE_K}; }
  DEVICE Tile after(Tile t) const { return t.k + TILE_K < a.k ? Tile{t.n, t.k + TILE_K} : Tile{t.n + TILE_N, 0}; }
  DEVICE int columns(Tile t) const { return a.k - t.k < TILE_K ? a.k - t.k : TILE_K; }
  DEVICE int blocks(Tile t) const { return a.n_padded - t.n < TILE_N ? (a.n_padded - t.n) / 64 : BLOCKS; }
  // Both need steps * grid_size() to be below 2^32.
  DEVICE int first_step(int block_id) const { return (unsigned)block_id * steps / grid_size(); }
  DEVICE int block_of(int step) const { return ((step + 1u) * grid_size() - 1) / steps; }

  // `rows` rows (at most ROWS) of `bytes` (at most BYTES, a multiple of 16) into shared memory, by all threads.
  template <int ROWS, int BYTES>
  DEVICE void copy_rows(char* to, int to_row, const char* from, long long from_row, int rows, int bytes) {
    constexpr int PIECES = BYTES / 16;
#pragma unroll
    for (int begin = 0; begin < ROWS * PIECES; begin += THREADS) {
      const int i = begin + thread_index(), row = i / PIECES, byte = i % PIECES * 16;
      if (row < rows && byte < bytes) copy_16(to + row * to_row + byte, from + row * from_row + byte);
    }
  }
  // The codes of a step, which do not depend on the kernel before this one: few long rows, for the copy engine if there is one.
  DEVICE void load_codes(Tile t, int stage) {
    char* to = stage_at(stage);
    const char* from = a.w + 32LL * (t.n / 64) * a.k + 32LL * t.k;
    if constexpr (!BULK) copy_rows<BLOCKS, 32 * TILE_K>(to, 32 * TILE_K, from, 32LL * a.k, blocks(t), 32 * columns(t));
    else if (thread_index() == 0) {
      barrier_expect(full() + stage, 32 * columns(t) * blocks(t));
      for (int i = 0; i < BLOCKS; ++i)
        if (i < blocks(t)) copy_bulk(to + i * 32 * TILE_K, from + i * 32LL * a.k, 32 * columns(t), full() + stage);
    }
  }
  // Its scales, zeros and x. Rows of x from m on stay what they were: a column of the product depends on its own row of x only.
  DEVICE void load_rest(Tile t, int stage) {
    char* to = stage_at(stage);
    const int groups = GROUP == 0 || GROUP > columns(t) ? 1 : columns(t) / GROUP, rows = 64 * blocks(t);
    const long long first = (GROUP == 0 ? 0LL : t.k / GROUP) * a.n_padded + t.n;
    copy_rows<TOKENS, 2 * TILE_K>(to + X, X_ROW, a.x + 2LL * t.k, 2LL * a.k, a.m, 2 * columns(t));
    copy_rows<GROUPS, TILE_N * SCALE_BYTES>(to + SCALES, TILE_N * SCALE_BYTES, a.scales + first * SCALE_BYTES,
                                            (long long)a.n_padded * SCALE_BYTES, groups, rows * SCALE_BYTES);
    if constexpr (ZEROS) copy_rows<GROUPS, TILE_N>(to + ZERO_POINTS, TILE_N, a.zeros + first, a.n_padded, groups, rows);
  }

  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 16 * COLUMN_TILES; ++i) acc[i / (4 * COLUMN_TILES)][i / 4 % COLUMN_TILES][i % 4] = 0;
  }
  // acc += scale * (64 rows x 64 columns of W) x^T, of this warp's rows and columns of the stage.
  DEVICE void accumulate(const char* stage, Tile t) {
    if (64 * slice >= columns(t) || block >= blocks(t)) return;
    const char* codes = stage + 32 * TILE_K * block + 2048 * slice;
    constexpr int PARTS = GROUP == 32 ? 2 : 1, DEPTH = 4 / PARTS;  // groups in 64 columns; products of 16 columns in each
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      unsigned x[DEPTH][COLUMN_TILES][2];
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; ++c)
#pragma unroll
        for (int b = 0; b < DEPTH; b += 2) {
          const int column = 64 * slice + 16 * (DEPTH * part + b) + lane / 8 * 8;
          const char* row = stage + X + (8 * c + lane % 8) * X_ROW + 2 * column;
          load_matrices(row, x[b][c][0], x[b][c][1], x[b + 1][c][0], x[b + 1][c][1]);
        }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        unsigned words[DEPTH];
        if constexpr (PARTS == 1) {
          const uint4 v = *(const uint4*)(codes + 512 * r + 16 * lane);
          words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        } else {
          const uint2 v = *(const uint2*)(codes + 1024 * part + 256 * r + 8 * lane);
          words[0] = v.x, words[1] = v.y;
        }
        const int row = 64 * block + 16 * r + lane / 4;
        const int at = (GROUP == 0 ? 0 : (64 * slice + 32 * part) / GROUP) * TILE_N + row;
        unsigned offset[2];
        float scale[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          offset[h] = offset_of<BF16>(ZEROS ? ((const unsigned char*)(stage + ZERO_POINTS))[at + 8 * h] : 8u);
          if constexpr (WIDE) scale[h] = ((const float*)(stage + SCALES))[at + 8 * h];
          else scale[h] = to_float<false>(((const unsigned short*)(stage + SCALES))[at + 8 * h]);
        }
        float sum[COLUMN_TILES][4] = {};
#pragma unroll
        for (int b = 0; b < DEPTH; ++b) {
          unsigned w[4];
          dequantize<BF16>(words[b], offset, w);
#pragma unroll
          for (int c = 0; c < COLUMN_TILES; ++c) multiply<BF16>(sum[c], w, x[b][c]);
        }
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[r][c][e] += sum[c][e] * scale[e / 2];
      }
    }
  }

  template <bool ADD> DEVICE void put_sums() {
    float* to = sums() + slice % (SLICES / 2) * TOKENS * SUM_ROW;
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float* at = to + (8 * c + lane % 4 * 2 + e % 2) * SUM_ROW + 64 * block + 16 * r + lane / 4 + e / 2 * 8;
          *at = ADD ? acc[r][c][e] + *at : acc[r][c][e];
        }
  }
  DEVICE void put_result(float value, int token, int row) {
    if (row >= a.n) return;
    if (a.bias) value += to_float<BF16>(((const unsigned short*)a.bias)[row]);
    ((unsigned short*)a.y)[(long long)token * a.n + row] = from_float<BF16>(value);
  }
  // Where thread block `id` leaves its sums of the tile it begins in, or of the other one it can share, that it ends in.
  DEVICE float* partial_of(int id, bool begins_in) const { return a.partial + (2LL * id + !begins_in) * TOKENS * TILE_N; }

  // The sums of this block over its part of `tile`, in full or, where blocks share it, by the last of them to get here.
  DEVICE void finish(int tile) {
    if (slice >= SLICES / 2) put_sums<false>();
    sync_threads();
    if (slice < SLICES / 2) put_sums<true>();
    sync_threads();
    const int first = block_of(tile * k_tiles), last = block_of((tile + 1) * k_tiles - 1), n = tile * TILE_N;
    float* partial = partial_of(block_index(), first_step(block_index()) / k_tiles == tile);
    for (int i = thread_index(); i < a.m * TILE_N; i += THREADS) {
      float value = 0;
#pragma unroll
      for (int s = 0; s < SLICES / 2; ++s) value += sums()[(s * TOKENS + i / TILE_N) * SUM_ROW + i % TILE_N];
      if (first == last) put_result(value, i / TILE_N, n + i % TILE_N);
      else partial[i] = value;
    }
    if (first == last) return;
    unsigned* flag = (unsigned*)(shared_memory() + CONTROL - 8);
    sync_threads();
    if (thread_index() == 0) {
      *flag = arrive(a.counters + tile) == (unsigned)(last - first);
      if (*flag) a.counters[tile] = 0;  // for the next launch
    }
    sync_threads();
    if (*flag == 0) return;
    const float *head = partial_of(first, first_step(first) / k_tiles == tile), *others = partial_of(0, true);
    for (int i = thread_index(); i < a.m * TILE_N; i += THREADS) {
      float value = load_from_l2(head + i);
#pragma unroll 4
      for (int id = first + 1; id <= last; ++id) value += load_from_l2(others + 2LL * id * TOKENS * TILE_N + i);
      put_result(value, i / TILE_N, n + i % TILE_N);
    }
  }

  DEVICE explicit W4A16(const Arguments& arguments) : a(arguments) {}

  DEVICE void run() {
    lane = thread_index() % 32, slice = thread_index() / 32 / BLOCKS, block = thread_index() / 32 % BLOCKS;
    k_tiles = (a.k + TILE_K - 1) / TILE_K, steps = (a.n_padded + TILE_N - 1) / TILE_N * k_tiles;
    const int begin = first_step(block_index()), todo = first_step(block_index() + 1) - begin;
    Tile now = tile_of(begin), next = now;
    if constexpr (BULK) {
      if (thread_index() < STAGES) barrier_init(full() + thread_index());
      barrier_fence();
      sync_threads();
      for (int s = 0; s < STAGES - 1 && s < todo; ++s, next = after(next)) load_codes(next, s);
      wait_for_previous_kernel();
      next = now;
    }
    for (int s = 0; s < STAGES - 1; ++s) {
      if (s < todo) {
        if constexpr (!BULK) load_codes(next, s);
        load_rest(next, s);
        next = after(next);
      }
      commit_copies();
    }
    clear();
    int stage = 0, parity = 0;
    for (int left = todo; left > 0; --left) {
      wait_copies<STAGES - 2>();
      if constexpr (BULK) barrier_wait(full() + stage, parity);
      sync_threads();  // now every warp has left the previous step, whose stage is filled again
      if (left >= STAGES) {
        const int free_stage = stage == 0 ? STAGES - 1 : stage - 1;
        load_codes(next, free_stage);
        load_rest(next, free_stage);
        next = after(next);
      }
      commit_copies();
      accumulate(stage_at(stage), now);
      if (++stage == STAGES) stage = 0, parity ^= 1;
      if (BULK && left == 1) let_next_kernel_start();
      if (left == 1 || now.k + TILE_K >= a.k) {
        finish(now.n / TILE_N);
        clear();
      }
      now = after(now);
    }
  }
};

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(256, BLOCKS_PER_SM) w4a16(const __grid_constant__ Arguments arguments) {
  using Kernel = W4A16<IS_BF16, IS_COLUMN_TILES, IS_GROUP, IS_ZEROS, IS_WIDE, IS_STAGES, (__CUDA_ARCH__ >= 900)>;
  static_assert(Kernel::SHARED == IS_SHARED, "the host's idea of the shared memory");
  Kernel(arguments).run();
}
#endif
