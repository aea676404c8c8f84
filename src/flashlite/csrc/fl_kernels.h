/* flashlite: the kernels, one table of functions per instruction set.
 *
 * fl_kernels_plain.c is always built and is the oracle: every other table must equal it bit for
 * bit (the FP32 test build excepted). All functions are single-threaded, pure (no globals, no allocation) and
 * trust their arguments; fl_engine.c checks what comes from outside.
 *
 * Weights are packed in blocks of 16 rows x 32 columns ("groups" of 32 columns; rows and columns
 * padded with zeros to whole blocks). For block b of rows and group g of columns:
 *
 *   codes   FL_Q8: 512 bytes, byte [k4][row][k] = s8 code of W(16 b + row, 32 g + 4 k4 + k)
 *           FL_Q4, FL_Q4M: 256 bytes, byte [i][row][k], i = 0..3: the low nibble is column
 *           32 g + 8 i + k, the high nibble column 32 g + 8 i + 4 + k, codes 0..15
 *           FL_Q5, FL_Q6: 320 and 384 bytes, first the low four bits of all codes as above, then one
 *           or two vectors [row][k] with the bits above them, codes 0..31 and 0..63: those of column
 *           32 g + 4 k4 + k are in FL_Q5 bit k4, in FL_Q6 two from bit 2 (k4 % 4) of vector k4 / 4
 *           k4 = 0..7, row = 0..15, k = 0..3: one 64-byte vector holds 4 columns of 16 rows
 *   scales  16 IEEE half floats, one per row
 *   mins    FL_Q4M only: 16 half floats
 *
 * codes, scales and mins are three arrays, each [blocks][groups][...], each starting on 64 bytes.
 * A weight is  q8: scale * code   q4: scale * (code - 8)   q4m: scale * code + min
 *              q5: scale * (code - 16)   q6: scale * (code - 32).
 *
 * Activations are quantized per token and group of 32: scale = max|x| / 127 (0 where all are 0),
 * code = round-half-even(x / scale) in -127..127. A group's dot product is the exact integer
 *   D = sum (code less its zero) * x, the zero as above and 0 for q8 and q4m;  S = sum x
 * and y = sum over groups in rising order, in float, with moment = scale_x * (float)S:
 *   acc = fma((float)D, scale_w * scale_x, acc);  q4m then: acc = fma(min_w, moment, acc)
 */
#ifndef FL_KERNELS_H
#define FL_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define FL_GROUP 32        /* columns that share a scale, in weights, activations and KV */
#define FL_BLOCK_ROWS 16   /* rows of one packed block */
#define FL_TILE 6 /* tokens that are packed side by side when a step has more than one, */
#define FL_TALL_TILE 16 /* or, where the kernels multiply by tall tiles, below each other */
#define FL_MAX_QUERIES 32 /* query rows of one attend call */
#ifndef FL_SEGMENT /* tests take less, so that short texts have several */
#define FL_SEGMENT 512 /* positions that attention answers apart; whole pages */
#endif
#define FL_ALIGN 64

typedef enum { FL_Q8 = 0, FL_Q4 = 1, FL_Q4M = 2, FL_Q5 = 3, FL_Q6 = 4 } fl_format;

/* Bits of a code beside the low four that nibbles hold. */
static inline size_t fl_high_bits(fl_format format) {
    return format == FL_Q5 ? 1 : format == FL_Q6 ? 2 : 0;
}

/* Bytes of the codes of one group of one block. */
static inline size_t fl_code_bytes(fl_format format) {
    return format == FL_Q8 ? 512 : 256 + 64 * fl_high_bits(format);
}

/* The code of a weight that is zero. */
static inline int fl_zero_code(fl_format format) {
    return format == FL_Q4 ? 8 : format == FL_Q5 ? 16 : format == FL_Q6 ? 32 : 0;
}

/* One code of a group of a block that is not of FL_Q8, zero not taken off. */
static inline int fl_code_at(fl_format format, const uint8_t *codes, size_t row, size_t column) {
    size_t at = row * 4 + column % 4, k4 = column / 4, bits = fl_high_bits(format);
    int code = codes[k4 / 2 * 64 + at] >> (k4 % 2 * 4) & 15;
    if (bits == 0) return code;
    int high = codes[256 + k4 * bits / 8 * 64 + at] >> (k4 * bits % 8);
    return code | (high & ((1 << bits) - 1)) << 4;
}

