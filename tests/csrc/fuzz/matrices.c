/* Quantized activations and their products with packed matrices: quantize, gemv, gemm. */
#include <math.h>
#include <string.h>

#include "fuzz.h"

/* Room for the activations of n tokens, as `k` stores them. */
typedef struct {
    fl_act act;
    size_t code_bytes, cells; /* cells: of scale, moment and offset each */
} room;

static room make_room(const fl_kernels *k, int32_t n, int32_t tile, int32_t groups) {
    room r = {.act = {.n = n, .width = n == 1 ? 1 : tile, .groups = groups}};
    size_t width = (size_t)r.act.width, tiles = ((size_t)n + width - 1) / width;
    size_t cells = tiles * width * (size_t)groups;
    r.code_bytes = cells * FL_GROUP * (k->fp32 ? sizeof(float) : 1);
    r.cells = k->fp32 ? 0 : cells;
    r.act.codes = fz_get(r.code_bytes);
    r.act.scale = fz_get(r.cells * sizeof(float));
    r.act.moment = fz_get(r.cells * sizeof(float));
    r.act.offset = fz_get(r.cells * sizeof(int32_t));
    return r;
}

/* One token of several, one run of its groups. */
void fz_quantize(fz_input *in) {
    int32_t n = fz_below(in, 3) ? 1 : fz_between(in, 2, 13), t = fz_between(in, 0, n - 1);
    int32_t tile = fz_below(in, 2) ? FL_TILE : FL_TALL_TILE;
    int32_t groups = fz_between(in, 1, 7), cols = groups * FL_GROUP - fz_between(in, 0, 31);
    int32_t group0 = fz_between(in, 0, groups - 1), group1 = fz_between(in, group0, groups);
    int32_t end = group1 * FL_GROUP < cols ? group1 * FL_GROUP : cols;
    int32_t values = end > group0 * FL_GROUP ? end - group0 * FL_GROUP : 0;
    const float *x = fz_floats(in, (size_t)values);
    room oracle = make_room(fz_tables[0], n, tile, groups);
    fz_tables[0]->quantize(&oracle.act, t, group0, group1, x, cols);
    for (size_t i = 1; i < fz_n_tables; i++) {
        const fl_kernels *k = fz_tables[i];
        room r = make_room(k, n, tile, groups);
        k->quantize(&r.act, t, group0, group1, x, cols);
        if (k->fp32) continue;
        fz_same("codes of quantize", k->isa, r.act.codes, oracle.act.codes, r.code_bytes);
        fz_same("scale of quantize", k->isa, r.act.scale, oracle.act.scale, r.cells * 4);
        fz_same("offset of quantize", k->isa, r.act.offset, oracle.act.offset, r.cells * 4);
        fz_same_floats("moment of quantize", k->isa, r.act.moment, oracle.act.moment, r.cells);
    }
}

/* Activations with any codes in -127..127, and the same as the FP32 table holds them. */
static void make_activations(fz_input *in, int32_t n, int32_t groups, fl_act *whole, fl_act *fp32) {
    room r = make_room(fz_tables[0], n, FL_TILE, groups);
    size_t width = (size_t)r.act.width;
    int8_t *codes = (int8_t *)r.act.codes;
    fz_bytes(in, codes, r.code_bytes);
    for (size_t i = 0; i < r.code_bytes; i++) codes[i] = codes[i] == -128 ? -127 : codes[i];
    const float *scales = fz_floats(in, r.cells);
    for (size_t i = 0; i < r.cells; i++) {
        int32_t sum = 0;
        for (size_t j = 0; j < FL_GROUP; j++) {
            sum += codes[(i / width * 8 * width + j / 4 * width + i % width) * 4 + j % 4];
        }
        r.act.scale[i] = scales[i] == scales[i] ? fabsf(scales[i]) : 0.0f; /* never NaN */
        r.act.moment[i] = r.act.scale[i] * (float)sum;
        r.act.offset[i] = -128 * sum;
    }
    *whole = r.act;
    room f = {0};
    for (size_t i = 1; i < fz_n_tables; i++) {
        if (!fz_tables[i]->fp32) continue;
        f = make_room(fz_tables[i], n, FL_TILE, groups);
        float *values = (float *)(void *)f.act.codes;
        for (size_t j = 0; j < f.code_bytes / sizeof(float); j++)
            values[j] = (float)codes[j] / 64.0f;
    }
    *fp32 = f.act;
}

