// AVX-512: a tile's 16 rows are one register. Included once for processors with VNNI and once for those
// without: TARGET names the instructions, DOT(sums, codes, x) adds products of four bytes each.
//
// No include guard on purpose.

#include "avx512_inputs.h"

namespace deltamux::AVX512_NAMESPACE {

TARGET static inline __m128i load_bytes(const uint8_t *bytes) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes));
}

// 16 bytes of 16 rows as four registers, word i of row r in lane r of the i-th.
template <typename Row>
TARGET static inline void load_words(Row row, __m512i words[4]) {
    __m512i four[4];
    UNROLLED for (int r = 0; r < 4; r++) {
        __m512i quarter = _mm512_castsi128_si512(load_bytes(row(r)));
        quarter = _mm512_inserti32x4(quarter, load_bytes(row(r + 4)), 1);
        quarter = _mm512_inserti32x4(quarter, load_bytes(row(r + 8)), 2);
        four[r] = _mm512_inserti32x4(quarter, load_bytes(row(r + 12)), 3);
    }
    __m512i low01 = _mm512_unpacklo_epi32(four[0], four[1]);
    __m512i high01 = _mm512_unpackhi_epi32(four[0], four[1]);
    __m512i low23 = _mm512_unpacklo_epi32(four[2], four[3]);
    __m512i high23 = _mm512_unpackhi_epi32(four[2], four[3]);
    words[0] = _mm512_unpacklo_epi64(low01, low23);
    words[1] = _mm512_unpackhi_epi64(low01, low23);
    words[2] = _mm512_unpacklo_epi64(high01, high23);
    words[3] = _mm512_unpackhi_epi64(high01, high23);
}

// Where B then A else C; and A and B, or C.
constexpr int SELECT = 0xE2, AND_OR = 0xEA;

template <int Q>
TARGET static inline __m512i codes_at(__m512i word, __m512i offset) {
    // The offset has none of a code's bits: or adds it.
    __m512i moved = _mm512_srli_epi32(word, 2 * Q);
    return _mm512_ternarylogic_epi32(moved, _mm512_set1_epi8(3), offset, AND_OR);
}

template <int Q>
TARGET static inline __m512i codes_at(__m512i word, __m512i upper, __m512i offset) {
    __m512i moved = _mm512_srli_epi32(word, 2 * Q);
    upper = Q ? _mm512_srli_epi32(upper, Q ? 2 * Q - 2 : 0) : _mm512_slli_epi32(upper, 2);
    __m512i code = _mm512_ternarylogic_epi32(moved, _mm512_set1_epi8(3), upper, SELECT);
    return _mm512_add_epi8(_mm512_and_si512(code, _mm512_set1_epi8(15)), offset);
}

TARGET static void unpack(const uint8_t *const rows[LANES], ptrdiff_t second, const uint8_t *ahead,
                          int units, int offset, uint8_t *codes) {
    const __m512i added = _mm512_set1_epi8(char(offset));
    for (int unit = 0; unit < units; unit++) {
        __m512i words[4], upper[4];
        ptrdiff_t at = ptrdiff_t(unit) * UNIT_PLANE_BYTES;
        fetch_unit(ahead, unit);
        load_words([&](int row) { return rows[row] + at; }, words);
        if (second) {
            fetch_unit(ahead + second, unit);
            load_words([&](int row) { return rows[row] + second + at; }, upper);
        }
        for (int i = 0; i < 4; i++) {
            __m512i *out = reinterpret_cast<__m512i *>(codes) + 4 * i;
            if (second) {
                _mm512_store_si512(out, codes_at<0>(words[i], upper[i], added));
                _mm512_store_si512(out + 1, codes_at<1>(words[i], upper[i], added));
                _mm512_store_si512(out + 2, codes_at<2>(words[i], upper[i], added));
                _mm512_store_si512(out + 3, codes_at<3>(words[i], upper[i], added));
            } else {
                _mm512_store_si512(out, codes_at<0>(words[i], added));
                _mm512_store_si512(out + 1, codes_at<1>(words[i], added));
                _mm512_store_si512(out + 2, codes_at<2>(words[i], added));
                _mm512_store_si512(out + 3, codes_at<3>(words[i], added));
            }
        }
        codes += UNIT_CODES;
    }
}

