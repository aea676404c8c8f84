/* flashlite: how attention's answers over segments of positions become one. */
#ifndef FL_SEGMENT_H
#define FL_SEGMENT_H

#include "fl_kernels.h"
#include "fl_math.h"

/* The answer of one segment to a query that sees the positions [first, last], segments in rising
 * order -> out, mass: the first one is taken as it is, each other joined to those before by its
 * share of the softmax's sum. A segment that the query does not see changes nothing. */
static inline void fl_take_segment(float *restrict out, fl_mass *mass, const float *restrict answer,
                                   fl_mass by, int32_t head_dim, int32_t first, int32_t last,
                                   int32_t segment) {
    if (first > last || segment < first / FL_SEGMENT || segment > last / FL_SEGMENT) return;
    if (segment == first / FL_SEGMENT) {
        memcpy(out, answer, (size_t)head_dim * sizeof *out);
        *mass = by;
        return;
    }
    float max = by.max > mass->max ? by.max : mass->max;
    float a = mass->sum * (mass->max < max ? fl_exp2(mass->max - max) : 1.0f);
    float b = by.sum * (by.max < max ? fl_exp2(by.max - max) : 1.0f), sum = a + b;
    *mass = (fl_mass){.max = max, .sum = sum};
    a /= sum;
    b /= sum;
    for (int32_t c = 0; c < head_dim; c++) out[c] = out[c] * a + answer[c] * b;
}

#endif
