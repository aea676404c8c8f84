/* flashlite: the kernels in plain C. The oracle of every other table, and the fallback where no
 * vector kernels exist. Inner loops run over 16 rows, 32 tokens or whole rows, which compilers
 * turn into vectors; clarity comes first. */
#include "fl_kernels.h"
#include "fl_math.h"

static int32_t dot4(const int8_t *a, const int8_t *b) {
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
}

/* Codes of n <= 32 values, zeros after them. */
static void encode(int8_t codes[FL_GROUP], const float *x, int32_t n, float inverse) {
    for (int32_t i = 0; i < FL_GROUP; i++) {
        codes[i] = (int8_t)(i < n ? fl_round_code(x[i] * inverse) : 0);
    }
}

static float magnitude(const float *x, int32_t n) {
    float amax = 0.0f;
    for (int32_t i = 0; i < n; i++) {
        float a = fabsf(x[i]);
        amax = a > amax ? a : amax; /* NaN never wins */
    }
    return amax;
}

/* One group of activations: codes, and the scale. */
static float quantize_group(int8_t codes[FL_GROUP], const float *x, int32_t n) {
    float amax = magnitude(x, n);
    int zero = !(amax >= FL_QUANT_TINY);
    encode(codes, x, zero ? 0 : n, zero ? 0.0f : 127.0f / amax);
    return zero ? 0.0f : amax / 127.0f;
}

static void quantize(fl_act *act, int32_t t, int32_t group0, int32_t group1, const float *x,
                     int32_t cols) {
    for (int32_t g = group0; g < group1; g++) {
        int32_t n = cols - g * FL_GROUP;
        fl_act_group to = fl_act_find(act, (size_t)t, (size_t)g);
        int8_t codes[FL_GROUP];
        act->scale[to.at] = quantize_group(codes, x, n < FL_GROUP ? n : FL_GROUP);
        int32_t sum = 0;
        for (int32_t i = 0; i < FL_GROUP; i++) sum += codes[i];
        act->offset[to.at] = -128 * sum;
        act->moment[to.at] = act->scale[to.at] * (float)sum;
        for (size_t k4 = 0; k4 < 8; k4++) memcpy(to.codes + k4 * to.step, codes + 4 * k4, 4);
        x += FL_GROUP;
    }
}

/* The codes of one group of one block as [k4][row][k], in the form the dot product takes. */
static void unpack(int8_t codes[512], const fl_linear *w, size_t group) {
    if (w->format == FL_Q8) {
        memcpy(codes, w->codes + group * 512, 512);
        return;
    }
    size_t bits = fl_high_bits(w->format);
    int zero = fl_zero_code(w->format), above = (1 << bits) - 1;
    const uint8_t *low = w->codes + group * fl_code_bytes(w->format), *high = low + 256;
    for (size_t k4 = 0; k4 < 8; k4++, codes += 64) {
        const uint8_t *nibbles = low + k4 / 2 * 64;
        size_t half = k4 % 2 * 4, place = k4 * bits % 8;
        for (size_t j = 0; j < 64; j++) codes[j] = (int8_t)((nibbles[j] >> half & 15) - zero);
        if (bits == 0) continue;
        const uint8_t *plane = high + k4 * bits / 8 * 64;
        for (size_t j = 0; j < 64; j++) {
            codes[j] = (int8_t)(codes[j] + ((plane[j] >> place & above) << 4));
        }
    }
}

/* y[16] += one group's part for one token. `x` holds 8 dwords of 4 codes, `step` apart. */
static void add_group(float *y, const int8_t codes[512], const float scale[16], const float min[16],
                      const int32_t *x, size_t step, float scale_x, float moment) {
    int32_t dot[FL_BLOCK_ROWS] = {0};
    for (size_t k4 = 0; k4 < 8; k4++) {
        int8_t four[4];
        memcpy(four, x + k4 * step, 4);
        for (size_t r = 0; r < FL_BLOCK_ROWS; r++) dot[r] += dot4(codes + k4 * 64 + r * 4, four);
    }
    for (size_t r = 0; r < FL_BLOCK_ROWS; r++) {
        y[r] = fl_fma((float)dot[r], scale[r] * scale_x, y[r]);
    }
    for (size_t r = 0; min && r < FL_BLOCK_ROWS; r++) {
        y[r] = fl_fma(min[r], moment, y[r]);
    }
}

