// Plain C++ for every processor, and the meaning of what the other instruction sets do faster.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "record.h"

namespace deltamux::portable {

inline float from_float16(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7FFF;
    if (rest >= 0x7C00) return float_of_bits(int32_t(sign | 0x7F800000 | (rest & 0x3FF) << 13));
    // Scaling by 2^112 moves the exponent, also of numbers below the normal ones.
    float value = float_of_bits(int32_t(rest << 13)) * 0x1p112f;
    return sign ? -value : value;
}

inline uint16_t to_float16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    float size = std::fabs(value);
    if (!(size == size)) return sign | 0x7E00;
    if (size >= 65520.0f) return sign | 0x7C00;
    if (size < 0x1p-14f) return sign | uint16_t(std::nearbyint(size * 0x1p24f));
    uint32_t rest = bits & 0x7FFFFFFF;
    rest += 0xFFF + (rest >> 13 & 1);
    return sign | uint16_t((rest >> 13) - (112 << 10));
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7FC0;
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float load(const void *x, Type type, ptrdiff_t at) {
    if (type == FLOAT32) return static_cast<const float *>(x)[at];
    uint16_t half = static_cast<const uint16_t *>(x)[at];
    return type == FLOAT16 ? from_float16(half) : float_of_bfloat16(half);
}

inline void store(void *y, Type type, ptrdiff_t at, float value) {
    if (type == FLOAT32) {
        static_cast<float *>(y)[at] = value;
    } else {
        static_cast<uint16_t *>(y)[at] = type == FLOAT16 ? to_float16(value) : to_bfloat16(value);
    }
}

// Where a column goes, of 16 that start at a multiple of 16: a transposed 4 by 4.
inline int place_of(int column) { return (column & ~15) | (column & 3) << 2 | (column >> 2 & 3); }

static void quantize(const void *x, Type type, int columns, int8_t *levels, ptrdiff_t stride,
                     float *scales, float *sums) {
    int units = (columns + UNIT_COLUMNS - 1) / UNIT_COLUMNS;
    for (int unit = 0, group = 0; unit < units; group++) {
        int start = unit * UNIT_COLUMNS;
        unit += units_of_group(std::min(units - unit, RUN_UNITS - unit % RUN_UNITS));
        int stop = std::min(unit * UNIT_COLUMNS, columns);
        float largest = 0;
        for (int j = start; j < stop; j++) {
            float size = std::fabs(load(x, type, j));
            if (size > largest) largest = size;
        }
        float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        int32_t sum = 0;
        for (int j = start; j < unit * UNIT_COLUMNS; j++) {
            float rounded = j < stop ? std::nearbyint(load(x, type, j) * inverse) : 0.0f;
            int level = int(std::fmin(std::fmax(rounded, -128.0f), 127.0f));
            levels[j / UNIT_COLUMNS * stride + place_of(j % UNIT_COLUMNS)] = int8_t(level);
            sum += level;
        }
        scales[group] = largest / 127.0f;
        sums[group] = float(sum);
    }
}

static void widen(const void *x, Type type, int columns, float *wide) {
    for (int j = 0; j < columns; j++) wide[j] = load(x, type, j);
}

static void unpack(const uint8_t *const rows[LANES], ptrdiff_t second, const uint8_t *,
                   int units, int offset, uint8_t *codes) {
    for (int unit = 0; unit < units; unit++, codes += UNIT_CODES) {
        for (int lane = 0; lane < LANES; lane++) {
            const uint8_t *plane = rows[lane] + ptrdiff_t(unit) * UNIT_PLANE_BYTES;
            for (int byte = 0; byte < UNIT_PLANE_BYTES; byte++) {
                uint8_t *out = codes + byte / 4 * 256 + lane * 4 + byte % 4;
                int upper = second ? plane[second + byte] : 0;
                for (int q = 0; q < 4; q++) {
                    int code = (plane[byte] >> 2 * q & 3) | (upper >> 2 * q & 3) << 2;
                    out[64 * q] = uint8_t(code + offset);
                }
            }
        }
    }
}

static void add_escapes(const EscapeRows &rows, uint8_t *codes) {
    for (int lane = 0; lane < rows.count; lane++) {
        const uint32_t *starts = rows.starts + ptrdiff_t(lane) * rows.blocks;
        for (uint32_t at = starts[0]; at < starts[1]; at++) {
            unsigned escape = rows.escapes[at];
            // The column's group of four, its place within the group, and the lane.
            unsigned place = (escape & 0xFF0) << 4 | (escape & 3) << 6 | (escape >> 2 & 3);
            place |= unsigned(lane) << 2;
            codes[place] = uint8_t(codes[place] + (escape >> BLOCK_BITS) - MIDDLE);
        }
    }
}

// One block of rows is what `layout` asks for, here and in the next.
static void multiply(const Codes &run, const Inputs &inputs, float zero, float *tile) {
    for (int t = 0; t < inputs.tokens; t++, tile += LANES) {
        ptrdiff_t stride = UNIT_COLUMNS * panel_tokens(inputs.tokens, t / PANEL);
        const int8_t *x = inputs.levels + ptrdiff_t(t / PANEL) * PANEL * inputs.units * UNIT_COLUMNS;
        x += t % PANEL * UNIT_COLUMNS + run.first * stride;
        const uint8_t *code = run.codes;
        ptrdiff_t scale = ptrdiff_t(t) * inputs.groups + run.first / GROUP_UNITS;
        bool fresh = run.first == 0;
        for (int left = run.units, units; left > 0; left -= units, scale++, fresh = false) {
            int32_t sums[LANES];
            for (int lane = 0; lane < LANES; lane++) sums[lane] = 0;
            units = units_of_group(left);
            for (int unit = 0; unit < units; unit++, x += stride) {
                for (int at = 0; at < UNIT_COLUMNS; at += 4, code += 4 * LANES) {
                    for (int lane = 0; lane < LANES; lane++) {
                        for (int e = 0; e < 4; e++) sums[lane] += code[4 * lane + e] * x[at + e];
                    }
                }
            }
            for (int lane = 0; lane < LANES; lane++) {
                float before = fresh ? 0.0f : tile[lane];
                float sum = float(sums[lane]) - zero * inputs.sums[scale];
                tile[lane] = before + sum * inputs.scales[scale];
            }
        }
    }
}

static void multiply_exact(const Codes &run, const Inputs &inputs, float zero, float *tile) {
    for (int t = 0; t < inputs.tokens; t++, tile += LANES) {
        ptrdiff_t stride = UNIT_COLUMNS * panel_tokens(inputs.tokens, t / PANEL);
        const float *x = inputs.exact + ptrdiff_t(t / PANEL) * PANEL * inputs.units * UNIT_COLUMNS;
        x += t % PANEL * UNIT_COLUMNS + run.first * stride;
        const uint8_t *code = run.codes;
        bool fresh = run.first == 0;
        for (int left = run.units, units; left > 0; left -= units, fresh = false) {
            float sums[LANES] = {};
            units = units_of_group(left);
            for (int unit = 0; unit < units; unit++, x += stride) {
                for (int at = 0; at < UNIT_COLUMNS; at += 4, code += 4 * LANES) {
                    for (int e = 0; e < 4; e++) {
                        for (int lane = 0; lane < LANES; lane++) {
                            sums[lane] += (float(code[4 * lane + e]) - zero) * x[at + e];
                        }
                    }
                }
            }
            for (int lane = 0; lane < LANES; lane++) {
                tile[lane] = (fresh ? 0.0f : tile[lane]) + sums[lane];
            }
        }
    }
}

// Sums in as many parts as there are lanes, so that they are alike in precision everywhere.
template <typename Load>
static inline float dot_of(const float *x, int columns, Load a) {
    float sums[LANES] = {};
    int j = 0;
    for (; j + LANES <= columns; j += LANES) {
        for (int lane = 0; lane < LANES; lane++) sums[lane] += a(j + lane) * x[j + lane];
    }
    for (int lane = 0; j < columns; j++, lane++) sums[lane] += a(j) * x[j];
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half];
    }
    return sums[0];
}

