/* flashlite: the kernels for AVX-512 with VNNI (f, bw, vl, dq, vnni; Intel Ice Lake server, AMD
 * Zen 4 and later).
 *
 * vpdpbusd multiplies 64 unsigned by 64 signed bytes and adds fours of products to 16 dwords: 4
 * columns of the 16 rows of a block, or 4 channels of 16 tokens. The weights (or keys) are the
 * unsigned side, the activations (or queries) the signed one, broadcast. Codes that are signed are
 * made unsigned by adding an offset, and the dot product starts at -offset * (sum of the signed
 * side), so that it stays the exact integer of fl_kernels.h. All float steps are those of
 * fl_kernels_plain.c, in its order.
 *
 * Functions with a constant argument (`format`, `n`) are inlined into one copy per value.
 */
#include "fl_segment.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

/* Arrays of vectors stay in registers only where every loop over them is unrolled. The loop over
 * the columns of a group is not one of these: left rolled, clang spills accumulators no more; gcc
 * copies every accumulator twice in a rolled loop, so there it is unrolled too. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_COLUMNS _Pragma("clang loop unroll_count(2)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_COLUMNS _Pragma("GCC unroll 8")
#endif

#define AHEAD 8192 /* bytes of weights that gemv asks for before it needs them */

INLINE void prefetch(const void *base, size_t offset) {
    _mm_prefetch((const char *)((uintptr_t)base + offset), _MM_HINT_T0); /* may lie past the end */
}

/* 16 half floats */
INLINE __m512 load_half(const uint16_t *halves) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)halves));
}

/* The first n of 16 lanes; none or all where n lies outside. */
INLINE __mmask16 lanes(int32_t n) {
    return (__mmask16)(n <= 0 ? 0u : n >= 16 ? 0xffffu : (1u << n) - 1u);
}

/* Sum and maximum over all lanes, in every lane: lanes 8 apart first, then 4, 2, 1. */
INLINE __m512 fold_add(__m512 v) {
    v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e));
    v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
    return _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
}

INLINE __m512 fold_max(__m512 v) {
    v = _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e));
    v = _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
    v = _mm512_max_ps(v, _mm512_permute_ps(v, 0x4e));
    return _mm512_max_ps(v, _mm512_permute_ps(v, 0xb1));
}

/* fl_exp. max and min return their second operand for NaN, as fl_exp's conditions do. */
INLINE __m512 exp16(__m512 x) {
    const __m512 lowest = _mm512_set1_ps(FL_EXP_MIN), magic = _mm512_set1_ps(FL_ROUND_MAGIC);
    __m512 c = _mm512_min_ps(_mm512_max_ps(x, lowest), _mm512_set1_ps(FL_EXP_MAX));
    __m512 n = _mm512_fmadd_ps(c, _mm512_set1_ps(FL_EXP_LOG2E), magic);
    n = _mm512_sub_ps(n, magic);
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-FL_EXP_LN2_HI), c);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(-FL_EXP_LN2_LO), r);
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(FL_EXP_P4), _mm512_set1_ps(FL_EXP_P3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(FL_EXP_P2));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(FL_EXP_P1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(FL_EXP_P0));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
    p = _mm512_add_ps(p, _mm512_set1_ps(1.0f));
    __m512i power = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    p = _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(power, 23)));
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ), p);
}

/* fl_exp2 of the lanes of `keep`, 0 in the others. */
INLINE __m512 exp2_16(__m512 x, __mmask16 keep) {
    const __m512 magic = _mm512_set1_ps(FL_ROUND_MAGIC);
    keep = _mm512_mask_cmp_ps_mask(keep, x, _mm512_set1_ps(FL_EXP2_MIN), _CMP_GT_OQ);
    __m512 raised = _mm512_add_ps(x, magic);
    __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(raised, magic));
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(FL_EXP2_P4), _mm512_set1_ps(FL_EXP2_P3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(FL_EXP2_P2));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(FL_EXP2_P1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    __m512i power = _mm512_slli_epi32(_mm512_castps_si512(raised), 23);
    power = _mm512_add_epi32(_mm512_castps_si512(p), power);
    return _mm512_maskz_mov_ps(keep, _mm512_castsi512_ps(power));
}

/* ---- quantizing ---- */

/* One group of floats, zeros behind its end. */
typedef struct {
    __m512 low, high;
} group_of_floats;

INLINE group_of_floats load_group(const float *x, int32_t n) {
    return (group_of_floats){.low = _mm512_maskz_loadu_ps(lanes(n), x),
                             .high = _mm512_maskz_loadu_ps(lanes(n - 16), x + 16)};
}

/* Largest magnitude; NaN never wins. */
INLINE float magnitude(group_of_floats x) {
    __m512 amax = _mm512_max_ps(_mm512_abs_ps(x.high), _mm512_setzero_ps());
    return _mm512_cvtss_f32(fold_max(_mm512_max_ps(_mm512_abs_ps(x.low), amax)));
}

/* fl_round_code of 16 values */
INLINE __m128i round_codes(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-127.0f));
    x = _mm512_min_ps(x, _mm512_set1_ps(127.0f));
    return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x));
}

