/* flashlite: the kernels for AMX (amx-tile, amx-int8: Intel Sapphire Rapids and later): those of
 * AVX-512, and products over many tokens by tiles.
 *
 * One tdpbssd multiplies 16 tokens x 32 columns by 32 columns x 16 rows of weights: a group of one
 * packed block. Its 256 sums are stored and added to the accumulators in floats, which takes most of
 * the time: 16 vectors of three or four steps for every tile of integers.
 */
#define FL_FUNCTIONS_ALONE
#include "fl_kernels_avx512.c"

/* Tiles by number; gcc wants to see digits. */
#define SUMS0 0
#define SUMS1 1
#define TOKENS0 2
#define TOKENS1 3
#define WEIGHTS0 4
#define WEIGHTS1 5

/* What ldtilecfg reads: palette, first row, bytes of a row and rows by number of tile. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} SHAPES = {
    .palette = 1,
    .row_bytes = {64, 64, FL_GROUP, FL_GROUP, 64, 64},
    .rows = {FL_TALL_TILE, FL_TALL_TILE, FL_TALL_TILE, FL_TALL_TILE, FL_GROUP / 4, FL_GROUP / 4},
};

/* One group of a row block, made ready for tiles. */
typedef struct {
    uint8_t codes[8 * 64]; /* s8; of q8 none: they lie in the artifact as tiles do */
    float scale[FL_BLOCK_ROWS], min[FL_BLOCK_ROWS];
} tile_group;

INLINE void unpack_tiles(fl_format format, tile_group *to, const fl_linear *w, int32_t block) {
    cursor at = cursor_at(format, w, block);
    for (int32_t g = 0; g < w->groups; g++, to++, advance(format, &at)) {
        UNROLL for (size_t k4 = 0; k4 < 8 && format != FL_Q8; k4++) {
            __m512i four = columns(format, at.codes, k4);
            if (format == FL_Q4) four = _mm512_sub_epi8(four, _mm512_set1_epi8(8));
            _mm512_store_si512(to->codes + 64 * k4, four);
        }
        _mm512_store_ps(to->scale, load_half(at.scales));
        if (format == FL_Q4M) _mm512_store_ps(to->min, load_half(at.mins));
    }
    __asm__ volatile("" : : : "memory"); /* tile loads do not tell the compiler what they read */
}

/* Sums of one or two groups of one block and 16 tokens. */
typedef struct {
    _Alignas(64) int32_t of[2][FL_TALL_TILE][FL_BLOCK_ROWS];
} tile_sums;

/* Where the next two groups of a row block and of a tile of tokens are. */
typedef struct {
    const uint8_t *weights;
    const int8_t *x;
    size_t row; /* bytes from one token to the next */
} operands;

/* Multiply `n` = 1 or 2 groups; the second lies `step` bytes behind the first. */
INLINE void begin_products(const operands *of, size_t n, size_t step) {
    _tile_zero(SUMS0);
    _tile_loadd(TOKENS0, of->x, of->row);
    _tile_loadd(WEIGHTS0, of->weights, 64);
    _tile_dpbssd(SUMS0, TOKENS0, WEIGHTS0);
    if (n < 2) return;
    _tile_zero(SUMS1);
    _tile_loadd(TOKENS1, of->x + FL_GROUP, of->row);
    _tile_loadd(WEIGHTS1, of->weights + step, 64);
    _tile_dpbssd(SUMS1, TOKENS1, WEIGHTS1);
}

INLINE void end_products(tile_sums *sums) {
    _tile_stored(SUMS0, sums->of[0], 64);
    _tile_stored(SUMS1, sums->of[1], 64);
}

/* All tokens by one row block. While tiles multiply two groups, the two before them are added up: done
 * one after the other, both would wait. */
