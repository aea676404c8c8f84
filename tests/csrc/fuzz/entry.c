/* The entry of both drivers: the first byte chooses the operation, the rest is its operands. */
#include "fuzz.h"

#if !defined(FUZZ_BARE) /* there is an operating system */
#include "fl_os.h"
#endif

#define TABLE(name) extern const fl_kernels name;
FUZZ_TABLES
#undef TABLE
#define TABLE(name) &name,
const fl_kernels *const fz_tables[] = {FUZZ_TABLES};
const size_t fz_n_tables = sizeof fz_tables / sizeof *fz_tables;

static void (*const operations[])(fz_input *) = {
    fz_quantize,    fz_gemv,     fz_gemm,      fz_store_kv, fz_attend, fz_rmsnorm,
    fz_silu_mul,    fz_gelu_mul, fz_layernorm, fz_gelu_erf, fz_sample,
#if defined(FUZZ_ENGINE) /* with a generated model */
    fz_open_engine, fz_pages,    fz_step,
#endif
};

/* An engine asks before it opens whether a table runs; where the system must allow instructions
 * first, that is when it is asked to. */
static void prepare(void) {
#if !defined(FUZZ_BARE)
    static int asked;
    for (size_t i = 0; i < fz_n_tables && !asked; i++) (void)fl_os_runs(fz_tables[i]->isa);
    asked = 1;
#endif
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    prepare();
    fz_input in = fz_open(data, size);
    operations[fz_below(&in, sizeof operations / sizeof *operations)](&in);
    fz_release();
    return 0;
}
