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

#include <algorithm>
#include <atomic>
#include <vector>

#include "dispatch.h"
#include "embedding.h"
#include "kernels.h"
#include "record.h"
#include "scratch.h"
#include "team.h"

namespace deltamux {

// Rows of a pass: enough to hide the unpacking, few enough for a core's cache.
constexpr int PASS_TOKENS = 512;
// Inputs up to here every thread rounds for itself, which is faster than waiting for the others.
constexpr int ALONE_ELEMENTS = 8192;
// The offset of codes that have escapes: −8 at least.
constexpr int ESCAPE_OFFSET = 8;
constexpr int MOST_SLICES = 8;
// Bytes of planes that are asked for ahead of their use.
constexpr size_t MOST_FETCHED = 16384;
// Escapes of a block of rows that are gone through in one loop, and those of a row that are usual.
constexpr size_t MOST_LISTED = 2048, FEW_ESCAPES = 32;

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
};

// One slice of one slot with some rows of the batch.
struct Span {
    Record record;
    Members members;
    int slice_rows, slice_start;
    bool compact;          // blocks of coded rows, not of output rows
    int parts, part_end;   // so many of these; the latter counted over all spans
    float *thin;           // [tokens][thin_width]
    int thin_width;
};

inline int divide_up(int value, int unit) { return (value + unit - 1) / unit; }

// The inputs of a pass: what `Inputs` of its slots point into.
struct PassInputs {
    int8_t *levels;
    float *exact;
    float *scales;
    float *sums;
    float *level_sums;  // [tokens] Σ of what x is rounded to, for zero points between two codes
    float *wide;        // [tokens][columns] float32, where something asks for it
};

class Product {
  public:
    Product(const Kernels &kernels, const Linear &layer, void *y, const void *x, int64_t y_stride,
            int64_t x_stride, const int64_t *order, const int64_t *starts)
        : kernels_(kernels), layer_(layer), y_(static_cast<char *>(y)),
          x_(static_cast<const char *>(x)), order_(order), starts_(starts), type_(Type(layer.type)) {
        int size = type_ == FLOAT32 ? 4 : 2;
        y_bytes_ = y_stride * size;
        x_bytes_ = x_stride * size;
        element_ = size;
        units_ = divide_up(layer.columns, UNIT_COLUMNS);
        groups_ = count_groups(units_);
    }

    void run_all() {
        for (int64_t first = starts_[0], end = starts_[layer_.num_slots]; first < end;) {
            int64_t stop = std::min<int64_t>(end, first + PASS_TOKENS);
            plan(first, stop);
            if (!spans_.empty()) run(*this);
            first = stop;
        }
    }

    void work(Member member) {
        PassInputs inputs = prepare_inputs(member);
        if (thin_) add_thin_parts(inputs, member);
        size_t units = size_t(std::min(units_, RUN_UNITS));
        size_t codes = most_at_once_ * units * UNIT_CODES;
        size_t tiles = most_at_once_ * size_t(most_tokens_) * LANES;
        size_t values = size_t(most_thin_) * LANES;
        static thread_local Scratch scratch;
        scratch.reserve(Scratch::room<uint8_t>(codes) + Scratch::room<float>(tiles) +
                        Scratch::room<float>(values));
        Workspace space{scratch.take<uint8_t>(codes), scratch.take<float>(tiles),
                        scratch.take<float>(values), {}};
        int total = spans_.back().part_end;
        if (kernels_.begin) kernels_.begin();
        for (;;) {
            int part = next_.fetch_add(chunk_, std::memory_order_relaxed);
            if (part >= total) break;
            int stop = std::min(total, part + chunk_);
            for (; part < stop; part++) do_part(part, inputs, space);
        }
        if (kernels_.end) kernels_.end();
    }

  private:
    // An escape that has no room in a code.
    struct Single {
        int block, lane, column, extra;
    };

    // A thread's own memory.
    struct Workspace {
        uint8_t *codes;
        float *tiles, *values;
        std::vector<Single> singles;
    };

