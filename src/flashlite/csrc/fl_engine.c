/* flashlite: open, step and close.
 *
 * open:  check the target and the sizes -> reserve scratch and arena -> carve -> start threads
 * step:  check every id the caller gave -> wake the pool -> FL_MODEL.forward on every thread
 * close: stop the pool -> release
 * page:  check the page and the length -> copy
 */
#include <string.h>

#include "fl_mark.h"
#include "fl_state.h"

static int32_t ceil_to(int32_t n, int32_t unit) { return (n + unit - 1) / unit * unit; }

static fl_sizes model_sizes(int fp32) {
    const fl_model *m = &FL_MODEL;
    fl_sizes s = {0};
    s.q_cols = m->n_heads * m->head_dim;
    s.kv_cols = m->n_kv_heads * m->head_dim;
    s.k_offset = ceil_to(s.q_cols, FL_BLOCK_ROWS);
    s.v_offset = s.k_offset + ceil_to(s.kv_cols, FL_BLOCK_ROWS);
    s.qkv_stride = s.v_offset + ceil_to(s.kv_cols, FL_BLOCK_ROWS);
    s.wide_stride = ceil_to(m->d_model, FL_BLOCK_ROWS);
    int32_t widest = m->d_model > s.q_cols ? m->d_model : s.q_cols;
    s.in_groups = ceil_to(widest, FL_GROUP) / FL_GROUP;
    s.hidden_groups = ceil_to(m->d_ff, FL_GROUP) / FL_GROUP;
    s.head_bytes = fl_kv_bytes(m->head_dim, fp32);
    s.page_bytes = s.head_bytes * (size_t)m->kv_heads_in_all;
    return s;
}

/* Hands out aligned pieces of one block of memory; with memory NULL it only measures. */
typedef struct {
    uint8_t *memory;
    size_t used;
} fl_carver;

static void *carve(fl_carver *c, size_t bytes) {
    void *piece = c->memory ? c->memory + c->used : NULL;
    c->used += (bytes + FL_ALIGN - 1) / FL_ALIGN * FL_ALIGN;
    return piece;
}

static fl_act carve_act(fl_carver *c, int32_t groups, size_t rows, int fp32) {
    size_t cells = (size_t)groups * rows;
    fl_act act = {0};
    act.groups = groups;
    act.codes = carve(c, cells * FL_GROUP * (fp32 ? sizeof(float) : 1));
    act.scale = carve(c, cells * sizeof(float));
    act.moment = carve(c, cells * sizeof(float));
    act.offset = carve(c, cells * sizeof(int32_t));
    return act;
}

/* Tokens in one step. */
static uint32_t most_tokens(void) { return FL_MODEL.encodes ? FL_MAX_TEXT : FL_MAX_BATCH; }

