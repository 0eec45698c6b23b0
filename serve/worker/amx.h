// AMX: tiles of 16 by 64 bytes are multiplied whole. A unit of codes is such a tile, and so are the 64
// inputs of a panel's 16 tokens. Few tokens are faster with AVX-512, which all the rest is done by.

#pragma once

#define TARGET_AMX \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,amx-tile,amx-int8")))

namespace deltamux::amx {

// Tokens from which on tiles pay.
constexpr int FEW_TOKENS = 12;
// Panels that share a tile of codes.
constexpr int PANELS = 4;

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 a panel's inputs, 5 codes; `tokens` rows for sums and inputs.
TARGET_AMX static inline void shape_tiles(int tokens) {
    TileShapes shapes;
    for (int tile = 0; tile < 6; tile++) {
        shapes.row_bytes[tile] = 64;
        shapes.rows[tile] = uint8_t(tile == 5 ? 16 : tokens);
    }
    _tile_loadconfig(&shapes);
}

// The sums of a group, brought to float32.
TARGET_AMX static inline void add_sums(const int32_t *sums, const Inputs &inputs, int first, int tokens,
                                       int group, int zero, float *tile) {
    for (int t = 0; t < tokens; t++) {
        ptrdiff_t at = ptrdiff_t(first + t) * inputs.groups + group;
        __m512i sum = _mm512_load_si512(sums + t * LANES);
        sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(zero * inputs.sums[at]));
        float *total = tile + ptrdiff_t(first + t) * LANES;
        __m512 scale = _mm512_set1_ps(inputs.scales[at]);
        _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_load_ps(total)));
    }
}

// `COUNT` panels of `tokens` tokens each.
template <int COUNT>
TARGET_AMX static inline void multiply_panels(const Codes &run, const Inputs &inputs, int panel,
                                              int tokens, int zero, float *tile) {
    alignas(64) int32_t sums[COUNT][PANEL * LANES];
    ptrdiff_t unit_bytes = ptrdiff_t(tokens) * UNIT_COLUMNS;
    ptrdiff_t panel_bytes = ptrdiff_t(PANEL) * inputs.units * UNIT_COLUMNS;
    const int8_t *x = inputs.levels + panel * panel_bytes + run.first * unit_bytes;
    const uint8_t *codes = run.codes;
    int group = run.first / GROUP_UNITS;
    for (int left = run.units; left > 0; left -= GROUP_UNITS, group++) {
        _tile_zero(0);
        if (COUNT > 1) _tile_zero(1);
        if (COUNT > 2) _tile_zero(2);
        if (COUNT > 3) _tile_zero(3);
        for (int unit = left < GROUP_UNITS ? left : GROUP_UNITS; unit > 0; unit--) {
            _tile_loadd(5, codes, 64);
            _tile_loadd(4, x, 64);
            _tile_dpbsud(0, 4, 5);
            if (COUNT > 1) {
                _tile_loadd(4, x + panel_bytes, 64);
                _tile_dpbsud(1, 4, 5);
            }
            if (COUNT > 2) {
                _tile_loadd(4, x + 2 * panel_bytes, 64);
                _tile_dpbsud(2, 4, 5);
            }
            if (COUNT > 3) {
                _tile_loadd(4, x + 3 * panel_bytes, 64);
                _tile_dpbsud(3, 4, 5);
            }
            codes += UNIT_CODES;
            x += unit_bytes;
        }
        _tile_stored(0, sums[0], 64);
        if (COUNT > 1) _tile_stored(1, sums[COUNT > 1 ? 1 : 0], 64);
        if (COUNT > 2) _tile_stored(2, sums[COUNT > 2 ? 2 : 0], 64);
        if (COUNT > 3) _tile_stored(3, sums[COUNT > 3 ? 3 : 0], 64);
        for (int each = 0; each < COUNT; each++) {
            add_sums(sums[each], inputs, (panel + each) * PANEL, tokens, group, zero, tile);
        }
    }
}

TARGET_AMX static void multiply(const Codes &codes, const Inputs &inputs, int zero, float *tile) {
    if (inputs.tokens < FEW_TOKENS) return vnni::multiply(codes, inputs, zero, tile);
    int panel = 0, whole = inputs.tokens / PANEL;
    if (whole) shape_tiles(PANEL);
    for (; panel + PANELS <= whole; panel += PANELS) {
        multiply_panels<PANELS>(codes, inputs, panel, PANEL, zero, tile);
    }
    switch (whole - panel) {
        case 3: multiply_panels<3>(codes, inputs, panel, PANEL, zero, tile); break;
        case 2: multiply_panels<2>(codes, inputs, panel, PANEL, zero, tile); break;
        case 1: multiply_panels<1>(codes, inputs, panel, PANEL, zero, tile); break;
    }
    if (int rest = inputs.tokens % PANEL) {
        shape_tiles(rest);
        multiply_panels<1>(codes, inputs, whole, rest, zero, tile);
    }
    _tile_release();
}

static const Kernels KERNELS = {
    "amx",     vnni::quantize, vnni::widen, vnni::unpack,    multiply, vnni::multiply_exact,
    vnni::dot, vnni::dot_int8, vnni::scale, vnni::add_outer, vnni::add_to,
};

}  // namespace deltamux::amx
