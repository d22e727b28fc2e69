/* Coordinate descent on the codes of a layer, a row at a time, on CPUs (see descent.py for what is computed).

   A step is one pass over a row: what the last step changed is added, and the next best one looked for, while both are in the
   first-level cache. Every product is rounded before it is added, as in the loop in torch, so the codes are the same. */

#include <stdlib.h>
#include <string.h>

#pragma GCC optimize("fp-contract=off")

#define WIDEST 16  // lanes; columns must be a multiple of it
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    unsigned char *codes;  // [rows][columns]
    float *slope;  // like codes
    const float *size, *cost;  // like codes
    const float *H;  // [columns][columns], symmetric
    long columns, steps;
    int top;
} Descent;

#define NAME(f) f##_portable
#define LANES 4
#define TARGET
#include "cpu_descent_lanes.h"

#ifdef __x86_64__
#define NAME(f) f##_avx2
#define LANES 8
#define TARGET __attribute__((target("avx2")))
#include "cpu_descent_lanes.h"

#define NAME(f) f##_avx512
#define LANES 16
#define TARGET __attribute__((target("avx512f")))
#include "cpu_descent_lanes.h"
#endif

/* Changes codes and slope; *taken = how many steps. isa: 0 portable, 1 AVX2, beyond AVX-512. Returns 0, 1 when columns are no
   multiple of WIDEST, 2 when there is no memory. */
int foem_cpu_descend(unsigned char *codes, float *slope, const float *size, const float *cost, const float *H, long rows,
                     long columns, int top, long steps, long *taken, int isa, int threads)
{
    const Descent d = {codes, slope, size, cost, H, columns, steps, top};
    long (*descend)(const Descent *, long, float *) = descend_portable;
    long total = 0;
    int failed = 0;
    if (columns % WIDEST)
        return 1;
#ifdef __x86_64__
    if (isa)
        descend = isa > 1 ? descend_avx512 : descend_avx2;
#endif
#pragma omp parallel num_threads(threads) reduction(+ : total) reduction(| : failed)
    {
        float *costs = malloc(2 * columns * sizeof(float));
        failed |= !costs;
#pragma omp for schedule(dynamic, 4)
        for (long row = 0; row < rows; row++)
            if (costs)
                total += descend(&d, row, costs);
        free(costs);
    }
    *taken = total;
    return failed ? 2 : 0;
}
