// The library that layers call (`native.py`): a plain C interface.

#include "dispatch.h"
#include "embedding.h"
#include "product.h"
#include "team.h"

namespace deltamux {

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

// See `team.h`.
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

// As above; ids are int64 or int32 (`Table`).
EXPORTED int deltamux_add_embedding(const deltamux::Table *table, void *y, const void *ids, int64_t rows,
                                    int64_t y_stride, const int64_t *order, const int64_t *starts) {
    if (!deltamux::rows_exist(order, starts, table->num_slots, rows)) return 1;
    deltamux::Embedding(*deltamux::chosen, *table, y, ids, y_stride, order, starts).run_all();
    return 0;
}

}  // extern "C"
