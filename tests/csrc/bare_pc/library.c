/* What ../fuzz needs of a C library, on a bare PC: it prints to port 0xe9 and switches
 * the machine off. ROUNDS: the program's argument, a string. */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

int main(int argc, char **argv);

static void out(uint16_t port, char c) { __asm volatile("outb %0, %1" : : "a"(c), "Nd"(port)); }

static void print(const char *text) {
    for (; *text; text++) out(0xe9, *text);
}

static void print_number(uint64_t x) {
    char digits[21], *at = digits + 20;
    *at = 0;
    do *--at = (char)('0' + x % 10);
    while (x /= 10);
    print(at);
}

void *memset(void *to, int c, size_t n) {
    void *at = to;
    __asm volatile("rep stosb" : "+D"(at), "+c"(n) : "a"(c) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, size_t n) {
    void *at = to;
    __asm volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(n) : : "memory");
    return to;
}

int memcmp(const void *a, const void *b, size_t n) {
    const volatile unsigned char *x = a, *y = b;
    for (size_t i = 0; i < n; i++) {
        if (x[i] != y[i]) return x[i] - y[i];
    }
    return 0;
}

long strtol(const char *text, char **end, int base) {
    (void)end, (void)base;
    long x = 0;
    while (*text >= '0' && *text <= '9') x = 10 * x + *text++ - '0';
    return x;
}

_Noreturn void exit(int status) {
    print("exit ");
    print_number((uint64_t)status);
    print("\n");
    for (const char *word = "Shutdown"; *word; word++) out(0x8900, *word);
    for (;;) __asm volatile("hlt");
}

_Noreturn void abort(void) { exit(1); }

int fflush(void *stream) { /* printf keeps nothing back */
    (void)stream;
    return 0;
}

/* One round's blocks take less than the 64 MiB after which memory is used anew. */
int posix_memalign(void **block, size_t align, size_t size) {
    static uintptr_t next;
    next = (next + align - 1) / align * align;
    if (next + size > (64u << 20)) next = 0;
    *block = (void *)((16u << 20) + next);
    next += size;
    return 0;
}

void free(void *block) { (void)block; }

/* %s and %d; for %zu and %.9g what they would print, the latter as a whole number of millionths */
int printf(const char *format, ...) {
    va_list args;
    va_start(args, format);
    for (; *format; format++) {
        if (*format != '%') {
            out(0xe9, *format);
        } else if (*++format == 's') {
            print(va_arg(args, const char *));
        } else if (*format == 'd') {
            print_number((uint64_t)va_arg(args, int));
        } else if (*format == 'z') {
            format++;
            print_number(va_arg(args, size_t));
        } else {
            format += 2;
            double x = va_arg(args, double) * 1e6;
            print(x < 0 ? "-" : "");
            print_number((uint64_t)(x < 0 ? -x : x));
            print("e-6");
        }
    }
    va_end(args);
    return 0;
}

/* Linked first: the program begins here. */
__attribute__((section(".start"))) void start(void) {
    char *argv[] = {"fuzz", ROUNDS, NULL};
    exit(main(2, argv));
}
