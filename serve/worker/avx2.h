// AVX2: a tile's 16 rows are two registers. Bytes are multiplied in pairs; codes are below 128, so that
// no pair of products leaves 16 bits.

#pragma once

#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace deltamux::avx2 {

// Tokens whose sums stay in registers.
constexpr int AT_ONCE = 4;
constexpr int HALF = 8;

TARGET_AVX2 static inline __m256 load8(const void *x, Type type, ptrdiff_t at) {
    if (type == FLOAT32) return _mm256_loadu_ps(static_cast<const float *>(x) + at);
    const uint16_t *half = static_cast<const uint16_t *>(x) + at;
    __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(half));
    if (type == FLOAT16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// To the nearest bfloat16, ties to even; not a number stays one.
TARGET_AVX2 static inline __m128i to_bfloat16(__m256 value) {
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    __m256i nan = _mm256_set1_epi32(0x7FC00000);
    rounded = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(nan), is_nan));
    rounded = _mm256_srli_epi32(rounded, 16);
    rounded = _mm256_packus_epi32(rounded, rounded);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(rounded, 0x08));
}

TARGET_AVX2 static void widen(const void *x, Type type, int columns, float *wide) {
    int j = 0;
    for (; j + HALF <= columns; j += HALF) _mm256_storeu_ps(wide + j, load8(x, type, j));
    for (; j < columns; j++) wide[j] = portable::load(x, type, j);
}

// Whole groups of eight; what is left is done one by one.
TARGET_AVX2 static void quantize(const void *x, Type type, int columns, int8_t *levels,
                                 ptrdiff_t stride, float *scales, float *sums) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    int units = (columns + UNIT_COLUMNS - 1) / UNIT_COLUMNS;
    for (int unit = 0, group = 0; unit < units; group++) {
        int start = unit * UNIT_COLUMNS;
        unit += units_of_group(std::min(units - unit, RUN_UNITS - unit % RUN_UNITS));
        int stop = std::min(unit * UNIT_COLUMNS, columns), whole = stop & ~(HALF - 1);
        __m256 most = _mm256_setzero_ps();
        for (int j = start; j < whole; j += HALF) {
            most = _mm256_max_ps(_mm256_and_ps(load8(x, type, j), magnitude), most);
        }
        alignas(32) float parts[HALF];
        _mm256_store_ps(parts, most);
        float largest = 0;
        for (float part : parts) largest = std::max(largest, part);
        for (int j = whole; j < stop; j++) largest = std::max(largest, std::fabs(portable::load(x, type, j)));
        float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        alignas(32) int32_t rounded[HALF];
        int32_t sum = 0;
        for (int j = start; j < unit * UNIT_COLUMNS; j += HALF) {
            alignas(32) float values[HALF] = {};
            if (j < whole) {
                _mm256_store_ps(values, load8(x, type, j));
            } else {
                for (int k = j; k < stop; k++) values[k - j] = portable::load(x, type, k);
            }
            __m256 scaled = _mm256_mul_ps(_mm256_load_ps(values), _mm256_set1_ps(inverse));
            _mm256_store_si256(reinterpret_cast<__m256i *>(rounded), _mm256_cvtps_epi32(scaled));
            int8_t *out = levels + j / UNIT_COLUMNS * stride;
            for (int k = 0; k < HALF; k++) {
                int level = std::min(std::max(rounded[k], -128), 127);
                out[portable::place_of(j % UNIT_COLUMNS + k)] = int8_t(level);
                sum += level;
            }
        }
        scales[group] = largest / 127.0f;
        sums[group] = float(sum);
    }
}

TARGET_AVX2 static inline __m256i two_rows(const uint8_t *low, const uint8_t *high) {
    __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i *>(low));
    __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i *>(high));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
}

