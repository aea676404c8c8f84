/* flashlite: the kernels for x86-64 with AVX2, FMA and F16C.
 *
 * Two inline functions are every matrix product: rows16, 16 rows (two vectors of 8 rows x 4
 * columns) by up to a tile of tokens, specialised by the compiler for format, storage and token
 * count, which also scores the keys of a page; and rows8_q8 for q8 with many tokens. Bytes multiply
 * through vpmaddubsw, unsigned by signed, pairs summed in 16 bits:
 *
 *   q4, q4m  nibble x: a pair is at most 15 * 127 * 2 = 3810, so the eight steps of a group add up
 *            in 16 bits (30480) before one vpmaddwd
 *   q5, q6   the same with pairs of at most 31 * 127 * 2 = 7874 and 63 * 127 * 2 = 16002, of which
 *            four and two steps add up in 16 bits (31496 and 32004)
 *   q8       |w| times x with the sign of w: a pair is at most 128 * 127 * 2 = 32512, which fits,
 *            once; -128 is exact, for its magnitude 128 is an unsigned byte
 */
#include <immintrin.h>

#include "fl_kernels.h"
#include "fl_math.h"

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

/* Hides a value from the optimiser, which would otherwise gather the products of a whole group
 * before it adds them, and spill them all. */
#define KEEP(vector) __asm__("" : "+x"(vector))

/* Tokens of a tile that share a pass over packed weights: 6 sums, the results and operands. */
#define FEW 3
#define AHEAD 8192 /* bytes of codes to ask memory for in advance: q4m gains most, a third */

/* ---- vectors ---- */

INLINE __m256i load_bytes(const void *p) { return _mm256_loadu_si256(p); }

INLINE __m256 load_halves(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
}

INLINE float max_lane(__m256 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

/* fl_fold of what is left after its first step. */
INLINE float sum_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* fl_exp, eight at a time. */
INLINE __m256 exp8(__m256 x) {
    const __m256 low = _mm256_set1_ps(FL_EXP_MIN), magic = _mm256_set1_ps(FL_ROUND_MAGIC);
    __m256 c = _mm256_min_ps(_mm256_max_ps(x, low), _mm256_set1_ps(FL_EXP_MAX));
    __m256 n = _mm256_sub_ps(_mm256_fmadd_ps(c, _mm256_set1_ps(FL_EXP_LOG2E), magic), magic);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(FL_EXP_LN2_HI), c);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(FL_EXP_LN2_LO), r);
    __m256 p = _mm256_fmadd_ps(r, _mm256_set1_ps(FL_EXP_P4), _mm256_set1_ps(FL_EXP_P3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(FL_EXP_P2));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(FL_EXP_P1));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(FL_EXP_P0));
    p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
    __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, low, _CMP_LT_OQ), p);
}

/* fl_exp2 of the lanes of `keep`, 0 in the others. */
INLINE __m256 exp2_8(__m256 x, __m256 keep) {
    const __m256 magic = _mm256_set1_ps(FL_ROUND_MAGIC);
    __m256 raised = _mm256_add_ps(x, magic);
    __m256 r = _mm256_sub_ps(x, _mm256_sub_ps(raised, magic));
    __m256 p = _mm256_fmadd_ps(r, _mm256_set1_ps(FL_EXP2_P4), _mm256_set1_ps(FL_EXP2_P3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(FL_EXP2_P2));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(FL_EXP2_P1));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    __m256i power = _mm256_slli_epi32(_mm256_castps_si256(raised), 23);
    p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
    keep = _mm256_and_ps(keep, _mm256_cmp_ps(x, _mm256_set1_ps(FL_EXP2_MIN), _CMP_GT_OQ));
    return _mm256_and_ps(p, keep);
}

/* ---- quantizing ---- */

/* A group of n <= 32 values, zeros after them. */
typedef struct {
    __m256 x[4];
} group32;

INLINE group32 load_group(const float *x, int32_t n) {
    float whole[FL_GROUP];
    if (n < FL_GROUP) {
        memset(whole, 0, sizeof whole);
        memcpy(whole, x, (size_t)n * sizeof *x);
        x = whole;
    }
    group32 v;
    UNROLL for (int i = 0; i < 4; i++) v.x[i] = _mm256_loadu_ps(x + 8 * i);
    return v;
}

INLINE float magnitude(const group32 *v) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 m = _mm256_setzero_ps(); /* second operand: it stays where the first is NaN */
    UNROLL for (int i = 0; i < 4; i++) m = _mm256_max_ps(_mm256_andnot_ps(sign, v->x[i]), m);
    return max_lane(m);
}

/* 32 codes in order; also their sum. */
INLINE __m256i encode(const group32 *v, float inverse, int32_t *sum) {
    __m256i c[4];
    UNROLL for (int i = 0; i < 4; i++) {
        __m256 y = _mm256_mul_ps(v->x[i], _mm256_set1_ps(inverse));
        y = _mm256_max_ps(y, _mm256_set1_ps(-127.0f)); /* NaN gives -127 */
        c[i] = _mm256_cvtps_epi32(_mm256_min_ps(y, _mm256_set1_ps(127.0f)));
    }
    __m256i words = _mm256_packs_epi32(c[0], c[1]), more = _mm256_packs_epi32(c[2], c[3]);
    __m256i pairs = _mm256_madd_epi16(_mm256_add_epi16(words, more), _mm256_set1_epi16(1));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    *sum = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, more),
                                       _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

static void quantize(fl_act *act, int32_t t, int32_t group0, int32_t group1, const float *x,
                     int32_t cols) {
    for (int32_t g = group0; g < group1; g++, x += FL_GROUP) {
        int32_t n = cols - g * FL_GROUP;
        group32 v = load_group(x, n < FL_GROUP ? n : FL_GROUP);
        float amax = magnitude(&v);
        fl_act_group to = fl_act_find(act, (size_t)t, (size_t)g);
        size_t at = to.at;
        int32_t dwords[8] = {0}, sum = 0;
        if (amax >= FL_QUANT_TINY) {
            _mm256_storeu_si256((void *)dwords, encode(&v, 127.0f / amax, &sum));
            act->scale[at] = amax / 127.0f;
        } else {
            act->scale[at] = 0.0f;
        }
        act->offset[at] = -128 * sum;
        act->moment[at] = act->scale[at] * (float)sum;
        UNROLL for (size_t k4 = 0; k4 < 8; k4++) to.codes[k4 * to.step] = dwords[k4];
    }
}

