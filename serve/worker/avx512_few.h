// AVX-512: products of few tokens, straight from planes. Included beside `avx512.h`, in the same two ways.
//
// No include guard on purpose.

namespace deltamux::AVX512_NAMESPACE {

// Codes straight from planes: each is used for all tokens while it is in a register.
template <int TOKENS, int SETS>
TARGET static inline void multiply_planes_of(const PlaneRows &planes, const Inputs &inputs, float zero,
                                             const int32_t *extra, float *tile) {
    const int8_t *x = inputs.levels;
    const uint8_t *first = planes.first;
    const ptrdiff_t stride = planes.stride;
    const __m512i no_offset = _mm512_setzero_si512();
    for (int unit = 0, group = 0; unit < inputs.units; group++) {
        __m512i sums[TOKENS][SETS];
        UNROLLED for (int t = 0; t < TOKENS; t++) {
            UNROLLED for (int set = 0; set < SETS; set++) sums[t][set] = _mm512_setzero_si512();
        }
        int end = unit + units_of_group(std::min(inputs.units - unit, RUN_UNITS - unit % RUN_UNITS));
        for (; unit < end; unit++, x += TOKENS * UNIT_COLUMNS) {
            __m512i words[4], upper[4];
            ptrdiff_t at = ptrdiff_t(unit) * UNIT_PLANE_BYTES;
            fetch_unit(planes.ahead, unit);
            load_words([&](int row) { return first + row * stride + at; }, words);
            if (planes.second) {
                fetch_unit(planes.ahead + planes.second, unit);
                load_words([&](int row) { return first + row * stride + planes.second + at; }, upper);
            }
            UNROLLED for (int i = 0; i < 4; i++) {
                __m512i codes[4];
                if (planes.second) {
                    codes[0] = codes_at<0>(words[i], upper[i], no_offset);
                    codes[1] = codes_at<1>(words[i], upper[i], no_offset);
                    codes[2] = codes_at<2>(words[i], upper[i], no_offset);
                    codes[3] = codes_at<3>(words[i], upper[i], no_offset);
                } else {
                    codes[0] = codes_at<0>(words[i], no_offset);
                    codes[1] = codes_at<1>(words[i], no_offset);
                    codes[2] = codes_at<2>(words[i], no_offset);
                    codes[3] = codes_at<3>(words[i], no_offset);
                }
                UNROLLED for (int q = 0; q < 4; q++) {
                    UNROLLED for (int t = 0; t < TOKENS; t++) {
                        int32_t four;
                        std::memcpy(&four, x + t * UNIT_COLUMNS + 16 * i + 4 * q, sizeof four);
                        DOT(sums[t][q % SETS], codes[q], _mm512_set1_epi32(four));
                    }
                }
            }
        }
        UNROLLED for (int t = 0; t < TOKENS; t++) {
            UNROLLED for (int set = 1; set < SETS; set++) {
                sums[t][0] = _mm512_add_epi32(sums[t][0], sums[t][set]);
            }
            if (extra) {
                const int32_t *own = extra + (ptrdiff_t(group) * TOKENS + t) * LANES;
                sums[t][0] = _mm512_add_epi32(sums[t][0], _mm512_load_si512(own));
            }
            ptrdiff_t at = ptrdiff_t(t) * inputs.groups + group;
            __m512 sum = _mm512_cvtepi32_ps(sums[t][0]);
            sum = _mm512_fnmadd_ps(_mm512_set1_ps(inputs.sums[at]), _mm512_set1_ps(zero), sum);
            __m512 total = group == 0 ? _mm512_setzero_ps() : _mm512_load_ps(tile + t * LANES);
            total = _mm512_fmadd_ps(sum, _mm512_set1_ps(inputs.scales[at]), total);
            _mm512_store_ps(tile + t * LANES, total);
        }
    }
}

TARGET static void multiply_planes(const PlaneRows &planes, const Inputs &inputs, float zero,
                                   const int32_t *extra, float *tile) {
    switch (inputs.tokens) {
#define CASE(tokens, sets) \
    case tokens: \
        multiply_planes_of<tokens, sets>(planes, inputs, zero, extra, tile); \
        break;
        CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 2) CASE(5, 2) CASE(6, 2) CASE(7, 1) CASE(8, 1)
        CASE(9, 1) CASE(10, 1) CASE(11, 1) CASE(12, 1) CASE(13, 1) CASE(14, 1) CASE(15, 1) CASE(16, 1)
#undef CASE
    }
}