INLINE __m256i encode(group_of_floats x, float inverse) {
    __m512 factor = _mm512_set1_ps(inverse);
    __m128i low = round_codes(_mm512_mul_ps(x.low, factor));
    __m128i high = round_codes(_mm512_mul_ps(x.high, factor));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

/* Sum of 32 codes: vpsadbw adds unsigned bytes, so each is raised by 128 first. */
INLINE int32_t sum_codes(__m256i codes) {
    __m256i raised = _mm256_xor_si256(codes, _mm256_set1_epi8((char)0x80));
    __m256i sums = _mm256_sad_epu8(raised, _mm256_setzero_si256());
    __m128i sum = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum = _mm_add_epi64(sum, _mm_unpackhi_epi64(sum, sum));
    return _mm_cvtsi128_si32(sum) - 32 * 128;
}

/* One group of activations: codes and scale. */
INLINE __m256i quantize_group(float *scale, const float *x, int32_t n) {
    group_of_floats values = load_group(x, n);
    float amax = magnitude(values);
    if (!(amax >= FL_QUANT_TINY)) {
        *scale = 0.0f;
        return _mm256_setzero_si256();
    }
    *scale = amax / 127.0f;
    return encode(values, 127.0f / amax);
}

/* Largest magnitudes of four whole groups: halves of vectors are folded for all four at a time.
 * `positive`: no value is negative or NaN. */
INLINE __m128 magnitudes(int positive, const __m512 x[8]) {
    __m512 m[4];
    UNROLL for (int g = 0; g < 4; g++) {
        m[g] = x[2 * g + 1];
        if (!positive) m[g] = _mm512_max_ps(_mm512_abs_ps(m[g]), _mm512_setzero_ps());
        m[g] = _mm512_max_ps(positive ? x[2 * g] : _mm512_abs_ps(x[2 * g]), m[g]);
    }
    __m512 m01 = _mm512_max_ps(_mm512_unpacklo_ps(m[0], m[1]), _mm512_unpackhi_ps(m[0], m[1]));
    __m512 m23 = _mm512_max_ps(_mm512_unpacklo_ps(m[2], m[3]), _mm512_unpackhi_ps(m[2], m[3]));
    __m512 all =
        _mm512_max_ps(_mm512_shuffle_ps(m01, m23, 0x44), _mm512_shuffle_ps(m01, m23, 0xee));
    all = _mm512_max_ps(all, _mm512_shuffle_f32x4(all, all, 0x4e));
    return _mm512_castps512_ps128(_mm512_max_ps(all, _mm512_shuffle_f32x4(all, all, 0xb1)));
}

/* Codes of two whole groups, each times its factor. NaN becomes the least integer and then -127. */
INLINE __m512i encode_pair(const __m512 x[4], __m512 factor0, __m512 factor1) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i i0 = _mm512_cvtps_epi32(_mm512_mul_ps(x[0], factor0));
    __m512i i1 = _mm512_cvtps_epi32(_mm512_mul_ps(x[1], factor0));
    __m512i i2 = _mm512_cvtps_epi32(_mm512_mul_ps(x[2], factor1));
    __m512i i3 = _mm512_cvtps_epi32(_mm512_mul_ps(x[3], factor1));
    __m512i codes = _mm512_packs_epi16(_mm512_packs_epi32(i0, i1), _mm512_packs_epi32(i2, i3));
    codes = _mm512_max_epi8(codes, _mm512_set1_epi8(-127));
    return _mm512_permutexvar_epi32(order, codes);
}

/* Sums of the codes of four groups, two to a vector. */
INLINE __m128i sum_fours(__m512i codes0, __m512i codes1) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i d0 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, codes0);
    __m512i d1 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, codes1);
    __m512i s = _mm512_add_epi32(_mm512_unpacklo_epi32(d0, d1), _mm512_unpackhi_epi32(d0, d1));
    s = _mm512_add_epi32(s, _mm512_shuffle_epi32(s, 0x4e));
    s = _mm512_add_epi32(s, _mm512_shuffle_i32x4(s, s, 0xb1));
    return _mm_unpacklo_epi32(_mm512_castsi512_si128(s), _mm512_extracti32x4_epi32(s, 2));
}

/* Where one token's group goes: codes `step` apart, what is next group's `width` behind. */
typedef struct {
    int32_t *codes, *offset;
    float *scale, *moment;
    size_t step, width;
} slot;

INLINE slot slot_at(const fl_act *act, int32_t t, int32_t g) {
    fl_act_group to = fl_act_find(act, (size_t)t, (size_t)g);
    return (slot){.codes = to.codes,
                  .offset = act->offset + to.at,
                  .scale = act->scale + to.at,
                  .moment = act->moment + to.at,
                  .step = to.step,
                  .width = (size_t)act->width};
}

INLINE void quantize_one(const slot *to, const float *x, int32_t n) {
    int32_t quads[8];
    __m256i codes = quantize_group(to->scale, x, n);
    int32_t sum = sum_codes(codes);
    *to->offset = -128 * sum;
    *to->moment = *to->scale * (float)sum;
    _mm256_storeu_si256((__m256i *)(void *)quads, codes);
    UNROLL for (size_t k4 = 0; k4 < 8; k4++) to->codes[k4 * to->step] = quads[k4];
}

/* Four whole groups at a time, all of magnitudes that count; 0 where one does not. */
INLINE int quantize_values(int positive, int32_t codes[32], float scales[4],
                           const __m512 values[8]) {
    __m128 amax = magnitudes(positive, values);
    if (_mm_cmp_ps_mask(amax, _mm_set1_ps(FL_QUANT_TINY), _CMP_GE_OQ) != 15) return 0;
    __m128 inverse = _mm_div_ps(_mm_set1_ps(127.0f), amax);
    __m512 factor[4];
    factor[0] = _mm512_broadcastss_ps(inverse);
    factor[1] = _mm512_broadcastss_ps(_mm_permute_ps(inverse, 0x55));
    factor[2] = _mm512_broadcastss_ps(_mm_permute_ps(inverse, 0xaa));
    factor[3] = _mm512_broadcastss_ps(_mm_permute_ps(inverse, 0xff));
    __m512i codes0 = encode_pair(values, factor[0], factor[1]);
    __m512i codes1 = encode_pair(values + 4, factor[2], factor[3]);
    _mm512_storeu_si512(codes, codes0);
    _mm512_storeu_si512(codes + 16, codes1);
    _mm_storeu_ps(scales, _mm_div_ps(amax, _mm_set1_ps(127.0f)));
    return 1;
}

INLINE int quantize_four(const slot *to, const float *x) {
    __m512 values[8];
    int32_t codes[32], offsets[4];
    float scales[4], moments[4];
    UNROLL for (int i = 0; i < 8; i++) values[i] = _mm512_loadu_ps(x + 16 * i);
    if (!quantize_values(0, codes, scales, values)) return 0;
    __m512i codes0 = _mm512_loadu_si512(codes), codes1 = _mm512_loadu_si512(codes + 16);
    __m128i sum = sum_fours(codes0, codes1);
    __m128i offset = _mm_sub_epi32(_mm_setzero_si128(), _mm_slli_epi32(sum, 7));
    __m128 moment = _mm_mul_ps(_mm_loadu_ps(scales), _mm_cvtepi32_ps(sum));
    _mm_storeu_ps(moments, moment);
    _mm_storeu_si128((__m128i *)(void *)offsets, offset);
    for (size_t i = 0; i < 4; i++) {
        int32_t *group = to->codes + i * 8 * to->width;
        for (size_t k4 = 0; k4 < 8; k4++) group[k4 * to->step] = codes[i * 8 + k4];
        to->scale[i * to->width] = scales[i];
        to->moment[i * to->width] = moments[i];
        to->offset[i * to->width] = offsets[i];
    }
    return 1;
}

