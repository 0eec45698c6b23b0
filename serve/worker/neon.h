// NEON with dot products (Armv8.2): a tile's 16 rows are four registers. Codes are below 128, so that
// they are signed bytes too, which is what these instructions multiply.

#pragma once

#include <arm_neon.h>

#define TARGET_NEON __attribute__((target("arch=armv8.2-a+dotprod")))

namespace deltamux::neon {

// Tokens whose sums stay in registers.
constexpr int AT_ONCE = 4;
constexpr int QUARTER = 4;

TARGET_NEON static inline float32x4_t load4(const void *x, Type type, ptrdiff_t at) {
    if (type == FLOAT32) return vld1q_f32(static_cast<const float *>(x) + at);
    uint16x4_t half = vld1_u16(static_cast<const uint16_t *>(x) + at);
    if (type == FLOAT16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

TARGET_NEON static void widen(const void *x, Type type, int columns, float *wide) {
    int j = 0;
    for (; j + QUARTER <= columns; j += QUARTER) vst1q_f32(wide + j, load4(x, type, j));
    for (; j < columns; j++) wide[j] = portable::load(x, type, j);
}

TARGET_NEON static void quantize(const void *x, Type type, int columns, int8_t *levels, ptrdiff_t stride,
                                 float *scales, float *sums) {
    int units = (columns + UNIT_COLUMNS - 1) / UNIT_COLUMNS;
    for (int unit = 0, group = 0; unit < units; group++) {
        int start = unit * UNIT_COLUMNS;
        unit += units_of_group(std::min(units - unit, RUN_UNITS - unit % RUN_UNITS));
        int stop = std::min(unit * UNIT_COLUMNS, columns), whole = stop & ~(QUARTER - 1);
        float32x4_t most = vdupq_n_f32(0);
        for (int j = start; j < whole; j += QUARTER) {
            most = vmaxnmq_f32(most, vabsq_f32(load4(x, type, j)));
        }
        float largest = vmaxnmvq_f32(most);
        for (int j = whole; j < stop; j++) largest = std::max(largest, std::fabs(portable::load(x, type, j)));
        float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        int32_t sum = 0;
        for (int j = start; j < unit * UNIT_COLUMNS; j += QUARTER) {
            float values[QUARTER] = {};
            if (j < whole) {
                vst1q_f32(values, load4(x, type, j));
            } else {
                for (int k = j; k < stop; k++) values[k - j] = portable::load(x, type, k);
            }
            int32_t rounded[QUARTER];
            vst1q_s32(rounded, vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values), inverse)));
            int8_t *out = levels + j / UNIT_COLUMNS * stride;
            for (int k = 0; k < QUARTER; k++) {
                int level = std::min(std::max(rounded[k], -128), 127);
                out[portable::place_of(j % UNIT_COLUMNS + k)] = int8_t(level);
                sum += level;
            }
        }
        scales[group] = largest / 127.0f;
        sums[group] = float(sum);
    }
}

// 16 bytes of four rows as four registers, word i of row r in lane r of the i-th.
TARGET_NEON static inline void load_words(const uint8_t *const *rows, ptrdiff_t at, uint8x16_t words[4]) {
    uint32x4_t row0 = vreinterpretq_u32_u8(vld1q_u8(rows[0] + at));
    uint32x4_t row1 = vreinterpretq_u32_u8(vld1q_u8(rows[1] + at));
    uint32x4_t row2 = vreinterpretq_u32_u8(vld1q_u8(rows[2] + at));
    uint32x4_t row3 = vreinterpretq_u32_u8(vld1q_u8(rows[3] + at));
    uint64x2_t low01 = vreinterpretq_u64_u32(vzip1q_u32(row0, row1));
    uint64x2_t high01 = vreinterpretq_u64_u32(vzip2q_u32(row0, row1));
    uint64x2_t low23 = vreinterpretq_u64_u32(vzip1q_u32(row2, row3));
    uint64x2_t high23 = vreinterpretq_u64_u32(vzip2q_u32(row2, row3));
    words[0] = vreinterpretq_u8_u64(vzip1q_u64(low01, low23));
    words[1] = vreinterpretq_u8_u64(vzip2q_u64(low01, low23));
    words[2] = vreinterpretq_u8_u64(vzip1q_u64(high01, high23));
    words[3] = vreinterpretq_u8_u64(vzip2q_u64(high01, high23));
}

