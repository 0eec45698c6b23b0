// The inner loops of the product, one implementation for each instruction set.
//
// Tiles. Output rows are worked on 16 at a time, one a lane. Columns are worked on in units of 64: the
// 16 bytes that a plane has for a row's 64 columns are 4 words of 32 bits, and each word holds four
// groups of four columns, one group for every position q of a code in its byte. `unpack` turns a unit
// of 16 rows into 1024 bytes,
//
//     codes[unit][word i][q][row][e] = code at column 64 unit + 16 i + 4 e + q,
//
// so that the four columns of a group lie side by side as an integer dot product wants them, and rows
// beside each other: no sum over lanes is ever needed. It is also the layout of an AMX tile. Inputs are
// brought into the same order of columns once a call: in every 16 of them, a transposed 4 by 4.
//
// Numbers. Codes carry an offset that keeps them, escapes added, within 0 ... 127, so that every
// instruction set can multiply them. With c the codes, o = offset + zero point, x the input,
//
//     tile[t][row] = Σ_g scale_tg ( Σ_{j in g} c_j q_tj − floor(o) Σ_{j in g} q_tj ),   x_tj ≈ scale_tg q_tj
//
// exactly within a group g of columns (no sum reaches 2^24) and in float32 over the groups, in their
// order: what a token's result is depends on no other token and on no number of threads. Of a float32
// model x is not rounded: tile[t][row] = Σ_j (c_j − o) x_tj, all in float32.

#pragma once

#include <cstddef>
#include <cstdint>

// Before a loop whose arrays are to stay in registers.
#define UNROLLED _Pragma("GCC unroll 16")

namespace deltamux {

constexpr int LANES = 16;
constexpr int UNIT_COLUMNS = 64;
constexpr int UNIT_PLANE_BYTES = 16;
constexpr int UNIT_CODES = LANES * UNIT_COLUMNS;
// Units of a block of escapes: codes are unpacked as many columns at a time.
constexpr int RUN_UNITS = 64;
// Units whose inputs share a scale; a rest of less than half as many joins the group before.
constexpr int GROUP_UNITS = 8, GROUP_BITS = 9;
constexpr int PANEL = 16;
// The offset of codes that have escapes: what these come to is −16 at least (see `planes.py`).
constexpr int ESCAPE_OFFSET = 16;
// Blocks of 16 rows that are ever worked on at once.
constexpr int MOST_AT_ONCE = 4;

enum Type { BFLOAT16, FLOAT16, FLOAT32 };

// The inputs of one slot's tokens as `multiply` reads them. Tokens stand in panels of 16 and a last one
// of what is left; a panel of P tokens holds [units][P][64], the columns of a unit in the order of codes.
// Kernels that work on whole panels get a last one of 16 too, with anything behind its tokens.
struct Inputs {
    const int8_t *levels;
    const float *exact;   // float32 models only, instead of the other three
    const float *scales;  // [tokens][groups]
    const float *sums;    // [tokens][groups] of levels
    int tokens, units, groups;
    bool whole_panels;
};

// The codes of `units` units from the `first`-th on, which starts a run, of 16 times `blocks` rows:
// [blocks][units][1024]. `extra` is what escapes that are no part of them add (see `multiply_planes`), or null.
struct Codes {
    const uint8_t *codes;
    int first, units, blocks;
    const int32_t *extra;
};

// Units of the group that begins with a unit, of `left` units of its run.
inline int units_of_group(int left) { return left < GROUP_UNITS + GROUP_UNITS / 2 ? left : GROUP_UNITS; }

inline int count_groups(int units) {
    int groups = units / RUN_UNITS * (RUN_UNITS / GROUP_UNITS);
    for (int left = units % RUN_UNITS; left > 0; left -= units_of_group(left)) groups++;
    return groups;
}

inline int panel_tokens(int tokens, int panel) {
    int left = tokens - panel * PANEL;
    return left < PANEL ? left : PANEL;
}

// The escapes of up to 16 rows in one block of columns: those of a row begin at its start and end at the
// next, and there are `blocks` starts a row.
struct EscapeRows {
    const uint16_t *escapes;
    const uint32_t *starts;
    int blocks, count;
};

// Rows of y; that of a token starts `stride` bytes behind the one of the row before.
struct Outputs {
    char *first;
    ptrdiff_t stride;
    const int64_t *order;
    Type type;
};

// Asks for what the next 16 rows' unit will be read from, of one plane.
inline void fetch_unit(const uint8_t *ahead, int unit) {
    constexpr int BYTES = LANES * UNIT_PLANE_BYTES, LINE = 64;
    for (int at = 0; at < BYTES; at += LINE) __builtin_prefetch(ahead + ptrdiff_t(unit) * BYTES + at);
}

// Blocks of 16 rows that it pays to multiply at once (all but AMX take one), and whether the last panel of
// inputs is a whole one too.
struct Layout {
    int blocks;
    bool whole_panels;
    bool escapes_apart;  // by `sum_escapes`
    bool from_planes;    // by `multiply_planes`
};

// Sixteen rows of planes that lie behind each other; plane 1 lies `second` bytes behind plane 0, 0: there is
// one. `ahead` is what comes next.
struct PlaneRows {
    const uint8_t *first;
    ptrdiff_t stride, second;
    const uint8_t *ahead;
};


struct Kernels {
    const char *name;