INLINE void multiply_block(fl_format format, float *y, size_t stride, const tile_group *panel,
                           const uint8_t *q8, const fl_act *act) {
    size_t groups = (size_t)act->groups, tokens = (size_t)act->n;
    size_t step = format == FL_Q8 ? 512 : sizeof *panel;
    const uint8_t *weights = format == FL_Q8 ? q8 : panel->codes;
    const int8_t *x = (const int8_t *)act->codes;
    const float *scale = act->scale, *moment = act->moment;
    operands next = {.weights = weights, .x = x, .row = groups * FL_GROUP};
    tile_sums sums;
    begin_products(&next, groups == 1 ? 1 : 2, step);
    end_products(&sums);
    for (size_t t0 = 0; t0 < tokens; t0 += FL_TALL_TILE, y += FL_TALL_TILE * stride) {
        __m512 acc[FL_TALL_TILE];
        UNROLL for (int t = 0; t < FL_TALL_TILE; t++) acc[t] = _mm512_setzero_ps();
        for (size_t g = 0; g < groups; g += 2) {
            if (g + 2 < groups) {
                next.x += 2 * FL_GROUP, next.weights += 2 * step;
                begin_products(&next, g + 3 < groups ? 2 : 1, step);
            } else if (t0 + FL_TALL_TILE < tokens) {
                next.x = x + (t0 + FL_TALL_TILE) * next.row, next.weights = weights;
                begin_products(&next, groups == 1 ? 1 : 2, step);
            }
            for (size_t i = 0; i < (g + 1 < groups ? 2u : 1u); i++) {
                const tile_group *w = panel + g + i;
                __m512 scale_w = _mm512_load_ps(w->scale);
                __m512 min = format == FL_Q4M ? _mm512_load_ps(w->min) : scale_w;
                UNROLL for (int t = 0; t < FL_TALL_TILE; t++) {
                    __m512i dot = _mm512_load_si512(sums.of[i][t]);
                    acc[t] = add_group(acc[t], dot, scale_w, scale[t]);
                    if (format != FL_Q4M) continue;
                    acc[t] = _mm512_fmadd_ps(min, _mm512_set1_ps(moment[t]), acc[t]);
                }
                scale += FL_TALL_TILE, moment += FL_TALL_TILE;
            }
            end_products(&sums);
        }
        UNROLL for (size_t t = 0; t < FL_TALL_TILE; t++) {
            if (t0 + t < tokens) _mm512_storeu_ps(y + t * stride, acc[t]);
        }
    }
}

INLINE void multiply_tiles(fl_format format, float *y, size_t stride, const fl_linear *w,
                           int32_t block0, int32_t block1, const fl_act *act, tile_group *panel) {
    for (int32_t b = block0; b < block1; b++, y += FL_BLOCK_ROWS) {
        const uint8_t *q8 = w->codes + (size_t)b * (size_t)w->groups * 512;
        unpack_tiles(format, panel, w, b);
        multiply_block(format, y, stride, panel, q8, act);
    }
}

static void gemm_tiles(float *y, size_t stride, const fl_linear *w, int32_t block0, int32_t block1,
                       const fl_act *act, void *panel) {
    if (act->width != FL_TALL_TILE) {
        gemm(y, stride, w, block0, block1, act, panel);
        return;
    }
    _tile_loadconfig(&SHAPES);
    switch (w->format) {
    case FL_Q8: multiply_tiles(FL_Q8, y, stride, w, block0, block1, act, panel); break;
    case FL_Q4: multiply_tiles(FL_Q4, y, stride, w, block0, block1, act, panel); break;
    case FL_Q4M: multiply_tiles(FL_Q4M, y, stride, w, block0, block1, act, panel); break;
    }
    _tile_release();
}

const fl_kernels fl_kernels_amx = {
    .isa = "amx",
    .fp32 = 0,
    .tall_from = 32,
    .quantize = quantize,
    .gemv = gemv,
    .gemm = gemm_tiles,
    .store_kv = store_kv,
    .attend = attend,
    .rmsnorm = rmsnorm,
    .silu_mul = silu_mul,
    .gelu_mul = gelu_mul,
};
