/* The 512-bit intrinsics that fl_kernels_avx512.c uses, for machines that have AVX2 only.
 *
 * With this folder before the system's (-I), the kernels compile unchanged and run anywhere AVX2,
 * FMA and F16C do. A vector is two halves of 256 bits; what AVX2 has is done by AVX2 on each half,
 * the rest lane by lane as the instruction set reference defines it. Masked loads and stores touch
 * the lanes they name and no other, so that AddressSanitizer sees what the processor would do.
 * Reference: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
 */
#ifndef FL_AVX512_EMULATION_H
#define FL_AVX512_EMULATION_H

#include_next <immintrin.h>
#include <limits.h>
#include <stdint.h>
#include <string.h>

/* Calls, not copies: the kernels have some 30 unrolled variants, and with every intrinsic inlined
 * and instrumented a sanitizer build takes minutes. */
#define FL_EMU static __attribute__((noinline, unused))

typedef struct {
    __m256 half[2];
} fl_emu_f;
typedef struct {
    __m256i half[2];
} fl_emu_i;
#define __m512 fl_emu_f
#define __m512i fl_emu_i
#define __mmask16 uint16_t

/* ---- on each half ---- */

#define EMULATE_UNARY(name, to, from, half_name) \
    FL_EMU to emulate_##name(from a) { \
        return (to){{half_name(a.half[0]), half_name(a.half[1])}}; \
    }
#define EMULATE_BINARY(name, type, half_name) \
    FL_EMU type emulate_##name(type a, type b) { \
        return (type){{half_name(a.half[0], b.half[0]), half_name(a.half[1], b.half[1])}}; \
    }
#define EMULATE_SHIFT(name, half_name) \
    FL_EMU __m512i emulate_##name(__m512i a, unsigned count) { \
        __m128i n = _mm_cvtsi32_si128((int)count); \
        return (__m512i){{half_name(a.half[0], n), half_name(a.half[1], n)}}; \
    }
#define EMULATE_SET1(name, to, from, half_name) \
    FL_EMU to emulate_##name(from a) { return (to){{half_name(a), half_name(a)}}; }

EMULATE_BINARY(add_ps, __m512, _mm256_add_ps)
EMULATE_BINARY(sub_ps, __m512, _mm256_sub_ps)
EMULATE_BINARY(mul_ps, __m512, _mm256_mul_ps)
EMULATE_BINARY(div_ps, __m512, _mm256_div_ps)
EMULATE_BINARY(min_ps, __m512, _mm256_min_ps)
EMULATE_BINARY(max_ps, __m512, _mm256_max_ps)
EMULATE_BINARY(add_epi32, __m512i, _mm256_add_epi32)
EMULATE_BINARY(sub_epi32, __m512i, _mm256_sub_epi32)
EMULATE_BINARY(add_epi8, __m512i, _mm256_add_epi8)
EMULATE_BINARY(max_epi8, __m512i, _mm256_max_epi8)
EMULATE_BINARY(packs_epi16, __m512i, _mm256_packs_epi16)
EMULATE_BINARY(packs_epi32, __m512i, _mm256_packs_epi32)
EMULATE_BINARY(unpacklo_ps, __m512, _mm256_unpacklo_ps)
EMULATE_BINARY(unpackhi_ps, __m512, _mm256_unpackhi_ps)
EMULATE_BINARY(unpacklo_epi32, __m512i, _mm256_unpacklo_epi32)
EMULATE_BINARY(unpackhi_epi32, __m512i, _mm256_unpackhi_epi32)
EMULATE_BINARY(and_si512, __m512i, _mm256_and_si256)
EMULATE_BINARY(xor_si512, __m512i, _mm256_xor_si256)
EMULATE_SHIFT(slli_epi32, _mm256_sll_epi32)
EMULATE_SHIFT(srli_epi16, _mm256_srl_epi16)
EMULATE_SET1(set1_ps, __m512, float, _mm256_set1_ps)
EMULATE_SET1(broadcastss_ps, __m512, __m128, _mm256_broadcastss_ps)
EMULATE_SET1(set1_epi32, __m512i, int, _mm256_set1_epi32)
EMULATE_SET1(set1_epi8, __m512i, char, _mm256_set1_epi8)
EMULATE_UNARY(cvtepi32_ps, __m512, __m512i, _mm256_cvtepi32_ps)
EMULATE_UNARY(cvtps_epi32, __m512i, __m512, _mm256_cvtps_epi32)
EMULATE_UNARY(castsi512_ps, __m512, __m512i, _mm256_castsi256_ps)
EMULATE_UNARY(castps_si512, __m512i, __m512, _mm256_castps_si256)