// See `kernels.h`. A transposed 4 by 4 in every 16 bytes, which are in the order of codes.
TARGET static void interleave(const int8_t *levels, ptrdiff_t stride, int tokens, int units, int32_t *out) {
    for (int unit = 0; unit < units; unit++, levels += stride) {
        for (int at = 0; at < UNIT_COLUMNS; at += LANES, out += 4 * LANES) {
            __m512i each[4];
            UNROLLED for (int t = 0; t < 4; t++) {
                const int8_t *own = levels + (t < tokens ? t : 0) * UNIT_COLUMNS + at;
                __m512i wide = _mm512_cvtepi8_epi32(load_bytes(reinterpret_cast<const uint8_t *>(own)));
                each[t] = t < tokens ? wide : _mm512_setzero_si512();
            }
            __m512i low01 = _mm512_unpacklo_epi32(each[0], each[1]);
            __m512i high01 = _mm512_unpackhi_epi32(each[0], each[1]);
            __m512i low23 = _mm512_unpacklo_epi32(each[2], each[3]);
            __m512i high23 = _mm512_unpackhi_epi32(each[2], each[3]);
            _mm512_store_si512(out, _mm512_unpacklo_epi64(low01, low23));
            _mm512_store_si512(out + LANES, _mm512_unpackhi_epi64(low01, low23));
            _mm512_store_si512(out + 2 * LANES, _mm512_unpacklo_epi64(high01, high23));
            _mm512_store_si512(out + 3 * LANES, _mm512_unpackhi_epi64(high01, high23));
        }
    }
}

// The escapes of 16 rows in one list, and where those of each row and group of columns end.
struct EscapeList {
    static constexpr int ROOM = 1024;
    alignas(64) int32_t places[ROOM + LANES], extras[ROOM + LANES];
    int ends[LANES * (RUN_UNITS / GROUP_UNITS)];
    int count = 0;

    TARGET void add(const uint16_t *escapes, int size) {
        for (int at = 0; at < size; at += LANES) {
            __m512i each = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(size - at), escapes + at));
            __m512i column = _mm512_and_si512(each, _mm512_set1_epi32(BLOCK_COLUMNS - 1));
            __m512i extra = _mm512_srli_epi32(each, BLOCK_BITS);
            extra = _mm512_sub_epi32(extra, _mm512_set1_epi32(MIDDLE));
            // The upper half is a factor of nothing.
            extra = _mm512_and_si512(extra, _mm512_set1_epi32(0xFFFF));
            _mm512_storeu_si512(places + count + at, _mm512_slli_epi32(column, 2));
            _mm512_storeu_si512(extras + count + at, extra);
        }
        count += size;
    }
};

// How many escapes of a row lie before a column.
TARGET static inline int escapes_before(const uint16_t *escapes, int size, int column) {
    int found = 0;
    for (int at = 0; at < size; at += 2 * LANES) {
        __mmask32 mask = _bzhi_u32(~0u, unsigned(std::min(size - at, 2 * LANES)));
        __m512i each = _mm512_maskz_loadu_epi16(mask, escapes + at);
        each = _mm512_and_si512(each, _mm512_set1_epi16(BLOCK_COLUMNS - 1));
        __mmask32 before = _mm512_mask_cmplt_epu16_mask(mask, each, _mm512_set1_epi16(short(column)));
        found += __builtin_popcount(before);
    }
    return found;
}

// One token: products of 16 escapes of a row at a time, whose inputs are gathered, and their columns.
TARGET static inline __m512i gather_products(const uint16_t *escapes, int count, const int32_t *x,
                                             __m512i *column) {
    __mmask16 mask = first(count);
    __m512i each = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, escapes));
    *column = _mm512_and_si512(each, _mm512_set1_epi32(BLOCK_COLUMNS - 1));
    __m512i extra = _mm512_sub_epi32(_mm512_srli_epi32(each, BLOCK_BITS), _mm512_set1_epi32(MIDDLE));
    __m512i place = _mm512_slli_epi32(*column, 2);
    __m512i inputs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, place, x, sizeof(int32_t));
    // Factors have 16 bits: the upper half of one is a factor of nothing.
    return _mm512_madd_epi16(_mm512_and_si512(extra, _mm512_set1_epi32(0xFFFF)), inputs);
}

TARGET static void sum_escapes_of_one(const EscapeRows &rows, const int32_t *x, int groups, int32_t *sums) {
    std::fill(sums, sums + groups * LANES, 0);
    for (int lane = 0; lane < rows.count; lane++) {
        const uint32_t *starts = rows.starts + ptrdiff_t(lane) * rows.blocks;
        const uint16_t *escapes = rows.escapes + starts[0];
        int size = int(starts[1] - starts[0]);
        __m512i column, sum = _mm512_setzero_si512();
        for (int at = 0; at < size; at += LANES) {
            __m512i product = gather_products(escapes + at, size - at, x, &column);
            sum = _mm512_add_epi32(sum, product);
            if (groups == 1) continue;
            __m512i own = _mm512_srli_epi32(column, GROUP_BITS);
            own = _mm512_min_epi32(own, _mm512_set1_epi32(groups - 1));
            for (int group = 0; group < groups; group++) {
                __mmask16 here = _mm512_cmpeq_epi32_mask(own, _mm512_set1_epi32(group));
                sums[group * LANES + lane] += _mm512_mask_reduce_add_epi32(here, product);
            }
        }
        if (groups == 1) sums[lane] = _mm512_reduce_add_epi32(sum);
    }
}

