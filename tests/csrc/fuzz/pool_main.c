/* The pool of threads under the thread sanitizer: engines of 1 to 4 threads beside each other, each
 * stepped by a caller of its own, given up threads and taken back, closed while idle.
 *
 *     pool SECONDS
 *
 * Logits must be those of one thread, and `active` must have gone all the way down and up again.
 */
#define _POSIX_C_SOURCE 200112L
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fl.h"
#include "fl_state.h"

#define MAX_THREADS 4
#define PAGES 4
#define TOKENS 40 /* of one sequence: two pages */

extern const uint8_t fz_weights[]; /* weights.c */

static float *oracle; /* [TOKENS][vocab] of one thread */
static uint64_t end;

/* One caller: what it asked for and what came of it. */
typedef struct {
    pthread_t handle;
    uint32_t n_threads;
    uint32_t opened, steps, lowest, given_up, taken_back, wrong;
} caller;

static void require(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "pool: %s\n", what);
    exit(1);
}

static fl_engine *open_engine(uint32_t n_threads) {
    fl_options options = {.abi = FL_ABI,
                          .n_threads = n_threads,
                          .weights = fz_weights,
                          .weights_size = FL_MODEL.weights_size,
                          .n_pages = PAGES,
                          .max_sequences = 1};
    fl_engine *engine = NULL;
    require(fl_open(&options, &engine) == FL_OK, "fl_open");
    return engine;
}

/* `n` tokens from position `from` on, with the logits of all of them. */
static void step(fl_engine *e, int32_t from, int32_t n, float *logits) {
    static const int32_t pages[2] = {3, 1}, zeros[TOKENS] = {0};
    int32_t tokens[TOKENS], positions[TOKENS], rows[TOKENS];
    for (int32_t i = 0; i < n; i++) {
        positions[i] = from + i;
        tokens[i] = (from + i) * 7 % FL_MODEL.vocab;
        rows[i] = i;
    }
    fl_batch batch = {.n_tokens = (uint32_t)n,
                      .n_sequences = 1,
                      .tokens = tokens,
                      .positions = positions,
                      .sequences = zeros,
                      .pages = pages,
                      .page_stride = 2,
                      .n_logits = (uint32_t)n,
                      .logit_rows = rows,
                      .logits = logits};
    require(fl_step(e, &batch) == FL_OK, "fl_step");
}

/* As if another program had kept a core busy: the next fl_step gives a thread up. */
static void disturb(fl_engine *e) { atomic_fetch_add(&e->barrier.slept, UINT64_C(1) << 60); }

/* One engine from open to close: prefill and single steps in turns, while threads go and come. */
static void use_engine(caller *c, uint32_t seed) {
    size_t vocab = (size_t)FL_MODEL.vocab;
    float *logits = malloc(TOKENS * vocab * sizeof *logits);
    require(logits != NULL, "memory");
    fl_engine *e = open_engine(c->n_threads);
    c->opened++;
    for (int32_t round = 0; round < 6; round++) {
        for (int32_t from = 0, n; from < TOKENS; from += n, c->steps++) {
            n = (int32_t)(seed = seed * 1664525 + 1013904223) & 0x10000
                    ? 1
                    : 1 + (int32_t)(seed >> 20) % 9;
            if (n > TOKENS - from) n = TOKENS - from;
            uint32_t active = e->active;
            if (round % 2 == 0) disturb(e);
            if (round % 2 == 1) e->retry_at = 0;
            step(e, from, n, logits + (size_t)from * vocab);
            c->given_up += e->active < active;
            c->taken_back += e->active > active;
            if (e->active < c->lowest) c->lowest = e->active;
        }
        c->wrong += memcmp(logits, oracle, TOKENS * vocab * sizeof *logits) != 0;
    }
    fl_close(e);
    free(logits);
}

static void *call(void *argument) {
    caller *c = argument;
    uint32_t seed = c->n_threads;
    do use_engine(c, seed++);
    while (fl_os_clock() < end);
    fl_close(open_engine(c->n_threads)); /* never stepped */
    return NULL;
}

int main(int argc, char **argv) {
    double seconds = argc > 1 ? strtod(argv[1], NULL) : 1.0;
    oracle = malloc((size_t)TOKENS * (size_t)FL_MODEL.vocab * sizeof *oracle);
    require(oracle != NULL, "memory");
    fl_engine *single = open_engine(1);
    step(single, 0, TOKENS, oracle);
    fl_close(single);
    end = fl_os_clock() + (uint64_t)(seconds * 1e9);
    caller callers[MAX_THREADS] = {0};
    for (uint32_t i = 0; i < MAX_THREADS; i++) {
        callers[i].n_threads = callers[i].lowest = i + 1;
        require(pthread_create(&callers[i].handle, NULL, call, &callers[i]) == 0, "a thread");
    }
    for (uint32_t i = 0; i < MAX_THREADS; i++) {
        caller *c = &callers[i];
        pthread_join(c->handle, NULL);
        printf("%u threads: %u engines, %u steps, down to %u, given up %u, taken back %u\n",
               c->n_threads, c->opened, c->steps, c->lowest, c->given_up, c->taken_back);
        require(c->wrong == 0, "logits differ from those of one thread");
        require(c->lowest == 1, "threads were not given up");
        require(c->n_threads == 1 || c->taken_back, "threads were not taken back");
    }
    free(oracle);
    return 0;
}