FL_EMU __m512 emulate_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return (__m512){{_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]),
                     _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1])}};
}

FL_EMU __m512 emulate_cvtph_ps(__m256i a) {
    return (__m512){{_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                     _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))}};
}

FL_EMU __m512i emulate_cvtepi8_epi32(__m128i a) {
    return (__m512i){{_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))}};
}

FL_EMU __m512 emulate_setzero_ps(void) { return emulate_set1_ps(0.0f); }
FL_EMU __m512i emulate_setzero_si512(void) { return emulate_set1_epi32(0); }
FL_EMU float emulate_cvtss_f32(__m512 a) { return _mm256_cvtss_f32(a.half[0]); }

/* ---- lane by lane ---- */

FL_EMU __m512 emulate_loadu_ps(const void *from) {
    __m512 a;
    memcpy(&a, from, sizeof a);
    return a;
}

FL_EMU __m512i emulate_loadu_si512(const void *from) {
    __m512i a;
    memcpy(&a, from, sizeof a);
    return a;
}

FL_EMU void emulate_storeu_ps(void *to, __m512 a) { memcpy(to, &a, sizeof a); }

FL_EMU __m512 emulate_mask_mov_ps(__m512 other, __mmask16 mask, __m512 a) {
    float lanes[16], others[16];
    memcpy(lanes, &a, sizeof a);
    memcpy(others, &other, sizeof other);
    for (int i = 0; i < 16; i++) lanes[i] = mask >> i & 1 ? lanes[i] : others[i];
    return emulate_loadu_ps(lanes);
}

FL_EMU __m512 emulate_maskz_mov_ps(__mmask16 mask, __m512 a) {
    return emulate_mask_mov_ps(emulate_setzero_ps(), mask, a);
}

FL_EMU __m512 emulate_mask_max_ps(__m512 other, __mmask16 mask, __m512 a, __m512 b) {
    return emulate_mask_mov_ps(other, mask, emulate_max_ps(a, b));
}

FL_EMU __m512 emulate_maskz_loadu_ps(__mmask16 mask, const float *from) {
    float lanes[16] = {0};
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) lanes[i] = from[i];
    }
    return emulate_loadu_ps(lanes);
}

FL_EMU __m512i emulate_maskz_loadu_epi32(__mmask16 mask, const void *from) {
    char bytes[64] = {0};
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) memcpy(bytes + 4 * i, (const char *)from + 4 * i, 4);
    }
    return emulate_loadu_si512(bytes);
}

FL_EMU void emulate_mask_storeu_ps(float *to, __mmask16 mask, __m512 a) {
    float lanes[16];
    memcpy(lanes, &a, sizeof a);
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) to[i] = lanes[i];
    }
}

FL_EMU __m512 emulate_abs_ps(__m512 a) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (__m512){{_mm256_andnot_ps(sign, a.half[0]), _mm256_andnot_ps(sign, a.half[1])}};
}

/* Inside each 128 bits: lane i takes the lane that bits 2i, 2i + 1 of `order` name. */
FL_EMU __m512 emulate_permute_ps(__m512 a, int order) {
    float from[16], to[16];
    memcpy(from, &a, sizeof a);
    for (int i = 0; i < 16; i++) to[i] = from[i / 4 * 4 + (order >> i % 4 * 2 & 3)];
    return emulate_loadu_ps(to);
}

/* Inside each 128 bits: two lanes of a, then two of b. */
FL_EMU __m512 emulate_shuffle_ps(__m512 a, __m512 b, int order) {
    float from[2][16], to[16];
    memcpy(from[0], &a, sizeof a);
    memcpy(from[1], &b, sizeof b);
    for (int i = 0; i < 16; i++) {
        to[i] = from[i % 4 / 2][i / 4 * 4 + (order >> i % 4 * 2 & 3)];
    }
    return emulate_loadu_ps(to);
}

/* Whole 128-bit lanes: two of a, then two of b. */
FL_EMU __m512 emulate_shuffle_f32x4(__m512 a, __m512 b, int order) {
    float from[2][16], to[16];
    memcpy(from[0], &a, sizeof a);
    memcpy(from[1], &b, sizeof b);
    for (int i = 0; i < 4; i++) {
        memcpy(to + 4 * i, from[i / 2] + 4 * (order >> 2 * i & 3), 4 * sizeof *to);
    }
    return emulate_loadu_ps(to);
}

