/* flashlite: the memory of one open engine, shared by fl_engine.c and fl_ops.c. */
#ifndef FL_STATE_H
#define FL_STATE_H

#include "fl_engine.h"

#define FL_GATED_GROUPS 4 /* groups of d_ff that one thread takes through the gated MLP together */
#define FL_SURE 20 /* estimates that set the bar of the split head */
#define FL_GATED_COLS (FL_GATED_GROUPS * FL_GROUP)

/* Sizes derived from a model, in elements; every row starts on a whole block. */
typedef struct {
    int32_t q_cols, kv_cols; /* heads * head_dim */
    int32_t qkv_stride; /* one token's q, k and v, each padded to a block */
    int32_t k_offset, v_offset;
    int32_t wide_stride; /* output row of a projection: d_model padded */
    int32_t in_groups; /* groups of the widest of d_model and q_cols */
    int32_t hidden_groups; /* groups of d_ff */
    size_t head_bytes; /* of a page, for one layer and KV head */
    size_t page_bytes; /* of all of them */
} fl_sizes;

/* One thread of the pool and what only it touches. */
struct fl_thread {
    fl_engine *engine;
    uint32_t id;
    pthread_t handle;
    fl_act own; /* one token's activations: with one token every thread makes its own */
    float *row; /* [widest row] one token before it is quantized */
    float *gate, *up; /* [rows of a step][FL_GATED_COLS] a few groups of d_ff */
    float *queries; /* [FL_MAX_QUERIES][head_dim] */
    float *answers; /* [FL_MAX_QUERIES][head_dim] */
    void *panel; /* kernels' scratch */
    void *attend;
    int32_t *passing; /* [the larger limit] rows or blocks that this thread hands on */
    int32_t n_passing;
    float peaks[2]
               [FL_SURE]; /* its largest first estimates of blocks, second ones of rows, falling */
    uint32_t *block_codes; /* [groups of the screen's second part][4][16] one block of it */
    uint16_t *block_scales; /* [groups][16] */
    float best; /* its largest exact value */
    fl_act input; /* what the next linear operation reads: `own` or the engine's */
#ifdef FL_PROFILE
    fl_mark *marks; /* [FL_MARKS] */
    uint32_t n_marks, waited;
    uint64_t lost_marks;
    uint16_t layer;
#endif
};

struct fl_engine {
    const fl_kernels *kernels;
    const uint8_t *weights;
    fl_sizes sizes;
    uint32_t n_threads, n_pages, max_sequences;
    uint32_t active; /* threads that share this step, the caller's among them */
    uint64_t retry_at, hold; /* when one more is tried again, and how long that was put off */

    uint8_t *arena; /* [KV heads of all layers][n_pages][head_bytes]: what one head reads in a step
                       lies together, as far as a sequence's pages do */
    size_t arena_bytes;
    uint8_t *scratch;
    size_t scratch_bytes;

    /* Of the current step, shared by all threads, FL_STEP_ROWS rows each. */
    fl_batch batch;
    float *x; /* [d_model] residual stream */
    float *qkv; /* [qkv_stride] */
    float *heads; /* [q_cols] attention's output */
    float *wide; /* [wide_stride] output of a projection */
    float *hidden; /* [d_ff padded] one token's gate and up, when there is one token */
    float *angles[2]; /* [head_dim / 2] pairs cos, sin: global, local */
    fl_act act; /* input of linear operations when there are several tokens */
    fl_act hidden_act; /* input of the down projection */

    float *exact_rows; /* [d_model] input of the head; split head only */
    float *screen_rows; /* [d_model] input of the screen */
    float *tops; /* [blocks of the vocabulary] the largest first estimate of each */
    int32_t *rows, *blocks; /* [limit of each cut] what goes on from it, rising */

    int exact_head;
    fl_head_counts counts;

    fl_event start; /* set once per step, and once to quit: number of the step, threads in it */
    fl_barrier barrier;
    _Atomic uint32_t quit;
    uint32_t steps;
    uint32_t n_started; /* threads of the pool that run, the caller's not among them */
    fl_thread *threads; /* [n_threads] */
};

/* The pages of one KV head, counted over all layers. */
static inline uint8_t *fl_pages_of_head(const fl_engine *e, int32_t head) {
    return e->arena + (size_t)head * e->n_pages * e->sizes.head_bytes;
}

#endif