/* ---- matrices ---- */

/* How the codes of 16 rows are stored. */
typedef enum {
    BYTES,    /* s8: weights as packed, and the keys of a page */
    NIBBLES,  /* q4 and q4m as packed */
    PLANES,   /* q5 and q6 as packed: nibbles, and bits above them */
    UNPACKED, /* all but q8 as unsigned bytes, scales and mins as floats */
} form;

/* Rows side by side: step k4 of group g at codes + (8 g + k4) * pitch (NIBBLES: two steps; PLANES: as
 * fl_kernels.h says), the scales and mins of a group at g * pitch / 4. */
typedef struct {
    const uint8_t *codes;
    const void *scales, *mins;
    size_t groups;
    size_t last_steps; /* of the last group: 8, less where it is short (keys only) */
    size_t pitch; /* of values only, whose rows are as far apart as a head is wide */
} rows;

/* Tokens: step k4 of group g at codes + (8 g + k4) * width, the rest at g * width. */
typedef struct {
    const int32_t *codes;
    const float *scale, *moment;
    const int32_t *offset;
} tokens;

INLINE __m256 load_scales(form f, const void *base, size_t at) {
    return f == UNPACKED ? _mm256_loadu_ps((const float *)base + at)
                         : load_halves((const uint16_t *)base + at);
}

/* dot[t] += four columns of 16 rows x token t */
INLINE void step_bytes(__m256i dot[][2], const uint8_t *codes, const int32_t *x, int n) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i w0 = load_bytes(codes), w1 = load_bytes(codes + 32);
    __m256i a0 = _mm256_abs_epi8(w0), a1 = _mm256_abs_epi8(w1);
    UNROLL for (int t = 0; t < n; t++) {
        __m256i v = _mm256_set1_epi32(x[t]);
        __m256i p0 = _mm256_maddubs_epi16(a0, _mm256_sign_epi8(v, w0));
        __m256i p1 = _mm256_maddubs_epi16(a1, _mm256_sign_epi8(v, w1));
        dot[t][0] = _mm256_add_epi32(dot[t][0], _mm256_madd_epi16(p0, ones));
        dot[t][1] = _mm256_add_epi32(dot[t][1], _mm256_madd_epi16(p1, ones));
        KEEP(dot[t][0]);
        KEEP(dot[t][1]);
    }
}

/* The same for codes 0..15, summed in 16 bits. */
INLINE void step_small(__m256i sum[][2], __m256i w0, __m256i w1, const int32_t *x, int n) {
    UNROLL for (int t = 0; t < n; t++) {
        __m256i v = _mm256_set1_epi32(x[t]);
        sum[t][0] = _mm256_add_epi16(sum[t][0], _mm256_maddubs_epi16(w0, v));
        sum[t][1] = _mm256_add_epi16(sum[t][1], _mm256_maddubs_epi16(w1, v));
        KEEP(sum[t][0]);
        KEEP(sum[t][1]);
    }
}

/* 8 rows of step k4 of q5 or q6; `codes` at the first of these rows. A plane is shifted as words: what
 * crosses from byte to byte is masked off. */
INLINE __m256i join(fl_format format, const uint8_t *codes, size_t k4) {
    size_t bits = fl_high_bits(format), place = k4 * bits % 8;
    __m256i low = load_bytes(codes + k4 / 2 * 64);
    if (k4 % 2) low = _mm256_srli_epi16(low, 4);
    __m256i high = load_bytes(codes + 256 + k4 * bits / 8 * 64);
    high = place > 4 ? _mm256_srli_epi16(high, (int)place - 4)
                     : _mm256_slli_epi16(high, 4 - (int)place);
    high = _mm256_and_si256(high, _mm256_set1_epi8(bits == 1 ? 16 : 48));
    return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(15)), high);
}

/* dot[t] += two steps of codes 0..63; x holds what both take. */
INLINE void step_pair(__m256i dot[][2], const __m256i w[2][2], const int32_t *x, size_t width,
                      int n) {
    const __m256i ones = _mm256_set1_epi16(1);
    UNROLL for (int t = 0; t < n; t++) {
        __m256i v0 = _mm256_set1_epi32(x[t]), v1 = _mm256_set1_epi32(x[width + (size_t)t]);
        UNROLL for (int half = 0; half < 2; half++) {
            __m256i p = _mm256_maddubs_epi16(w[0][half], v0);
            p = _mm256_add_epi16(p, _mm256_maddubs_epi16(w[1][half], v1));
            dot[t][half] = _mm256_add_epi32(dot[t][half], _mm256_madd_epi16(p, ones));
            KEEP(dot[t][half]);
        }
    }
}

/* The integer dot products of one group: codes and x at its start. */
INLINE void dot_group(__m256i dot[][2], fl_format format, form f, const uint8_t *codes,
                      size_t pitch, size_t steps, const int32_t *x, size_t width, int n) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    UNROLL for (int t = 0; t < n; t++) dot[t][0] = dot[t][1] = _mm256_setzero_si256();
    if (f == BYTES) {
        for (size_t k4 = 0; k4 < steps; k4++) {
            step_bytes(dot, codes + k4 * pitch, x + k4 * width, n);
        }
        return;
    }
    if (f == PLANES) {
        UNROLL for (size_t k4 = 0; k4 < 8; k4 += 2) {
            const __m256i w[2][2] = {
                {join(format, codes, k4), join(format, codes + 32, k4)},
                {join(format, codes, k4 + 1), join(format, codes + 32, k4 + 1)},
            };
            step_pair(dot, w, x + k4 * width, width, n);
        }
        return;
    }
    if (f == UNPACKED) {
        UNROLL for (size_t k4 = 0; k4 < 8; k4++) {
            const uint8_t *at = codes + k4 * pitch;
            step_small(dot, load_bytes(at), load_bytes(at + 32), x + k4 * width, n);
        }
    } else {
        UNROLL for (size_t i = 0; i < 4; i++) {
            __m256i w0 = load_bytes(codes + i * pitch), w1 = load_bytes(codes + i * pitch + 32);
            step_small(dot, _mm256_and_si256(w0, mask), _mm256_and_si256(w1, mask),
                       x + 2 * i * width, n);
            w0 = _mm256_and_si256(_mm256_srli_epi16(w0, 4), mask);
            w1 = _mm256_and_si256(_mm256_srli_epi16(w1, 4), mask);
            step_small(dot, w0, w1, x + (2 * i + 1) * width, n);
        }
    }
    UNROLL for (int t = 0; t < n; t++) {
        dot[t][0] = _mm256_madd_epi16(dot[t][0], ones);
        dot[t][1] = _mm256_madd_epi16(dot[t][1], ones);
    }
}