/* Lay out everything an engine needs beside its arena. Returns the bytes used. */
static size_t lay_out(fl_engine *e, uint8_t *memory, uint32_t n_threads) {
    const fl_model *m = &FL_MODEL;
    const fl_sizes *s = &e->sizes;
    int fp32 = e->kernels->fp32;
    fl_carver c = {.memory = memory};
    size_t rows = FL_STEP_ROWS(most_tokens()), f = sizeof(float);
    int32_t hidden_cols = s->hidden_groups * FL_GROUP;

    e->threads = carve(&c, n_threads * sizeof(fl_thread));
    e->x = carve(&c, rows * (size_t)m->d_model * f);
    e->qkv = carve(&c, rows * (size_t)s->qkv_stride * f);
    e->heads = carve(&c, rows * (size_t)s->q_cols * f);
    e->wide = carve(&c, rows * (size_t)s->wide_stride * f);
    e->hidden = carve(&c, 2 * (size_t)hidden_cols * f);
    e->angles[0] = m->rope ? carve(&c, rows * (size_t)m->head_dim * f) : NULL;
    e->angles[1] = m->rope_local ? carve(&c, rows * (size_t)m->head_dim * f) : NULL;
    e->act = carve_act(&c, s->in_groups, rows, fp32);
    e->hidden_act = carve_act(&c, s->hidden_groups, rows, fp32);

    if (m->screen) {
        size_t blocks = (size_t)ceil_to(m->vocab, FL_BLOCK_ROWS) / FL_BLOCK_ROWS;
        e->exact_rows = carve(&c, rows * (size_t)m->d_model * f);
        e->screen_rows = carve(&c, rows * (size_t)m->d_model * f);
        e->tops = carve(&c, blocks * f);
        e->rows = carve(&c, (size_t)m->screen->coarse.limit * sizeof(int32_t));
        e->blocks = carve(&c, (size_t)m->screen->fine.limit * sizeof(int32_t));
    }

    int32_t panel_groups = s->in_groups > s->hidden_groups ? s->in_groups : s->hidden_groups;
    for (uint32_t i = 0; i < n_threads; i++) {
        fl_thread t = {.engine = e, .id = i};
        t.own = carve_act(&c, s->in_groups, 1, fp32);
        t.row = carve(&c, (size_t)s->in_groups * FL_GROUP * f);
        t.gate = carve(&c, rows * FL_GATED_COLS * f);
        t.up = carve(&c, rows * FL_GATED_COLS * f);
        t.queries = carve(&c, (size_t)FL_MAX_QUERIES * (size_t)m->head_dim * f);
        t.answers = carve(&c, (size_t)FL_MAX_QUERIES * (size_t)m->head_dim * f);
        t.panel = carve(&c, FL_PANEL_BYTES(panel_groups));
        t.attend = carve(&c, FL_ATTEND_BYTES(m->head_dim));
#ifdef FL_PROFILE
        t.marks = carve(&c, FL_MARKS * sizeof(fl_mark));
#endif
        if (m->screen) {
            int32_t rows = m->screen->coarse.limit, most = m->screen->fine.limit;
            size_t groups = (size_t)ceil_to(m->screen->rest.cols, FL_GROUP) / FL_GROUP;
            t.passing = carve(&c, (size_t)(rows > most ? rows : most) * sizeof(int32_t));
            t.block_codes = carve(&c, groups * 4 * FL_BLOCK_ROWS * sizeof(uint32_t));
            t.block_scales = carve(&c, groups * FL_BLOCK_ROWS * sizeof(uint16_t));
        }
        if (memory) e->threads[i] = t;
    }
    return c.used;
}

static size_t measure_scratch(uint32_t n_threads) {
    fl_engine probe = {.kernels = FL_KERNELS, .sizes = model_sizes(FL_KERNELS->fp32)};
    return lay_out(&probe, NULL, n_threads);
}

void fl_describe(fl_info *info, uint32_t n_threads) {
    fl_sizes sizes = model_sizes(FL_KERNELS->fp32);
    *info = (fl_info){
        .abi = FL_ABI,
        .vocab_size = (uint32_t)FL_MODEL.vocab,
        .d_model = (uint32_t)FL_MODEL.d_model,
        .has_screen = FL_MODEL.screen != NULL,
        .max_context = (uint32_t)FL_MODEL.max_context,
        .page_tokens = FL_PAGE_TOKENS,
        .page_bytes = sizes.page_bytes,
        .weights_size = FL_MODEL.weights_size,
        .scratch_bytes = measure_scratch(n_threads),
        .isa = FL_KERNELS->isa,
        .artifact = FL_MODEL.artifact,
    };
}

/* One value says that a step starts and who takes part, so that a thread which sits out may miss
 * any number of steps and still never joins one that is not meant for it. */
static void start_step(fl_engine *e) {
    e->steps++;
    fl_event_set(&e->start, e->steps * FL_MAX_THREADS + e->active - 1);
}

static void *pool_main(void *argument) {
    fl_thread *t = argument;
    fl_engine *e = t->engine;
    uint32_t seen = 0;
    for (;;) {
        seen = fl_event_wait(&e->start, seen);
        if (atomic_load_explicit(&e->quit, memory_order_acquire)) return NULL;
        if (t->id > seen % FL_MAX_THREADS) continue;
        FL_MARK(t, BEGIN);
        FL_MODEL.forward(t);
        fl_barrier_wait(&e->barrier); /* behind it the caller may read the marks */
    }
}

