// Which outputs and which coded rows the 16 lanes of a tile stand for.

#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "record.h"

namespace deltamux {

struct Lanes {
    int first_coded, coded;  // rows of the planes, in the first lanes
    int count;               // outputs
    int outputs[LANES];      // of the slice
    bool side_by_side;       // outputs follow each other, and every one is coded
};

inline int divide_up(int value, int unit) { return (value + unit - 1) / unit; }

// The row that is the rank-th of those with codes.
inline int row_of_rank(const Record &record, int rows, int rank) {
    const uint32_t *map = record.row_map;
    int low = 0, high = divide_up(rows, 32);
    while (high - low > 1) {
        int middle = (low + high) / 2;
        (int(map[2 * size_t(middle) + 1]) <= rank ? low : high) = middle;
    }
    uint32_t bits = map[2 * size_t(low)];
    for (int skip = rank - int(map[2 * size_t(low) + 1]); skip > 0; skip--) bits &= bits - 1;
    return low * 32 + __builtin_ctz(bits);
}

// The block-th 16 of the outputs of a slice of `rows` rows.
inline Lanes lanes_of_outputs(const Record &record, int rows, int block) {
    int start = block * LANES;
    Lanes lanes;
    lanes.count = std::min(LANES, rows - start);
    for (int lane = 0; lane < LANES; lane++) lanes.outputs[lane] = start + lane;
    lanes.first_coded = rank_of_row(record, start);
    lanes.coded = std::clamp(record.rows - start, 0, lanes.count);
    if (record.row_map) {
        lanes.coded = 0;
        for (int lane = 0; lane < lanes.count; lane++) lanes.coded += row_is_coded(record, start + lane);
    }
    lanes.side_by_side = lanes.coded == lanes.count || !record.row_map;
    return lanes;
}

// The block-th 16 of the rows that have codes.
inline Lanes lanes_of_coded(const Record &record, int rows, int block) {
    Lanes lanes;
    lanes.first_coded = block * LANES;
    lanes.count = lanes.coded = std::min(LANES, record.rows - lanes.first_coded);
    int row = row_of_rank(record, rows, lanes.first_coded);
    for (int lane = 0; lane < lanes.count; row++) {
        if (row_is_coded(record, row)) lanes.outputs[lane++] = row;
    }
    lanes.side_by_side = lanes.outputs[lanes.count - 1] == lanes.outputs[0] + lanes.count - 1;
    return lanes;
}

// Moves lanes of a tile from the order of coded rows to that of outputs.
inline void spread(const Record &record, const Lanes &lanes, int tokens, float *tile) {
    for (int t = 0; t < tokens; t++, tile += LANES) {
        int coded = lanes.coded;
        for (int lane = lanes.count - 1; lane >= 0; lane--) {
            bool filled = row_is_coded(record, lanes.outputs[lane]);
            tile[lane] = filled ? tile[--coded] : 0.0f;
        }
    }
}

// Rows of planes by 16; the last of a weight, which may be fewer, are copied, and repeated.
inline PlaneRows plane_rows(const Record &record, const Lanes &lanes, uint8_t *copied) {
    size_t stride = size_t(record.stride), start = size_t(lanes.first_coded) * stride;
    const uint8_t *planes[2] = {record.plane0 + start, record.plane1 + start};
    for (int plane = 0; lanes.coded < LANES && plane < record.planes; plane++) {
        for (int lane = 0; lane < LANES; lane++, copied += stride) {
            std::memcpy(copied, planes[plane] + size_t(std::min(lane, lanes.coded - 1)) * stride, stride);
        }
        planes[plane] = copied - LANES * stride;
    }
    ptrdiff_t second = record.planes == 2 ? planes[1] - planes[0] : 0;
    return {planes[0], record.stride, second, record.plane0 + start + LANES * stride};
}

// Codes of a run of units.
inline void unpack_rows(const Kernels &kernels, const Record &record, const Lanes &lanes, int unit, int units,
                        int offset, uint8_t *codes) {
    if (record.planes == 0 || lanes.coded == 0) {
        std::memset(codes, offset, size_t(units) * UNIT_CODES);
        return;
    }
    const uint8_t *rows[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        // Lanes without a row of their own repeat the last one; nothing reads what comes of them.
        int row = lanes.first_coded + std::min(lane, lanes.coded - 1);
        rows[lane] = record.plane0 + size_t(row) * record.stride + unit * UNIT_PLANE_BYTES;
    }
    ptrdiff_t second = record.planes == 2 ? record.plane1 - record.plane0 : 0;
    const uint8_t *ahead = record.plane0 + size_t(lanes.first_coded + LANES) * record.stride;
    kernels.unpack(rows, second, ahead + unit * LANES * UNIT_PLANE_BYTES, units, offset, codes);
}

// What a tile's lanes are multiplied with.
inline void steps_of(const Record &record, const Lanes &lanes, float *steps) {
    std::fill(steps, steps + LANES, record.step);
    for (int lane = 0; record.steps && lane < lanes.coded; lane++) {
        steps[lane] = float_of_bfloat16(record.steps[lanes.first_coded + lane]);
    }
}

}  // namespace deltamux