/* One packed matrix. */
typedef struct {
    fl_format format;
    int32_t rows, cols; /* true sizes; padded ones are blocks * 16 and groups * 32 */
    int32_t blocks, groups;
    const uint8_t *codes;
    const uint16_t *scales;
    const uint16_t *mins; /* NULL unless FL_Q4M */
    const float *bias; /* [rows] or NULL; added by the engine, not by the kernels */
} fl_linear;

/* Quantized activations of `n` tokens, packed in tiles of `width` tokens, as fl_act_width says. What
 * lies behind the last token of the last tile is anything.
 *   codes [tile][groups * 8][width] int32, each 4 s8 codes of consecutive columns; but
 *         [tile][groups][width][8] where width is FL_TALL_TILE
 *   scale, moment [tile][groups][width] as above
 *   offset [tile][groups][width]  -128 S: where a product with codes raised by 128 begins
 * In the FP32 test build `codes` holds floats, [tile][groups * 32][width], and the rest is unused. */
typedef struct {
    int32_t n, width, groups;
    int32_t *codes;
    float *scale, *moment;
    int32_t *offset;
} fl_act;

/* Where one sequence's keys and values of one KV head of one layer lie.
 * A page holds, for one layer and KV head, in this order, with G = ceil(head_dim / 32) groups:
 *   K codes  [head_dim / 4][32 tokens][4] s8        K scales [G][32 tokens] half
 *   V codes  [32 tokens / 4][head_dim][4] s8        V scales [G][32 tokens] half
 * (FP32 test build: K [head_dim][32 tokens] float, V [32 tokens][head_dim] float, no scales.) */
typedef struct {
    uint8_t *base; /* arena + offset of this layer and head inside a page */
    size_t page_bytes; /* from one page to the next */
    const int32_t *pages; /* page ids of the sequence, by position / 32 */
    int32_t head_dim; /* a multiple of 4 */
} fl_kv;

/* Bytes of one page for one layer and one KV head; a multiple of 64. */
static inline size_t fl_kv_bytes(int32_t head_dim, int fp32) {
    size_t groups = ((size_t)head_dim + FL_GROUP - 1) / FL_GROUP;
    size_t bytes =
        fp32 ? (size_t)head_dim * 32 * 4 * 2 : (size_t)head_dim * 32 * 2 + groups * 32 * 2 * 2;
    return (bytes + FL_ALIGN - 1) / FL_ALIGN * FL_ALIGN;
}

/* What the softmax of some positions was divided by: sum * 2^max. */
typedef struct {
    float max, sum; /* -FLT_MAX and 0 where there was no position */
} fl_mass;

