/* flashlite: from a row of logits to one token.
 *
 * The order of operations, each on what the one before left:
 *
 *   1. repetition penalty, then presence and frequency penalties, over `history`
 *   2. logit bias                          -> the logits that logprobs are taken from
 *   3. temperature: weight = exp((logit - largest) / temperature)
 *   4. top-k: the k largest logits
 *   5. top-p: the fewest tokens whose weights reach top_p of what top-k left (never none)
 *   6. min-p: weights of at least min_p of the largest one
 *   7. one draw in proportion to weight
 *
 * Steps 4-6 each keep a prefix of one order (larger first, the lower id first among equals), so
 * each is a cut in that order and the vocabulary is never sorted: a cut is found by counting into
 * the digits of the floats' bit patterns (radix selection), in linear time whatever they are.
 *
 * Results depend on no libc and no instruction set: exp and log are written here, sums run in
 * double over a fixed number of lanes in a fixed order, and a random number is a function of
 * (seed, draw) alone.
 */
#include "fl.h"

#include <string.h>

#define LANES 16         /* partial sums and maxima: fixed, so that any vector width agrees */
#define CHUNK 1024       /* values of one maximum, a multiple of LANES */
#define MAX_TOP 64       /* of fl_draw.n_top */
#define MAX_BINS 2048    /* of one digit of a cut: 11, 11 and 10 bits */
#define MAX_RUNS 2048    /* runs of values that a cut looks at by their maximum first */
#define INFINITE_KEY 0x7f800000

/* ---- arithmetic ---- */

