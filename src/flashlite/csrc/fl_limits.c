/* flashlite: what a machine can do at most, to hold the kernels against (evaluate/limits.py). A
 * library by itself, never part of a model's. */
#include "fl.h"

/* Reads n numbers and does nothing else: the bandwidth of memory. The sum keeps the loads alive. */
FL_API uint64_t fl_limit_read(const uint64_t *p, size_t n) {
    uint64_t s[32] = {0};
    for (size_t i = 0; i + 32 <= n; i += 32)
        for (size_t j = 0; j < 32; j++) s[j] += p[i + j];
    for (size_t j = 1; j < 32; j++) s[0] += s[j];
    return s[0];
}

/* Reads `rows` pieces of 256 bytes, anywhere in 2^bits of them, each asked for 16 pieces before it
 * is needed: what lies apart. */
FL_API uint64_t fl_limit_gather(const uint64_t *p, uint32_t bits, size_t rows) {
    uint64_t sum = 0, seed = 1, ahead[16];
    for (size_t i = 0; i < rows + 16; i++) {
        if (i >= 16) {
            const uint64_t *row = p + ahead[i % 16] * 32;
            for (size_t j = 0; j < 32; j++) sum += row[j];
        }
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        ahead[i % 16] = seed >> (64 - bits);
        for (size_t j = 0; j < 4; j++) __builtin_prefetch(p + ahead[i % 16] * 32 + j * 8);
    }
    return sum;
}

/* `rounds` times 16 (AVX2: 12) products of bytes that do not wait for each other, more than their
 * latency times the units that make them, on registers alone. In assembler, since compilers move
 * intrinsics through the stack here. Returns the multiply-accumulates; 0 where the instruction set
 * has no such product. */
FL_API uint64_t fl_limit_dots(uint64_t rounds) {
#if defined(__AVX512VNNI__)
#define DOT(i) "vpdpbusd %%zmm31, %%zmm30, %%zmm" #i "\n"
    for (uint64_t r = 0; r < rounds; r++)
        __asm__ volatile(DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9)
                             DOT(10) DOT(11) DOT(12) DOT(13) DOT(14) DOT(15)
                         :
                         :
                         : "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8",
                           "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15");
    return rounds * 16 * 64;
#elif defined(__AVX2__)
#define DOT(i) \
    "vpmaddubsw %%ymm15, %%ymm14, %%ymm12\n" \
    "vpmaddwd %%ymm15, %%ymm12, %%ymm13\n" \
    "vpaddd %%ymm13, %%ymm" #i ", %%ymm" #i "\n"
    for (uint64_t r = 0; r < rounds; r++)
        __asm__ volatile(DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9)
                             DOT(10) DOT(11)
                         :
                         :
                         : "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8",
                           "ymm9", "ymm10", "ymm11", "ymm12", "ymm13");
    return rounds * 12 * 32;
#else
    (void)rounds;
    return 0;
#endif
}