// See `portable.h`; 32 escapes of a row at a time.
TARGET static void add_escapes(const EscapeRows &rows, uint8_t *codes) {
    constexpr int AT_ONCE = 32, ROOM = 1024;
    uint16_t places[ROOM + AT_ONCE];
    int8_t extras[ROOM + AT_ONCE];
    int listed = 0;
    for (int lane = 0; lane < rows.count; lane++) {
        const uint32_t *starts = rows.starts + ptrdiff_t(lane) * rows.blocks;
        const __m512i lane_bits = _mm512_set1_epi16(short(lane << 2));
        for (uint32_t at = starts[0]; at < starts[1]; at += AT_ONCE) {
            uint32_t left = starts[1] - at;
            __mmask32 mask = left >= AT_ONCE ? ~0u : (1u << left) - 1;
            __m512i each = _mm512_maskz_loadu_epi16(mask, rows.escapes + at);
            // The column's group of four, its place within the group, and the lane.
            __m512i place = _mm512_slli_epi16(_mm512_and_si512(each, _mm512_set1_epi16(0xFF0)), 4);
            __m512i low = _mm512_slli_epi16(_mm512_and_si512(each, _mm512_set1_epi16(3)), 6);
            __m512i high = _mm512_and_si512(_mm512_srli_epi16(each, 2), _mm512_set1_epi16(3));
            place = _mm512_or_si512(_mm512_or_si512(place, low), _mm512_or_si512(high, lane_bits));
            __m512i extra = _mm512_srli_epi16(each, BLOCK_BITS);
            extra = _mm512_sub_epi16(extra, _mm512_set1_epi16(MIDDLE));
            _mm512_storeu_si512(places + listed, place);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(extras + listed), _mm512_cvtepi16_epi8(extra));
            listed += int(std::min<uint32_t>(left, AT_ONCE));
            if (listed >= ROOM) {
                for (int i = 0; i < listed; i++) codes[places[i]] = uint8_t(codes[places[i]] + extras[i]);
                listed = 0;
            }
        }
    }
    for (int i = 0; i < listed; i++) codes[places[i]] = uint8_t(codes[places[i]] + extras[i]);
}

// The tokens of a panel, their sums in `SETS` registers each, so that few need not wait for one another.
template <int TOKENS, int SETS>
TARGET static inline void multiply_panel(const Codes &run, const Inputs &inputs, int panel, float zero,
                                         float *tile) {
    constexpr ptrdiff_t unit_bytes = TOKENS * UNIT_COLUMNS;
    const uint8_t *codes = run.codes;
    bool fresh = run.first == 0;
    const int8_t *x = inputs.levels + ptrdiff_t(panel) * PANEL * inputs.units * UNIT_COLUMNS;
    x += run.first * unit_bytes;
    ptrdiff_t scale = ptrdiff_t(panel) * PANEL * inputs.groups + run.first / GROUP_UNITS;
    tile += ptrdiff_t(panel) * PANEL * LANES;
    for (int left = run.units, units; left > 0; left -= units, scale++, fresh = false) {
        __m512i sums[TOKENS][SETS];
        for (int t = 0; t < TOKENS; t++) {
            for (int set = 0; set < SETS; set++) sums[t][set] = _mm512_setzero_si512();
        }
        units = units_of_group(left);
        for (int unit = 0; unit < units; unit++, x += unit_bytes) {
            for (int at = 0; at < UNIT_COLUMNS; at += 4 * SETS) {
                for (int set = 0; set < SETS; set++) {
                    __m512i code = _mm512_load_si512(codes);
                    codes += 4 * LANES;
                    for (int t = 0; t < TOKENS; t++) {
                        int32_t four;
                        std::memcpy(&four, x + t * UNIT_COLUMNS + at + 4 * set, sizeof four);
                        DOT(sums[t][set], code, _mm512_set1_epi32(four));
                    }
                }
            }
        }
        for (int t = 0; t < TOKENS; t++) {
            for (int set = 1; set < SETS; set++) {
                sums[t][0] = _mm512_add_epi32(sums[t][0], sums[t][set]);
            }
            ptrdiff_t at = scale + t * inputs.groups;
            __m512 sum = _mm512_cvtepi32_ps(sums[t][0]);
            sum = _mm512_fnmadd_ps(_mm512_set1_ps(inputs.sums[at]), _mm512_set1_ps(zero), sum);
            __m512 total = fresh ? _mm512_setzero_ps() : _mm512_load_ps(tile + t * LANES);
            total = _mm512_fmadd_ps(sum, _mm512_set1_ps(inputs.scales[at]), total);
            _mm512_store_ps(tile + t * LANES, total);
        }
    }
}

