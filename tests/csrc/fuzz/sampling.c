/* fl_sample with any settings: what it promises in fl.h, checked in the plainest way. */
#include <math.h>
#include <string.h>

#include "fl.h"
#include "fuzz.h"

#define MAX_CHECKED 128 /* larger vocabularies are drawn from, and checked in part */

/* Sizes around those at which fl_sample.c changes its way: blocks of 16 and 1024, runs of 2048. */
static uint32_t any_vocab(fz_input *in) {
    switch (fz_below(in, 32)) {
    case 0: return (uint32_t)fz_between(in, 1015, 1035);
    case 1: return (uint32_t)fz_between(in, 2040, 2060);
    case 2: return (uint32_t)fz_between(in, 4090, 4110);
    default: return (uint32_t)fz_between(in, 1, 80);
    }
}

static float pick(fz_input *in, const float *from, uint32_t n) {
    return fz_rarely(in) ? fz_float(in) : from[fz_below(in, n)];
}

static int32_t *any_ids(fz_input *in, uint32_t n, uint32_t vocab) {
    int32_t *ids = fz_get(n * sizeof *ids);
    int hostile = fz_rarely(in);
    for (uint32_t i = 0; i < n; i++) {
        ids[i] =
            hostile && fz_below(in, 4) == 0 ? (int32_t)fz_bits(in) : (int32_t)fz_below(in, vocab);
    }
    return ids;
}

static fl_sampling any_settings(fz_input *in, uint32_t vocab) {
    static const float temperatures[] = {0, 0, 1, 1, 0.5f, 0.01f, 5, 1e-40f, 3e38f};
    static const float shares[] = {1, 1, 0, 0.5f, 0.95f, 0.999f, 1e-30f};
    static const float penalties[] = {1, 1, 1.25f, 0.5f, 3e38f, 1e-38f};
    static const float steps[] = {0, 0, 0.5f, -0.25f, 3e38f, -3e38f};
    fl_sampling s = {.temperature = pick(in, temperatures, 9), .top_p = pick(in, shares, 7)};
    s.min_p = fz_below(in, 2) ? 0 : pick(in, shares, 7);
    s.top_k = fz_below(in, 2) ? 0 : fz_between(in, 0, (int32_t)vocab + 1);
    if (fz_rarely(in)) s.top_k = (int32_t)fz_bits(in);
    s.repetition_penalty = pick(in, penalties, 6);
    s.presence_penalty = pick(in, steps, 6);
    s.frequency_penalty = pick(in, steps, 6);
    s.seed = fz_random(in);
    s.draw = fz_below(in, 4);
    s.n_history = fz_below(in, 10);
    s.history = any_ids(in, s.n_history, vocab);
    s.n_bias = fz_below(in, 2) ? 0 : fz_below(in, 5);
    s.bias_ids = any_ids(in, s.n_bias, vocab);
    s.bias = fz_floats(in, s.n_bias);
    if (s.n_history == 0 && fz_below(in, 2)) s.history = NULL;
    if (fz_rarely(in)) s.history = NULL;
    if (fz_rarely(in)) s.bias = NULL;
    return s;
}

/* Steps 1 and 2 of fl_sample.c, one token at a time. */
static void adjust(float *z, uint32_t vocab, const fl_sampling *s) {
    for (uint32_t id = 0; id < vocab; id++) {
        int32_t count = 0;
        for (uint32_t i = 0; i < s->n_history; i++) count += s->history[i] == (int32_t)id;
        if (count == 0) continue;
        if (s->repetition_penalty == 1 && s->presence_penalty == 0 && s->frequency_penalty == 0)
            continue;
        float x = z[id] > 0 ? z[id] / s->repetition_penalty : z[id] * s->repetition_penalty;
        z[id] = x - s->presence_penalty - (float)count * s->frequency_penalty;
    }
    for (uint32_t i = 0; i < s->n_bias; i++) z[s->bias_ids[i]] += s->bias[i];
}

/* How many tokens stand before `id` in the order of fl_sample.c: larger first, then lower ids. */
static uint32_t rank_of(const float *z, uint32_t vocab, int32_t id) {
    uint32_t rank = 0;
    for (uint32_t i = 0; i < vocab; i++) rank += z[i] > z[id] || (z[i] == z[id] && (int32_t)i < id);
    return rank;
}