/* What takes the zero of the codes off again, of an offset of -128 sum x. */
INLINE __m256i zero_offset(fl_format format, int32_t offset) {
    return _mm256_set1_epi32(offset >> (format == FL_Q4 ? 4 : format == FL_Q5 ? 3 : 2));
}

/* y[t * stride + row] of 16 rows and n tokens; all but the pointers and stride are constants. */
INLINE void rows16(float *y, size_t stride, const rows *w, const tokens *x, fl_format format,
                   form f, size_t pitch, size_t width, int n) {
    __m256 acc[FL_TILE][2];
    UNROLL for (int t = 0; t < n; t++) acc[t][0] = acc[t][1] = _mm256_setzero_ps();
    const uint8_t *codes = w->codes;
    const int32_t *x_codes = x->codes, *x_offset = x->offset;
    const float *x_scale = x->scale, *x_moment = x->moment;
    const size_t groups = w->groups;
    for (size_t g = 0; g < groups; g++) {
        __m256i dot[FL_TILE][2];
        size_t at = g * pitch / 4, steps = pitch == 64 || g + 1 < groups ? 8 : w->last_steps;
        dot_group(dot, format, f, codes, pitch, steps, x_codes, width, n);
        __m256 s0 = load_scales(f, w->scales, at), s1 = load_scales(f, w->scales, at + 8);
        UNROLL for (int t = 0; t < n; t++) {
            __m256 sx = _mm256_set1_ps(x_scale[t]);
            if (fl_zero_code(format)) { /* sum (code - 8) x = sum code x - 8 sum x */
                __m256i offset = zero_offset(format, x_offset[t]);
                dot[t][0] = _mm256_add_epi32(dot[t][0], offset);
                dot[t][1] = _mm256_add_epi32(dot[t][1], offset);
            }
            acc[t][0] =
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[t][0]), _mm256_mul_ps(s0, sx), acc[t][0]);
            acc[t][1] =
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[t][1]), _mm256_mul_ps(s1, sx), acc[t][1]);
        }
        if (format == FL_Q4M) {
            __m256 m0 = load_scales(f, w->mins, at), m1 = load_scales(f, w->mins, at + 8);
            UNROLL for (int t = 0; t < n; t++) {
                __m256 moment = _mm256_set1_ps(x_moment[t]);
                acc[t][0] = _mm256_fmadd_ps(m0, moment, acc[t][0]);
                acc[t][1] = _mm256_fmadd_ps(m1, moment, acc[t][1]);
            }
        }
        if (width == 1) { /* decode reads each weight once, from memory */
            const uintptr_t next = (uintptr_t)codes + AHEAD, lines = fl_code_bytes(format) / 64;
            for (uintptr_t i = 0; i < lines; i++) {
                _mm_prefetch((const void *)(next + 64 * i), _MM_HINT_T0);
            }
        }
        codes += f == NIBBLES || f == PLANES ? fl_code_bytes(format) : 8 * pitch;
        x_codes += 8 * width;
        x_scale += width;
        x_moment += width;
        x_offset += width;
    }
    UNROLL for (int t = 0; t < n; t++) {
        _mm256_storeu_ps(y + (size_t)t * stride, acc[t][0]);
        _mm256_storeu_ps(y + (size_t)t * stride + 8, acc[t][1]);
    }
}

/* Bodies of rows16, none of them inlined: 1 token alone, up to FEW of a tile, a whole tile. */
typedef void rows16_function(float *, size_t, const rows *, const tokens *, int32_t);

#define BODY(name) \
    static __attribute__((noinline)) void name(float *y, size_t stride, const rows *w, \
                                               const tokens *x, int32_t n)
#define ONE(name, format, form) \
    BODY(name) { \
        (void)n; \
        rows16(y, stride, w, x, format, form, 64, 1, 1); \
    }
#define UP_TO_FEW(name, format, form, pitch) \
    BODY(name) { \
        if (n >= 3) { \
            rows16(y, stride, w, x, format, form, pitch, FL_TILE, 3); \
        } else if (n == 2) { \
            rows16(y, stride, w, x, format, form, pitch, FL_TILE, 2); \
        } else { \
            rows16(y, stride, w, x, format, form, pitch, FL_TILE, 1); \
        } \
    }
#define WHOLE_TILE(name, format) \
    BODY(name) { \
        (void)n; \
        rows16(y, stride, w, x, format, UNPACKED, 64, FL_TILE, FL_TILE); \
    }
ONE(one_q8, FL_Q8, BYTES)
ONE(one_q4, FL_Q4, NIBBLES)
ONE(one_q4m, FL_Q4M, NIBBLES)
ONE(one_q5, FL_Q5, PLANES)
ONE(one_q6, FL_Q6, PLANES)
UP_TO_FEW(few_q8, FL_Q8, BYTES, 64)
UP_TO_FEW(few_q4, FL_Q4, NIBBLES, 64)
UP_TO_FEW(few_q4m, FL_Q4M, NIBBLES, 64)
UP_TO_FEW(few_q5, FL_Q5, PLANES, 64)
UP_TO_FEW(few_q6, FL_Q6, PLANES, 64)
UP_TO_FEW(few_keys, FL_Q8, BYTES, 128)
UP_TO_FEW(few_values, FL_Q8, BYTES, w->pitch)
WHOLE_TILE(whole_q4, FL_Q4)
WHOLE_TILE(whole_q4m, FL_Q4M)

