// Rows of an embedding's delta, added to the rows of a batch: y_t += Δ̂_s[id_t], rounded once.

#pragma once

#include "kernels.h"
#include "portable.h"
#include "record.h"
#include "scratch.h"
#include "team.h"

namespace deltamux {

// Elements from which on threads share the work.
constexpr int64_t SHARED_ELEMENTS = 65536;

// An embedding as Python prepares it once.
struct Table {
    const uint8_t *slots;
    int64_t slot_bytes;
    int32_t num_slots, entry, rows, columns, type, wide_ids;
};

class Embedding {
  public:
    Embedding(const Kernels &kernels, const Table &table, void *y, const void *ids, int64_t y_stride,
              const int64_t *order, const int64_t *starts)
        : kernels_(kernels), table_(table), y_(static_cast<char *>(y)), ids_(ids), order_(order),
          starts_(starts), type_(Type(table.type)) {
        element_ = type_ == FLOAT32 ? 4 : 2;
        y_bytes_ = y_stride * element_;
    }

    void run_all() {
        int64_t tokens = starts_[table_.num_slots] - starts_[0];
        if (tokens * table_.columns < SHARED_ELEMENTS) {
            work({0, 1});
        } else {
            run(*this);
        }
    }

    void work(Member member) {
        static thread_local Scratch scratch;
        scratch.reserve(Scratch::room<float>(size_t(table_.columns)));
        float *delta = scratch.take<float>(size_t(table_.columns));
        for (int slot = 0; slot < table_.num_slots; slot++) {
            if (starts_[slot] == starts_[slot + 1]) continue;
            Record record = read_record(table_.slots + slot * table_.slot_bytes, table_.entry);
            if (!record.coded() && record.channels == 0 && record.rank == 0) continue;
            for (int64_t at = starts_[slot] + member.index; at < starts_[slot + 1]; at += member.count) {
                int64_t id = id_of(order_[at]);
                if (id >= 0 && id < table_.rows) add_row(record, int(id), order_[at], delta);
            }
        }
    }

  private:
    int64_t id_of(int64_t row) const {
        return table_.wide_ids ? static_cast<const int64_t *>(ids_)[row]
                               : static_cast<const int32_t *>(ids_)[row];
    }

    void add_row(const Record &record, int id, int64_t row, float *delta) const {
        int columns = table_.columns;
        bool coded = record.coded() && row_is_coded(record, id);
        if (!coded && record.channels == 0 && record.rank == 0) return;
        std::memset(delta, 0, size_t(columns) * sizeof(float));
        if (coded) add_codes(record, rank_of_row(record, id), delta);
        const uint16_t *values = record.channel_values + size_t(id) * record.channels;
        for (int c = 0; c < record.channels; c++) {
            delta[record.channel_index[c]] += float_of_bfloat16(values[c]);
        }
        for (int r = 0; r < record.rank; r++) {
            float left = left_factor(record, size_t(id), r);
            for (int j = 0; j < columns; j++) delta[j] += left * right_factor(record, r, j, columns);
        }
        static constexpr float ONES[LANES] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
        int64_t first = 0;
        char *y = y_ + row * y_bytes_;
        for (int j = 0; j < columns; j += LANES, y += LANES * element_) {
            kernels_.add_to(delta + j, ONES, 1, {y, 0, &first, type_}, std::min(LANES, columns - j));
        }
    }

    void add_codes(const Record &record, int row, float *delta) const {
        float levels[16];
        for (int code = 0; code < 16; code++) levels[code] = float(code) - record.zero;
        const uint8_t *low = record.plane0 + size_t(row) * record.stride;
        const uint8_t *high = record.planes == 2 ? record.plane1 + size_t(row) * record.stride : nullptr;
        for (int j = 0; record.planes && j < table_.columns; j++) {
            int shift = 2 * (j % 4), code = low[j / 4] >> shift & 3;
            if (high) code |= (high[j / 4] >> shift & 3) << 2;
            delta[j] = levels[code];
        }
        for (int block = 0; record.escapes && block < record.blocks; block++) {
            const uint32_t *starts = record.starts + size_t(row) * record.blocks + block;
            for (uint32_t at = starts[0]; at < starts[1]; at++) {
                int column = block * BLOCK_COLUMNS + (record.escapes[at] & (BLOCK_COLUMNS - 1));
                delta[column] += float((record.escapes[at] >> BLOCK_BITS) - MIDDLE);
            }
        }
        float step = record.steps ? float_of_bfloat16(record.steps[row]) : record.step;
        for (int j = 0; j < table_.columns; j++) delta[j] *= step;
    }

    const Kernels &kernels_;
    const Table &table_;
    char *y_;
    const void *ids_;
    const int64_t *order_, *starts_;
    Type type_;
    int element_;
    int64_t y_bytes_;
};

}  // namespace deltamux
