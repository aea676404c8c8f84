/* flashlite: the kernels for AMX (amx-tile, amx-int8: Intel Sapphire Rapids and later): those of
 * AVX-512, and products over many tokens by tiles.
 *
 * One tdpbssd multiplies 16 tokens x 32 columns by 32 columns x 16 rows of weights: a group of one
 * packed block. Its 256 sums are stored and added to the accumulators in floats, which takes most of
 * the time: 16 vectors of three or four steps for every tile of integers. Near any tile instruction
 * the second multiplier of the vector units (port 5) is asleep, its adder is not: measured, 48 fma
 * beside one tile load take 50 cycles instead of 25, 48 additions 25.
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

#define UNPACK_AHEAD 3072 /* bytes of weights that are asked for before they are unpacked */

/* Unpack the group at `from`, which moves on; memory is asked for what comes later. */
INLINE void unpack_group(fl_format format, tile_group *to, cursor *from) {
    prefetch_group(format, from, UNPACK_AHEAD / fl_code_bytes(format), 0, 1);
    UNROLL for (size_t k4 = 0; k4 < 8 && format != FL_Q8; k4++) {
        __m512i four = columns(format, from->codes, k4);
        int zero = fl_zero_code(format);
        if (zero) four = _mm512_sub_epi8(four, _mm512_set1_epi8((char)zero));
        _mm512_store_si512(to->codes + 64 * k4, four);
    }
    _mm512_store_ps(to->scale, load_half(from->scales));
    if (format == FL_Q4M) _mm512_store_ps(to->min, load_half(from->mins));
    advance(format, from);
}

/* Where the next product's operands are: the groups of a row block, then again for the next tile of
 * tokens. Groups are counted up to an even number; the one that an odd number lacks is the last
 * once more, and nobody adds it. */
typedef struct {
    const uint8_t *first, *weights;
    const int8_t *x;
    size_t step, groups, g;
} operands;

/* Multiply one group: the even ones in one set of tiles, the odd ones in another. */
INLINE void begin_product(int odd, operands *next) {
    if (odd) {
        _tile_zero(SUMS1);
        _tile_loadd(TOKENS1, next->x, FL_GROUP);
        _tile_loadd(WEIGHTS1, next->weights, 64);
        _tile_dpbssd(SUMS1, TOKENS1, WEIGHTS1);
    } else {
        _tile_zero(SUMS0);
        _tile_loadd(TOKENS0, next->x, FL_GROUP);
        _tile_loadd(WEIGHTS0, next->weights, 64);
        _tile_dpbssd(SUMS0, TOKENS0, WEIGHTS0);
    }
    next->g++;
    if (next->g < next->groups) {
        next->x += FL_TALL_TILE * FL_GROUP, next->weights += next->step;
    } else if (next->g % 2 == 0) {
        next->x += FL_TALL_TILE * FL_GROUP, next->weights = next->first, next->g = 0;
    }
}

/* Add one group's sums to the accumulators as add_group does, but for the conversion: an integer
 * becomes the float 1.5 * 2^23 + itself, of which an adder takes 1.5 * 2^23 off. */
INLINE void add_sums(fl_format format, __m512 acc[FL_TALL_TILE],
                     const int32_t sums[FL_TALL_TILE][FL_BLOCK_ROWS], const tile_group *w,
                     const float *scale_x, const float *moment) {
    const __m512 zero = _mm512_set1_ps(FL_ROUND_MAGIC);
    __m512 scale = _mm512_load_ps(w->scale);
    __m512 min = format == FL_Q4M ? _mm512_load_ps(w->min) : scale;
    UNROLL for (int t = 0; t < FL_TALL_TILE; t++) {
        __m512i raised = _mm512_add_epi32(_mm512_load_si512(sums[t]), _mm512_castps_si512(zero));
        __m512 dot = _mm512_sub_ps(_mm512_castsi512_ps(raised), zero);
        __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(scale_x[t]));
        acc[t] = _mm512_fmadd_ps(dot, both, acc[t]);
        if (format != FL_Q4M) continue;
        acc[t] = _mm512_fmadd_ps(min, _mm512_set1_ps(moment[t]), acc[t]);
    }
}

