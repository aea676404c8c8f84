/* flashlite: the public interface of one compiled model.
 *
 * A library holds one model for one instruction set. Python (or any C program) opens it with the
 * verified weights, steps it, closes it:
 *
 *     fl_options options = {.abi = FL_ABI, .weights = bytes, .weights_size = n,
 *                           .n_threads = 2, .n_pages = 64, .max_sequences = 1};
 *     fl_engine *engine;
 *     if (fl_open(&options, &engine) != FL_OK) ...
 *     fl_step(engine, &batch);
 *     fl_close(engine);
 *
 * Nothing here prints, exits, or allocates after fl_open. One engine is stepped by one caller at a
 * time; engines are independent of each other.
 */
#ifndef FL_H
#define FL_H

#include <stddef.h>
#include <stdint.h>

#define FL_ABI 4
#define FL_PAGE_TOKENS 32  /* tokens in one KV page */
#define FL_MAX_BATCH 256   /* tokens in one step, */
#define FL_MAX_TEXT 512    /* in one step of an encoder */
#define FL_MAX_THREADS 64

#if defined(_WIN32)
#define FL_API __declspec(dllexport)
#else
#define FL_API __attribute__((visibility("default")))
#endif

typedef enum {
    FL_OK = 0,
    FL_BAD_ABI = 1,      /* caller and library were built from different headers */
    FL_BAD_ARGUMENT = 2, /* a count, id, position or page outside its range */
    FL_NO_MEMORY = 3,    /* the system refused memory at open */
    FL_NO_THREAD = 4,    /* the system refused a thread at open */
    FL_BAD_WEIGHTS = 5,  /* the weights are not as long as this model's, or not aligned to 64 */
    FL_BAD_TARGET = 6,   /* the CPU lacks the instructions of this library */
} fl_status;

/* Which logits of a row have to be exact where the model has a screen; the others are estimates. */
typedef enum {
    FL_LIKELY = 0,  /* the 20 most likely, and what may lie near them: enough to draw from */
    FL_ALL = 1,     /* every one, as with exact_head */
    FL_LARGEST = 2, /* the largest alone: enough at temperature 0 */
} fl_need;

typedef struct fl_engine fl_engine;

typedef struct {
    uint32_t abi;           /* FL_ABI */
    uint32_t n_threads;     /* 1 .. FL_MAX_THREADS, the caller's own included */
    const uint8_t *weights; /* aligned to 64; the caller keeps it until fl_close */
    size_t weights_size;
    uint32_t n_pages;       /* KV pages in the arena; touched only when used */
    uint32_t max_sequences; /* sequences in one step, 1 .. FL_MAX_BATCH */
    uint32_t exact_head;    /* 1: every logit is computed, also where the model has a screen */
} fl_options;

/* One step: `n_tokens` rows, grouped by sequence, positions rising by one inside a sequence.
 * All arrays belong to the caller.
 *
 * An encoder's step holds whole texts: the sequences 0, 1, ... n_sequences - 1 in this order, each
 * from position 0 on. It has no logits, and fills `hidden` with one vector of length 1 for each. */
typedef struct {
    uint32_t n_tokens;          /* 1 .. FL_MAX_BATCH */
    uint32_t n_sequences;       /* 1 .. max_sequences */
    const int32_t *tokens;      /* [n_tokens] */
    const int32_t *positions;   /* [n_tokens] */
    const int32_t *sequences;   /* [n_tokens], row of `pages` */
    const int32_t *pages;       /* [n_sequences][page_stride], page ids in order of position */
    uint32_t page_stride;
    uint32_t n_logits;          /* 0 .. n_tokens */
    const int32_t *logit_rows;  /* [n_logits], rows of this step that need logits */
    float *logits;              /* [n_logits][vocab] */
    const uint8_t *needs;       /* [n_logits] an fl_need each; NULL: FL_LIKELY */
    float *hidden;              /* [n_logits][d_model] what the head reads, after the final norm;
                                   NULL: not wanted. Encoders: [n_sequences][d_model] */
} fl_batch;

/* What this library was compiled for. Strings live as long as the library. */
typedef struct {
    uint32_t abi;
    uint32_t vocab_size;
    uint32_t d_model;
    uint32_t has_screen;   /* 1: logits that cannot matter are estimated (fl_head.c) */
    uint32_t max_context;  /* positions the rotary tables cover */
    uint32_t page_tokens;
    size_t page_bytes;     /* of the arena, per page */
    size_t weights_size;
    size_t scratch_bytes;  /* allocated at open beside the arena, for `n_threads` threads */
    const char *isa;       /* "plain", "avx2", "avx512", "fp32" */
    const char *artifact;  /* hex digest of the artifact it was generated from */
} fl_info;

