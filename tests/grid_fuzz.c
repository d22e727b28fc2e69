/* Random problems for cpu_grid.c, in buffers that end where the data does, against a plain loop over one range after the other.

   make sanitize       (AddressSanitizer, UBSan)

   Argument: how many problems. Exit code 1 at the first wrong result. */

#include "cpu_grid.c"
#include "fuzz.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static float *random_floats(long count, float low, float high)
{
    float *values = malloc(count * sizeof(float));
    for (long i = 0; i < count; i++)
        values[i] = low + (high - low) * (next(1 << 20) / (float)(1 << 20));
    return values;
}

/* The level that one range is rounded best at; terms are floats, their sum a double, errors floats again. */
static long expected(const Search *s, long row, long group)
{
    float least = INFINITY;
    long best = 0;
    for (long level = 0; level < s->levels; level++) {
        const long at = (level * s->rows + row) * s->groups + group;
        const float zero = s->zeros ? s->zeros[at] : s->mid;
        double sum = 0;
        for (long c = 0; c < s->columns; c++) {
            const float w = s->w[row * s->next_row + group * s->next_group + c * s->next_column];
            const float code = fminf(fmaxf(rintf(w / s->scales[at]) + zero, 0), 2 * s->mid - 1);
            const float error = (code - zero) * s->scales[at] - w;
            sum += (double)(error * error * s->importance[group * s->columns + c]);
        }
        if ((float)sum < least)
            least = (float)sum, best = level;
    }
    return best;
}

int main(int argc, char **argv)
{
    const int problems = argc > 1 ? atoi(argv[1]) : 100, last = instruction_sets();
    for (int done = 0; done < problems; done++) {
        const long rows = 1 + next(40), groups = 1 + next(4), columns = 1 + next(next(4) ? 40 : 300), levels = 1 + next(LEVELS);
        const long ranges = rows * groups, form = next(3), pad = form == 2 ? next(5) : 0;
        const float mid = 1 << (1 + next(7));
        float *w = random_floats((ranges - 1) * (columns + pad) + columns, -1, 1), *importance = random_floats(groups * columns, 0, 1);
        float *scales = random_floats(levels * ranges, 0.25f / mid, 1.5f / mid), *zeros = next(2) ? malloc(levels * ranges * 4) : NULL;
        for (long i = 0; i < levels * ranges; i++) {
            scales[i] = roundf(scales[i] * 16384) / 16384;  // few bits, as float16 has; 0 < scale
            if (zeros)
                zeros[i] = next(2 * (int)mid);
        }
        long *best = malloc(ranges * sizeof(long));
        Search s = {.w = w, .importance = importance, .scales = scales, .zeros = zeros, .mid = mid, .levels = levels,
                    .rows = rows, .groups = groups, .columns = columns, .best = best,
                    .next_row = groups * (columns + pad), .next_group = columns + pad, .next_column = 1};
        if (form == 1)  // columns are far apart, rows beside each other
            s.next_row = 1, s.next_group = columns * rows, s.next_column = rows;
        const int isa = next(last);
        const int failed = foem_cpu_search_grid(w, s.next_row, s.next_group, s.next_column, importance, scales, zeros, mid, levels,
                                                rows, groups, columns, best, isa, 1 + next(3));
        for (long i = 0; i < ranges; i++)
            if (failed || best[i] != expected(&s, i / groups, i % groups))
                return printf("problem %d: isa %d, rows %ld, groups %ld, columns %ld, levels %ld: %ld at %ld, not %ld\n", done, isa,
                              rows, groups, columns, levels, best[i], i, expected(&s, i / groups, i % groups)), 1;
        free(w), free(importance), free(scales), free(zeros), free(best);
    }
    return printf("%d problems, none wrong\n", problems), 0;
}