fl_status fl_open(const fl_options *options, fl_engine **engine) {
    *engine = NULL;
    if (options->abi != FL_ABI) return FL_BAD_ABI;
    if (!fl_os_runs(FL_KERNELS->isa)) return FL_BAD_TARGET;
    if (options->n_threads < 1 || options->n_threads > FL_MAX_THREADS || options->n_pages < 1 ||
        options->n_pages > INT32_MAX || options->max_sequences < 1 ||
        options->max_sequences > FL_MAX_BATCH)
        return FL_BAD_ARGUMENT;
    if (!options->weights || options->weights_size != FL_MODEL.weights_size ||
        (uintptr_t)options->weights % FL_ALIGN)
        return FL_BAD_WEIGHTS;

    fl_sizes sizes = model_sizes(FL_KERNELS->fp32);
    if (options->n_pages > SIZE_MAX / sizes.page_bytes) return FL_NO_MEMORY;
    size_t head = (sizeof(fl_engine) + FL_ALIGN - 1) / FL_ALIGN * FL_ALIGN;
    size_t scratch_bytes = head + measure_scratch(options->n_threads);
    size_t arena_bytes = sizes.page_bytes * options->n_pages;
    uint8_t *scratch = fl_os_reserve(scratch_bytes);
    uint8_t *arena = fl_os_reserve(arena_bytes);
    if (!scratch || !arena) {
        fl_os_release(scratch, scratch_bytes);
        fl_os_release(arena, arena_bytes);
        return FL_NO_MEMORY;
    }

    fl_engine *e = (fl_engine *)scratch;
    e->kernels = FL_KERNELS;
    e->weights = options->weights;
    e->sizes = sizes;
    e->n_threads = e->active = options->n_threads;
    e->n_pages = options->n_pages;
    e->max_sequences = options->max_sequences;
    e->exact_head = options->exact_head != 0;
    e->arena = arena;
    e->arena_bytes = arena_bytes;
    e->scratch = scratch;
    e->scratch_bytes = scratch_bytes;
    lay_out(e, scratch + head, e->n_threads);

    if (fl_event_init(&e->start) || fl_barrier_init(&e->barrier, e->n_threads)) {
        fl_os_release(arena, arena_bytes);
        fl_os_release(scratch, scratch_bytes);
        return FL_NO_MEMORY;
    }
    while (e->n_started + 1 < e->n_threads) {
        fl_thread *t = &e->threads[e->n_started + 1];
        if (pthread_create(&t->handle, NULL, pool_main, t)) {
            fl_close(e);
            return FL_NO_THREAD;
        }
        e->n_started++;
    }
    *engine = e;
    return FL_OK;
}

void fl_close(fl_engine *e) {
    if (!e) return;
    atomic_store(&e->quit, 1);
    start_step(e);
    for (uint32_t i = 1; i <= e->n_started; i++) pthread_join(e->threads[i].handle, NULL);
    fl_barrier_destroy(&e->barrier);
    fl_event_destroy(&e->start);
    fl_os_release(e->arena, e->arena_bytes);
    fl_os_release(e->scratch, e->scratch_bytes); /* holds e itself */
}

/* What an encoder's step promises beyond that of a decoder. */
static int holds_whole_texts(const fl_batch *b) {
    if (b->n_logits || !b->hidden || b->sequences[0] != 0) return 0;
    for (uint32_t i = 0; i < b->n_tokens; i++) {
        int follows = i && b->sequences[i] == b->sequences[i - 1];
        if (!follows && b->positions[i] != 0) return 0;
        if (i && !follows && b->sequences[i] != b->sequences[i - 1] + 1) return 0;
    }
    return (uint32_t)b->sequences[b->n_tokens - 1] + 1 == b->n_sequences;
}

/* Every number that comes from outside and would become an address. */
static int batch_is_valid(const fl_engine *e, const fl_batch *b) {
    if (b->n_tokens < 1 || b->n_tokens > most_tokens()) return 0;
    if (b->n_sequences < 1 || b->n_sequences > e->max_sequences) return 0;
    if (b->n_logits > b->n_tokens || (b->n_logits && !b->logits)) return 0;
    for (uint32_t i = 0; i < b->n_tokens; i++) {
        int32_t token = b->tokens[i], position = b->positions[i], sequence = b->sequences[i];
        if (token < 0 || token >= FL_MODEL.vocab) return 0;
        if (position < 0 || position >= FL_MODEL.max_context) return 0;
        if (sequence < 0 || (uint32_t)sequence >= b->n_sequences) return 0;
        uint32_t last = (uint32_t)position / FL_PAGE_TOKENS;
        if (last >= b->page_stride) return 0;
        int follows = i && b->sequences[i - 1] == sequence;
        if (follows && position != b->positions[i - 1] + 1) return 0;
        /* A following token's earlier pages were checked with the one before it. */
        const int32_t *pages = b->pages + (size_t)sequence * b->page_stride;
        for (uint32_t p = follows ? last : 0; p <= last; p++)
            if (pages[p] < 0 || (uint32_t)pages[p] >= e->n_pages) return 0;
    }
    for (uint32_t i = 0; i < b->n_logits; i++)
        if (b->logit_rows[i] < 0 || (uint32_t)b->logit_rows[i] >= b->n_tokens) return 0;
    return !FL_MODEL.encodes || holds_whole_texts(b);
}