    // The spans of rows order[first:stop], and the memory that they need.
    void plan(int64_t first, int64_t stop) {
        spans_.clear();
        members_.clear();
        panel_rows_ = 0;
        first_ = first;
        tokens_ = int(stop - first);
        next_.store(0, std::memory_order_relaxed);
        int parts = 0;
        size_t thin_room = 0;
        most_tokens_ = most_thin_ = most_at_once_ = 0;
        coded_ = thin_ = wide_ = false;
        for (int slot = 0; slot < layer_.num_slots; slot++) {
            int64_t from = std::max(starts_[slot], first), to = std::min(starts_[slot + 1], stop);
            if (from >= to) continue;
            Members members;
            members.first = int(from - first);
            members.tokens = int(to - from);
            members.place = panel_rows_;
            members.at_once = type_ == FLOAT32 ? 1 : kernels_.blocks(members.tokens);
            members.whole_panels = members.at_once > 1;
            int rows = members.tokens;
            panel_rows_ += members.whole_panels ? divide_up(rows, PANEL) * PANEL : rows;
            members_.push_back(members);
            const uint8_t *image = layer_.slots + slot * layer_.slot_bytes;
            for (int slice = 0, start = 0; slice < layer_.num_slices; slice++) {
                Span span;
                span.record = read_record(image, layer_.entries[slice]);
                span.slice_rows = layer_.rows[slice];
                span.slice_start = start;
                start += span.slice_rows;
                const Record &record = span.record;
                if (record.empty()) continue;
                span.members = members;
                span.thin_width = record.channels + record.rank + (record.vector ? 1 : 0);
                span.compact = record.row_map && span.thin_width == 0;
                int rows = span.compact ? record.rows : span.slice_rows;
                span.parts = divide_up(rows, LANES * span.members.at_once);
                parts += span.parts;
                span.part_end = parts;
                most_at_once_ = std::max(most_at_once_, span.members.at_once);
                most_tokens_ = std::max(most_tokens_, span.members.tokens);
                most_thin_ = std::max(most_thin_, span.thin_width);
                thin_room += Scratch::room<float>(size_t(span.members.tokens) * span.thin_width);
                coded_ = coded_ || record.coded();
                thin_ = thin_ || span.thin_width > 0;
                wide_ = wide_ || record.rank > 0;
                spans_.push_back(span);
            }
        }
        // Four times as many chunks as two threads would need, so that none waits long.
        chunk_ = std::clamp(parts / 16, 1, 8);
        alone_ = !thin_ && tokens_ * layer_.columns <= ALONE_ELEMENTS;
        shared_.reserve(thin_room + (alone_ ? 0 : inputs_room()));
        for (Span &span : spans_) span.thin = shared_.take<float>(size_t(span.members.tokens) * span.thin_width);
        if (!alone_) pass_ = take_inputs(shared_);
    }

    // Scratch of the inputs of a pass: how much, and where.
    size_t inputs_room() const {
        size_t row = size_t(units_) * UNIT_COLUMNS, groups = size_t(tokens_) * groups_;
        bool exact = type_ == FLOAT32;
        return Scratch::room<int8_t>(exact ? 0 : panel_rows_ * row) +
               Scratch::room<float>(exact ? panel_rows_ * row : 0) + 2 * Scratch::room<float>(groups) +
               Scratch::room<float>(wide_ || exact ? tokens_ * row : 0) + Scratch::room<float>(tokens_);
    }

    PassInputs take_inputs(Scratch &scratch) const {
        size_t row = size_t(units_) * UNIT_COLUMNS, groups = size_t(tokens_) * groups_;
        bool exact = type_ == FLOAT32;
        PassInputs pass;
        pass.levels = exact ? nullptr : scratch.take<int8_t>(panel_rows_ * row);
        pass.exact = exact ? scratch.take<float>(panel_rows_ * row) : nullptr;
        pass.scales = scratch.take<float>(groups);
        pass.sums = scratch.take<float>(groups);
        pass.wide = wide_ || exact ? scratch.take<float>(tokens_ * row) : nullptr;
        pass.level_sums = scratch.take<float>(tokens_);
        return pass;
    }

    Inputs inputs_of(const Span &span, const PassInputs &pass) const {
        const Members &members = span.members;
        ptrdiff_t place = ptrdiff_t(members.place) * units_ * UNIT_COLUMNS;
        ptrdiff_t group = ptrdiff_t(members.first) * groups_;
        return {pass.levels ? pass.levels + place : nullptr,
                pass.exact ? pass.exact + place : nullptr,
                pass.scales + group,
                pass.sums + group,
                members.tokens,
                units_,
                groups_,
                members.whole_panels};
    }

