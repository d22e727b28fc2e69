/* Weight-only quantized linear layers on CPUs: y = x W^T with float32 sums, in plain C without any dependency.

   Weights come as words of 32 bits, [N / 32 blocks][K / codes words][32 outputs]: a word holds 8 codes of 4 bits or 4 of 8 bits
   of one output, so that 64 bytes are 16 outputs and every instruction set can take codes apart lane by lane. 4-bit code j
   (bits 4j .. 4j+3) is column j/2 + 4 (j%2) of its word: then even and odd nibbles, masked, are four columns in order, as
   8-bit dot products want them, and equal nibbles of the two halves of a word are a pair, as bfloat16 dot products do.
   Codes enter products as they are; zero points are taken off with sums of x: sum (c - z) x = sum c x - z sum x.

   x is converted once into the order in which tiles read it. A tile, some rows of x times 64 outputs (half or a quarter of
   them where there are fewer registers), goes over a piece of the columns with all its sums in registers, and takes codes apart
   on the way: on a wide machine that hides behind the products, so weights are never dequantized into memory. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define BLOCK 32    // outputs that are stored together
#define PAIR 64     // outputs that are computed together: of two blocks, because two streams are read faster than one
#define PIECE 64    // steps, at most, that sums go on for before they are scaled: those of int8 stay below 2^24, exact in float
#define AHEAD 3072  // bytes from what is read of the weights to what is fetched
#define GROUPS_AHEAD 4  // the same for scales
#ifndef CHUNK
#define CHUNK 256  // rows of x that are converted at a time: a bound on memory
#endif
#define COLUMN4(j) ((j) / 2 + 4 * ((j) % 2))

enum { FLOAT32, FLOAT16, BFLOAT16 };
enum { PORTABLE, AVX2, AVX512, AVX512_BF16 };
/* How x enters products, in units of 32 bits: one float, two bfloat16, four int8. A step is the product with one unit. */
enum { AS_FLOAT, AS_BFLOAT, AS_INT8 };
#define ELEMENTS(form) (1 << (form))
#define STEPS(form, bits) (32 / (bits) / ELEMENTS(form))  // in a word

#define VECTOR_TYPES(lanes) \
    typedef float v##lanes##f __attribute__((vector_size(4 * lanes))); \
    typedef uint32_t v##lanes##u __attribute__((vector_size(4 * lanes))); \
    typedef int32_t v##lanes##i __attribute__((vector_size(4 * lanes)));
VECTOR_TYPES(4)
VECTOR_TYPES(8)
VECTOR_TYPES(16)

/* A chunk of rows. They are cut into tiles of rows, columns into pieces of at most PIECE steps of one group. */
typedef struct {
    const void *source;      // [rows][k] as given
    const int32_t *order;    // column i of W is column order[i] of source; NULL: the same
    const uint32_t *weight;
    const float *scales, *zeros;  // [blocks][groups][32]; zeros NULL: zero for all
    const void *bias;
    void *y;                 // [rows][n]
    long n, k, rows, tiles, tile_rows, larger;  // the first `larger` tiles have a row more
    long words, groups, group_words, piece_words;
    uint32_t *x;             // [pieces][tiles][steps][rows of the tile] units, padded with zeros
    float *x_sums;           // [pieces][rows]: sums of x times -zero, or -1 where there are zeros
    float *x_scales;         // [rows]: one, but for int8
    float zero;
    int dtype, bits;
} Job;

/* What the tiles of 64 outputs and a piece's columns have in common. */
typedef struct {
    const uint32_t *weight, *x;
    const float *scales, *zeros, *x_sums;
    long words, next_weight, next_scale;  // next: from the first 32 outputs to the others
} Piece;

static inline long tile_start(const Job *job, long tile)
{
    return tile * job->tile_rows + (tile < job->larger ? tile : job->larger);
}

static inline long piece_words(const Job *job, long from)
{
    const long end = (from / job->group_words + 1) * job->group_words, last = end < job->words ? end : job->words;
    return last - from < job->piece_words ? last - from : job->piece_words;
}