    // Rounds a row to 8 bits a group, zeros up to a whole unit; a unit's levels lie `stride` behind
    // those of the unit before.
    void (*quantize)(const void *x, Type type, int columns, int8_t *levels, ptrdiff_t stride,
                     float *scales, float *sums);

    // A row as float32 in its own order.
    void (*widen)(const void *x, Type type, int columns, float *wide);

    // Units of up to 16 rows of one or two planes; rows[lane] is a row's first byte in plane 0, that of
    // plane 1 lies `second` bytes behind it; 0: one plane. What comes next lies at `ahead`, and as far
    // behind it in plane 1: as much as is read here is asked for, a little with every unit.
    void (*unpack)(const uint8_t *const rows[LANES], ptrdiff_t second, const uint8_t *ahead, int units,
                   int offset, uint8_t *codes);

    // Adds escapes to the codes of a block of columns.
    void (*add_escapes)(const EscapeRows &rows, uint8_t *codes);

    // Adds to tiles [blocks][tokens][16] as above, or sets them where the codes are of the first columns;
    // `zero` is floor(o), that of the exact one o itself.
    void (*multiply)(const Codes &codes, const Inputs &inputs, float zero, float *tiles);
    void (*multiply_exact)(const Codes &codes, const Inputs &inputs, float zero, float *tiles);

    // The same sums for few tokens, straight from planes; absent where nothing is gained. `extra` is what
    // escapes add, Σ_{j in g} d_j q_tj as [groups][tokens][16], or null.
    void (*multiply_planes)(const PlaneRows &planes, const Inputs &inputs, float zero, const int32_t *extra,
                            float *tile);

    // The levels of up to four tokens by column, [columns][4].
    void (*interleave)(const int8_t *levels, ptrdiff_t stride, int tokens, int units, int32_t *out);

    // The sums of escapes of a block of columns, from x [tokens / 4][x_columns][4]; false: there are too many.
    bool (*sum_escapes)(const EscapeRows &rows, const int32_t *x, int x_columns, int tokens, int groups,
                        int32_t *sums);

    // Σ_j a_j x_j in float32.
    float (*dot)(const void *a, Type type, const float *x, int columns);
    float (*dot_int8)(const int8_t *a, const float *x, int columns);

    // tile[t][lane] *= steps[lane]
    void (*scale)(const float *steps, int tokens, float *tile);

    // tile[t][lane] += Σ_r values[r][lane] h[t][r]
    void (*add_outer)(const float *values, const float *h, ptrdiff_t h_stride, int tokens, int rank,
                      float *tile);

    // y[order[t]][16 b + lane] += steps[16 b + lane] tiles[b][t][lane] for the first `lanes` outputs, each
    // rounded once.
    void (*add_to)(const float *tiles, const float *steps, int tokens, const Outputs &y, int lanes);

    // How so many tokens of a slot are multiplied.
    Layout (*layout)(int tokens);

    // Called by a thread before and after its products; may be absent.
    void (*begin)();
    void (*end)();
};

}  // namespace deltamux