/* When another program keeps one of our cores busy, the thread on it is away for whole time slices
 * and everybody waits for it: a step of 2 ms takes 16. Then one thread fewer is faster. It is tried
 * again after a while, which doubles each time that was too early. */
static void choose_threads(fl_engine *e, uint64_t begin, uint64_t end) {
    const uint64_t slice = 1000000, shortest = 50000000, longest = 2000000000;
    uint64_t slept = atomic_exchange(&e->barrier.slept, 0);
    if (e->active > 1 && slept > slice && slept > (end - begin) / 3 * (e->active - 1)) {
        e->active--;
        e->hold = e->hold ? e->hold * 2 : shortest;
        if (e->hold > longest) e->hold = longest;
        e->retry_at = end + e->hold;
    } else if (end > e->retry_at) {
        if (e->active < e->n_threads) {
            e->active++;
            e->retry_at = end + e->hold; /* until then it has to go well */
        } else {
            e->hold = 0;
        }
    }
}

fl_status fl_step(fl_engine *e, const fl_batch *batch) {
    FL_MARK(&e->threads[0], BEGIN);
    if (!batch_is_valid(e, batch)) return FL_BAD_ARGUMENT;
    e->batch = *batch;
    int32_t n = (int32_t)batch->n_tokens;
    e->act.n = e->hidden_act.n = n;
    e->act.width = e->hidden_act.width = fl_act_width(e->kernels, n);
    uint64_t begin = fl_os_clock();
    e->barrier.n = e->active;
    start_step(e);
    FL_MODEL.forward(&e->threads[0]);
    FL_WAIT(e, &e->threads[0]);
    choose_threads(e, begin, fl_os_clock());
    FL_MARK(&e->threads[0], END);
    return FL_OK;
}

#ifdef FL_PROFILE
uint32_t fl_profile_read(fl_engine *e, uint32_t thread, fl_mark *marks, uint32_t room,
                         uint64_t *lost) {
    *lost = 0;
    if (thread >= e->n_threads) return 0;
    fl_thread *t = &e->threads[thread];
    uint32_t n = t->n_marks < room ? t->n_marks : room;
    memcpy(marks, t->marks, n * sizeof(fl_mark));
    *lost = t->lost_marks + (t->n_marks - n);
    t->n_marks = 0;
    t->lost_marks = 0;
    return n;
}
#endif

void fl_count_head(const fl_engine *e, fl_head_counts *counts) { *counts = e->counts; }

/* Whether a page is there and as long as that. */
static int is_page(const fl_engine *e, uint32_t page, size_t size) {
    return page < e->n_pages && size == e->sizes.page_bytes;
}

fl_status fl_page_read(const fl_engine *e, uint32_t page, void *out, size_t size) {
    if (!is_page(e, page, size) || !out) return FL_BAD_ARGUMENT;
    size_t part = e->sizes.head_bytes;
    for (int32_t head = 0; head < FL_MODEL.kv_heads_in_all; head++)
        memcpy((uint8_t *)out + (size_t)head * part, fl_pages_of_head(e, head) + page * part, part);
    return FL_OK;
}

fl_status fl_page_write(fl_engine *e, uint32_t page, const void *from, size_t size) {
    if (!is_page(e, page, size) || !from) return FL_BAD_ARGUMENT;
    size_t part = e->sizes.head_bytes;
    for (int32_t head = 0; head < FL_MODEL.kv_heads_in_all; head++)
        memcpy(fl_pages_of_head(e, head) + page * part, (const uint8_t *)from + (size_t)head * part,
               part);
    return FL_OK;
}