static void quantize(fl_act *act, int32_t t, int32_t group0, int32_t group1, const float *x,
                     int32_t cols) {
    for (int32_t g = group0; g < group1;) {
        slot to = slot_at(act, t, g);
        if (g + 4 <= group1 && (g + 4) * FL_GROUP <= cols && quantize_four(&to, x)) {
            g += 4, x += 4 * FL_GROUP;
        } else {
            quantize_one(&to, x, cols - g * FL_GROUP);
            g++, x += FL_GROUP;
        }
    }
}

/* ---- matrix products ---- */

/* Where the next group of one row block lies. */
typedef struct {
    const uint8_t *codes;
    const uint16_t *scales, *mins;
} cursor;

INLINE cursor cursor_at(fl_format format, const fl_linear *w, int32_t block) {
    size_t group = (size_t)block * (size_t)w->groups;
    return (cursor){.codes = w->codes + group * fl_code_bytes(format),
                    .scales = w->scales + group * FL_BLOCK_ROWS,
                    .mins = format == FL_Q4M ? w->mins + group * FL_BLOCK_ROWS : NULL};
}

INLINE void advance(fl_format format, cursor *at) {
    at->codes += fl_code_bytes(format);
    at->scales += FL_BLOCK_ROWS;
    if (format == FL_Q4M) at->mins += FL_BLOCK_ROWS;
}

/* Ask for part `part` of `parts` of one group, `groups` behind this one. */
INLINE void prefetch_group(fl_format format, const cursor *at, size_t groups, size_t part,
                           size_t parts) {
    size_t lines = fl_code_bytes(format) / 64;
    for (size_t i = lines * part / parts; i < lines * (part + 1) / parts; i++) {
        prefetch(at->codes, groups * fl_code_bytes(format) + 64 * i);
    }
    if (part > 0) return;
    prefetch(at->scales, groups * FL_BLOCK_ROWS * sizeof *at->scales);
    if (format == FL_Q4M) prefetch(at->mins, groups * FL_BLOCK_ROWS * sizeof *at->mins);
}

/* The bits above the nibbles of step k4, in their places; other bits are anything. A plane is turned
 * as whole dwords, so that each of its bytes loses none. */
INLINE __m512i high_bits(fl_format format, const uint8_t *planes, size_t k4) {
    size_t bits = fl_high_bits(format), place = k4 * bits % 8;
    __m512i plane = _mm512_loadu_si512(planes + k4 * bits / 8 * 64);
    return _mm512_rorv_epi32(plane, _mm512_set1_epi32((int)(28 + place) & 31));
}

/* Columns 4 k4 .. 4 k4 + 3 of the 16 rows, unsigned: code + 128 for q8, else the code as stored. */
INLINE __m512i columns(fl_format format, const uint8_t *codes, size_t k4) {
    if (format == FL_Q8) {
        return _mm512_xor_si512(_mm512_loadu_si512(codes + 64 * k4), _mm512_set1_epi8((char)0x80));
    }
    __m512i both = _mm512_loadu_si512(codes + 64 * (k4 / 2));
    if (k4 % 2) both = _mm512_srli_epi16(both, 4);
    both = _mm512_and_si512(both, _mm512_set1_epi8(15));
    if (fl_high_bits(format) == 0) return both;
    __m512i above = _mm512_set1_epi8(format == FL_Q5 ? 16 : 48);
    return _mm512_ternarylogic_epi32(both, high_bits(format, codes + 256, k4), above,
                                     0xf8); /* a | (b & c) */
}

/* What takes the zero of the unsigned codes (128 for q8, else 8, 16 or 32) off again. */
INLINE __m512i start(fl_format format, int32_t offset) {
    if (format == FL_Q4M) return _mm512_setzero_si512();
    int shift = format == FL_Q8 ? 0 : format == FL_Q4 ? 4 : format == FL_Q5 ? 3 : 2;
    return _mm512_set1_epi32(offset >> shift);
}

/* acc + dot * scale * scale_x */
INLINE __m512 add_group(__m512 acc, __m512i dot, __m512 scale, float scale_x) {
    __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(scale_x));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, acc);
}

/* Bound by memory: one stream of weights, read in order. */
INLINE void gemv_as(fl_format format, float *y, const fl_linear *w, int32_t block0, int32_t block1,
                    const fl_act *act) {
    cursor at = cursor_at(format, w, block0);
    /* What follows a block that stands alone is not read. */
    size_t ahead = block1 - block0 > 1 ? AHEAD / fl_code_bytes(format) : 0;
    for (int32_t b = block0; b < block1; b++, y += FL_BLOCK_ROWS) {
        const int32_t *x = act->codes;
        __m512 acc = _mm512_setzero_ps();
        for (int32_t g = 0; g < w->groups; g++, x += 8) {
            __m512i even = start(format, act->offset[g]), odd = _mm512_setzero_si512();
            prefetch_group(format, &at, ahead, 0, 1);
            UNROLL for (size_t k4 = 0; k4 < 8; k4 += 2) {
                even = _mm512_dpbusd_epi32(even, columns(format, at.codes, k4),
                                           _mm512_set1_epi32(x[k4]));
                odd = _mm512_dpbusd_epi32(odd, columns(format, at.codes, k4 + 1),
                                          _mm512_set1_epi32(x[k4 + 1]));
            }
            acc = add_group(acc, _mm512_add_epi32(even, odd), load_half(at.scales), act->scale[g]);
            if (format == FL_Q4M) {
                acc = _mm512_fmadd_ps(load_half(at.mins), _mm512_set1_ps(act->moment[g]), acc);
            }
            advance(format, &at);
        }
        _mm512_storeu_ps(y, acc);
    }
}

static void gemv(float *y, const fl_linear *w, int32_t block0, int32_t block1, const fl_act *act) {
    switch (w->format) {
    case FL_Q8: gemv_as(FL_Q8, y, w, block0, block1, act); break;
    case FL_Q4: gemv_as(FL_Q4, y, w, block0, block1, act); break;
    case FL_Q4M: gemv_as(FL_Q4M, y, w, block0, block1, act); break;
    case FL_Q5: gemv_as(FL_Q5, y, w, block0, block1, act); break;
    case FL_Q6: gemv_as(FL_Q6, y, w, block0, block1, act); break;
    }
}

/* One group of n = 1 or 2 row blocks, made ready for many tokens: codes as unsigned bytes (zero is
 * 128; q4m as they are), scales and mins as floats. */
typedef struct {
    uint8_t codes[8][2][64];
    float scale[2][FL_BLOCK_ROWS], min[2][FL_BLOCK_ROWS];
} panel_group;