/* All tokens by one row block, in a pipeline: while one group is added, the next one's sums are stored
 * and the one after that is multiplied. Done one after the other, each would wait for the last. The
 * first tokens' additions also cover the unpacking of the next block, where `coming` is one. */
INLINE void multiply_block(fl_format format, float *y, size_t stride, const tile_group *panel,
                           const uint8_t *q8, tile_group *next_panel, cursor *coming,
                           const fl_act *act) {
    size_t groups = (size_t)act->groups, tokens = (size_t)act->n;
    size_t left = (tokens + FL_TALL_TILE - 1) / FL_TALL_TILE * ((groups + 1) / 2); /* pairs */
    const uint8_t *weights = format == FL_Q8 ? q8 : panel->codes;
    const float *scale = act->scale, *moment = act->moment;
    operands next = {
        .first = weights,
        .weights = weights,
        .x = (const int8_t *)act->codes,
        .step = format == FL_Q8 ? 512 : sizeof *panel,
        .groups = groups,
    };
    _Alignas(64) int32_t even[FL_TALL_TILE][FL_BLOCK_ROWS], odd[FL_TALL_TILE][FL_BLOCK_ROWS];
    begin_product(0, &next);
    _tile_stored(SUMS0, even, 64);
    begin_product(1, &next);
    for (size_t t0 = 0; t0 < tokens; t0 += FL_TALL_TILE, y += FL_TALL_TILE * stride) {
        __m512 acc[FL_TALL_TILE];
        UNROLL for (int t = 0; t < FL_TALL_TILE; t++) acc[t] = _mm512_setzero_ps();
        for (size_t g = 0; g < groups; g += 2) {
            left--;
            _tile_stored(SUMS1, odd, 64);
            if (left) begin_product(0, &next);
            add_sums(format, acc, even, panel + g, scale, moment);
            scale += FL_TALL_TILE, moment += FL_TALL_TILE;
            if (t0 == 0 && coming) unpack_group(format, next_panel + g, coming);
            _tile_stored(SUMS0, even, 64);
            if (left) begin_product(1, &next);
            if (g + 1 == groups) continue;
            if (t0 == 0 && coming) unpack_group(format, next_panel + g + 1, coming);
            add_sums(format, acc, odd, panel + g + 1, scale, moment);
            scale += FL_TALL_TILE, moment += FL_TALL_TILE;
        }
        UNROLL for (size_t t = 0; t < FL_TALL_TILE; t++) {
            if (t0 + t < tokens) _mm512_storeu_ps(y + t * stride, acc[t]);
        }
    }
}

INLINE void multiply_tiles(fl_format format, float *y, size_t stride, const fl_linear *w,
                           int32_t block0, int32_t block1, const fl_act *act, tile_group *panel) {
    tile_group *next_panel = panel + w->groups;
    const uint8_t *q8 = w->codes + (size_t)block0 * (size_t)w->groups * 512;
    cursor at = cursor_at(format, w, block0);
    for (int32_t g = 0; g < w->groups; g++) unpack_group(format, panel + g, &at);
    for (int32_t b = block0; b < block1; b++, y += FL_BLOCK_ROWS) {
        /* Tile loads do not tell the compiler what they read. */
        __asm__ volatile("" : : : "memory");
        cursor *coming = b + 1 < block1 ? &at : NULL;
        multiply_block(format, y, stride, panel, q8, next_panel, coming, act);
        tile_group *done = panel;
        panel = next_panel, next_panel = done;
        q8 += (size_t)w->groups * 512;
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
    case FL_Q5: multiply_tiles(FL_Q5, y, stride, w, block0, block1, act, panel); break;
    case FL_Q6: multiply_tiles(FL_Q6, y, stride, w, block0, block1, act, panel); break;
    }
    _tile_release();
}

const fl_kernels fl_kernels_amx = {
    .isa = "amx",
    .fp32 = 0,
    .tall_from = 13, /* from there on the tokens that a tile lacks cost less than it gains */
    .quantize = quantize,
    .gemv = gemv,
    .gemm = gemm_tiles,
    .store_kv = store_kv,
    .attend = attend,
    .rmsnorm = rmsnorm,
    .silu_mul = silu_mul,
    .gelu_mul = gelu_mul,
};