// 16 bytes of 8 rows as four registers, word i of row r in lane r of the i-th.
TARGET_AVX2 static inline void load_words(const uint8_t *const *rows, ptrdiff_t at, __m256i words[4]) {
    __m256i row0 = two_rows(rows[0] + at, rows[4] + at), row1 = two_rows(rows[1] + at, rows[5] + at);
    __m256i row2 = two_rows(rows[2] + at, rows[6] + at), row3 = two_rows(rows[3] + at, rows[7] + at);
    __m256i low01 = _mm256_unpacklo_epi32(row0, row1), high01 = _mm256_unpackhi_epi32(row0, row1);
    __m256i low23 = _mm256_unpacklo_epi32(row2, row3), high23 = _mm256_unpackhi_epi32(row2, row3);
    words[0] = _mm256_unpacklo_epi64(low01, low23);
    words[1] = _mm256_unpackhi_epi64(low01, low23);
    words[2] = _mm256_unpacklo_epi64(high01, high23);
    words[3] = _mm256_unpackhi_epi64(high01, high23);
}

TARGET_AVX2 static void unpack(const uint8_t *const rows[LANES], ptrdiff_t second, const uint8_t *ahead,
                               int units, int offset, uint8_t *codes) {
    const __m256i low = _mm256_set1_epi8(3), added = _mm256_set1_epi8(char(offset));
    for (int unit = 0; unit < units; unit++, codes += UNIT_CODES) {
        ptrdiff_t at = ptrdiff_t(unit) * UNIT_PLANE_BYTES;
        fetch_unit(ahead, unit);
        if (second) fetch_unit(ahead + second, unit);
        for (int half = 0; half < 2; half++) {
            __m256i words[4], upper[4];
            load_words(rows + HALF * half, at, words);
            if (second) load_words(rows + HALF * half, second + at, upper);
            for (int i = 0; i < 4; i++) {
                for (int q = 0; q < 4; q++) {
                    __m256i code = _mm256_and_si256(_mm256_srli_epi32(words[i], 2 * q), low);
                    if (second) {
                        __m256i up = _mm256_and_si256(_mm256_srli_epi32(upper[i], 2 * q), low);
                        code = _mm256_or_si256(code, _mm256_slli_epi32(up, 2));
                    }
                    uint8_t *out = codes + 64 * (4 * i + q) + 32 * half;
                    _mm256_store_si256(reinterpret_cast<__m256i *>(out), _mm256_add_epi8(code, added));
                }
            }
        }
    }
}

// Some tokens of a panel whose storage has `rows` of them.
template <int TOKENS>
TARGET_AVX2 static inline void multiply_tokens(const Codes &run, const Inputs &inputs, int token,
                                               int rows, float zero, float *tile) {
    const __m256i ones = _mm256_set1_epi16(1);
    ptrdiff_t unit_bytes = ptrdiff_t(rows) * UNIT_COLUMNS;
    const int8_t *x = inputs.levels + ptrdiff_t(token / PANEL) * PANEL * inputs.units * UNIT_COLUMNS;
    x += run.first * unit_bytes + token % PANEL * UNIT_COLUMNS;
    ptrdiff_t scale = ptrdiff_t(token) * inputs.groups + run.first / GROUP_UNITS;
    const uint8_t *codes = run.codes;
    bool fresh = run.first == 0;
    for (int left = run.units, units; left > 0; left -= units, scale++, fresh = false) {
        __m256i sums[TOKENS][2];
        for (int t = 0; t < TOKENS; t++) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
        units = units_of_group(left);
        for (int unit = 0; unit < units; unit++, x += unit_bytes) {
            for (int at = 0; at < UNIT_COLUMNS; at += 4, codes += 4 * LANES) {
                __m256i code0 = _mm256_load_si256(reinterpret_cast<const __m256i *>(codes));
                __m256i code1 = _mm256_load_si256(reinterpret_cast<const __m256i *>(codes + 32));
                for (int t = 0; t < TOKENS; t++) {
                    int32_t four;
                    std::memcpy(&four, x + t * UNIT_COLUMNS + at, sizeof four);
                    __m256i value = _mm256_set1_epi32(four);
                    __m256i pairs0 = _mm256_maddubs_epi16(code0, value);
                    __m256i pairs1 = _mm256_maddubs_epi16(code1, value);
                    sums[t][0] = _mm256_add_epi32(sums[t][0], _mm256_madd_epi16(pairs0, ones));
                    sums[t][1] = _mm256_add_epi32(sums[t][1], _mm256_madd_epi16(pairs1, ones));
                }
            }
        }
        for (int t = 0; t < TOKENS; t++) {
            ptrdiff_t at = scale + t * inputs.groups;
            __m256 zeros = _mm256_set1_ps(zero * inputs.sums[at]);
            for (int half = 0; half < 2; half++) {
                float *out = tile + t * LANES + HALF * half;
                __m256 sum = _mm256_sub_ps(_mm256_cvtepi32_ps(sums[t][half]), zeros);
                __m256 before = fresh ? _mm256_setzero_ps() : _mm256_load_ps(out);
                __m256 factor = _mm256_set1_ps(inputs.scales[at]);
                _mm256_store_ps(out, _mm256_fmadd_ps(sum, factor, before));
            }
        }
    }
}

