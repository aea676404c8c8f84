/* Kernels of whole rows of floats: norms, gated and plain activations. */
#include <string.h>

#include "fuzz.h"

typedef void row_kernel(const fl_kernels *k, float *y, const float *a, const float *b, int32_t n,
                        float eps);

static void rmsnorm(const fl_kernels *k, float *y, const float *a, const float *b, int32_t n,
                    float eps) {
    k->rmsnorm(y, a, b, n, eps);
}

static void silu_mul(const fl_kernels *k, float *y, const float *a, const float *b, int32_t n,
                     float eps) {
    (void)eps;
    k->silu_mul(y, a, b, n);
}

static void gelu_mul(const fl_kernels *k, float *y, const float *a, const float *b, int32_t n,
                     float eps) {
    (void)eps;
    k->gelu_mul(y, a, b, n);
}

static void gelu_erf(const fl_kernels *k, float *y, const float *a, const float *b, int32_t n,
                     float eps) {
    (void)b, (void)eps;
    k->gelu_erf(y, a, n);
}

/* The one row of weights is that of biases too. */
static void layernorm(const fl_kernels *k, float *y, const float *a, const float *b, int32_t n,
                      float eps) {
    k->layernorm(y, a, b, b, n, eps);
}

static void fuzz_row(fz_input *in, const char *what, row_kernel *call) {
    static const float epsilons[] = {1e-5f, 1e-6f, 0.0f, 1.0f};
    size_t n = 1 + fz_below(in, fz_below(in, 4) ? 40 : 200);
    float eps = epsilons[fz_below(in, 4)];
    const float *a = fz_floats(in, n), *b = fz_floats(in, n);
    float *oracle = fz_floats_empty(in, n);
    int in_place = fz_below(in, 2); /* as the engine calls them */
    call(fz_tables[0], oracle, a, b, (int32_t)n, eps);
    for (size_t i = 0; i < fz_n_tables; i++) {
        float *y = fz_floats_empty(in, n);
        if (in_place) memcpy(y, a, n * sizeof *y);
        call(fz_tables[i], y, in_place ? y : a, b, (int32_t)n, eps);
        fz_same_floats(what, fz_tables[i]->isa, y, oracle, n);
    }
}

void fz_rmsnorm(fz_input *in) { fuzz_row(in, "rmsnorm", rmsnorm); }
void fz_silu_mul(fz_input *in) { fuzz_row(in, "silu_mul", silu_mul); }
void fz_gelu_mul(fz_input *in) { fuzz_row(in, "gelu_mul", gelu_mul); }
void fz_layernorm(fz_input *in) { fuzz_row(in, "layernorm", layernorm); }
void fz_gelu_erf(fz_input *in) { fuzz_row(in, "gelu_erf", gelu_erf); }
