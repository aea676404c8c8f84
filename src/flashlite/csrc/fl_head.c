/* flashlite: from the residual stream to logits, in full or by screening.
 *
 * The full head multiplies every row of the vocabulary. The split head estimates all of them from a
 * part of a 4-bit table, some of them from all of it, and computes those that can matter:
 *
 *     h = dequantized input of the full head      x = project h + shift, d_model numbers
 *     estimate_i  = first_i x[0 .. rank) + bias_i + mean . h     of every row
 *     estimate_i += rest_i x[rank ..)                            of blocks that `coarse` keeps
 *     logit_i     = the full head's                              of those that `fine` keeps
 *
 * What an estimate leaves out, or rounds, is as wrong as the row's part in it is large, which the
 * artifact knows by block (`spread`), and as the input's part is (its norm): their product is the
 * error's standard deviation s. s^2 / 2 is taken off every estimate, so that the sum of their
 * exponentials is right. A cut keeps the blocks of 16 rows whose largest estimate + 2 s reaches the
 * bar, which lies `reach` below the 20th largest estimate of a block: so the 20 most likely tokens
 * are exact as far as errors stay within it. What is exact comes from the kernel and the table of the full head and so has
 * its bits. The best exact value must not lie below a bar that the others did not reach: then no
 * estimate is the largest, and by their margins no value behind one is. Otherwise, and where more
 * blocks pass than a cut allows, the row goes through the full head.
 *
 * All of this looks at one row of logits at a time: the result depends on neither threads nor
 * on what else is in the step.
 */
#include <string.h>

#include "fl_math.h"
#include "fl_share.h"

#define AHEAD 3 /* blocks asked for before they are needed */
#define MARGIN 2.0f /* standard deviations that a value may lie above its estimate */
#define LOWEST -3.0e38f /* below every logit */
#define LANES 16 /* partial sums of a float dot product: fixed, so that any vector width agrees */

/* Row i of the logits: quantized for the exact kernels; t->row holds it in floats. */
static fl_act exact_input(fl_thread *t, int32_t i, size_t norm, float eps) {
    const fl_engine *e = t->engine;
    int32_t d = FL_MODEL.d_model;
    fl_act act = t->own;
    act.n = act.width = 1;
    act.groups = (d + FL_GROUP - 1) / FL_GROUP;
    const float *x = e->x + (size_t)e->batch.logit_rows[i] * (size_t)d;
    e->kernels->rmsnorm(t->row, x, floats(t, norm), d, eps);
    e->kernels->quantize(&act, 0, 0, act.groups, t->row, d);
    return act;
}

/* Hand out what the head reads, where the caller asked for it. */
static void copy_hidden(fl_thread *t, size_t norm, float eps) {
    const fl_batch *b = &t->engine->batch;
    if (!b->hidden) return;
    size_t d = (size_t)FL_MODEL.d_model;
    fl_span mine = share(t, (int32_t)b->n_logits);
    for (int32_t i = mine.first; i < mine.last; i++)
        t->engine->kernels->rmsnorm(b->hidden + (size_t)i * d,
                                    t->engine->x + (size_t)b->logit_rows[i] * d, floats(t, norm),
                                    FL_MODEL.d_model, eps);
}

/* Blocks [block0, block1) of one row of logits; the last block may not be whole. */
static void multiply_row(const fl_thread *t, float *logits, const fl_linear *w, int32_t block0,
                         int32_t block1, const fl_act *act) {
    const fl_kernels *k = t->engine->kernels;
    int32_t whole = w->rows / FL_BLOCK_ROWS;
    int32_t last = block1 < whole ? block1 : whole;
    if (block0 < last) k->gemv(logits + (size_t)block0 * FL_BLOCK_ROWS, w, block0, last, act);
    if (block1 > whole) {
        size_t row = (size_t)whole * FL_BLOCK_ROWS;
        k->gemv(t->gate, w, whole, w->blocks, act);
        memcpy(logits + row, t->gate, ((size_t)w->rows - row) * sizeof(float));
    }
}