#include "cpu_rows.h"

/* ---- instruction sets: what cpu_tile.h asks for, and what it makes of it ---- */

#define VECTOR_OF(lanes, t) v##lanes##t
#define WHOLE(w, s, bits, i, f) __builtin_convertvector((i)((bits) == 4 ? (w) >> 4 * (s) & 15 : (w) >> 8 * (s) & 255), f)
#define MULTIPLY_ADD(sum, x, d) ((sum) + *(const float *)(x) * (d))

#define NAME(f) f##_portable
#define FORM AS_FLOAT
#define LANES 4
#define VECTOR(t) VECTOR_OF(4, t)
#define SUM f
#define START(values) (values)
#define TOTAL(sum) (sum)
#define CODES f
#define DECODE(w, s, bits) WHOLE(w, s, bits, v4i, v4f)
#define DOT(sum, x, d) MULTIPLY_ADD(sum, x, d)
#define VECTORS 2
#define ROWS 4
#define SUMS 8
#include "cpu_tile.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(f) f##_avx2
#define FORM AS_FLOAT
#define LANES 8
#define VECTOR(t) VECTOR_OF(8, t)
#define SUM f
#define START(values) (values)
#define TOTAL(sum) (sum)
#define CODES f
#define DECODE(w, s, bits) WHOLE(w, s, bits, v8i, v8f)
#define DOT(sum, x, d) MULTIPLY_ADD(sum, x, d)
#define VECTORS 2
#define ROWS 6
#define SUMS 8
#include "cpu_tile.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
// A table of 16 floats, looked up by the low four bits of every lane.
#define NUMBERS _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#define NAME(f) f##_avx512
#define FORM AS_FLOAT
#define LANES 16
#define VECTOR(t) VECTOR_OF(16, t)
#define SUM f
#define START(values) (values)
#define TOTAL(sum) (sum)
#define CODES f
#define DECODE(w, s, bits) \
    ((bits) == 4 ? (v16f)_mm512_permutexvar_ps((__m512i)((w) >> 4 * (s)), NUMBERS) : WHOLE(w, s, 8, v16i, v16f))
#define DOT(sum, x, d) MULTIPLY_ADD(sum, x, d)
#define VECTORS 4
#define ROWS 6
#define SUMS 8
#include "cpu_tile.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
/* Pairs of codes in bfloat16, in which whole numbers up to 255 are exact; so are products with x, which are added in float32. */
INLINE v16u bfloats(v16u w, int s, const int bits)
{
    // 0 .. 15, twice: of a lane's low five bits the fifth belongs to the next code.
    static const uint16_t numbers[16] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                         0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)numbers));
    if (bits == 4)
        return (v16u)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)w, 4 * s), table);
    return (v16u)WHOLE(w, s, 8, v16i, v16f) >> 16 | (v16u)WHOLE(w, s + 2, 8, v16i, v16f);
}

#define NAME(f) f##_bf16
#define FORM AS_BFLOAT
#define LANES 16
#define VECTOR(t) VECTOR_OF(16, t)
#define SUM f
#define START(values) (values)
#define TOTAL(sum) (sum)
#define CODES u
#define DECODE(w, s, bits) bfloats(w, s, bits)
#define DOT(sum, x, d) (v16f)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)_mm512_set1_epi32(*(x)), (__m512bh)(d))
#define VECTORS 4
#define ROWS 6
#define SUMS 8
#include "cpu_tile.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")
#define NAME(f) f##_int8
#define FORM AS_INT8
#define LANES 16
#define VECTOR(t) VECTOR_OF(16, t)
#define SUM i
#define START(values) __builtin_convertvector(values, v16i)
#define TOTAL(sum) __builtin_convertvector(sum, v16f)
#define CODES u
#define DECODE(w, s, bits) ((bits) == 4 ? (w) >> 4 * (s) & 0x0f0f0f0f : (w))
#define DOT(sum, x, d) (v16i)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(d), _mm512_set1_epi32(*(x)))
#define VECTORS 4
#define ROWS 6
#define SUMS 8
#include "cpu_tile.h"
#pragma GCC pop_options
#endif

