/* The two loops that shira lives by, for the CPU. reference.py says what they must do; native.py calls them.
 *
 * swap: move entries between weights and the values that wait for them. One pass over the touched cache lines: each is
 * fetched ahead of its use, since sparse positions are too far apart for the hardware to guess.
 *
 * sampled: dot products of rows, one for each position of a mask: the weight gradient where it is wanted.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#ifndef _WIN32
#include <pthread.h>
#endif

#if defined(__GNUC__) || defined(__clang__)
#define PREFETCH(address) __builtin_prefetch((address), 1)
#else
#define PREFETCH(address) ((void)0)
#endif

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FAST_VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FAST_VERSIONS
#endif

enum { AHEAD = 32, MAX_THREADS = 64, ENOUGH = 16384 }; /* positions: to fetch ahead; that are worth a thread */

/* One tensor's part of a plan; native.py fills an array of these. */
typedef struct {
    void *weight;        /* its first entry */
    const void *indices; /* [count], int32 or int64 */
    const void *values;  /* [count], what to write; NULL: write nothing */
    void *stash;         /* [count], where to keep what was there; NULL: keep nothing */
    int64_t count;
    int32_t entry_bytes; /* 1, 2, 4 or 8 */
    int32_t index_bytes; /* 4 or 8 */
} Part;

#define SWAP(NAME, ENTRY, INDEX)                                                 \
    static void NAME(const Part *part, int64_t begin, int64_t end) {             \
        ENTRY *weight = (ENTRY *)part->weight;                                   \
        const INDEX *indices = (const INDEX *)part->indices;                     \
        const ENTRY *values = (const ENTRY *)part->values;                       \
        ENTRY *stash = (ENTRY *)part->stash;                                     \
        for (int64_t i = begin; i < end; i++) {                                  \
            if (i + AHEAD < end) PREFETCH(&weight[indices[i + AHEAD]]);          \
            const INDEX where = indices[i];                                      \
            if (stash) stash[i] = weight[where];                                 \
            if (values) weight[where] = values[i];                               \
        }                                                                        \
    }
SWAP(swap_1_4, uint8_t, int32_t)
SWAP(swap_2_4, uint16_t, int32_t)
SWAP(swap_4_4, uint32_t, int32_t)
SWAP(swap_8_4, uint64_t, int32_t)
SWAP(swap_1_8, uint8_t, int64_t)
SWAP(swap_2_8, uint16_t, int64_t)
SWAP(swap_4_8, uint32_t, int64_t)
SWAP(swap_8_8, uint64_t, int64_t)

static void swap_part(const Part *part, int64_t begin, int64_t end) {
    const int wide = part->index_bytes == 8;
    switch (part->entry_bytes) {
    case 1: (wide ? swap_1_8 : swap_1_4)(part, begin, end); break;
    case 2: (wide ? swap_2_8 : swap_2_4)(part, begin, end); break;
    case 4: (wide ? swap_4_8 : swap_4_4)(part, begin, end); break;
    case 8: (wide ? swap_8_8 : swap_8_4)(part, begin, end); break;
    }
}

/* One thread's share: positions begin to end - 1 of all parts laid end to end. */
typedef struct {
    const Part *parts;
    Py_ssize_t count;
    int64_t begin, end;
} Share;

static void *swap_share(void *argument) {
    const Share *share = (const Share *)argument;
    int64_t before = 0;
    for (Py_ssize_t p = 0; p < share->count && before < share->end; p++) {
        const int64_t length = share->parts[p].count;
        const int64_t begin = share->begin > before ? share->begin - before : 0;
        const int64_t end = share->end - before < length ? share->end - before : length;
        if (begin < end) swap_part(&share->parts[p], begin, end);
        before += length;
    }
    return NULL;
}

static void swap_all(const Part *parts, Py_ssize_t count, long threads) {
    int64_t total = 0;
    for (Py_ssize_t p = 0; p < count; p++) total += parts[p].count;
    if (threads > total / ENOUGH) threads = (long)(total / ENOUGH);
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads < 1) threads = 1;
    Share shares[MAX_THREADS];
    for (long t = 0; t < threads; t++) {
        const Share share = {parts, count, total * t / threads, total * (t + 1) / threads};
        shares[t] = share;
    }
#ifndef _WIN32
    pthread_t workers[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    for (long t = 1; t < threads; t++) started[t] = pthread_create(&workers[t], NULL, swap_share, &shares[t]) == 0;
    swap_share(&shares[0]);
    for (long t = 1; t < threads; t++) {
        if (started[t]) pthread_join(workers[t], NULL);
        else swap_share(&shares[t]);
    }
#else
    for (long t = 0; t < threads; t++) swap_share(&shares[t]);
#endif
}

/* Once begun it ends: no signal and no exception comes between the entries. `begun` gets the number of parts as it begins,
 * so that whoever is interrupted around this call knows whether the stash holds what it should. */
static PyObject *swap(PyObject *self, PyObject *args) {
    unsigned long long address, begun;
    Py_ssize_t parts;
    long threads;
    (void)self;
    if (!PyArg_ParseTuple(args, "KnKl", &address, &parts, &begun, &threads)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (begun) *(int64_t *)(uintptr_t)begun = parts;
    swap_all((const Part *)(uintptr_t)address, parts, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* a · b over `length` floats */
static inline float dot(const float *a, const float *b, int64_t length) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < length; t++) sum += a[t] * b[t];
    return sum;
}

/* out[i] += rows[r] · columns[c] for position r * width + c; rows and columns are `length` floats, `stride` apart */
FAST_VERSIONS
static void sampled_part(const float *rows, const float *columns, const int32_t *positions, float *out, int64_t count,
                         int64_t width, int64_t length, int64_t stride) {
    int64_t begin = 0, end = 0; /* of the row in positions, which are sorted: so no division for each */
    const float *row = rows;
    for (int64_t i = 0; i < count; i++) {
        const int64_t position = positions[i];
        if (position >= end) {
            begin = position / width * width;
            end = begin + width;
            row = rows + position / width * stride;
        }
        out[i] += dot(row, columns + (position - begin) * stride, length);
    }
}

static PyObject *sampled(PyObject *self, PyObject *args) {
    unsigned long long rows, columns, positions, out;
    long long count, width, length, stride;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKKKLLLL", &rows, &columns, &positions, &out, &count, &width, &length, &stride)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    sampled_part((const float *)(uintptr_t)rows, (const float *)(uintptr_t)columns, (const int32_t *)(uintptr_t)positions,
                 (float *)(uintptr_t)out, count, width, length, stride);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"swap", swap, METH_VARARGS, "swap(address of an array of parts, how many, address of begun, threads)"},
    {"sampled", sampled, METH_VARARGS, "sampled(rows, columns, positions, out, count, width, length, stride)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
