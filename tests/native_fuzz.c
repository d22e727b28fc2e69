/* Random problems for cpu_w4a16.c, in buffers that end where the data does, against a plain loop in double.

   make sanitize       (AddressSanitizer, UBSan; valgrind where it is installed)

   Arguments: how many problems [seed]. Exit code 1 at the first wrong result. */

#define CHUNK 32  // several of them
#include "cpu_w4a16.c"
#include "fuzz.h"

#include <math.h>
#include <stdio.h>

static double uniform(void)
{
    return next(1 << 20) / (double)(1 << 20);
}

int main(int argc, char **argv)
{
    const int problems = argc > 1 ? atoi(argv[1]) : 100;
    state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    for (int done = 0; done < problems; done++) {
        const int bits = next(3) ? 4 : 8, codes = 32 / bits, dtype = next(3), asymmetric = next(2), ordered = next(2);
        const long group_size = codes * (1 + next(next(4) ? 8 : 80)), groups = 1 + next(4), whole = group_size * groups;
        const long k = ordered || next(2) ? whole : whole - next(group_size);
        const long n = 1 + next(80), m = 1 + next(next(10) ? 20 : 300), blocks = (n + PAIR - 1) / PAIR * 2;
        const long words = (k + codes - 1) / codes, size = dtype == FLOAT32 ? 4 : 2;
        const int isa = next(foem_cpu_isa() + 1), int8 = foem_cpu_has_int8() && !next(4);
        uint32_t *weight = calloc(blocks * words * BLOCK, 4);
        float *scales = calloc(blocks * groups * BLOCK, 4), *zeros = asymmetric ? calloc(blocks * groups * BLOCK, 4) : NULL;
        int32_t *order = ordered ? malloc(k * 4) : NULL;
        void *x = malloc(m * k * size), *y = malloc(m * n * size), *bias = next(2) ? malloc(n * size) : NULL;
        double *W = malloc(n * k * 8);
        for (long i = 0; i < k && order; i++)
            order[i] = i;
        for (long i = k - 1; i > 0 && order; i--) {
            const long j = next(i + 1);
            const int32_t t = order[i];
            order[i] = order[j], order[j] = t;
        }
        for (long i = 0; i < n; i++)
            for (long g = 0; g < groups; g++) {
                const long at = ((i / BLOCK) * groups + g) * BLOCK + i % BLOCK;
                scales[at] = 0.01f + (float)uniform();
                if (zeros)
                    zeros[at] = next(1 << bits);
            }
        for (long i = 0; i < n; i++)
            for (long c = 0; c < k; c++) {
                const uint32_t code = next(1 << bits);
                int place = c % codes;
                for (int j = 0; bits == 4 && j < 8; j++)
                    if (COLUMN4(j) == c % codes)
                        place = j;
                weight[((i / BLOCK) * words + c / codes) * BLOCK + i % BLOCK] |= code << bits * place;
                const long at = ((i / BLOCK) * groups + c / group_size) * BLOCK + i % BLOCK;
                W[i * k + (order ? order[c] : c)] = scales[at] * ((double)code - (zeros ? zeros[at] : 1 << (bits - 1)));
            }
        for (long i = 0; i < m * k + (bias ? n : 0); i++) {
            const float f = (float)(uniform() - 0.5);
            void *to = i < m * k ? x : bias;
            const long at = i < m * k ? i : i - m * k;
            if (dtype == FLOAT32)
                ((float *)to)[at] = f;
            else
                ((uint16_t *)to)[at] = dtype == FLOAT16 ? float_to_half(f) : float_to_bfloat(f);
        }
        if (foem_cpu_w4a16(x, m, k, dtype, weight, n, bits, group_size, scales, zeros, 1 << (bits - 1), order, bias, y, isa, int8,
                           1 + next(3)))
            return 1;
        const double unit = dtype == FLOAT32 ? 0x1p-24 : dtype == FLOAT16 ? 0x1p-11 : 0x1p-8;
        for (long r = 0; r < m; r++)
            for (long i = 0; i < n; i++) {
                double sum = bias ? element(bias, i, dtype) : 0.0, terms = fabs(sum), largest = 0.0;
                for (long c = 0; c < k; c++) {
                    const double a = element(x, r * k + c, dtype);
                    sum += a * W[i * k + c], terms += fabs(W[i * k + c]);
                    largest = fmax(largest, fabs(a));
                }
                const double relative = (k * 0x1p-22 + (int8 ? 0.5 / 127 : 0)) * (int8 ? largest : 1);
                const double bound = unit * fabs(sum) + relative * terms + 1e-4;
                if (!(fabs(element(y, r * n + i, dtype) - sum) <= 1.01 * bound)) {
                    printf("wrong: m %ld n %ld k %ld bits %d group %ld dtype %d isa %d int8 %d: [%ld, %ld] is %g, not %g\n", m, n,
                           k, bits, group_size, dtype, isa, int8, r, i, element(y, r * n + i, dtype), sum);
                    return 1;
                }
            }
        free(weight), free(scales), free(zeros), free(order), free(x), free(y), free(bias), free(W);
    }
    printf("%d problems\n", problems);
    return 0;
}
