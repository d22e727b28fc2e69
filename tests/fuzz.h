/* What the fuzzers of the CPU kernels share: numbers that are the same everywhere, and which instruction sets there are. */

#include <stdint.h>

static uint64_t state = 1;

static inline uint32_t next(uint32_t below)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % below;
}

/* How many of portable, AVX2 and AVX-512 this machine has. */
static inline int instruction_sets(void)
{
#ifdef __x86_64__
    return __builtin_cpu_supports("avx512f") ? 3 : __builtin_cpu_supports("avx2") ? 2 : 1;
#else
    return 1;
#endif
}
