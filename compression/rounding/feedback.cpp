// A block of channels of `gptq.py`'s pass, on a CPU: what torch would do in some ten calls a channel.
//
// Rows are independent: each is rounded channel by channel, and what a channel loses goes to the block's later ones.

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16, MOST_CHANNELS = 128;
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Choice __attribute__((vector_size(4 * LANES)));

// Adding and taking off 1.5 times 2^23 rounds numbers below 2^22 to the nearest whole one, halves to the even one.
constexpr float WHOLE = 12582912.0f;

inline __attribute__((always_inline)) Lanes load(const float *from, int count) {
    Lanes lanes = {};
    if (count == LANES) {
        std::memcpy(&lanes, from, sizeof lanes);
    } else {
        for (int m = 0; m < count; m++) lanes[m] = from[m];
    }
    return lanes;
}

inline __attribute__((always_inline)) void store(float *to, const Lanes &lanes, int count) {
    if (count == LANES) {
        std::memcpy(to, &lanes, sizeof lanes);
    } else {
        for (int m = 0; m < count; m++) to[m] = lanes[m];
    }
}

inline __attribute__((always_inline)) Lanes pick(Choice which, Lanes yes, Lanes no) {
    return Lanes((Choice(yes) & which) | (Choice(no) & ~which));
}

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DISPATCHED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DISPATCHED
#endif

// Shapes: B channels of the block, at most MOST_CHANNELS; M rows.
//   work    [B, M]  what is to be rounded; of exact channels, what is left over afterwards
//   factor  [B, B]  U of these channels, row-major
//   steps, inverse (0 where the step is), offset, lowest, highest  [M]
//   keep    [B, M]  0: the level is 0; or null
//   exact   [B]     1: nothing of the channel is lost
//   errors  [B, M]  written: what each channel lost, over U_jj
//   codes   [B, M]  written: level - lowest
//   sums    [M]     added to: the squares of `errors`
extern "C" DISPATCHED __attribute__((visibility("default"))) int deltamux_round_block(
    float *work, int64_t channels, int64_t rows, const float *factor, const float *steps, const float *inverse,
    const float *offset, const float *lowest, const float *highest, const uint8_t *keep, const uint8_t *exact,
    float *errors, uint8_t *codes, float *sums) {
    if (channels > MOST_CHANNELS) return 1;
    Lanes tile[MOST_CHANNELS];
    for (int64_t start = 0; start < rows; start += LANES) {
        int count = int(rows - start < LANES ? rows - start : LANES);
        Lanes step = load(steps + start, count), inv = load(inverse + start, count);
        Lanes off = load(offset + start, count), low = load(lowest + start, count);
        Lanes high = load(highest + start, count), sum = load(sums + start, count);
        for (int j = 0; j < channels; j++) tile[j] = load(work + j * rows + start, count);
        for (int j = 0; j < channels; j++) {
            const float *line = factor + j * channels;
            int64_t at = j * rows + start;
            Lanes level = tile[j] * inv - off;
            level = pick(level < low - off, low - off, level);
            level = pick(level > high - off, high - off, level);
            level = (level + WHOLE) - WHOLE + off;
            if (keep) {
                for (int m = 0; m < count; m++) level[m] = keep[at + m] ? level[m] : 0.0f;
            }
            Lanes lost = tile[j] - level * step;
            Choice code = __builtin_convertvector(level - low, Choice);
            for (int m = 0; m < count; m++) codes[at + m] = uint8_t(code[m]);
            if (exact[j]) {
                store(work + at, lost, count);
                store(errors + at, Lanes{}, count);
                continue;
            }
            lost *= 1.0f / line[j];
            sum += lost * lost;
            store(errors + at, lost, count);
            for (int i = j + 1; i < channels; i++) tile[i] -= line[i] * lost;
        }
        store(sums + start, sum, count);
    }
    return 0;
}
