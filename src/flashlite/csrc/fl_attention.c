/* flashlite: attention of a step's tokens over the pages of their own sequences.
 *
 * A head answers for segments of positions apart, and the answers are joined (fl_segment.h). That
 * makes what one token of a long text asks for divisible: with three KV heads and two threads,
 * one of them would have two heads to do. A step of few tokens shares out segments, and joins them
 * behind a barrier; one of many shares out runs of tokens. Both do the same arithmetic.
 */
#include <string.h>

#include "fl_segment.h"
#include "fl_share.h"

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

/* The queries of a run -> t->queries. */
static void gather_queries(fl_thread *t, const fl_run *run) {
    const fl_engine *e = t->engine;
    size_t hd = (size_t)FL_MODEL.head_dim, n = 0;
    for (int32_t i = run->i0; i < run->i1; i++) {
        const float *q = e->qkv + (size_t)i * (size_t)e->sizes.qkv_stride;
        for (int32_t h = run->h0; h < run->h1; h++, n++)
            memcpy(t->queries + n * hd, q + (size_t)h * hd, hd * sizeof(float));
    }
}

/* Where the answer of token i and query head h goes. */
static float *answer_of(const fl_engine *e, int32_t i, int32_t h) {
    return e->heads + (size_t)i * (size_t)e->sizes.q_cols + h * FL_MODEL.head_dim;
}

/* All segments of a run, one after the other. */
static void attend_run(fl_thread *t, const fl_run *run) {
    size_t hd = (size_t)FL_MODEL.head_dim, n = 0;
    gather_queries(t, run);
    t->engine->kernels->attend(t->answers, NULL, &run->kv, run->n, t->queries, run->first,
                               run->last, t->attend);
    for (int32_t i = run->i0; i < run->i1; i++)
        for (int32_t h = run->h0; h < run->h1; h++, n++)
            memcpy(answer_of(t->engine, i, h), t->answers + n * hd, hd * sizeof(float));
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

/* One segment of a run of one token -> its parts. The first row speaks for all: they see the same. */
static void attend_part(fl_thread *t, const fl_run *run, const fl_parts *p, int32_t segment) {
    int32_t hd = FL_MODEL.head_dim, begin = segment * FL_SEGMENT, end = begin + FL_SEGMENT - 1;
    int32_t first[FL_MAX_QUERIES], last[FL_MAX_QUERIES];
    fl_mass mass[FL_MAX_QUERIES];
    for (int32_t k = 0; k < run->n; k++) {
        first[k] = run->first[0] > begin ? run->first[0] : begin;
        last[k] = run->last[0] < end ? run->last[0] : end;
    }
    gather_queries(t, run);
    t->engine->kernels->attend(t->answers, mass, &run->kv, run->n, t->queries, first, last,
                               t->attend);
    for (int32_t k = 0; k < run->n; k++) {
        float *part = part_of(t->engine, p, run->i0, run->h0 + k, segment);
        memcpy(part, t->answers + k * hd, (size_t)hd * sizeof(float));
        part[hd] = mass[k].max;
        part[hd + 1] = mass[k].sum;
    }
}

/* Pages of a segment that positions [first, last] reach. */
static int32_t pages_in(int32_t first, int32_t last, int32_t segment) {
    int32_t begin = segment * FL_SEGMENT, end = begin + FL_SEGMENT - 1;
    return (last < end ? last : end) / FL_PAGE_TOKENS -
           (first > begin ? first : begin) / FL_PAGE_TOKENS + 1;
}

/* Every segment by itself, to whoever has least to do. */
static void attend_parts(fl_thread *t, const fl_heads *heads, int32_t window, const fl_parts *p) {
    int32_t h0 = 0;
    uint32_t loads[FL_MAX_THREADS] = {0};
    for (int32_t head = 0; head < heads->kv_heads; h0 += heads->queries[head++]) {
        for (int32_t i = 0; i < n_tokens(t); i++) {
            for (int32_t h = 0, n; h < heads->queries[head]; h += n) {
                fl_run run;
                n = heads->queries[head] - h;
                if (n > FL_MAX_QUERIES) n = FL_MAX_QUERIES;
                open_run(t, &run, heads, window, head, i, i + 1, h0 + h, h0 + h + n);
                int32_t first = run.first[0], last = run.last[0];
                for (int32_t s = first / FL_SEGMENT; s <= last / FL_SEGMENT; s++)
                    if (take_turn(loads, t->engine->active, pages_in(first, last, s)) == t->id)
                        attend_part(t, &run, p, s);
            }
        }
    }
}

static void join_parts(fl_thread *t, const fl_heads *heads, int32_t window, const fl_parts *p) {
    const fl_engine *e = t->engine;
    int32_t hd = FL_MODEL.head_dim, h0 = 0, turn = 0;
    fl_span mine = share(t, n_tokens(t) * (e->sizes.q_cols / hd));
    for (int32_t head = 0; head < heads->kv_heads; h0 += heads->queries[head++]) {
        for (int32_t i = 0; i < n_tokens(t); i++) {
            fl_run run;
            open_run(t, &run, heads, window, head, i, i + 1, h0, h0 + 1);
            int32_t first = run.first[0], last = run.last[0];
            for (int32_t h = h0; h < h0 + heads->queries[head]; h++, turn++) {
                if (turn < mine.first || turn >= mine.last) continue;
                fl_mass total = {0};
                for (int32_t s = first / FL_SEGMENT; s <= last / FL_SEGMENT; s++) {
                    const float *part = part_of(e, p, i, h, s);
                    fl_mass mass = {.max = part[hd], .sum = part[hd + 1]};
                    fl_take_segment(answer_of(e, i, h), &total, part, mass, hd, first, last, s);
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
