/* flashlite: from the residual stream to logits, in full or by screening.
 *
 * The full head multiplies every row of the vocabulary. The split head estimates all of them from a
 * part of a 4-bit table, some of them from all of it, and computes those that can matter:
 *
 *     h = dequantized input of the full head      x = project h + shift, d_model numbers
 *     estimate_i  = first_i x[0 .. rank) + bias_i + mean . h     of every row
 *     estimate_i += rest_i x[rank ..)                            of rows that `coarse` keeps
 *     logit_i     = the full head's                              of blocks that `fine` keeps
 *
 * What an estimate leaves out, or rounds, is as wrong as the row's part in it is large, which the
 * artifact knows by block (`spread`), and as the input's part is (its norm): their product is the
 * error's standard deviation s. s^2 / 2 is taken off every estimate, so that the sum of their
 * exponentials is right. A cut keeps the rows whose estimate + 2 s reaches the bar, which lies
 * `reach` below the 20th largest estimate (first ones: of a block of 16 rows): so the 20 most likely
 * tokens are exact as far as errors stay within it. Where only the largest logit is needed, the bar
 * lies `reach` below the largest estimate, and a fifth as much passes. What is exact comes from the kernel and the
 * table of the full head, in whole blocks, and so has its bits. The best exact value must not lie
 * below a bar that the others did not reach: then no estimate is the largest, and by their margins
 * no value behind one is. Otherwise, and where more pass than a cut allows, the row goes through the
 * full head.
 *
 * All of this looks at one row of logits at a time: the result depends on neither threads nor
 * on what else is in the step.
 */
#include <string.h>

#include "fl_math.h"
#include "fl_share.h"

#define MARGIN 2.0f /* standard deviations that a value may lie above its estimate */
#define LOWEST -3.0e38f /* below every logit */
#define LANES 16 /* partial sums of a float dot product: fixed, so that any vector width agrees */

/* A function that only prefetches has no effect that gcc knows of: unless it is inlined, calls of it
 * are left out. */
#define INLINE static inline __attribute__((always_inline))

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
    FL_MARK(t, HEAD);
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
 * where the block is whole. Not inlined: the
 * promises of `restrict` would be lost, and the vectors with them. */