static rows view_block(const fl_linear *w, size_t block) {
    size_t at = block * (size_t)w->groups;
    return (rows){.codes = w->codes + at * fl_code_bytes(w->format),
                  .scales = w->scales + at * FL_BLOCK_ROWS,
                  .mins = w->format == FL_Q4M ? w->mins + at * FL_BLOCK_ROWS : NULL,
                  .groups = (size_t)w->groups,
                  .last_steps = 8};
}

static void gemv(float *y, const fl_linear *w, int32_t block0, int32_t block1, const fl_act *act) {
    static rows16_function *const one[] = {one_q8, one_q4, one_q4m, one_q5, one_q6};
    const tokens x = {act->codes, act->scale, act->moment, act->offset};
    for (size_t b = (size_t)block0; b < (size_t)block1; b++, y += FL_BLOCK_ROWS) {
        const rows block = view_block(w, b);
        one[w->format](y, 0, &block, &x, 1);
    }
}

/* The codes of one group as bytes. */
INLINE void unpack_group(fl_format format, uint8_t *to, const uint8_t *from) {
    const __m256i mask = _mm256_set1_epi8(15);
    UNROLL for (size_t k4 = 0; k4 < 8; k4++) {
        UNROLL for (size_t half = 0; half < 64; half += 32) {
            __m256i v;
            if (fl_high_bits(format)) {
                v = join(format, from + half, k4);
            } else {
                v = load_bytes(from + k4 / 2 * 64 + half);
                v = _mm256_and_si256(k4 % 2 ? _mm256_srli_epi16(v, 4) : v, mask);
            }
            _mm256_storeu_si256((void *)(to + k4 * 64 + half), v);
        }
    }
}

/* Codes to bytes, halves to floats: worth it when several tiles of tokens follow. */
static rows unpack(fl_format format, const rows *w, void *panel) {
    uint8_t *codes = panel;
    float *scales = (float *)(void *)(codes + w->groups * 512);
    float *mins = scales + w->groups * FL_BLOCK_ROWS;
    for (size_t g = 0; g < w->groups; g++) {
        const uint8_t *from = w->codes + g * fl_code_bytes(format);
        switch (format) {
        case FL_Q5: unpack_group(FL_Q5, codes + g * 512, from); break;
        case FL_Q6: unpack_group(FL_Q6, codes + g * 512, from); break;
        default: unpack_group(FL_Q4, codes + g * 512, from); break;
        }
    }
    for (size_t i = 0; i < w->groups * FL_BLOCK_ROWS; i += 8) {
        _mm256_storeu_ps(scales + i, load_halves((const uint16_t *)w->scales + i));
        if (w->mins) _mm256_storeu_ps(mins + i, load_halves((const uint16_t *)w->mins + i));
    }
    rows unpacked = *w;
    unpacked.codes = codes;
    unpacked.scales = scales;
    unpacked.mins = w->mins ? mins : NULL;
    return unpacked;
}

/* The tokens of act from `t` on, within one tile. */
INLINE tokens view_tokens(const fl_act *act, int32_t t) {
    size_t tile = (size_t)(t / FL_TILE * FL_TILE) * (size_t)act->groups, lane = t % FL_TILE;
    size_t at = tile + lane;
    return (tokens){act->codes + tile * 8 + lane, act->scale + at, act->moment + at,
                    act->offset + at};
}

/* Tokens from `t` on, FEW at a time. */
static void multiply_few(float *y, size_t stride, const rows *w, const fl_act *act, int32_t t,
                         rows16_function *few) {
    for (; t < act->n; t += FEW) {
        const tokens x = view_tokens(act, t);
        few(y + (size_t)t * stride, stride, w, &x, act->n - t);
    }
}

/* What q8 needs beside its packed codes when many tokens follow, per group and row. */
typedef struct {
    float *scales;
    int32_t *offsets; /* minus the sum of the negative codes */
} q8_panel;

static q8_panel prepare_q8(const rows *w, void *panel) {
    const __m256i ones = _mm256_set1_epi16(1);
    size_t n = w->groups * FL_BLOCK_ROWS;
    q8_panel p = {panel, (int32_t *)panel + n};
    for (size_t i = 0; i < n; i += 8) { /* 8 rows of group i / 16 */
        const uint8_t *codes = w->codes + i / 16 * 512 + i % 16 * 4;
        __m256i sum = _mm256_setzero_si256();
        UNROLL for (size_t k4 = 0; k4 < 8; k4++) {
            __m256i c = load_bytes(codes + k4 * 64);
            c = _mm256_abs_epi8(_mm256_min_epi8(c, _mm256_setzero_si256()));
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(c, _mm256_set1_epi8(1)));
        }
        _mm256_storeu_si256((void *)(p.offsets + i), _mm256_madd_epi16(sum, ones));
        _mm256_storeu_ps(p.scales + i, load_halves((const uint16_t *)w->scales + i));
    }
    return p;
}

/* 8 rows by a whole tile. w x = |w| x where w >= 0, and |w| ~x + |w| where w < 0, because
 * -x = ~x + 1: with the second |w| summed beforehand, one exclusive or replaces vpsignb, which
 * shares its two ports with the multiplications. |w| ~x is at most 128 * 128: it fits. */
