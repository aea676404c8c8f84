/* flashlite: the scalar arithmetic that every kernel table shares.
 *
 * No libm beyond sqrtf (exact in IEEE arithmetic): results do not depend on the C library. The
 * vector kernels use the same steps and constants in the same order, so that logits agree to the
 * last bit on every target. Nothing here traps or is undefined for NaN or infinity; compile with
 * -ffp-contract=off.
 */
#ifndef FL_MATH_H
#define FL_MATH_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t fl_float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float fl_bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* a * b + c, rounded once. Where that is no instruction: the product is exact in double, and the sum
 * is rounded to odd there (its last bit is set when anything was lost), after which rounding to
 * float is right. Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008. */
static inline float fl_fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    double product = (double)a * (double)b, sum = product + (double)c, part = sum - product;
    double lost = (product - (sum - part)) + ((double)c - part);
    /* In integers and without branches, so that compilers do rows of these in vectors. */
    uint64_t bits, error;
    memcpy(&bits, &sum, sizeof bits);
    memcpy(&error, &lost, sizeof error);
    uint64_t inexact = ((error << 1) | (0 - (error << 1))) >> 63;
    uint64_t finite = ~(((bits & INT64_MAX) + (1ull << 52)) >> 63);
    uint64_t step = inexact & finite & ~bits & 1u, inward = (error ^ bits) >> 63;
    bits += step - 2 * (step & inward);
    memcpy(&sum, &bits, sizeof sum);
    return (float)sum;
#endif
}

static inline float fl_half_to_float(uint16_t half) {
    const uint32_t bias = (uint32_t)(127 - 15) << 23, smallest_normal = bias + (1u << 23);
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = (uint32_t)(half & 0x7fffu) << 13;
    uint32_t exponent = rest & 0x0f800000u;
    if (exponent == 0) { /* zero and subnormals: the mantissa under a hidden bit, less that bit */
        float x = fl_bits_float(rest + smallest_normal) - fl_bits_float(smallest_normal);
        return fl_bits_float(fl_float_bits(x) | sign);
    }
    if (exponent == 0x0f800000u) rest += bias; /* infinity and NaN keep an exponent of ones */
    return fl_bits_float((rest + bias) | sign);
}

