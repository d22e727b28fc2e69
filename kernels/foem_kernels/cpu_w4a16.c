/* Weight-only quantized linear layers on CPUs: y = x W^T with float32 sums, one file of plain C without any dependency.

   Weights come as words of 32 bits, [N / 32 blocks][K / codes words][32 outputs]: a word holds 8 codes of 4 bits or 4 of 8 bits
   of one output, so that 64 bytes are 16 outputs and every instruction set can take codes apart lane by lane. 4-bit code j
   (bits 4j .. 4j+3) is column j/2 + 4 (j%2) of its word: then even and odd nibbles, masked, are four columns in order, as
   8-bit dot products want them, and equal nibbles of the two halves of a word are a pair, as bfloat16 dot products do.
   Codes enter products as they are; zero points are taken off with the sum of x over the group: sum (c - z) x = sum c x - z sum x. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define BLOCK 32
#define CHUNK 240  // rows of x that are converted at a time: a bound on memory
#define COLUMN4(j) ((j) / 2 + 4 * ((j) % 2))

typedef float v16f __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));

enum { FLOAT32, FLOAT16, BFLOAT16 };
enum { PORTABLE, AVX2, AVX512, AVX512_BF16 };

typedef struct {
    const uint32_t *weight;
    const float *scales, *zeros;  // [blocks][groups][32]; zeros NULL: zero for all
    float zero;
    long n, words, groups, group_words, stride;  // stride: elements of a row of x
    const void *x;           // rows of this chunk as the kernel wants them, padded with zeros
    const float *x_sums;     // [rows][groups]
    const float *x_scales;   // [rows], for int8
    void *y;                 // [rows][n]
    const void *bias;
    int dtype;
} Job;

static float half_to_float(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t bits;
    float f;
    if (rest >= 0x7c00)
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    else {
        // Shifted, the exponent is 112 too small; the multiplication also makes subnormal numbers right.
        bits = rest << 13;
        memcpy(&f, &bits, 4);
        f *= 0x1p112f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    memcpy(&f, &bits, 4);
    return f;
}

static uint16_t float_to_half(float f)
{
    uint32_t bits, magnitude;
    memcpy(&bits, &f, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return sign | 0x7e00;
    if (magnitude >= 0x477ff000)  // 65520 and above round to infinity
        return sign | 0x7c00;
    if (magnitude < 0x38800000) {  // below the normal numbers: adding 0.5 leaves the rounded mantissa in the low bits
        float tiny;
        memcpy(&tiny, &magnitude, 4);
        tiny += 0.5f;
        memcpy(&magnitude, &tiny, 4);
        return sign | (uint16_t)(magnitude - 0x3f000000);
    }
    magnitude += 0xc8000fff + (magnitude >> 13 & 1);  // exponent - 112, to nearest even
    return sign | (uint16_t)(magnitude >> 13);
}

static inline float bfloat_to_float(uint16_t b)
{
    const uint32_t bits = (uint32_t)b << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t float_to_bfloat(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline float element(const void *p, long i, int dtype)
{
    if (dtype == FLOAT32)
        return ((const float *)p)[i];
    const uint16_t bits = ((const uint16_t *)p)[i];
    return dtype == FLOAT16 ? half_to_float(bits) : bfloat_to_float(bits);
}

static void store(const Job *job, long m, long n0, const float *values)
{
    const long count = job->n - n0 < 16 ? job->n - n0 : 16;
    for (long i = 0; i < count; i++) {
        const float f = values[i] + (job->bias ? element(job->bias, n0 + i, job->dtype) : 0.0f);
        const long at = m * job->n + n0 + i;
        if (job->dtype == FLOAT32)
            ((float *)job->y)[at] = f;
        else
            ((uint16_t *)job->y)[at] = job->dtype == FLOAT16 ? float_to_half(f) : float_to_bfloat(f);
    }
}

/* ---- float32 tiles ---- */

#define DECODE4(w, j) __builtin_convertvector((v16i)((w) >> 4 * (j) & 15), v16f)
#define DECODE8(w, j) __builtin_convertvector((v16i)((w) >> 8 * (j) & 255), v16f)
#define NAME(f) f##_portable
#define HALVES 1
#define MAX_ROWS 2
#include "cpu_tile.h"
#undef NAME
#undef MAX_ROWS

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(f) f##_avx2
#define MAX_ROWS 4
#include "cpu_tile.h"
#undef NAME
#undef MAX_ROWS
#undef HALVES
#undef DECODE4
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
// A table of 16 floats, looked up by the low four bits of every lane.
#define DECODE4(w, j) (v16f) _mm512_permutexvar_ps((__m512i)((w) >> 4 * (j)), \
    _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))
#define NAME(f) f##_avx512
#define HALVES 2
#define MAX_ROWS 12
#include "cpu_tile.h"
#undef NAME
#pragma GCC pop_options

