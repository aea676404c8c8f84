/* A tiny generated model in one engine per table: open, pages in and out, and steps whose batches
 * are hostile now and then. A valid batch gives the same logits and pages in every table.
 *
 * model.c names one table; fl_engine.c is compiled with -DFL_KERNELS=(*fz_engine_table), so that
 * one program opens engines of all of them, and with this file's fz_reserve for fl_os_reserve, so
 * that the address sanitizer knows where the arena and the scratch end.
 */
#define _POSIX_C_SOURCE 200112L /* posix_memalign */
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"

#include "fl.h"
#include "fl_engine.h"

#define MAX_TABLES 16
#define PAGES 5
#define SEQUENCES 3
#define MOST_BYTES ((size_t)1 << 30) /* more are refused */

const fl_kernels *fz_kernels;
const fl_kernels *const *fz_engine_table = &fz_kernels;
extern const uint8_t fz_weights[]; /* weights.c */

void *fz_reserve(size_t bytes);
void fz_unreserve(void *memory, size_t bytes);

void *fz_reserve(size_t bytes) {
    void *memory = NULL;
    if (bytes > MOST_BYTES || posix_memalign(&memory, 4096, bytes)) return NULL;
    return memset(memory, 0, bytes);
}

void fz_unreserve(void *memory, size_t bytes) {
    (void)bytes;
    free(memory);
}

/* The tables of this program run here, if need be with instructions emulated. */
int fz_os_runs(const char *isa) {
    (void)isa;
    return 1;
}

static fl_engine *engines[MAX_TABLES];
static fl_info info;

static fl_options valid_options(void) {
    return (fl_options){.abi = FL_ABI,
                        .n_threads = 1,
                        .weights = fz_weights,
                        .weights_size = info.weights_size,
                        .n_pages = PAGES,
                        .max_sequences = SEQUENCES};
}

/* The engine of table `i`: opened once, its pages cleared. */
static fl_engine *engine_of(size_t i) {
    fz_kernels = fz_tables[i];
    fl_describe(&info, 1);
    fl_options options = valid_options();
    if (!engines[i]) fz_require(fl_open(&options, &engines[i]) == FL_OK, "fl_open");
    void *zeros = fz_get(info.page_bytes);
    memset(zeros, 0, info.page_bytes);
    for (uint32_t page = 0; page < PAGES; page++)
        fz_require(fl_page_write(engines[i], page, zeros, info.page_bytes) == FL_OK,
                   "fl_page_write of a page that is there");
    return engines[i];
}

/* ---- open ---- */

void fz_open_engine(fz_input *in) {
    fz_kernels = fz_tables[fz_below(in, (uint32_t)fz_n_tables)];
    fl_describe(&info, 1);
    fl_options o = valid_options();
    fl_status expected = FL_OK;
    switch (fz_below(in, 8)) {
    case 0: o.abi = fz_bits(in); break;
    case 1: o.n_threads = fz_bits(in) | FL_MAX_THREADS; break; /* few threads: pool_main.c */
    case 2: o.n_threads = 0; break;
    case 3: o.weights_size = fz_bits(in); break;
    case 4: o.weights += 1 + fz_below(in, FL_ALIGN - 1); break;
    case 5: o.weights = NULL; break;
    case 6: o.n_pages = fz_bits(in); break;
    default: o.max_sequences = fz_bits(in); break;
    }
    if (o.n_threads < 1 || o.n_threads > FL_MAX_THREADS || o.n_pages < 1 || o.n_pages > INT32_MAX ||
        o.max_sequences < 1 || o.max_sequences > FL_MAX_BATCH)
        expected = FL_BAD_ARGUMENT;
    if (o.weights_size != info.weights_size || !o.weights || (uintptr_t)o.weights % FL_ALIGN)
        expected = FL_BAD_WEIGHTS;
    if (o.abi != FL_ABI) expected = FL_BAD_ABI;
    if (expected == FL_OK && o.n_pages > MOST_BYTES / info.page_bytes) expected = FL_NO_MEMORY;
    if (expected == FL_OK && o.n_pages > 1000) return; /* would take its time */
    if (o.n_threads > 1 && expected == FL_OK) return;
    fl_engine *engine = (fl_engine *)&o;
    fl_status status = fl_open(&o, &engine);
    fz_require(status == expected, "fl_open: the status that fl.h names");
    fz_require((status == FL_OK) == (engine != NULL), "fl_open: an engine, or none");
    fl_close(engine);
}

/* ---- pages ---- */

