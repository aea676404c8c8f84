/* flashlite: the operations a generated forward is made of (see fl_engine.h).
 *
 * Who does what: rows of matrices are split over threads by blocks, tokens by tiles, attention as
 * fl_attention.c says. With a single token every thread quantizes the whole input for itself,
 * which is cheaper than a barrier.
 */
#include <string.h>

#include "fl_math.h"
#include "fl_share.h"

/* ---- embedding and rotary angles ---- */

void fl_look_up(const fl_thread *t, const fl_table *table, int32_t token, float scale, float *x,
                int32_t d) {
    if (table->halves != FL_NONE) {
        const uint16_t *row =
            (const uint16_t *)(t->engine->weights + table->halves) + (size_t)token * (size_t)d;
        for (int32_t i = 0; i < d; i++) x[i] = fl_half_to_float(row[i]) * scale;
        return;
    }
    fl_linear w = linear(t, &table->packed);
    size_t lane = (size_t)token % FL_BLOCK_ROWS;
    size_t first = (size_t)token / FL_BLOCK_ROWS * (size_t)w.groups;
    for (int32_t g = 0; g < w.groups; g++) {
        size_t cell = first + (size_t)g;
        const uint8_t *codes = w.codes + cell * fl_code_bytes(w.format);
        float s = fl_half_to_float(w.scales[cell * FL_BLOCK_ROWS + lane]);
        float m = w.mins ? fl_half_to_float(w.mins[cell * FL_BLOCK_ROWS + lane]) : 0.0f;
        for (int32_t j = 0; j < FL_GROUP && g * FL_GROUP + j < d; j++) {
            int code;
            if (w.format == FL_Q8) {
                code = (int8_t)codes[j / 4 * 64 + (int32_t)lane * 4 + j % 4];
            } else {
                code = fl_code_at(w.format, codes, lane, (size_t)j) - fl_zero_code(w.format);
            }
            float value = s * (float)code;
            if (w.format == FL_Q4M) value += m;
            x[g * FL_GROUP + j] = value * scale;
        }
    }
}

/* cos and sin of position * frequency, computed here so that every libc gives the same bits:
 * reduce by multiples of pi/2 in double (positions are below 2^24), then polynomials. */
static void sin_cos(double angle, float *sine, float *cosine) {
    double turns = angle * 0.63661977236758134308; /* 2 / pi */
    int64_t quarter = (int64_t)(turns + (turns >= 0 ? 0.5 : -0.5));
    double r = (angle - (double)quarter * 1.57079632679489655800) -
               (double)quarter * 6.12323399573676603587e-17;
    double z = r * r;
    double s =
        r + r * z *
                (-1.0 / 6 +
                 z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800)))));
    double c =
        1.0 + z * (-0.5 + z * (1.0 / 24 +
                               z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 +
                                                                         z * (1.0 / 479001600))))));
    double sines[4] = {s, c, -s, -c};
    *sine = (float)sines[quarter & 3];
    *cosine = (float)sines[(quarter + 1) & 3];
}

static void fill_angles(float *angles, const float *frequencies, int32_t half, int32_t position) {
    for (int32_t j = 0; j < half; j++) {
        /* In double: at position 8,000 an angle rounded to float is off by 2e-4 radians. */
        sin_cos((double)position * (double)frequencies[j], &angles[2 * j + 1], &angles[2 * j]);
    }
}

void fl_embed(fl_thread *t, const fl_table *table, float scale) {
    fl_engine *e = t->engine;
    int32_t d = FL_MODEL.d_model, hd = FL_MODEL.head_dim;
    fl_span mine = share_tokens(t, n_tokens(t));
    for (int32_t i = mine.first; i < mine.last; i++) {
        fl_look_up(t, table, e->batch.tokens[i], scale, e->x + (size_t)i * (size_t)d, d);
        size_t at = (size_t)i * (size_t)hd;
        fill_angles(e->angles[0] + at, FL_MODEL.rope, hd / 2, e->batch.positions[i]);
        if (FL_MODEL.rope_local)
            fill_angles(e->angles[1] + at, FL_MODEL.rope_local, hd / 2, e->batch.positions[i]);
    }
    sync(t);
    FL_MARK(t, EMBED);
}

void fl_norm(fl_thread *t, size_t weight, float eps) {
    int32_t d = FL_MODEL.d_model;
    quantize_rows(t, t->engine->x, (size_t)d, d, n_tokens(t), NULL, floats(t, weight), eps);
    FL_MARK(t, NORM);
}

