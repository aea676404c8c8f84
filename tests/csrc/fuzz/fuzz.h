/* What the fuzz targets share: an input read as numbers, buffers of exactly the promised size, and
 * verdicts.
 *
 *     LLVMFuzzerTestOneInput (entry.c): bytes -> one operation -> one call in every table of kernels
 *         matrices.c attention.c rows.c sampling.c engine.c: the operations
 *     drivers: libFuzzer, or random_main.c where there is none
 *
 * FUZZ_TABLES is a list such as `TABLE(fl_kernels_plain) TABLE(fl_kernels_avx2)`, the plain one
 * first: it is the oracle of all others, bit for bit.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>

#include "fl_kernels.h"

/* An input: its bytes, and behind their end a sequence that follows from them, so that few bytes
 * fill any buffer and the same bytes always the same. */
typedef struct {
    const uint8_t *at, *end;
    uint64_t state;
} fz_input;

fz_input fz_open(const uint8_t *data, size_t size);
uint64_t fz_random(fz_input *in);                 /* not from the input's bytes */
uint32_t fz_below(fz_input *in, uint32_t n);      /* 0 .. n - 1; n is at least 1 */
int32_t fz_between(fz_input *in, int32_t low, int32_t high); /* both included */
int fz_rarely(fz_input *in);                      /* once in 32 */
uint32_t fz_bits(fz_input *in);                   /* any 32 bits, edges of integers often */

/* Memory until fz_release, filled with 0x55, aligned to 64, then `shift` bytes more. The size is
 * exact: what lies behind is out of bounds for the address sanitizer. */
void *fz_get(size_t size);
void *fz_get_shifted(size_t size, size_t shift);
void fz_release(void);

/* Arrays filled from the input. Floats lie anywhere on 4 bytes; an array is of one style, from
 * ordinary values to any bits: NaN, infinity, subnormals. */
float *fz_floats(fz_input *in, size_t n);
float *fz_floats_empty(fz_input *in, size_t n);
float fz_float(fz_input *in);
uint16_t *fz_halves(fz_input *in, size_t n);
void fz_bytes(fz_input *in, void *to, size_t size);

/* The tables under test; fz_tables[0] is the plain one. */
extern const fl_kernels *const fz_tables[];
extern const size_t fz_n_tables;

/* Results of `table` against those of the plain one. fz_same: every bit. fz_same_floats: every bit
 * but those of NaN, whose sign and payload no contract fixes (IEEE 754 leaves them open). */
void fz_same(const char *what, const char *table, const void *ours, const void *oracle,
             size_t size);
void fz_same_floats(const char *what, const char *table, const float *ours, const float *oracle,
                    size_t n);
void fz_require(int holds, const char *what); /* a promise of fl.h */

/* One operation each. */
void fz_quantize(fz_input *in);
void fz_gemv(fz_input *in);
void fz_gemm(fz_input *in);
void fz_store_kv(fz_input *in);
void fz_attend(fz_input *in);
void fz_rmsnorm(fz_input *in);
void fz_silu_mul(fz_input *in);
void fz_gelu_mul(fz_input *in);
void fz_layernorm(fz_input *in);
void fz_gelu_erf(fz_input *in);
void fz_sample(fz_input *in);
void fz_open_engine(fz_input *in);
void fz_pages(fz_input *in);
void fz_step(fz_input *in);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