static int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_of(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* An integer in the order of the floats; positive NaNs lie above +inf, negative ones below -inf. */
static int32_t order_key(float x) {
    int32_t bits = bits_of(x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static float float_at(int32_t key) {
    return float_of(key ^ ((key >> 31) & 0x7fffffff)); /* the inverse of order_key */
}

static int is_finite(float x) { return (bits_of(x) & INFINITE_KEY) != INFINITE_KEY; }

/* exp(-d) for d >= 0, within 2 units in the last place; 0 beyond 87, also for +inf.
 * -d = n ln 2 + r, |r| <= ln 2 / 2; the Taylor series of exp(r) ends below 2^-26. Written without
 * branches or float comparisons, which keep compilers from vectorising it. */
static float exp_minus(float d) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer */
    const int32_t limit = bits_of(87.0f);
    int32_t bits = bits_of(d), near = -(int32_t)(bits <= limit); /* all ones or zero */
    float x = -float_of((bits & near) | (limit & ~near));
    float shifted = x * 1.44269504f + round;
    float n = shifted - round;
    float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    int32_t power = (bits_of(shifted) - bits_of(round) + 127) * (1 << 23);
    return float_of(bits_of(p * float_of(power)) & near);
}

/* Natural logarithm of a finite x >= 1: x = m 2^e, m in [1, 2), log m = 2 atanh((m - 1)/(m + 1)),
 * where the odd series in s <= 1/3 ends below 2^-50 after 15 terms. */
static double log_at_least_1(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    double exponent = (double)((int64_t)(bits >> 52) - 1023);
    bits = (bits & 0xfffffffffffffull) | 0x3ff0000000000000ull;
    double m;
    memcpy(&m, &bits, sizeof m);
    double s = (m - 1) / (m + 1), s2 = s * s, series = 0;
    for (int k = 29; k >= 1; k -= 2) series = series * s2 + 1.0 / k;
    return exponent * 0.69314718055994530942 + 2 * s * series;
}

/* The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
 * generators, 2014), which turns a counter into 64 well-mixed bits. */
static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* Uniform in [0, 1), in steps of 2^-53. */
static double uniform(uint64_t seed, uint64_t draw) {
    const uint64_t golden = 0x9e3779b97f4a7c15ull;
    return (double)(mix(mix(seed + golden) + (draw + 1) * golden) >> 11) * 0x1p-53;
}

/* ---- steps 1 and 2 ---- */

static int ids_in_range(const int32_t *ids, uint32_t n, uint32_t vocab) {
    int bad = 0;
    for (uint32_t i = 0; i < n; i++) bad |= (uint32_t)ids[i] >= vocab;
    return !bad;
}

static fl_status check(const float *logits, uint32_t vocab, const fl_sampling *s,
                       const void *scratch, const fl_draw *draw) {
    if (!logits || !s || !scratch || !draw || vocab == 0 || vocab > INT32_MAX)
        return FL_BAD_ARGUMENT;
    /* Written so that NaN fails each of them. */
    if (!(s->temperature >= 0 && is_finite(s->temperature)) || !(s->top_p >= 0 && s->top_p <= 1) ||
        !(s->min_p >= 0 && s->min_p <= 1) || s->top_k < 0)
        return FL_BAD_ARGUMENT;
    if (!(s->repetition_penalty > 0 && is_finite(s->repetition_penalty)) ||
        !is_finite(s->presence_penalty) || !is_finite(s->frequency_penalty))
        return FL_BAD_ARGUMENT;
    if ((s->n_history && !s->history) || (s->n_bias && (!s->bias_ids || !s->bias)) ||
        !ids_in_range(s->history, s->n_history, vocab) ||
        !ids_in_range(s->bias_ids, s->n_bias, vocab))
        return FL_BAD_ARGUMENT;
    for (uint32_t i = 0; i < s->n_bias; i++)
        if (!is_finite(s->bias[i]) && !(s->bias[i] < 0)) return FL_BAD_ARGUMENT;
    if (draw->n_top > MAX_TOP || draw->n_top > vocab ||
        (draw->n_top && (!draw->top_ids || !draw->top_logprobs)))
        return FL_BAD_ARGUMENT;
    return FL_OK;
}

/* `count` [vocab] is written only at the tokens of the history. */
static void penalize(float *logits, const fl_sampling *s, int32_t *count) {
    if (s->repetition_penalty == 1 && s->presence_penalty == 0 && s->frequency_penalty == 0) return;
    for (uint32_t i = 0; i < s->n_history; i++) count[s->history[i]] = 0;
    for (uint32_t i = 0; i < s->n_history; i++) count[s->history[i]]++;
    for (uint32_t i = 0; i < s->n_history; i++) {
        int32_t id = s->history[i];
        if (count[id] == 0) continue; /* done at an earlier occurrence */
        float x = logits[id];
        x = x > 0 ? x / s->repetition_penalty : x * s->repetition_penalty;
        logits[id] = x - s->presence_penalty - (float)count[id] * s->frequency_penalty;
        count[id] = 0;
    }
}

/* ---- the largest logit ---- */

typedef struct {
    float value;
    int32_t id;
} peak;

/* Finds the largest logit, the first of equals. Integer maxima of the order keys vectorise where
 * float ones may not, and show a NaN or +inf for free. Fails on those, and if all are -inf. */
static fl_status find_peak(const float *logits, uint32_t vocab, peak *best) {
    const int32_t lowest = order_key(float_of((int32_t)0xff800000)); /* -inf */
    uint32_t best_chunk = 0;
    best->value = float_of((int32_t)0xff800000);
    for (uint32_t at = 0; at < vocab; at += CHUNK) {
        uint32_t n = vocab - at < CHUNK ? vocab - at : CHUNK;
        int32_t high = INT32_MIN, low = INT32_MAX;
        for (uint32_t i = 0; i < n; i++) {
            int32_t key = order_key(logits[at + i]);
            high = key > high ? key : high;
            low = key < low ? key : low;
        }
        if (high >= INFINITE_KEY || low < lowest) return FL_BAD_ARGUMENT;
        float value = float_at(high);
        if (value > best->value) {
            best->value = value;
            best_chunk = at;
        }
    }
    if (!is_finite(best->value)) return FL_BAD_ARGUMENT;
    uint32_t id = best_chunk;
    while (logits[id] != best->value) id++; /* as floats: -0 and 0 are equals */
    best->id = (int32_t)id;
    return FL_OK;
}

/* weights[i] = exp((logits[i] - largest) / temperature); may be in place. */
static void weigh(float *weights, const float *logits, uint32_t n, float largest,
                  float temperature) {
    for (uint32_t i = 0; i < n; i++) weights[i] = exp_minus((largest - logits[i]) / temperature);
}

static double total_of(const float *weights, uint32_t n) {
    double lane[LANES] = {0}, total = 0;
    uint32_t whole = n / LANES * LANES;
    for (uint32_t at = 0; at < whole; at += LANES)
        for (uint32_t i = 0; i < LANES; i++) lane[i] += (double)weights[at + i];
    for (uint32_t i = whole; i < n; i++) lane[i - whole] += (double)weights[i];
    for (uint32_t i = 0; i < LANES; i++) total += lane[i];
    return total;
}

/* log of the sum of exp(logit - largest), at least 0. */
static double log_sum(const float *logits, uint32_t vocab, float largest) {
    float weights[CHUNK];
    double sum = 0;
    for (uint32_t at = 0; at < vocab; at += CHUNK) {
        uint32_t n = vocab - at < CHUNK ? vocab - at : CHUNK;
        weigh(weights, logits + at, n, largest, 1.0f);
        sum += total_of(weights, n);
    }
    return log_at_least_1(sum);
}

/* ---- cuts ---- */

typedef enum { BY_COUNT, BY_WEIGHT } measure;

/* Where a prefix of the order ends: what is above `key`, and the first `ties` at it. */
typedef struct {
    uint32_t key;
    uint32_t ties;
} cut;

static uint32_t cut_key(float x) {
    return (uint32_t)order_key(x + 0.0f) ^ 0x80000000u; /* + 0: -0 and 0 are equals */
}

/* The shortest prefix of `values` whose measure (its length, or the sum of its values, which are
 * then >= 0) reaches `target` > 0; all of them when none does. */
static cut find_cut(const float *values, uint32_t n, measure by, double target) {
    static const int shifts[] = {21, 10, 0}, widths[] = {11, 11, 10};
    double bins[MAX_BINS], above = 0;
    uint32_t key = 0, mask = 0;
    for (int digit = 0; digit < 3; digit++) {
        uint32_t last = (1u << widths[digit]) - 1;
        memset(bins, 0, sizeof bins);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t k = cut_key(values[i]);
            if ((k & mask) == key)
                bins[k >> shifts[digit] & last] += by == BY_COUNT ? 1 : (double)values[i];
        }
        uint32_t bin = last;
        while (bin > 0 && !(bins[bin] > 0 && above + bins[bin] >= target)) above += bins[bin--];
        /* Sums of parts may round to less than the sum that chose `key`: then all of it. */
        if (!(bins[bin] > 0 && above + bins[bin] >= target)) return (cut){key, UINT32_MAX};
        key |= bin << shifts[digit];
        mask |= last << shifts[digit];
    }
    double each = by == BY_COUNT ? 1 : (double)float_of((int32_t)(key ^ 0x80000000u));
    double ties = (target - above) / each; /* rounded up, at least one */
    uint32_t whole = ties > 0 ? (uint32_t)ties : 0;
    return (cut){key, (double)whole < ties || whole == 0 ? whole + 1 : whole};
}

/* Copies the part of a prefix that lies in the places [begin, end), in order of place, and returns
 * its length. `ids` NULL means that the place is the id. `to` may be `values`, `to_ids` `ids`. */
static uint32_t keep(const float *values, const int32_t *ids, uint32_t begin, uint32_t end, cut at,
                     float *to, int32_t *to_ids) {
    uint32_t kept = 0, ties = at.ties;
    for (uint32_t i = begin; i < end; i++) {
        uint32_t key = cut_key(values[i]);
        if (key < at.key || (key == at.key && ties == 0)) continue;
        ties -= key == at.key;
        to_ids[kept] = ids ? ids[i] : (int32_t)i;
        to[kept++] = values[i];
    }
    return kept;
}

/* find_cut and keep, quickly: values reach `target` at least as soon as the maxima of runs of
 * them do, so what lies below the cut of the maxima is dropped first, whole runs at a time. */
static uint32_t keep_prefix(const float *values, const int32_t *ids, uint32_t n, measure by,
                            double target, float *to, int32_t *to_ids) {
    float maxima[MAX_RUNS] = {0};
    uint32_t length = n / MAX_RUNS + 1, runs = 0, kept = 0;
    for (uint32_t at = 0; at < n; at += length) {
        uint32_t end = n - at < length ? n : at + length;
        int32_t high = INT32_MIN;
        for (uint32_t i = at; i < end; i++) {
            int32_t key = order_key(values[i]);
            high = key > high ? key : high;
        }
        maxima[runs++] = float_at(high);
    }
    cut rough = {find_cut(maxima, runs, by, target).key, UINT32_MAX};
    for (uint32_t run = 0; run < runs; run++) {
        if (cut_key(maxima[run]) < rough.key) continue;
        uint32_t at = run * length, end = n - at < length ? n : at + length;
        kept += keep(values, ids, at, end, rough, to + kept, to_ids + kept);
    }
    return keep(to, to_ids, 0, kept, find_cut(to, kept, by, target), to, to_ids);
}

/* ---- draws ---- */

static float logprob_of(float logit, float largest, double log_total) {
    return (float)((double)logit - (double)largest - log_total);
}

/* The n_top most likely, sorted; `values` and `ids` are scratch [vocab]. */
static void find_top(const float *logits, uint32_t vocab, float largest, double log_total,
                     float *values, int32_t *ids, fl_draw *draw) {
    uint32_t n = keep_prefix(logits, NULL, vocab, BY_COUNT, draw->n_top, values, ids);
    for (uint32_t i = 0; i < n; i++) { /* insertion: at most 64, and stable */
        uint32_t j = i;
        for (; j > 0 && draw->top_logprobs[j - 1] < values[i]; j--) {
            draw->top_logprobs[j] = draw->top_logprobs[j - 1];
            draw->top_ids[j] = draw->top_ids[j - 1];
        }
        draw->top_logprobs[j] = values[i];
        draw->top_ids[j] = ids[i];
    }
    for (uint32_t i = 0; i < n; i++)
        draw->top_logprobs[i] = logprob_of(draw->top_logprobs[i], largest, log_total);
}

/* Steps 3 to 7. `weights` and `ids` are scratch [vocab]. */
static int32_t draw_token(const float *logits, uint32_t vocab, const fl_sampling *s, float largest,
                          float *weights, int32_t *ids) {
    uint32_t n = vocab;
    const float *from = logits;
    if (s->top_k > 0 && (uint32_t)s->top_k < vocab) {
        n = keep_prefix(logits, NULL, vocab, BY_COUNT, s->top_k, weights, ids);
        from = weights;
    } else {
        for (uint32_t i = 0; i < n; i++) ids[i] = (int32_t)i;
    }
    weigh(weights, from, n, largest, s->temperature);
    if (s->top_p < 1) {
        double target = (double)s->top_p * total_of(weights, n);
        n = keep_prefix(weights, ids, n, BY_WEIGHT, target, weights, ids);
    }
    cut likely = {cut_key(s->min_p), UINT32_MAX}; /* the largest weight is 1 */
    if (s->min_p > 0) n = keep(weights, ids, 0, n, likely, weights, ids);
    double target = uniform(s->seed, s->draw) * total_of(weights, n), sum = 0;
    int32_t token = ids[0];
    for (uint32_t i = 0; i < n; i++) {
        if (weights[i] > 0) token = ids[i]; /* never one of weight 0, however sums are rounded */
        sum += (double)weights[i];
        if (sum > target) break;
    }
    return token;
}

fl_status fl_sample(float *logits, uint32_t vocab, const fl_sampling *sampling, void *scratch,
                    fl_draw *draw) {
    fl_status status = check(logits, vocab, sampling, scratch, draw);
    if (status != FL_OK) return status;
    float *values = scratch;
    int32_t *ids = (int32_t *)scratch + vocab;
    penalize(logits, sampling, ids);
    for (uint32_t i = 0; i < sampling->n_bias; i++)
        logits[sampling->bias_ids[i]] += sampling->bias[i];
    peak best;
    status = find_peak(logits, vocab, &best);
    if (status != FL_OK) return status;
    draw->token = best.id;
    if (sampling->temperature > 0)
        draw->token = draw_token(logits, vocab, sampling, best.value, values, ids);
    draw->logprob = 0;
    if (draw->skip_logprob && draw->n_top == 0) return FL_OK;
    double log_total = log_sum(logits, vocab, best.value);
    draw->logprob = logprob_of(logits[draw->token], best.value, log_total);
    if (draw->n_top) find_top(logits, vocab, best.value, log_total, values, ids, draw);
    return FL_OK;
}