/* ---- attention ---- */

void fl_qkv(fl_thread *t, const fl_packed *q, const fl_packed *k, const fl_packed *v) {
    fl_engine *e = t->engine;
    const fl_sizes *s = &e->sizes;
    fl_linear parts[3] = {linear(t, q), linear(t, k), linear(t, v)};
    float *outputs[3] = {e->qkv, e->qkv + s->k_offset, e->qkv + s->v_offset};
    fl_span mine = share(t, parts[0].blocks + parts[1].blocks + parts[2].blocks);
    int32_t start = 0; /* of this part, in blocks of the three together */
    for (int p = 0; p < 3; p++) {
        int32_t first = mine.first > start ? mine.first - start : 0;
        int32_t last = mine.last - start < parts[p].blocks ? mine.last - start : parts[p].blocks;
        multiply(t, outputs[p], (size_t)s->qkv_stride, &parts[p], first, last, &t->input);
        start += parts[p].blocks;
    }
    sync(t);
    FL_MARK(t, QKV);
}

/* Rotate pairs (j, j + head_dim / 2) in place. */
static void rotate(float *x, const float *angles, int32_t half) {
    for (int32_t j = 0; j < half; j++) {
        float a = x[j], b = x[j + half], c = angles[2 * j], s = angles[2 * j + 1];
        x[j] = a * c - b * s;
        x[j + half] = b * c + a * s;
    }
}

void fl_rotate_store(fl_thread *t, const fl_heads *heads, size_t q_norm, size_t k_norm, float eps,
                     float q_scale, int local) {
    fl_engine *e = t->engine;
    const fl_sizes *s = &e->sizes;
    int32_t hd = FL_MODEL.head_dim, kv_heads = heads->kv_heads, both = kv_heads;
    for (int32_t h = 0; h < kv_heads; h++) both += heads->queries[h];
    fl_span mine = share(t, n_tokens(t) * both);
    for (int32_t unit = mine.first; unit < mine.last; unit++) {
        int32_t i = unit / both, h = unit % both;
        float *row = e->qkv + (size_t)i * (size_t)s->qkv_stride;
        const float *angles = e->angles[local] + (size_t)i * (size_t)hd;
        int is_key = h < kv_heads;
        float *x = is_key ? row + s->k_offset + h * hd : row + (h - kv_heads) * hd;
        size_t norm = is_key ? k_norm : q_norm;
        if (norm != FL_NONE) e->kernels->rmsnorm(x, x, floats(t, norm), hd, eps);
        rotate(x, angles, hd / 2);
        if (is_key) {
            fl_kv kv = pages_of(t, heads->before + h, e->batch.sequences[i]);
            e->kernels->store_kv(&kv, e->batch.positions[i], x, row + s->v_offset + h * hd);
        } else {
            for (int32_t j = 0; j < hd; j++) x[j] *= q_scale;
        }
    }
    sync(t);
    FL_MARK(t, ROTATE);
}

/* ---- projections back to the residual stream ---- */

/* x += W input, each thread on its own rows. */
static void project(fl_thread *t, const fl_packed *packed, const fl_act *act) {
    fl_engine *e = t->engine;
    fl_linear w = linear(t, packed);
    size_t stride = (size_t)e->sizes.wide_stride, d = (size_t)FL_MODEL.d_model;
    fl_span mine = share(t, w.blocks);
    multiply(t, e->wide, stride, &w, mine.first, mine.last, act);
    int32_t row0 = mine.first * FL_BLOCK_ROWS, row1 = mine.last * FL_BLOCK_ROWS;
    if (row1 > w.rows) row1 = w.rows;
    for (int32_t i = 0; i < act->n; i++)
        for (int32_t r = row0; r < row1; r++)
            e->x[(size_t)i * d + (size_t)r] += e->wide[(size_t)i * stride + (size_t)r];
    sync(t);
}

