/* Definitions that the files of the extension share. */
#ifndef SHIRA_NATIVE_H
#define SHIRA_NATIVE_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FAST_VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FAST_VERSIONS
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define X86 /* intrinsics exist, for functions with a target attribute */
#endif

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline)) /* so that each of FAST_VERSIONS compiles it for its own target */
#define PREFETCH(address, level) __builtin_prefetch((address), 0, (level))
#else
#define INLINE static inline
#define PREFETCH(address, level) ((void)0)
#endif

/* number of bits that are set */
#if defined(__GNUC__) || defined(__clang__)
#define ONES(word) __builtin_popcountll(word)
#else
static inline int ONES(uint64_t word) {
    word -= word >> 1 & 0x5555555555555555u;
    word = (word & 0x3333333333333333u) + (word >> 2 & 0x3333333333333333u);
    return (int)(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
}
#endif

/* bfloat16 to float: it is the upper half of one */
static inline float widened(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* float to bfloat16: ties to even; NaN stays NaN */
static inline uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return value == value ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}

enum { MAX_THREADS = 64 };

/* One thread's share of a job: items begin to end - 1. thread: its number, below MAX_THREADS and the number of threads. */
typedef struct {
    const void *job;
    int64_t begin, end, thread;
} Share;

/* Run `work` on equal shares of `total` items, one share a thread. Each share has at least `enough` items. */
void in_parallel(void *(*work)(void *), const void *job, int64_t total, long threads, int64_t enough); /* native.c */

PyObject *sampled(PyObject *self, PyObject *args); /* sampled.c */
PyObject *sampled_images(PyObject *self, PyObject *args);
PyObject *unite(PyObject *self, PyObject *args); /* unite.c */
PyObject *combine(PyObject *self, PyObject *args); /* combine.c */
PyObject *add_products(PyObject *self, PyObject *args); /* rows.c */

#endif