INLINE void unpack(fl_format format, panel_group *panel, const fl_linear *w, int32_t block, int n) {
    for (int b = 0; b < n; b++) {
        cursor at = cursor_at(format, w, block + b);
        for (int32_t g = 0; g < w->groups; g++, advance(format, &at)) {
            panel_group *to = panel + g;
            UNROLL for (size_t k4 = 0; k4 < 8; k4++) {
                __m512i four = columns(format, at.codes, k4);
                int raise = format == FL_Q8 || format == FL_Q4M ? 0 : 128 - fl_zero_code(format);
                if (raise) four = _mm512_add_epi8(four, _mm512_set1_epi8((char)raise));
                _mm512_storeu_si512(to->codes[k4][b], four);
            }
            _mm512_storeu_ps(to->scale[b], load_half(at.scales));
            if (format == FL_Q4M) _mm512_storeu_ps(to->min[b], load_half(at.mins));
        }
    }
}

/* What one tile of tokens is multiplied by: n = 1 or 2 row blocks, from `panel`, or, where that is
 * NULL, from the packed blocks; and part `part` of `parts` of the blocks that come after them, which
 * are asked for meanwhile, so that memory works while tiles that find their weights near compute. */
typedef struct {
    const panel_group *panel;
    cursor now[2], coming[2];
    size_t part, parts;
} weights_of_tile;

/* `tokens` of one tile by n row blocks: at most 2 x 12 accumulators of the 32 registers. Tokens'
 * codes, scales and moments are broadcast by their loads, so that the vector pipes do products and,
 * once a group, three or four steps in floats. */
INLINE void multiply_tile(fl_format format, int tokens, int n, int direct, float *y, size_t stride,
                          const weights_of_tile *w, int32_t groups, const fl_act *act, size_t at) {
    const int32_t *x = act->codes + at * 8, *offset = act->offset + at;
    const float *scale = act->scale + at, *moment = act->moment + at;
    const panel_group *panel = w->panel;
    cursor now[2] = {w->now[0], w->now[n - 1]};
    size_t part = w->part, parts = w->parts;
    __m512 acc[FL_TILE][2];
    UNROLL for (int t = 0; t < tokens; t++) acc[t][0] = acc[t][1] = _mm512_setzero_ps();
    for (int32_t g = 0; g < groups; g++) {
        __m512i dot[FL_TILE][2];
        UNROLL for (int t = 0; t < tokens; t++) {
            dot[t][0] = dot[t][1] = start(direct || format == FL_Q4M ? format : FL_Q8, offset[t]);
        }
        UNROLL_COLUMNS for (size_t k4 = 0; k4 < 8; k4++) {
            __m512i w0, w1;
            if (direct) {
                w0 = columns(format, now[0].codes, k4);
                w1 = n > 1 ? columns(format, now[1].codes, k4) : w0;
            } else {
                w0 = _mm512_loadu_si512(panel->codes[k4][0]);
                w1 = n > 1 ? _mm512_loadu_si512(panel->codes[k4][1]) : w0;
            }
            UNROLL for (int t = 0; t < tokens; t++) {
                __m512i four = _mm512_set1_epi32(x[FL_TILE * k4 + (size_t)t]);
                dot[t][0] = _mm512_dpbusd_epi32(dot[t][0], w0, four);
                if (n > 1) dot[t][1] = _mm512_dpbusd_epi32(dot[t][1], w1, four);
            }
        }
        UNROLL for (int b = 0; b < n; b++) {
            __m512 scale_w = direct ? load_half(now[b].scales) : _mm512_loadu_ps(panel->scale[b]);
            __m512 min = scale_w;
            if (format == FL_Q4M) {
                min = direct ? load_half(now[b].mins) : _mm512_loadu_ps(panel->min[b]);
            }
            UNROLL for (int t = 0; t < tokens; t++) {
                acc[t][b] = add_group(acc[t][b], dot[t][b], scale_w, scale[t]);
                if (format != FL_Q4M) continue;
                acc[t][b] = _mm512_fmadd_ps(min, _mm512_set1_ps(moment[t]), acc[t][b]);
            }
            prefetch_group(format, &w->coming[b], (size_t)g, part, parts);
            if (direct) advance(format, &now[b]);
        }
        if (!direct) panel++;
        x += 8 * FL_TILE, offset += FL_TILE, scale += FL_TILE, moment += FL_TILE;
    }
    UNROLL for (int t = 0; t < tokens; t++) {
        UNROLL for (int b = 0; b < n; b++) {
            _mm512_storeu_ps(y + (size_t)t * stride + FL_BLOCK_ROWS * b, acc[t][b]);
        }
    }
}

#define PANEL_TILES 8 /* from how many tiles of tokens on a panel pays */

/* All tokens by n row blocks, then `next` is the first of those that follow. A panel stays in the
 * first-level cache; for few tokens it would cost more than it saves. */
INLINE void multiply_blocks(fl_format format, int n, float *y, size_t stride, const fl_linear *w,
                            int32_t block, int32_t next, const fl_act *act, void *panel) {
    int32_t t = 0, groups = w->groups, last = n - 1;
    int direct = act->n < PANEL_TILES * FL_TILE;
    size_t tile = (size_t)act->groups * FL_TILE, x = 0;
    weights_of_tile tiles = {
        .panel = panel,
        .now = {cursor_at(format, w, block), cursor_at(format, w, block + last)},
        .coming = {cursor_at(format, w, next), cursor_at(format, w, next + last)},
        .parts = ((size_t)act->n + FL_TILE - 1) / FL_TILE,
    };
    if (tiles.parts > fl_code_bytes(format) / 64) tiles.parts = fl_code_bytes(format) / 64;
    if (!direct) unpack(format, panel, w, block, n);
    for (; t + FL_TILE <= act->n; t += FL_TILE, y += FL_TILE * stride, x += tile, tiles.part++) {
        if (direct) {
            multiply_tile(format, FL_TILE, n, 1, y, stride, &tiles, groups, act, x);
        } else {
            multiply_tile(format, FL_TILE, n, 0, y, stride, &tiles, groups, act, x);
        }
    }
    switch (act->n - t) { /* the panel is no help to a single tile */
    case 1: multiply_tile(format, 1, n, 1, y, stride, &tiles, groups, act, x); break;
    case 2: multiply_tile(format, 2, n, 1, y, stride, &tiles, groups, act, x); break;
    case 3: multiply_tile(format, 3, n, 1, y, stride, &tiles, groups, act, x); break;
    case 4: multiply_tile(format, 4, n, 1, y, stride, &tiles, groups, act, x); break;
    case 5: multiply_tile(format, 5, n, 1, y, stride, &tiles, groups, act, x); break;
    default: break;
    }
}

