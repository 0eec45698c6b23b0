// AMX: tiles of 16 by 64 bytes are multiplied whole. A unit of codes is such a tile, and so are the 64
// inputs of a panel's 16 tokens. Two panels times two blocks of rows are worked on at once, so that a
// tile that was loaded is used twice. Few tokens are faster with AVX-512, which does all the rest.

#pragma once

#define TARGET_AMX \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,amx-tile,amx-int8")))

namespace deltamux::amx {

// Tokens from which on tiles pay.
constexpr int FEW_TOKENS = 12;

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, by panel and block; 4 and 5 the inputs of panels; 6 and 7 codes of blocks. Of one
// panel, tiles 2 and 3 are further sums of every other unit, because a tile waits long for its last sum.
TARGET_AMX static inline void shape_tiles(int tokens) {
    TileShapes shapes;
    for (int tile = 0; tile < 8; tile++) {
        shapes.row_bytes[tile] = 64;
        shapes.rows[tile] = uint8_t(tile < 6 ? tokens : LANES);
    }
    _tile_loadconfig(&shapes);
}

// What some panels and blocks have in common.
struct Part {
    const Inputs &inputs;
    int units, first, tokens;
    float zero;
};

// The sums of a group of columns, brought to float32.
TARGET_AMX static inline void add_sums(const Part &part, const int32_t *sums, const int32_t *more,
                                       int token, int group, float *tile) {
    bool fresh = group == 0;
    for (int t = 0; t < part.tokens; t++) {
        ptrdiff_t at = ptrdiff_t(token + t) * part.inputs.groups + group;
        __m512i whole = _mm512_load_si512(sums + t * LANES);
        if (more) whole = _mm512_add_epi32(whole, _mm512_load_si512(more + t * LANES));
        __m512 sum = _mm512_cvtepi32_ps(whole);
        sum = _mm512_fnmadd_ps(_mm512_set1_ps(part.inputs.sums[at]), _mm512_set1_ps(part.zero), sum);
        float *total = tile + ptrdiff_t(token + t) * LANES;
        __m512 before = fresh ? _mm512_setzero_ps() : _mm512_load_ps(total);
        _mm512_store_ps(total, _mm512_fmadd_ps(sum, _mm512_set1_ps(part.inputs.scales[at]), before));
    }
}

template <int PANELS, int BLOCKS>
TARGET_AMX static inline void multiply_part(const Part &part, const uint8_t *codes, int panel,
                                            float *tiles) {
    alignas(64) int32_t sums[4][PANEL * LANES];
    ptrdiff_t unit_bytes = ptrdiff_t(part.tokens) * UNIT_COLUMNS;
    ptrdiff_t panel_bytes = ptrdiff_t(PANEL) * part.inputs.units * UNIT_COLUMNS;
    ptrdiff_t block_bytes = ptrdiff_t(part.units) * UNIT_CODES;
    ptrdiff_t tile_floats = ptrdiff_t(part.inputs.tokens) * LANES;
    const int8_t *x = part.inputs.levels + panel * panel_bytes + part.first * unit_bytes;
    int group = part.first / GROUP_UNITS;
    for (int left = part.units, units; left > 0; left -= units, group++) {
        _tile_zero(0);
        _tile_zero(2);
        if (BLOCKS > 1) {
            _tile_zero(1);
            _tile_zero(3);
        }
        units = units_of_group(left);
        for (int unit = 0; unit < units; unit++, codes += UNIT_CODES, x += unit_bytes) {
            bool other = PANELS == 1 && unit % 2;
            _tile_loadd(4, x, 64);
            _tile_loadd(6, codes, 64);
            if (other) {
                _tile_dpbsud(2, 4, 6);
            } else {
                _tile_dpbsud(0, 4, 6);
            }
            if (PANELS > 1) {
                _tile_loadd(5, x + panel_bytes, 64);
                _tile_dpbsud(2, 5, 6);
            }
            if (BLOCKS == 1) continue;
            _tile_loadd(7, codes + block_bytes, 64);
            if (other) {
                _tile_dpbsud(3, 4, 7);
            } else {
                _tile_dpbsud(1, 4, 7);
            }
            if (PANELS > 1) _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(2, sums[2], 64);
        if (BLOCKS > 1) {
            _tile_stored(1, sums[1], 64);
            _tile_stored(3, sums[3], 64);
        }
        int token = panel * PANEL;
        for (int block = 0; block < BLOCKS; block++) {
            float *tile = tiles + block * tile_floats;
            add_sums(part, sums[block], PANELS == 1 ? sums[2 + block] : nullptr, token, group, tile);
            if (PANELS > 1) add_sums(part, sums[2 + block], nullptr, token + PANEL, group, tile);
        }
    }
}

template <int BLOCKS>
TARGET_AMX static inline void multiply_blocks(const Codes &run, const Inputs &inputs, float zero,
                                              const uint8_t *codes, float *tiles) {
    Part part{inputs, run.units, run.first, PANEL, zero};
    int panel = 0, whole = inputs.tokens / PANEL;
    if (whole) shape_tiles(PANEL);
    for (; panel + 2 <= whole; panel += 2) multiply_part<2, BLOCKS>(part, codes, panel, tiles);
    if (panel < whole) multiply_part<1, BLOCKS>(part, codes, panel, tiles);
    if (int rest = inputs.tokens % PANEL) {
        part.tokens = rest;
        shape_tiles(rest);
        multiply_part<1, BLOCKS>(part, codes, whole, tiles);
    }
}

TARGET_AMX static void multiply(const Codes &run, const Inputs &inputs, float zero, float *tiles) {
    if (inputs.tokens < FEW_TOKENS) return vnni::multiply(run, inputs, zero, tiles);
    for (int block = 0; block < run.blocks;) {
        const uint8_t *codes = run.codes + ptrdiff_t(block) * run.units * UNIT_CODES;
        float *rows = tiles + ptrdiff_t(block) * inputs.tokens * LANES;
        if (block + 2 <= run.blocks) {
            multiply_blocks<2>(run, inputs, zero, codes, rows);
            block += 2;
        } else {
            multiply_blocks<1>(run, inputs, zero, codes, rows);
            block++;
        }
    }
    _tile_release();
}

static int blocks(int tokens) { return tokens < FEW_TOKENS ? 1 : 2; }

static const Kernels KERNELS = {
    "amx",     vnni::quantize, vnni::widen, vnni::unpack,    multiply,     vnni::multiply_exact,
    vnni::dot, vnni::dot_int8, vnni::scale, vnni::add_outer, vnni::add_to, blocks,
};

}  // namespace deltamux::amx