void fz_pages(fz_input *in) {
    fl_engine *e = engine_of(fz_below(in, (uint32_t)fz_n_tables));
    uint32_t page = fz_below(in, 4) ? fz_below(in, PAGES) : fz_bits(in);
    size_t size = fz_below(in, 4) ? info.page_bytes : fz_bits(in);
    int valid = page < PAGES && size == info.page_bytes;
    void *from = fz_get(valid ? size : 0), *to = fz_get(valid ? size : 0);
    if (valid) fz_bytes(in, from, size);
    fl_status expected = valid ? FL_OK : FL_BAD_ARGUMENT;
    fz_require(fl_page_write(e, page, from, size) == expected, "fl_page_write: its status");
    fz_require(fl_page_read(e, page, to, size) == expected, "fl_page_read: its status");
    fz_require(fl_page_write(e, page, NULL, size) == FL_BAD_ARGUMENT, "fl_page_write: from NULL");
    fz_require(fl_page_read(e, page, NULL, size) == FL_BAD_ARGUMENT, "fl_page_read: to NULL");
    if (valid) fz_same("page", "fl_page_read", to, from, size);
}

/* ---- step ---- */

/* Where hostile, now and then another number: at the limit of valid ones, or any. */
static int32_t maybe_hostile(fz_input *in, int hostile, int32_t value, uint32_t limit) {
    if (!hostile || fz_below(in, 8)) return value;
    return fz_below(in, 2) ? (int32_t)fz_bits(in) : (int32_t)(limit - 1 + fz_below(in, 3));
}

static uint32_t most_tokens(void) { return FL_MODEL.encodes ? FL_MAX_TEXT : FL_MAX_BATCH; }

/* Runs of one sequence each, positions rising; ids, positions and pages anything where hostile. An
 * encoder's are whole texts, 0, 1, 2 ... in order, and nobody asks for logits. */
static fl_batch any_batch(fz_input *in, int hostile) {
    int encodes = FL_MODEL.encodes;
    fl_batch b = {.n_tokens = 1 + fz_below(in, fz_rarely(in) ? (encodes ? 90 : 20) : 4)};
    b.n_sequences = 1 + fz_below(in, SEQUENCES);
    b.page_stride = 2 + fz_below(in, 2);
    if (hostile && fz_rarely(in)) b.n_tokens = fz_below(in, 2) ? fz_bits(in) : most_tokens() + 1;
    if (hostile && fz_rarely(in)) b.n_sequences = fz_below(in, 2) ? fz_bits(in) : SEQUENCES + 1;
    if (hostile && fz_rarely(in)) b.page_stride = fz_below(in, 2);
    /* Nobody may look at arrays of a size that is refused. */
    size_t n = b.n_tokens <= most_tokens() ? b.n_tokens : 0;
    size_t rows = b.n_sequences <= SEQUENCES ? b.n_sequences : 0;
    int32_t *tokens = fz_get(n * 4), *positions = fz_get(n * 4), *sequences = fz_get(n * 4);
    int32_t *pages = fz_get(rows * b.page_stride * 4);
    int32_t sequence = 0, position = 0;
    for (size_t i = 0; i < n; i++, position++) {
        int starts = i == 0 || fz_below(in, 4) == 0 || position >= (int32_t)info.max_context;
        if (starts && encodes && i) {
            int more = (size_t)sequence + 1 < rows;
            if (!more && position >= (int32_t)info.max_context) { /* no room: the step ends here */
                b.n_tokens = (uint32_t)(n = i);
                break;
            }
            if (more) sequence++, position = 0;
        } else if (starts && !encodes) {
            int32_t was = sequence;
            sequence = (int32_t)fz_below(in, rows ? (uint32_t)rows : 1);
            position = (int32_t)fz_below(in, info.max_context);
            if (i && was == sequence && rows > 1) sequence = (was + 1) % (int32_t)rows;
        }
        tokens[i] =
            maybe_hostile(in, hostile, (int32_t)fz_below(in, info.vocab_size), info.vocab_size);
        positions[i] = maybe_hostile(in, hostile, position, info.max_context);
        sequences[i] = maybe_hostile(in, hostile, sequence, b.n_sequences);
    }
    for (size_t i = 0; i < rows * b.page_stride; i++)
        pages[i] = maybe_hostile(in, hostile, (int32_t)fz_below(in, PAGES), PAGES);
    if (encodes && n && rows && !(hostile && fz_rarely(in))) b.n_sequences = (uint32_t)sequence + 1;
    b.n_logits = encodes && !(hostile && fz_rarely(in)) ? 0 : fz_below(in, (uint32_t)n + 1);
    if (hostile && fz_rarely(in)) b.n_logits = fz_below(in, 2) ? fz_bits(in) : b.n_tokens + 1;
    size_t n_logits = b.n_logits <= n ? b.n_logits : 0;
    int32_t *logit_rows = fz_get(n_logits * 4);
    for (size_t i = 0; i < n_logits; i++)
        logit_rows[i] = maybe_hostile(in, hostile, (int32_t)fz_below(in, (uint32_t)n), b.n_tokens);
    b.tokens = tokens, b.positions = positions, b.sequences = sequences, b.pages = pages;
    b.logit_rows = logit_rows;
    if (fz_below(in, 2)) {
        uint8_t *needs = fz_get(n_logits);
        for (size_t i = 0; i < n_logits; i++) needs[i] = (uint8_t)fz_below(in, 4);
        b.needs = needs;
    }
    return b;
}

