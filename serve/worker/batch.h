// The rows of a batch that belong to slots, and the pieces of work that they are.

#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "lanes.h"
#include "record.h"

namespace deltamux {

constexpr int MOST_SLICES = 8;
constexpr int NOT_BY_COLUMN = -1;

// A layer as Python prepares it once.
struct Linear {
    const uint8_t *slots;
    int64_t slot_bytes;
    int32_t num_slots, num_slices, columns, type;
    int32_t entries[MOST_SLICES], rows[MOST_SLICES];
};

// The rows of the batch that belong to a slot, within a pass.
struct Members {
    int first, tokens;
    int place;           // in the room for panels, in rows
    int at_once;         // blocks of 16 outputs that are worked on together
    bool whole_panels;
    bool escapes_apart, from_planes;  // see `Layout`
    int by_column;       // where its inputs by column begin, in numbers
};

// One slice of one slot with some rows of the batch.
struct Span {
    Record record;
    Members members;
    int slice_rows, slice_start;
    bool compact;         // blocks of coded rows, not of output rows
    int parts, part_end;  // so many pieces of work; the latter counted over all spans
    int thin_width;       // channels, directions of factors, a bias
    float *thin;          // [tokens][thin_width]

    Lanes lanes(int block) const {
        return compact ? lanes_of_coded(record, slice_rows, block)
                       : lanes_of_outputs(record, slice_rows, block);
    }

    int blocks() const { return divide_up(compact ? record.rows : slice_rows, LANES); }
};

// The rows order[first:first + tokens] of a batch: a pass.
struct Batch {
    std::vector<Members> members;
    std::vector<Span> spans;
    int64_t first;
    int tokens, panel_rows;
    int most_tokens, most_thin, most_at_once;
    int by_column;  // numbers of inputs by column
    bool coded, wide;  // whether some span has codes, and whether some asks for x in float32

    void plan(const Kernels &kernels, const Linear &layer, const int64_t *starts, int64_t from,
              int64_t to) {
        members.clear();
        spans.clear();
        first = from;
        tokens = int(to - from);
        panel_rows = most_tokens = most_thin = most_at_once = by_column = 0;
        coded = wide = false;
        for (int slot = 0; slot < layer.num_slots; slot++) {
            int begin = int(std::max(starts[slot], from) - from);
            int end = int(std::min(starts[slot + 1], to) - from);
            if (begin >= end) continue;
            add_members(kernels, Type(layer.type), begin, end - begin);
            add_spans(layer, layer.slots + slot * layer.slot_bytes);
        }
    }

    int parts() const { return spans.empty() ? 0 : spans.back().part_end; }

    const Span &span_of(int part) const {
        const Span *span = spans.data();
        while (part >= span->part_end) span++;
        return *span;
    }

    const Members &members_of(int token) const {
        const Members *found = members.data();
        while (found->first + found->tokens <= token) found++;
        return *found;
    }

  private:
    void add_members(const Kernels &kernels, Type type, int begin, int count) {
        Layout layout = type == FLOAT32 ? Layout{1, false, false, false} : kernels.layout(count);
        members.push_back({begin, count, panel_rows, layout.blocks, layout.whole_panels,
                           layout.escapes_apart, layout.from_planes, NOT_BY_COLUMN});
        panel_rows += layout.whole_panels ? divide_up(count, PANEL) * PANEL : count;
        most_tokens = std::max(most_tokens, count);
        most_at_once = std::max(most_at_once, layout.blocks);
    }

    void add_spans(const Linear &layer, const uint8_t *image) {
        for (int slice = 0, start = 0; slice < layer.num_slices; start += layer.rows[slice++]) {
            Record record = read_record(image, layer.entries[slice]);
            if (record.empty()) continue;
            Members &own = members.back();
            if (own.escapes_apart && record.escapes && own.by_column == NOT_BY_COLUMN) {
                own.by_column = by_column;
                int quads = divide_up(own.tokens, 4), units = divide_up(layer.columns, UNIT_COLUMNS);
                by_column += quads * units * UNIT_COLUMNS * 4;
            }
            Span span;
            span.record = record;
            span.members = members.back();
            span.slice_rows = layer.rows[slice];
            span.slice_start = start;
            span.thin_width = record.channels + record.rank + (record.vector ? 1 : 0);
            span.compact = record.row_map && span.thin_width == 0;
            span.parts = divide_up(span.blocks(), span.members.at_once);
            span.part_end = parts() + span.parts;
            span.thin = nullptr;
            most_thin = std::max(most_thin, span.thin_width);
            coded = coded || record.coded();
            wide = wide || record.rank > 0;
            spans.push_back(span);
        }
    }
};

}  // namespace deltamux
