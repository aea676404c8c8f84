/* flashlite: marks of where a part of a step ends, in libraries built with FL_PROFILE.
 *
 * In all other libraries FL_MARK and FL_WAIT are nothing: not a byte of code or of memory. */
#ifndef FL_MARK_H
#define FL_MARK_H

#include "fl_state.h"

#ifdef FL_PROFILE

static inline void fl_set_mark(fl_thread *t, fl_part part) {
    if (part == FL_PART_BEGIN) t->layer = 0;
    if (t->n_marks < FL_MARKS)
        t->marks[t->n_marks++] = (fl_mark){fl_os_clock(), t->waited, (uint16_t)part, t->layer};
    else
        t->lost_marks++;
    t->waited = 0;
    if (part == FL_PART_HIDDEN) t->layer++; /* the last part of a layer */
}

static inline void fl_wait(fl_thread *t) {
    if (t->engine->barrier.n == 1) return;
    uint64_t begin = fl_os_clock();
    fl_barrier_wait(&t->engine->barrier);
    t->waited += (uint32_t)(fl_os_clock() - begin);
}

#define FL_MARK(t, part) fl_set_mark(t, FL_PART_##part)
#define FL_WAIT(e, t) ((void)(e), fl_wait(t))

#else

#define FL_MARK(t, part) ((void)0)
#define FL_WAIT(e, t) fl_barrier_wait(&(e)->barrier)

#endif

#endif
