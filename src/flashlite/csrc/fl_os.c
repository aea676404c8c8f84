#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "fl_os.h"

#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(_WIN32)
#include <windows.h>
#else
#include <sys/mman.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* About 50 microseconds: longer than a phase of one token, shorter than a time slice, so that a
 * busy neighbour costs one sleep and not a whole slice of spinning. */
enum { SPINS = 4000 };

void *fl_os_reserve(size_t bytes) {
#if defined(_WIN32)
    return VirtualAlloc(NULL, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
#else
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
#endif
}

void fl_os_release(void *memory, size_t bytes) {
    if (!memory) return;
#if defined(_WIN32)
    (void)bytes;
    VirtualFree(memory, 0, MEM_RELEASE);
#else
    munmap(memory, bytes);
#endif
}

uint64_t fl_os_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

int fl_event_init(fl_event *event) {
    atomic_init(&event->value, 0);
    atomic_init(&event->sleepers, 0);
    if (pthread_mutex_init(&event->mutex, NULL)) return 1;
    if (pthread_cond_init(&event->changed, NULL)) {
        pthread_mutex_destroy(&event->mutex);
        return 1;
    }
    return 0;
}

void fl_event_destroy(fl_event *event) {
    pthread_cond_destroy(&event->changed);
    pthread_mutex_destroy(&event->mutex);
}

/* Sequentially consistent on both sides: either the sleeper sees the new value, or the one who
 * sets it sees the sleeper. */
void fl_event_set(fl_event *event, uint32_t value) {
    atomic_store(&event->value, value);
    if (atomic_load(&event->sleepers) == 0) return;
#if defined(__linux__)
    syscall(SYS_futex, &event->value, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#else
    pthread_mutex_lock(&event->mutex);
    pthread_cond_broadcast(&event->changed);
    pthread_mutex_unlock(&event->mutex);
#endif
}

static int spin(fl_event *event, uint32_t seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&event->value, memory_order_acquire) != seen) return 1;
        relax();
    }
    return 0;
}

static void sleep_until(fl_event *event, uint32_t seen) {
    atomic_fetch_add(&event->sleepers, 1);
#if defined(__linux__)
    while (atomic_load(&event->value) == seen)
        syscall(SYS_futex, &event->value, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
#else
    pthread_mutex_lock(&event->mutex);
    while (atomic_load(&event->value) == seen) pthread_cond_wait(&event->changed, &event->mutex);
    pthread_mutex_unlock(&event->mutex);
#endif
    atomic_fetch_sub(&event->sleepers, 1);
}

uint32_t fl_event_wait(fl_event *event, uint32_t seen) {
    if (!spin(event, seen)) sleep_until(event, seen);
    return atomic_load_explicit(&event->value, memory_order_acquire);
}

int fl_barrier_init(fl_barrier *barrier, uint32_t n) {
    barrier->n = n;
    atomic_init(&barrier->arrived, 0);
    atomic_init(&barrier->slept, 0);
    return fl_event_init(&barrier->phase);
}

void fl_barrier_destroy(fl_barrier *barrier) { fl_event_destroy(&barrier->phase); }

void fl_barrier_wait(fl_barrier *barrier) {
    uint32_t n = barrier->n; /* read before arriving: afterwards it may change */
    if (n == 1) return;
    uint32_t phase = atomic_load_explicit(&barrier->phase.value, memory_order_acquire);
    if (atomic_fetch_add(&barrier->arrived, 1) == n - 1) {
        atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
        fl_event_set(&barrier->phase, phase + 1);
    } else if (!spin(&barrier->phase, phase)) {
        uint64_t begin = fl_os_clock();
        sleep_until(&barrier->phase, phase);
        atomic_fetch_add(&barrier->slept, fl_os_clock() - begin);
    }
}

#if defined(__x86_64__)
/* Linux gives the 8 KB of tiles to a process that asks for them. */
static int allow_tiles(void) {
#if defined(__linux__)
    const int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return 0;
#endif
}

/* Whether CPU and operating system have all of the given bits. Asked here and not through
 * __builtin_cpu_supports, which knows fewer instruction sets in some compilers' runtimes. */
static int has_features(uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t leaf7_ecx,
                        uint32_t leaf7_edx, uint32_t saved) {
    uint32_t a, b, c, d, b7, c7, d7, states, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & leaf1_ecx) != leaf1_ecx) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return 0;
    if ((b7 & leaf7_ebx) != leaf7_ebx || (c7 & leaf7_ecx) != leaf7_ecx) return 0;
    if ((d7 & leaf7_edx) != leaf7_edx) return 0;
    __asm__ volatile("xgetbv" : "=a"(states), "=d"(high) : "c"(0)); /* OSXSAVE is in leaf1_ecx */
    return (states & saved) == saved;
}
#endif

int fl_os_runs(const char *isa) {
    if (!strcmp(isa, "plain") || !strcmp(isa, "fp32")) return 1;
#if defined(__x86_64__)
    const uint32_t fma_osxsave_avx_f16c = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;
    const uint32_t avx2 = 1u << 5, f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    const uint32_t vnni = 1u << 11, ymm = 0x6, zmm = 0xe6; /* registers that the system saves */
    if (!strcmp(isa, "avx2")) return has_features(fma_osxsave_avx_f16c, avx2, 0, 0, ymm);
    if (!strcmp(isa, "avx512"))
        return has_features(fma_osxsave_avx_f16c, avx2 | f_dq_bw_vl, vnni, 0, zmm);
    const uint32_t tile_int8 = 1u << 24 | 1u << 25, tiles = 0x60000;
    if (!strcmp(isa, "amx"))
        return has_features(fma_osxsave_avx_f16c, avx2 | f_dq_bw_vl, vnni, tile_int8,
                            zmm | tiles) &&
               allow_tiles();
#endif
    return 0;
}