/* Each group is unpacked once and added to all tokens; y itself accumulates. */
static void multiply(float *y, size_t stride, const fl_linear *w, int32_t block0, int32_t block1,
                     const fl_act *act) {
    size_t groups = (size_t)w->groups, tokens = (size_t)act->n;
    for (size_t b = (size_t)block0; b < (size_t)block1; b++, y += FL_BLOCK_ROWS) {
        for (size_t t = 0; t < tokens; t++) {
            memset(y + t * stride, 0, FL_BLOCK_ROWS * sizeof *y);
        }
        for (size_t g = 0; g < groups; g++) {
            int8_t codes[512];
            float scale[FL_BLOCK_ROWS], min[FL_BLOCK_ROWS];
            size_t at = (b * groups + g) * FL_BLOCK_ROWS;
            unpack(codes, w, b * groups + g);
            for (size_t r = 0; r < FL_BLOCK_ROWS; r++) {
                scale[r] = fl_half_to_float(w->scales[at + r]);
                min[r] = w->format == FL_Q4M ? fl_half_to_float(w->mins[at + r]) : 0.0f;
            }
            for (size_t t = 0; t < tokens; t++) {
                fl_act_group x = fl_act_find(act, t, g);
                add_group(y + t * stride, codes, scale, w->format == FL_Q4M ? min : NULL, x.codes,
                          x.step, act->scale[x.at], act->moment[x.at]);
            }
        }
    }
}

static void gemv(float *y, const fl_linear *w, int32_t block0, int32_t block1, const fl_act *act) {
    multiply(y, 0, w, block0, block1, act);
}

static void gemm(float *y, size_t stride, const fl_linear *w, int32_t block0, int32_t block1,
                 const fl_act *act, void *panel) {
    (void)panel;
    multiply(y, stride, w, block0, block1, act);
}

/* The arrays of one page. */
typedef struct {
    int8_t *k, *v;
    uint16_t *k_scales, *v_scales;
} page_view;

static page_view view_page(const fl_kv *kv, int32_t page) {
    uint8_t *base = kv->base + (size_t)kv->pages[page] * kv->page_bytes;
    size_t dim = (size_t)kv->head_dim, scales = (dim + FL_GROUP - 1) / FL_GROUP * 64;
    return (page_view){.k = (int8_t *)base,
                       .k_scales = (uint16_t *)(void *)(base + dim * 32),
                       .v = (int8_t *)(base + dim * 32 + scales),
                       .v_scales = (uint16_t *)(void *)(base + dim * 64 + scales)};
}

/* KV codes are taken against the scale as it is stored, rounded to half. */
static uint16_t quantize_half(int8_t codes[FL_GROUP], const float *x, int32_t n) {
    float scale = magnitude(x, n) / 127.0f;
    uint16_t half = fl_float_to_half(scale < 65504.0f ? scale : 65504.0f);
    encode(codes, x, half ? n : 0, half ? 1.0f / fl_half_to_float(half) : 0.0f);
    return half;
}

static void store_kv(const fl_kv *kv, int32_t position, const float *k, const float *v) {
    page_view page = view_page(kv, position / 32);
    size_t t = (size_t)position % 32;
    for (int32_t c = 0, g = 0; c < kv->head_dim; c += FL_GROUP, g++) {
        int32_t n = kv->head_dim - c < FL_GROUP ? kv->head_dim - c : FL_GROUP;
        int8_t codes[FL_GROUP];
        page.k_scales[(size_t)g * 32 + t] = quantize_half(codes, k + c, n);
        for (int32_t i = 0; i < n; i += 4) {
            memcpy(page.k + ((size_t)(c + i) / 4 * 32 + t) * 4, codes + i, 4);
        }
        page.v_scales[(size_t)g * 32 + t] = quantize_half(codes, v + c, n);
        int8_t *v = page.v + (t / 4 * (size_t)kv->head_dim + (size_t)c) * 4 + t % 4;
        for (int32_t i = 0; i < n; i++) v[4 * i] = codes[i];
    }
}

/* scores[t] = sum over groups of q . k_t */
static void score_page(float scores[32], const page_view *page, int32_t head_dim,
                       const int8_t *codes, const float *scales) {
    memset(scores, 0, 32 * sizeof *scores);
    for (int32_t c = 0, g = 0; c < head_dim; c += FL_GROUP, g++) {
        int32_t end = head_dim - c < FL_GROUP ? head_dim : c + FL_GROUP, dot[32] = {0};
        for (int32_t i = c; i < end; i += 4) {
            for (size_t t = 0; t < 32; t++) {
                dot[t] += dot4(page->k + ((size_t)i / 4 * 32 + t) * 4, codes + i);
            }
        }
        for (size_t t = 0; t < 32; t++) {
            float scale = fl_half_to_float(page->k_scales[(size_t)g * 32 + t]);
            scores[t] = fl_fma((float)dot[t], scale * scales[g], scores[t]);
        }
    }
}

/* out = out * factor + p V over the tokens [low, high] */
static void add_values(float *out, float factor, const page_view *page, int32_t head_dim,
                       const float p[32], int32_t low, int32_t high) {
    for (int32_t c = 0, g = 0; c < head_dim; c += FL_GROUP, g++) {
        int32_t end = head_dim - c < FL_GROUP ? head_dim : c + FL_GROUP;
        float weights[32] = {0};
        int8_t codes[32];
        for (int32_t t = low; t <= high; t++) {
            weights[t] = p[t] * fl_half_to_float(page->v_scales[g * 32 + t]);
        }
        float scale = quantize_group(codes, weights, 32);
        for (int32_t i = c; i < end; i++) {
            int32_t dot = 0;
            for (int32_t t4 = 0; t4 < 8; t4++) {
                dot += dot4(page->v + (t4 * head_dim + i) * 4, codes + 4 * t4);
            }
            out[i] = fl_fma(out[i], factor, (float)dot * scale);
        }
    }
}