/* x += rmsnorm(W input) * weight, the norm on this thread's tokens. */
static void project_norm(fl_thread *t, const fl_packed *packed, const fl_act *act, size_t weight,
                         float eps) {
    fl_engine *e = t->engine;
    fl_linear w = linear(t, packed);
    size_t stride = (size_t)e->sizes.wide_stride;
    int32_t d = FL_MODEL.d_model;
    fl_span blocks = share(t, w.blocks);
    multiply(t, e->wide, stride, &w, blocks.first, blocks.last, act);
    sync(t);
    fl_span mine = share_tokens(t, act->n);
    for (int32_t i = mine.first; i < mine.last; i++) {
        float *x = e->x + (size_t)i * (size_t)d;
        e->kernels->rmsnorm(t->row, e->wide + (size_t)i * stride, floats(t, weight), d, eps);
        for (int32_t r = 0; r < d; r++) x[r] += t->row[r];
    }
    sync(t);
}

static const fl_act *quantize_heads(fl_thread *t, int32_t cols) {
    size_t stride = (size_t)t->engine->sizes.q_cols;
    quantize_rows(t, t->engine->heads, stride, cols, n_tokens(t), NULL, NULL, 0.0f);
    return &t->input;
}

void fl_project_heads(fl_thread *t, const fl_packed *w) {
    project(t, w, quantize_heads(t, w->cols));
    FL_MARK(t, HEADS);
}

void fl_project_heads_norm(fl_thread *t, const fl_packed *w, size_t weight, float eps) {
    project_norm(t, w, quantize_heads(t, w->cols), weight, eps);
    FL_MARK(t, HEADS);
}

void fl_project_hidden(fl_thread *t, const fl_packed *w) {
    project(t, w, &t->engine->hidden_act);
    FL_MARK(t, HIDDEN);
}

void fl_project_hidden_norm(fl_thread *t, const fl_packed *w, size_t weight, float eps) {
    project_norm(t, w, &t->engine->hidden_act, weight, eps);
    FL_MARK(t, HIDDEN);
}

/* ---- the gated MLP ---- */

/* Each thread takes a few groups of hidden channels through gate, up, activation and quantization,
 * so that the hidden layer never makes a round trip in floats. */
void fl_gated(fl_thread *t, const fl_packed *gate, const fl_packed *up, fl_activation kind) {
    fl_engine *e = t->engine;
    const fl_kernels *k = e->kernels;
    void (*activate)(float *, const float *, const float *, int32_t) =
        kind == FL_SILU ? k->silu_mul : k->gelu_mul;
    fl_linear g = linear(t, gate), u = linear(t, up);
    int32_t n = t->input.n, blocks_per_group = FL_GROUP / FL_BLOCK_ROWS;
    fl_span mine = share(t, e->sizes.hidden_groups);

    if (n == 1) {
        int32_t block0 = mine.first * blocks_per_group, block1 = mine.last * blocks_per_group;
        if (block1 > g.blocks) block1 = g.blocks;
        if (block0 < block1) {
            float *a = e->hidden, *b = e->hidden + e->sizes.hidden_groups * FL_GROUP;
            int32_t first = mine.first * FL_GROUP;
            int32_t last = mine.last * FL_GROUP < g.rows ? mine.last * FL_GROUP : g.rows;
            multiply(t, a, 0, &g, block0, block1, &t->input);
            multiply(t, b, 0, &u, block0, block1, &t->input);
            FL_MARK(t, GATED);
            activate(a + first, a + first, b + first, last - first);
            k->quantize(&e->hidden_act, 0, mine.first, mine.last, a + first, g.rows);
            FL_MARK(t, ACTIVATE);
        }
    } else {
        for (int32_t group = mine.first; group < mine.last; group += FL_GATED_GROUPS) {
            int32_t end = group + FL_GATED_GROUPS < mine.last ? group + FL_GATED_GROUPS : mine.last;
            int32_t block0 = group * blocks_per_group, block1 = end * blocks_per_group;
            if (block1 > g.blocks) block1 = g.blocks;
            int32_t cols = (end * FL_GROUP < g.rows ? end * FL_GROUP : g.rows) - group * FL_GROUP;
            k->gemm(t->gate, FL_GATED_COLS, &g, block0, block1, &t->input, t->panel);
            k->gemm(t->up, FL_GATED_COLS, &u, block0, block1, &t->input, t->panel);
            FL_MARK(t, GATED);
            for (int32_t i = 0; i < n; i++) {
                float *row = t->gate + (size_t)i * FL_GATED_COLS;
                activate(row, row, t->up + (size_t)i * FL_GATED_COLS, cols);
                k->quantize(&e->hidden_act, i, group, end, row, g.rows);
            }
            FL_MARK(t, ACTIVATE);
        }
    }
    sync(t);
    FL_MARK(t, GATED); /* the wait for others */
}