/* This thread's share of rows of w, for every row of logits. */
static void multiply_all(fl_thread *t, const fl_linear *w) {
    const fl_engine *e = t->engine;
    fl_span mine = share(t, w->blocks);
    size_t vocab = (size_t)w->rows;
    if (t->input.n == 1) {
        multiply_row(t, e->batch.logits, w, mine.first, mine.last, &t->input);
        return;
    }
    int32_t whole = w->rows / FL_BLOCK_ROWS; /* blocks that may be written in place */
    multiply(t, e->batch.logits, vocab, w, mine.first, mine.last < whole ? mine.last : whole,
             &t->input);
    if (mine.last > whole) { /* the last block is not whole: through `gate` */
        size_t row = (size_t)whole * FL_BLOCK_ROWS;
        e->kernels->gemm(t->gate, FL_GATED_COLS, w, whole, w->blocks, &t->input, t->panel);
        for (int32_t i = 0; i < t->input.n; i++)
            memcpy(e->batch.logits + (size_t)i * vocab + row, t->gate + (size_t)i * FL_GATED_COLS,
                   (vocab - row) * sizeof(float));
    }
}

void fl_head(fl_thread *t, size_t norm, float eps, const fl_packed *head) {
    fl_engine *e = t->engine;
    int32_t n = (int32_t)e->batch.n_logits, d = FL_MODEL.d_model;
    if (n == 0) return;
    copy_hidden(t, norm, eps);
    quantize_rows(t, e->x, (size_t)d, d, n, e->batch.logit_rows, floats(t, norm), eps);
    fl_linear w = linear(t, head);
    multiply_all(t, &w);
    sync(t);
}

/* ---- the split head ---- */

static float dot(const float *a, const float *b, int32_t n) {
    float sums[LANES] = {0};
    int32_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int32_t l = 0; l < LANES; l++) sums[l] += a[i + l] * b[i + l];
    for (int32_t l = 0; i + l < n; l++) sums[l] += a[i + l] * b[i + l];
    for (int32_t width = LANES / 2; width; width /= 2)
        for (int32_t l = 0; l < width; l++) sums[l] += sums[l + width];
    return sums[0];
}

static float length(const float *x, int32_t n) {
    float square = dot(x, x, n);
    return square > 0 ? square * fl_rsqrt(square) : 0.0f;
}

/* The input of the exact kernels as they understand it, in floats. */
static void dequantize(const fl_act *act, const float *x, float *out, int32_t d, int fp32) {
    const int8_t *codes = (const int8_t *)act->codes;
    for (int32_t c = 0; c < d; c++)
        out[c] = fp32 ? x[c] : (float)codes[c] * act->scale[c / FL_GROUP];
}

/* h of every row of logits -> e->exact_rows, x -> e->screen_rows, its first columns -> the
 * quantized input of the first part. */
static void screen_input(fl_thread *t, size_t norm, float eps, const fl_screen *s) {
    fl_engine *e = t->engine;
    int32_t n = (int32_t)e->batch.n_logits, d = FL_MODEL.d_model;
    fl_span rows = share(t, n);
    for (int32_t i = rows.first; i < rows.last; i++) {
        fl_act act = exact_input(t, i, norm, eps);
        dequantize(&act, t->row, e->exact_rows + (size_t)i * (size_t)d, d, e->kernels->fp32);
    }
    sync(t);
    const float *project = floats(t, s->project), *shift = floats(t, s->shift);
    fl_span mine = share(t, d);
    for (int32_t i = 0; i < n; i++) {
        const float *h = e->exact_rows + (size_t)i * (size_t)d;
        float *x = e->screen_rows + (size_t)i * (size_t)d;
        for (int32_t r = mine.first; r < mine.last; r++)
            x[r] = dot(project + (size_t)r * (size_t)d, h, d) + shift[r];
    }
    sync(t);
    quantize_rows(t, e->screen_rows, (size_t)d, s->first.cols, n, NULL, NULL, 0.0f);
}

