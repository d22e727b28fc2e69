/* Second moments of activations on CPUs: sums[K1, K2] += A^T X over tokens, A and X in bfloat16, products exact, sums in float32,
   with the bfloat16 dot products of AVX-512, or the tiles of AMX where the CPU has them. torch's own bfloat16 product would round
   the sums; in float32 it takes twice as long.

   A is X itself, or the difference of two tensors, rounded to bfloat16 again; every token may have a weight. Tokens t and t + 1 of
   one column are a pair of 32 bits, as the instructions want them. Pairs of 32 columns are a panel; two panels make a tile of the
   result, which one thread adds up from the first token to the last: sums do not depend on the number of threads. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define PANEL 32
#define PAIRS 128  // of a panel that stay in the first-level cache, and are added up before they join the sums
#define ROWS 8
#define DEPTH 16  // pairs of an AMX tile; panels hold a multiple of them

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef struct {
    const uint16_t *x, *minus;  // [tokens][columns]; minus NULL: x itself
    long columns, stride, minus_stride, panels;
} Source;

INLINE __m512 widen(__m256i v)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

INLINE __m512i read_row(const Source *s, const float *weights, long token, long column, __mmask32 mask)
{
    const __m512i raw = _mm512_maskz_loadu_epi16(mask, s->x + token * s->stride + column);
    if (!s->minus && !weights)
        return raw;
    __m512 low = widen(_mm512_castsi512_si256(raw)), high = widen(_mm512_extracti64x4_epi64(raw, 1));
    if (s->minus) {
        const __m512i other = _mm512_maskz_loadu_epi16(mask, s->minus + token * s->minus_stride + column);
        low = _mm512_sub_ps(low, widen(_mm512_castsi512_si256(other)));
        high = _mm512_sub_ps(high, widen(_mm512_extracti64x4_epi64(other, 1)));
    }
    if (weights) {
        low = _mm512_mul_ps(low, _mm512_set1_ps(weights[token]));
        high = _mm512_mul_ps(high, _mm512_set1_ps(weights[token]));
    }
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* One panel, zeros where there are no tokens or columns. out: [pairs][PANEL]; turned: [pairs / DEPTH][PANEL][DEPTH], as AMX wants
   the left factor. Either may be NULL. */
TARGET static void pack(const Source *s, const float *weights, long tokens, long pairs, long panel, uint32_t *out, uint32_t *turned)
{
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                         35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i down = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(PANEL));
    const long column = panel * PANEL, left = s->columns - column;
    const __mmask32 mask = left < PANEL ? (1u << left) - 1 : ~0u;
    uint32_t block[DEPTH * PANEL] __attribute__((aligned(64)));
    for (long pair = 0; pair < pairs; pair += DEPTH) {
        uint32_t *rows = out ? out + pair * PANEL : block;
        for (long i = 0, t = 2 * pair; i < DEPTH; i++, t += 2) {
            const __m512i first = t < tokens ? read_row(s, weights, t, column, mask) : _mm512_setzero_si512();
            const __m512i second = t + 1 < tokens ? read_row(s, weights, t + 1, column, mask) : _mm512_setzero_si512();
            _mm512_storeu_si512(rows + i * PANEL, _mm512_permutex2var_epi16(first, low, second));
            _mm512_storeu_si512(rows + i * PANEL + PANEL / 2, _mm512_permutex2var_epi16(first, high, second));
        }
        for (long c = 0; turned && c < PANEL; c++)
            _mm512_storeu_si512(turned + pair * PANEL + c * DEPTH, _mm512_i32gather_epi32(down, (const int *)(rows + c), 4));
    }
}

/* sums[PANEL][PANEL] += the tile of panels a and b over `pairs` pairs of tokens. */
TARGET static void add_tile(const uint32_t *a, const uint32_t *b, long pairs, float *sums)
{
    for (int row = 0; row < PANEL; row += ROWS) {
        __m512 found[ROWS][2];
        for (int i = 0; i < ROWS; i++)
            found[i][0] = found[i][1] = _mm512_setzero_ps();
        for (long t = 0; t < pairs; t++) {
            const __m512bh left = (__m512bh)_mm512_loadu_si512(b + t * PANEL);
            const __m512bh right = (__m512bh)_mm512_loadu_si512(b + t * PANEL + PANEL / 2);
            for (int i = 0; i < ROWS; i++) {
                const __m512bh one = (__m512bh)_mm512_set1_epi32(a[t * PANEL + row + i]);
                found[i][0] = _mm512_dpbf16_ps(found[i][0], one, left);
                found[i][1] = _mm512_dpbf16_ps(found[i][1], one, right);
            }
        }
        for (int i = 0; i < ROWS; i++)
            for (int half = 0; half < 2; half++) {
                float *at = sums + (row + i) * PANEL + half * PANEL / 2;
                _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), found[i][half]));
            }
    }
}

#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define HAVE_AMX 1
#define TILES __attribute__((target("avx512f,amx-tile,amx-bf16")))

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileConfig;

/* The configuration that was there goes to `before`: other libraries keep theirs between calls. */
TILES static void begin_tiles(TileConfig *before)
{
    TileConfig all = {.palette = 1};
    for (int i = 0; i < 8; i++)
        all.bytes[i] = 64, all.rows[i] = 16;
    __asm__ volatile("sttilecfg %0" : "=m"(*before));  // gcc's intrinsics for these say that only eight bytes are touched
    __asm__ volatile("ldtilecfg %0" : : "m"(all));
}

