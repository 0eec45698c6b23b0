// Escapes: what codes of a plane are short of, added to them after unpacking.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "lanes.h"
#include "portable.h"
#include "record.h"

namespace deltamux {

// Escapes of a block of rows that are gone through in one loop, and those of a row that are usual.
constexpr size_t MOST_LISTED = 2048, FEW_ESCAPES = 32;

// An escape that has no room in a code.
struct Single {
    int block, lane, column, extra;
};

// Some escapes of one block of rows and columns.
struct Listed {
    const uint16_t *escapes;
    const uint8_t *lane_of;
    size_t count;
    int block, first_column;
};

__attribute__((noinline)) inline void add_listed(const Listed &list, uint8_t *codes,
                                                 std::vector<Single> &singles) {
    uint16_t places[MOST_LISTED];
    int8_t extras[MOST_LISTED];
    for (size_t each = 0; each < list.count; each++) {
        unsigned escape = list.escapes[each];
        // The column's group of four, its place within the group, and the lane.
        places[each] = uint16_t((escape & 0xFF0) << 4 | (escape & 3) << 6 | (escape >> 2 & 3) |
                                unsigned(list.lane_of[each]) << 2);
        extras[each] = int8_t(int(escape >> BLOCK_BITS) - MIDDLE);
    }
    for (size_t each = 0; each < list.count; each++) {
        int sum = codes[places[each]] + extras[each];
        if (__builtin_expect(unsigned(sum) <= MOST_CODE, 1)) {
            codes[places[each]] = uint8_t(sum);
        } else {
            int column = list.first_column + (list.escapes[each] & (BLOCK_COLUMNS - 1));
            singles.push_back({list.block, list.lane_of[each], column, extras[each]});
        }
    }
}

// Escapes become part of the codes. Rows have few of them each, and loops of a few turns cost more
// than what is done in them: so those of all lanes are gone through in one, beside a list of lanes.
inline void add_escapes(const Record &record, const Lanes &lanes, int block, int run,
                        uint8_t *codes, std::vector<Single> &singles) {
    const uint32_t *starts = record.starts + size_t(lanes.first_coded) * record.blocks + run;
    uint8_t lane_of[MOST_LISTED + FEW_ESCAPES];
    Listed list{record.escapes, lane_of, 0, block, run * BLOCK_COLUMNS};
    if (record.blocks == 1 && starts[lanes.coded] - starts[0] <= MOST_LISTED) {
        for (int lane = 0; lane < lanes.coded; lane++) {
            uint8_t *lane_here = lane_of + (starts[lane] - starts[0]);
            size_t count = starts[lane + 1] - starts[lane];
            // What is written too much, the next row's lane is written over.
            std::memset(lane_here, lane, FEW_ESCAPES);
            if (__builtin_expect(count > FEW_ESCAPES, 0)) std::memset(lane_here, lane, count);
        }
        list.escapes += starts[0];
        list.count = starts[lanes.coded] - starts[0];
        add_listed(list, codes, singles);
        return;
    }
    for (int lane = 0; lane < lanes.coded; lane++, starts += record.blocks) {
        std::memset(lane_of, lane, std::min<size_t>(starts[1] - starts[0], MOST_LISTED));
        for (uint32_t at = starts[0]; at < starts[1]; at += MOST_LISTED) {
            list.escapes = record.escapes + at;
            list.count = std::min<size_t>(starts[1] - at, MOST_LISTED);
            add_listed(list, codes, singles);
        }
    }
}

// One that no code has room for is multiplied by itself.
inline void add_single(int column, int extra, const Inputs &inputs, float *tile) {
    int unit = column / UNIT_COLUMNS, run = unit / RUN_UNITS * RUN_UNITS;
    int last = count_groups(std::min(inputs.units, run + RUN_UNITS)) - 1;
    int group = std::min(unit / GROUP_UNITS, last);
    for (int t = 0; t < inputs.tokens; t++) {
        int tokens = inputs.whole_panels ? PANEL : panel_tokens(inputs.tokens, t / PANEL);
        size_t place = size_t(t / PANEL) * PANEL * inputs.units * UNIT_COLUMNS +
                       (size_t(unit) * tokens + t % PANEL) * UNIT_COLUMNS +
                       portable::place_of(column % UNIT_COLUMNS);
        float x = inputs.exact ? inputs.exact[place]
                               : float(inputs.levels[place]) *
                                     inputs.scales[size_t(t) * inputs.groups + group];
        tile[t * LANES] += float(extra) * x;
    }
}

}  // namespace deltamux
