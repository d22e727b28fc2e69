/* Rows of x on their way into cpu_w4a16.c and rows of y on their way out: number formats, int8, the order in which tiles read.
   INLINE functions become part of their callers, so that the compiler makes the most of each one's instruction set. */

#define INLINE static inline __attribute__((always_inline))

static inline float half_to_float(uint16_t h)
{
    const uint32_t rest = h & 0x7fff;
    // Shifted, the exponent is 112 too small; the multiplication also makes subnormal numbers right.
    uint32_t bits = rest << 13;
    float f;
    memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    memcpy(&bits, &f, 4);
    bits = (rest >= 0x7c00 ? 0x7f800000 | rest << 13 : bits) | (uint32_t)(h & 0x8000) << 16;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t float_to_half(float f)
{
    uint32_t bits, tiny;
    memcpy(&bits, &f, 4);
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;  // exponent - 112, to nearest even
    memcpy(&f, &magnitude, 4);
    f += 0.5f;  // of numbers below the normal ones, it leaves the rounded mantissa in the low bits
    memcpy(&tiny, &f, 4);
    uint32_t half = magnitude < 0x38800000 ? tiny - 0x3f000000 : normal;
    half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // 65520 and above round to infinity
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    return half | (bits >> 16 & 0x8000);
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
    return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline float element(const void *p, long i, int dtype)
{
    if (dtype == FLOAT32)
        return ((const float *)p)[i];
    const uint16_t bits = ((const uint16_t *)p)[i];
    return dtype == FLOAT16 ? half_to_float(bits) : bfloat_to_float(bits);
}

INLINE void convert_row(const Job *job, long r, const int dtype, float *to, long count)
{
    const void *from = (const char *)job->source + r * job->k * (dtype == FLOAT32 ? 4 : 2);
    if (job->order)
        for (long i = 0; i < job->k; i++)
            to[i] = element(from, job->order[i], dtype);
    else
        for (long i = 0; i < job->k; i++)
            to[i] = element(from, i, dtype);
    memset(to + job->k, 0, (count - job->k) * 4);
}

/* row [count] -> whole numbers up to 127 of the scale that is returned. */
INLINE float quantize_row(float *row, long count)
{
    uint32_t most = 0;
    for (long i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, row + i, 4);
        bits &= 0x7fffffff;  // NaN is above infinity, that above all numbers
        most = bits > most ? bits : most;
    }
    float largest;
    memcpy(&largest, &most, 4);
    const int finite = most < 0x7f800000;  // if not, the scale is Inf or NaN, all else zero: the whole row shows it
    const float scale = !most ? 1.0f : finite ? largest / 127.0f : largest, inverse = most && finite ? 127.0f / largest : 0.0f;
    for (long i = 0; i < count; i++) {
        const float q = __builtin_rintf(row[i] * inverse);
        row[i] = finite ? q : 0.0f;
    }
    return scale;
}

INLINE uint32_t unit(const float *word, int s, const int form, const int bits)
{
    uint32_t all = 0;
    for (int e = 0; e < ELEMENTS(form); e++) {
        const int j = e * STEPS(form, bits) + s;
        const float f = word[bits == 4 ? COLUMN4(j) : j];
        uint32_t whole;
        memcpy(&whole, &f, 4);
        all |= form == AS_FLOAT ? whole : form == AS_BFLOAT ? whole >> 16 << 16 * e : (uint32_t)(uint8_t)(int32_t)f << 8 * e;
    }
    return all;
}

INLINE float sum_of(const float *values, long count)
{
    float lanes[16] = {0}, sum = 0.0f;
    long i = 0;
    for (; i + 16 <= count; i += 16)
        for (int l = 0; l < 16; l++)
            lanes[l] += values[i + l];
    for (; i < count; i++)
        sum += values[i];
    for (int l = 0; l < 16; l++)
        sum += lanes[l];
    return sum;
}

/* The rows of a tile: converted in `row` one after another, then shared out to the pieces. */
INLINE void prepare_tile(const Job *job, long tile, const int form, const int bits, float *row)
{
    const long first = tile_start(job, tile), rows = tile_start(job, tile + 1) - first;
    const long codes = 32 / bits, steps = STEPS(form, bits);
    const float times = job->zeros ? -1.0f : -job->zero;
    for (long r = 0; r < rows; r++) {
        switch (job->dtype) {
            case FLOAT32: convert_row(job, first + r, FLOAT32, row, job->words * codes); break;
            case FLOAT16: convert_row(job, first + r, FLOAT16, row, job->words * codes); break;
            default: convert_row(job, first + r, BFLOAT16, row, job->words * codes);
        }
        job->x_scales[first + r] = form == AS_INT8 ? quantize_row(row, job->words * codes) : 1.0f;
        long number = 0;
        for (long from = 0, words; from < job->words; from += words, number++) {
            words = piece_words(job, from);
            uint32_t *to = job->x + (from * job->rows + first * words) * steps + r;
            for (long i = 0; i < words; i++)
#pragma GCC unroll 8
                for (int s = 0; s < steps; s++, to += rows)
                    *to = unit(row + (from + i) * codes, s, form, bits);
            job->x_sums[number * job->rows + first + r] = times * sum_of(row + from * codes, words * codes);
        }
    }
}

INLINE void store_row(const Job *job, long r, long first, const int dtype, const float *totals)
{
    const long count = job->n - first < PAIR ? job->n - first : PAIR;
    const float scale = job->x_scales[r];
    float y[PAIR];
    for (long i = 0; i < count; i++)
        y[i] = totals[i] * scale;
    if (job->bias)
        for (long i = 0; i < count; i++)
            y[i] += element(job->bias, first + i, dtype);
    for (long i = 0; i < count; i++)
        if (dtype == FLOAT32)
            ((float *)job->y)[r * job->n + first + i] = y[i];
        else
            ((uint16_t *)job->y)[r * job->n + first + i] = dtype == FLOAT16 ? float_to_half(y[i]) : float_to_bfloat(y[i]);
}

/* totals [rows][64] -> y. */
INLINE void store(const Job *job, long first, const float *totals)
{
    for (long r = 0; r < job->rows; r++)
        switch (job->dtype) {
            case FLOAT32: store_row(job, r, first, FLOAT32, totals + r * PAIR); break;
            case FLOAT16: store_row(job, r, first, FLOAT16, totals + r * PAIR); break;
            default: store_row(job, r, first, BFLOAT16, totals + r * PAIR);
        }
}