// Levels of four tokens, or of eight, in one register.
template <int QUADS>
struct Levels;
template <>
struct Levels<1> {
    using type = __m128i;
    TARGET static type zero() { return _mm_setzero_si128(); }
    TARGET static type add(type sum, int32_t extra, const int32_t *x, ptrdiff_t) {
        const type *four = reinterpret_cast<const type *>(x);
        return _mm_add_epi32(sum, _mm_madd_epi16(_mm_set1_epi32(extra), _mm_load_si128(four)));
    }
    TARGET static type less(type a, type b) { return _mm_sub_epi32(a, b); }
};
template <>
struct Levels<2> {
    using type = __m256i;
    TARGET static type zero() { return _mm256_setzero_si256(); }
    TARGET static type add(type sum, int32_t extra, const int32_t *x, ptrdiff_t next) {
        __m128i low = _mm_load_si128(reinterpret_cast<const __m128i *>(x));
        __m128i high = _mm_load_si128(reinterpret_cast<const __m128i *>(x + next));
        type eight = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_set1_epi32(extra), eight));
    }
    TARGET static type less(type a, type b) { return _mm256_sub_epi32(a, b); }
};

// Sums up to every escape are kept, and those between two ends are their difference: so no loop ends with a
// row, of which most have few. The levels of four more tokens lie `next` behind.
template <int QUADS>
TARGET static void sum_list(const EscapeList &list, const int32_t *x, ptrdiff_t next, int tokens,
                            int all_tokens, int groups, int32_t *sums) {
    using Each = typename Levels<QUADS>::type;
    alignas(64) Each before[EscapeList::ROOM + 1];
    Each sum = Levels<QUADS>::zero();
    for (int each = 0; each < list.count; each++) {
        before[each] = sum;
        sum = Levels<QUADS>::add(sum, list.extras[each], x + list.places[each], next);
    }
    before[list.count] = sum;
    for (int group = 0; group < groups; group++, sums += ptrdiff_t(all_tokens) * LANES) {
        alignas(64) Each parts[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            int place = lane * groups + group, start = place ? list.ends[place - 1] : 0;
            parts[lane] = Levels<QUADS>::less(before[list.ends[place]], before[start]);
        }
        const uint8_t *bytes = reinterpret_cast<const uint8_t *>(parts);
        for (int four = 0; four < tokens; four += 4) {
            __m512i words[4];
            load_words([&](int row) { return bytes + row * sizeof(Each) + four * sizeof(int32_t); }, words);
            for (int t = 0; t < std::min(tokens - four, 4); t++) {
                _mm512_store_si512(sums + ptrdiff_t(four + t) * LANES, words[t]);
            }
        }
    }
}

// All escapes of 16 rows.
TARGET static void list_escapes(const EscapeRows &rows, int groups, EscapeList &list) {
    const uint32_t first = rows.starts[0];
    if (rows.blocks == 1) list.add(rows.escapes + first, int(rows.starts[rows.count] - first));
    int end = 0;
    for (int lane = 0; lane < rows.count; lane++) {
        const uint32_t *starts = rows.starts + ptrdiff_t(lane) * rows.blocks;
        const uint16_t *escapes = rows.escapes + starts[0];
        int size = int(starts[1] - starts[0]);
        if (rows.blocks > 1) list.add(escapes, size);
        for (int group = 0; group + 1 < groups; group++) {
            int stop = (group + 1) * GROUP_UNITS * UNIT_COLUMNS;
            list.ends[lane * groups + group] = end + escapes_before(escapes, size, stop);
        }
        end += size;
        list.ends[lane * groups + groups - 1] = end;
    }
    for (int place = rows.count * groups; place < LANES * groups; place++) list.ends[place] = end;
}

// See `kernels.h`.
TARGET static bool sum_escapes(const EscapeRows &rows, const int32_t *x, int x_columns, int tokens,
                               int groups, int32_t *sums) {
    if (tokens == 1) {
        sum_escapes_of_one(rows, x, groups, sums);
        return true;
    }
    uint32_t total = 0;
    for (int lane = 0; lane < rows.count; lane++) {
        const uint32_t *starts = rows.starts + ptrdiff_t(lane) * rows.blocks;
        total += starts[1] - starts[0];
    }
    if (total > EscapeList::ROOM) return false;
    EscapeList list;
    list_escapes(rows, groups, list);
    ptrdiff_t next = ptrdiff_t(x_columns) * 4;
    for (int done = 0; done < tokens; done += 8, x += 2 * next, sums += 8 * LANES) {
        int left = std::min(tokens - done, 8);
        if (left > 4) {
            sum_list<2>(list, x, next, left, tokens, groups, sums);
        } else {
            sum_list<1>(list, x, next, left, tokens, groups, sums);
        }
    }
    return true;
}

}  // namespace deltamux::AVX512_NAMESPACE
