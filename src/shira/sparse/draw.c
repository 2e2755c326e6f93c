/* Random positions, not yet sorted. positions.py calls it, and specifies it by doing the same with torch. */
#include "../kernels/cpu/native.h"

enum { ROUNDS = 6, BLOCK = 4096 };

INLINE uint64_t mix(uint64_t word) {
    word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9u;
    word = (word ^ word >> 27) * 0x94d049bb133111ebu;
    return word ^ word >> 31;
}

/* The image of each number under the keyed permutation of 0 ... 2^(2 * half) - 1, in place. */
FAST_VERSIONS
static void permute(uint64_t *numbers, int64_t count, int half, const uint64_t *keys) {
    const uint64_t low = ((uint64_t)1 << half) - 1;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        uint64_t left = numbers[i] >> half, right = numbers[i] & low;
        for (int round = 0; round < ROUNDS; round++) {
            const uint64_t next = left ^ (mix(right + keys[round]) & low);
            left = right, right = next;
        }
        numbers[i] = left << half | right;
    }
}

/* drawn receives, in any order, the images of 0 ... count - 1, each permuted again until it is below numel. */
static void draw_into(uint64_t *drawn, int64_t count, uint64_t numel, int half, const uint64_t *keys) {
    uint64_t numbers[BLOCK];
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t left = count - start < BLOCK ? count - start : BLOCK;
        for (int64_t i = 0; i < left; i++) numbers[i] = (uint64_t)(start + i);
        while (left) {
            permute(numbers, left, half, keys);
            int64_t outside = 0;
            for (int64_t i = 0; i < left; i++) {
                const uint64_t image = numbers[i];
                *drawn = numbers[outside] = image;
                drawn += image < numel, outside += image >= numel;
            }
            left = outside;
        }
    }
}

static PyObject *draw(PyObject *self, PyObject *args) {
    unsigned long long keys, drawn;
    long long numel, count;
    int half;
    (void)self;
    if (!PyArg_ParseTuple(args, "LLiKK", &numel, &count, &half, &keys, &drawn)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    draw_into((uint64_t *)(uintptr_t)drawn, count, (uint64_t)numel, half, (const uint64_t *)(uintptr_t)keys);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"draw", draw, METH_VARARGS, "draw(past the last position, how many, half of the bits, address of 6 keys, drawn)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_drawing", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__drawing(void) { return PyModule_Create(&module); }
