/* Random calls of one table of kernels with buffers of exactly the promised size, for the address
 * and undefined-behaviour sanitizers; results are compared with the plain table in passing.
 *
 *     cc ... -DFUZZ_TABLE=fl_kernels_avx2 fuzz_kernels.c fl_kernels_*.c -o fuzz && ./fuzz ROUNDS
 */
#define _GNU_SOURCE /* posix_memalign, syscall */
#include <stdio.h>
#include <stdlib.h>

#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "fl_kernels.h"
#include "fl_math.h"

extern const fl_kernels FUZZ_TABLE;

static uint64_t state = 88172645463325252u;

static uint32_t draw(uint32_t below) { /* xorshift64 */
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 33) % below;
}

/* Exact size, and aligned to 64: what lies behind is out of bounds for the sanitizer. */
static void *get(size_t size) {
    void *p = NULL;
    if (posix_memalign(&p, FL_ALIGN, size ? size : 1)) exit(2);
    memset(p, 0x55, size ? size : 1);
    return p;
}

static void bytes(void *p, size_t size) {
    for (size_t i = 0; i < size; i++) ((uint8_t *)p)[i] = (uint8_t)draw(256);
}

static uint16_t half(void) { return (uint16_t)((draw(2) << 15) | (0x2000 + draw(0x1000))); }

/* Ordinary values; now and then any bits: NaN, infinity, subnormals. */
static float *floats(size_t n, int wild) {
    float *x = get(n * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        x[i] = ((float)draw(20001) - 10000.0f) / 5000.0f;
        if (wild && draw(8) == 0) x[i] = fl_bits_float(draw(65536) << 16 | draw(65536));
    }
    return x;
}

static void fail(const char *what, size_t at, double ours, double oracle) {
    printf("%s differs at %zu: %.9g, plain %.9g\n", what, at, ours, oracle);
    exit(1);
}

static void compare(const char *what, const float *ours, const float *oracle, size_t n) {
    if (FUZZ_TABLE.fp32) return; /* other arithmetic: only its memory is tested here */
    float reach = 0;
    for (size_t i = 0; i < n; i++) reach = fabsf(oracle[i]) > reach ? fabsf(oracle[i]) : reach;
    for (size_t i = 0; i < n; i++) {
        if (!(fabsf(ours[i] - oracle[i]) <= 1e-5f * reach)) fail(what, i, ours[i], oracle[i]);
    }
}

static fl_act new_act(int32_t n, int32_t cols) {
    fl_act a = {.n = n, .width = fl_act_width(&FUZZ_TABLE, n), .groups = (cols + 31) / 32};
    size_t width = (size_t)a.width, groups = (size_t)a.groups;
    size_t tokens = ((size_t)n + width - 1) / width * width;
    size_t step = FUZZ_TABLE.fp32 ? 32 * 4 : 8 * 4;
    a.codes = get(tokens * groups * step);
    a.scale = get(tokens * groups * 4);
    a.moment = get(tokens * groups * 4);
    a.offset = get(tokens * groups * 4);
    memset(a.codes, 0, tokens * groups * step);
    memset(a.scale, 0, tokens * groups * 4);
    memset(a.moment, 0, tokens * groups * 4);
    memset(a.offset, 0, tokens * groups * 4);
    return a;
}

static void free_act(fl_act *a) {
    free(a->codes);
    free(a->scale);
    free(a->moment);
    free(a->offset);
}

static void quantize(const fl_kernels *k, fl_act *act, const float *x, int32_t cols) {
    int32_t cut = act->groups > 1 ? (int32_t)draw((uint32_t)act->groups) : 0;
    for (int32_t t = 0; t < act->n; t++) {
        const float *row = x + (size_t)t * (size_t)cols;
        if (cut) k->quantize(act, t, 0, cut, row, cols);
        k->quantize(act, t, cut, act->groups, row + cut * 32, cols);
    }
}

static void fuzz_linear(int wild) {
    int32_t rows = 1 + (int32_t)draw(70), cols = 1 + (int32_t)draw(300);
    int32_t n = draw(3) ? 1 + (int32_t)draw(20) : 1;
    fl_linear w = {.format = (fl_format)draw(3), .rows = rows, .cols = cols};
    w.blocks = (rows + 15) / 16;
    w.groups = (cols + 31) / 32;
    size_t groups = (size_t)w.blocks * (size_t)w.groups;
    uint8_t *codes = get(groups * (w.format == FL_Q8 ? 512 : 256));
    uint16_t *scales = get(groups * 32), *mins = w.format == FL_Q4M ? get(groups * 32) : NULL;
    bytes(codes, groups * (w.format == FL_Q8 ? 512 : 256));
    for (size_t i = 0; i < groups * 16; i++) scales[i] = half();
    for (size_t i = 0; mins && i < groups * 16; i++) mins[i] = half();
    w.codes = codes;
    w.scales = scales;
    w.mins = mins;
    float *x = floats((size_t)n * (size_t)cols, wild);
    fl_act act = new_act(n, cols);
    quantize(&FUZZ_TABLE, &act, x, cols);
    int32_t block0 = (int32_t)draw((uint32_t)w.blocks);
    int32_t block1 = block0 + 1 + (int32_t)draw((uint32_t)(w.blocks - block0));
    size_t width = (size_t)(block1 - block0) * 16, stride = width + draw(3);
    size_t tokens = (size_t)n, size = (tokens - 1) * stride + width;
    float *y = get(size * 4), *oracle = get(size * 4);
    memset(y, 0, size * 4);
    memset(oracle, 0, size * 4);
    void *panel = get(FL_PANEL_BYTES(w.groups));
    if (n == 1) {
        FUZZ_TABLE.gemv(y, &w, block0, block1, &act);
    } else {
        FUZZ_TABLE.gemm(y, stride, &w, block0, block1, &act, panel);
    }
    if (!FUZZ_TABLE.fp32) { /* the plain table reads codes, not floats */
        fl_act same = new_act(n, cols);
        quantize(&fl_kernels_plain, &same, x, cols);
        size_t tile = (size_t)act.width, padded = (tokens + tile - 1) / tile * tile;
        size_t codes_size = padded * (size_t)w.groups * 32;
        if (memcmp(act.codes, same.codes, codes_size)) fail("codes", 0, 0, 0);
        if (memcmp(act.offset, same.offset, codes_size / 8)) fail("offsets", 0, 0, 0);
        if (memcmp(act.moment, same.moment, codes_size / 8)) fail("moments", 0, 0, 0);
        if (n == 1) {
            fl_kernels_plain.gemv(oracle, &w, block0, block1, &act);
        } else {
            fl_kernels_plain.gemm(oracle, stride, &w, block0, block1, &act, panel);
        }
        if (!wild) compare("product", y, oracle, size);
        free_act(&same);
    }
    free(y), free(oracle), free(panel), free(x), free(codes), free(scales), free(mins);
    free_act(&act);
}

