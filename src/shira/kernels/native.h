/* What the extension's files share. */
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

/* bfloat16 is the upper half of a float */
static inline float widened(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

PyObject *merge(PyObject *self, PyObject *args); /* fusion.c */
PyObject *fused(PyObject *self, PyObject *args);

#endif