FL_API void fl_describe(fl_info *info, uint32_t n_threads);
FL_API fl_status fl_open(const fl_options *options, fl_engine **engine);
FL_API fl_status fl_step(fl_engine *engine, const fl_batch *batch);
FL_API void fl_close(fl_engine *engine); /* NULL is allowed */

/* Copy one KV page out of the arena, or into it; not during a step. FL_BAD_ARGUMENT unless `page`
 * is below n_pages and `size` is fl_info.page_bytes. What the 32 tokens of a page hold depends on
 * the ids of these and all earlier tokens alone, so that a page may be kept and written back. */
FL_API fl_status fl_page_read(const fl_engine *engine, uint32_t page, void *out, size_t size);
FL_API fl_status fl_page_write(fl_engine *engine, uint32_t page, const void *from, size_t size);

/* What the split head has done since open; all 0 where the model has none. */
typedef struct {
    uint64_t rows;   /* of logits that were screened */
    uint64_t full;   /* of these: computed in full, since the screen could not tell */
    uint64_t estimated; /* logits that the others estimated with all columns, */
    uint64_t exact;     /* blocks of 16 that they computed exactly */
} fl_head_counts;

FL_API void fl_count_head(const fl_engine *engine, fl_head_counts *counts);

/* ---- sampling (fl_sample.c) ---- */

typedef struct {
    float temperature;       /* 0: the most likely token */
    float top_p;             /* 1: off */
    float min_p;             /* 0: off */
    int32_t top_k;           /* 0: off */
    float repetition_penalty;/* 1: off; divides positive logits, multiplies negative ones */
    float presence_penalty;  /* 0: off; subtracted once from a token that occurred */
    float frequency_penalty; /* 0: off; subtracted per occurrence */
    uint64_t seed;           /* of this request */
    uint64_t draw;           /* how many tokens this request has drawn before: makes a draw
                                depend on (seed, draw) alone, whatever runs beside it */
    const int32_t *history;  /* [n_history] generated and prompt tokens, for the penalties */
    uint32_t n_history;
    const int32_t *bias_ids; /* [n_bias] */
    const float *bias;       /* [n_bias] added to logits; -INFINITY forbids */
    uint32_t n_bias;
} fl_sampling;

typedef struct {
    int32_t token;
    float logprob;           /* of `token` under the penalized, biased logits at temperature 1 */
    int32_t *top_ids;        /* [n_top] the caller's, most likely first */
    float *top_logprobs;     /* [n_top] */
    uint32_t n_top;          /* 0 .. 64 */
    uint32_t skip_logprob;   /* 1, and n_top is 0: nobody reads `logprob`, leave it 0; saves the
                                pass of exponentials over a large vocabulary */
} fl_draw;

/* Draws one token. `logits` [vocab] is modified (penalties and bias are applied in place);
 * `scratch` [vocab] pairs of 8 bytes. Deterministic in (logits, sampling). */
FL_API fl_status fl_sample(float *logits, uint32_t vocab, const fl_sampling *sampling,
                           void *scratch, fl_draw *draw);

/* ---- where the time of a step goes: only in libraries built with FL_PROFILE (fl_mark.h) ---- */

#ifdef FL_PROFILE

#define FL_MARKS 16384 /* of one thread, between two reads */

typedef enum {
    FL_PART_BEGIN = 0, /* of a step, on this thread: what lies before is not part of it */
    FL_PART_EMBED = 1,
    FL_PART_NORM = 2, /* before q, k, v and before gate, up */
    FL_PART_QKV = 3,
    FL_PART_ROTATE = 4, /* and store */
    FL_PART_ATTEND = 5,
    FL_PART_HEADS = 6, /* output projection of attention, with the norm behind it */
    FL_PART_GATED = 7, /* gate and up */
    FL_PART_ACTIVATE = 8,
    FL_PART_HIDDEN = 9, /* down projection, with the norm behind it */
    FL_PART_HEAD = 10,
    FL_PART_END = 11, /* the last barrier */
} fl_part;

/* A part ends here; it begins where the mark before it stands. */
typedef struct {
    uint64_t end;    /* nanoseconds of the system's monotonic clock */
    uint32_t waited; /* of the part: nanoseconds in which this thread waited for others */
    uint16_t part;   /* fl_part */
    uint16_t layer;
} fl_mark;

/* Takes the marks of thread 0 .. n_threads - 1 since the last call; not during a step. Copies as
 * many as there are, `room` at most, and returns their number. `lost`: how many more there were,
 * here or beyond FL_MARKS. */
FL_API uint32_t fl_profile_read(fl_engine *engine, uint32_t thread, fl_mark *marks, uint32_t room,
                                uint64_t *lost);

#endif

#endif