TARGET static void multiply_block(const Codes &codes, const Inputs &inputs, float zero, float *tile) {
    for (int panel = 0; panel * PANEL < inputs.tokens; panel++) {
        switch (panel_tokens(inputs.tokens, panel)) {
#define CASE(tokens, sets) \
    case tokens: \
        multiply_panel<tokens, sets>(codes, inputs, panel, zero, tile); \
        break;
            CASE(1, 8) CASE(2, 4) CASE(3, 4) CASE(4, 2) CASE(5, 2) CASE(6, 2) CASE(7, 2) CASE(8, 2)
            CASE(9, 1) CASE(10, 1) CASE(11, 1) CASE(12, 1) CASE(13, 1) CASE(14, 1) CASE(15, 1)
            CASE(16, 1)
#undef CASE
        }
    }
}

TARGET static void multiply(const Codes &codes, const Inputs &inputs, float zero, float *tiles) {
    for (int block = 0; block < codes.blocks; block++) {
        const uint8_t *start = codes.codes + ptrdiff_t(block) * codes.units * UNIT_CODES;
        multiply_block({start, codes.first, codes.units, 1, nullptr}, inputs, zero,
                       tiles + ptrdiff_t(block) * inputs.tokens * LANES);
    }
}

// As above in float32: codes of a column become numbers once for all tokens of the panel.
template <int TOKENS>
TARGET static inline void multiply_exact_panel(const Codes &run, const Inputs &inputs, int panel,
                                               float zero, float *tile) {
    constexpr ptrdiff_t unit_floats = TOKENS * UNIT_COLUMNS;
    const __m512 zeros = _mm512_set1_ps(zero);
    const __m512i byte = _mm512_set1_epi32(255);
    const uint8_t *codes = run.codes;
    bool fresh = run.first == 0;
    const float *x = inputs.exact + ptrdiff_t(panel) * PANEL * inputs.units * UNIT_COLUMNS;
    x += run.first * unit_floats;
    tile += ptrdiff_t(panel) * PANEL * LANES;
    for (int left = run.units, units; left > 0; left -= units, fresh = false) {
        __m512 sums[TOKENS];
        for (int t = 0; t < TOKENS; t++) sums[t] = _mm512_setzero_ps();
        units = units_of_group(left);
        for (int unit = 0; unit < units; unit++, x += unit_floats) {
            for (int at = 0; at < UNIT_COLUMNS; at += 4) {
                __m512i code = _mm512_load_si512(codes);
                codes += 4 * LANES;
                for (int e = 0; e < 4; e++) {
                    __m512 level = _mm512_cvtepi32_ps(_mm512_and_si512(code, byte));
                    level = _mm512_sub_ps(level, zeros);
                    code = _mm512_srli_epi32(code, 8);
                    for (int t = 0; t < TOKENS; t++) {
                        __m512 value = _mm512_set1_ps(x[t * UNIT_COLUMNS + at + e]);
                        sums[t] = _mm512_fmadd_ps(level, value, sums[t]);
                    }
                }
            }
        }
        for (int t = 0; t < TOKENS; t++) {
            __m512 total = fresh ? _mm512_setzero_ps() : _mm512_load_ps(tile + t * LANES);
            _mm512_store_ps(tile + t * LANES, _mm512_add_ps(total, sums[t]));
        }
    }
}