/* The same of row i alone, the columns of the second part. */
static fl_act rest_input(fl_thread *t, int32_t i, const fl_screen *s) {
    const fl_engine *e = t->engine;
    fl_act act = t->own;
    act.n = act.width = 1;
    act.groups = (s->rest.cols + FL_GROUP - 1) / FL_GROUP;
    const float *x = e->screen_rows + (size_t)i * (size_t)FL_MODEL.d_model + s->first.cols;
    e->kernels->quantize(&act, 0, 0, act.groups, x, s->rest.cols);
    return act;
}

/* Keep the largest values of `peaks`, falling. */
static void note_peak(float *peaks, float value) {
    if (!(value > peaks[FL_SURE - 1])) return;
    int32_t i = FL_SURE - 1;
    for (; i > 0 && value > peaks[i - 1]; i--) peaks[i] = peaks[i - 1];
    peaks[i] = value;
}

static float fabs_float(float x) { return x < 0 ? -x : x; }

/* The largest of 16; halves against halves, with counts that the compiler sees. */
static float largest_of(float *restrict lanes) {
#define HALVE(n) \
    for (int32_t l = 0; l < (n); l++) \
    lanes[l] = lanes[l] > lanes[l + (n)] ? lanes[l] : lanes[l + (n)]
    HALVE(8);
    HALVE(4);
    HALVE(2);
    HALVE(1);
#undef HALVE
    return lanes[0];
}

/* Add `more` and `common` to the estimates of block b; returns the largest. `more` has 16 values
 * where the block is whole. */
static float finish_block(float *restrict logits, int32_t b, int32_t vocab,
                          const float *restrict more, float common) {
    float *restrict y = logits + (size_t)b * FL_BLOCK_ROWS;
    int32_t n = vocab - b * FL_BLOCK_ROWS;
    float lanes[FL_BLOCK_ROWS];
    if (n >= FL_BLOCK_ROWS) {
        for (int32_t l = 0; l < FL_BLOCK_ROWS; l++) lanes[l] = y[l] + more[l] + common;
        memcpy(y, lanes, sizeof lanes);
    } else {
        for (int32_t l = 0; l < FL_BLOCK_ROWS; l++) lanes[l] = LOWEST;
        for (int32_t l = 0; l < n; l++) y[l] = lanes[l] = y[l] + more[l] + common;
    }
    return largest_of(lanes);
}

/* The FL_SURE-th largest estimate of a block at this stage, or the smallest where there are fewer
 * blocks, less the reach of its cut. */
static float find_bar(const fl_engine *e, int stage, const fl_cut *cut) {
    float peaks[FL_SURE], last = LOWEST;
    for (int32_t i = 0; i < FL_SURE; i++) peaks[i] = LOWEST;
    for (uint32_t k = 0; k < e->active; k++)
        for (int32_t i = 0; i < FL_SURE; i++) note_peak(peaks, e->threads[k].peaks[stage][i]);
    for (int32_t i = 0; i < FL_SURE && peaks[i] > LOWEST; i++) last = peaks[i];
    return last - cut->reach;
}

/* Hand block b on: `limit` + 1 of them stand for too many. */
static void hand_on(int32_t *list, int32_t *n, int32_t b, int32_t limit) {
    if (*n < limit) list[*n] = b;
    if (*n <= limit) ++*n;
}

/* First estimates of this thread's share of the blocks, and which of them go on. Returns how many
 * do, of all threads. */
static int32_t estimate_first(fl_thread *t, float *logits, const fl_screen *s, float common,
                              float norm, float *bar) {
    fl_engine *e = t->engine;
    fl_span mine = share(t, (s->first.rows + FL_BLOCK_ROWS - 1) / FL_BLOCK_ROWS);
    const float *bias = floats(t, s->bias), *spread = floats(t, s->spread);
    for (int32_t i = 0; i < FL_SURE; i++) t->peaks[0][i] = LOWEST;
    for (int32_t b = mine.first; b < mine.last; b++) {
        float wrong = fabs_float(spread[b]) * norm;
        float top = finish_block(logits, b, s->first.rows, bias + (size_t)b * FL_BLOCK_ROWS,
                                 common - 0.5f * (wrong * wrong));
        note_peak(t->peaks[0], top);
        e->tops[b] = spread[b] < 0 ? -LOWEST : top + MARGIN * wrong;
    }
    sync(t);
    *bar = find_bar(e, 0, &s->coarse);
    t->n_coarse = 0;
    for (int32_t b = mine.first; b < mine.last; b++)
        if (e->tops[b] >= *bar) hand_on(t->coarse, &t->n_coarse, b, s->coarse.limit);
    sync(t);
    int32_t total = 0;
    for (uint32_t k = 0; k < e->active; k++) total += e->threads[k].n_coarse;
    return total;
}

