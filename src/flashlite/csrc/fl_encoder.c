/* flashlite: the operations an encoder's forward is made of (see fl_engine.h).
 *
 * A step holds whole sequences, and every token sees all of its own. Keys and values of one layer
 * are done with when the next begins, so all layers use the same pages. Norms follow the sums, and
 * what they give is the input of the next matrix, which the thread that has the row quantizes at
 * once. Who does what is as in fl_ops.c, but inputs are always the shared ones: a step of a single
 * token is rare.
 */
#include <string.h>

#include "fl_math.h"
#include "fl_share.h"

static void shared_input(fl_thread *t, int32_t cols) {
    t->input = t->engine->act;
    t->input.groups = (cols + FL_GROUP - 1) / FL_GROUP;
}

/* x = layernorm(x), and act = quantize(x): one token of this thread's. */
static void norm_row(fl_thread *t, int32_t token, size_t weight, size_t bias, float eps) {
    const fl_kernels *k = t->engine->kernels;
    int32_t d = FL_MODEL.d_model;
    float *x = t->engine->x + (size_t)token * (size_t)d;
    k->layernorm(x, x, floats(t, weight), floats(t, bias), d, eps);
    k->quantize(&t->input, token, 0, t->input.groups, x, d);
}

void fl_embed_text(fl_thread *t, const fl_table *words, const fl_table *positions,
                   const fl_table *types, size_t weight, size_t bias, float eps) {
    fl_engine *e = t->engine;
    int32_t d = FL_MODEL.d_model;
    fl_span mine = share_tokens(t, n_tokens(t));
    shared_input(t, d);
    for (int32_t i = mine.first; i < mine.last; i++) {
        float *x = e->x + (size_t)i * (size_t)d;
        fl_look_up(t, words, e->batch.tokens[i], 1.0f, x, d);
        fl_look_up(t, types, 0, 1.0f, t->row, d);
        for (int32_t c = 0; c < d; c++) x[c] += t->row[c];
        fl_look_up(t, positions, e->batch.positions[i], 1.0f, t->row, d);
        for (int32_t c = 0; c < d; c++) x[c] += t->row[c];
        norm_row(t, i, weight, bias, eps);
    }
    sync(t);
}

void fl_store(fl_thread *t, float q_scale) {
    fl_engine *e = t->engine;
    const fl_sizes *s = &e->sizes;
    int32_t hd = FL_MODEL.head_dim;
    fl_span mine = share(t, n_tokens(t));
    for (int32_t i = mine.first; i < mine.last; i++) {
        float *row = e->qkv + (size_t)i * (size_t)s->qkv_stride;
        for (int32_t h = 0; h < FL_MODEL.n_heads; h++) {
            fl_kv kv = pages_of(t, h, e->batch.sequences[i]);
            e->kernels->store_kv(&kv, e->batch.positions[i], row + s->k_offset + h * hd,
                                 row + s->v_offset + h * hd);
        }
        for (int32_t c = 0; c < s->q_cols; c++) row[c] *= q_scale;
    }
    sync(t);
}

/* Rows [i0, i1) of one sequence of `length` tokens, one head. */
static void attend_head(fl_thread *t, int32_t head, int32_t i0, int32_t i1, int32_t length) {
    fl_engine *e = t->engine;
    int32_t hd = FL_MODEL.head_dim, n = i1 - i0;
    int32_t first[FL_MAX_QUERIES] = {0}, last[FL_MAX_QUERIES];
    size_t bytes = (size_t)hd * sizeof(float), stride = (size_t)e->sizes.qkv_stride;
    const float *q = e->qkv + (size_t)i0 * stride + head * hd;
    for (int32_t i = 0; i < n; i++) {
        memcpy(t->queries + i * hd, q + (size_t)i * stride, bytes);
        last[i] = length - 1;
    }
    fl_kv kv = pages_of(t, head, e->batch.sequences[i0]);
    e->kernels->attend(t->answers, NULL, &kv, n, t->queries, first, last, t->attend);
    for (int32_t i = 0; i < n; i++) {
        float *out = e->heads + (size_t)(i0 + i) * (size_t)e->sizes.q_cols + head * hd;
        memcpy(out, t->answers + i * hd, bytes);
    }
}

/* The row behind the last one of the sequence that row i0 belongs to. */
static int32_t end_of_sequence(const fl_batch *b, int32_t i0) {
    int32_t i = i0;
    while (i < (int32_t)b->n_tokens && b->sequences[i] == b->sequences[i0]) i++;
    return i;
}

void fl_attend_all(fl_thread *t) {
    const fl_batch *b = &t->engine->batch;
    uint32_t turn = 0;
    for (int32_t begin = 0, end; begin < n_tokens(t); begin = end) {
        end = end_of_sequence(b, begin);
        for (int32_t i0 = begin; i0 < end; i0 += FL_MAX_QUERIES) {
            int32_t i1 = i0 + FL_MAX_QUERIES < end ? i0 + FL_MAX_QUERIES : end;
            for (int32_t head = 0; head < FL_MODEL.n_heads; head++) {
                if (turn++ % t->engine->active != t->id) continue;
                attend_head(t, head, i0, i1, end - begin);
            }
        }
    }
    sync(t);
}