/* The same activations in tall tiles. */
static fl_act make_tall(const fl_act *from) {
    fl_act to = make_room(fz_tables[0], from->n, FL_TALL_TILE, from->groups).act;
    for (size_t t = 0; t < (size_t)from->n; t++) {
        for (size_t g = 0; g < (size_t)from->groups; g++) {
            fl_act_group a = fl_act_find(from, t, g), b = fl_act_find(&to, t, g);
            for (size_t k4 = 0; k4 < 8; k4++) b.codes[k4 * b.step] = a.codes[k4 * a.step];
            to.scale[b.at] = from->scale[a.at];
            to.moment[b.at] = from->moment[a.at];
            to.offset[b.at] = from->offset[a.at];
        }
    }
    return to;
}

static void fuzz_product(fz_input *in, int32_t n, int32_t most_groups, int32_t most_blocks) {
    int32_t groups = fz_between(in, 1, most_groups), blocks = fz_between(in, 1, most_blocks);
    int32_t block0 = fz_between(in, 0, blocks - 1), block1 = fz_between(in, block0 + 1, blocks);
    fl_linear w = {.format = (fl_format)fz_below(in, 5), .blocks = blocks, .groups = groups};
    w.rows = blocks * FL_BLOCK_ROWS - fz_between(in, 0, FL_BLOCK_ROWS - 1);
    w.cols = groups * FL_GROUP - fz_between(in, 0, FL_GROUP - 1);
    size_t cells = (size_t)blocks * (size_t)groups, bytes = cells * fl_code_bytes(w.format);
    uint8_t *codes = fz_get(bytes);
    fz_bytes(in, codes, bytes);
    w.codes = codes;
    w.scales = fz_halves(in, cells * FL_BLOCK_ROWS);
    w.mins = w.format == FL_Q4M ? fz_halves(in, cells * FL_BLOCK_ROWS) : NULL;
    fl_act whole, fp32;
    make_activations(in, n, groups, &whole, &fp32);
    fl_act tall = make_tall(&whole);
    size_t width = (size_t)(block1 - block0) * FL_BLOCK_ROWS, stride = width + fz_below(in, 4);
    size_t size = (size_t)(n - 1) * stride + width;
    const float *oracle = NULL;
    int with_fp32 = fz_below(in, 4) == 0; /* it is slow, and nothing but its memory is tested */
    for (size_t i = 0; i < fz_n_tables; i++) {
        const fl_kernels *k = fz_tables[i];
        const fl_act *act = k->fp32 ? &fp32 : fl_act_width(k, n) == FL_TALL_TILE ? &tall : &whole;
        if (k->fp32 && !with_fp32) continue;
        float *y = fz_floats_empty(in, size);
        if (n == 1) {
            k->gemv(y, &w, block0, block1, act);
        } else {
            k->gemm(y, stride, &w, block0, block1, act, fz_get(FL_PANEL_BYTES(groups)));
        }
        if (i == 0) oracle = y;
        /* What lies between the rows is compared too: nobody may write there. */
        if (!k->fp32) fz_same_floats(n == 1 ? "gemv" : "gemm", k->isa, y, oracle, size);
    }
}

void fz_gemv(fz_input *in) { fuzz_product(in, 1, 6, 4); }

void fz_gemm(fz_input *in) {
    switch (fz_below(in, 8)) {
    case 0: fuzz_product(in, fz_between(in, 48, 62), 2, 3); break; /* unpacked panels */
    case 1: fuzz_product(in, fz_between(in, 13, 26), 3, 3); break;
    default: fuzz_product(in, fz_between(in, 2, 13), 3, 4); break;
    }
}
