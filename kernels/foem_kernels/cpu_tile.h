/* Tiles of y = x W^T in one instruction set. Included by cpu_w4a16.c once for each, which defines

   NAME(f)             f with the suffix of the instruction set
   FORM                how x enters products: AS_FLOAT, AS_BFLOAT or AS_INT8
   LANES, VECTOR(t)    outputs in a vector, and the vector of as many f (float), u (uint32_t), i (int32_t)
   SUM                 t of the sums; START(values), TOTAL(sum) convert them from and to floats
   CODES               t of what DECODE(w, s, bits) makes of words: the codes that step s multiplies by one unit of x
   DOT(sum, x, d)      sum + the products of the unit at x with d
   VECTORS, ROWS       of a tile, at most: so many sums stay in registers
   SUMS                so many at least: their additions do not wait for one another */

INLINE void NAME(tile)(const Piece *p, int first, const int rows, const int bits, float *totals)
{
    const int steps = STEPS(FORM, bits), chains = VECTORS * rows < SUMS ? SUMS / (VECTORS * rows) : 1;
    const uint32_t *x = p->x, *weight[VECTORS];
    const float *scales[VECTORS];
    VECTOR(f) zero[VECTORS];
    VECTOR(SUM) sum[ROWS][VECTORS][8];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
        const int output = first + v * LANES;
        weight[v] = p->weight + output / BLOCK * p->next_weight + output % BLOCK;
        scales[v] = p->scales + output / BLOCK * p->next_scale + output % BLOCK;
        __builtin_prefetch(scales[v] + GROUPS_AHEAD * BLOCK);
        if (p->zeros)
            memcpy(&zero[v], p->zeros + (scales[v] - p->scales), sizeof zero[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            sum[r][v][0] = START(p->zeros ? p->x_sums[r] * zero[v] : (VECTOR(f)){0} + p->x_sums[r]);
#pragma GCC unroll 8
            for (int c = 1; c < chains; c++)
                sum[r][v][c] = (VECTOR(SUM)){0};
        }
    for (long i = 0; i < p->words; i++, x += steps * rows) {
        VECTOR(u) w[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            memcpy(&w[v], weight[v] + i * BLOCK, sizeof w[v]);
            __builtin_prefetch((const char *)(weight[v] + i * BLOCK) + AHEAD);
        }
#pragma GCC unroll 8
        for (int s = 0; s < steps; s++) {
            VECTOR(CODES) d[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                d[v] = DECODE(w[v], s, bits);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    sum[r][v][s % chains] = DOT(sum[r][v][s % chains], x + s * rows + r, d[v]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
        VECTOR(f) scale, total;
        memcpy(&scale, scales[v], sizeof scale);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            float *to = totals + r * PAIR + first + v * LANES;
#pragma GCC unroll 8
            for (int c = 1; c < chains; c++)
                sum[r][v][0] += sum[r][v][c];
            memcpy(&total, to, sizeof total);
            total += scale * TOTAL(sum[r][v][0]);
            memcpy(to, &total, sizeof total);
        }
    }
}

#define TILE(n) case n: NAME(tile)(&p, v, n < ROWS ? n : ROWS, bits, at); break;

/* All rows of x times the 64 outputs of two blocks, `block` and the next. */
INLINE void NAME(pair)(const Job *job, long block, const int bits, float *totals)
{
    Piece p = {.next_weight = job->words * BLOCK, .next_scale = job->groups * BLOCK};
    memset(totals, 0, job->rows * PAIR * sizeof *totals);
    for (long from = 0, number = 0; from < job->words; from += p.words, number++) {
        const long scales = (block * job->groups + from / job->group_words) * BLOCK;
        p.words = piece_words(job, from);
        p.weight = job->weight + (block * job->words + from) * BLOCK;
        p.scales = job->scales + scales;
        p.zeros = job->zeros ? job->zeros + scales : NULL;
        for (long t = 0, r = 0, rows; t < job->tiles; t++, r += rows) {
            rows = job->tile_rows + (t < job->larger);
            float *at = totals + r * PAIR;
            p.x = job->x + (from * job->rows + r * p.words) * STEPS(FORM, bits);
            p.x_sums = job->x_sums + number * job->rows + r;
            for (int v = 0; v < PAIR; v += VECTORS * LANES)
                switch (rows) { TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) }
        }
    }
    store(job, block * BLOCK, totals);
}
#undef TILE

static void NAME(run)(const Job *job, long block, float *totals)
{
    if (job->bits == 4)
        NAME(pair)(job, block, 4, totals);
    else
        NAME(pair)(job, block, 8, totals);
}

static void NAME(prepare)(const Job *job, long tile, float *row)
{
    if (job->bits == 4)
        prepare_tile(job, tile, FORM, 4, row);
    else
        prepare_tile(job, tile, FORM, 8, row);
}

#undef NAME
#undef FORM
#undef LANES
#undef VECTOR
#undef SUM
#undef START
#undef TOTAL
#undef CODES
#undef DECODE
#undef DOT
#undef VECTORS
#undef ROWS
#undef SUMS