static void fuzz_attend(int wild) {
    int32_t dim = 4 * (1 + (int32_t)draw(40)), tokens = 1 + (int32_t)draw(150);
    int32_t n = 1 + (int32_t)draw(FL_MAX_QUERIES), pages = (tokens + 31) / 32;
    size_t page = fl_kv_bytes(dim, FUZZ_TABLE.fp32);
    int32_t *ids = get((size_t)pages * sizeof *ids);
    fl_kv kv = {.base = get(page * (size_t)pages), .page_bytes = page, .pages = ids};
    fl_kv other = {.base = get(page * (size_t)pages), .page_bytes = page, .pages = ids};
    kv.head_dim = other.head_dim = dim;
    bytes(kv.base, page * (size_t)pages);
    memcpy(other.base, kv.base, page * (size_t)pages);
    for (int32_t i = 0; i < pages; i++) ids[i] = pages - 1 - i;
    for (int32_t t = 0; t < tokens; t++) {
        float *k = floats((size_t)dim, wild), *v = floats((size_t)dim, wild);
        FUZZ_TABLE.store_kv(&kv, t, k, v);
        if (!FUZZ_TABLE.fp32) fl_kernels_plain.store_kv(&other, t, k, v);
        free(k), free(v);
    }
    if (!FUZZ_TABLE.fp32 && memcmp(kv.base, other.base, page * (size_t)pages)) {
        fail("pages", 0, 0, 0);
    }
    size_t size = (size_t)n * (size_t)dim;
    float *q = floats(size, wild), *out = get(size * 4), *oracle = get(size * 4);
    int32_t *first = get((size_t)n * 4), *last = get((size_t)n * 4);
    for (int32_t i = 0; i < n; i++) {
        last[i] = (int32_t)draw((uint32_t)tokens);
        first[i] = draw(2) ? 0 : (int32_t)draw((uint32_t)last[i] + 1);
        if (draw(50) == 0) first[i] = last[i] + 1;
    }
    void *scratch = get(FL_ATTEND_BYTES(dim));
    FUZZ_TABLE.attend(out, &kv, n, q, first, last, scratch);
    if (!FUZZ_TABLE.fp32 && !wild) {
        fl_kernels_plain.attend(oracle, &kv, n, q, first, last, scratch);
        compare("attention", out, oracle, size);
    }
    free(ids), free(kv.base), free(other.base), free(q), free(out), free(oracle);
    free(first), free(last), free(scratch);
}

static void fuzz_rows(int wild) {
    size_t n = 1 + draw(200);
    float *x = floats(n, wild), *w = floats(n, wild), *y = get(n * 4), *oracle = get(n * 4);
    const fl_kernels *p = &fl_kernels_plain;
    FUZZ_TABLE.rmsnorm(y, x, w, (int32_t)n, 1e-6f);
    p->rmsnorm(oracle, x, w, (int32_t)n, 1e-6f);
    if (!wild) compare("rmsnorm", y, oracle, n);
    FUZZ_TABLE.silu_mul(y, x, w, (int32_t)n);
    p->silu_mul(oracle, x, w, (int32_t)n);
    if (!wild) compare("silu", y, oracle, n);
    FUZZ_TABLE.gelu_mul(y, x, w, (int32_t)n);
    p->gelu_mul(oracle, x, w, (int32_t)n);
    if (!wild) compare("gelu", y, oracle, n);
    free(x), free(w), free(y), free(oracle);
}

int main(int argc, char **argv) {
#if defined(__AMX_TILE__)
    syscall(SYS_arch_prctl, 0x1023, 18); /* the process may use tiles */
#endif
    int rounds = argc > 1 ? atoi(argv[1]) : 100;
    for (int i = 0; i < rounds; i++) {
        fuzz_linear(i % 3 == 2);
        fuzz_attend(i % 3 == 2);
        fuzz_rows(i % 3 == 2);
    }
    printf("%s: %d rounds\n", FUZZ_TABLE.isa, rounds);
    return 0;
}
