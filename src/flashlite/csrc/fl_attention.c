/* flashlite: attention of a step's tokens over the pages of their own sequences.
 *
 * A head answers for positions [0, FL_SEGMENT), [FL_SEGMENT, 2 FL_SEGMENT) ... apart, as far as a
 * token sees them, and the answers are joined in this order, each by its share of the softmax's sum.
 * That makes what one token of a long text asks for divisible: with three KV heads and two threads,
 * one of them would have two heads to do. A step of few tokens shares out segments, and joins them
 * behind a barrier; one of many shares out runs of tokens. Both do the same arithmetic.
 */
#include <string.h>

#include "fl_math.h"
#include "fl_share.h"

#define FL_SEGMENT 512 /* positions, whole pages */
/* Pages that the tokens of one call of a streaming head see. */
#define FL_STREAM_PAGES (FL_STREAM_TOKENS / FL_PAGE_TOKENS + 4)

/* Tokens [i0, i1) of one sequence x query heads [h0, h1) of one KV head, and what each row of it
 * sees: positions [first, last] of `kv`. */
typedef struct {
    int32_t i0, i1, h0, h1, n;
    fl_kv kv;
    int32_t first[FL_MAX_QUERIES], last[FL_MAX_QUERIES];
    int32_t stream[FL_STREAM_PAGES];
} fl_run;

/* The part of a text that a streaming head sees is a text of its own: its first page, then whole
 * pages of the last FL_STREAM_TOKENS. Returns the page at which these begin, which all tokens of one
 * run share, or 0 where nothing lies between. */
static int32_t stream_from(int32_t position) {
    int32_t page = (position - FL_STREAM_TOKENS + 1) / FL_PAGE_TOKENS;
    return position < FL_STREAM_TOKENS || page < 2 ? 0 : page;
}

static void open_run(const fl_thread *t, fl_run *run, const fl_heads *heads, int32_t window,
                     int32_t head, int32_t i0, int32_t i1, int32_t h0, int32_t h1) {
    const fl_batch *b = &t->engine->batch;
    int32_t skipped = 0, n = 0;
    run->i0 = i0, run->i1 = i1, run->h0 = h0, run->h1 = h1;
    run->kv = pages_of(t, heads->before + head, b->sequences[i0]);
    if (heads->streams && heads->streams[head]) {
        int32_t from = stream_from(b->positions[i0]);
        if (from) {
            run->stream[0] = run->kv.pages[0];
            for (int32_t p = from; p <= b->positions[i1 - 1] / FL_PAGE_TOKENS; p++)
                run->stream[p - from + 1] = run->kv.pages[p];
            run->kv.pages = run->stream;
            skipped = (from - 1) * FL_PAGE_TOKENS;
        }
    }
    for (int32_t i = i0; i < i1; i++) {
        int32_t position = b->positions[i];
        for (int32_t h = h0; h < h1; h++, n++) {
            run->last[n] = position - skipped;
            run->first[n] = window && position >= window ? position - window + 1 : 0;
        }
    }
    run->n = n;
}

/* Answers of all rows over one segment -> t->answers, mass. */
static void attend_segment(fl_thread *t, const fl_run *run, int32_t segment, fl_mass *mass) {
    const fl_engine *e = t->engine;
    int32_t hd = FL_MODEL.head_dim, begin = segment * FL_SEGMENT, end = begin + FL_SEGMENT - 1,
            n = 0;
    int32_t first[FL_MAX_QUERIES], last[FL_MAX_QUERIES];
    for (int32_t i = run->i0; i < run->i1; i++) {
        const float *q = e->qkv + (size_t)i * (size_t)e->sizes.qkv_stride;
        for (int32_t h = run->h0; h < run->h1; h++, n++) {
            memcpy(t->queries + (size_t)n * (size_t)hd, q + h * hd, (size_t)hd * sizeof(float));
            first[n] = run->first[n] > begin ? run->first[n] : begin;
            last[n] = run->last[n] < end ? run->last[n] : end;
        }
    }
    e->kernels->attend(t->answers, mass, &run->kv, n, t->queries, first, last, t->attend);
}

