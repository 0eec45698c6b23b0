// The product of a mixed batch with the deltas of its slots, straight from the slots' bytes.
//
// For the rows t of slot s:   y_t += x_t Δ̂_sᵀ + bias_s,   Δ̂_s as the slot image's record says: codes in
// two-bit planes with escapes, 16-bit channels, factors. Rows of the base are not touched, and y is
// rounded once. What a row gets depends neither on the other rows nor on the number of threads.
//
// A call goes over the rows in passes of at most PASS_TOKENS:
//   1. inputs: every row is rounded to 8 bits (float32 models: is reordered), `kernels.h` says how;
//   2. thin parts: a channel's inputs, and h = A x of factors, become a few numbers a token;
//   3. blocks of 16 output rows of one slot: codes are unpacked once and multiplied with all tokens of
//      the slot, escapes having been added to the codes; then come steps, thin parts, and y.
// Blocks are taken by whichever thread is free.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>

#include "batch.h"
#include "inputs.h"
#include "kernels.h"
#include "lanes.h"
#include "record.h"
#include "scratch.h"
#include "team.h"

namespace deltamux {

// Rows of a pass: enough to hide the unpacking, few enough for a core's cache.
constexpr int PASS_TOKENS = 512;
// Inputs up to here every thread rounds for itself, which is faster than waiting for the others.
constexpr int ALONE_ELEMENTS = 8192;

class Product {
  public:
    Product(const Kernels &kernels, const Linear &layer, void *y, const void *x, int64_t y_stride,
            int64_t x_stride, const int64_t *order, const int64_t *starts)
        : kernels_(kernels), layer_(layer), order_(order), starts_(starts) {
        Type type = Type(layer.type);
        element_ = type == FLOAT32 ? 4 : 2;
        x_ = {static_cast<const char *>(x), x_stride * element_, order, type, layer.columns};
        y_ = {static_cast<char *>(y), y_stride * element_, order, type};
        units_ = divide_up(layer.columns, UNIT_COLUMNS);
    }

    void run_all() {
        for (int64_t first = starts_[0], end = starts_[layer_.num_slots]; first < end;) {
            int64_t stop = std::min<int64_t>(end, first + PASS_TOKENS);
            batch_.plan(kernels_, layer_, starts_, first, stop);
            if (batch_.parts() > 0) {
                prepare();
                run(*this);
            }
            first = stop;
        }
    }

    // What each thread of the team does in a pass.
    void work(Member member) {
        static thread_local Scratch own, scratch;
        if (alone_) own.reserve(PassInputs::room(batch_, x_));
        PassInputs inputs = alone_ ? PassInputs(batch_, x_, own) : *shared_inputs_;
        int first = alone_ ? 0 : member.index, step = alone_ ? 1 : member.count;
        for (int t = first; t < batch_.tokens; t += step) inputs.prepare(kernels_, batch_, x_, t);
        if (!alone_) member.wait();
        if (batch_.by_column > 0) {
            for (const Members &members : batch_.members) {
                if (members.by_column == NOT_BY_COLUMN) continue;
                for (int four = first; 4 * four < members.tokens; four += step) {
                    inputs.interleave(kernels_, members, four);
                }
            }
            if (!alone_) member.wait();
        }
        if (batch_.most_thin > 0) {
            for (const Span &span : batch_.spans) prepare_thin(kernels_, span, x_, inputs, member);
            member.wait();
        }
        Workspace space = workspace(scratch);
        if (kernels_.begin) kernels_.begin();
        for (int part, stop; take_parts(member.count, part, stop);) {
            for (; part < stop; part++) do_part(part, inputs, space);
        }
        if (kernels_.end) kernels_.end();
    }

  private:
    // A thread's own memory.
    struct Workspace {
        uint8_t *codes;
        int32_t *extra;
        float *tiles, *values;
    };

    // Memory that the threads share in a pass.
    void prepare() {
        next_.store(0, std::memory_order_relaxed);
        alone_ = batch_.most_thin == 0 && batch_.tokens * layer_.columns <= ALONE_ELEMENTS;
        auto thin_size = [](const Span &span) { return size_t(span.members.tokens) * span.thin_width; };
        size_t room = alone_ ? 0 : PassInputs::room(batch_, x_);
        for (const Span &span : batch_.spans) room += Scratch::room<float>(thin_size(span));
        shared_.reserve(room);
        for (Span &span : batch_.spans) span.thin = shared_.take<float>(thin_size(span));
        if (!alone_) shared_inputs_.emplace(batch_, x_, shared_);
        x_.order = y_.order = order_ + batch_.first;
    }