/* The k-th of the blocks that all threads handed on, in a row. */
typedef struct {
    uint32_t thread;
    int32_t at;
} fl_place;

static int32_t next_block(const fl_engine *e, fl_place *place, int fine) {
    for (;;) {
        const fl_thread *from = &e->threads[place->thread];
        int32_t n = fine ? from->n_fine : from->n_coarse;
        if (place->at < n) return (fine ? from->fine : from->coarse)[place->at++];
        place->thread++;
        place->at = 0;
    }
}

static fl_place find_place(const fl_engine *e, int32_t k, int fine) {
    fl_place place = {0, k};
    for (;; place.thread++) {
        const fl_thread *from = &e->threads[place.thread];
        int32_t n = fine ? from->n_fine : from->n_coarse;
        if (place.at < n || place.thread + 1 == e->active) return place;
        place.at -= n;
    }
}

/* Ask for block b of a matrix before it is needed: the chosen blocks lie apart, and the first lines
 * of each would otherwise be waited for. */
static void fetch_block(const fl_linear *w, int32_t b) {
    size_t groups = (size_t)w->groups, bytes = groups * (w->format == FL_Q8 ? 512 : 256);
    const char *codes = (const char *)w->codes + (size_t)b * bytes;
    const char *scales = (const char *)(w->scales + (size_t)b * groups * FL_BLOCK_ROWS);
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(codes + i);
    for (size_t i = 0; i < groups * 32; i += 64) __builtin_prefetch(scales + i);
}

/* Second estimates of this thread's share of `total` blocks, and which of them go on. */
static int32_t estimate_rest(fl_thread *t, int32_t i, float *logits, const fl_screen *s,
                             int32_t total, float norm, float rest_norm, float *bar) {
    fl_engine *e = t->engine;
    fl_linear w = linear(t, &s->rest);
    fl_act act = rest_input(t, i, s);
    fl_span mine = share(t, total);
    const float *spread = floats(t, s->spread), *rest_spread = floats(t, s->rest_spread);
    for (int32_t k = 0; k < FL_SURE; k++) t->peaks[1][k] = LOWEST;
    fl_place place = find_place(e, mine.first, 0), ahead = place;
    for (int32_t k = mine.first; k < mine.last && k < mine.first + AHEAD; k++)
        fetch_block(&w, next_block(e, &ahead, 0));
    for (int32_t k = mine.first; k < mine.last; k++) {
        if (k + AHEAD < mine.last) fetch_block(&w, next_block(e, &ahead, 0));
        int32_t b = next_block(e, &place, 0);
        e->kernels->gemv(t->gate, &w, b, b + 1, &act);
        float before = spread[b] * norm, wrong = rest_spread[b] * rest_norm;
        float top = finish_block(logits, b, w.rows, t->gate,
                                 0.5f * (before * before) - 0.5f * (wrong * wrong));
        note_peak(t->peaks[1], top);
        e->tops[b] = spread[b] < 0 ? -LOWEST : top + MARGIN * wrong;
    }
    sync(t);
    *bar = find_bar(e, 1, &s->fine);
    t->n_fine = 0;
    place = find_place(e, mine.first, 0);
    for (int32_t k = mine.first; k < mine.last; k++) {
        int32_t b = next_block(e, &place, 0);
        if (e->tops[b] >= *bar) hand_on(t->fine, &t->n_fine, b, s->fine.limit);
    }
    sync(t);
    int32_t chosen = 0;
    for (uint32_t k = 0; k < e->active; k++) chosen += e->threads[k].n_fine;
    return chosen;
}