    const char *x_row(int token) const { return x_ + order_[first_ + token] * x_bytes_; }

    PassInputs prepare_inputs(Member member) {
        static thread_local Scratch own;
        if (alone_) own.reserve(inputs_room());
        PassInputs pass = alone_ ? take_inputs(own) : pass_;
        int step = alone_ ? 1 : member.count;
        for (int t = alone_ ? 0 : member.index; t < tokens_; t += step) prepare_token(pass, t);
        if (!alone_) member.wait();
        return pass;
    }

    void prepare_token(const PassInputs &pass, int token) const {
        const char *x = x_row(token);
        float *wide = pass.wide ? pass.wide + size_t(token) * units_ * UNIT_COLUMNS : nullptr;
        if (wide) kernels_.widen(x, type_, layer_.columns, wide);
        if (!coded_) return;
        const Members *members = members_.data();
        while (members->first + members->tokens <= token) members++;
        int panel = (token - members->first) / PANEL, row = (token - members->first) % PANEL;
        int rows = members->whole_panels ? PANEL : panel_tokens(members->tokens, panel);
        ptrdiff_t stride = ptrdiff_t(rows) * UNIT_COLUMNS;
        size_t place = size_t(members->place + panel * PANEL) * units_ * UNIT_COLUMNS +
                       size_t(row) * UNIT_COLUMNS;
        if (pass.exact) {
            float *exact = pass.exact + place;
            for (int j = 0; j < units_ * UNIT_COLUMNS; j++) {
                float value = j < layer_.columns ? wide[j] : 0.0f;
                exact[j / UNIT_COLUMNS * stride + portable::place_of(j % UNIT_COLUMNS)] = value;
            }
            return;
        }
        float *scales = pass.scales + size_t(token) * groups_;
        float *sums = pass.sums + size_t(token) * groups_;
        kernels_.quantize(x, type_, layer_.columns, pass.levels + place, stride, scales, sums);
        float total = 0;
        for (int group = 0; group < groups_; group++) total += scales[group] * sums[group];
        pass.level_sums[token] = total;
    }

    // For each token of a span: inputs of its channels, A x, and one for the bias.
    void add_thin_parts(const PassInputs &pass, Member member) {
        for (const Span &span : spans_) {
            const Record &record = span.record;
            // Threads share the directions of the factors, and the tokens of the rest.
            for (int t = member.index; t < span.members.tokens; t += member.count) {
                float *thin = span.thin + size_t(t) * span.thin_width;
                const char *x = x_row(span.members.first + t);
                for (int c = 0; c < record.channels; c++) {
                    thin[c] = portable::load(x, type_, record.channel_index[c]);
                }
                if (record.vector) thin[span.thin_width - 1] = 1.0f;
            }
            for (int r = member.index; r < record.rank; r += member.count) project(span, pass, r);
        }
        member.wait();
    }

    // h_r = A_r x of every token.
    void project(const Span &span, const PassInputs &pass, int r) const {
        const Record &record = span.record;
        int columns = layer_.columns;
        size_t size = record.factor_kind == FACTORS_FLOAT32 ? 4 : record.factor_kind == FACTORS_INT8 ? 1 : 2;
        const uint8_t *direction = record.right + size_t(r) * columns * size;
        for (int t = 0; t < span.members.tokens; t++) {
            const float *x = pass.wide + size_t(span.members.first + t) * units_ * UNIT_COLUMNS;
            float h;
            if (record.factor_kind == FACTORS_INT8) {
                const int8_t *levels = reinterpret_cast<const int8_t *>(direction);
                h = kernels_.dot_int8(levels, x, columns) * record.right_steps[r];
            } else {
                Type type = record.factor_kind == FACTORS_FLOAT32 ? FLOAT32 : BFLOAT16;
                h = kernels_.dot(direction, type, x, columns);
            }
            span.thin[size_t(t) * span.thin_width + record.channels + r] = h;
        }
    }