INLINE void rows8_q8(float *y, size_t stride, const uint8_t *codes, const float *scales,
                     const int32_t *offsets, size_t groups, const tokens *x) {
    const __m256i ones = _mm256_set1_epi16(1);
    const int32_t *x_codes = x->codes;
    const float *x_scale = x->scale;
    __m256 acc[FL_TILE];
    UNROLL for (int t = 0; t < FL_TILE; t++) acc[t] = _mm256_setzero_ps();
    for (size_t g = 0; g < groups; g++) {
        __m256i dot[FL_TILE];
        UNROLL for (int t = 0; t < FL_TILE; t++) dot[t] = load_bytes(offsets);
        for (size_t k4 = 0; k4 < 8; k4++) {
            __m256i w = load_bytes(codes + k4 * 64), a = _mm256_abs_epi8(w);
            __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), w);
            UNROLL for (int t = 0; t < FL_TILE; t++) {
                __m256i v = _mm256_set1_epi32(x_codes[k4 * FL_TILE + (size_t)t]);
                __m256i p = _mm256_maddubs_epi16(a, _mm256_xor_si256(v, negative));
                dot[t] = _mm256_add_epi32(dot[t], _mm256_madd_epi16(p, ones));
                KEEP(dot[t]);
            }
        }
        __m256 s = _mm256_loadu_ps(scales);
        UNROLL for (int t = 0; t < FL_TILE; t++) {
            __m256 scale = _mm256_mul_ps(s, _mm256_set1_ps(x_scale[t]));
            acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[t]), scale, acc[t]);
        }
        codes += 512;
        scales += FL_BLOCK_ROWS;
        offsets += FL_BLOCK_ROWS;
        x_codes += 8 * FL_TILE;
        x_scale += FL_TILE;
    }
    UNROLL for (int t = 0; t < FL_TILE; t++) _mm256_storeu_ps(y + (size_t)t * stride, acc[t]);
}

/* 8 rows of q5 or q6 by a whole tile, unpacked: as many steps as fit are added in 16 bits. */
INLINE void rows8_planes(fl_format format, float *y, size_t stride, const uint8_t *codes,
                         const float *scales, size_t groups, const tokens *x) {
    const __m256i ones = _mm256_set1_epi16(1);
    const size_t steps = format == FL_Q5 ? 4 : 2;
    const int32_t *x_codes = x->codes, *x_offset = x->offset;
    const float *x_scale = x->scale;
    __m256 acc[FL_TILE];
    UNROLL for (int t = 0; t < FL_TILE; t++) acc[t] = _mm256_setzero_ps();
    for (size_t g = 0; g < groups; g++) {
        __m256i dot[FL_TILE];
        UNROLL for (int t = 0; t < FL_TILE; t++) dot[t] = zero_offset(format, x_offset[t]);
        for (size_t k4 = 0; k4 < 8; k4 += steps) {
            __m256i w[4];
            UNROLL for (size_t i = 0; i < steps; i++) w[i] = load_bytes(codes + (k4 + i) * 64);
            UNROLL for (size_t t = 0; t < FL_TILE; t++) {
                const int32_t *at = x_codes + k4 * FL_TILE + t;
                __m256i p = _mm256_maddubs_epi16(w[0], _mm256_set1_epi32(at[0]));
                UNROLL for (size_t i = 1; i < steps; i++) {
                    __m256i v = _mm256_set1_epi32(at[i * FL_TILE]);
                    p = _mm256_add_epi16(p, _mm256_maddubs_epi16(w[i], v));
                }
                dot[t] = _mm256_add_epi32(dot[t], _mm256_madd_epi16(p, ones));
                KEEP(dot[t]);
            }
        }
        __m256 s = _mm256_loadu_ps(scales);
        UNROLL for (int t = 0; t < FL_TILE; t++) {
            __m256 scale = _mm256_mul_ps(s, _mm256_set1_ps(x_scale[t]));
            acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[t]), scale, acc[t]);
        }
        codes += 512;
        scales += FL_BLOCK_ROWS;
        x_codes += 8 * FL_TILE;
        x_scale += FL_TILE;
        x_offset += FL_TILE;
    }
    UNROLL for (int t = 0; t < FL_TILE; t++) _mm256_storeu_ps(y + (size_t)t * stride, acc[t]);
}

static void whole_planes(fl_format format, float *y, size_t stride, const rows *w,
                         const tokens *x) {
    for (size_t half = 0; half < FL_BLOCK_ROWS; half += 8) {
        const float *scales = (const float *)w->scales + half;
        const uint8_t *codes = w->codes + half * 4;
        if (format == FL_Q5) {
            rows8_planes(FL_Q5, y + half, stride, codes, scales, w->groups, x);
        } else {
            rows8_planes(FL_Q6, y + half, stride, codes, scales, w->groups, x);
        }
    }
}

static void whole_q8(float *y, size_t stride, const rows *w, const q8_panel *p, const tokens *x) {
    for (size_t half = 0; half < FL_BLOCK_ROWS; half += 8) {
        rows8_q8(y + half, stride, w->codes + half * 4, p->scales + half, p->offsets + half,
                 w->groups, x);
    }
}

static void gemm(float *y, size_t stride, const fl_linear *w, int32_t block0, int32_t block1,
                 const fl_act *act, void *panel) {
    static rows16_function *const few[] = {few_q8, few_q4, few_q4m, few_q5, few_q6};
    int32_t whole = act->n > 2 * FL_TILE ? act->n / FL_TILE * FL_TILE : 0;
    for (size_t b = (size_t)block0; b < (size_t)block1; b++, y += FL_BLOCK_ROWS) {
        const rows packed = view_block(w, b);
        rows unpacked;
        q8_panel q8;
        if (whole && w->format == FL_Q8) q8 = prepare_q8(&packed, panel);
        if (whole && w->format != FL_Q8) unpacked = unpack(w->format, &packed, panel);
        for (int32_t t = 0; t < whole; t += FL_TILE) {
            const tokens x = view_tokens(act, t);
            float *to = y + (size_t)t * stride;
            switch (w->format) {
            case FL_Q8: whole_q8(to, stride, &packed, &q8, &x); break;
            case FL_Q4: whole_q4(to, stride, &unpacked, &x, FL_TILE); break;
            case FL_Q4M: whole_q4m(to, stride, &unpacked, &x, FL_TILE); break;
            default: whole_planes(w->format, to, stride, &unpacked, &x); break;
            }
        }
        multiply_few(y, stride, &packed, act, whole, few[w->format]);
    }
}

/* ---- keys and values ---- */

typedef struct {
    uint8_t *k, *v;
    uint16_t *k_scales, *v_scales;
} page_view;

static page_view view_page(const fl_kv *kv, int32_t page) {
    uint8_t *base = kv->base + (size_t)kv->pages[page] * kv->page_bytes;
    size_t dim = (size_t)kv->head_dim, scales = (dim + FL_GROUP - 1) / FL_GROUP * 64;
    return (page_view){.k = base,
                       .k_scales = (uint16_t *)(void *)(base + dim * 32),
                       .v = base + dim * 32 + scales,
                       .v_scales = (uint16_t *)(void *)(base + dim * 64 + scales)};
}