/* x = layernorm(x + W input + its bias), act = quantize(x) */
static void add_norm(fl_thread *t, const fl_packed *packed, const fl_act *act, size_t weight,
                     size_t bias, float eps) {
    fl_engine *e = t->engine;
    fl_linear w = linear(t, packed);
    size_t stride = (size_t)e->sizes.wide_stride;
    int32_t d = FL_MODEL.d_model;
    fl_span blocks = share(t, w.blocks);
    multiply(t, e->wide, stride, &w, blocks.first, blocks.last, act);
    sync(t);
    fl_span mine = share_tokens(t, act->n);
    shared_input(t, d);
    for (int32_t i = mine.first; i < mine.last; i++) {
        float *x = e->x + (size_t)i * (size_t)d;
        const float *more = e->wide + (size_t)i * stride;
        for (int32_t c = 0; c < d; c++) x[c] += more[c];
        norm_row(t, i, weight, bias, eps);
    }
    sync(t);
}

void fl_add_heads_norm(fl_thread *t, const fl_packed *w, size_t weight, size_t bias, float eps) {
    fl_engine *e = t->engine;
    int32_t cols = e->sizes.q_cols;
    fl_span mine = share_tokens(t, n_tokens(t));
    shared_input(t, cols);
    for (int32_t i = mine.first; i < mine.last; i++) {
        const float *heads = e->heads + (size_t)i * (size_t)cols;
        e->kernels->quantize(&t->input, i, 0, t->input.groups, heads, cols);
    }
    sync(t);
    fl_act act = t->input;
    add_norm(t, w, &act, weight, bias, eps);
}

void fl_add_hidden_norm(fl_thread *t, const fl_packed *w, size_t weight, size_t bias, float eps) {
    add_norm(t, w, &t->engine->hidden_act, weight, bias, eps);
}

/* As fl_gated: a few groups of hidden channels at a time, which never leave the thread as floats. */
void fl_hidden(fl_thread *t, const fl_packed *up) {
    fl_engine *e = t->engine;
    const fl_kernels *k = e->kernels;
    fl_linear w = linear(t, up);
    int32_t n = t->input.n, blocks_per_group = FL_GROUP / FL_BLOCK_ROWS;
    fl_span mine = share(t, e->sizes.hidden_groups);
    for (int32_t group = mine.first; group < mine.last; group += FL_GATED_GROUPS) {
        int32_t end = group + FL_GATED_GROUPS < mine.last ? group + FL_GATED_GROUPS : mine.last;
        int32_t block0 = group * blocks_per_group, block1 = end * blocks_per_group;
        if (block1 > w.blocks) block1 = w.blocks;
        int32_t row0 = group * FL_GROUP;
        int32_t cols = (end * FL_GROUP < w.rows ? end * FL_GROUP : w.rows) - row0;
        if (n == 1)
            k->gemv(t->gate, &w, block0, block1, &t->input);
        else
            k->gemm(t->gate, FL_GATED_COLS, &w, block0, block1, &t->input, t->panel);
        for (int32_t i = 0; i < n; i++) {
            float *row = t->gate + (size_t)i * FL_GATED_COLS;
            for (int32_t c = 0; w.bias && c < cols; c++) row[c] += w.bias[row0 + c];
            k->gelu_erf(row, row, cols);
            k->quantize(&e->hidden_act, i, group, end, row, w.rows);
        }
    }
    sync(t);
}

/* Scale to length 1; sums of squares in 16 lanes. A vector of zeros stays. */
static void normalize(float *y, int32_t d) {
    float lanes[16] = {0};
    for (int32_t c = 0; c < d; c++) lanes[c % 16] += y[c] * y[c];
    float length = sqrtf(fl_fold(lanes));
    for (int32_t c = 0; c < d; c++) y[c] /= length > 1e-12f ? length : 1e-12f;
}

void fl_pool(fl_thread *t, fl_pooling kind) {
    const fl_batch *b = &t->engine->batch;
    int32_t d = FL_MODEL.d_model;
    for (int32_t begin = 0, end; begin < n_tokens(t); begin = end) {
        end = end_of_sequence(b, begin);
        int32_t sequence = b->sequences[begin];
        if ((uint32_t)sequence % t->engine->active != t->id) continue;
        float *y = b->hidden + (size_t)sequence * (size_t)d;
        const float *x = t->engine->x + (size_t)begin * (size_t)d;
        memcpy(y, x, (size_t)d * sizeof *y);
        if (kind == FL_MEAN) {
            for (int32_t i = begin + 1; i < end; i++) {
                x += d;
                for (int32_t c = 0; c < d; c++) y[c] += x[c];
            }
            for (int32_t c = 0; c < d; c++) y[c] /= (float)(end - begin);
        }
        normalize(y, d);
    }
}
