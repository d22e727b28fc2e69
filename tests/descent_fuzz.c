/* Random problems for cpu_descent.c, in buffers that end where the data does, against a plain loop over one column after the other.

   make sanitize       (AddressSanitizer, UBSan)

   Argument: how many problems. Exit code 1 at the first wrong result. */

#include "cpu_descent.c"
#include "fuzz.h"

#include <math.h>
#include <stdio.h>

/* Few bits, so that every order of adding gives the same. */
static float *random_floats(long count, int low, int high)
{
    float *values = malloc(count * sizeof(float));
    for (long i = 0; i < count; i++)
        values[i] = (low + (int)next(high - low + 1)) / 4.0f;
    return values;
}

/* One row as the comment in descent.py says; returns its steps. */
static long expected(unsigned char *codes, float *slope, const float *size, const float *cost, const float *H, long columns,
                     int top, long steps)
{
    for (long taken = 0; taken < steps; taken++) {
        long best = -1;
        float least = 0;
        for (long c = 0; c < columns; c++) {
            const float up = codes[c] < top ? cost[c] + slope[c] : INFINITY, down = codes[c] ? cost[c] - slope[c] : INFINITY;
            if (fminf(up, down) < least)
                least = fminf(up, down), best = c;
        }
        if (best < 0)
            return taken;
        const int direction = slope[best] > 0 ? -1 : 1;
        codes[best] += direction;
        for (long c = 0; c < columns; c++)
            slope[c] += size[c] * (H[best * columns + c] * (direction * size[best]));
    }
    return steps;
}

int main(int argc, char **argv)
{
    const int problems = argc > 1 ? atoi(argv[1]) : 100, last = instruction_sets();
    for (int done = 0; done < problems; done++) {
        const long rows = 1 + next(12), columns = WIDEST * (1 + next(6)), count = rows * columns, steps = 1 + next(30);
        const int top = (1 << (1 + next(8))) - 1;
        unsigned char *codes = malloc(count), *wanted = malloc(count);
        for (long i = 0; i < count; i++)
            codes[i] = wanted[i] = next(top + 1);
        float *slope = random_floats(count, -40, 40), *size = random_floats(count, 1, 4), *cost = random_floats(count, 0, 20);
        float *H = random_floats(columns * columns, -8, 8), *plain = malloc(count * sizeof(float));
        memcpy(plain, slope, count * sizeof(float));
        long taken = -1, total = 0;
        const int isa = next(last);
        int wrong = foem_cpu_descend(codes, slope, size, cost, H, rows, columns, top, steps, &taken, isa, 1 + next(3));
        for (long row = 0; row < rows; row++)
            total += expected(wanted + row * columns, plain + row * columns, size + row * columns, cost + row * columns, H,
                              columns, top, steps);
        wrong |= taken != total || memcmp(codes, wanted, count);
        if (wrong)
            return printf("problem %d: isa %d, rows %ld, columns %ld, top %d: %ld steps of %ld\n", done, isa, rows, columns, top,
                          taken, total), 1;
        free(codes), free(wanted), free(slope), free(size), free(cost), free(H), free(plain);
    }
    long none;
    if (foem_cpu_descend(NULL, NULL, NULL, NULL, NULL, 1, WIDEST + 1, 3, 1, &none, 0, 1) != 1)
        return printf("columns that are no multiple of %d were taken\n", WIDEST), 1;
    return printf("%d problems, none wrong\n", problems), 0;
}