/* Codes against the scale as it is stored, rounded to half. */
INLINE uint16_t quantize_half(uint8_t codes[FL_GROUP], const float *x, int32_t n) {
    group32 v = load_group(x, n);
    float scale = magnitude(&v) / 127.0f;
    uint16_t half = fl_float_to_half(scale < 65504.0f ? scale : 65504.0f);
    int32_t sum;
    __m256i encoded =
        half ? encode(&v, 1.0f / fl_half_to_float(half), &sum) : _mm256_setzero_si256();
    _mm256_storeu_si256((void *)codes, encoded);
    return half;
}

static void store_kv(const fl_kv *kv, int32_t position, const float *k, const float *v) {
    page_view page = view_page(kv, position / 32);
    size_t t = (size_t)position % 32;
    for (int32_t c = 0, g = 0; c < kv->head_dim; c += FL_GROUP, g++) {
        int32_t n = kv->head_dim - c < FL_GROUP ? kv->head_dim - c : FL_GROUP;
        uint8_t codes[FL_GROUP];
        page.k_scales[(size_t)g * 32 + t] = quantize_half(codes, k + c, n);
        for (int32_t i = 0; i < n; i += 4) {
            memcpy(page.k + ((size_t)(c + i) / 4 * 32 + t) * 4, codes + i, 4);
        }
        page.v_scales[(size_t)g * 32 + t] = quantize_half(codes, v + c, n);
        uint8_t *v = page.v + (t / 4 * (size_t)kv->head_dim + (size_t)c) * 4 + t % 4;
        for (int32_t i = 0; i < n; i++) v[4 * i] = codes[i];
    }
}

/* ---- attention ---- */

/* Working memory of one call; every array starts on 64 bytes. */
typedef struct {
    int32_t n;           /* queries */
    int32_t head_dim, groups;
    size_t dim;          /* head_dim rounded up to 32 */
    fl_act q;            /* the queries, quantized */
    float *m;            /* [n] running maximum of the softmax */
    float *lanes;        /* [n][16] its running sum */
    float *factor;       /* [n] by which this page shrinks what came before */
    float *p;            /* [n][32] scores, then probabilities, of one page */
    fl_act weights;      /* probabilities times the value scales of one group, quantized */
    float *sums;         /* [FEW][16] their products with 16 channels */
    uint8_t *v;          /* [8][16][4] the last channels of a page, where they are no 16 */
    float *acc;          /* [n][dim] sums so far */
} attention;

static attention lay_out(void *scratch, int32_t n, int32_t head_dim) {
    attention a = {.n = n, .head_dim = head_dim, .groups = (head_dim + 31) / 32};
    size_t queries = (size_t)(n + FL_TILE - 1) / FL_TILE * FL_TILE;
    size_t groups = (size_t)a.groups;
    char *next = scratch;
    a.dim = groups * 32;
#define TAKE(pointer, count) \
    ((pointer) = (void *)next, next += (((size_t)(count) * 4 + FL_ALIGN - 1) & ~(size_t)63))
    a.q.n = n;
    a.q.width = FL_TILE;
    a.q.groups = a.groups;
    TAKE(a.q.codes, queries * groups * 8);
    TAKE(a.q.scale, queries * groups);
    TAKE(a.q.moment, queries * groups);
    TAKE(a.q.offset, queries * groups);
    TAKE(a.m, n);
    TAKE(a.lanes, n * 16);
    TAKE(a.factor, n);
    TAKE(a.p, n * 32);
    a.weights.n = n;
    a.weights.width = FL_TILE;
    a.weights.groups = 1;
    TAKE(a.weights.codes, queries * 8);
    TAKE(a.weights.scale, queries);
    TAKE(a.weights.moment, queries);
    TAKE(a.weights.offset, queries);
    TAKE(a.sums, FEW * 16);
    TAKE(a.v, 8 * 16);
    TAKE(a.acc, (size_t)n * a.dim);
#undef TAKE
    return a;
}

/* p[i][t] = q_i . k_t: a page's keys are a matrix of 32 rows. */
static void score_page(const attention *a, const page_view *page) {
    rows k = {.groups = (size_t)a->groups};
    k.last_steps = (size_t)(a->head_dim - (a->groups - 1) * FL_GROUP) / 4;
    for (int32_t i = 0; i < a->n; i += FEW) {
        const tokens q = view_tokens(&a->q, i);
        for (size_t half = 0; half < 2; half++) {
            k.codes = page->k + half * 64;
            k.scales = page->k_scales + half * 16;
            few_keys(a->p + i * 32 + half * 16, 32, &k, &q, a->n - i);
        }
    }
}

/* Tokens [low, high] of 32; none when low > high. */
typedef struct {
    int32_t low, high;
} span;

INLINE span clip(int32_t first, int32_t last, int32_t page) {
    span s = {first - page * 32, last - page * 32};
    s.low = s.low > 0 ? s.low : 0;
    s.high = s.high < 31 ? s.high : 31;
    return s;
}

/* Tokens 8 j .. 8 j + 7: all bits where the span holds one, none elsewhere. */
INLINE __m256 within(span s, int j) {
    __m256i t =
        _mm256_add_epi32(_mm256_set1_epi32(8 * j), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i low = _mm256_set1_epi32(s.low - 1), high = _mm256_set1_epi32(s.high + 1);
    return _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_cmpgt_epi32(t, low), _mm256_cmpgt_epi32(high, t)));
}

