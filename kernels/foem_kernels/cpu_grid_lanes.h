/* The search of cpu_grid.c in one instruction set. Included once for each, with

   NAME(f)  f with the suffix of the instruction set
   LANES    rows in a vector
   TARGET   what lets functions use the instruction set */

typedef float NAME(floats) __attribute__((vector_size(4 * LANES)));
typedef int NAME(ints) __attribute__((vector_size(4 * LANES)));
typedef double NAME(doubles) __attribute__((vector_size(8 * LANES)));
typedef double NAME(half) __attribute__((vector_size(4 * LANES)));
typedef struct { NAME(half) half[2]; } NAME(Sum);  // doubles, in vectors that a register holds

/* Of `count` rows, `step` apart; lanes beyond them are one more of the last. */
INLINE NAME(floats) NAME(gather)(const float *from, long step, long count)
{
    float lanes[LANES];
    NAME(floats) v;
    for (long i = 0; i < LANES; i++)
        lanes[i] = from[(i < count ? i : count - 1) * step];
    memcpy(&v, lanes, sizeof v);
    return v;
}

/* A tile of `columns` columns. Where rows are far apart, often by a power of two, one is read to its end before the next. */
INLINE void NAME(fill)(const Search *s, const float *from, long count, long columns, NAME(floats) *tile)
{
    if (s->next_row == 1 && count == LANES)
        for (long c = 0; c < columns; c++)
            memcpy(tile + c, from + c * s->next_column, sizeof *tile);
    else
        for (long i = 0; i < LANES; i++)
            for (long c = 0; c < columns; c++)
                ((float *)(tile + c))[i] = from[(i < count ? i : count - 1) * s->next_row + c * s->next_column];
}

INLINE NAME(floats) NAME(where)(NAME(ints) condition, NAME(floats) a, NAME(floats) b)
{
    return (NAME(floats))((condition & (NAME(ints))a) | (~condition & (NAME(ints))b));
}

/* `total` and the errors of a tile's columns. Bounds are whole numbers, so rounding may come after them; adding 1.5 * 2^23 and
   taking it off again rounds to nearest, ties to even. A point times a scale is exact: 8 bits times the 11 of float16. */
INLINE NAME(Sum) NAME(add_errors)(const NAME(floats) *tile, const float *importance, long columns, NAME(floats) scale,
                                  NAME(floats) low, NAME(floats) high, NAME(Sum) total)
{
    for (long c = 0; c < columns; c++) {
        NAME(floats) point = tile[c] / scale;
        point = NAME(where)(point < low, low, point);
        point = NAME(where)(point > high, high, point) + 12582912.0f - 12582912.0f;
        const NAME(floats) error = point * scale - tile[c];
        const NAME(doubles) term = __builtin_convertvector(error * error * importance[c], NAME(doubles));
        NAME(half) half[2];
        memcpy(half, &term, sizeof half);
        total.half[0] += half[0];
        total.half[1] += half[1];
    }
    return total;
}

/* The best levels of up to LANES rows of one group. */
TARGET static void NAME(search)(const Search *s, long row, long group)
{
    const long count = s->rows - row < LANES ? s->rows - row : LANES, first = row * s->groups + group;
    NAME(Sum) totals[LEVELS] = {{{{0}}}};
    NAME(floats) tile[TILE];
    for (long from = 0; from < s->columns; from += TILE) {
        const long columns = s->columns - from < TILE ? s->columns - from : TILE;
        NAME(fill)(s, s->w + row * s->next_row + group * s->next_group + from * s->next_column, count, columns, tile);
        for (long level = 0; level < s->levels; level++) {
            const long at = level * s->rows * s->groups + first;
            const NAME(floats) scale = NAME(gather)(s->scales + at, s->groups, count);
            const NAME(floats) low = s->zeros ? -NAME(gather)(s->zeros + at, s->groups, count) : (NAME(floats)){0} - s->mid;
            totals[level] = NAME(add_errors)(tile, s->importance + group * s->columns + from, columns, scale, low,
                                             low + (2 * s->mid - 1), totals[level]);
        }
    }
    for (long i = 0; i < count; i++)
        s->best[first + i * s->groups] = least((const double *)totals + i, LANES, s->levels);
}

#undef NAME
#undef LANES
#undef TARGET
