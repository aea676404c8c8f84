/* flashlite: what a generated model.c is made of.
 *
 * model.c defines FL_MODEL (sizes, offsets, constants) and a `forward` that is a straight list of
 * the operations below. Every thread of the pool runs the same forward; an operation takes its own
 * share of the work by t->id and ends in a barrier when others read what it wrote.
 *
 *     embed -> x
 *     per layer:  norm(x) -> act    linear(act) -> qkv    rotate and store    attend -> heads
 *                 quantize(heads) -> act    project(act) -> x +=
 *                 norm(x) -> act    gated(act) -> hidden act    project(hidden act) -> x +=
 *     head(x) -> logits
 */
#ifndef FL_ENGINE_H
#define FL_ENGINE_H

#include "fl.h"
#include "fl_kernels.h"
#include "fl_os.h"

/* Tokens of a step, rounded up to whole tiles of both kinds. */
#define FL_STEP_ROWS(most) (((most) / FL_TILE + 1) * FL_TILE)
_Static_assert(FL_MAX_BATCH % FL_TALL_TILE == 0, "the last tall tile must be whole");
_Static_assert(FL_MAX_TEXT % FL_TALL_TILE == 0, "the last tall tile must be whole");
#define FL_NONE SIZE_MAX

/* One matrix of the model: its shape and where its three arrays start in the weights. */
typedef struct {
    fl_format format;
    int32_t rows, cols;
    size_t codes, scales, mins; /* mins: FL_NONE unless FL_Q4M */
    size_t bias;                /* FL_NONE when there is none */
} fl_packed;

/* A table of rows to look tokens up in: packed like a matrix, or half floats row by row. */
typedef struct {
    fl_packed packed;
    size_t halves; /* FL_NONE when `packed` holds the table */
} fl_table;

/* What a stage of the split head hands on: what may reach `reach` below its 20th largest estimate;
 * a row of logits that has more than `limit` goes through the full head. */
typedef struct {
    float reach;
    int32_t limit;
} fl_cut;

/* The screen of a split head (see fl_head.c): a table in two parts, and floats at these offsets. */
typedef struct {
    fl_packed first; /* [vocab][rank] for every row */
    fl_packed rest; /* [vocab][d_model - rank], row by row, for the rows that `coarse` hands on */
    size_t project; /* [d_model][d_model] */
    size_t shift; /* [d_model] */
    size_t mean; /* [d_model] */
    size_t bias; /* [vocab] */
    size_t spread, rest_spread; /* [blocks] standard deviation of an estimate's error, by the norm
                                   of the input left out or rounded; below 0: always exact */
    fl_cut coarse, fine; /* of rows; of blocks */
} fl_screen;

/* The attention heads of one layer: some may have been removed, some see part of the text. */
typedef struct {
    int32_t before; /* KV heads of the layers before this one: where its part of a page begins */
    int32_t kv_heads;
    const int32_t *queries; /* [kv_heads] query heads that share each KV head */
    const uint8_t
        *streams; /* [kv_heads] 1: sees the first page and the last FL_STREAM_TOKENS of the
                               text, whole pages of them; NULL: all heads see everything */
} fl_heads;

#define FL_STREAM_TOKENS 256

typedef enum { FL_SILU, FL_GELU } fl_activation;

/* What a text's vector is: the mean of its tokens, or its first one. */
typedef enum { FL_MEAN, FL_FIRST } fl_pooling;

typedef struct fl_thread fl_thread;

/* Sizes that decide memory; all others are arguments of the operations. */
typedef struct {
    int32_t vocab, d_model, head_dim, d_ff, max_context;
    int32_t n_heads, n_kv_heads; /* of the layer that has most */
    int32_t kv_heads_in_all; /* that keep keys and values of their own: of an encoder one layer's */
    int encodes; /* 1: an encoder, whose steps hold whole sequences */
    const float *rope; /* [head_dim / 2] angle per position, or NULL */
    const float *rope_local; /* the same for sliding layers, or NULL */
    const fl_screen *screen; /* NULL: the head is always computed in full */
    size_t weights_size;
    const char *artifact;
    void (*forward)(fl_thread *t);
} fl_model;

extern const fl_model FL_MODEL; /* model.c */
extern const fl_kernels *const FL_KERNELS; /* model.c: the table of this library's target */

/* ---- operations; offsets are bytes into the weights ---- */

/* x = table[token] * scale; rotary angles of this step's positions */
void fl_embed(fl_thread *t, const fl_table *table, float scale);
/* act = quantize(rmsnorm(x) * weight) */
void fl_norm(fl_thread *t, size_t weight, float eps);
/* q, k, v = act x matrices (+ bias) */
void fl_qkv(fl_thread *t, const fl_packed *q, const fl_packed *k, const fl_packed *v);
/* norm per head (weights or FL_NONE), rotate q and k, scale q, store k and v in the pages */
void fl_rotate_store(fl_thread *t, const fl_heads *heads, size_t q_norm, size_t k_norm, float eps,
                     float q_scale, int local);
/* heads = attention over positions of each token's own sequence; window 0: all of them */
void fl_attend(fl_thread *t, const fl_heads *heads, int32_t window);
/* x += W quantize(heads) */
void fl_project_heads(fl_thread *t, const fl_packed *w);
/* x += rmsnorm(W quantize(heads)) * weight */
void fl_project_heads_norm(fl_thread *t, const fl_packed *w, size_t weight, float eps);
/* hidden = quantize(activation(gate act) * (up act)) */
void fl_gated(fl_thread *t, const fl_packed *gate, const fl_packed *up, fl_activation kind);
/* x += W hidden */
void fl_project_hidden(fl_thread *t, const fl_packed *w);
void fl_project_hidden_norm(fl_thread *t, const fl_packed *w, size_t weight, float eps);
/* logits of the rows that the caller asked for */
void fl_head(fl_thread *t, size_t norm, float eps, const fl_packed *head);
/* the same, but exact only where it can matter, unless the caller asked for more */
void fl_head_split(fl_thread *t, size_t norm, float eps, const fl_packed *head,
                   const fl_screen *screen);

/* ---- of encoders (fl_encoder.c) ---- */

/* x = layernorm(words[token] + positions[position] + types[0]); act = quantize(x) */
void fl_embed_text(fl_thread *t, const fl_table *words, const fl_table *positions,
                   const fl_table *types, size_t weight, size_t bias, float eps);
/* scale q, store k and v in the pages */
void fl_store(fl_thread *t, float q_scale);
/* heads = attention over all positions of each token's own sequence */
void fl_attend_all(fl_thread *t);
/* x = layernorm(x + W quantize(heads)); act = quantize(x) */
void fl_add_heads_norm(fl_thread *t, const fl_packed *w, size_t weight, size_t bias, float eps);
/* hidden = quantize(gelu(up act)) */
void fl_hidden(fl_thread *t, const fl_packed *up);
/* x = layernorm(x + W hidden); act = quantize(x) */
void fl_add_hidden_norm(fl_thread *t, const fl_packed *w, size_t weight, size_t bias, float eps);
/* the vector of each sequence, of length 1 */
void fl_pool(fl_thread *t, fl_pooling kind);

#endif