/* Join the answer of one more segment to those before. */
static void join(float *restrict answer, fl_mass *mass, const float *restrict more,
                 const fl_mass *by) {
    float max = by->max > mass->max ? by->max : mass->max;
    float a = mass->sum * (mass->max < max ? fl_exp2(mass->max - max) : 1.0f);
    float b = by->sum * (by->max < max ? fl_exp2(by->max - max) : 1.0f), sum = a + b;
    *mass = (fl_mass){.max = max, .sum = sum};
    a /= sum;
    b /= sum;
    for (int32_t c = 0; c < FL_MODEL.head_dim; c++) answer[c] = answer[c] * a + more[c] * b;
}

/* Where the answer of token i and query head h goes. */
static float *answer_of(const fl_engine *e, int32_t i, int32_t h) {
    return e->heads + (size_t)i * (size_t)e->sizes.q_cols + h * FL_MODEL.head_dim;
}

/* All segments of a run, one after the other. */
static void attend_run(fl_thread *t, const fl_run *run) {
    int32_t hd = FL_MODEL.head_dim, begin = run->first[0], end = run->last[run->n - 1];
    fl_mass total[FL_MAX_QUERIES], mass[FL_MAX_QUERIES];
    for (int32_t s = begin / FL_SEGMENT, n = 0; s <= end / FL_SEGMENT; s++, n = 0) {
        attend_segment(t, run, s, mass);
        for (int32_t i = run->i0; i < run->i1; i++) {
            for (int32_t h = run->h0; h < run->h1; h++, n++) {
                const float *more = t->answers + (size_t)n * (size_t)hd;
                float *answer = answer_of(t->engine, i, h);
                if (s == run->first[n] / FL_SEGMENT) {
                    memcpy(answer, more, (size_t)hd * sizeof(float));
                    total[n] = mass[n];
                } else if (s > run->first[n] / FL_SEGMENT && s <= run->last[n] / FL_SEGMENT) {
                    join(answer, &total[n], more, &mass[n]);
                }
            }
        }
    }
}

/* The end of the tokens from i0 on that one run may take: of one sequence, `most` at most, which see
 * the same pages where the head streams. */
static int32_t end_of_run(const fl_batch *b, int32_t i0, int32_t most, int streams) {
    int32_t i1 = i0 + 1, n = (int32_t)b->n_tokens;
    while (i1 < n && i1 < i0 + most && b->sequences[i1] == b->sequences[i0] &&
           (!streams || stream_from(b->positions[i1]) == stream_from(b->positions[i0])))
        i1++;
    return i1;
}

static void attend_runs(fl_thread *t, const fl_heads *heads, int32_t window) {
    const fl_batch *b = &t->engine->batch;
    int32_t n = n_tokens(t), h0 = 0;
    uint32_t turn = 0;
    for (int32_t head = 0; head < heads->kv_heads; h0 += heads->queries[head++]) {
        int32_t per_kv = heads->queries[head], streams = heads->streams && heads->streams[head];
        /* A group of more heads than one run takes is cut; a smaller one takes several tokens. */
        int32_t together = per_kv < FL_MAX_QUERIES ? per_kv : FL_MAX_QUERIES;
        for (int32_t i0 = 0, i1; i0 < n; i0 = i1) {
            i1 = end_of_run(b, i0, FL_MAX_QUERIES / together, streams);
            for (int32_t h = 0; h < per_kv; h += together) {
                if (turn++ % t->engine->active != t->id) continue;
                int32_t more = h + together < per_kv ? together : per_kv - h;
                fl_run run;
                open_run(t, &run, heads, window, head, i0, i1, h0 + h, h0 + h + more);
                attend_run(t, &run);
            }
        }
    }
}

/* ---- few tokens ---- */

/* Segments of one token and query head: answers and masses, side by side in e->wide, which no
 * projection uses meanwhile. */
typedef struct {
    int32_t segments; /* of the longest text */
    size_t row; /* floats of one segment */
} fl_parts;

static float *part_of(const fl_engine *e, const fl_parts *p, int32_t i, int32_t h, int32_t s) {
    int32_t heads = e->sizes.q_cols / FL_MODEL.head_dim;
    return e->wide + ((size_t)(i * heads + h) * (size_t)p->segments + (size_t)s) * p->row;
}

