// AMX: tiles of 16 by 64 bytes are multiplied whole. A unit of codes is such a tile, and so are the 64
// inputs of a panel's 16 tokens. Of two panels times two blocks of rows, worked on at once, every tile
// that is loaded is used twice. Few tokens are faster with AVX-512, which does all the rest.

#pragma once

#define TARGET_AMX \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,bmi2,amx-tile,amx-int8")))

namespace deltamux::amx {

// Tokens from which on tiles pay.
constexpr int FEW_TOKENS = 7;
// Tokens from which on several blocks of rows pay: their codes no longer fit into the first cache.
constexpr int MANY_TOKENS = 32;
// Units that inputs are asked for ahead.
constexpr int AHEAD = 2;

struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Eight whole tiles.
static const TileShapes SHAPES = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

TARGET_AMX static void begin() { _tile_loadconfig(&SHAPES); }

TARGET_AMX static void end() { _tile_release(); }

// What the products of a call have in common, as strides in bytes and floats.
struct Part {
    const Inputs &inputs;
    int units, first;
    float zero;
    ptrdiff_t panel, block, tile;
    const int32_t *extra;

    const int32_t *extra_of(int group, int token) const {
        return extra + (ptrdiff_t(group) * inputs.tokens + token) * LANES;
    }
};

// The sums of a group of columns, brought to float32.
TARGET_AMX static inline void add_sums(const Part &part, const int32_t *sums, int token, int group,
                                       float *tile) {
    int tokens = std::min(part.inputs.tokens - token, PANEL);
    for (int t = 0; t < tokens; t++) {
        ptrdiff_t at = ptrdiff_t(token + t) * part.inputs.groups + group;
        __m512i whole = _mm512_load_si512(sums + t * LANES);
        if (part.extra) whole = _mm512_add_epi32(whole, _mm512_load_si512(part.extra_of(group, token + t)));
        __m512 sum = _mm512_cvtepi32_ps(whole);
        sum = _mm512_fnmadd_ps(_mm512_set1_ps(part.inputs.sums[at]), _mm512_set1_ps(part.zero), sum);
        float *total = tile + ptrdiff_t(token + t) * LANES;
        __m512 before = group == 0 ? _mm512_setzero_ps() : _mm512_load_ps(total);
        _mm512_store_ps(total, _mm512_fmadd_ps(sum, _mm512_set1_ps(part.inputs.scales[at]), before));
    }
}

// Two panels by two blocks. Tiles 0 to 3 are their sums, 4 and 5 inputs, 6 and 7 codes.
TARGET_AMX static inline void multiply_two(const Part &part, const uint8_t *codes, int panel,
                                           float *tiles) {
    alignas(64) int32_t sums[4][PANEL * LANES];
    const int8_t *x = part.inputs.levels + panel * part.panel + part.first * UNIT_CODES;
    int group = part.first / GROUP_UNITS;
    for (int left = part.units, units; left > 0; left -= units, group++) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        units = units_of_group(left);
        for (int unit = 0; unit < units; unit++, codes += UNIT_CODES, x += UNIT_CODES) {
            for (int at = 0; at < UNIT_CODES; at += 64) {
                __builtin_prefetch(x + AHEAD * UNIT_CODES + at);
                __builtin_prefetch(x + part.panel + AHEAD * UNIT_CODES + at);
            }
            _tile_loadd(4, x, 64);
            _tile_loadd(6, codes, 64);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(7, codes + part.block, 64);
            _tile_dpbsud(1, 4, 7);
            _tile_loadd(5, x + part.panel, 64);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        for (int each = 0; each < 4; each++) {
            int token = (panel + each / 2) * PANEL;
            add_sums(part, sums[each], token, group, tiles + each % 2 * part.tile);
        }
    }
}

// One panel by one block.
TARGET_AMX static inline void multiply_one(const Part &part, const uint8_t *codes, int panel,
                                           float *tile) {
    alignas(64) int32_t sums[PANEL * LANES];
    const int8_t *x = part.inputs.levels + panel * part.panel + part.first * UNIT_CODES;
    int group = part.first / GROUP_UNITS;
    for (int left = part.units, units; left > 0; left -= units, group++) {
        _tile_zero(0);
        units = units_of_group(left);
        for (int unit = 0; unit < units; unit++, codes += UNIT_CODES, x += UNIT_CODES) {
            _tile_loadd(4, x, 64);
            _tile_loadd(6, codes, 64);
            _tile_dpbsud(0, 4, 6);
        }
        _tile_stored(0, sums, 64);
        add_sums(part, sums, panel * PANEL, group, tile);
    }
}

TARGET_AMX static void multiply(const Codes &run, const Inputs &inputs, float zero, float *tiles) {
    if (inputs.tokens < FEW_TOKENS) return vnni::multiply(run, inputs, zero, tiles);
    Part part{inputs,
              run.units,
              run.first,
              zero,
              ptrdiff_t(inputs.units) * UNIT_CODES,
              ptrdiff_t(run.units) * UNIT_CODES,
              ptrdiff_t(inputs.tokens) * LANES,
              run.extra};
    int panels = (inputs.tokens + PANEL - 1) / PANEL;
    for (int block = 0; block < run.blocks; block += 2) {
        bool two = block + 1 < run.blocks;
        const uint8_t *codes = run.codes + block * part.block;
        float *rows = tiles + block * part.tile;
        for (int panel = 0; panel < panels; panel += 2) {
            if (two && panel + 1 < panels) {
                multiply_two(part, codes, panel, rows);
                continue;
            }
            for (int each = panel; each < std::min(panel + 2, panels); each++) {
                multiply_one(part, codes, each, rows);
                if (two) multiply_one(part, codes + part.block, each, rows + part.tile);
            }
        }
    }
}

static Layout layout(int tokens) {
    if (tokens < FEW_TOKENS) return {1, false, true, true};
    return {tokens < MANY_TOKENS ? 1 : MOST_AT_ONCE, true, tokens <= PANEL, false};
}

static const Kernels KERNELS = {
    "amx", vnni::quantize, vnni::widen, vnni::unpack, vnni::add_escapes, multiply, vnni::multiply_exact,
    vnni::multiply_planes, vnni::interleave, vnni::sum_escapes, vnni::dot, vnni::dot_int8, vnni::scale,
    vnni::add_outer, vnni::add_to, layout, begin, end,
};

}  // namespace deltamux::amx
