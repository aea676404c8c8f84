/* Keys and values in pages, and attention over them: store_kv, attend.
 *
 * Nothing here knows what a page holds: only its size, that all tables but the FP32 one store the
 * same bytes, and that what was never stored may be anything.
 */
#include <string.h>

#include "fuzz.h"

#define PAGE 32 /* tokens */

/* Pages of one sequence: those from `first` on lie in memory, in any order; nobody may look for the
 * earlier ones. */
typedef struct {
    fl_kv kv;
    uint8_t *memory;
    size_t size;
} arena;

static arena make_arena(const fl_kernels *k, int32_t head_dim, int32_t pages, size_t gap,
                        const int32_t *ids) {
    arena a = {.kv = {.pages = ids, .head_dim = head_dim}};
    size_t page = fl_kv_bytes(head_dim, k->fp32);
    a.kv.page_bytes = page + gap;
    a.size = (size_t)(pages - 1) * a.kv.page_bytes + page;
    a.memory = a.kv.base = fz_get(a.size);
    return a;
}

static int32_t *make_ids(fz_input *in, int32_t first, int32_t last) {
    int32_t *ids = fz_get((size_t)(last + 1) * sizeof *ids); /* 0x55555555 before `first` */
    int32_t n = last - first + 1, turn = fz_between(in, 0, n - 1);
    for (int32_t i = 0; i < n; i++) ids[first + i] = (i + turn) % n;
    return ids;
}

static int32_t any_head_dim(fz_input *in) { return 4 * fz_between(in, 1, 18); }

void fz_store_kv(fz_input *in) {
    int32_t dim = any_head_dim(in), position = fz_between(in, 0, 95), page = position / PAGE;
    const int32_t *ids = make_ids(in, page, page);
    const float *k = fz_floats(in, (size_t)dim), *v = fz_floats(in, (size_t)dim);
    arena oracle = make_arena(fz_tables[0], dim, 1, 0, ids);
    fz_bytes(in, oracle.memory, oracle.size);
    uint8_t *before = fz_get(oracle.size);
    memcpy(before, oracle.memory, oracle.size);
    fz_tables[0]->store_kv(&oracle.kv, position, k, v);
    for (size_t i = 1; i < fz_n_tables; i++) {
        const fl_kernels *table = fz_tables[i];
        arena a = make_arena(table, dim, 1, 0, ids);
        if (!table->fp32) memcpy(a.memory, before, a.size);
        table->store_kv(&a.kv, position, k, v);
        if (!table->fp32) fz_same("store_kv", table->isa, a.memory, oracle.memory, a.size);
    }
}

/* The positions [begin, end) of a sequence, stored by `table`. */
static arena store(const fl_kernels *table, arena a, int32_t begin, int32_t end, const float *k,
                   const float *v) {
    size_t dim = (size_t)a.kv.head_dim;
    for (int32_t t = begin; t < end; t++, k += dim, v += dim) table->store_kv(&a.kv, t, k, v);
    return a;
}

void fz_attend(fz_input *in) {
    int32_t dim = any_head_dim(in), begin = fz_between(in, 0, 40);
    int32_t end = begin + 1 + fz_between(in, 0, fz_below(in, 4) ? 15 : 75);
    int32_t n = fz_below(in, 8) ? fz_between(in, 1, 9) : fz_between(in, 10, FL_MAX_QUERIES);
    int32_t page0 = begin / PAGE, pages = (end - 1) / PAGE - page0 + 1;
    const int32_t *ids = make_ids(in, page0, page0 + pages - 1);
    size_t gap = FL_ALIGN * (size_t)fz_below(in, 3), size = (size_t)n * (size_t)dim;
    size_t stored = (size_t)(end - begin) * (size_t)dim;
    const float *k = fz_floats(in, stored), *v = fz_floats(in, stored), *q = fz_floats(in, size);
    int32_t *first = fz_get((size_t)n * 4), *last = fz_get((size_t)n * 4);
    for (int32_t i = 0; i < n; i++) {
        last[i] = fz_between(in, begin, end - 1);
        first[i] = fz_below(in, 2) ? begin : fz_between(in, begin, last[i]);
        if (fz_rarely(in)) first[i] = last[i] + 1; /* sees nothing */
    }
    arena shared = make_arena(fz_tables[0], dim, pages, gap, ids);
    fz_bytes(in, shared.memory, shared.size);
    store(fz_tables[0], shared, begin, end, k, v);
    uint8_t *before = fz_get(shared.size);
    memcpy(before, shared.memory, shared.size);
    const float *oracle = NULL;
    const fl_mass *masses = NULL;
    void *scratch = fz_get(FL_ATTEND_BYTES(dim)); /* dirty from the second table on, as in use */
    int with_mass = fz_below(in, 2) == 0;
    int with_fp32 = fz_below(in, 4) == 0; /* it is slow, and nothing but its memory is tested */
    for (size_t i = 0; i < fz_n_tables; i++) {
        const fl_kernels *table = fz_tables[i];
        arena a = shared;
        if (table->fp32 && !with_fp32) continue;
        if (table->fp32) {
            a = store(table, make_arena(table, dim, pages, gap, ids), begin, end, k, v);
        }
        float *out = fz_floats_empty(in, size);
        fl_mass *mass = with_mass ? fz_get((size_t)n * sizeof *mass) : NULL;
        table->attend(out, mass, &a.kv, n, q, first, last, scratch);
        if (i == 0) oracle = out, masses = mass;
        if (table->fp32) continue;
        fz_same_floats("attend", table->isa, out, oracle, size);
        if (mass)
            fz_same_floats("mass", table->isa, &mass->max, &masses->max, (size_t)n * 2);
        fz_same("pages after attend", table->isa, a.memory, before, a.size);
    }
}