typedef struct {
    const char *isa;
    int fp32; /* 1 in the test build that keeps activations and KV in float */
    int32_t tall_from; /* from how many tokens on gemm wants tall tiles; 0: never */

    /* Quantize groups [group0, group1) of token `t`; x points at column 32 * group0 and holds
     * min(32 * group1, cols) - 32 * group0 values, the rest counts as 0. */
    void (*quantize)(fl_act *act, int32_t t, int32_t group0, int32_t group1, const float *x,
                     int32_t cols);

    /* y[r] for the rows of blocks [block0, block1) and the one token of act. y points at row
     * 16 * block0 and has room for whole blocks. */
    void (*gemv)(float *y, const fl_linear *w, int32_t block0, int32_t block1, const fl_act *act);

    /* The same for several tokens, as fl_act_width has them: y[t * stride + r], r counted from row
     * 16 * block0. Whole blocks of rows are written, of the n tokens alone.
     * `panel`: FL_PANEL_BYTES(groups) scratch, 64-byte aligned, for unpacked codes. */
    void (*gemm)(float *y, size_t stride, const fl_linear *w, int32_t block0, int32_t block1,
                 const fl_act *act, void *panel);

    /* Write one token's key and value (head_dim floats each, roped) at `position`. */
    void (*store_kv)(const fl_kv *kv, int32_t position, const float *k, const float *v);

    /* Attention of n_q query rows over the positions [first[i], last[i]] of one sequence:
     *   out[i] = sum_p softmax(q_i . k_p) v_p, to the base 2
     * q [n_q][head_dim] is roped and already multiplied by the softmax scale and log2(e).
     * In int8: q is quantized per group of 32 like activations; for each page and group of channels
     * the probabilities times the scales of the values, 0 where a query sees no token, are quantized
     * like one group of activations, whose product with the codes of V, D, makes
     *   out = fma(out, factor, (float)D * scale).
     * Pages are visited in rising order with a running maximum, which the factor follows. Segments
     * of FL_SEGMENT positions are answered apart, each with a maximum of its own, and their answers
     * joined in rising order (fl_segment.h): so a caller may ask for them one by one.
     * mass[i], unless mass is NULL: what the answer's softmax was divided by.
     * `scratch`: FL_ATTEND_BYTES(head_dim), 64-byte aligned. */
    void (*attend)(float *out, fl_mass *mass, const fl_kv *kv, int32_t n_q, const float *q,
                   const int32_t *first, const int32_t *last, void *scratch);

    /* y[i] = x[i] * weight[i] / sqrt(mean(x^2) + eps) */
    void (*rmsnorm)(float *y, const float *x, const float *weight, int32_t n, float eps);

    /* y[i] = silu(gate[i]) * up[i]  or  gelu_tanh(gate[i]) * up[i] */
    void (*silu_mul)(float *y, const float *gate, const float *up, int32_t n);
    void (*gelu_mul)(float *y, const float *gate, const float *up, int32_t n);

    /* y[i] = (x[i] - mean(x)) / sqrt(variance(x) + eps) * weight[i] + bias[i] */
    void (*layernorm)(float *y, const float *x, const float *weight, const float *bias, int32_t n,
                      float eps);

    /* y[i] = x[i] * (1 + erf(x[i] / sqrt(2))) / 2, within 1e-6 */
    void (*gelu_erf)(float *y, const float *x, int32_t n);
} fl_kernels;

/* Tokens that lie side by side in the activations of n tokens. */
static inline int32_t fl_act_width(const fl_kernels *k, int32_t n) {
    return n == 1 ? 1 : k->tall_from && n >= k->tall_from ? FL_TALL_TILE : FL_TILE;
}

/* One token's group of activations: its 8 codes dwords `step` apart, and where the rest stands. */
typedef struct {
    int32_t *codes;
    size_t step, at;
} fl_act_group;

static inline fl_act_group fl_act_find(const fl_act *act, size_t t, size_t g) {
    size_t width = (size_t)act->width, groups = (size_t)act->groups, lane = t % width;
    size_t cell = t / width * groups + g;
    int tall = act->width == FL_TALL_TILE;
    return (fl_act_group){
        .codes = act->codes + (tall ? (cell * width + lane) * 8 : cell * 8 * width + lane),
        .step = tall ? 1 : width,
        .at = cell * width + lane,
    };
}

/* Scratch of gemm: two row blocks, unpacked to bytes, and their scales and mins as floats. */
#define FL_PANEL_BYTES(groups) ((size_t)(groups) * (2 * 512 + 2 * 2 * 64) + 64)
/* Scratch of attend: quantized queries, scores and probabilities of one page, running sums. */
#define FL_ATTEND_BYTES(head_dim) \
    ((size_t)FL_MAX_QUERIES * (((size_t)(head_dim) + 32) * 8 + 128 * 4) + 12288)

extern const fl_kernels fl_kernels_plain;
#if defined(FL_HAVE_AVX2)
extern const fl_kernels fl_kernels_avx2;
#endif
#if defined(FL_HAVE_AVX512)
extern const fl_kernels fl_kernels_avx512;
#endif
#if defined(FL_HAVE_AMX)
extern const fl_kernels fl_kernels_amx;
#endif
#if defined(FL_HAVE_FP32)
extern const fl_kernels fl_kernels_fp32;
#endif

/* Scalar pieces that the kernels share (fl_math.h): half <-> float, exp, rsqrt. */

#endif