INLINE void gemm_as(fl_format format, float *y, size_t stride, const fl_linear *w, int32_t block0,
                    int32_t block1, const fl_act *act, void *panel) {
    int32_t b = block0;
    for (; b + 2 <= block1; b += 2, y += 2 * FL_BLOCK_ROWS) {
        int32_t next = b + 4 <= block1 ? b + 2 : b;
        multiply_blocks(format, 2, y, stride, w, b, next, act, panel);
    }
    if (b < block1) multiply_blocks(format, 1, y, stride, w, b, b, act, panel);
}

static void gemm(float *y, size_t stride, const fl_linear *w, int32_t block0, int32_t block1,
                 const fl_act *act, void *panel) {
    switch (w->format) {
    case FL_Q8: gemm_as(FL_Q8, y, stride, w, block0, block1, act, panel); break;
    case FL_Q4: gemm_as(FL_Q4, y, stride, w, block0, block1, act, panel); break;
    case FL_Q4M: gemm_as(FL_Q4M, y, stride, w, block0, block1, act, panel); break;
    case FL_Q5: gemm_as(FL_Q5, y, stride, w, block0, block1, act, panel); break;
    case FL_Q6: gemm_as(FL_Q6, y, stride, w, block0, block1, act, panel); break;
    }
}

/* ---- keys and values ---- */

/* The arrays of one page. */
typedef struct {
    int8_t *k, *v;
    uint16_t *k_scales, *v_scales;
} page_view;

INLINE page_view view_page(const fl_kv *kv, int32_t page) {
    uint8_t *base = kv->base + (size_t)kv->pages[page] * kv->page_bytes;
    size_t dim = (size_t)kv->head_dim, scales = (dim + FL_GROUP - 1) / FL_GROUP * 64;
    return (page_view){.k = (int8_t *)base,
                       .k_scales = (uint16_t *)(void *)(base + dim * 32),
                       .v = (int8_t *)(base + dim * 32 + scales),
                       .v_scales = (uint16_t *)(void *)(base + dim * 64 + scales)};
}

/* One group of a key or value, taken against its scale as it is stored, rounded to half. */
INLINE __m256i quantize_half(uint16_t *stored, const float *x, int32_t n) {
    group_of_floats values = load_group(x, n);
    float scale = magnitude(values) / 127.0f;
    *stored = fl_float_to_half(scale < 65504.0f ? scale : 65504.0f);
    if (*stored == 0) return _mm256_setzero_si256();
    return encode(values, 1.0f / fl_half_to_float(*stored));
}

static void store_kv(const fl_kv *kv, int32_t position, const float *k, const float *v) {
    page_view page = view_page(kv, position / 32);
    size_t t = (size_t)position % 32;
    for (int32_t c = 0, g = 0; c < kv->head_dim; c += FL_GROUP, g++) {
        int32_t n = kv->head_dim - c < FL_GROUP ? kv->head_dim - c : FL_GROUP;
        int8_t codes[FL_GROUP];
        __m256i coded = quantize_half(&page.k_scales[(size_t)g * 32 + t], k + c, n);
        _mm256_storeu_si256((__m256i *)(void *)codes, coded);
        for (int32_t i = 0; i < n; i += 4) {
            memcpy(page.k + ((size_t)(c + i) / 4 * 32 + t) * 4, codes + i, 4);
        }
        coded = quantize_half(&page.v_scales[(size_t)g * 32 + t], v + c, n);
        _mm256_storeu_si256((__m256i *)(void *)codes, coded);
        int8_t *v = page.v + (t / 4 * (size_t)kv->head_dim + (size_t)c) * 4 + t % 4;
        for (int32_t i = 0; i < n; i++) v[4 * i] = codes[i];
    }
}

/* ---- attention ---- */

#define SCORE_QUERIES 4 /* queries scored together: 8 dot products, 8 sums */
#define COMBINE_QUERIES 8 /* queries whose outputs are summed together: 16 dot products */

/* The scratch of one call, G = whole and partial groups of head_dim. Groups are always whole
 * here: codes of queries are padded with zeros, and the keys of a partial last group are copied to
 * a padded place. */
typedef struct {
    int32_t groups;
    int32_t *codes; /* [n_q][8 G] four s8 codes of a query each */
    float *scale; /* [n_q][G] */
    int32_t *start; /* [n_q][G] -128 * sum of the codes */
    float *p; /* [n_q][32] of one page: scores, then probabilities */
    float *factor; /* [n_q] of one page: what earlier sums are multiplied by */
    float *m; /* [n_q] running maximum */
    float *lanes; /* [n_q][16] running sum of probabilities */
    float *acc; /* [n_q][32 G] running outputs */
    float *value_scales; /* [G][32] of one page, 0 where nobody sees the token */
    int32_t *weights; /* [n_q][8 G] four s8 codes of probabilities times these, each */
    float *weight_scale; /* [n_q][G] */
    int8_t *k; /* [8][32][4] the partial last group of one page */
    const int8_t *ahead; /* what is left of the next page, */
    size_t left, step; /* bytes of it, and how many to ask for at a time */
} attention;

/* The next n * size bytes of scratch, aligned. */
INLINE void *carve(char **scratch, size_t n, size_t size) {
    void *at = *scratch;
    *scratch += (n * size + FL_ALIGN - 1) / FL_ALIGN * FL_ALIGN;
    return at;
}

static attention open_attention(const float *q, int32_t n_q, int32_t head_dim, void *scratch) {
    size_t n = (size_t)n_q, groups = ((size_t)head_dim + FL_GROUP - 1) / FL_GROUP;
    char *free = scratch;
    attention a = {.groups = (int32_t)groups};
    a.k = carve(&free, 32 * FL_GROUP, 1);
    a.value_scales = carve(&free, groups * 32, sizeof *a.value_scales);
    a.weight_scale = carve(&free, n * groups, sizeof *a.weight_scale);
    a.weights = carve(&free, n * groups * 8, sizeof *a.weights);
    a.lanes = carve(&free, n * 16, sizeof *a.lanes);
    a.m = carve(&free, n, sizeof *a.m);
    a.factor = carve(&free, n, sizeof *a.factor);
    a.scale = carve(&free, n * groups, sizeof *a.scale);
    a.start = carve(&free, n * groups, sizeof *a.start);
    a.p = carve(&free, n * 32, sizeof *a.p);
    a.codes = carve(&free, n * groups * 8, sizeof *a.codes);
    a.acc = carve(&free, n * groups * FL_GROUP, sizeof *a.acc);
    memset(a.k, 0, 32 * FL_GROUP);
    for (size_t i = 0; i < n; i++, q += head_dim) {
        for (size_t g = 0; g < groups; g++) {
            int32_t left = head_dim - (int32_t)g * FL_GROUP;
            size_t at = i * groups + g;
            __m256i codes = quantize_group(&a.scale[at], q + g * FL_GROUP, left);
            _mm256_storeu_si256((__m256i *)(void *)(a.codes + at * 8), codes);
            a.start[at] = -128 * sum_codes(codes);
        }
    }
    return a;
}