__attribute__((noinline)) static float finish_block(float *restrict logits, int32_t b,
                                                    int32_t vocab, const float *restrict more,
                                                    float common) {
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

/* The estimate at place `sure` of those noted at this stage, from the largest on, or the smallest
 * where there are fewer, less the reach of its cut. */
static float find_bar(const fl_engine *e, int stage, int32_t sure, const fl_cut *cut) {
    float peaks[FL_SURE], last = LOWEST;
    for (int32_t i = 0; i < FL_SURE; i++) peaks[i] = LOWEST;
    for (uint32_t k = 0; k < e->active; k++)
        for (int32_t i = 0; i < FL_SURE; i++) note_peak(peaks, e->threads[k].peaks[stage][i]);
    for (int32_t i = 0; i < sure && peaks[i] > LOWEST; i++) last = peaks[i];
    return last - cut->reach;
}

/* Hand a row or a block on: `limit` + 1 of them stand for too many. */
static void hand_on(fl_thread *t, int32_t what, int32_t limit) {
    if (t->n_passing < limit) t->passing[t->n_passing] = what;
    if (t->n_passing <= limit) t->n_passing++;
}

/* What all threads handed on -> `all`, in order. Returns how many; above the limit none is there. */
static int32_t collect(fl_thread *t, int32_t *all, int32_t limit) {
    const fl_engine *e = t->engine;
    int32_t total = 0, mine = 0;
    sync(t);
    for (uint32_t k = 0; k < e->active; k++) {
        if (k == t->id) mine = total;
        total += e->threads[k].n_passing;
    }
    if (total > limit) return total;
    memcpy(all + mine, t->passing, (size_t)t->n_passing * sizeof(int32_t));
    sync(t);
    return total;
}

/* Whether a value that may lie `margin` above its estimate reaches the bar; spread below 0: it
 * counts as such. */
static int reaches(float estimate, float margin, float spread, float bar) {
    return spread < 0 || estimate + margin >= bar;
}

/* First estimates of this thread's share of the blocks -> logits; rows that go on -> e->rows.
 * Returns how many do. */
static int32_t estimate_first(fl_thread *t, float *logits, const fl_screen *s, int32_t sure,
                              float common, float norm, float *bar) {
    fl_engine *e = t->engine;
    int32_t vocab = s->first.rows;
    fl_span mine = share(t, (vocab + FL_BLOCK_ROWS - 1) / FL_BLOCK_ROWS);
    const float *bias = floats(t, s->bias), *spread = floats(t, s->spread);
    for (int32_t i = 0; i < FL_SURE; i++) t->peaks[0][i] = LOWEST;
    for (int32_t b = mine.first; b < mine.last; b++) {
        float wrong = fabs_float(spread[b]) * norm;
        e->tops[b] = finish_block(logits, b, vocab, bias + (size_t)b * FL_BLOCK_ROWS,
                                  common - 0.5f * (wrong * wrong));
        note_peak(t->peaks[0], e->tops[b]);
    }
    sync(t);
    *bar = find_bar(e, 0, sure, &s->coarse);
    t->n_passing = 0;
    for (int32_t b = mine.first; b < mine.last; b++) {
        float margin = MARGIN * (fabs_float(spread[b]) * norm);
        if (!reaches(e->tops[b], margin, spread[b], *bar)) continue;
        int32_t end = (b + 1) * FL_BLOCK_ROWS;
        for (int32_t row = b * FL_BLOCK_ROWS; row < end && row < vocab; row++)
            if (reaches(logits[row], margin, spread[b], *bar)) hand_on(t, row, s->coarse.limit);
    }
    return collect(t, e->rows, s->coarse.limit);
}

/* Ask for memory before it is needed: what was chosen lies apart. */
INLINE void fetch(const void *from, size_t bytes) {
    const char *at = from;
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
    __builtin_prefetch(at + bytes - 1);
}

INLINE void fetch_row(const fl_linear *w, int32_t row) {
    size_t groups = (size_t)w->groups;
    fetch((const char *)w->codes + (size_t)row * groups * 16, groups * 16);
    fetch(w->scales + (size_t)row * groups, groups * 2);
}

/* The second part keeps every row in one piece (16 bytes of codes per group, then the next group's;
 * scales likewise): n <= 16 rows that lie apart become a block as the kernels read it. Group by
 * group: row by row, stores would lie where the next loads do, but for the upper bits of their
 * addresses, and delay them fivefold. The rows behind these, `more` of them, are asked for meanwhile,
 * a few at a time: a core waits for some twenty lines at once, and forgets what goes beyond. */
static void gather_rows(const fl_thread *t, const fl_linear *w, const int32_t *rows, int32_t n,
                        int32_t more) {
    size_t groups = (size_t)w->groups;
    int32_t fetched = 0;
    for (size_t g = 0; g < groups; g++) {
        uint32_t *codes = t->block_codes + g * 4 * FL_BLOCK_ROWS;
        uint16_t *scales = t->block_scales + g * FL_BLOCK_ROWS;
        for (int32_t l = 0; l < n; l++) {
            size_t from = (size_t)rows[l] * groups + g;
            const uint32_t *row = (const uint32_t *)w->codes + from * 4;
            for (int32_t i = 0; i < 4; i++) codes[i * FL_BLOCK_ROWS + l] = row[i];
            scales[l] = w->scales[from];
        }
        for (; fetched * w->groups < more * ((int32_t)g + 1); fetched++)
            fetch_row(w, rows[n + fetched]);
    }
}

/* The first place >= k of a list of rows where another block begins. */
static int32_t next_block(const int32_t *rows, int32_t k, int32_t n) {
    while (k > 0 && k < n && rows[k] / FL_BLOCK_ROWS == rows[k - 1] / FL_BLOCK_ROWS) k++;
    return k;
}

/* Second estimates of the n rows of e->rows -> logits; their blocks that go on -> e->blocks.
 * Returns how many do. */
static int32_t estimate_rest(fl_thread *t, int32_t i, float *logits, const fl_screen *s, int32_t n,
                             int32_t sure, float norm, float rest_norm, float *bar) {
    fl_engine *e = t->engine;
    fl_linear w = linear(t, &s->rest), block = w;
    block.rows = FL_BLOCK_ROWS;
    block.blocks = 1;
    block.codes = (const uint8_t *)t->block_codes;
    block.scales = t->block_scales;
    fl_act act = rest_input(t, i, s);
    const int32_t *rows = e->rows;
    const float *spread = floats(t, s->spread), *rest_spread = floats(t, s->rest_spread);
    fl_span mine = share(t, (n + FL_BLOCK_ROWS - 1) / FL_BLOCK_ROWS);
    int32_t first = mine.first * FL_BLOCK_ROWS, last = mine.last * FL_BLOCK_ROWS;
    if (last > n) last = n;
    for (int32_t k = 0; k < FL_SURE; k++) t->peaks[1][k] = LOWEST;
    for (int32_t k = first; k < last; k += FL_BLOCK_ROWS) {
        int32_t end = k + FL_BLOCK_ROWS < last ? k + FL_BLOCK_ROWS : last;
        int32_t more = last - end < FL_BLOCK_ROWS ? last - end : FL_BLOCK_ROWS;
        gather_rows(t, &w, rows + k, end - k, more);
        e->kernels->gemv(t->gate, &block, 0, 1, &act);
        for (int32_t l = k; l < end; l++) {
            int32_t b = rows[l] / FL_BLOCK_ROWS;
            float before = spread[b] * norm, wrong = rest_spread[b] * rest_norm;
            float value = logits[rows[l]] + t->gate[l - k] +
                          (0.5f * (before * before) - 0.5f * (wrong * wrong));
            note_peak(t->peaks[1], value);
            logits[rows[l]] = value;
        }
    }
    sync(t);
    *bar = find_bar(e, 1, sure, &s->fine);
    t->n_passing = 0;
    first = next_block(rows, first, n);
    last = next_block(rows, last, n);
    for (int32_t k = first; k < last; k++) {
        int32_t b = rows[k] / FL_BLOCK_ROWS;
        if (!reaches(logits[rows[k]], MARGIN * (rest_spread[b] * rest_norm), spread[b], *bar))
            continue;
        hand_on(t, b, s->fine.limit);
        while (k + 1 < last && rows[k + 1] / FL_BLOCK_ROWS == b) k++;
    }
    return collect(t, e->blocks, s->fine.limit);
}

INLINE void fetch_block(const fl_linear *w, int32_t b) {
    size_t groups = (size_t)w->groups, bytes = groups * fl_code_bytes(w->format);
    fetch((const char *)w->codes + (size_t)b * bytes, bytes);
    fetch(w->scales + (size_t)b * groups * FL_BLOCK_ROWS, groups * 2 * FL_BLOCK_ROWS);
}

/* Exact values of the n blocks of e->blocks. Returns the largest. */
static float compute_exact(fl_thread *t, float *logits, const fl_linear *w, int32_t n,
                           const fl_act *act) {
    const fl_engine *e = t->engine;
    fl_span mine = share(t, n);
    t->best = LOWEST;
    for (int32_t k = mine.first; k < mine.last; k++) {
        int32_t b = e->blocks[k], end = (b + 1) * FL_BLOCK_ROWS;
        if (k == mine.first) fetch_block(w, b);
        if (k + 1 < mine.last) fetch_block(w, e->blocks[k + 1]);
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
    uint8_t need = e->batch.needs ? e->batch.needs[i] : FL_LIKELY;
    int32_t d = FL_MODEL.d_model, coarse = 0, fine = 0, sure = need == FL_LARGEST ? 1 : FL_SURE;
    float *logits = e->batch.logits + (size_t)i * (size_t)w->rows;
    int full = 1;
    float bar = LOWEST, second = LOWEST, norm = 0.0f;
    if (need != FL_ALL) {
        const float *x = e->screen_rows + (size_t)i * (size_t)d + s->first.cols;
        float common = dot(floats(t, s->mean), e->exact_rows + (size_t)i * (size_t)d, d);
        norm = length(x, s->rest.cols);
        coarse = estimate_first(t, logits, s, sure, common, norm, &bar);
        full = coarse == 0 || coarse > s->coarse.limit;
    }
    if (!full) {
        const float *x = e->screen_rows + (size_t)i * (size_t)d;
        fine = estimate_rest(t, i, logits, s, coarse, sure, norm, length(x, d), &second);
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
    if (t->id || need == FL_ALL) return;
    e->counts.rows++;
    e->counts.full += (uint64_t)full;
    e->counts.estimated += full ? 0 : (uint64_t)coarse;
    e->counts.exact += full ? 0 : (uint64_t)fine;
}

/* Whether no row of this step is to be estimated. */
static int is_exact(const fl_engine *e) {
    if (e->exact_head) return 1;
    if (!e->batch.needs) return 0;
    for (uint32_t i = 0; i < e->batch.n_logits; i++)
        if (e->batch.needs[i] != FL_ALL) return 0;
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
    FL_MARK(t, HEAD);
}