    // What 16 lanes of a tile stand for.
    struct Lanes {
        int first_coded, coded;  // rows of the planes, in the first lanes
        int count;               // outputs
        int outputs[LANES];      // of the slice
        bool side_by_side;       // outputs follow each other, and every one is coded
    };

    void do_part(int part, const PassInputs &pass, Workspace &space) {
        const Span *span = spans_.data();
        while (part >= span->part_end) span++;
        int first = (part - (span->part_end - span->parts)) * span->members.at_once;
        int rows = span->compact ? span->record.rows : span->slice_rows;
        int blocks = std::min(span->members.at_once, divide_up(rows, LANES) - first);
        Lanes lanes[MOST_AT_ONCE];
        bool coded = false;
        for (int block = 0; block < blocks; block++) {
            lanes[block] = lanes_of(*span, first + block);
            coded = coded || lanes[block].coded > 0;
        }
        size_t tile_floats = size_t(span->members.tokens) * LANES;
        if (coded && span->record.coded()) {
            multiply_codes(*span, lanes, blocks, pass, space);
        } else {
            std::fill(space.tiles, space.tiles + blocks * tile_floats, 0.0f);
        }
        for (int block = 0; block < blocks; block++) {
            finish(*span, lanes[block], space.tiles + block * tile_floats, space.values);
        }
    }

    // A tile of codes' products gets its steps and thin parts, and is added to y.
    void finish(const Span &span, const Lanes &lanes, float *tile, float *values) const {
        const Record &record = span.record;
        if (record.coded()) {
            float steps[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                bool own = record.steps && lane < lanes.coded;
                int row = lanes.first_coded + lane;
                steps[lane] = own ? float_of_bfloat16(record.steps[row]) : record.step;
            }
            kernels_.scale(steps, span.members.tokens, tile);
            if (!lanes.side_by_side && !span.compact) spread(span, lanes, tile);
        }
        if (span.thin_width > 0) {
            gather_thin(span, lanes, values);
            kernels_.add_outer(values, span.thin, span.thin_width, span.members.tokens, span.thin_width, tile);
        }
        write(span, lanes, tile);
    }

    static Lanes lanes_of(const Span &span, int block) {
        const Record &record = span.record;
        Lanes lanes;
        lanes.side_by_side = true;
        if (span.compact) {
            lanes.first_coded = block * LANES;
            lanes.count = lanes.coded = std::min(LANES, record.rows - lanes.first_coded);
            int row = row_of_rank(span, lanes.first_coded);
            for (int lane = 0; lane < lanes.count; row++) {
                if (row_is_coded(record, row)) lanes.outputs[lane++] = row;
            }
            lanes.side_by_side = lanes.outputs[lanes.count - 1] == lanes.outputs[0] + lanes.count - 1;
            return lanes;
        }
        int start = block * LANES;
        lanes.count = std::min(LANES, span.slice_rows - start);
        lanes.first_coded = rank_of_row(record, start);
        lanes.coded = 0;
        for (int lane = 0; lane < lanes.count; lane++) {
            lanes.outputs[lane] = start + lane;
            lanes.coded += row_is_coded(record, start + lane);
        }
        lanes.side_by_side = !record.row_map || lanes.coded == lanes.count;
        return lanes;
    }

    // The row that is the rank-th of those with codes.
    static int row_of_rank(const Span &span, int rank) {
        const uint32_t *map = span.record.row_map;
        int low = 0, high = divide_up(span.slice_rows, 32);
        while (high - low > 1) {
            int middle = (low + high) / 2;
            (int(map[2 * size_t(middle) + 1]) <= rank ? low : high) = middle;
        }
        uint32_t bits = map[2 * size_t(low)];
        for (int skip = rank - int(map[2 * size_t(low) + 1]); skip > 0; skip--) bits &= bits - 1;
        return low * 32 + __builtin_ctz(bits);
    }

    // What the blocks behind these read first, so that it is here by then.
    static void fetch_next(const Record &record, const Lanes &last) {
        const uint8_t *next = record.plane0 + size_t(last.first_coded + last.coded) * record.stride;
        size_t bytes = std::min(size_t(record.stride) * LANES, MOST_FETCHED);
        for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(next + at);
    }