/* What fl.h says of a batch, read word by word. */
static int is_valid(const fl_batch *b) {
    if (b->n_tokens == 0 || b->n_tokens > most_tokens() || b->n_logits > b->n_tokens) return 0;
    if (b->n_sequences == 0 || b->n_sequences > SEQUENCES) return 0;
    for (uint32_t i = 0; i < b->n_tokens; i++) {
        int64_t token = b->tokens[i], position = b->positions[i], sequence = b->sequences[i];
        if (token < 0 || token >= info.vocab_size) return 0;
        if (position < 0 || position >= info.max_context) return 0;
        if (sequence < 0 || sequence >= b->n_sequences) return 0;
        if (position / FL_PAGE_TOKENS >= b->page_stride) return 0;
        for (int64_t page = 0; page <= position / FL_PAGE_TOKENS; page++) {
            int32_t id = b->pages[sequence * b->page_stride + page];
            if (id < 0 || id >= PAGES) return 0;
        }
        if (i && b->sequences[i - 1] == sequence && b->positions[i - 1] + 1 != position) return 0;
    }
    for (uint32_t i = 0; i < b->n_logits; i++)
        if (b->logit_rows[i] < 0 || b->logit_rows[i] >= (int64_t)b->n_tokens) return 0;
    if (!FL_MODEL.encodes) return 1;
    int32_t text = -1;
    for (uint32_t i = 0; i < b->n_tokens; i++) {
        if (b->sequences[i] == text) continue;
        if (b->sequences[i] != ++text || b->positions[i] != 0) return 0;
    }
    return b->n_logits == 0 && text + 1 == (int64_t)b->n_sequences;
}

void fz_step(fz_input *in) {
    engine_of(0);
    int hostile = fz_below(in, 2);
    fl_batch b = any_batch(in, hostile);
    int valid = is_valid(&b), without = fz_rarely(in); /* no place for the logits */
    size_t n = valid ? b.n_logits * (size_t)info.vocab_size : 0;
    size_t states = valid && fz_below(in, 2) ? b.n_logits * (size_t)info.d_model : 0;
    if (FL_MODEL.encodes) states = valid ? b.n_sequences * (size_t)info.d_model : 0;
    if (without && (b.n_logits || FL_MODEL.encodes)) valid = 0;
    const float *oracle = NULL, *oracle_states = NULL;
    uint8_t *page = fz_get(info.page_bytes), *ours = fz_get(info.page_bytes);
    size_t other = fz_below(in, (uint32_t)fz_n_tables); /* beside the plain one */
    for (size_t i = 0; i <= other; i += other ? other : 1) {
        fl_engine *e = engine_of(i);
        float *logits = b.logits = fz_get_shifted(n * sizeof(float), 4);
        float *hidden = b.hidden = states ? fz_get_shifted(states * sizeof(float), 4) : NULL;
        if (without) b.logits = NULL;
        if (without && FL_MODEL.encodes) b.hidden = NULL;
        fl_status status = fl_step(e, &b);
        fz_require(status == (valid ? FL_OK : FL_BAD_ARGUMENT), "fl_step: the status of a batch");
        if (i == 0) oracle = logits, oracle_states = hidden;
        if (i == 0 || !valid || fz_tables[i]->fp32) continue;
        fz_same_floats("logits", fz_tables[i]->isa, logits, oracle, n);
        if (states) fz_same_floats("states", fz_tables[i]->isa, hidden, oracle_states, states);
        for (uint32_t p = 0; p < PAGES; p++) {
            fl_page_read(engines[0], p, page, info.page_bytes);
            fl_page_read(e, p, ours, info.page_bytes);
            fz_same("pages after a step", fz_tables[i]->isa, ours, page, info.page_bytes);
        }
    }
}