/* Whether a step has too few runs for its threads, and its segments have room. */
static int is_divisible(const fl_thread *t, const fl_heads *heads, fl_parts *p) {
    const fl_engine *e = t->engine;
    int32_t n = n_tokens(t), longest = 0;
    if (e->active == 1 || (uint32_t)(n * heads->kv_heads) >= 4 * e->active) return 0;
    for (int32_t i = 0; i < n; i++)
        if (e->batch.positions[i] > longest) longest = e->batch.positions[i];
    p->segments = longest / FL_SEGMENT + 1;
    p->row = (size_t)FL_MODEL.head_dim + 2;
    size_t rows = (size_t)n * (size_t)(e->sizes.q_cols / FL_MODEL.head_dim) * (size_t)p->segments;
    return p->segments > 1 && rows * p->row <= (size_t)FL_MAX_BATCH * (size_t)e->sizes.wide_stride;
}

/* The thread with the fewest pages so far takes so many more. */
static uint32_t take_turn(uint32_t *loads, uint32_t threads, int32_t pages) {
    uint32_t least = 0;
    for (uint32_t k = 1; k < threads; k++)
        if (loads[k] < loads[least]) least = k;
    loads[least] += (uint32_t)pages;
    return least;
}

/* Every segment by itself: one token, up to FL_MAX_QUERIES heads. */
static void attend_parts(fl_thread *t, const fl_heads *heads, int32_t window, const fl_parts *p) {
    const fl_engine *e = t->engine;
    int32_t hd = FL_MODEL.head_dim, n = n_tokens(t), h0 = 0;
    uint32_t loads[FL_MAX_THREADS] = {0};
    for (int32_t head = 0; head < heads->kv_heads; h0 += heads->queries[head++]) {
        for (int32_t i = 0; i < n; i++) {
            for (int32_t h = 0, more; h < heads->queries[head]; h += more) {
                more = heads->queries[head] - h;
                if (more > FL_MAX_QUERIES) more = FL_MAX_QUERIES;
                fl_run run;
                open_run(t, &run, heads, window, head, i, i + 1, h0 + h, h0 + h + more);
                int32_t first = run.first[0], last = run.last[0];
                for (int32_t s = first / FL_SEGMENT; s <= last / FL_SEGMENT; s++) {
                    int32_t begin = s * FL_SEGMENT, end = begin + FL_SEGMENT - 1;
                    int32_t page0 = (first > begin ? first : begin) / FL_PAGE_TOKENS;
                    int32_t page1 = (last < end ? last : end) / FL_PAGE_TOKENS;
                    if (take_turn(loads, e->active, page1 - page0 + 1) != t->id) continue;
                    fl_mass mass[FL_MAX_QUERIES];
                    attend_segment(t, &run, s, mass);
                    for (int32_t k = 0; k < run.n; k++) {
                        float *part = part_of(e, p, i, run.h0 + k, s);
                        memcpy(part, t->answers + k * hd, (size_t)hd * sizeof(float));
                        part[hd] = mass[k].max;
                        part[hd + 1] = mass[k].sum;
                    }
                }
            }
        }
    }
}

static void join_parts(fl_thread *t, const fl_heads *heads, int32_t window, const fl_parts *p) {
    const fl_engine *e = t->engine;
    int32_t hd = FL_MODEL.head_dim, n = n_tokens(t), h0 = 0, turn = 0;
    fl_span mine = share(t, n * (e->sizes.q_cols / hd));
    for (int32_t head = 0; head < heads->kv_heads; h0 += heads->queries[head++]) {
        for (int32_t i = 0; i < n; i++) {
            fl_run run;
            open_run(t, &run, heads, window, head, i, i + 1, h0, h0 + 1);
            for (int32_t h = h0; h < h0 + heads->queries[head]; h++, turn++) {
                if (turn < mine.first || turn >= mine.last) continue;
                float *answer = answer_of(e, i, h);
                fl_mass total = {0};
                for (int32_t s = run.first[0] / FL_SEGMENT; s <= run.last[0] / FL_SEGMENT; s++) {
                    const float *part = part_of(e, p, i, h, s);
                    fl_mass mass = {.max = part[hd], .sum = part[hd + 1]};
                    if (s == run.first[0] / FL_SEGMENT) {
                        memcpy(answer, part, (size_t)hd * sizeof(float));
                        total = mass;
                    } else {
                        join(answer, &total, part, &mass);
                    }
                }
            }
        }
    }
}

void fl_attend(fl_thread *t, const fl_heads *heads, int32_t window) {
    fl_parts parts;
    if (is_divisible(t, heads, &parts)) {
        attend_parts(t, heads, window, &parts);
        sync(t);
        join_parts(t, heads, window, &parts);
    } else {
        attend_runs(t, heads, window);
    }
    sync(t);
    FL_MARK(t, ATTEND);
}
