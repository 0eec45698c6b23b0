// From the symbols of an entropy-coded matrix to its codes, and from codes to planes and escapes.
//
// What `artifact/run_lengths.py` and `image/planes.py` define, element by element, where Python is the
// limit: an expert of 7 billion weights is loaded in seconds. Nothing is read or written outside of what
// the caller hands over, whatever the symbols are; damage is told by the result.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LOWEST_DIFFERENCE = -8, HIGHEST_DIFFERENCE = 7;
constexpr int64_t BLOCK_COLUMNS = 4096;
constexpr int BLOCK_BITS = 12;
constexpr int PLANE_CODES = 4;

// What `expand` finds wrong.
enum Damage { NONE, NO_SUCH_SYMBOL, TOO_MANY_CODES };

// What each symbol of a class stands for. The run that ends in no code is taken to end in one more of the
// commonest, which stands there already: so every symbol moves on and writes one code.
struct Alphabet {
    uint8_t widths[256];  // codes of the run and the one that ends it
    uint8_t values[256];  // the latter
    int escape;           // the last symbol

    Alphabet(int lowest, int commonest, int highest) {
        int others = highest - lowest, longest = 255 / others;
        escape = longest * others;
        for (int symbol = 0; symbol < 256; symbol++) {
            int value = lowest + symbol % others;
            values[symbol] = uint8_t(value + (value >= commonest));
            widths[symbol] = uint8_t(symbol / others + 1);
        }
        widths[escape] = uint8_t(longest);
        values[escape] = uint8_t(commonest);
    }
};

// The codes of a class, row after row of the matrix: `width` of them a row, `rows` rows.
template <bool ROWS>
int expand_class(const uint8_t *symbols, int64_t count, const Alphabet &alphabet, const int32_t *lines,
                 int64_t width, int64_t rows, int64_t stride, uint8_t *codes) {
    int64_t at = -1, row = 0;
    uint8_t *start = codes + (ROWS ? lines[0] * stride : 0);
    for (int64_t each = 0; each < count; each++) {
        int symbol = symbols[each];
        at += alphabet.widths[symbol];
        while (at >= width) {
            at -= width;
            if (++row >= rows) return TOO_MANY_CODES;
            start = ROWS ? codes + lines[row] * stride : start + stride;
        }
        start[ROWS ? at : lines[at]] = alphabet.values[symbol];
    }
    return NONE;
}

// Bytes below 4, eight at a time, as two bytes of four codes each.
inline uint16_t pack_eight(uint64_t codes) {
    codes = (codes | codes >> 6) & 0x000F000F000F000Full;
    codes = (codes | codes >> 12) & 0x000000FF000000FFull;
    return uint16_t(codes | codes >> 24);
}

struct Escapes {
    uint16_t *entries;
    int64_t count, capacity;

    void add(int64_t column, int difference) {
        while (difference) {
            int part = std::clamp(difference, LOWEST_DIFFERENCE, HIGHEST_DIFFERENCE);
            if (count < capacity) {
                int packed = int(column % BLOCK_COLUMNS) | (part - LOWEST_DIFFERENCE) << BLOCK_BITS;
                entries[count] = uint16_t(packed);
            }
            count++;
            difference -= part;
        }
    }
};

// Codes of a row as one plane; what lies outside of the window becomes escapes.
void pack_row(const uint8_t *codes, int64_t first, int64_t stop, int window, bool plane, uint8_t *out,
              Escapes &escapes) {
    constexpr uint64_t EACH = 0x0101010101010101ull;
    int highest = plane ? window + PLANE_CODES - 1 : window;
    // Codes below 16 stay above nought in each byte when the window is taken off 128 more.
    uint64_t outside = plane ? 0xFCFCFCFCFCFCFCFCull : 0xFFFFFFFFFFFFFFFFull;
    for (int64_t j = first; j < stop; j += 8) {
        uint64_t eight = EACH * uint64_t(window);
        std::memcpy(&eight, codes + j, size_t(std::min<int64_t>(8, stop - j)));
        uint64_t moved = (eight | EACH << 7) - EACH * uint64_t(window);
        for (uint64_t left = (moved & outside) ^ EACH << 7; left != 0;) {
            int shift = __builtin_ctzll(left) & ~7;
            int code = int(eight >> shift & 255), clipped = std::clamp(code, window, highest);
            escapes.add(j + shift / 8, code - clipped);
            moved = (moved & ~(255ull << shift)) | uint64_t(clipped - window) << shift;
            left &= ~(255ull << shift);
        }
        if (!plane) continue;
        uint16_t packed = pack_eight(moved & EACH * 3);
        if (j + 8 > stop) {
            // Behind the last column there are codes of nought.
            int bits = int(stop - j) * 2;
            packed = uint16_t(packed & ((1 << bits) - 1));
        }
        std::memcpy(out + j / 4, &packed, sizeof packed);
    }
}

