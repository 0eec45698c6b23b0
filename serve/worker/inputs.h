// What a product reads of x: rounded to 8 bits or reordered, and a few numbers a token for thin parts.

#pragma once

#include "batch.h"
#include "kernels.h"
#include "portable.h"
#include "scratch.h"
#include "team.h"

namespace deltamux {

// Rows of x in the order of the batch's pass.
struct Source {
    const char *first;
    ptrdiff_t stride;
    const int64_t *order;
    Type type;
    int columns;

    const char *row(int token) const { return first + order[token] * stride; }
};

// The inputs of a pass in one piece of scratch.
class PassInputs {
  public:
    static size_t room(const Batch &batch, const Source &x) {
        PassInputs sizes(batch, x);
        size_t exact = sizes.is_exact_ ? sizes.panels_ : 0;
        return Scratch::room<int8_t>(sizes.is_exact_ ? 0 : sizes.panels_) + Scratch::room<float>(exact) +
               2 * Scratch::room<float>(sizes.scaled_) + Scratch::room<float>(sizes.widened_) +
               Scratch::room<int32_t>(size_t(batch.by_column)) +
               Scratch::room<float>(size_t(batch.tokens));
    }

    PassInputs(const Batch &batch, const Source &x, Scratch &scratch) : PassInputs(batch, x) {
        if (is_exact_) {
            exact_ = scratch.take<float>(panels_);
        } else {
            levels_ = scratch.take<int8_t>(panels_);
        }
        scales_ = scratch.take<float>(scaled_);
        sums_ = scratch.take<float>(scaled_);
        if (widened_) wide_ = scratch.take<float>(widened_);
        by_column_ = scratch.take<int32_t>(size_t(batch.by_column));
        level_sums_ = scratch.take<float>(size_t(batch.tokens));
    }

    Inputs of(const Members &members) const {
        ptrdiff_t place = ptrdiff_t(members.place) * row_, group = ptrdiff_t(members.first) * groups_;
        return {levels_ ? levels_ + place : nullptr,
                exact_ ? exact_ + place : nullptr,
                scales_ + group,
                sums_ + group,
                members.tokens,
                row_ / UNIT_COLUMNS,
                groups_,
                members.whole_panels};
    }

    // Levels by column, see `interleave`.
    int32_t *by_column(const Members &members) const { return by_column_ + members.by_column; }

    void interleave(const Kernels &kernels, const Members &members, int four) const {
        const int8_t *levels = levels_ + size_t(members.place) * row_ + size_t(four) * 4 * UNIT_COLUMNS;
        ptrdiff_t stride = ptrdiff_t(members.whole_panels ? PANEL : members.tokens) * UNIT_COLUMNS;
        int tokens = std::min(members.tokens - 4 * four, 4);
        int32_t *out = by_column(members) + size_t(four) * 4 * row_;
        kernels.interleave(levels, stride, tokens, row_ / UNIT_COLUMNS, out);
    }

    // Σ of what a token's x is rounded to, for zero points between two codes.
    float level_sum(int token) const { return level_sums_[token]; }

    // A token's x in float32.
    const float *wide(int token) const { return wide_ + size_t(token) * row_; }

    void prepare(const Kernels &kernels, const Batch &batch, const Source &x, int token) const {
        float *wide = wide_ ? wide_ + size_t(token) * row_ : nullptr;
        if (wide) kernels.widen(x.row(token), x.type, x.columns, wide);
        if (!batch.coded) return;
        const Members &members = batch.members_of(token);
        int panel = (token - members.first) / PANEL, row = (token - members.first) % PANEL;
        int rows = members.whole_panels ? PANEL : panel_tokens(members.tokens, panel);
        ptrdiff_t stride = ptrdiff_t(rows) * UNIT_COLUMNS;
        size_t place = size_t(members.place + panel * PANEL) * row_ + size_t(row) * UNIT_COLUMNS;
        if (is_exact_) {
            reorder(wide, x.columns, exact_ + place, stride);
            return;
        }
        float *scales = scales_ + size_t(token) * groups_, *sums = sums_ + size_t(token) * groups_;
        kernels.quantize(x.row(token), x.type, x.columns, levels_ + place, stride, scales, sums);
        float total = 0;
        for (int group = 0; group < groups_; group++) total += scales[group] * sums[group];
        level_sums_[token] = total;
    }

  private:
    PassInputs(const Batch &batch, const Source &x) {
        int units = divide_up(x.columns, UNIT_COLUMNS);
        row_ = units * UNIT_COLUMNS;
        groups_ = count_groups(units);
        is_exact_ = x.type == FLOAT32;
        panels_ = size_t(batch.panel_rows) * row_;
        scaled_ = size_t(batch.tokens) * groups_;
        widened_ = batch.wide || is_exact_ ? size_t(batch.tokens) * row_ : 0;
    }

    void reorder(const float *wide, int columns, float *exact, ptrdiff_t stride) const {
        for (int j = 0; j < row_; j++) {
            float value = j < columns ? wide[j] : 0.0f;
            exact[j / UNIT_COLUMNS * stride + portable::place_of(j % UNIT_COLUMNS)] = value;
        }
    }

    int row_, groups_;
    bool is_exact_;
    size_t panels_, scaled_, widened_;
    int8_t *levels_ = nullptr;
    float *exact_ = nullptr, *scales_ = nullptr, *sums_ = nullptr, *wide_ = nullptr;
    int32_t *by_column_ = nullptr;
    float *level_sums_ = nullptr;
};

// h_r = A_r x of a span's tokens.
inline void project(const Kernels &kernels, const Span &span, const PassInputs &inputs, int columns, int r) {
    const Record &record = span.record;
    size_t size = record.factor_kind == FACTORS_FLOAT32 ? 4 : record.factor_kind == FACTORS_INT8 ? 1 : 2;
    const uint8_t *direction = record.right + size_t(r) * columns * size;
    for (int t = 0; t < span.members.tokens; t++) {
        const float *x = inputs.wide(span.members.first + t);
        float h;
        if (record.factor_kind == FACTORS_INT8) {
            const int8_t *levels = reinterpret_cast<const int8_t *>(direction);
            h = kernels.dot_int8(levels, x, columns) * record.right_steps[r];
        } else {
            Type type = record.factor_kind == FACTORS_FLOAT32 ? FLOAT32 : BFLOAT16;
            h = kernels.dot(direction, type, x, columns);
        }
        span.thin[size_t(t) * span.thin_width + record.channels + r] = h;
    }
}

// For each token of a span: inputs of its channels, A x, and one for the bias. Threads share the tokens,
// and of the factors the directions.
inline void prepare_thin(const Kernels &kernels, const Span &span, const Source &x,
                         const PassInputs &inputs, Member member) {
    const Record &record = span.record;
    for (int t = member.index; t < span.members.tokens; t += member.count) {
        float *thin = span.thin + size_t(t) * span.thin_width;
        const char *row = x.row(span.members.first + t);
        for (int c = 0; c < record.channels; c++) {
            thin[c] = portable::load(row, x.type, record.channel_index[c]);
        }
        if (record.vector) thin[span.thin_width - 1] = 1.0f;
    }
    for (int r = member.index; r < record.rank; r += member.count) {
        project(kernels, span, inputs, x.columns, r);
    }
}

// What thin parts are multiplied with, values[v][lane]: channels, then the left factor, then the bias.
inline void gather_thin(const Span &span, const Lanes &lanes, float *values) {
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

}  // namespace deltamux
