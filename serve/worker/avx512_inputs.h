// AVX-512: numbers of 16 and 32 bits in, 8 bits out. Included beside `avx512.h`, in the same two ways.
//
// No include guard on purpose.

namespace deltamux::AVX512_NAMESPACE {

TARGET static inline __m512 load16(const void *x, Type type, ptrdiff_t at, __mmask16 mask) {
    if (type == FLOAT32) return _mm512_maskz_loadu_ps(mask, static_cast<const float *>(x) + at);
    const uint16_t *half = static_cast<const uint16_t *>(x) + at;
    __m256i bits = _mm256_maskz_loadu_epi16(mask, half);
    if (type == FLOAT16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// To the nearest bfloat16, ties to even; not a number stays one.
TARGET static inline __m256i to_bfloat16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

TARGET static inline __mmask16 first(int count) {
    return __mmask16(_bzhi_u32(0xFFFF, unsigned(std::clamp(count, 0, LANES))));
}

// The largest magnitude of some numbers; what comes out for those that are none is any number.
TARGET static inline float largest_of(const void *x, Type type, int start, int stop) {
    if (type == FLOAT32) {
        __m512 most = _mm512_setzero_ps();
        for (int j = start; j < stop; j += LANES) {
            most = _mm512_max_ps(most, _mm512_abs_ps(load16(x, type, j, first(stop - j))));
        }
        return _mm512_reduce_max_ps(most);
    }
    // Bits without the sign are in the order of the magnitudes.
    const uint16_t *half = static_cast<const uint16_t *>(x);
    const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
    __m512i most = _mm512_setzero_si512();
    for (int j = start; j < stop; j += 2 * LANES) {
        __mmask32 mask = stop - j >= 32 ? ~0u : (1u << (stop - j)) - 1;
        __m512i bits = _mm512_maskz_loadu_epi16(mask, half + j);
        most = _mm512_max_epu16(most, _mm512_and_si512(bits, magnitude));
    }
    __m256i halves = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
    __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    // The instruction finds the least.
    __m128i ones = _mm_set1_epi16(-1);
    uint16_t found = uint16_t(~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(eight, ones)), 0));
    return portable::load(&found, type, 0);
}

TARGET static void quantize(const void *x, Type type, int columns, int8_t *levels,
                            ptrdiff_t stride, float *scales, float *sums) {
    const __m512i transposed = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i words = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i ones = _mm512_set1_epi8(1);
    int units = (columns + UNIT_COLUMNS - 1) / UNIT_COLUMNS;
    for (int unit = 0, group = 0; unit < units; group++) {
        int end = unit + units_of_group(std::min(units - unit, RUN_UNITS - unit % RUN_UNITS));
        int start = unit * UNIT_COLUMNS, stop = std::min(end * UNIT_COLUMNS, columns);
        float largest = largest_of(x, type, start, stop);
        const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
        __m512i sum = _mm512_setzero_si512();
        for (; unit < end; unit++) {
            __m512i parts[4];
            for (int part = 0; part < 4; part++) {
                int j = unit * UNIT_COLUMNS + part * LANES;
                __m512 value = load16(x, type, j, first(stop - j));
                parts[part] = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
            }
            // Packing leaves words of four columns in the order of lanes.
            __m512i low = _mm512_packs_epi32(parts[0], parts[1]);
            __m512i high = _mm512_packs_epi32(parts[2], parts[3]);
            __m512i bytes = _mm512_permutexvar_epi32(words, _mm512_packs_epi16(low, high));
            bytes = _mm512_shuffle_epi8(bytes, transposed);
            DOT(sum, ones, bytes);
            _mm512_store_si512(levels + unit * stride, bytes);
        }
        scales[group] = largest / 127.0f;
        sums[group] = float(_mm512_reduce_add_epi32(sum));
    }
}

TARGET static void widen(const void *x, Type type, int columns, float *wide) {
    for (int j = 0; j < columns; j += LANES) {
        __mmask16 mask = first(columns - j);
        _mm512_mask_storeu_ps(wide + j, mask, load16(x, type, j, mask));
    }
}

}  // namespace deltamux::AVX512_NAMESPACE