/* Exact values of this thread's share of `total` blocks. Returns the largest of all threads. */
static float compute_exact(fl_thread *t, float *logits, const fl_linear *w, int32_t total,
                           const fl_act *act) {
    const fl_engine *e = t->engine;
    fl_span mine = share(t, total);
    fl_place place = find_place(e, mine.first, 1), ahead = place;
    t->best = LOWEST;
    for (int32_t k = mine.first; k < mine.last && k < mine.first + 1; k++)
        fetch_block(w, next_block(e, &ahead, 1));
    for (int32_t k = mine.first; k < mine.last; k++) {
        if (k + 1 < mine.last) fetch_block(w, next_block(e, &ahead, 1));
        int32_t b = next_block(e, &place, 1), end = (b + 1) * FL_BLOCK_ROWS;
        multiply_row(t, logits, w, b, b + 1, act);
        for (int32_t row = b * FL_BLOCK_ROWS; row < end && row < w->rows; row++)
            if (logits[row] > t->best) t->best = logits[row];
    }
    sync(t);
    float best = LOWEST;
    for (uint32_t k = 0; k < e->active; k++)
        if (e->threads[k].best > best) best = e->threads[k].best;
    return best;
}

/* Row i of the logits, which holds the products of the first part. */
static void split_row(fl_thread *t, int32_t i, size_t weight, float eps, const fl_linear *w,
                      const fl_screen *s) {
    fl_engine *e = t->engine;
    int32_t d = FL_MODEL.d_model, coarse = 0, fine = 0;
    float *logits = e->batch.logits + (size_t)i * (size_t)w->rows;
    int wanted = e->batch.exact && e->batch.exact[i], full = 1;
    float bar = LOWEST, second = LOWEST, norm = 0.0f;
    if (!wanted) {
        const float *x = e->screen_rows + (size_t)i * (size_t)d + s->first.cols;
        float common = dot(floats(t, s->mean), e->exact_rows + (size_t)i * (size_t)d, d);
        norm = length(x, s->rest.cols);
        coarse = estimate_first(t, logits, s, common, norm, &bar);
        full = coarse == 0 || coarse > s->coarse.limit;
    }
    if (!full) {
        const float *x = e->screen_rows + (size_t)i * (size_t)d;
        fine = estimate_rest(t, i, logits, s, coarse, norm, length(x, d), &second);
        full = fine == 0 || fine > s->fine.limit;
    }
    fl_act act = exact_input(t, i, weight, eps);
    if (!full) {
        float best = compute_exact(t, logits, w, fine, &act);
        full = !(best >= bar && best >= second);
    }
    if (full) {
        fl_span mine = share(t, w->blocks);
        multiply_row(t, logits, w, mine.first, mine.last, &act);
    }
    if (t->id || wanted) return;
    e->counts.rows++;
    e->counts.full += (uint64_t)full;
    e->counts.estimated += full ? 0 : (uint64_t)coarse;
    e->counts.exact += full ? 0 : (uint64_t)fine;
}

/* Whether no row of this step is to be estimated. */
static int is_exact(const fl_engine *e) {
    if (e->exact_head) return 1;
    if (!e->batch.exact) return 0;
    for (uint32_t i = 0; i < e->batch.n_logits; i++)
        if (!e->batch.exact[i]) return 0;
    return 1;
}

void fl_head_split(fl_thread *t, size_t norm, float eps, const fl_packed *head,
                   const fl_screen *screen) {
    fl_engine *e = t->engine;
    if (e->batch.n_logits == 0) return;
    if (is_exact(e)) {
        fl_head(t, norm, eps, head);
        return;
    }
    copy_hidden(t, norm, eps);
    screen_input(t, norm, eps, screen);
    fl_linear w = linear(t, head), first = linear(t, &screen->first);
    multiply_all(t, &first);
    for (int32_t i = 0; i < (int32_t)e->batch.n_logits; i++) split_row(t, i, norm, eps, &w, screen);
    sync(t);
}