TARGET_AVX2 static void multiply(const Codes &run, const Inputs &inputs, float zero, float *tile) {
    for (int token = 0; token < inputs.tokens;) {
        int rows = panel_tokens(inputs.tokens, token / PANEL);
        int left = rows - token % PANEL;
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

template <int TOKENS>
TARGET_AVX2 static inline void multiply_exact_tokens(const Codes &run, const Inputs &inputs, int token,
                                                     int rows, float zero, float *tile) {
    const __m256 zeros = _mm256_set1_ps(zero);
    const __m256i byte = _mm256_set1_epi32(255);
    ptrdiff_t unit_floats = ptrdiff_t(rows) * UNIT_COLUMNS;
    const float *x = inputs.exact + ptrdiff_t(token / PANEL) * PANEL * inputs.units * UNIT_COLUMNS;
    x += run.first * unit_floats + token % PANEL * UNIT_COLUMNS;
    const uint8_t *codes = run.codes;
    bool fresh = run.first == 0;
    for (int left = run.units, units; left > 0; left -= units, fresh = false) {
        __m256 sums[TOKENS][2];
        for (int t = 0; t < TOKENS; t++) sums[t][0] = sums[t][1] = _mm256_setzero_ps();
        units = units_of_group(left);
        for (int unit = 0; unit < units; unit++, x += unit_floats) {
            for (int at = 0; at < UNIT_COLUMNS; at += 4, codes += 4 * LANES) {
                __m256i code0 = _mm256_load_si256(reinterpret_cast<const __m256i *>(codes));
                __m256i code1 = _mm256_load_si256(reinterpret_cast<const __m256i *>(codes + 32));
                for (int e = 0; e < 4; e++) {
                    __m256 level0 = _mm256_cvtepi32_ps(_mm256_and_si256(code0, byte));
                    __m256 level1 = _mm256_cvtepi32_ps(_mm256_and_si256(code1, byte));
                    level0 = _mm256_sub_ps(level0, zeros);
                    level1 = _mm256_sub_ps(level1, zeros);
                    code0 = _mm256_srli_epi32(code0, 8);
                    code1 = _mm256_srli_epi32(code1, 8);
                    for (int t = 0; t < TOKENS; t++) {
                        __m256 value = _mm256_set1_ps(x[t * UNIT_COLUMNS + at + e]);
                        sums[t][0] = _mm256_fmadd_ps(level0, value, sums[t][0]);
                        sums[t][1] = _mm256_fmadd_ps(level1, value, sums[t][1]);
                    }
                }
            }
        }
        for (int t = 0; t < TOKENS; t++) {
            for (int half = 0; half < 2; half++) {
                float *out = tile + t * LANES + HALF * half;
                __m256 before = fresh ? _mm256_setzero_ps() : _mm256_load_ps(out);
                _mm256_store_ps(out, _mm256_add_ps(before, sums[t][half]));
            }
        }
    }
}

TARGET_AVX2 static void multiply_exact(const Codes &run, const Inputs &inputs, float zero, float *tile) {
    for (int token = 0; token < inputs.tokens;) {
        int rows = panel_tokens(inputs.tokens, token / PANEL);
        int left = rows - token % PANEL;
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

TARGET_AVX2 static inline float sum_of(__m256 value) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

TARGET_AVX2 static float dot(const void *a, Type type, const float *x, int columns) {
    __m256 sum = _mm256_setzero_ps();
    int j = 0;
    for (; j + HALF <= columns; j += HALF) {
        sum = _mm256_fmadd_ps(load8(a, type, j), _mm256_loadu_ps(x + j), sum);
    }
    float total = sum_of(sum);
    for (; j < columns; j++) total += portable::load(a, type, j) * x[j];
    return total;
}

TARGET_AVX2 static float dot_int8(const int8_t *a, const float *x, int columns) {
    __m256 sum = _mm256_setzero_ps();
    int j = 0;
    for (; j + HALF <= columns; j += HALF) {
        __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(a + j));
        __m256 level = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
        sum = _mm256_fmadd_ps(level, _mm256_loadu_ps(x + j), sum);
    }
    float total = sum_of(sum);
    for (; j < columns; j++) total += float(a[j]) * x[j];
    return total;
}

TARGET_AVX2 static void scale(const float *steps, int tokens, float *tile) {
    __m256 low = _mm256_loadu_ps(steps), high = _mm256_loadu_ps(steps + HALF);
    for (int t = 0; t < tokens; t++, tile += LANES) {
        _mm256_store_ps(tile, _mm256_mul_ps(_mm256_load_ps(tile), low));
        _mm256_store_ps(tile + HALF, _mm256_mul_ps(_mm256_load_ps(tile + HALF), high));
    }
}

TARGET_AVX2 static void add_outer(const float *values, const float *h, ptrdiff_t h_stride, int tokens,
                                  int rank, float *tile) {
    for (int t = 0; t < tokens; t++, h += h_stride, tile += LANES) {
        __m256 low = _mm256_load_ps(tile), high = _mm256_load_ps(tile + HALF);
        for (int r = 0; r < rank; r++) {
            __m256 value = _mm256_set1_ps(h[r]);
            low = _mm256_fmadd_ps(_mm256_load_ps(values + r * LANES), value, low);
            high = _mm256_fmadd_ps(_mm256_load_ps(values + r * LANES + HALF), value, high);
        }
        _mm256_store_ps(tile, low);
        _mm256_store_ps(tile + HALF, high);
    }
}

TARGET_AVX2 static void add_to(const float *tiles, const float *steps, int tokens, const Outputs &y,
                               int lanes) {
    if (lanes % LANES) return portable::KERNELS.add_to(tiles, steps, tokens, y, lanes);
    for (int t = 0; t < tokens; t++) {
        char *row = y.first + y.order[t] * y.stride;
        for (int at = 0; at < lanes; at += HALF) {
            const float *tile = tiles + ptrdiff_t(at / LANES * LANES) * tokens + t * LANES + at % LANES;
            __m256 sum = _mm256_fmadd_ps(_mm256_loadu_ps(tile), _mm256_loadu_ps(steps + at),
                                         load8(row, y.type, at));
            if (y.type == FLOAT32) {
                _mm256_storeu_ps(reinterpret_cast<float *>(row) + at, sum);
                continue;
            }
            __m128i bits = y.type == FLOAT16 ? _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT)
                                             : to_bfloat16(sum);
            _mm_storeu_si128(reinterpret_cast<__m128i *>(reinterpret_cast<uint16_t *>(row) + at), bits);
        }
    }
}

static Layout layout(int) { return {1, false, false, false}; }

static const Kernels KERNELS = {
    "avx2", quantize, widen, unpack, portable::add_escapes, multiply, multiply_exact, nullptr, nullptr,
    nullptr, dot, dot_int8, scale, add_outer, add_to, layout, nullptr, nullptr,
};

}  // namespace deltamux::avx2