/* Ask for a part of the next page. All at once is more than a core waits for, and what goes beyond
 * is forgotten. */
INLINE void ask_ahead(attention *a) {
    if (a->left == 0) return;
    size_t bytes = a->left < a->step ? a->left : a->step;
    for (size_t i = 0; i < bytes; i += 64) prefetch(a->ahead, i);
    a->ahead += bytes;
    a->left -= bytes;
}

/* The next page is asked for in as many steps as its predecessor's parts take. */
static void look_ahead(attention *a, int32_t n_q, const int8_t *next, size_t bytes) {
    size_t steps = (size_t)n_q / SCORE_QUERIES + (size_t)n_q + (size_t)a->groups;
    a->ahead = next;
    a->left = bytes;
    a->step = (bytes / 64 + steps - 1) / steps * 64;
}

/* Copy the keys of a partial last group of the page to their padded place. */
static void copy_partial_group(const attention *a, const page_view *page, size_t head_dim) {
    size_t whole = head_dim / FL_GROUP * FL_GROUP;
    memcpy(a->k, page->k + whole * 32, (head_dim - whole) * 32);
}

/* Scores of n queries from `i` on, against the 32 tokens of one page. */
INLINE void score_queries(int n, const attention *a, int32_t i, const page_view *page,
                          int32_t whole) {
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    size_t groups = (size_t)a->groups, at = (size_t)i * groups;
    __m512 score[SCORE_QUERIES][2];
    UNROLL for (int j = 0; j < n; j++) score[j][0] = score[j][1] = _mm512_setzero_ps();
    for (size_t g = 0; g < groups; g++, at++) {
        const int8_t *k = (int32_t)g < whole ? page->k + g * 32 * FL_GROUP : a->k;
        __m512i dot[SCORE_QUERIES][2];
        UNROLL for (int j = 0; j < n; j++) {
            dot[j][0] = dot[j][1] = _mm512_set1_epi32(a->start[at + (size_t)j * groups]);
        }
        UNROLL_COLUMNS for (size_t k4 = 0; k4 < 8; k4++) {
            __m512i k0 = _mm512_xor_si512(_mm512_loadu_si512(k + 128 * k4), flip);
            __m512i k1 = _mm512_xor_si512(_mm512_loadu_si512(k + 128 * k4 + 64), flip);
            UNROLL for (int j = 0; j < n; j++) {
                __m512i q = _mm512_set1_epi32(a->codes[(at + (size_t)j * groups) * 8 + k4]);
                dot[j][0] = _mm512_dpbusd_epi32(dot[j][0], k0, q);
                dot[j][1] = _mm512_dpbusd_epi32(dot[j][1], k1, q);
            }
        }
        UNROLL for (int half = 0; half < 2; half++) {
            __m512 scale = load_half(page->k_scales + g * 32 + 16 * half);
            UNROLL for (int j = 0; j < n; j++) {
                score[j][half] = add_group(score[j][half], dot[j][half], scale,
                                           a->scale[at + (size_t)j * groups]);
            }
        }
    }
    UNROLL for (int j = 0; j < n; j++) {
        _mm512_storeu_ps(a->p + (i + j) * 32, score[j][0]);
        _mm512_storeu_ps(a->p + (i + j) * 32 + 16, score[j][1]);
    }
}

static void score_page(attention *a, int32_t n_q, const page_view *page, int32_t whole) {
    int32_t i = 0;
    for (; i + SCORE_QUERIES <= n_q; i += SCORE_QUERIES) {
        ask_ahead(a);
        score_queries(SCORE_QUERIES, a, i, page, whole);
    }
    switch (n_q - i) {
    case 1: score_queries(1, a, i, page, whole); break;
    case 2: score_queries(2, a, i, page, whole); break;
    case 3: score_queries(3, a, i, page, whole); break;
    default: break;
    }
}

/* Scores of query i become probabilities; `mask`: the tokens of the page that it sees, perhaps
 * none. Most pages hold no new maximum. */
INLINE void softmax(const attention *a, int32_t i, uint32_t mask) {
    __mmask16 mask0 = (__mmask16)(mask & 0xffff), mask1 = (__mmask16)(mask >> 16);
    float *p = a->p + i * 32, *sum = a->lanes + i * 16, factor = 1.0f;
    __m512 p0 = _mm512_loadu_ps(p), p1 = _mm512_loadu_ps(p + 16), top = _mm512_set1_ps(a->m[i]);
    if (_mm512_mask_cmp_ps_mask(mask0, p0, top, _CMP_GT_OQ) |
        _mm512_mask_cmp_ps_mask(mask1, p1, top, _CMP_GT_OQ)) {
        top = _mm512_mask_max_ps(top, mask0, p0, top);
        top = fold_max(_mm512_mask_max_ps(top, mask1, p1, top));
        float m = _mm512_cvtss_f32(top);
        factor = fl_exp2(a->m[i] - m);
        a->m[i] = m;
    }
    p0 = exp2_16(_mm512_sub_ps(p0, top), mask0);
    p1 = exp2_16(_mm512_sub_ps(p1, top), mask1);
    _mm512_storeu_ps(p, p0);
    _mm512_storeu_ps(p + 16, p1);
    a->factor[i] = factor;
    _mm512_storeu_ps(
        sum, _mm512_fmadd_ps(_mm512_loadu_ps(sum), _mm512_set1_ps(factor), _mm512_add_ps(p0, p1)));
}

/* The probabilities of a query times the value scales of a group. */
INLINE void weigh(__m512 weights[2], const attention *a, size_t query, size_t group) {
    const float *p = a->p + query * 32, *scales = a->value_scales + group * 32;
    weights[0] = _mm512_mul_ps(_mm512_loadu_ps(p), _mm512_loadu_ps(scales));
    weights[1] = _mm512_mul_ps(_mm512_loadu_ps(p + 16), _mm512_loadu_ps(scales + 16));
}

