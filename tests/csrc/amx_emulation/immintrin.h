/* flashlite: the tile intrinsics that fl_kernels_amx.c uses, for machines that have AVX-512 only.
 *
 * Tiles are arrays, with the rows and bytes of a row that _tile_loadconfig set; what lies outside is
 * zero, as the processor keeps it, and memory outside a tile's shape is not touched, so that
 * AddressSanitizer sees what the processor would do. The rest is the real AVX-512.
 * Reference: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
 */
#ifndef FL_AMX_EMULATION_H
#define FL_AMX_EMULATION_H

#include_next <immintrin.h>
#include <stdint.h>
#include <string.h>

#define FL_TILE_OP static __attribute__((noinline, unused))

typedef struct {
    uint16_t row_bytes[8];
    uint8_t rows[8];
    uint8_t data[8][16][64];
} fl_emu_tiles;
static _Thread_local fl_emu_tiles emu;

FL_TILE_OP void emulate_tile_loadconfig(const void *config) {
    const uint8_t *bytes = config;
    memset(&emu, 0, sizeof emu);
    memcpy(emu.row_bytes, bytes + 16, sizeof emu.row_bytes);
    memcpy(emu.rows, bytes + 48, sizeof emu.rows);
}

FL_TILE_OP void emulate_tile_release(void) { memset(&emu, 0, sizeof emu); }

FL_TILE_OP void emulate_tile_zero(int tile) { memset(emu.data[tile], 0, sizeof emu.data[tile]); }

FL_TILE_OP void emulate_tile_loadd(int tile, const void *from, size_t stride) {
    emulate_tile_zero(tile);
    for (size_t r = 0; r < emu.rows[tile]; r++) {
        memcpy(emu.data[tile][r], (const uint8_t *)from + r * stride, emu.row_bytes[tile]);
    }
}

FL_TILE_OP void emulate_tile_stored(int tile, void *to, size_t stride) {
    for (size_t r = 0; r < emu.rows[tile]; r++) {
        memcpy((uint8_t *)to + r * stride, emu.data[tile][r], emu.row_bytes[tile]);
    }
}

/* Fours of signed bytes of rows of a and columns of b, added to the dwords of `sums`. */
FL_TILE_OP void emulate_tile_dpbssd(int sums, int a, int b) {
    for (size_t m = 0; m < emu.rows[sums]; m++) {
        int32_t row[16];
        memcpy(row, emu.data[sums][m], sizeof row);
        for (size_t k = 0; k < emu.row_bytes[a] / 4u; k++) {
            for (size_t n = 0; n < emu.row_bytes[sums] / 4u; n++) {
                for (size_t i = 0; i < 4; i++) {
                    row[n] += (int8_t)emu.data[a][m][4 * k + i] * (int8_t)emu.data[b][k][4 * n + i];
                }
            }
        }
        memcpy(emu.data[sums][m], row, sizeof row);
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#define _tile_loadconfig emulate_tile_loadconfig
#define _tile_release emulate_tile_release
#define _tile_zero emulate_tile_zero
#define _tile_loadd emulate_tile_loadd
#define _tile_stored emulate_tile_stored
#define _tile_dpbssd emulate_tile_dpbssd

#endif
