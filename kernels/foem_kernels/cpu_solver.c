/* The inner loop of GPTQ, GPTAQ and FOEM on CPUs: a block of columns of a layer rounded from left to right, each one's error
   spread over those to its right (see foem_vllm/solver.py for the mathematics, cpu_solver.py for the arguments).

   Rows of a layer do not interact, so they are the lanes of vectors, and a block of 32 of them stays in the cache. STEP columns
   are rounded before their errors are spread over all others: each of those is then read and written once a step. */

#include <stddef.h>
#include <string.h>

#define LANES 16
#define VECTORS 2  // independent, so that one computes while the other waits
#define ROWS (VECTORS * LANES)
#define STEP 8
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

// A whole vector is copied by one instruction, not by a call.
static inline __attribute__((always_inline)) v16f load(const float *from, long count)
{
    v16f v = {0};
    if (count == LANES)
        memcpy(&v, from, sizeof v);
    else
        memcpy(&v, from, count * sizeof(float));
    return v;
}

static inline __attribute__((always_inline)) void store(float *to, v16f v, long count)
{
    if (count == LANES)
        memcpy(to, &v, sizeof v);
    else
        memcpy(to, &v, count * sizeof(float));
}

static inline __attribute__((always_inline)) v16f where(v16i condition, v16f a, v16f b)
{
    return (v16f)((condition & (v16i)a) | (~condition & (v16i)b));
}

typedef struct { v16f v[VECTORS]; } Column;  // a column's values in a block of rows

/* A block of rows. Columns of a layer are far apart in memory, often by a power of two: they are copied here and back at once. */
typedef struct {
    const Block *b;
    Column values[COLUMNS];  // of w; once a column is rounded, its points
    Column errors[COLUMNS];  // until then its target
    Column seen[COLUMNS];
    Column alpha, beta;
    long row, counts[VECTORS];  // how many lanes of each vector are rows
} Rows;

static inline __attribute__((always_inline)) Column load_column(const Rows *r, const float *from)
{
    Column c;
    for (int h = 0; h < VECTORS; h++)
        c.v[h] = load(from + r->row + h * LANES, r->counts[h]);
    return c;
}

static inline __attribute__((always_inline)) void store_columns(const Rows *r, const Column *columns, float *to)
{
    for (long i = 0; i < r->b->columns; i++)
        for (int h = 0; h < VECTORS; h++)
            store(to + i * r->b->rows + r->row + h * LANES, columns[i].v[h], r->counts[h]);
}

/* Ask for a column of the next block of rows: from column to column nobody can foresee an address. */
static inline __attribute__((always_inline)) void fetch_column(const Rows *r, long i)
{
    for (int h = 0; h < VECTORS; h++) {
        const long at = i * r->b->rows + r->row + ROWS + h * LANES;
        __builtin_prefetch(r->b->w + at, 0, 2);
        if (r->b->target)
            __builtin_prefetch(r->b->target + at, 0, 2);
    }
}

static inline __attribute__((always_inline)) void round_column(Rows *r, long i)
{
    const Block *b = r->b;
    const Column scales = load_column(r, b->scales + b->groups[i] * b->rows);
    const Column zeros = b->zeros ? load_column(r, b->zeros + b->groups[i] * b->rows) : scales;
    const int pulled = b->target && (b->first + i) % b->unpulled;
    for (int h = 0; h < VECTORS; h++) {
        const v16f scale = scales.v[h], target = r->errors[i].v[h], beta = r->beta.v[h];
        v16f column = r->values[i].v[h];
        if (pulled)
            column -= beta * (column - target);
        v16f low = (v16f){0} - b->mid, high = (v16f){0} + (b->mid - 1);
        if (b->zeros) {
            low = -zeros.v[h];
            high = low + (2 * b->mid - 1);
        }
        // Lanes beyond the last row divide by 1; bounds are whole numbers, so rounding may come after them. Adding 1.5 * 2^23
        // and taking it off again rounds to nearest, ties to even.
        v16f point = column / where(scale == 0, (v16f){0} + 1, scale);
        point = where(point < low, low, point);
        point = where(point > high, high, point) + 12582912.0f - 12582912.0f;
        v16f error = column - point * scale;
        if (b->target)
            error -= beta * (column - target);
        r->values[i].v[h] = point;
        r->errors[i].v[h] = error;
        r->seen[i].v[h] = r->alpha.v[h] * column;
    }
}

/* Columns begin .. end - 1 get what the `count` rounded columns from `from` on spread over them. */
static inline __attribute__((always_inline)) void spread(Rows *r, long from, long count, long begin, long end, int drifts)
{
    const Block *b = r->b;
    const float *V = b->V + from * b->V_stride, *P = drifts ? b->P + from * b->P_stride : NULL;
    for (long j = begin; j < end; j++) {
        Column sum = r->values[j];
        for (long i = 0; i < count; i++)
            for (int h = 0; h < VECTORS; h++) {
                sum.v[h] -= V[i * b->V_stride + j] * r->errors[from + i].v[h];
                if (drifts)
                    sum.v[h] += P[i * b->P_stride + j] * r->seen[from + i].v[h];
            }
        r->values[j] = sum;
    }
}

static inline __attribute__((always_inline)) void round_all(Rows *r, int drifts)
{
    const long columns = r->b->columns;
    for (long from = 0; from < columns; from += STEP) {
        const long end = from + STEP < columns ? from + STEP : columns;
        for (long i = from; i < end; i++)
            fetch_column(r, i);
        for (long i = from; i < end; i++) {
            round_column(r, i);
            spread(r, i, 1, i + 1, end, drifts);
        }
        if (end < columns)
            spread(r, from, STEP, end, columns, drifts);
    }
}

#ifdef __x86_64__
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
static void round_rows(const Block *b, long row)
{
    Rows r;
    r.b = b, r.row = row;
    for (int h = 0; h < VECTORS; h++) {
        const long left = b->rows - row - h * LANES;
        r.counts[h] = left < 0 ? 0 : left < LANES ? left : LANES;
    }
    const Column none = {{{0}}};
    r.alpha = b->alpha ? load_column(&r, b->alpha) : none;
    r.beta = b->beta ? load_column(&r, b->beta) : none;
    for (long i = 0; i < b->columns; i++)
        r.values[i] = load_column(&r, b->w + i * b->rows);
    for (long i = 0; i < b->columns; i++)
        r.errors[i] = b->target ? load_column(&r, b->target + i * b->rows) : none;
    if (b->P)
        round_all(&r, 1);
    else
        round_all(&r, 0);
    store_columns(&r, r.values, b->points);
    store_columns(&r, r.errors, b->errors);
    if (b->P)
        store_columns(&r, r.seen, b->seen);
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
    for (long row = 0; row < rows; row += ROWS)
        round_rows(&b, row);
    return 0;
}
