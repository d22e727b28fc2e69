/* The inner loop of GPTQ, GPTAQ and FOEM on CPUs: a block of columns of a layer rounded from left to right, each one's error
   spread over those to its right (see foem_vllm/solver.py for the mathematics, cpu_solver.py for the arguments).

   Rows of a layer do not interact, so they are the lanes of a vector, and the block of 16 of them stays in the cache. */

#include <stddef.h>
#include <string.h>

#define LANES 16
#define COLUMNS 128

typedef float v16f __attribute__((vector_size(64)));
typedef int v16i __attribute__((vector_size(64)));

typedef struct {
    const float *w, *V, *P, *scales, *zeros, *target, *alpha, *beta;
    float *points, *errors, *seen;
    const int *groups;
    long columns, rows, first, unpulled, V_stride, P_stride;
    float mid;
} Block;

static inline __attribute__((always_inline)) v16f load(const float *from, long count)
{
    v16f v = {0};
    memcpy(&v, from, count * sizeof(float));
    return v;
}

static inline __attribute__((always_inline)) v16f where(v16i condition, v16f a, v16f b)
{
    return (v16f)((condition & (v16i)a) | (~condition & (v16i)b));
}

#ifdef __x86_64__
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
static void round_rows(const Block *b, long row, long count)
{
    v16f tile[COLUMNS];
    for (long i = 0; i < b->columns; i++)
        tile[i] = load(b->w + i * b->rows + row, count);
    const v16f alpha = b->alpha ? load(b->alpha + row, count) : (v16f){0};
    const v16f beta = b->beta ? load(b->beta + row, count) : (v16f){0};
    const long bytes = count * sizeof(float);
    for (long i = 0; i < b->columns; i++) {
        v16f column = tile[i], target = {0};
        if (b->target)
            target = load(b->target + i * b->rows + row, count);
        if (b->target && (b->first + i) % b->unpulled)
            column -= beta * (column - target);
        const v16f scale = load(b->scales + b->groups[i] * b->rows + row, count);
        v16f low = (v16f){0} - b->mid, high = (v16f){0} + (b->mid - 1);
        if (b->zeros) {
            low = -load(b->zeros + b->groups[i] * b->rows + row, count);
            high = low + (2 * b->mid - 1);
        }
        // Lanes beyond the last row divide by 1; bounds are whole numbers, so rounding may come after them. Adding 1.5 * 2^23 and
        // taking it off again rounds to nearest, ties to even.
        v16f point = column / where(scale == 0, (v16f){0} + 1, scale);
        point = where(point < low, low, point);
        point = where(point > high, high, point) + 12582912.0f - 12582912.0f;
        v16f error = column - point * scale;
        if (b->target)
            error -= beta * (column - target);
        memcpy(b->points + i * b->rows + row, &point, bytes);
        memcpy(b->errors + i * b->rows + row, &error, bytes);
        const float *V = b->V + i * b->V_stride;
        if (b->P) {
            const v16f seen = alpha * column;
            const float *P = b->P + i * b->P_stride;
            memcpy(b->seen + i * b->rows + row, &seen, bytes);
            for (long j = i + 1; j < b->columns; j++)
                tile[j] = tile[j] - V[j] * error + P[j] * seen;
        } else
            for (long j = i + 1; j < b->columns; j++)
                tile[j] -= V[j] * error;
    }
}

/* Returns 0, or 1 when there are more columns than COLUMNS. */
int foem_cpu_quantize_block(const float *w, const float *V, long V_stride, float *points, float *errors, const float *scales,
                            const float *zeros, const int *groups, float mid, const float *beta, const float *target, long first,
                            long unpulled, const float *P, long P_stride, const float *alpha, float *seen, long columns, long rows,
                            int threads)
{
    const Block b = {w, V, P, scales, zeros, target, alpha, beta, points, errors, seen, groups, columns, rows, first, unpulled,
                     V_stride, P_stride, mid};
    if (columns > COLUMNS)
        return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row += LANES)
        round_rows(&b, row, rows - row < LANES ? rows - row : LANES);
    return 0;
}
