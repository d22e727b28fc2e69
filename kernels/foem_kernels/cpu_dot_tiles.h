// Tiles of cpu_w4a16.c in the dot products of AVX-512: bfloat16 (AVX-512 BF16) and int8 (AVX-512 VNNI) activations, 4-bit codes.

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
/* bfloat16 x and 4-bit codes, two columns at a time: exact products, float32 sums. */
static inline __attribute__((always_inline)) void tile_bf16(const Job *job, long block, long m0, const int rows)
{
    const int chains = rows == 1 ? 4 : rows == 2 ? 2 : 1;
    const uint32_t *weight = job->weight + block * job->words * BLOCK;
    const float *scales = job->scales + block * job->groups * BLOCK;
    const float *zeros = job->zeros ? job->zeros + block * job->groups * BLOCK : NULL;
    // 0 .. 15 in bfloat16, twice: of a lane's low five bits the fifth belongs to the next code.
    static const uint16_t numbers[16] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                         0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)numbers));
    __m512 total[12][2], sum[12][2][4];
    for (int r = 0; r < rows; r++)
        total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (long g = 0; g < job->groups; g++) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int c = 0; c < chains; c++)
                sum[r][0][c] = sum[r][1][c] = _mm512_setzero_ps();
        const long last = g + 1 < job->groups ? (g + 1) * job->group_words : job->words;
        for (long i = g * job->group_words; i < last; i++) {
            __m512i w0 = _mm512_loadu_si512(weight + i * BLOCK), w1 = _mm512_loadu_si512(weight + i * BLOCK + 16);
            const uint16_t *x = (const uint16_t *)job->x + m0 * job->stride + i * 8;
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) {
                const __m512bh d0 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(w0, 4 * s), table);
                const __m512bh d1 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(w1, 4 * s), table);
#pragma GCC unroll 16
                for (int r = 0; r < rows; r++) {
                    int32_t pair;
                    memcpy(&pair, x + r * job->stride + 2 * s, 4);
                    const __m512bh b = (__m512bh)_mm512_set1_epi32(pair);
                    sum[r][0][s % chains] = _mm512_dpbf16_ps(sum[r][0][s % chains], b, d0);
                    sum[r][1][s % chains] = _mm512_dpbf16_ps(sum[r][1][s % chains], b, d1);
                }
            }
        }
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const __m512 s = _mm512_loadu_ps(scales + g * BLOCK + 16 * h);
            const __m512 z = zeros ? _mm512_loadu_ps(zeros + g * BLOCK + 16 * h) : _mm512_set1_ps(job->zero);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                __m512 whole = sum[r][h][0];
#pragma GCC unroll 4
                for (int c = 1; c < chains; c++)
                    whole = _mm512_add_ps(whole, sum[r][h][c]);
                whole = _mm512_fnmadd_ps(z, _mm512_set1_ps(job->x_sums[(m0 + r) * job->groups + g]), whole);
                total[r][h] = _mm512_fmadd_ps(s, whole, total[r][h]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++)
            store(job, m0 + r, block * BLOCK + 16 * h, (const float *)&total[r][h]);
}

static void run_bf16(const Job *job, long block, long m0, int rows)
{
    switch (rows) {
        case 1: tile_bf16(job, block, m0, 1); break;
        case 2: tile_bf16(job, block, m0, 2); break;
        case 4: tile_bf16(job, block, m0, 4); break;
        case 8: tile_bf16(job, block, m0, 8); break;
        case 12: tile_bf16(job, block, m0, 12); break;
    }
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")
/* int8 x and 4-bit codes, four columns at a time. */
static inline __attribute__((always_inline)) void tile_int8(const Job *job, long block, long m0, const int rows)
{
    const int chains = rows <= 2 ? 2 : 1;
    const uint32_t *weight = job->weight + block * job->words * BLOCK;
    const float *scales = job->scales + block * job->groups * BLOCK;
    const float *zeros = job->zeros ? job->zeros + block * job->groups * BLOCK : NULL;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 total[12][2];
    __m512i sum[12][2][2];
    for (int r = 0; r < rows; r++)
        total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (long g = 0; g < job->groups; g++) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int c = 0; c < chains; c++)
                sum[r][0][c] = sum[r][1][c] = _mm512_setzero_si512();
        const long last = g + 1 < job->groups ? (g + 1) * job->group_words : job->words;
        for (long i = g * job->group_words; i < last; i++) {
            const __m512i w0 = _mm512_loadu_si512(weight + i * BLOCK), w1 = _mm512_loadu_si512(weight + i * BLOCK + 16);
            const int8_t *x = (const int8_t *)job->x + m0 * job->stride + i * 8;
#pragma GCC unroll 2
            for (int s = 0; s < 2; s++) {
                const __m512i d0 = _mm512_and_si512(s ? _mm512_srli_epi32(w0, 4) : w0, low);
                const __m512i d1 = _mm512_and_si512(s ? _mm512_srli_epi32(w1, 4) : w1, low);
#pragma GCC unroll 16
                for (int r = 0; r < rows; r++) {
                    int32_t four;
                    memcpy(&four, x + r * job->stride + 4 * s, 4);
                    const __m512i b = _mm512_set1_epi32(four);
                    sum[r][0][s % chains] = _mm512_dpbusd_epi32(sum[r][0][s % chains], d0, b);
                    sum[r][1][s % chains] = _mm512_dpbusd_epi32(sum[r][1][s % chains], d1, b);
                }
            }
        }
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const __m512 s = _mm512_loadu_ps(scales + g * BLOCK + 16 * h);
            const __m512 z = zeros ? _mm512_loadu_ps(zeros + g * BLOCK + 16 * h) : _mm512_set1_ps(job->zero);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                __m512i all = chains == 2 ? _mm512_add_epi32(sum[r][h][0], sum[r][h][1]) : sum[r][h][0];
                __m512 whole = _mm512_cvtepi32_ps(all);
                whole = _mm512_fnmadd_ps(z, _mm512_set1_ps(job->x_sums[(m0 + r) * job->groups + g]), whole);
                total[r][h] = _mm512_fmadd_ps(s, whole, total[r][h]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++) {
            const __m512 y = _mm512_mul_ps(total[r][h], _mm512_set1_ps(job->x_scales[m0 + r]));
            store(job, m0 + r, block * BLOCK + 16 * h, (const float *)&y);
        }
}

static void run_int8(const Job *job, long block, long m0, int rows)
{
    switch (rows) {
        case 1: tile_int8(job, block, m0, 1); break;
        case 2: tile_int8(job, block, m0, 2); break;
        case 4: tile_int8(job, block, m0, 4); break;
        case 8: tile_int8(job, block, m0, 8); break;
        case 12: tile_int8(job, block, m0, 12); break;
    }
}
#pragma GCC pop_options
