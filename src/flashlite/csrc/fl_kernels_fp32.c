/* flashlite: the FP32 test build. The same packed weights, but activations, keys and values stay
 * floats, so that a compiled model can be compared with the FP32 reference without the noise of
 * INT8. Not for speed. */
#include "fl_kernels.h"
#include "fl_math.h"

/* "Quantizing" is a copy, zeros after the last column. */
static void quantize(fl_act *act, int32_t t, int32_t group0, int32_t group1, const float *x,
                     int32_t cols) {
    size_t width = (size_t)act->width, lane = (size_t)t % width;
    size_t first = (size_t)t / width * (size_t)act->groups * FL_GROUP;
    float *to = (float *)(void *)act->codes + first * width + lane;
    for (int32_t c = group0 * FL_GROUP; c < group1 * FL_GROUP; c++) {
        to[(size_t)c * width] = c < cols ? *x++ : 0.0f;
    }
}

/* One group of one block as floats [column][row]. */
static void unpack(float weights[FL_GROUP][FL_BLOCK_ROWS], const fl_linear *w, size_t group) {
    for (size_t r = 0; r < FL_BLOCK_ROWS; r++) {
        float scale = fl_half_to_float(w->scales[group * FL_BLOCK_ROWS + r]), min = 0.0f;
        if (w->format == FL_Q4M) min = fl_half_to_float(w->mins[group * FL_BLOCK_ROWS + r]);
        for (size_t c = 0; c < FL_GROUP; c++) {
            int code;
            if (w->format == FL_Q8) {
                code = (int8_t)w->codes[group * 512 + c / 4 * 64 + r * 4 + c % 4];
            } else {
                const uint8_t *codes = w->codes + group * fl_code_bytes(w->format);
                code = fl_code_at(w->format, codes, r, c) - fl_zero_code(w->format);
            }
            weights[c][r] = (float)code * scale + min;
        }
    }
}

/* Each group is unpacked once and added to all tokens; y itself accumulates. */
static void multiply(float *y, size_t stride, const fl_linear *w, int32_t block0, int32_t block1,
                     const fl_act *act) {
    size_t width = (size_t)act->width, groups = (size_t)w->groups, tokens = (size_t)act->n;
    for (size_t b = (size_t)block0; b < (size_t)block1; b++, y += FL_BLOCK_ROWS) {
        for (size_t t = 0; t < tokens; t++) {
            memset(y + t * stride, 0, FL_BLOCK_ROWS * sizeof *y);
        }
        for (size_t g = 0; g < groups; g++) {
            float weights[FL_GROUP][FL_BLOCK_ROWS];
            unpack(weights, w, b * groups + g);
            for (size_t t = 0; t < tokens; t++) {
                size_t first = (t / width * (size_t)act->groups + g) * FL_GROUP;
                const float *x = (const float *)(void *)act->codes + first * width + t % width;
                float sum[FL_BLOCK_ROWS] = {0};
                for (size_t c = 0; c < FL_GROUP; c++) {
                    for (size_t r = 0; r < FL_BLOCK_ROWS; r++) {
                        sum[r] += weights[c][r] * x[c * width];
                    }
                }
                for (size_t r = 0; r < FL_BLOCK_ROWS; r++) y[t * stride + r] += sum[r];
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

/* Keys [head_dim][32] of one page; its values [32][head_dim] follow. */
static float *view_page(const fl_kv *kv, int32_t page) {
    return (float *)(void *)(kv->base + (size_t)kv->pages[page] * kv->page_bytes);
}

static void store_kv(const fl_kv *kv, int32_t position, const float *k, const float *v) {
    size_t t = (size_t)position % 32, dim = (size_t)kv->head_dim;
    float *page = view_page(kv, position / 32);
    for (size_t c = 0; c < dim; c++) page[c * 32 + t] = k[c];
    memcpy(page + dim * 32 + t * dim, v, dim * sizeof *v);
}

static void attend_one(float *out, fl_mass *mass, const fl_kv *kv, const float *q, int32_t first,
                       int32_t last) {
    size_t dim = (size_t)kv->head_dim;
    float m = -FLT_MAX, lanes[16] = {0};
    memset(out, 0, dim * sizeof *out);
    *mass = (fl_mass){.max = m};
    if (first > last) return;
    for (int32_t p = first / 32; p <= last / 32; p++) {
        const float *keys = view_page(kv, p), *values = keys + dim * 32;
        int32_t low = first > p * 32 ? first - p * 32 : 0;
        int32_t high = last < p * 32 + 31 ? last - p * 32 : 31;
        float scores[32] = {0};
        for (size_t c = 0; c < dim; c++) {
            for (size_t t = 0; t < 32; t++) {
                scores[t] += q[c] * keys[c * 32 + t];
            }
        }
        float factor = fl_softmax_page(scores, low, high, &m, lanes);
        for (size_t c = 0; c < dim; c++) out[c] *= factor;
        for (int32_t t = low; t <= high; t++) {
            const float *v = values + (size_t)t * dim;
            for (size_t c = 0; c < dim; c++) out[c] += scores[t] * v[c];
        }
    }
    *mass = (fl_mass){.max = m, .sum = fl_fold(lanes)};
    for (size_t c = 0; c < dim; c++) out[c] /= mass->sum;
}

static void attend(float *out, fl_mass *mass, const fl_kv *kv, int32_t n_q, const float *q,
                   const int32_t *first, const int32_t *last, void *scratch) {
    (void)scratch;
    for (int32_t i = 0; i < n_q; i++, q += kv->head_dim, out += kv->head_dim) {
        fl_mass own;
        attend_one(out, mass ? mass + i : &own, kv, q, first[i], last[i]);
    }
}

const fl_kernels fl_kernels_fp32 = {
    .isa = "fp32",
    .fp32 = 1,
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