/* The predicates that the kernels use: not less than, true for NaN, and greater than. */
FL_EMU __mmask16 emulate_cmp_CMP_NLT_UQ(__m512 a, __m512 b) {
    int low = _mm256_movemask_ps(_mm256_cmp_ps(a.half[0], b.half[0], _CMP_NLT_UQ));
    int high = _mm256_movemask_ps(_mm256_cmp_ps(a.half[1], b.half[1], _CMP_NLT_UQ));
    return (__mmask16)(low | high << 8);
}
FL_EMU __mmask16 emulate_cmp_CMP_GT_OQ(__m512 a, __m512 b) {
    int low = _mm256_movemask_ps(_mm256_cmp_ps(a.half[0], b.half[0], _CMP_GT_OQ));
    int high = _mm256_movemask_ps(_mm256_cmp_ps(a.half[1], b.half[1], _CMP_GT_OQ));
    return (__mmask16)(low | high << 8);
}
FL_EMU uint8_t emulate_four_CMP_GE_OQ(__m128 a, __m128 b) {
    return (uint8_t)_mm_movemask_ps(_mm_cmp_ps(a, b, _CMP_GE_OQ));
}

/* Fours of unsigned bytes of a times signed bytes of b, added to the dwords of `sum`. */
FL_EMU __m512i emulate_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    int32_t sums[16];
    uint8_t left[64];
    int8_t right[64];
    memcpy(sums, &sum, sizeof sum);
    memcpy(left, &a, sizeof a);
    memcpy(right, &b, sizeof b);
    for (int i = 0; i < 16; i++) {
        for (int j = 4 * i; j < 4 * i + 4; j++) sums[i] += left[j] * right[j];
    }
    return emulate_loadu_si512(sums);
}

/* The same moves for dwords. */
FL_EMU __m512i emulate_dwords(__m512 a) { return emulate_loadu_si512(&a); }
FL_EMU __m512 emulate_floats(__m512i a) { return emulate_loadu_ps(&a); }

FL_EMU __m512i emulate_permutexvar_epi32(__m512i order, __m512i a) {
    int32_t from[16], index[16], to[16];
    memcpy(from, &a, sizeof a);
    memcpy(index, &order, sizeof order);
    for (int i = 0; i < 16; i++) to[i] = from[index[i] & 15];
    return emulate_loadu_si512(to);
}

/* Each dword turned right by the low five bits of its count. */
FL_EMU __m512i emulate_rorv_epi32(__m512i a, __m512i counts) {
    uint32_t from[16], count[16];
    memcpy(from, &a, sizeof a);
    memcpy(count, &counts, sizeof counts);
    for (int i = 0; i < 16; i++) {
        unsigned n = count[i] & 31;
        from[i] = n ? from[i] >> n | from[i] << (32 - n) : from[i];
    }
    return emulate_loadu_si512(from);
}

/* Bit by bit: `table` at the number that the bits of a, b and c spell. */
FL_EMU __m512i emulate_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    uint8_t bytes[3][64];
    memcpy(bytes[0], &a, sizeof a);
    memcpy(bytes[1], &b, sizeof b);
    memcpy(bytes[2], &c, sizeof c);
    for (int i = 0; i < 64; i++) {
        uint8_t x = bytes[0][i], y = bytes[1][i], z = bytes[2][i], all = 0;
        for (int n = 0; n < 8; n++) {
            uint8_t at = (uint8_t)((n & 4 ? x : ~x) & (n & 2 ? y : ~y) & (n & 1 ? z : ~z));
            if (table >> n & 1) all |= at;
        }
        bytes[0][i] = all;
    }
    return emulate_loadu_si512(bytes[0]);
}

/* Dwords to bytes, saturated. */
FL_EMU __m128i emulate_cvtsepi32_epi8(__m512i a) {
    int32_t from[16];
    int8_t to[16];
    memcpy(from, &a, sizeof a);
    for (int i = 0; i < 16; i++) {
        int32_t x = from[i] < SCHAR_MIN ? SCHAR_MIN : from[i];
        to[i] = (int8_t)(x > SCHAR_MAX ? SCHAR_MAX : x);
    }
    return _mm_loadu_si128((const __m128i *)(const void *)to);
}

