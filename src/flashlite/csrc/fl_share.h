/* flashlite: how the threads of a step share its work; used by the files of operations. */
#ifndef FL_SHARE_H
#define FL_SHARE_H

#include "fl_mark.h"
#include "fl_state.h"

typedef struct {
    int32_t first, last; /* [first, last) */
} fl_span;

/* Thread t's share of n units. */
static inline fl_span share(const fl_thread *t, int32_t n) {
    int64_t threads = t->engine->active, id = t->id;
    return (fl_span){(int32_t)(n * id / threads), (int32_t)(n * (id + 1) / threads)};
}

/* Tokens of this thread, whole tiles, so that no two threads write one tile. */
static inline fl_span share_tokens(const fl_thread *t, int32_t n) {
    int32_t width = fl_act_width(t->engine->kernels, n);
    fl_span s = share(t, (n + width - 1) / width);
    s.first *= width;
    s.last *= width;
    if (s.last > n) s.last = n;
    return s;
}

static inline void sync(fl_thread *t) { FL_WAIT(t->engine, t); }

static inline int32_t n_tokens(const fl_thread *t) { return (int32_t)t->engine->batch.n_tokens; }

static inline const float *floats(const fl_thread *t, size_t offset) {
    return (const float *)(t->engine->weights + offset);
}

static inline fl_linear linear(const fl_thread *t, const fl_packed *p) {
    const uint8_t *w = t->engine->weights;
    return (fl_linear){
        .format = p->format,
        .rows = p->rows,
        .cols = p->cols,
        .blocks = (p->rows + FL_BLOCK_ROWS - 1) / FL_BLOCK_ROWS,
        .groups = (p->cols + FL_GROUP - 1) / FL_GROUP,
        .codes = w + p->codes,
        .scales = (const uint16_t *)(w + p->scales),
        .mins = p->mins == FL_NONE ? NULL : (const uint16_t *)(w + p->mins),
        .bias = p->bias == FL_NONE ? NULL : floats(t, p->bias),
    };
}

/* Where keys and values of one sequence lie, of one KV head, counted over all layers. */
static inline fl_kv pages_of(const fl_thread *t, int32_t head, int32_t sequence) {
    const fl_engine *e = t->engine;
    return (fl_kv){
        .base = fl_pages_of_head(e, head),
        .page_bytes = e->sizes.head_bytes,
        .pages = e->batch.pages + (size_t)sequence * e->batch.page_stride,
        .head_dim = FL_MODEL.head_dim,
    };
}

/* x = a row of the table times scale; in fl_ops.c. */
void fl_look_up(const fl_thread *t, const fl_table *table, int32_t token, float scale, float *x,
                int32_t d);

/* Rows of blocks [block0, block1) for every token of `act`; y points at row 0 of token 0. */
static inline void multiply(fl_thread *t, float *y, size_t stride, const fl_linear *w,
                            int32_t block0, int32_t block1, const fl_act *act) {
    const fl_kernels *k = t->engine->kernels;
    if (block0 >= block1) return;
    float *out = y + (size_t)block0 * FL_BLOCK_ROWS;
    if (act->n == 1)
        k->gemv(out, w, block0, block1, act);
    else
        k->gemm(out, stride, w, block0, block1, act, t->panel);
    if (!w->bias) return;
    int32_t row0 = block0 * FL_BLOCK_ROWS, row1 = block1 * FL_BLOCK_ROWS;
    if (row1 > w->rows) row1 = w->rows;
    for (int32_t i = 0; i < act->n; i++)
        for (int32_t r = row0; r < row1; r++) y[(size_t)i * stride + (size_t)r] += w->bias[r];
}

/* Sets what the next linear operation reads: `cols` activations of n tokens, in this thread's own
 * arrays for one token, in the shared ones for several. */
static inline fl_act *set_input(fl_thread *t, int32_t n, int32_t cols) {
    t->input = n == 1 ? t->own : t->engine->act;
    t->input.n = n;
    t->input.width = fl_act_width(t->engine->kernels, n);
    t->input.groups = (cols + FL_GROUP - 1) / FL_GROUP;
    return &t->input;
}

/* Quantize n rows of `cols` floats, `stride` apart, normalized first when `norm` is not NULL.
 * `rows` selects rows of x, or is NULL for all. */
static inline void quantize_rows(fl_thread *t, const float *x, size_t stride, int32_t cols,
                                 int32_t n, const int32_t *rows, const float *norm, float eps) {
    const fl_kernels *k = t->engine->kernels;
    fl_act *act = set_input(t, n, cols);
    fl_span mine = n == 1 ? (fl_span){0, 1} : share_tokens(t, n);
    for (int32_t i = mine.first; i < mine.last; i++) {
        const float *row = x + (size_t)(rows ? rows[i] : i) * stride;
        if (norm) {
            k->rmsnorm(t->row, row, norm, cols, eps);
            row = t->row;
        }
        k->quantize(act, i, 0, act->groups, row, cols);
    }
    if (n > 1) sync(t);
}

#endif