/* fl_softmax_page of query i */
static void softmax_page(const attention *a, int32_t i, span seen) {
    const __m256 lowest = _mm256_set1_ps(-FLT_MAX);
    float *p = a->p + i * 32;
    __m256 s[4], keep[4], top = _mm256_set1_ps(a->m[i]);
    UNROLL for (int j = 0; j < 4; j++) {
        keep[j] = within(seen, j);
        s[j] = _mm256_loadu_ps(p + 8 * j);
        top = _mm256_max_ps(_mm256_blendv_ps(lowest, s[j], keep[j]), top);
    }
    float m = max_lane(top);
    UNROLL for (int j = 0; j < 4; j++) {
        s[j] = exp2_8(_mm256_sub_ps(s[j], _mm256_set1_ps(m)), keep[j]);
        _mm256_storeu_ps(p + 8 * j, s[j]);
    }
    a->factor[i] = m > a->m[i] ? fl_exp2(a->m[i] - m) : 1.0f;
    a->m[i] = m;
    __m256 factor = _mm256_set1_ps(a->factor[i]);
    UNROLL for (int j = 0; j < 2; j++) {
        float *lanes = a->lanes + i * 16 + 8 * j;
        __m256 sum = _mm256_add_ps(s[j], s[j + 2]);
        _mm256_storeu_ps(lanes, _mm256_fmadd_ps(_mm256_loadu_ps(lanes), factor, sum));
    }
}

/* Quantize the weights of all queries in group g: probabilities times value scales. Tokens that nobody
 * sees may never have been written, and 0 * NaN is not 0. */
static void weigh(const attention *a, const page_view *page, int32_t g, span seen) {
    __m256 scale[4];
    UNROLL for (int j = 0; j < 4; j++) {
        __m256 halves = load_halves(page->v_scales + g * 32 + 8 * j);
        scale[j] = _mm256_and_ps(halves, within(seen, j));
    }
    fl_act to = a->weights;
    for (int32_t i = 0; i < a->n; i++) {
        float weights[32];
        UNROLL for (int j = 0; j < 4; j++) {
            __m256 p = _mm256_loadu_ps(a->p + i * 32 + 8 * j);
            _mm256_storeu_ps(weights + 8 * j, _mm256_mul_ps(p, scale[j]));
        }
        quantize(&to, i, 0, 1, weights, 32);
    }
}

/* acc = acc * factor + weights x values, 16 channels at a time: a page's values are rows as its keys
 * are, without scales of their own. */
static void combine_page(const attention *a, const page_view *page, span seen) {
    static const uint16_t ones[16] = {0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00,
                                      0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00,
                                      0x3c00, 0x3c00, 0x3c00, 0x3c00};
    size_t row = (size_t)a->head_dim * 4; /* bytes of four tokens' values */
    for (int32_t c = 0; c < a->head_dim; c += 16) {
        rows v = {.codes = page->v + c * 4, .scales = ones, .groups = 1, .last_steps = 8};
        v.pitch = row;
        if (c % FL_GROUP == 0) weigh(a, page, c / FL_GROUP, seen);
        if (a->head_dim - c < 16) { /* behind them the page may end */
            for (size_t t4 = 0; t4 < 8; t4++) {
                memcpy(a->v + 64 * t4, v.codes + row * t4, (size_t)(a->head_dim - c) * 4);
            }
            v.codes = a->v, v.pitch = 64;
        }
        for (int32_t i = 0; i < a->n; i += FEW) {
            const tokens x = view_tokens(&a->weights, i);
            int32_t n = a->n - i < FEW ? a->n - i : FEW;
            few_values(a->sums, 16, &v, &x, n);
            for (int32_t j = 0; j < n; j++) {
                __m256 factor = _mm256_set1_ps(a->factor[i + j]);
                float *to = a->acc + (size_t)(i + j) * a->dim + c;
                UNROLL for (int half = 0; half < 16; half += 8) {
                    __m256 sum = _mm256_loadu_ps(a->sums + j * 16 + half);
                    sum = _mm256_fmadd_ps(_mm256_loadu_ps(to + half), factor, sum);
                    _mm256_storeu_ps(to + half, sum);
                }
            }
        }
    }
}

static void attend(float *out, fl_mass *mass, const fl_kv *kv, int32_t n_q, const float *q,
                   const int32_t *first, const int32_t *last, void *scratch) {
    attention a = lay_out(scratch, n_q, kv->head_dim);
    int32_t page0 = INT32_MAX, page1 = -1;
    memset(a.acc, 0, (size_t)n_q * a.dim * sizeof *a.acc);
    memset(a.lanes, 0, (size_t)n_q * 16 * sizeof *a.lanes);
    for (int32_t i = 0; i < n_q; i++) {
        quantize(&a.q, i, 0, a.groups, q + (size_t)i * (size_t)kv->head_dim, kv->head_dim);
        a.m[i] = -FLT_MAX;
        if (first[i] > last[i]) continue;
        page0 = first[i] / 32 < page0 ? first[i] / 32 : page0;
        page1 = last[i] / 32 > page1 ? last[i] / 32 : page1;
    }
    for (int32_t p = page0; p <= page1; p++) {
        span seen = {32, -1}; /* by any query */
        for (int32_t i = 0; i < n_q; i++) {
            span s = clip(first[i], last[i], p);
            if (s.low > s.high) continue;
            seen.low = s.low < seen.low ? s.low : seen.low;
            seen.high = s.high > seen.high ? s.high : seen.high;
        }
        if (seen.low > seen.high) continue;
        page_view page = view_page(kv, p);
        score_page(&a, &page);
        for (int32_t i = 0; i < n_q; i++) softmax_page(&a, i, clip(first[i], last[i], p));
        combine_page(&a, &page, seen);
    }
    for (int32_t i = 0; i < n_q; i++) {
        const float *acc = a.acc + (size_t)i * a.dim;
        float *to = out + (size_t)i * (size_t)kv->head_dim;
        float sum = fl_fold(a.lanes + i * 16);
        float total = first[i] > last[i] ? 1.0f : sum; /* a query that sees nothing gets 0 */
        if (mass) mass[i] = (fl_mass){.max = a.m[i], .sum = sum};
        for (int32_t c = 0; c < kv->head_dim; c++) to[c] = acc[c] / total;
    }
}

/* ---- rows of floats ---- */