    Workspace workspace(Scratch &scratch) const {
        size_t units = size_t(std::min(units_, RUN_UNITS));
        // Room for codes of a run, or for 16 rows of two planes.
        size_t rows = 2 * size_t(units_) * LANES * UNIT_PLANE_BYTES;
        size_t codes = std::max(batch_.most_at_once * units * UNIT_CODES, rows);
        size_t tiles = batch_.most_at_once * size_t(batch_.most_tokens) * LANES;
        size_t values = size_t(batch_.most_thin) * LANES;
        size_t extra = batch_.by_column ? size_t(count_groups(units_)) * PANEL * LANES : 0;
        scratch.reserve(Scratch::room<uint8_t>(codes) + Scratch::room<int32_t>(extra) +
                        Scratch::room<float>(tiles) + Scratch::room<float>(values));
        Workspace space;
        space.codes = scratch.take<uint8_t>(codes);
        space.extra = scratch.take<int32_t>(extra);
        space.tiles = scratch.take<float>(tiles);
        space.values = scratch.take<float>(values);
        return space;
    }

    // The next parts for a thread: many at first, since neighbours are fetched ahead, few at the end, so
    // that no thread waits long for the others.
    bool take_parts(int threads, int &part, int &stop) {
        int total = batch_.parts();
        part = next_.load(std::memory_order_relaxed);
        do {
            if (part >= total) return false;
            stop = part + std::max(1, (total - part) / (2 * threads));
        } while (!next_.compare_exchange_weak(part, stop, std::memory_order_relaxed));
        return true;
    }

    // A few blocks of 16 outputs of a span.
    void do_part(int part, const PassInputs &inputs, Workspace &space) const {
        const Span &span = batch_.span_of(part);
        int first = (part - (span.part_end - span.parts)) * span.members.at_once;
        int blocks = std::min(span.members.at_once, span.blocks() - first);
        Lanes lanes[MOST_AT_ONCE];
        bool coded = false;
        for (int block = 0; block < blocks; block++) {
            lanes[block] = span.lanes(first + block);
            coded = coded || lanes[block].coded > 0;
        }
        if (coded && span.record.coded()) {
            multiply_codes(span, lanes, blocks, inputs, space);
        } else {
            std::fill(space.tiles, space.tiles + blocks * size_t(span.members.tokens) * LANES, 0.0f);
        }
        finish(span, lanes, blocks, space);
    }

    // tiles = (codes − zero) x, lanes in the order of coded rows.
    void multiply_codes(const Span &span, const Lanes *lanes, int blocks, const PassInputs &pass,
                        const Workspace &space) const {
        const Record &record = span.record;
        Inputs inputs = pass.of(span.members);
        bool apart = record.escapes && record.planes > 0 && span.members.escapes_apart &&
                     sum_escapes(span, lanes[0], pass, space.extra);
        const int32_t *extra = apart ? space.extra : nullptr;
        int offset = record.escapes && !apart ? ESCAPE_OFFSET : 0;
        float zero = record.zero + float(offset);
        float whole = std::floor(zero), rest = zero - whole;
        if (span.members.from_planes && record.planes > 0 && offset == 0) {
            PlaneRows planes = plane_rows(record, lanes[0], space.codes);
            kernels_.multiply_planes(planes, inputs, whole, extra, space.tiles);
        } else {
            multiply_unpacked(record, lanes, blocks, inputs, {nullptr, 0, 0, blocks, extra}, offset, space);
        }
        if (rest == 0 || inputs.exact) return;
        size_t tile_floats = size_t(span.members.tokens) * LANES;
        for (size_t at = 0; at < blocks * tile_floats; at++) {
            int token = int(at / LANES) % span.members.tokens;
            space.tiles[at] -= rest * pass.level_sum(span.members.first + token);
        }
    }

    // The same by codes that lie in memory, a run of columns at a time.
    void multiply_unpacked(const Record &record, const Lanes *lanes, int blocks, const Inputs &inputs,
                           Codes run, int offset, const Workspace &space) const {
        float zero = record.zero + float(offset);
        run.codes = space.codes;
        for (int index = 0; run.first < units_; index++, run.first += RUN_UNITS) {
            run.units = std::min(units_ - run.first, RUN_UNITS);
            for (int block = 0; block < blocks; block++) {
                uint8_t *codes = space.codes + size_t(block) * run.units * UNIT_CODES;
                unpack_rows(kernels_, record, lanes[block], run.first, run.units, offset, codes);
                if (offset) add_escapes(record, lanes[block], index, codes);
            }
            if (inputs.exact) {
                kernels_.multiply_exact(run, inputs, zero, space.tiles);
            } else {
                kernels_.multiply(run, inputs, std::floor(zero), space.tiles);
            }
        }
    }