TARGET_NEON static void unpack(const uint8_t *const rows[LANES], ptrdiff_t second, const uint8_t *ahead,
                               int units, int offset, uint8_t *codes) {
    const uint8x16_t low = vdupq_n_u8(3), added = vdupq_n_u8(uint8_t(offset));
    for (int unit = 0; unit < units; unit++, codes += UNIT_CODES) {
        ptrdiff_t at = ptrdiff_t(unit) * UNIT_PLANE_BYTES;
        fetch_unit(ahead, unit);
        if (second) fetch_unit(ahead + second, unit);
        for (int quarter = 0; quarter < 4; quarter++) {
            uint8x16_t words[4], upper[4];
            load_words(rows + QUARTER * quarter, at, words);
            if (second) load_words(rows + QUARTER * quarter, second + at, upper);
            for (int i = 0; i < 4; i++) {
                for (int q = 0; q < 4; q++) {
                    uint8x16_t code = vandq_u8(vshlq_u8(words[i], vdupq_n_s8(int8_t(-2 * q))), low);
                    if (second) {
                        uint8x16_t up = vandq_u8(vshlq_u8(upper[i], vdupq_n_s8(int8_t(-2 * q))), low);
                        code = vorrq_u8(code, vshlq_n_u8(up, 2));
                    }
                    vst1q_u8(codes + 64 * (4 * i + q) + 16 * quarter, vaddq_u8(code, added));
                }
            }
        }
    }
}

// Some tokens of a panel whose storage has `rows` of them.
template <int TOKENS>
TARGET_NEON static inline void multiply_tokens(const Codes &run, const Inputs &inputs, int token, int rows,
                                               float zero, float *tile) {
    ptrdiff_t unit_bytes = ptrdiff_t(rows) * UNIT_COLUMNS;
    const int8_t *x = inputs.levels + ptrdiff_t(token / PANEL) * PANEL * inputs.units * UNIT_COLUMNS;
    x += run.first * unit_bytes + token % PANEL * UNIT_COLUMNS;
    ptrdiff_t scale = ptrdiff_t(token) * inputs.groups + run.first / GROUP_UNITS;
    const int8_t *codes = reinterpret_cast<const int8_t *>(run.codes);
    bool fresh = run.first == 0;
    for (int left = run.units, units; left > 0; left -= units, scale++, fresh = false) {
        int32x4_t sums[TOKENS][4];
        for (int t = 0; t < TOKENS; t++) {
            for (int quarter = 0; quarter < 4; quarter++) sums[t][quarter] = vdupq_n_s32(0);
        }
        units = units_of_group(left);
        for (int unit = 0; unit < units; unit++, x += unit_bytes) {
            for (int at = 0; at < UNIT_COLUMNS; at += 4, codes += 4 * LANES) {
                for (int t = 0; t < TOKENS; t++) {
                    int32_t four;
                    std::memcpy(&four, x + t * UNIT_COLUMNS + at, sizeof four);
                    int8x16_t value = vreinterpretq_s8_s32(vdupq_n_s32(four));
                    for (int quarter = 0; quarter < 4; quarter++) {
                        int8x16_t code = vld1q_s8(codes + 16 * quarter);
                        sums[t][quarter] = vdotq_s32(sums[t][quarter], code, value);
                    }
                }
            }
        }
        for (int t = 0; t < TOKENS; t++) {
            ptrdiff_t at = scale + t * inputs.groups;
            float32x4_t zeros = vdupq_n_f32(zero * inputs.sums[at]);
            for (int quarter = 0; quarter < 4; quarter++) {
                float *out = tile + t * LANES + QUARTER * quarter;
                float32x4_t sum = vsubq_f32(vcvtq_f32_s32(sums[t][quarter]), zeros);
                float32x4_t before = fresh ? vdupq_n_f32(0) : vld1q_f32(out);
                vst1q_f32(out, vfmaq_n_f32(before, sum, inputs.scales[at]));
            }
        }
    }
}

