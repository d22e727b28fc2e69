/* The descent of cpu_descent.c in one instruction set. Included once for each, with

   NAME(f)  f with the suffix of the instruction set
   LANES    columns in a vector
   TARGET   what lets functions use the instruction set */

typedef float NAME(floats) __attribute__((vector_size(4 * LANES)));
typedef int NAME(ints) __attribute__((vector_size(4 * LANES)));

INLINE NAME(floats) NAME(load)(const float *from)
{
    NAME(floats) v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE NAME(ints) NAME(where)(NAME(ints) condition, NAME(ints) a, NAME(ints) b)
{
    return (condition & a) | (~condition & b);
}

/* A row's slope += size * (h * by), unless h is NULL; the column whose step, up or down, then gains most, the first of equal ones;
   -1 where none gains. */
INLINE long NAME(pass)(float *slope, const float *size, const float *up, const float *down, long columns, const float *h, float by)
{
    NAME(floats) least = {0};
    NAME(ints) at = {0}, here = {0};
    for (long lane = 0; lane < LANES; lane++)
        here[lane] = lane;
    for (long c = 0; c < columns; c += LANES, here += LANES) {
        NAME(floats) now = NAME(load)(slope + c);
        if (h) {
            const NAME(floats) change = NAME(load)(h + c) * by, moved = NAME(load)(size + c) * change;
            now += moved;
            memcpy(slope + c, &now, sizeof now);
        }
        const NAME(floats) a = NAME(load)(up + c) + now, b = NAME(load)(down + c) - now;
        const NAME(floats) gain = (NAME(floats))NAME(where)(a < b, (NAME(ints))a, (NAME(ints))b);
        const NAME(ints) better = gain < least;
        least = (NAME(floats))NAME(where)(better, (NAME(ints))gain, (NAME(ints))least);
        at = NAME(where)(better, here, at);
    }
    long best = -1;
    float lowest = 0;
    for (long lane = 0; lane < LANES; lane++)
        if (least[lane] < lowest || (least[lane] == lowest && best >= 0 && at[lane] < best))
            lowest = least[lane], best = at[lane];
    return best;
}

/* One row; costs: room for two rows of floats. Returns how many steps it took. */
TARGET static long NAME(descend)(const Descent *d, long row, float *costs)
{
    unsigned char *codes = d->codes + row * d->columns;
    float *slope = d->slope + row * d->columns, *up = costs, *down = costs + d->columns;
    const float *size = d->size + row * d->columns, *cost = d->cost + row * d->columns;
    for (long c = 0; c < d->columns; c++) {
        up[c] = codes[c] == d->top ? __builtin_inff() : cost[c];
        down[c] = codes[c] == 0 ? __builtin_inff() : cost[c];
    }
    long taken = 0;
    for (long c = NAME(pass)(slope, size, up, down, d->columns, NULL, 0); c >= 0 && taken < d->steps;) {
        const int direction = slope[c] > 0 ? -1 : 1;
        codes[c] += direction;
        up[c] = codes[c] == d->top ? __builtin_inff() : cost[c];
        down[c] = codes[c] == 0 ? __builtin_inff() : cost[c];
        if (++taken < d->steps)
            c = NAME(pass)(slope, size, up, down, d->columns, d->H + c * d->columns, direction * size[c]);
    }
    return taken;
}

#undef NAME
#undef LANES
#undef TARGET
