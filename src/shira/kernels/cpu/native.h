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

PyObject *unite(PyObject *self, PyObject *args); /* unite.c */
PyObject *combine(PyObject *self, PyObject *args); /* combine.c */

#endif