static float dot(const void *a, Type type, const float *x, int columns) {
    if (type == FLOAT32) {
        const float *wide = static_cast<const float *>(a);
        return dot_of(x, columns, [=](int j) { return wide[j]; });
    }
    return dot_of(x, columns, [=](int j) { return load(a, type, j); });
}

static float dot_int8(const int8_t *a, const float *x, int columns) {
    return dot_of(x, columns, [=](int j) { return float(a[j]); });
}

static void scale(const float *steps, int tokens, float *tile) {
    for (int t = 0; t < tokens; t++, tile += LANES) {
        for (int lane = 0; lane < LANES; lane++) tile[lane] *= steps[lane];
    }
}

static void add_outer(const float *values, const float *h, ptrdiff_t h_stride, int tokens, int rank,
                      float *tile) {
    for (int t = 0; t < tokens; t++, h += h_stride, tile += LANES) {
        for (int r = 0; r < rank; r++) {
            for (int lane = 0; lane < LANES; lane++) tile[lane] += values[r * LANES + lane] * h[r];
        }
    }
}

static void add_to(const float *tiles, const float *steps, int tokens, const Outputs &y, int lanes) {
    for (int t = 0; t < tokens; t++) {
        char *row = y.first + y.order[t] * y.stride;
        for (int at = 0; at < lanes; at++) {
            float tile = tiles[ptrdiff_t(at / LANES * LANES) * tokens + t * LANES + at % LANES];
            store(row, y.type, at, load(row, y.type, at) + tile * steps[at]);
        }
    }
}

static Layout layout(int) { return {1, false, false, false}; }

static const Kernels KERNELS = {
    "scalar", quantize, widen, unpack, add_escapes, multiply, multiply_exact, nullptr, nullptr, nullptr,
    dot, dot_int8, scale,
    add_outer, add_to, layout, nullptr, nullptr,
};

}  // namespace deltamux::portable
