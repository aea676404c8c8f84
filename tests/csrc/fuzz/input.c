/* Inputs, buffers and verdicts (fuzz.h). Also runs without an operating system (bare_pc). */
#define _POSIX_C_SOURCE 200112L /* posix_memalign */
#include "fuzz.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fl_math.h"

/* ---- numbers ---- */

fz_input fz_open(const uint8_t *data, size_t size) {
    fz_input in = {.at = data, .end = data + size, .state = 0xcbf29ce484222325u};
    for (size_t i = 0; i < size; i++) in.state = (in.state ^ data[i]) * 0x100000001b3u; /* FNV-1a */
    in.state |= 1; /* xorshift stays at 0 for ever */
    return in;
}

uint64_t fz_random(fz_input *in) { /* xorshift64* */
    in->state ^= in->state >> 12;
    in->state ^= in->state << 25;
    in->state ^= in->state >> 27;
    return in->state * 0x2545f4914f6cdd1du;
}

/* n <= 4 bytes, of the input as long as it has any. */
static uint32_t take(fz_input *in, size_t n) {
    if (in->at == in->end) return (uint32_t)(fz_random(in) >> (64 - 8 * n));
    uint32_t x = 0;
    for (size_t i = 0; i < n; i++) x = x << 8 | (in->at < in->end ? *in->at++ : 0u);
    return x;
}

uint32_t fz_below(fz_input *in, uint32_t n) { return take(in, n <= 256 ? 1 : 2) % n; }

int32_t fz_between(fz_input *in, int32_t low, int32_t high) {
    return low + (int32_t)fz_below(in, (uint32_t)(high - low) + 1);
}

int fz_rarely(fz_input *in) { return fz_below(in, 32) == 31; }

uint32_t fz_bits(fz_input *in) {
    static const uint32_t edges[] = {0,          1,          0x7fffffff, 0x80000000, 0xffffffff,
                                     0xfffffffe, 0x10000000, 0x40000000, 255,        256,
                                     257,        65535,      65536};
    uint32_t kind = fz_below(in, 32);
    return kind < sizeof edges / sizeof *edges ? edges[kind] : take(in, 4);
}

/* ---- memory ---- */

#define MAX_BLOCKS 256

static void *blocks[MAX_BLOCKS];
static size_t n_blocks;

void *fz_get_shifted(size_t size, size_t shift) {
    void *p = NULL;
    fz_require(n_blocks < MAX_BLOCKS &&
                   posix_memalign(&p, FL_ALIGN, shift + size ? shift + size : 1) == 0,
               "memory for the fuzzer");
    memset(p, 0x55, shift + size);
    blocks[n_blocks++] = p;
    return (uint8_t *)p + shift;
}

void *fz_get(size_t size) { return fz_get_shifted(size, 0); }

void fz_release(void) {
    while (n_blocks) free(blocks[--n_blocks]);
}

/* ---- arrays ---- */

enum { ORDINARY, SMALL, SPRINKLED, HALVES, TOP_BITS, ANY_BITS, ODD, FAR, N_STYLES };

static float odd(uint32_t i) {
    static const uint32_t bits[] = {
        0x00000000, 0x80000000, /* zeros */
        0x7f800000, 0xff800000, 0x7fc00000, 0xffc00000, 0x7f800001, /* infinities, NaN */
        0x00000001, 0x80000001, 0x007fffff, 0x00800000, /* subnormals, the least normal */
        0x7f7fffff, 0xff7fffff, /* the largest */
        0x0da24260, 0x0da2425f, /* FL_QUANT_TINY, and just below */
        0x3f800000, 0xbf800000, 0x42fe0000, 0xc2fe0000, 0x3f000000, /* 1, 127, a half */
        0x4afe0000, 0x4afdfffe, /* 127 * 65504: where scales of KV are clamped */
        0x42ae0000, 0xc2ae0000, 0x42b00000, 0x42b00001, /* 87 and 88: ends of exp */
    };
    return fl_bits_float(bits[i % (sizeof bits / sizeof *bits)]);
}