/* Rounds to nearest even; overflows to infinity. */
static inline uint16_t fl_float_to_half(float x) {
    uint32_t bits = fl_float_bits(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    uint32_t half;
    if (rest > 0x7f800000u) {
        half = 0x7e00u | ((rest >> 13) & 0x3ffu);
    } else if (rest >= 0x47800000u) { /* 65536 and above */
        half = 0x7c00u;
    } else if (rest < 0x38800000u) { /* below 2^-14: an ulp of 0.5 is one subnormal step */
        half = fl_float_bits(fl_bits_float(rest) + 0.5f) - fl_float_bits(0.5f);
    } else { /* a carry out of the mantissa raises the exponent, up to infinity, as it should */
        half = (rest - ((uint32_t)(127 - 15) << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    }
    return (uint16_t)(sign | half);
}

/* Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded half to even. */
#define FL_ROUND_MAGIC 12582912.0f

/* x rounded half to even and clamped to -127..127; NaN gives -127. */
static inline int32_t fl_round_code(float x) {
    x = x > -127.0f ? x : -127.0f;
    x = x < 127.0f ? x : 127.0f;
    return (int32_t)((x + FL_ROUND_MAGIC) - FL_ROUND_MAGIC);
}

/* Groups whose largest magnitude is below this count as zero: 127 / amax stays finite. */
#define FL_QUANT_TINY 1e-30f

/* e^x = 2^n e^r with |r| <= ln(2) / 2; e^r = 1 + r + r^2 P(r), relative error of P 3.1e-9.
 * FL_EXP_LN2_HI has 9 bits, so n * FL_EXP_LN2_HI is exact. */
#define FL_EXP_MIN (-87.0f) /* below: 0 */
#define FL_EXP_MAX 88.0f    /* above: e^88 */
#define FL_EXP_LOG2E 1.44269504f
#define FL_EXP_LN2_HI 0.693359375f
#define FL_EXP_LN2_LO (-2.12194440e-4f)
#define FL_EXP_P0 0.49999994f
#define FL_EXP_P1 0.166665196f
#define FL_EXP_P2 0.0416684002f
#define FL_EXP_P3 0.00836885627f
#define FL_EXP_P4 0.00138143089f

static inline float fl_exp(float x) {
    float c = x > FL_EXP_MIN ? x : FL_EXP_MIN; /* NaN too */
    c = c < FL_EXP_MAX ? c : FL_EXP_MAX;
    float n = fl_fma(c, FL_EXP_LOG2E, FL_ROUND_MAGIC) - FL_ROUND_MAGIC;
    float r = fl_fma(n, -FL_EXP_LN2_LO, fl_fma(n, -FL_EXP_LN2_HI, c));
    float p = fl_fma(r, FL_EXP_P4, FL_EXP_P3);
    p = fl_fma(p, r, FL_EXP_P2);
    p = fl_fma(p, r, FL_EXP_P1);
    p = fl_fma(p, r, FL_EXP_P0);
    p = fl_fma(p, r * r, r) + 1.0f;
    p *= fl_bits_float((uint32_t)((int32_t)n + 127) << 23);
    return x < FL_EXP_MIN ? 0.0f : p;
}

/* 2^x of x <= 0 for the softmax: 2^n 2^r with |r| <= 1/2, relative error 2.9e-6, exactly 1 at 0. Adding
 * FL_ROUND_MAGIC leaves n in the low bits, from where it is shifted into the exponent. */
#define FL_EXP2_MIN (-60.0f) /* there and below: 0 */
#define FL_EXP2_P1 0.693124175f
#define FL_EXP2_P2 0.240240991f
#define FL_EXP2_P3 0.0559064262f
#define FL_EXP2_P4 0.00958285294f

static inline float fl_exp2(float x) {
    if (!(x > FL_EXP2_MIN)) return 0.0f; /* NaN too */
    float raised = x + FL_ROUND_MAGIC;
    float r = x - (raised - FL_ROUND_MAGIC);
    float p = fl_fma(r, FL_EXP2_P4, FL_EXP2_P3);
    p = fl_fma(p, r, FL_EXP2_P2);
    p = fl_fma(p, r, FL_EXP2_P1);
    p = fl_fma(p, r, 1.0f);
    return fl_bits_float(fl_float_bits(p) + (fl_float_bits(raised) << 23));
}

static inline float fl_rsqrt(float x) { return 1.0f / sqrtf(x); }

static inline float fl_silu(float x) { return x / (1.0f + fl_exp(-x)); }

/* x (1 + tanh u) / 2 = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3) */
#define FL_GELU_A (-1.5957691216f) /* -2 sqrt(2 / pi) */
#define FL_GELU_B 0.044715f

static inline float fl_gelu(float x) {
    return x / (1.0f + fl_exp(FL_GELU_A * x * fl_fma(FL_GELU_B * x, x, 1.0f)));
}

/* x Phi(x) = max(x, 0) - z Phi(-z) with z = |x|, Phi the normal distribution. log2 Phi(-z) + 1 is z
 * times a polynomial, fitted on [0, 6] to the least maximum of the error of z Phi(-z): 8e-8. With
 * that of fl_exp2 all is within 6e-7. Beyond 6 the product counts for nothing, and z stays there. */
#define FL_NORMAL_MAX 6.0f
#define FL_NORMAL_P1 (-1.15114713f)
#define FL_NORMAL_P2 (-0.458915681f)
#define FL_NORMAL_P3 (-0.0532381870f)
#define FL_NORMAL_P4 0.00797746330f
#define FL_NORMAL_P5 (-0.000739874318f)
#define FL_NORMAL_P6 2.99242002e-05f

static inline float fl_gelu_erf(float x) {
    float z = fabsf(x), above = 0.0f > x ? 0.0f : x;            /* NaN stays */
    z = z < FL_NORMAL_MAX ? z : FL_NORMAL_MAX;                  /* of NaN: 6 */
    float p = fl_fma(z, FL_NORMAL_P6, FL_NORMAL_P5);
    p = fl_fma(p, z, FL_NORMAL_P4);
    p = fl_fma(p, z, FL_NORMAL_P3);
    p = fl_fma(p, z, FL_NORMAL_P2);
    p = fl_fma(p, z, FL_NORMAL_P1);
    p = fl_fma(p, z, -1.0f);
    return fl_fma(-z, fl_exp2(p), above);
}

/* Sum of 16 lanes, halves added to halves: the order of every vector width. */
static inline float fl_fold(float lanes[16]) {
    for (int32_t half = 8; half > 0; half /= 2) {
        for (int32_t j = 0; j < half; j++) lanes[j] += lanes[j + half];
    }
    return lanes[0];
}

/* One page of an online softmax. `scores` of the 32 tokens of a page, of which [low, high] count,
 * become 2^(score - m), 0 outside. The running maximum *m starts at -FLT_MAX; the running sum is kept
 * in 16 lanes, which start at 0, and is fl_fold of them. Returns the factor by which what was summed
 * before must be multiplied: exactly 1 while the maximum stays. */
static inline float fl_softmax_page(float *scores, int32_t low, int32_t high, float *m,
                                    float lanes[16]) {
    float top = *m;
    for (int32_t t = low; t <= high; t++) top = scores[t] > top ? scores[t] : top;
    float factor = top > *m ? fl_exp2(*m - top) : 1.0f; /* also where both are infinite */
    for (int32_t t = 0; t < 32; t++) {
        scores[t] = t < low || t > high ? 0.0f : fl_exp2(scores[t] - top);
    }
    for (int32_t t = 0; t < 16; t++) {
        lanes[t] = fl_fma(lanes[t], factor, scores[t] + scores[t + 16]);
    }
    *m = top;
    return factor;
}

/* Functions of whole rows that fl_kernels_plain.c defines and the FP32 table takes as they are. */
void fl_plain_rmsnorm(float *y, const float *x, const float *weight, int32_t n, float eps);
void fl_plain_layernorm(float *y, const float *x, const float *weight, const float *bias, int32_t n,
                        float eps);
void fl_plain_silu_mul(float *y, const float *gate, const float *up, int32_t n);
void fl_plain_gelu_mul(float *y, const float *gate, const float *up, int32_t n);
void fl_plain_gelu_erf(float *y, const float *x, int32_t n);

#endif