template <int TOKENS>
TARGET_NEON static inline void multiply_exact_tokens(const Codes &run, const Inputs &inputs, int token,
                                                     int rows, float zero, float *tile) {
    ptrdiff_t unit_floats = ptrdiff_t(rows) * UNIT_COLUMNS;
    const float *x = inputs.exact + ptrdiff_t(token / PANEL) * PANEL * inputs.units * UNIT_COLUMNS;
    x += run.first * unit_floats + token % PANEL * UNIT_COLUMNS;
    const uint8_t *codes = run.codes;
    const float32x4_t zeros = vdupq_n_f32(zero);
    bool fresh = run.first == 0;
    for (int left = run.units, units; left > 0; left -= units, fresh = false) {
        float32x4_t sums[TOKENS][4];
        for (int t = 0; t < TOKENS; t++) {
            for (int quarter = 0; quarter < 4; quarter++) sums[t][quarter] = vdupq_n_f32(0);
        }
        units = units_of_group(left);
        for (int unit = 0; unit < units; unit++, x += unit_floats) {
            for (int at = 0; at < UNIT_COLUMNS; at += 4, codes += 4 * LANES) {
                for (int quarter = 0; quarter < 4; quarter++) {
                    uint32x4_t code = vreinterpretq_u32_u8(vld1q_u8(codes + 16 * quarter));
                    for (int e = 0; e < 4; e++, code = vshrq_n_u32(code, 8)) {
                        uint32x4_t byte = vandq_u32(code, vdupq_n_u32(255));
                        float32x4_t level = vsubq_f32(vcvtq_f32_u32(byte), zeros);
                        for (int t = 0; t < TOKENS; t++) {
                            float value = x[t * UNIT_COLUMNS + at + e];
                            sums[t][quarter] = vfmaq_n_f32(sums[t][quarter], level, value);
                        }
                    }
                }
            }
        }
        for (int t = 0; t < TOKENS; t++) {
            for (int quarter = 0; quarter < 4; quarter++) {
                float *out = tile + t * LANES + QUARTER * quarter;
                float32x4_t before = fresh ? vdupq_n_f32(0) : vld1q_f32(out);
                vst1q_f32(out, vaddq_f32(before, sums[t][quarter]));
            }
        }
    }
}

TARGET_NEON static void multiply(const Codes &run, const Inputs &inputs, float zero, float *tile) {
    for (int token = 0; token < inputs.tokens;) {
        int rows = panel_tokens(inputs.tokens, token / PANEL), left = rows - token % PANEL;
        float *out = tile + ptrdiff_t(token) * LANES;
        switch (left) {
            case 1: multiply_tokens<1>(run, inputs, token, rows, zero, out); break;
            case 2: multiply_tokens<2>(run, inputs, token, rows, zero, out); break;
            case 3: multiply_tokens<3>(run, inputs, token, rows, zero, out); break;
            default: multiply_tokens<AT_ONCE>(run, inputs, token, rows, zero, out);
        }
        token += std::min(left, AT_ONCE);
    }
}

TARGET_NEON static void multiply_exact(const Codes &run, const Inputs &inputs, float zero, float *tile) {
    for (int token = 0; token < inputs.tokens;) {
        int rows = panel_tokens(inputs.tokens, token / PANEL), left = rows - token % PANEL;
        float *out = tile + ptrdiff_t(token) * LANES;
        switch (left) {
            case 1: multiply_exact_tokens<1>(run, inputs, token, rows, zero, out); break;
            case 2: multiply_exact_tokens<2>(run, inputs, token, rows, zero, out); break;
            case 3: multiply_exact_tokens<3>(run, inputs, token, rows, zero, out); break;
            default: multiply_exact_tokens<AT_ONCE>(run, inputs, token, rows, zero, out);
        }
        token += std::min(left, AT_ONCE);
    }
}

TARGET_NEON static float dot(const void *a, Type type, const float *x, int columns) {
    float32x4_t sum = vdupq_n_f32(0);
    int j = 0;
    for (; j + QUARTER <= columns; j += QUARTER) sum = vfmaq_f32(sum, load4(a, type, j), vld1q_f32(x + j));
    float total = vaddvq_f32(sum);
    for (; j < columns; j++) total += portable::load(a, type, j) * x[j];
    return total;
}

TARGET_NEON static void scale(const float *steps, int tokens, float *tile) {
    for (int at = 0; at < tokens * LANES; at += QUARTER) {
        vst1q_f32(tile + at, vmulq_f32(vld1q_f32(tile + at), vld1q_f32(steps + at % LANES)));
    }
}

TARGET_NEON static void add_outer(const float *values, const float *h, ptrdiff_t h_stride, int tokens,
                                  int rank, float *tile) {
    for (int t = 0; t < tokens; t++, h += h_stride, tile += LANES) {
        for (int at = 0; at < LANES; at += QUARTER) {
            float32x4_t sum = vld1q_f32(tile + at);
            for (int r = 0; r < rank; r++) sum = vfmaq_n_f32(sum, vld1q_f32(values + r * LANES + at), h[r]);
            vst1q_f32(tile + at, sum);
        }
    }
}

static const Kernels KERNELS = {
    "neon",
    quantize,
    widen,
    unpack,
    portable::add_escapes,
    multiply,
    multiply_exact,
    nullptr,
    nullptr,
    nullptr,
    dot,
    portable::dot_int8,
    scale,
    add_outer,
    portable::add_to,
    portable::layout,
    nullptr,
    nullptr,
};

}  // namespace deltamux::neon
