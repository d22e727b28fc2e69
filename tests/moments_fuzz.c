/* Random problems for cpu_moments.c, in buffers that end where the data does, against a plain loop in double.

   make sanitize       (AddressSanitizer, UBSan; valgrind where it is installed and knows AVX-512)

   Argument: how many problems. Exit code 1 at the first wrong result. */

#include "cpu_moments.c"
#include "fuzz.h"

#include <math.h>
#include <stdio.h>

static float widened(uint16_t h)
{
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static uint16_t *random_rows(long tokens, long columns)
{
    uint16_t *rows = malloc(tokens * columns * sizeof(uint16_t));
    for (long i = 0; i < tokens * columns; i++)
        rows[i] = (uint16_t)(next(2) << 15 | (120 + next(10)) << 7 | next(128));  // +- 2^-7 .. 2^3
    return rows;
}

/* How far sums [rows][columns] are from A^T X, over what the products add up to without their signs; below: of which tiles. */
static double worst(const float *sums, const uint16_t *a, const uint16_t *minus, const uint16_t *x, const float *weights, long tokens,
                    long rows, long columns, int upper)
{
    double found = 0;
    for (long r = 0; r < rows; r++)
        for (long c = upper ? r : 0; c < columns; c++) {
            double expected = 0, size = 1e-30;
            for (long t = 0; t < tokens; t++) {
                const double left = widened(a[t * rows + r]) - (minus ? widened(minus[t * rows + r]) : 0.0);
                const double one = left * widened(x[t * columns + c]) * (weights ? weights[t] * (double)weights[t] : 1.0);
                expected += one, size += fabs(one);
            }
            found = fmax(found, fabs(sums[r * columns + c] - expected) / size);
        }
    return found;
}

int main(int argc, char **argv)
{
    if (!__builtin_cpu_supports("avx512bf16"))
        return puts("cpu_moments needs AVX-512 BF16: nothing to do"), 0;
    const int amx = foem_cpu_has_amx(), problems = argc > 1 ? atoi(argv[1]) : 100;
    for (int done = 0; done < problems; done++) {
        const long tokens = 1 + next(600), k = 1 + next(100), n = 1 + next(80);
        uint16_t *x = random_rows(tokens, k), *then = random_rows(tokens, n), *now = random_rows(tokens, n);
        float *weights = next(2) ? malloc(tokens * sizeof(float)) : NULL, *gram = calloc(k * k, 4), *cross = calloc(n * k, 4);
        for (long t = 0; weights && t < tokens; t++)
            weights[t] = next(1000) / 500.0f;
        const int with = next(2), tiles = amx && next(2);
        const int failed = foem_cpu_add_moments(x, k, tokens, k, weights, gram, then, n, now, n, n, with ? cross : NULL, tiles,
                                                1 + next(3));
        const double g = worst(gram, x, NULL, x, weights, tokens, k, k, 1);
        const double c = with ? worst(cross, then, now, x, weights, tokens, n, k, 0) : 0;
        if (failed || g > (weights ? 0x1p-7 : 1e-5) || c > 0x1p-7)
            return printf("problem %d: tokens %ld, k %ld, n %ld, tiles %d: %d, %g, %g\n", done, tokens, k, n, tiles, failed, g, c), 1;
        free(x), free(then), free(now), free(weights), free(gram), free(cross);
    }
    return printf("%d problems%s, none wrong\n", problems, amx ? ", half of them with AMX" : ""), 0;
}