TILES static void end_tiles(const TileConfig *before)
{
    if (before->palette)
        __asm__ volatile("ldtilecfg %0" : : "m"(*before));
    else
        _tile_release();
}

/* As add_tile; a: turned. */
TILES static void add_tile_amx(const uint32_t *a, const uint32_t *b, long pairs, float *sums)
{
    float found[PANEL * PANEL] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long t = 0; t < pairs; t += DEPTH) {
        _tile_loadd(4, a + t * PANEL, DEPTH * 4);
        _tile_loadd(5, a + t * PANEL + PANEL / 2 * DEPTH, DEPTH * 4);
        _tile_loadd(6, b + t * PANEL, PANEL * 4);
        _tile_loadd(7, b + t * PANEL + PANEL / 2, PANEL * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, found, PANEL * 4);
    _tile_stored(1, found + PANEL / 2, PANEL * 4);
    _tile_stored(2, found + PANEL / 2 * PANEL, PANEL * 4);
    _tile_stored(3, found + PANEL / 2 * PANEL + PANEL / 2, PANEL * 4);
    for (int i = 0; i < PANEL * PANEL; i += 16)
        _mm512_storeu_ps(sums + i, _mm512_add_ps(_mm512_loadu_ps(sums + i), _mm512_load_ps(found + i)));
}
#endif

typedef void Add(const uint32_t *a, const uint32_t *b, long pairs, float *sums);

TARGET static void add_products(Add *add, const uint32_t *a, const uint32_t *b, long pairs, long i, long j, float *sums, long rows,
                                long columns)
{
    float tile[PANEL * PANEL] = {0};
    const long depth = pairs * PANEL;
    for (long t = 0; t < pairs; t += PAIRS)
        add(a + i * depth + t * PANEL, b + j * depth + t * PANEL, pairs - t < PAIRS ? pairs - t : PAIRS, tile);
    for (long r = 0; r < PANEL && i * PANEL + r < rows; r++)
        for (long c = 0; c < PANEL && j * PANEL + c < columns; c++)
            sums[(i * PANEL + r) * columns + j * PANEL + c] += tile[r * PANEL + c];
}
#endif

/* Whether `tiles` may be asked for: the CPU has AMX's for bfloat16, and Linux lets this process use them. */
int foem_cpu_has_amx(void)
{
#if defined(HAVE_AMX) && defined(SYS_arch_prctl)
    unsigned a, b, c, d;
    const unsigned bf16 = 1u << 22, tile = 1u << 24;
    const int request_permission = 0x1023, tile_data = 18;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tile) &&
           !syscall(SYS_arch_prctl, request_permission, tile_data);
#else
    return 0;
#endif
}

/* gram [k][k] += X^T diag(weights^2) X, tiles on and above the diagonal only; cross [n][k] += (then - now)^T diag(weights^2) X.
   x [tokens][k], then and now [tokens][n] bfloat16 with these strides between tokens. weights NULL: 1. cross NULL: none.
   tiles: with AMX. Returns 0, or 1 when there was no memory, or 2 where the machine lacks the instructions. */
int foem_cpu_add_moments(const uint16_t *x, long x_stride, long tokens, long k, const float *weights, float *gram,
                         const uint16_t *then, long then_stride, const uint16_t *now, long now_stride, long n, float *cross,
                         int tiles, int threads)
{
#if defined(__x86_64__)
    const Source inputs = {x, NULL, k, x_stride, 0, (k + PANEL - 1) / PANEL};
    const Source drift = {then, now, n, then_stride, now_stride, cross ? (n + PANEL - 1) / PANEL : 0};
    const long pairs = (tokens + 2 * DEPTH - 1) / (2 * DEPTH) * DEPTH, panel = pairs * PANEL;
    const long square = inputs.panels * inputs.panels, all = square + drift.panels * inputs.panels;
    Add *add = add_tile;
#ifdef HAVE_AMX
    if (tiles)
        add = add_tile_amx;
#else
    if (tiles)
        return 2;
#endif
    uint32_t *right = aligned_alloc(64, (inputs.panels * (tiles ? 2 : 1) + drift.panels) * panel * sizeof(uint32_t));
    if (!right)
        return 1;
    uint32_t *left = tiles ? right + inputs.panels * panel : right, *left_drift = left + inputs.panels * panel;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long p = 0; p < inputs.panels + drift.panels; p++) {
            const long d = p - inputs.panels;
            if (d < 0)
                pack(&inputs, weights, tokens, pairs, p, right + p * panel, tiles ? left + p * panel : NULL);
            else if (tiles)
                pack(&drift, weights, tokens, pairs, d, NULL, left_drift + d * panel);
            else
                pack(&drift, weights, tokens, pairs, d, left_drift + d * panel, NULL);
        }
#ifdef HAVE_AMX
        TileConfig before;
        if (tiles)
            begin_tiles(&before);
#endif
#pragma omp for schedule(dynamic, 4)
        for (long p = 0; p < all; p++) {
            const long i = (p < square ? p : p - square) / inputs.panels, j = p % inputs.panels;
            if (p >= square)
                add_products(add, left_drift, right, pairs, i, j, cross, n, k);
            else if (j >= i)
                add_products(add, left, right, pairs, i, j, gram, k, k);
        }
#ifdef HAVE_AMX
        if (tiles)
            end_tiles(&before);
#endif
    }
    free(right);
    return 0;
#else
    return 2;
#endif
}