    // What escapes add to the sums of few tokens; false: they are too many.
    bool sum_escapes(const Span &span, const Lanes &lanes, const PassInputs &pass, int32_t *extra) const {
        const Record &record = span.record;
        int tokens = span.members.tokens;
        for (int block = 0; block < record.blocks; block++) {
            const uint32_t *starts = record.starts + size_t(lanes.first_coded) * record.blocks + block;
            int groups = count_groups(std::min(units_ - block * RUN_UNITS, RUN_UNITS));
            const int32_t *x = pass.by_column(span.members) + size_t(block) * BLOCK_COLUMNS * 4;
            int32_t *own = extra + size_t(block) * (RUN_UNITS / GROUP_UNITS) * tokens * LANES;
            EscapeRows rows{record.escapes, starts, record.blocks, lanes.coded};
            if (!kernels_.sum_escapes(rows, x, units_ * UNIT_COLUMNS, tokens, groups, own)) return false;
        }
        return true;
    }

    void add_escapes(const Record &record, const Lanes &lanes, int run, uint8_t *codes) const {
        const uint32_t *starts = record.starts + size_t(lanes.first_coded) * record.blocks + run;
        kernels_.add_escapes({record.escapes, starts, record.blocks, lanes.coded}, codes);
    }

    // Tiles of codes' products get their steps and thin parts, and are added to y.
    void finish(const Span &span, const Lanes *lanes, int blocks, const Workspace &space) const {
        size_t tile_floats = size_t(span.members.tokens) * LANES;
        float steps[MOST_AT_ONCE * LANES];
        bool together = true;
        for (int block = 0; block < blocks; block++) {
            steps_of(span.record, lanes[block], steps + block * LANES);
            together = together && lanes[block].side_by_side;
            if (!span.compact) {
                float *tile = space.tiles + block * tile_floats;
                add_thin(span, lanes[block], steps + block * LANES, tile, space.values);
            }
        }
        const Lanes &last = lanes[blocks - 1];
        together = together && last.outputs[0] - lanes[0].outputs[0] == (blocks - 1) * LANES;
        if (together || !span.compact) {
            write(span, lanes[0], (blocks - 1) * LANES + last.count, space.tiles, steps);
            return;
        }
        for (int block = 0; block < blocks; block++) {
            const float *tile = space.tiles + block * tile_floats, *own = steps + block * LANES;
            if (lanes[block].side_by_side) {
                write(span, lanes[block], lanes[block].count, tile, own);
            } else {
                scatter(span, lanes[block], tile, own);
            }
        }
    }

    // Thin parts are added to what has its steps; outputs without codes get their lanes.
    void add_thin(const Span &span, const Lanes &lanes, float *steps, float *tile, float *values) const {
        int tokens = span.members.tokens, width = span.thin_width;
        bool gaps = span.record.coded() && !lanes.side_by_side;
        if (!gaps && width == 0) return;
        kernels_.scale(steps, tokens, tile);
        std::fill(steps, steps + LANES, 1.0f);
        if (gaps) spread(span.record, lanes, tokens, tile);
        if (width == 0) return;
        gather_thin(span, lanes, values);
        kernels_.add_outer(values, span.thin, width, tokens, width, tile);
    }

    Outputs outputs_of(const Span &span) const {
        Outputs y = y_;
        y.first += size_t(span.slice_start) * element_;
        y.order += span.members.first;
        return y;
    }

    void write(const Span &span, const Lanes &first, int lanes, const float *tiles,
               const float *steps) const {
        Outputs y = outputs_of(span);
        y.first += size_t(first.outputs[0]) * element_;
        kernels_.add_to(tiles, steps, span.members.tokens, y, lanes);
    }

    // Outputs that do not follow each other.
    void scatter(const Span &span, const Lanes &lanes, const float *tile, const float *steps) const {
        Outputs y = outputs_of(span);
        for (int t = 0; t < span.members.tokens; t++, tile += LANES) {
            char *row = y.first + y.order[t] * y.stride;
            for (int lane = 0; lane < lanes.count; lane++) {
                char *place = row + size_t(lanes.outputs[lane]) * element_;
                float sum = portable::load(place, y.type, 0) + tile[lane] * steps[lane];
                portable::store(place, y.type, 0, sum);
            }
        }
    }

    const Kernels &kernels_;
    const Linear &layer_;
    const int64_t *order_, *starts_;
    int element_, units_;
    Source x_;
    Outputs y_;

    // Kept from call to call.
    static inline thread_local Batch kept_batch_;
    static inline thread_local Scratch kept_scratch_;
    Batch &batch_ = kept_batch_;
    Scratch &shared_ = kept_scratch_;

    std::optional<PassInputs> shared_inputs_;
    bool alone_ = false;
    std::atomic<int> next_{0};
};

}  // namespace deltamux
