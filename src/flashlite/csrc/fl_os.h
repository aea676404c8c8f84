/* flashlite: everything that asks the operating system for something, in one place. */
#ifndef FL_OS_H
#define FL_OS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* Zeroed memory, aligned to a page of the system, resident only where it is touched.
 * NULL when the system refuses. */
void *fl_os_reserve(size_t bytes);
void fl_os_release(void *memory, size_t bytes);

/* Nanoseconds since some fixed moment. */
uint64_t fl_os_clock(void);

/* A value that threads wait on: they spin briefly, then sleep. */
typedef struct {
    _Atomic uint32_t value;
    _Atomic uint32_t sleepers;
    pthread_mutex_t mutex; /* unused on Linux, where the kernel waits on `value` itself */
    pthread_cond_t changed;
} fl_event;

int fl_event_init(fl_event *event); /* 0 on success */
void fl_event_destroy(fl_event *event);
void fl_event_set(fl_event *event, uint32_t value);      /* by one thread; wakes everybody */
uint32_t fl_event_wait(fl_event *event, uint32_t seen); /* until it is not `seen`: the new value */

/* All of `n` threads arrive, then all go on. `n` may be changed while nobody is inside. */
typedef struct {
    fl_event phase;
    _Atomic uint32_t arrived;
    uint32_t n;
    _Atomic uint64_t slept; /* nanoseconds that threads slept here, added up; for the caller */
} fl_barrier;

int fl_barrier_init(fl_barrier *barrier, uint32_t n); /* 0 on success */
void fl_barrier_destroy(fl_barrier *barrier);
void fl_barrier_wait(fl_barrier *barrier);

/* Whether this CPU and system run the instructions of "plain", "fp32", "avx2", "avx512" or
 * "amx", whose registers this asks the system for. */
int fl_os_runs(const char *isa);

#endif