    // tiles = (codes − zero) x, lanes in the order of coded rows.
    void multiply_codes(const Span &span, const Lanes *lanes, int blocks, const PassInputs &pass,
                        Workspace &space) const {
        const Record &record = span.record;
        int offset = record.escapes ? ESCAPE_OFFSET : 0;
        float zero = record.zero + float(offset);
        float whole = std::floor(zero), rest = zero - whole;
        Inputs inputs = inputs_of(span, pass);
        space.singles.clear();
        if (record.planes) fetch_next(record, lanes[blocks - 1]);
        for (int run = 0, unit = 0; unit < units_; run++, unit += RUN_UNITS) {
            int units = std::min(units_ - unit, RUN_UNITS);
            for (int block = 0; block < blocks; block++) {
                uint8_t *codes = space.codes + size_t(block) * units * UNIT_CODES;
                unpack(record, lanes[block], unit, units, offset, codes);
                if (record.escapes) add_escapes(record, lanes[block], block, run, codes, space.singles);
            }
            Codes codes{space.codes, unit, units, blocks};
            if (type_ == FLOAT32) {
                kernels_.multiply_exact(codes, inputs, zero, space.tiles);
            } else {
                kernels_.multiply(codes, inputs, whole, space.tiles);
            }
        }
        size_t tile_floats = size_t(span.members.tokens) * LANES;
        for (const Single &single : space.singles) {
            add_single(single.column, single.extra, inputs,
                       space.tiles + single.block * tile_floats + single.lane);
        }
        if (rest == 0 || type_ == FLOAT32) return;
        for (int block = 0; block < blocks; block++) {
            float *tile = space.tiles + block * tile_floats;
            for (int t = 0; t < span.members.tokens; t++) {
                float folded = rest * pass.level_sums[span.members.first + t];
                for (int lane = 0; lane < LANES; lane++) tile[t * LANES + lane] -= folded;
            }
        }
    }

    void unpack(const Record &record, const Lanes &lanes, int unit, int units, int offset,
                uint8_t *codes) const {
        if (record.planes == 0 || lanes.coded == 0) {
            std::memset(codes, offset, size_t(units) * UNIT_CODES);
            return;
        }
        const uint8_t *rows[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            // Lanes without a row of their own repeat the last one; nothing reads what comes of them.
            int row = lanes.first_coded + std::min(lane, lanes.coded - 1);
            rows[lane] = record.plane0 + size_t(row) * record.stride + unit * UNIT_PLANE_BYTES;
        }
        ptrdiff_t second = record.planes == 2 ? record.plane1 - record.plane0 : 0;
        kernels_.unpack(rows, second, units, offset, codes);
    }