/* Quantize one group of weights; `cell` counts the groups of all queries. */
INLINE void quantize_weight(const attention *a, size_t cell, const __m512 weights[2]) {
    float x[32];
    _mm512_storeu_ps(x, weights[0]);
    _mm512_storeu_ps(x + 16, weights[1]);
    __m256i codes = quantize_group(a->weight_scale + cell, x, 32);
    _mm256_storeu_si256((__m256i *)(void *)(a->weights + 8 * cell), codes);
}

/* Quantize the weights of all queries, four groups at a time; `seen`: the tokens that any query
 * sees. The others may never have been written, and 0 * NaN is not 0. */
static void quantize_weights(const attention *a, int32_t n_q, const page_view *page,
                             uint32_t seen) {
    size_t groups = (size_t)a->groups, cells = (size_t)n_q * groups, c = 0, query = 0, group = 0;
    for (size_t g = 0; g < groups; g++) {
        for (size_t half = 0; half < 2; half++) {
            __m512 scales = load_half(page->v_scales + g * 32 + 16 * half);
            scales = _mm512_maskz_mov_ps((__mmask16)(seen >> (16 * half) & 0xffff), scales);
            _mm512_storeu_ps(a->value_scales + g * 32 + 16 * half, scales);
        }
    }
    for (; c + 4 <= cells; c += 4) {
        __m512 values[8];
        UNROLL for (int i = 0; i < 4; i++) {
            weigh(values + 2 * i, a, query, group);
            if (++group == groups) group = 0, query++;
        }
        if (!quantize_values(1, a->weights + c * 8, a->weight_scale + c, values)) {
            UNROLL for (size_t i = 0; i < 4; i++) quantize_weight(a, c + i, values + 2 * i);
        }
    }
    for (; c < cells; c++) {
        __m512 values[2];
        weigh(values, a, query, group);
        quantize_weight(a, c, values);
        if (++group == groups) group = 0, query++;
    }
}

/* The running outputs of n queries from `i` on, in group g: out = out * factor + weights x values. */
INLINE void combine_queries(int n, const attention *a, int32_t i, size_t g, const page_view *page,
                            size_t head_dim) {
    const int8_t *v = page->v + g * FL_GROUP * 4;
    int32_t left = (int32_t)(head_dim - g * FL_GROUP); /* channels: behind them the page may end */
    __mmask16 mask0 = lanes(left), mask1 = lanes(left - 16);
    size_t groups = (size_t)a->groups, row = groups * FL_GROUP, at = (size_t)i * groups + g;
    float *out = a->acc + (size_t)i * row + g * FL_GROUP;
    const int32_t *weights = a->weights + at * 8;
    const float *scale = a->weight_scale + at;
    __m512i dot[COMBINE_QUERIES][2];
    UNROLL for (int j = 0; j < n; j++) dot[j][0] = dot[j][1] = _mm512_setzero_si512();
    UNROLL_COLUMNS for (size_t t4 = 0; t4 < 8; t4++) {
        __m512i v0 = _mm512_maskz_loadu_epi32(mask0, v + t4 * head_dim * 4);
        __m512i v1 = _mm512_maskz_loadu_epi32(mask1, v + t4 * head_dim * 4 + 64);
        UNROLL for (int j = 0; j < n; j++) { /* codes of weights are 0 .. 127 */
            __m512i four = _mm512_set1_epi32(weights[(size_t)j * groups * 8 + t4]);
            dot[j][0] = _mm512_dpbusd_epi32(dot[j][0], four, v0);
            dot[j][1] = _mm512_dpbusd_epi32(dot[j][1], four, v1);
        }
    }
    UNROLL for (int j = 0; j < n; j++, out += row) {
        __m512 factor = _mm512_set1_ps(a->factor[i + j]);
        __m512 by = _mm512_set1_ps(scale[(size_t)j * groups]);
        UNROLL for (int half = 0; half < 2; half++) {
            __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[j][half]), by);
            float *to = out + 16 * half;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), factor, sum));
        }
    }
}

static void combine_page(attention *a, int32_t n_q, const page_view *page, size_t head_dim) {
    for (size_t g = 0; g < (size_t)a->groups; g++) {
        ask_ahead(a);
        int32_t i = 0;
        for (; i + COMBINE_QUERIES <= n_q; i += COMBINE_QUERIES) {
            combine_queries(COMBINE_QUERIES, a, i, g, page, head_dim);
        }
        switch (n_q - i) {
        case 1: combine_queries(1, a, i, g, page, head_dim); break;
        case 2: combine_queries(2, a, i, g, page, head_dim); break;
        case 3: combine_queries(3, a, i, g, page, head_dim); break;
        case 4: combine_queries(4, a, i, g, page, head_dim); break;
        case 5: combine_queries(5, a, i, g, page, head_dim); break;
        case 6: combine_queries(6, a, i, g, page, head_dim); break;
        case 7: combine_queries(7, a, i, g, page, head_dim); break;
        default: break;
        }
    }
}

/* Bits of the positions [first, last] in the page whose first position is `base`. */
INLINE uint32_t page_mask(int32_t base, int32_t first, int32_t last) {
    int32_t low = first > base ? first - base : 0, high = last < base + 31 ? last - base : 31;
    return low > high ? 0u : (0xffffffffu << low) & (0xffffffffu >> (31 - high));
}

static void attend_page(attention *a, const fl_kv *kv, int32_t page_index, int32_t n_q,
                        const int32_t *first, const int32_t *last) {
    int32_t base = page_index * 32;
    page_view page = view_page(kv, page_index);
    uint32_t seen = 0, mask[FL_MAX_QUERIES];
    for (int32_t i = 0; i < n_q; i++) seen |= mask[i] = page_mask(base, first[i], last[i]);
    if (seen == 0) return;
    if (kv->head_dim % FL_GROUP) copy_partial_group(a, &page, (size_t)kv->head_dim);
    score_page(a, n_q, &page, kv->head_dim / FL_GROUP);
    for (int32_t i = 0; i < n_q; i++) {
        ask_ahead(a);
        softmax(a, i, mask[i]);
    }
    quantize_weights(a, n_q, &page, seen);
    combine_page(a, n_q, &page, (size_t)kv->head_dim);
}