static void attend_one(float *out, fl_mass *mass, const fl_kv *kv, const float *q, int32_t first,
                       int32_t last, void *scratch) {
    int32_t dim = kv->head_dim, groups = (dim + FL_GROUP - 1) / FL_GROUP;
    float *scales = scratch;
    int8_t *codes = (int8_t *)(scales + groups);
    for (int32_t g = 0; g < groups; g++) {
        int32_t n = dim - g * FL_GROUP < FL_GROUP ? dim - g * FL_GROUP : FL_GROUP;
        scales[g] = quantize_group(codes + g * FL_GROUP, q + g * FL_GROUP, n);
    }
    float m = -FLT_MAX, lanes[16] = {0};
    memset(out, 0, (size_t)dim * sizeof *out);
    *mass = (fl_mass){.max = m};
    if (first > last) return;
    for (int32_t p = first / 32; p <= last / 32; p++) {
        page_view page = view_page(kv, p);
        int32_t low = first > p * 32 ? first - p * 32 : 0;
        int32_t high = last < p * 32 + 31 ? last - p * 32 : 31;
        float scores[32];
        score_page(scores, &page, dim, codes, scales);
        float factor = fl_softmax_page(scores, low, high, &m, lanes);
        add_values(out, factor, &page, dim, scores, low, high);
    }
    *mass = (fl_mass){.max = m, .sum = fl_fold(lanes)};
    for (int32_t c = 0; c < dim; c++) out[c] /= mass->sum;
}

static void attend(float *out, fl_mass *mass, const fl_kv *kv, int32_t n_q, const float *q,
                   const int32_t *first, const int32_t *last, void *scratch) {
    for (int32_t i = 0; i < n_q; i++, q += kv->head_dim, out += kv->head_dim) {
        fl_mass own;
        attend_one(out, mass ? mass + i : &own, kv, q, first[i], last[i], scratch);
    }
}

/* Squares are summed in 16 lanes. */
void fl_plain_rmsnorm(float *y, const float *x, const float *weight, int32_t n, float eps) {
    float lanes[16] = {0};
    int32_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int32_t j = 0; j < 16; j++) lanes[j] = fl_fma(x[i + j], x[i + j], lanes[j]);
    }
    for (; i < n; i++) lanes[i % 16] = fl_fma(x[i], x[i], lanes[i % 16]);
    float scale = fl_rsqrt(fl_fold(lanes) / (float)n + eps);
    for (i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

void fl_plain_silu_mul(float *y, const float *gate, const float *up, int32_t n) {
    for (int32_t i = 0; i < n; i++) y[i] = fl_silu(gate[i]) * up[i];
}

void fl_plain_gelu_mul(float *y, const float *gate, const float *up, int32_t n) {
    for (int32_t i = 0; i < n; i++) y[i] = fl_gelu(gate[i]) * up[i];
}

/* Both sums in 16 lanes; the second over what is left when the mean is gone. */
void fl_plain_layernorm(float *y, const float *x, const float *weight, const float *bias, int32_t n,
                        float eps) {
    float sums[16] = {0}, squares[16] = {0};
    int32_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int32_t j = 0; j < 16; j++) sums[j] += x[i + j];
    }
    for (; i < n; i++) sums[i % 16] += x[i];
    float mean = fl_fold(sums) / (float)n;
    for (i = 0; i + 16 <= n; i += 16) {
        for (int32_t j = 0; j < 16; j++) {
            float rest = x[i + j] - mean;
            squares[j] = fl_fma(rest, rest, squares[j]);
        }
    }
    for (; i < n; i++) squares[i % 16] = fl_fma(x[i] - mean, x[i] - mean, squares[i % 16]);
    float scale = fl_rsqrt(fl_fold(squares) / (float)n + eps);
    for (i = 0; i < n; i++) y[i] = fl_fma((x[i] - mean) * scale, weight[i], bias[i]);
}

void fl_plain_gelu_erf(float *y, const float *x, int32_t n) {
    for (int32_t i = 0; i < n; i++) y[i] = fl_gelu_erf(x[i]);
}

const fl_kernels fl_kernels_plain = {
    .isa = "plain",
    .fp32 = 0,
    .quantize = quantize,
    .gemv = gemv,
    .gemm = gemm,
    .store_kv = store_kv,
    .attend = attend,
    .rmsnorm = fl_plain_rmsnorm,
    .silu_mul = fl_plain_silu_mul,
    .gelu_mul = fl_plain_gelu_mul,
    .layernorm = fl_plain_layernorm,
    .gelu_erf = fl_plain_gelu_erf,
};