static void rmsnorm(float *y, const float *x, const float *weight, int32_t n, float eps) {
    __m256 low = _mm256_setzero_ps(), high = low;
    int32_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m256 x0 = _mm256_loadu_ps(x + i), x1 = _mm256_loadu_ps(x + i + 8);
        low = _mm256_fmadd_ps(x0, x0, low);
        high = _mm256_fmadd_ps(x1, x1, high);
    }
    if (i < n) {
        float rest[16] = {0};
        memcpy(rest, x + i, (size_t)(n - i) * sizeof *x);
        __m256 x0 = _mm256_loadu_ps(rest), x1 = _mm256_loadu_ps(rest + 8);
        low = _mm256_fmadd_ps(x0, x0, low);
        high = _mm256_fmadd_ps(x1, x1, high);
    }
    float scale = fl_rsqrt(sum_lanes(_mm256_add_ps(low, high)) / (float)n + eps);
    __m256 s = _mm256_set1_ps(scale);
    for (i = 0; i + 8 <= n; i += 8) {
        __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), s);
        _mm256_storeu_ps(y + i, _mm256_mul_ps(v, _mm256_loadu_ps(weight + i)));
    }
    for (; i < n; i++) y[i] = x[i] * scale * weight[i];
}

/* x / (1 + e^exponent) */
INLINE __m256 gated8(__m256 x, __m256 exponent, __m256 up) {
    __m256 below = _mm256_add_ps(_mm256_set1_ps(1.0f), exp8(exponent));
    return _mm256_mul_ps(_mm256_div_ps(x, below), up);
}

INLINE __m256 silu_mul8(__m256 x, __m256 up) {
    return gated8(x, _mm256_xor_ps(x, _mm256_set1_ps(-0.0f)), up);
}

INLINE __m256 gelu_mul8(__m256 x, __m256 up) {
    __m256 cube =
        _mm256_fmadd_ps(_mm256_mul_ps(_mm256_set1_ps(FL_GELU_B), x), x, _mm256_set1_ps(1.0f));
    return gated8(x, _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(FL_GELU_A), x), cube), up);
}

#define GATED(name, function8) \
    static void name(float *y, const float *gate, const float *up, int32_t n) { \
        int32_t i = 0; \
        for (; i + 8 <= n; i += 8) { \
            __m256 v = function8(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i)); \
            _mm256_storeu_ps(y + i, v); \
        } \
        if (i < n) { \
            size_t bytes = (size_t)(n - i) * sizeof *y; \
            float x[8] = {0}, u[8] = {0}; \
            memcpy(x, gate + i, bytes); \
            memcpy(u, up + i, bytes); \
            _mm256_storeu_ps(x, function8(_mm256_loadu_ps(x), _mm256_loadu_ps(u))); \
            memcpy(y + i, x, bytes); \
        } \
    }
GATED(silu_mul, silu_mul8)
GATED(gelu_mul, gelu_mul8)

/* The last n < 16 of a row, zeros after them. */
typedef struct {
    float x[16];
} row_end;

INLINE row_end load_end(const float *x, int32_t n) {
    row_end end = {{0}};
    memcpy(end.x, x, (size_t)n * sizeof *x);
    return end;
}

static void layernorm(float *y, const float *x, const float *weight, const float *bias, int32_t n,
                      float eps) {
    __m256 low = _mm256_setzero_ps(), high = low;
    int32_t whole = n / 16 * 16, left = n - whole;
    row_end end = load_end(x + whole, left);
    for (int32_t i = 0; i < n; i += 16) {
        const float *from = i < whole ? x + i : end.x;
        low = _mm256_add_ps(low, _mm256_loadu_ps(from));
        high = _mm256_add_ps(high, _mm256_loadu_ps(from + 8));
    }
    float mean = sum_lanes(_mm256_add_ps(low, high)) / (float)n;
    __m256 m = _mm256_set1_ps(mean);
    for (int32_t i = left; left && i < 16; i++) end.x[i] = mean; /* what is left of it: 0 */
    low = high = _mm256_setzero_ps();
    for (int32_t i = 0; i < n; i += 16) {
        const float *from = i < whole ? x + i : end.x;
        __m256 x0 = _mm256_sub_ps(_mm256_loadu_ps(from), m);
        __m256 x1 = _mm256_sub_ps(_mm256_loadu_ps(from + 8), m);
        low = _mm256_fmadd_ps(x0, x0, low);
        high = _mm256_fmadd_ps(x1, x1, high);
    }
    float scale = fl_rsqrt(sum_lanes(_mm256_add_ps(low, high)) / (float)n + eps);
    __m256 s = _mm256_set1_ps(scale);
    int32_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 v = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), m), s);
        v = _mm256_fmadd_ps(v, _mm256_loadu_ps(weight + i), _mm256_loadu_ps(bias + i));
        _mm256_storeu_ps(y + i, v);
    }
    for (; i < n; i++) y[i] = fl_fma((x[i] - mean) * scale, weight[i], bias[i]);
}

/* fl_gelu_erf. max and min return their second operand for NaN, as its conditions do. */
INLINE __m256 gelu_erf8(__m256 x) {
    const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    __m256 above = _mm256_max_ps(_mm256_setzero_ps(), x);
    __m256 z = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    z = _mm256_min_ps(z, _mm256_set1_ps(FL_NORMAL_MAX));
    __m256 p = _mm256_fmadd_ps(z, _mm256_set1_ps(FL_NORMAL_P6), _mm256_set1_ps(FL_NORMAL_P5));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(FL_NORMAL_P4));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(FL_NORMAL_P3));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(FL_NORMAL_P2));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(FL_NORMAL_P1));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(-1.0f));
    return _mm256_fnmadd_ps(z, exp2_8(p, all), above);
}

static void gelu_erf(float *y, const float *x, int32_t n) {
    int32_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, gelu_erf8(_mm256_loadu_ps(x + i)));
    if (i < n) {
        size_t bytes = (size_t)(n - i) * sizeof *y;
        float rest[8] = {0};
        memcpy(rest, x + i, bytes);
        _mm256_storeu_ps(rest, gelu_erf8(_mm256_loadu_ps(rest)));
        memcpy(y + i, rest, bytes);
    }
}

const fl_kernels fl_kernels_avx2 = {
    .isa = "avx2",
    .fp32 = 0,
    .quantize = quantize,
    .gemv = gemv,
    .gemm = gemm,
    .store_kv = store_kv,
    .attend = attend,
    .rmsnorm = rmsnorm,
    .silu_mul = silu_mul,
    .gelu_mul = gelu_mul,
    .layernorm = layernorm,
    .gelu_erf = gelu_erf,
};
