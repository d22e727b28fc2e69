/* Second moments of activations on CPUs: sums[K1, K2] += A^T X over tokens, A and X in bfloat16, products exact, sums in float32,
   with the bfloat16 dot products of AVX-512. torch's own bfloat16 product would round the sums; in float32 it takes twice as long.

   A is X itself, or the difference of two tensors, rounded to bfloat16 again; every token may have a weight. Tokens t and t + 1 of
   one column are a pair of 32 bits, as the instruction wants them. Pairs of 32 columns are a panel; two panels make a tile of the
   result, which one thread adds up from the first token to the last: sums do not depend on the number of threads. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PANEL 32
#define PAIRS 128  // of a panel that stay in the first-level cache, and are added up before they join the sums
#define ROWS 8

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

/* One panel: [pairs][PANEL] pairs of tokens, zeros where there are no tokens or columns. */
TARGET static void pack(const Source *s, const float *weights, long tokens, long panel, uint32_t *out)
{
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                         35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const long column = panel * PANEL, left = s->columns - column;
    const __mmask32 mask = left < PANEL ? (1u << left) - 1 : ~0u;
    for (long t = 0; t < tokens; t += 2, out += PANEL) {
        const __m512i first = read_row(s, weights, t, column, mask);
        const __m512i second = t + 1 < tokens ? read_row(s, weights, t + 1, column, mask) : _mm512_setzero_si512();
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(first, low, second));
        _mm512_storeu_si512(out + PANEL / 2, _mm512_permutex2var_epi16(first, high, second));
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

TARGET static void add_products(const uint32_t *a, const uint32_t *b, long pairs, long i, long j, float *sums, long rows, long columns)
{
    float tile[PANEL * PANEL] = {0};
    const long depth = pairs * PANEL;
    for (long t = 0; t < pairs; t += PAIRS)
        add_tile(a + i * depth + t * PANEL, b + j * depth + t * PANEL, pairs - t < PAIRS ? pairs - t : PAIRS, tile);
    for (long r = 0; r < PANEL && i * PANEL + r < rows; r++)
        for (long c = 0; c < PANEL && j * PANEL + c < columns; c++)
            sums[(i * PANEL + r) * columns + j * PANEL + c] += tile[r * PANEL + c];
}
#endif

/* gram [k][k] += X^T diag(weights^2) X, tiles on and above the diagonal only; cross [n][k] += (then - now)^T diag(weights^2) X.
   x [tokens][k], then and now [tokens][n] bfloat16 with these strides between tokens. weights NULL: 1. cross NULL: none.
   Returns 0, or 1 when there was no memory, or 2 where the machine lacks the instructions. */
int foem_cpu_add_moments(const uint16_t *x, long x_stride, long tokens, long k, const float *weights, float *gram,
                         const uint16_t *then, long then_stride, const uint16_t *now, long now_stride, long n, float *cross,
                         int threads)
{
#if defined(__x86_64__)
    const Source inputs = {x, NULL, k, x_stride, 0, (k + PANEL - 1) / PANEL};
    const Source drift = {then, now, n, then_stride, now_stride, cross ? (n + PANEL - 1) / PANEL : 0};
    const long pairs = (tokens + 1) / 2, square = inputs.panels * inputs.panels, all = square + drift.panels * inputs.panels;
    uint32_t *packed = aligned_alloc(64, ((inputs.panels + drift.panels) * pairs * PANEL * sizeof(uint32_t) + 63) & ~63ul);
    if (!packed)
        return 1;
    uint32_t *packed_drift = packed + inputs.panels * pairs * PANEL;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long p = 0; p < inputs.panels + drift.panels; p++)
            pack(p < inputs.panels ? &inputs : &drift, weights, tokens, p < inputs.panels ? p : p - inputs.panels,
                 packed + p * pairs * PANEL);
#pragma omp for schedule(dynamic, 4)
        for (long p = 0; p < all; p++) {
            const long i = (p < square ? p : p - square) / inputs.panels, j = p % inputs.panels;
            if (p >= square)
                add_products(packed_drift, packed, pairs, i, j, cross, n, k);
            else if (j >= i)
                add_products(packed, packed, pairs, i, j, gram, k, k);
        }
    }
    free(packed);
    return 0;
#else
    return 2;
#endif
}