// Codes below 16 of a row as two planes.
void pack_two(const uint8_t *codes, int64_t columns, uint8_t *low, uint8_t *high) {
    constexpr uint64_t EACH = 0x0101010101010101ull;
    for (int64_t j = 0; j < columns; j += 8) {
        uint64_t eight = 0;
        std::memcpy(&eight, codes + j, size_t(std::min<int64_t>(8, columns - j)));
        uint16_t packed = pack_eight(eight & EACH * 3);
        std::memcpy(low + j / 4, &packed, sizeof packed);
        packed = pack_eight(eight >> 2 & EACH * 3);
        std::memcpy(high + j / 4, &packed, sizeof packed);
    }
}

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Puts the codes of one class into a matrix that holds its commonest code wherever the class has lines.
//
// lines: int32 [num_lines] rows (axis 0) or columns (axis 1), ascending; codes: uint8 [rows, columns].
// The alphabet has more than one code. 0, or what is wrong with the symbols.
EXPORTED int deltamux_expand(const uint8_t *symbols, int64_t count, int lowest, int commonest,
                             int highest, const int32_t *lines, int64_t num_lines, int axis,
                             int64_t rows, int64_t columns, uint8_t *codes) {
    if (count > 0 && (num_lines == 0 || rows == 0 || columns == 0)) return TOO_MANY_CODES;
    Alphabet alphabet(lowest, commonest, highest);
    uint8_t last = 0;
    for (int64_t each = 0; each < count; each++) last = std::max(last, symbols[each]);
    if (last > alphabet.escape) return NO_SUCH_SYMBOL;
    if (axis == 0) {
        return expand_class<true>(symbols, count, alphabet, lines, columns, num_lines, columns, codes);
    }
    return expand_class<false>(symbols, count, alphabet, lines, num_lines, rows, columns, codes);
}

// Adds to counts [256] how often each code occurs.
EXPORTED void deltamux_count(const uint8_t *codes, int64_t size, int64_t *counts) {
    constexpr int64_t MOST = int64_t(1) << 30;
    for (int64_t start = 0; start < size; start += MOST) {
        // Neighbours are often alike: counting them apart does not wait for the count before. Two codes
        // below 16 are counted as one.
        uint32_t pairs[4][256] = {};
        int64_t stop = std::min(size, start + MOST), at = start;
        for (; at + 8 <= stop; at += 8) {
            uint64_t eight;
            std::memcpy(&eight, codes + at, sizeof eight);
            if (eight & 0xF0F0F0F0F0F0F0F0ull) {
                for (int each = 0; each < 8; each++) counts[codes[at + each]]++;
                continue;
            }
            eight |= eight >> 4;
            for (int each = 0; each < 4; each++) pairs[each][eight >> 16 * each & 255]++;
        }
        for (; at < stop; at++) counts[codes[at]]++;
        for (int pair = 0; pair < 256; pair++) {
            for (auto &part : pairs) {
                counts[pair & 15] += part[pair];
                counts[pair >> 4] += part[pair];
            }
        }
    }
}

// Packs codes [rows, columns] below 16 into planes [rows, stride], whose padding is nought already.
//
// planes: 1: `low` gets codes from `window` to `window` + 3; 2: `low` and `high` get all; 0: neither, all
// that is not `window` escapes. starts: [rows * blocks + 1]. The number of escapes; those beyond
// `capacity` are not written.
EXPORTED int64_t deltamux_pack(const uint8_t *codes, int64_t rows, int64_t columns, int planes,
                               int window, int64_t stride, uint8_t *low, uint8_t *high,
                               uint32_t *starts, uint16_t *entries, int64_t capacity) {
    Escapes escapes{entries, 0, capacity};
    for (int64_t row = 0; row < rows; row++, codes += columns) {
        if (planes == 2) {
            pack_two(codes, columns, low + row * stride, high + row * stride);
            continue;
        }
        for (int64_t first = 0; first < columns; first += BLOCK_COLUMNS) {
            if (starts) *starts++ = uint32_t(escapes.count);
            int64_t stop = std::min(columns, first + BLOCK_COLUMNS);
            pack_row(codes, first, stop, window, planes == 1, planes ? low + row * stride : nullptr,
                     escapes);
        }
    }
    if (starts && planes != 2) *starts = uint32_t(escapes.count);
    return escapes.count;
}

}  // extern "C"
