/* Which of a few grids rounds a range of weights with the least squared error, on CPUs (see grid.py for what is computed).

   Every term is the float that the loop in torch computes. Terms are summed in double, one column after the other, so that what is
   found depends neither on the instruction set, nor on threads, nor on how weights lie in memory.

   Rows are the lanes of vectors, so that sums need no lane but their own. TILE columns of a few rows are laid side by side once,
   in the first-level cache, and serve all levels. */

#include <string.h>

#define TILE 128
#define LEVELS 32
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *w;  // [rows][groups][columns], with these steps from one to the next:
    long next_row, next_group, next_column;
    const float *importance;  // [groups][columns]
    const float *scales, *zeros;  // [levels][rows][groups]; zeros NULL: mid everywhere
    float mid;
    long levels, rows, groups, columns;
    long *best;  // [rows][groups]
} Search;

/* The first of the least of `levels` sums that are `step` apart, each as a float. */
static inline long least(const double *sums, long step, long levels)
{
    float least = __builtin_inff();
    long best = 0;
    for (long level = 0; level < levels; level++)
        if ((float)sums[level * step] < least)
            least = (float)sums[level * step], best = level;
    return best;
}

#define NAME(f) f##_portable
#define LANES 4
#define TARGET
#include "cpu_grid_lanes.h"

#ifdef __x86_64__
#define NAME(f) f##_avx2
#define LANES 8
#define TARGET __attribute__((target("avx2")))
#include "cpu_grid_lanes.h"

#define NAME(f) f##_avx512
#define LANES 16
#define TARGET __attribute__((target("avx512f")))
#include "cpu_grid_lanes.h"
#endif

/* best = the level whose error is least, the first of equal ones. isa: 0 portable, 1 AVX2, beyond AVX-512. Returns 0, or 1 when
   there are more levels than LEVELS. */
int foem_cpu_search_grid(const float *w, long next_row, long next_group, long next_column, const float *importance,
                         const float *scales, const float *zeros, float mid, long levels, long rows, long groups, long columns,
                         long *best, int isa, int threads)
{
    const Search s = {w, next_row, next_group, next_column, importance, scales, zeros, mid, levels, rows, groups, columns, best};
    void (*search)(const Search *, long, long) = search_portable;
    long lanes = 4;
    if (levels > LEVELS)
        return 1;
#ifdef __x86_64__
    if (isa)
        search = isa > 1 ? search_avx512 : search_avx2, lanes = isa > 1 ? 16 : 8;
#endif
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row += lanes)
        for (long group = 0; group < groups; group++)
            search(&s, row, group);
    return 0;
}