/* Nothing seen yet: of a new segment. */
static void begin_segment(const attention *a, size_t n_q) {
    memset(a->acc, 0, n_q * (size_t)a->groups * FL_GROUP * sizeof *a->acc);
    memset(a->lanes, 0, n_q * 16 * sizeof *a->lanes);
    for (size_t i = 0; i < n_q; i++) a->m[i] = -FLT_MAX;
}

/* Answers of a whole segment -> out, mass. */
static void end_segment(const attention *a, float *out, fl_mass *mass, int32_t n_q,
                        int32_t head_dim, const int32_t *first, const int32_t *last,
                        int32_t segment) {
    for (int32_t i = 0; i < n_q; i++, out += head_dim) {
        float *acc = a->acc + (size_t)i * (size_t)a->groups * FL_GROUP;
        fl_mass by = {.max = a->m[i], .sum = fl_fold(a->lanes + i * 16)};
        for (int32_t c = 0; c < head_dim; c += 16) {
            __m512 sum = _mm512_loadu_ps(acc + c);
            _mm512_storeu_ps(acc + c, _mm512_div_ps(sum, _mm512_set1_ps(by.sum)));
        }
        fl_take_segment(out, &mass[i], acc, by, head_dim, first[i], last[i], segment);
    }
}

static void attend(float *out, fl_mass *mass, const fl_kv *kv, int32_t n_q, const float *q,
                   const int32_t *first, const int32_t *last, void *scratch) {
    attention a = open_attention(q, n_q, kv->head_dim, scratch);
    fl_mass total[FL_MAX_QUERIES];
    int32_t begin = INT32_MAX, end = -1;
    for (int32_t i = 0; i < n_q; i++) {
        total[i] = (fl_mass){.max = -FLT_MAX};
        if (first[i] > last[i]) { /* a query that sees nothing gets 0 */
            memset(out + (size_t)i * (size_t)kv->head_dim, 0, (size_t)kv->head_dim * sizeof *out);
            continue;
        }
        begin = first[i] < begin ? first[i] : begin;
        end = last[i] > end ? last[i] : end;
    }
    const int32_t pages = FL_SEGMENT / 32; /* of a segment */
    size_t bytes = fl_kv_bytes(kv->head_dim, 0);
    begin_segment(&a, (size_t)n_q);
    for (int32_t page = begin / 32; end >= 0 && page <= end / 32; page++) {
        a.left = 0;
        if (page < end / 32) look_ahead(&a, n_q, view_page(kv, page + 1).k, bytes);
        attend_page(&a, kv, page, n_q, first, last);
        if (page < end / 32 && page % pages != pages - 1) continue;
        end_segment(&a, out, total, n_q, kv->head_dim, first, last, page / pages);
        if (page < end / 32) begin_segment(&a, (size_t)n_q);
    }
    if (mass) memcpy(mass, total, (size_t)n_q * sizeof *mass);
}

/* ---- whole rows ---- */

static void rmsnorm(float *y, const float *x, const float *weight, int32_t n, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int32_t i = 0; i < n; i += 16) {
        __m512 v = _mm512_maskz_loadu_ps(lanes(n - i), x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    float mean = _mm512_cvtss_f32(fold_add(sum)) / (float)n;
    __m512 scale = _mm512_set1_ps(fl_rsqrt(mean + eps));
    for (int32_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(n - i);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), scale);
        v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, weight + i));
        _mm512_mask_storeu_ps(y + i, mask, v);
    }
}

/* fl_silu and fl_gelu share x / (1 + e^u); u = -x, or FL_GELU_A x (1 + FL_GELU_B x^2). */
INLINE void gate_mul(int gelu, float *y, const float *gate, const float *up, int32_t n) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int32_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(n - i);
        __m512 x = _mm512_maskz_loadu_ps(mask, gate + i), u;
        if (gelu) {
            u = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps(FL_GELU_B), x), x, one);
            u = _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(FL_GELU_A), x), u);
        } else {
            u = _mm512_sub_ps(_mm512_setzero_ps(), x);
        }
        __m512 v = _mm512_div_ps(x, _mm512_add_ps(one, exp16(u)));
        v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, up + i));
        _mm512_mask_storeu_ps(y + i, mask, v);
    }
}

static void silu_mul(float *y, const float *gate, const float *up, int32_t n) {
    gate_mul(0, y, gate, up, n);
}

static void gelu_mul(float *y, const float *gate, const float *up, int32_t n) {
    gate_mul(1, y, gate, up, n);
}

static void layernorm(float *y, const float *x, const float *weight, const float *bias, int32_t n,
                      float eps) {
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int32_t i = 0; i < n; i += 16) {
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(n - i), x + i));
    }
    __m512 mean = _mm512_set1_ps(_mm512_cvtss_f32(fold_add(sum)) / (float)n);
    for (int32_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(n - i);
        __m512 rest = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), mean);
        rest = _mm512_maskz_mov_ps(mask, rest);
        squares = _mm512_fmadd_ps(rest, rest, squares);
    }
    float variance = _mm512_cvtss_f32(fold_add(squares)) / (float)n;
    __m512 scale = _mm512_set1_ps(fl_rsqrt(variance + eps));
    for (int32_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(n - i);
        __m512 v = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), mean);
        v = _mm512_fmadd_ps(_mm512_mul_ps(v, scale), _mm512_maskz_loadu_ps(mask, weight + i),
                            _mm512_maskz_loadu_ps(mask, bias + i));
        _mm512_mask_storeu_ps(y + i, mask, v);
    }
}

/* fl_gelu_erf. max and min return their second operand for NaN, as its conditions do. */
static void gelu_erf(float *y, const float *x, int32_t n) {
    for (int32_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(n - i);
        __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
        __m512 above = _mm512_max_ps(_mm512_setzero_ps(), v);
        __m512 z = _mm512_min_ps(_mm512_abs_ps(v), _mm512_set1_ps(FL_NORMAL_MAX));
        __m512 p = _mm512_fmadd_ps(z, _mm512_set1_ps(FL_NORMAL_P6), _mm512_set1_ps(FL_NORMAL_P5));
        p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(FL_NORMAL_P4));
        p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(FL_NORMAL_P3));
        p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(FL_NORMAL_P2));
        p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(FL_NORMAL_P1));
        p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(-1.0f));
        v = _mm512_fnmadd_ps(z, exp2_16(p, 0xffff), above);
        _mm512_mask_storeu_ps(y + i, mask, v);
    }
}

#if !defined(FL_FUNCTIONS_ALONE) /* fl_kernels_amx.c makes a table of its own of them */
const fl_kernels fl_kernels_avx512 = {
    .isa = "avx512",
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
#endif