static void check_draw(const float *z, uint32_t vocab, const fl_sampling *s, const fl_draw *d) {
    fz_require(d->token >= 0 && (uint32_t)d->token < vocab, "fl_sample: token < vocab");
    fz_require(z[d->token] > -INFINITY, "fl_sample: no forbidden token");
    uint32_t rank = rank_of(z, vocab, d->token);
    if (s->temperature == 0) fz_require(rank == 0, "fl_sample: temperature 0 takes the largest");
    if (s->top_k > 0) fz_require(rank < (uint32_t)s->top_k, "fl_sample: top_k");
    fz_require(d->logprob <= 0, "fl_sample: logprob <= 0");
    if (d->skip_logprob && d->n_top == 0) fz_require(d->logprob == 0, "fl_sample: skip_logprob");
    for (uint32_t i = 0; i < d->n_top; i++) {
        fz_require(d->top_ids[i] >= 0 && (uint32_t)d->top_ids[i] < vocab, "fl_sample: top_ids");
        fz_require(d->top_logprobs[i] <= 0, "fl_sample: top_logprobs");
        if (i) fz_require(d->top_logprobs[i] <= d->top_logprobs[i - 1], "fl_sample: order of top");
        if (vocab <= MAX_CHECKED || i + 1 == d->n_top)
            fz_require(rank_of(z, vocab, d->top_ids[i]) == i, "fl_sample: most likely first");
    }
}

/* A second call on the same arguments, in other memory. */
static void check_again(const float *logits, uint32_t vocab, const fl_sampling *s, fl_status status,
                        const fl_draw *d) {
    float *z = fz_get(vocab * sizeof *z);
    memcpy(z, logits, vocab * sizeof *z);
    fl_draw again = *d;
    again.top_ids = fz_get(d->n_top <= vocab ? d->n_top * sizeof(int32_t) : 0);
    again.top_logprobs = fz_get(d->n_top <= vocab ? d->n_top * sizeof(float) : 0);
    fz_require(fl_sample(z, vocab, s, fz_get(8 * (size_t)vocab), &again) == status,
               "fl_sample: the same status again");
    if (status != FL_OK) return;
    fz_require(again.token == d->token, "fl_sample: the same token again");
    fz_same("logprob again", "fl_sample", &again.logprob, &d->logprob, sizeof d->logprob);
    fz_same("top_ids again", "fl_sample", again.top_ids, d->top_ids, d->n_top * sizeof(int32_t));
}

void fz_sample(fz_input *in) {
    uint32_t vocab = any_vocab(in);
    fl_sampling s = any_settings(in, vocab);
    fl_draw d = {.token = -1, .skip_logprob = fz_below(in, 2)};
    uint32_t most = vocab < 64 ? vocab : 64;
    if (fz_below(in, 2)) d.n_top = fz_below(in, most + 1);
    if (fz_rarely(in)) d.n_top = most + 1 + fz_below(in, 70); /* always too many */
    d.top_ids = fz_get(d.n_top <= most ? d.n_top * sizeof *d.top_ids : 0);
    d.top_logprobs = (float *)fz_get(d.n_top <= most ? d.n_top * sizeof *d.top_logprobs : 0);
    float *logits = fz_floats(in, vocab), *copy = fz_get(vocab * sizeof *copy);
    memcpy(copy, logits, vocab * sizeof *copy);
    void *scratch = fz_get(8 * (size_t)vocab);
    if (fz_rarely(in)) {
        fz_require(fl_sample(NULL, vocab, &s, scratch, &d) == FL_BAD_ARGUMENT &&
                       fl_sample(logits, 0, &s, scratch, &d) == FL_BAD_ARGUMENT &&
                       fl_sample(logits, UINT32_MAX, &s, scratch, &d) == FL_BAD_ARGUMENT &&
                       fl_sample(logits, vocab, NULL, scratch, &d) == FL_BAD_ARGUMENT &&
                       fl_sample(logits, vocab, &s, NULL, &d) == FL_BAD_ARGUMENT &&
                       fl_sample(logits, vocab, &s, scratch, NULL) == FL_BAD_ARGUMENT,
                   "fl_sample: refuses what is not there");
    }
    fl_status status = fl_sample(logits, vocab, &s, scratch, &d);
    fz_require(status == FL_OK || status == FL_BAD_ARGUMENT, "fl_sample: OK or BAD_ARGUMENT");
    if (d.n_top > most) fz_require(status != FL_OK, "fl_sample: n_top beyond its limits");
    check_again(copy, vocab, &s, status, &d);
    if (status != FL_OK) return;
    adjust(copy, vocab, &s);
    fz_same("logits", "fl_sample", logits, copy, vocab * sizeof *copy);
    check_draw(copy, vocab, &s, &d);
}
