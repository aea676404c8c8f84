/* Random inputs for the entry, where there is no libFuzzer.
 *
 *     random ROUNDS      one input a round, each operation in turn
 */
#include <stdio.h>
#include <stdlib.h>

#include "fuzz.h"

int main(int argc, char **argv) {
    int rounds = argc > 1 ? (int)strtol(argv[1], NULL, 10) : 1000;
    fz_input random = fz_open((const uint8_t *)"flashlite", 9);
    uint8_t data[96];
    for (int i = 0; i < rounds; i++) {
        size_t size = fz_random(&random) % sizeof data + 1;
        for (size_t j = 1; j < size; j++) data[j] = (uint8_t)(fz_random(&random) >> 56);
        data[0] = (uint8_t)i; /* 256 is no multiple of the operations, but nearly */
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("%s: %d rounds\n", fz_tables[fz_n_tables - 1]->isa, rounds);
    return 0;
}