#define _mm512_abs_ps emulate_abs_ps
#define _mm512_add_epi32 emulate_add_epi32
#define _mm512_add_ps emulate_add_ps
#define _mm512_and_si512 emulate_and_si512
#define _mm512_castsi512_ps emulate_castsi512_ps
#define _mm512_castps_si512 emulate_castps_si512
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, predicate) emulate_cmp##predicate(a, b)
#undef _mm512_mask_cmp_ps_mask
#define _mm512_mask_cmp_ps_mask(mask, a, b, predicate) \
    ((__mmask16)((mask) & emulate_cmp##predicate(a, b)))
#undef _mm_cmp_ps_mask
#define _mm_cmp_ps_mask(a, b, predicate) emulate_four##predicate(a, b)
#define _mm512_add_epi8 emulate_add_epi8
#define _mm512_broadcastss_ps emulate_broadcastss_ps
#define _mm512_castps512_ps128(a) _mm256_castps256_ps128((a).half[0])
#define _mm512_castsi512_si128(a) _mm256_castsi256_si128((a).half[0])
#undef _mm512_extracti32x4_epi32
#define _mm512_extracti32x4_epi32(a, i) _mm256_extracti128_si256((a).half[(i) / 2], (i) % 2)
#define _mm512_max_epi8 emulate_max_epi8
#define _mm512_packs_epi16 emulate_packs_epi16
#define _mm512_packs_epi32 emulate_packs_epi32
#define _mm512_permutexvar_epi32 emulate_permutexvar_epi32
#undef _mm512_setr_epi32
#define _mm512_setr_epi32(...) emulate_loadu_si512((const int32_t[16]){__VA_ARGS__})
#undef _mm512_shuffle_epi32
#define _mm512_shuffle_epi32(a, order) \
    emulate_dwords(emulate_permute_ps(emulate_floats(a), order))
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4(a, b, order) \
    emulate_dwords(emulate_shuffle_f32x4(emulate_floats(a), emulate_floats(b), order))
#undef _mm512_shuffle_ps
#define _mm512_shuffle_ps emulate_shuffle_ps
#define _mm512_storeu_si512(to, a) memcpy(to, &(a), 64)
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 emulate_ternarylogic_epi32
#define _mm512_unpackhi_epi32 emulate_unpackhi_epi32
#define _mm512_unpackhi_ps emulate_unpackhi_ps
#define _mm512_unpacklo_epi32 emulate_unpacklo_epi32
#define _mm512_unpacklo_ps emulate_unpacklo_ps
#define _mm512_cvtepi32_ps emulate_cvtepi32_ps
#define _mm512_cvtepi8_epi32 emulate_cvtepi8_epi32
#define _mm512_cvtph_ps emulate_cvtph_ps
#define _mm512_cvtps_epi32 emulate_cvtps_epi32
#define _mm512_cvtsepi32_epi8 emulate_cvtsepi32_epi8
#define _mm512_cvtss_f32 emulate_cvtss_f32
#define _mm512_div_ps emulate_div_ps
#define _mm512_dpbusd_epi32 emulate_dpbusd_epi32
#define _mm512_fmadd_ps emulate_fmadd_ps
#define _mm512_loadu_ps emulate_loadu_ps
#define _mm512_loadu_si512 emulate_loadu_si512
#define _mm512_mask_max_ps emulate_mask_max_ps
#define _mm512_mask_storeu_ps emulate_mask_storeu_ps
#define _mm512_maskz_loadu_epi32 emulate_maskz_loadu_epi32
#define _mm512_maskz_loadu_ps emulate_maskz_loadu_ps
#define _mm512_maskz_mov_ps emulate_maskz_mov_ps
#define _mm512_max_ps emulate_max_ps
#define _mm512_min_ps emulate_min_ps
#define _mm512_mul_ps emulate_mul_ps
#undef _mm512_permute_ps
#define _mm512_permute_ps emulate_permute_ps
#define _mm512_rorv_epi32 emulate_rorv_epi32
#define _mm512_set1_epi32 emulate_set1_epi32
#define _mm512_set1_epi8 emulate_set1_epi8
#define _mm512_set1_ps emulate_set1_ps
#define _mm512_setzero_ps emulate_setzero_ps
#define _mm512_setzero_si512 emulate_setzero_si512
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emulate_shuffle_f32x4
#define _mm512_slli_epi32 emulate_slli_epi32
#define _mm512_srli_epi16 emulate_srli_epi16
#define _mm512_storeu_ps emulate_storeu_ps
#define _mm512_sub_epi32 emulate_sub_epi32
#define _mm512_sub_ps emulate_sub_ps
#define _mm512_xor_si512 emulate_xor_si512

#endif
