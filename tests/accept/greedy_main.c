/* Runs a compiled model without Python: greedy tokens after a prompt, one per line.
 *
 *     greedy WEIGHTS.bin N_NEW ID [ID ...]
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fl.h"

enum { MAX_IDS = 128, N_PAGES = MAX_IDS / FL_PAGE_TOKENS };

static uint8_t *read_weights(const char *path, size_t size) {
    FILE *file = fopen(path, "rb");
    uint8_t *weights = aligned_alloc(64, (size + 63) / 64 * 64);
    if (!file || !weights || fread(weights, 1, size, file) != size) return NULL;
    fclose(file);
    return weights;
}

int main(int argc, char **argv) {
    int32_t n = argc - 3, n_new = argc > 2 ? atoi(argv[2]) : 0;
    int32_t ids[MAX_IDS], positions[MAX_IDS], sequences[MAX_IDS] = {0}, pages[N_PAGES];
    if (n < 1 || n_new < 1 || n + n_new > MAX_IDS) return 2;
    for (int32_t i = 0; i < MAX_IDS; i++) positions[i] = i;
    for (int32_t i = 0; i < N_PAGES; i++) pages[i] = N_PAGES - 1 - i;
    for (int32_t i = 0; i < n; i++) ids[i] = atoi(argv[i + 3]);

    fl_info info;
    fl_describe(&info, 2);
    uint8_t *weights = read_weights(argv[1], info.weights_size);
    float *logits = malloc(info.vocab_size * sizeof *logits);
    fl_options options = {.abi = FL_ABI, .n_threads = 2, .weights = weights,
                          .weights_size = info.weights_size, .n_pages = N_PAGES,
                          .max_sequences = 1};
    fl_engine *engine;
    if (!weights || !logits || fl_open(&options, &engine) != FL_OK) return 3;
    for (int32_t done = 0; n_new > 0; n_new--) {
        int32_t last = n - done - 1;
        fl_batch batch = {.n_tokens = (uint32_t)(n - done), .n_sequences = 1,
                          .tokens = ids + done, .positions = positions + done,
                          .sequences = sequences, .pages = pages, .page_stride = N_PAGES,
                          .n_logits = 1, .logit_rows = &last, .logits = logits};
        if (fl_step(engine, &batch) != FL_OK) return 4;
        int32_t best = 0;
        for (uint32_t i = 1; i < info.vocab_size; i++)
            if (logits[i] > logits[best]) best = (int32_t)i;
        printf("%d\n", best);
        done = n;
        ids[n++] = best;
    }
    fl_close(engine);
    free(logits);
    free(weights);
    return 0;
}