#include "cpu_dot_tiles.h"
#endif

/* ---- x as the tiles want it ---- */

enum { AS_FLOAT, AS_BFLOAT, AS_INT8 };

/* Row of x [k] -> `to` [stride] and its sums over groups; order: column i of W is column order[i] of x. */
static float prepare_row(const void *x, long k, int dtype, const int32_t *order, int form, long codes, void *to, long stride,
                         float *sums, long groups, long group_size)
{
    static const int pairs[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    float scale = 1.0f, inverse = 1.0f;
    (void)codes;
    if (form == AS_INT8) {
        float largest = 0.0f;
        for (long i = 0; i < k; i++) {
            const float f = element(x, i, dtype), a = f < 0 ? -f : f;
            largest = a > largest || a != a ? a : largest;
        }
        scale = largest > 0 ? largest / 127.0f : 1.0f;
        inverse = largest > 0 ? 127.0f / largest : 0.0f;
        if (!(largest <= 3.4e38f))  // Inf or NaN: the whole row shows it
            scale = largest, inverse = 0.0f;
    }
    for (long g = 0; g < groups; g++) {
        const long last = g + 1 < groups ? (g + 1) * group_size : k;
        float sum = 0.0f;
        for (long i = g * group_size; i < last; i++) {
            const float f = element(x, order ? order[i] : i, dtype);
            if (form == AS_FLOAT)
                ((float *)to)[i] = f, sum += f;
            else if (form == AS_INT8) {
                const float q = __builtin_rintf(f * inverse);
                ((int8_t *)to)[i] = (int8_t)(q == q ? q : 0);
                sum += q == q ? q : 0;
            } else {
                sum += f;
                ((uint16_t *)to)[i] = ((const uint16_t *)x)[order ? order[i] : i];
            }
        }
        sums[g] = sum;
    }
    const size_t size = form == AS_FLOAT ? 4 : form == AS_BFLOAT ? 2 : 1;
    memset((char *)to + k * size, 0, (stride - k) * size);
    if (form == AS_BFLOAT) {
        uint16_t *row = to, word[8];
        for (long i = 0; i < stride; i += 8) {
            memcpy(word, row + i, 16);
            for (int j = 0; j < 8; j++)
                row[i + j] = word[pairs[j]];
        }
    }
    return scale;
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
    const long codes = 32 / bits, words = (k + codes - 1) / codes, stride = words * codes;
    const long groups = (k + group_size - 1) / group_size, blocks = (n + BLOCK - 1) / BLOCK;
    const int form = int8 ? AS_INT8 : isa == AVX512_BF16 && dtype == BFLOAT16 && bits == 4 ? AS_BFLOAT : AS_FLOAT;
    const long size = form == AS_FLOAT ? 4 : form == AS_BFLOAT ? 2 : 1, element_size = dtype == FLOAT32 ? 4 : 2;
    const long chunk = m < CHUNK ? m : CHUNK;
    char *memory = malloc(chunk * (stride * size + groups * 4 + 4) + 64);
    if (!memory)
        return 1;
    float *x_scales = (float *)memory, *sums = x_scales + chunk;
    char *rows_of_x = (char *)(sums + chunk * groups);
    const int wide = isa >= AVX512 || int8;  // a tile has both halves of a block
    const int most = wide ? 12 : isa == AVX2 ? 4 : 2;
    for (long m0 = 0; m0 < m; m0 += chunk) {
        const long rows = m - m0 < chunk ? m - m0 : chunk;
        Job job = {weight, scales, zeros, zero, n, words, groups, group_size / codes, stride, rows_of_x, sums, x_scales,
                   (char *)y + m0 * n * element_size, bias, dtype};
        if (groups == 1)
            job.group_words = words;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (long r = 0; r < rows; r++)
                x_scales[r] = prepare_row((const char *)x + (m0 + r) * k * element_size, k, dtype, order, form, codes,
                                          rows_of_x + r * stride * size, stride, sums + r * groups, groups, group_size);
#pragma omp for schedule(static)
            for (long block = 0; block < blocks; block++)
                for (long r = 0; r < rows;) {
                    int count = most;
                    while (count > rows - r)
                        count = count == 12 ? 8 : count / 2;
#if defined(__x86_64__)
                    if (form == AS_BFLOAT)
                        run_bf16(&job, block, r, count);
                    else if (form == AS_INT8)
                        run_int8(&job, block, r, count);
                    else if (isa >= AVX512)
                        run_avx512(&job, block, 0, r, count, codes);
                    else if (isa == AVX2)
                        for (int half = 0; half < 2; half++)
                            run_avx2(&job, block, half, r, count, codes);
                    else
#endif
                        for (int half = 0; half < 2; half++)
                            run_portable(&job, block, half, r, count, codes);
                    r += count;
                }
        }
    }
    free(memory);
    return 0;
}