    // Escapes become part of the codes. Rows have few of them each, and loops of a few turns cost more
    // than what is done in them: so those of all lanes are gone through in one, beside a list of lanes.
    static void add_escapes(const Record &record, const Lanes &lanes, int block, int run,
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

    // Some escapes of one block of rows and columns.
    struct Listed {
        const uint16_t *escapes;
        const uint8_t *lane_of;
        size_t count;
        int block, first_column;
    };

    static __attribute__((noinline)) void add_listed(const Listed &list, uint8_t *codes,
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

    // One that no code has room for is multiplied by itself.
    static void add_single(int column, int extra, const Inputs &inputs, float *tile) {
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

    // Moves lanes from the order of coded rows to that of outputs.
    static void spread(const Span &span, const Lanes &lanes, float *tile) {
        for (int t = 0; t < span.members.tokens; t++, tile += LANES) {
            int coded = lanes.coded;
            for (int lane = lanes.count - 1; lane >= 0; lane--) {
                bool filled = row_is_coded(span.record, lanes.outputs[lane]);
                tile[lane] = filled ? tile[--coded] : 0.0f;
            }
        }
    }

    // values[v][lane]: channels, then the left factor, then the bias.
    static void gather_thin(const Span &span, const Lanes &lanes, float *values) {
        const Record &record = span.record;
        std::fill(values, values + size_t(span.thin_width) * LANES, 0.0f);
        for (int lane = 0; lane < lanes.count; lane++) {
            size_t row = size_t(lanes.outputs[lane]);
            float *out = values + lane;
            const uint16_t *channels = record.channel_values + row * record.channels;
            for (int c = 0; c < record.channels; c++) out[c * LANES] = float_of_bfloat16(channels[c]);
            out += size_t(record.channels) * LANES;
            for (int r = 0; r < record.rank; r++) out[r * LANES] = left_factor(record, row, r);
            if (record.vector) out[size_t(record.rank) * LANES] = record.vector[row];
        }
    }

    void write(const Span &span, const Lanes &lanes, const float *tile) const {
        if (lanes.count == 0) return;
        Outputs y{y_, y_bytes_, order_ + first_ + span.members.first, type_};
        y.first += size_t(span.slice_start) * element_;
        if (lanes.side_by_side || !span.compact) {
            y.first += size_t(lanes.outputs[0]) * element_;
            kernels_.add_to(tile, span.members.tokens, y, lanes.count);
            return;
        }
        for (int t = 0; t < span.members.tokens; t++, tile += LANES) {
            char *row = y.first + y.order[t] * y.stride;
            for (int lane = 0; lane < lanes.count; lane++) {
                char *place = row + size_t(lanes.outputs[lane]) * element_;
                portable::store(place, type_, 0, portable::load(place, type_, 0) + tile[lane]);
            }
        }
    }

    const Kernels &kernels_;
    const Linear &layer_;
    char *y_;
    const char *x_;
    const int64_t *order_, *starts_;
    Type type_;
    int64_t y_bytes_, x_bytes_;
    int element_, units_, groups_;

    // Of the pass.
    static thread_local std::vector<Members> kept_members_;
    static thread_local std::vector<Span> kept_spans_;
    static thread_local Scratch kept_shared_;
    std::vector<Members> &members_ = kept_members_;
    std::vector<Span> &spans_ = kept_spans_;
    Scratch &shared_ = kept_shared_;
    PassInputs pass_;
    int64_t first_ = 0;
    int tokens_ = 0, panel_rows_ = 0, most_tokens_ = 0, most_thin_ = 0, most_at_once_ = 0, chunk_ = 1;
    bool coded_ = false, thin_ = false, wide_ = false, alone_ = false;
    std::atomic<int> next_{0};
};

thread_local std::vector<Members> Product::kept_members_;
thread_local std::vector<Span> Product::kept_spans_;
thread_local Scratch Product::kept_shared_;

static const Kernels *chosen = nullptr;

static bool rows_exist(const int64_t *order, const int64_t *starts, int slots, int64_t rows) {
    for (int64_t place = starts[0]; place < starts[slots]; place++) {
        if (order[place] < 0 || order[place] >= rows) return false;
    }
    return true;
}

}  // namespace deltamux

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Chooses kernels by name, the fastest for ""; the name of what was chosen, null: it does not run here.
EXPORTED const char *deltamux_choose(const char *name) {
    const deltamux::Kernels *found = deltamux::find_kernels(name);
    if (!found) return nullptr;
    deltamux::chosen = found;
    return found->name;
}

EXPORTED void deltamux_use_team(void (*parallel)(void (*)(void *), void *, unsigned, unsigned),
                       void (*barrier)(), int (*thread)(), int (*most_threads)()) {
    deltamux::team = {parallel, barrier, thread, most_threads};
}

// Strides are those of rows, in elements. 0, or 1 where `order` names a row that the batch has not.
EXPORTED int deltamux_add_linear(const deltamux::Linear *layer, void *y, const void *x, int64_t rows,
                                 int64_t y_stride, int64_t x_stride, const int64_t *order,
                                 const int64_t *starts) {
    if (!deltamux::rows_exist(order, starts, layer->num_slots, rows)) return 1;
    deltamux::Product(*deltamux::chosen, *layer, y, x, y_stride, x_stride, order, starts).run_all();
    return 0;
}

EXPORTED int deltamux_add_embedding(const deltamux::Table *table, void *y, const void *ids, int64_t rows,
                                    int64_t y_stride, const int64_t *order, const int64_t *starts) {
    if (!deltamux::rows_exist(order, starts, table->num_slots, rows)) return 1;
    deltamux::Embedding(*deltamux::chosen, *table, y, ids, y_stride, order, starts).run_all();
    return 0;
}

}  // extern "C"