// One block of rows is what `layout` asks for.
TARGET static void multiply_exact(const Codes &codes, const Inputs &inputs, float zero, float *tile) {
    for (int panel = 0; panel * PANEL < inputs.tokens; panel++) {
        switch (panel_tokens(inputs.tokens, panel)) {
#define CASE(tokens) \
    case tokens: \
        multiply_exact_panel<tokens>(codes, inputs, panel, zero, tile); \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
            CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15) CASE(16)
#undef CASE
        }
    }
}

TARGET static float dot(const void *a, Type type, const float *x, int columns) {
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < columns; j += LANES) {
        __mmask16 mask = first(columns - j);
        sum = _mm512_fmadd_ps(load16(a, type, j, mask), _mm512_maskz_loadu_ps(mask, x + j), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

TARGET static float dot_int8(const int8_t *a, const float *x, int columns) {
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < columns; j += LANES) {
        __mmask16 mask = first(columns - j);
        __m512 level = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, a + j)));
        sum = _mm512_fmadd_ps(level, _mm512_maskz_loadu_ps(mask, x + j), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

TARGET static void add_outer(const float *values, const float *h, ptrdiff_t h_stride, int tokens,
                             int rank, float *tile) {
    for (int t = 0; t < tokens; t++, h += h_stride, tile += LANES) {
        __m512 sum = _mm512_loadu_ps(tile);
        for (int r = 0; r < rank; r++) {
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(values + r * LANES), _mm512_set1_ps(h[r]), sum);
        }
        _mm512_storeu_ps(tile, sum);
    }
}

TARGET static void scale(const float *steps, int tokens, float *tile) {
    __m512 step = _mm512_loadu_ps(steps);
    for (int t = 0; t < tokens; t++, tile += LANES) {
        _mm512_storeu_ps(tile, _mm512_mul_ps(_mm512_loadu_ps(tile), step));
    }
}

TARGET static void add_to(const float *tiles, const float *steps, int tokens, const Outputs &y,
                          int lanes) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT, AHEAD = 8;
    ptrdiff_t size = y.type == FLOAT32 ? 4 : 2;
    for (int t = 0; t < tokens; t++) {
        char *row = y.first + y.order[t] * y.stride;
        // Rows lie far from each other: those that come next are asked for.
        const char *next = y.first + y.order[std::min(t + AHEAD, tokens - 1)] * y.stride;
        __builtin_prefetch(next, 1);
        if (lanes > 2 * LANES) __builtin_prefetch(next + 64, 1);
        for (int at = 0; at < lanes; at += LANES, row += LANES * size) {
            __mmask16 mask = first(lanes - at);
            __m512 tile = _mm512_loadu_ps(tiles + ptrdiff_t(at) * tokens + t * LANES);
            __m512 sum = _mm512_fmadd_ps(tile, _mm512_loadu_ps(steps + at), load16(row, y.type, 0, mask));
            if (y.type == FLOAT32) {
                _mm512_mask_storeu_ps(row, mask, sum);
            } else {
                __m256i half = y.type == FLOAT16 ? _mm512_cvtps_ph(sum, nearest) : to_bfloat16(sum);
                _mm256_mask_storeu_epi16(row, mask, half);
            }
        }
    }
}

}  // namespace deltamux::AVX512_NAMESPACE

#include "avx512_few.h"

namespace deltamux::AVX512_NAMESPACE {

static Layout layout(int tokens) { return {1, false, tokens <= PANEL, tokens <= PANEL}; }

static const Kernels KERNELS = {
    NAME, quantize, widen, unpack, add_escapes, multiply, multiply_exact, multiply_planes, interleave,
    sum_escapes,
    dot, dot_int8, scale, add_outer, add_to, layout, nullptr, nullptr,
};

}  // namespace deltamux::AVX512_NAMESPACE