static float ordinary(fz_input *in) { return (float)(int16_t)take(in, 2) / 8192.0f; }

static float of_style(fz_input *in, uint32_t style, float far) {
    switch (style) {
    case SMALL: return ((float)take(in, 1) - 128.0f) / 2.0f; /* halves of a code: ties */
    case SPRINKLED: return fz_below(in, 16) ? ordinary(in) : odd(take(in, 1));
    case HALVES: return fl_half_to_float((uint16_t)take(in, 2));
    case TOP_BITS: return fl_bits_float(take(in, 2) << 16);
    case ANY_BITS: return fl_bits_float(take(in, 4));
    case ODD: return odd(take(in, 1));
    case FAR: return ordinary(in) * far;
    default: return ordinary(in);
    }
}

float fz_float(fz_input *in) { return of_style(in, fz_below(in, N_STYLES), 1e6f); }

float *fz_floats_empty(fz_input *in, size_t n) {
    return fz_get_shifted(n * sizeof(float), 4 * (size_t)fz_below(in, 16));
}

float *fz_floats(fz_input *in, size_t n) {
    float *x = fz_floats_empty(in, n);
    uint32_t style = fz_below(in, 2 * N_STYLES); /* half of all arrays are ordinary */
    float far = style == FAR ? fl_bits_float(fz_below(in, 256) << 23) : 1.0f;
    for (size_t i = 0; i < n; i++) x[i] = of_style(in, style, far);
    return x;
}

void fz_bytes(fz_input *in, void *to, size_t size) {
    static const uint8_t extremes[] = {0x80, 0x7f, 0x81, 0xff, 0x00, 0x0f, 0xf0, 0x01};
    uint8_t *p = to;
    uint32_t style = fz_below(in, 8), one = fz_below(in, 256);
    if (style == 0) {
        memset(p, (int)one, size);
        return;
    }
    for (size_t i = 0; i < size && in->at < in->end && style > 1; i++, p++, size--) *p = *in->at++;
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word = fz_random(in);
        uint8_t eight[8];
        memcpy(eight, &word, 8);
        for (size_t j = 0; j < 8 && style == 1; j++) eight[j] = extremes[eight[j] % 8];
        memcpy(p + i, eight, size - i < 8 ? size - i : 8);
    }
}

uint16_t *fz_halves(fz_input *in, size_t n) {
    uint16_t *x = fz_get(n * sizeof *x);
    uint32_t style = fz_below(in, 4);
    fz_bytes(in, x, n * sizeof *x);
    /* Mostly scales as artifacts hold them: either sign, 2^-7 to 2^-3. */
    for (size_t i = 0; i < n && style; i++) {
        x[i] = (uint16_t)((x[i] & 0x8000u) | (0x2000u + (x[i] & 0xfffu)));
    }
    return x;
}

/* ---- verdicts ---- */

static _Noreturn void fail(const char *what, const char *table, size_t at, double ours,
                           double oracle) {
    printf("%s of %s differs at %zu: %.9g, plain %.9g\n", what, table, at, ours, oracle);
    fflush(NULL);
    abort();
}

void fz_same(const char *what, const char *table, const void *ours, const void *oracle,
             size_t size) {
    const uint8_t *a = ours, *b = oracle;
    if (memcmp(a, b, size) == 0) return;
    size_t i = 0;
    while (a[i] == b[i]) i++;
    fail(what, table, i, a[i], b[i]);
}

void fz_same_floats(const char *what, const char *table, const float *ours, const float *oracle,
                    size_t n) {
    if (memcmp(ours, oracle, n * sizeof *ours) == 0) return;
    for (size_t i = 0; i < n; i++) {
        if (fl_float_bits(ours[i]) == fl_float_bits(oracle[i])) continue;
        if (ours[i] != ours[i] && oracle[i] != oracle[i]) continue;
        fail(what, table, i, (double)ours[i], (double)oracle[i]);
    }
}

void fz_require(int holds, const char *what) {
    if (holds) return;
    printf("broken promise: %s\n", what);
    fflush(NULL);
    abort();
}
