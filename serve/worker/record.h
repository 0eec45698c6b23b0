// One record of a slot image's table, as pointers and numbers.
//
// What the fields mean is written in `compression/image/layout.py`. Offsets count 64-byte units from
// the start of the image, 0 stands for "absent"; all numbers are little-endian.

#pragma once

#include <cstdint>
#include <cstring>

namespace deltamux {

constexpr int HEADER_BYTES = 128;
constexpr int RECORD_FIELDS = 32;
constexpr int OFFSET_UNIT = 64;
// Columns of a block of escapes, whose column fills 12 bits.
constexpr int BLOCK_BITS = 12;
constexpr int BLOCK_COLUMNS = 1 << BLOCK_BITS;
// What an escape's upper four bits hold for "nothing added".
constexpr int MIDDLE = 8;

enum Field {
    PLANES,
    ROWS,
    COLUMNS,
    STRIDE,
    PLANE0,
    PLANE1,
    ZERO,
    STEP,
    STEPS,
    STARTS,
    ESCAPES,
    BLOCKS,
    ROW_MAP,
    CHANNELS,
    CHANNEL_INDEX,
    CHANNEL_VALUES,
    RANK,
    FACTOR_KIND,
    RIGHT,
    LEFT,
    RIGHT_STEPS,
    LEFT_STEPS,
    VECTOR,
};

enum FactorKind { NO_FACTORS, FACTORS_BFLOAT16, FACTORS_FLOAT32, FACTORS_INT8 };

struct Record {
    int planes, rows, stride;
    float zero, step;
    const uint8_t *plane0, *plane1;
    const uint16_t *steps;
    const uint32_t *starts;
    const uint16_t *escapes;
    int blocks;
    const uint32_t *row_map;
    int channels;
    const int32_t *channel_index;
    const uint16_t *channel_values;
    int rank, factor_kind;
    const uint8_t *right, *left;
    const float *right_steps, *left_steps;
    const float *vector;

    // Whether its codes or escapes change anything.
    bool coded() const { return rows > 0 && (planes > 0 || escapes); }
    bool empty() const { return !coded() && channels == 0 && rank == 0 && !vector; }
};

inline float float_of_bits(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float float_of_bfloat16(uint16_t half) { return float_of_bits(int32_t(uint32_t(half) << 16)); }

inline Record read_record(const uint8_t *image, int entry) {
    int32_t field[RECORD_FIELDS];
    std::memcpy(field, image + HEADER_BYTES + sizeof field * size_t(entry), sizeof field);
    auto at = [&](int index) -> const uint8_t * {
        return field[index] ? image + size_t(uint32_t(field[index])) * OFFSET_UNIT : nullptr;
    };
    Record record;
    record.planes = field[PLANES];
    record.rows = field[ROWS];
    record.stride = field[STRIDE];
    record.zero = field[PLANES] ? float_of_bits(field[ZERO]) : 0.0f;
    record.step = float_of_bits(field[STEP]);
    record.plane0 = at(PLANE0);
    record.plane1 = at(PLANE1);
    record.steps = reinterpret_cast<const uint16_t *>(at(STEPS));
    record.starts = reinterpret_cast<const uint32_t *>(at(STARTS));
    record.escapes = reinterpret_cast<const uint16_t *>(at(ESCAPES));
    record.blocks = field[BLOCKS];
    record.row_map = reinterpret_cast<const uint32_t *>(at(ROW_MAP));
    record.channels = field[CHANNELS];
    record.channel_index = reinterpret_cast<const int32_t *>(at(CHANNEL_INDEX));
    record.channel_values = reinterpret_cast<const uint16_t *>(at(CHANNEL_VALUES));
    record.rank = field[RANK];
    record.factor_kind = field[FACTOR_KIND];
    record.right = at(RIGHT);
    record.left = at(LEFT);
    record.right_steps = reinterpret_cast<const float *>(at(RIGHT_STEPS));
    record.left_steps = reinterpret_cast<const float *>(at(LEFT_STEPS));
    record.vector = reinterpret_cast<const float *>(at(VECTOR));
    return record;
}

// Coded rows among the first `row` rows of the weight.
inline int rank_of_row(const Record &record, int row) {
    if (!record.row_map) return row < record.rows ? row : record.rows;
    const uint32_t *word = record.row_map + 2 * size_t(row / 32);
    return int(word[1]) + __builtin_popcount(word[0] & ((1u << row % 32) - 1));
}

inline bool row_is_coded(const Record &record, int row) {
    if (!record.row_map) return row < record.rows;
    return record.row_map[2 * size_t(row / 32)] >> row % 32 & 1;
}

// B_nr and A_rj of the factors.
inline float left_factor(const Record &record, size_t row, int r) {
    size_t at = row * record.rank + r;
    switch (record.factor_kind) {
        case FACTORS_INT8: return float(int8_t(record.left[at])) * record.left_steps[row];
        case FACTORS_FLOAT32: return reinterpret_cast<const float *>(record.left)[at];
        default: return float_of_bfloat16(reinterpret_cast<const uint16_t *>(record.left)[at]);
    }
}

inline float right_factor(const Record &record, int r, int column, int columns) {
    size_t at = size_t(r) * columns + column;
    switch (record.factor_kind) {
        case FACTORS_INT8: return float(int8_t(record.right[at])) * record.right_steps[r];
        case FACTORS_FLOAT32: return reinterpret_cast<const float *>(record.right)[at];
        default: return float_of_bfloat16(reinterpret_cast<const uint16_t *>(record.right)[at]);
    }
}

}  // namespace deltamux
