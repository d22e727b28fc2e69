// One tile of y = x W^T in float32, on vectors of 16 outputs. Included once for every instruction set: NAME(f) is f with its
// suffix, DECODE4(w, j) and DECODE8(w, j) are code j of 16 words as 16 floats, HALVES how many of a block's two vectors a tile has.

static inline __attribute__((always_inline)) void NAME(tile)(const Job *job, long block, int half, long m0, const int rows,
                                                             const int codes)
{
    const int chains = rows == 1 ? 4 : rows == 2 ? 2 : 1;  // independent sums hide the latency of a multiply-add
    const uint32_t *weight = job->weight + block * job->words * BLOCK + 16 * half;
    const float *scales = job->scales + block * job->groups * BLOCK + 16 * half;
    const float *zeros = job->zeros ? job->zeros + block * job->groups * BLOCK + 16 * half : NULL;
    v16f total[MAX_ROWS][HALVES], sum[MAX_ROWS][HALVES][4];
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < HALVES; h++)
            total[r][h] = (v16f){0};
    for (long g = 0; g < job->groups; g++) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int h = 0; h < HALVES; h++)
#pragma GCC unroll 4
                for (int c = 0; c < chains; c++)
                    sum[r][h][c] = (v16f){0};
        const long last = g + 1 < job->groups ? (g + 1) * job->group_words : job->words;
        for (long i = g * job->group_words; i < last; i++) {
            v16u w[HALVES];
#pragma GCC unroll 2
            for (int h = 0; h < HALVES; h++)
                memcpy(&w[h], weight + i * BLOCK + 16 * h, 64);
            const float *x = (const float *)job->x + m0 * job->stride + i * codes;
#pragma GCC unroll 8
            for (int j = 0; j < codes; j++) {
                v16f d[HALVES];
#pragma GCC unroll 2
                for (int h = 0; h < HALVES; h++)
                    d[h] = codes == 8 ? DECODE4(w[h], j) : DECODE8(w[h], j);
#pragma GCC unroll 16
                for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
                    for (int h = 0; h < HALVES; h++)
                        sum[r][h][j % chains] += x[r * job->stride + (codes == 8 ? COLUMN4(j) : j)] * d[h];
            }
        }
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; h++) {
            v16f s, z = (v16f){0} + job->zero;
            memcpy(&s, scales + g * BLOCK + 16 * h, 64);
            if (zeros)
                memcpy(&z, zeros + g * BLOCK + 16 * h, 64);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                v16f whole = sum[r][h][0];
#pragma GCC unroll 4
                for (int c = 1; c < chains; c++)
                    whole += sum[r][h][c];
                total[r][h] += s * (whole - z * job->x_sums[(m0 + r) * job->groups + g]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < HALVES; h++)
            store(job, m0 + r, block * BLOCK + 16 * (half + h), (const float *)&total[r][h]);
}

#define ROWS(n) case n: if (codes == 8) NAME(tile)(job, block, half, m0, n, 8); else NAME(tile)(job, block, half, m0, n, 4); break;

static void NAME(run)(const Job *job, long block, int half, long m0, int rows, int codes)
{
    switch (rows) {
        ROWS(1) ROWS(2)
#if MAX_ROWS >= 4
        ROWS(4)
#endif
#if MAX_ROWS >= 12
        ROWS(8) ROWS(12)
#endif
    }
}
#undef ROWS