typedef struct {
    void (*prepare)(const Job *, long tile, float *row);
    void (*run)(const Job *, long block, float *totals);
    int rows, form;
} Path;

static Path path(int isa, int dtype, int int8)
{
#if defined(__x86_64__)
    if (int8)
        return (Path){prepare_int8, run_int8, 6, AS_INT8};
    if (isa == AVX512_BF16 && dtype == BFLOAT16)
        return (Path){prepare_bf16, run_bf16, 6, AS_BFLOAT};
    if (isa >= AVX512)
        return (Path){prepare_avx512, run_avx512, 6, AS_FLOAT};
    if (isa == AVX2)
        return (Path){prepare_avx2, run_avx2, 6, AS_FLOAT};
#endif
    (void)isa, (void)dtype, (void)int8;
    return (Path){prepare_portable, run_portable, 4, AS_FLOAT};
}

/* The best instruction set of this machine that the file was compiled for. */
int foem_cpu_isa(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return AVX2;
#endif
    return PORTABLE;
}

/* Whether int8 activations have a kernel here (AVX-512 VNNI). */
int foem_cpu_has_int8(void)
{
#if defined(__x86_64__)
    return foem_cpu_isa() >= AVX512 && __builtin_cpu_supports("avx512vnni");
#else
    return 0;
#endif
}

/* y [m, n] = x [m, k] W^T + bias. Returns 0, or 1 when memory ran out. See the top of the file and cpu_w4a16.py. */
int foem_cpu_w4a16(const void *x, long m, long k, int dtype, const uint32_t *weight, long n, int bits, long group_size,
                   const float *scales, const float *zeros, float zero, const int32_t *order, const void *bias, void *y, int isa,
                   int int8, int threads)
{
    const Path best = path(isa, dtype, int8);
    const long codes = 32 / bits, words = (k + codes - 1) / codes, groups = (k + group_size - 1) / group_size;
    const long steps = STEPS(best.form, bits), size = dtype == FLOAT32 ? 4 : 2, chunk = m < CHUNK ? m : CHUNK;
    Job job = {.order = order, .weight = weight, .scales = scales, .zeros = zeros, .zero = zero, .bias = bias, .n = n, .k = k,
               .words = words, .groups = groups, .group_words = groups == 1 ? words : group_size / codes,
               .piece_words = PIECE / steps, .dtype = dtype, .bits = bits};
    const long pieces = groups * ((job.group_words + job.piece_words - 1) / job.piece_words);
    const long own = ((chunk * PAIR > words * codes ? chunk * PAIR : words * codes) + 15) / 16 * 16;  // a thread's scratch
    const long floats = threads * own + chunk * (words * steps + pieces + 1);
    float *memory = aligned_alloc(64, (floats + 15) / 16 * 16 * sizeof *memory);
    if (!memory)
        return 1;
    job.x = (uint32_t *)(memory + threads * own);
    job.x_sums = (float *)(job.x + chunk * words * steps);
    job.x_scales = job.x_sums + chunk * pieces;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
        float *scratch = memory + omp_get_thread_num() * own;
#else
        float *scratch = memory;
#endif
        for (long m0 = 0; m0 < m; m0 += chunk) {
            Job part = job;
            part.rows = m - m0 < chunk ? m - m0 : chunk;
            part.tiles = (part.rows + best.rows - 1) / best.rows;
            part.tile_rows = part.rows / part.tiles, part.larger = part.rows % part.tiles;
            part.source = (const char *)x + m0 * k * size, part.y = (char *)y + m0 * n * size;
#pragma omp for schedule(static)
            for (long t = 0; t < part.tiles; t++)
                best.prepare(&part, t, scratch);
#pragma omp for schedule(static)
            for (long block = 0; block < (n + PAIR - 1) / PAIR * 2; block += 2)
                best.run(&part, block, scratch);
        }
    }
    free(memory);
    return 0;
}
