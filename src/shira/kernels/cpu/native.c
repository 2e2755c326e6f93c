/* Switching and sampling on the CPU. ../reference.py specifies both; native.py calls them.
 *
 * swap: copies old entries of weights to a stash, and writes new ones, in one pass over the touched cache lines. Each line is
 * prefetched, because sparse positions are too far apart for the hardware prefetcher.
 *
 * sampled: the weight gradient at a mask's positions, one dot product of two rows for each position.
 */
#define _GNU_SOURCE /* RTLD_DEFAULT */
#include "native.h"

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif

/* How many positions to prefetch ahead, and into which cache. By default lines bypass the second-level cache, because each
 * is used once. On AMD's processors they go into it, and further ahead, because more lines may be in transit to it.
 * docs/notebook.md has the measurements. */
static int64_t fetch_ahead = 64;
static int fetch_second_level = 0;

static void choose_fetching(void) {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) {
        fetch_ahead = 256;
        fetch_second_level = 1;
    }
#endif
}

enum { KEEP_AND_WRITE, WRITE, RESTORE }; /* modes: fill the stash and write values; write values; write the stash */

/* One tensor's part of a plan; native.py fills an array of these. */
typedef struct {
    void *weight;        /* its first entry */
    const void *indices; /* [count], int32 or int64 */
    const void *values;  /* [count], the new values; NULL: write nothing */
    void *stash;         /* [count], receives the old values; NULL: keep nothing */
    const void *written; /* [count], values that the weight must hold, bit for bit, before anything is written; NULL: any */
    int64_t count;
    int64_t entries;     /* of the weight */
    int32_t entry_bytes; /* 1, 2, 4 or 8 */
    int32_t index_bytes; /* 4 or 8 */
} Part;

#define SWAP(NAME, ENTRY, INDEX)                                                 \
    static void NAME(const Part *part, int64_t begin, int64_t end) {             \
        ENTRY *weight = (ENTRY *)part->weight;                                   \
        const INDEX *indices = (const INDEX *)part->indices;                     \
        const ENTRY *values = (const ENTRY *)part->values;                       \
        ENTRY *stash = (ENTRY *)part->stash;                                     \
        const int64_t ahead = fetch_ahead;                                       \
        const int second_level = fetch_second_level;                             \
        for (int64_t i = begin; i < end; i++) {                                  \
            if (i + ahead < end) {                                               \
                const ENTRY *next = &weight[indices[i + ahead]];                 \
                if (second_level) PREFETCH(next, 1);                             \
                else PREFETCH(next, 0);                                          \
            }                                                                    \
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

/* Whether the weight holds what was written, at every `step`-th position. Not at every position: to compare an entry takes a
 * fifth of the time of writing it. */
static int holds(const Part *part, int64_t step) {
    const char *weight = (const char *)part->weight, *written = (const char *)part->written;
    const int64_t bytes = part->entry_bytes;
    for (int64_t i = 0; i < part->count; i += step) {
        const int64_t where = part->index_bytes == 8 ? ((const int64_t *)part->indices)[i] : ((const int32_t *)part->indices)[i];
        if (memcmp(weight + where * bytes, written + i * bytes, (size_t)bytes)) return 0;
    }
    return 1;
}

/* Whether all positions are inside the weight. The loop has no branch, so that vector instructions compare several at once. */
static int inside(const Part *part) {
    int outside = 0;
    if (part->index_bytes == 8) {
        const int64_t *indices = (const int64_t *)part->indices;
        for (int64_t i = 0; i < part->count; i++) outside |= (uint64_t)indices[i] >= (uint64_t)part->entries;
    } else {
        const int32_t *indices = (const int32_t *)part->indices;
        const uint32_t entries = part->entries > INT32_MAX ? (uint32_t)INT32_MAX + 1 : (uint32_t)part->entries;
        for (int64_t i = 0; i < part->count; i++) outside |= (uint32_t)indices[i] >= entries;
    }
    return !outside;
}

/* A job of `total` items, and the function that does a share of it. */
typedef struct {
    void *(*work)(void *);
    const void *job;
    int64_t total;
} Team;

/* If torch loaded GNU OpenMP with global symbols, torch's own threads do the work. Our threads would wait for torch's, which
 * busy-wait for a while after finishing. */
static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*gomp_thread)(void), (*gomp_threads)(void);

static void team_share(void *argument) {
    const Team *team = (const Team *)argument;
    const int64_t thread = gomp_thread(), threads = gomp_threads(); /* may be fewer than requested */
    Share share = {team->job, team->total * thread / threads, team->total * (thread + 1) / threads, thread};
    team->work(&share);
}

void in_parallel(void *(*work)(void *), const void *job, int64_t total, long threads, int64_t enough) {
    if (threads > total / enough) threads = (long)(total / enough);
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    Share all = {job, 0, total, 0};
    if (threads <= 1) {
        work(&all);
        return;
    }
    if (gomp_parallel) {
        Team team = {work, job, total};
        gomp_parallel(team_share, &team, (unsigned)threads, 0);
        return;
    }
#ifdef _WIN32
    work(&all);
#else
    Share shares[MAX_THREADS];
    pthread_t workers[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    for (long t = 0; t < threads; t++) {
        const Share share = {job, total * t / threads, total * (t + 1) / threads, t};
        shares[t] = share;
        started[t] = t > 0 && pthread_create(&workers[t], NULL, work, &shares[t]) == 0;
    }
    for (long t = 0; t < threads; t++) {
        if (!started[t]) work(&shares[t]);
    }
    for (long t = 0; t < threads; t++) {
        if (started[t]) pthread_join(workers[t], NULL);
    }
#endif
}

typedef struct {
    const Part *parts;
    Py_ssize_t count;
    int mode;
} Swap;

static void *swap_share(void *argument) {
    const Share *share = (const Share *)argument;
    const Swap *job = (const Swap *)share->job;
    int64_t before = 0;
    for (Py_ssize_t p = 0; p < job->count && before < share->end; p++) {
        const int64_t length = job->parts[p].count;
        const int64_t begin = share->begin > before ? share->begin - before : 0;
        const int64_t end = share->end - before < length ? share->end - before : length;
        Part part = job->parts[p];
        if (job->mode == RESTORE) part.values = part.stash;
        if (job->mode != KEEP_AND_WRITE) part.stash = NULL;
        if (begin < end) swap_part(&part, begin, end);
        before += length;
    }
    return NULL;
}

static int64_t entries_of(const Part *parts, Py_ssize_t count) {
    int64_t total = 0;
    for (Py_ssize_t p = 0; p < count; p++) total += parts[p].count;
    return total;
}

enum { COMPARED = 16 }; /* entries of each part that are compared */

/* The number of the first part whose weight does not hold what was written; -1 if there is none. */
static Py_ssize_t changed(const Part *parts, Py_ssize_t count) {
    for (Py_ssize_t p = 0; p < count; p++)
        if (parts[p].written && !holds(&parts[p], (parts[p].count + COMPARED - 1) / COMPARED)) return p;
    return -1;
}

/* The number of the first part with a position outside of its weight; -1 if there is none. */
static PyObject *outside(PyObject *self, PyObject *args) {
    unsigned long long address;
    Py_ssize_t count, found = -1;
    (void)self;
    if (!PyArg_ParseTuple(args, "Kn", &address, &count)) return NULL;
    const Part *parts = (const Part *)(uintptr_t)address;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t p = 0; p < count && found < 0; p++)
        if (!inside(&parts[p])) found = p;
    Py_END_ALLOW_THREADS
    return PyLong_FromSsize_t(found);
}

/* Run all parts in a mode. Returns -1; or, if `check` and before anything is written, the number of the first part whose weight
 * does not hold what was written.
 *
 * No signal and no exception can stop it between two entries. Before the first write `begun` receives the number of parts, so
 * that a caller that is interrupted around this call knows whether the stash is valid. */
static PyObject *swap(PyObject *self, PyObject *args) {
    unsigned long long address, begun;
    Py_ssize_t parts;
    int mode;
    int check;
    long threads;
    Py_ssize_t found = -1;
    (void)self;
    if (!PyArg_ParseTuple(args, "KniiKl", &address, &parts, &mode, &check, &begun, &threads)) return NULL;
    const Swap job = {(const Part *)(uintptr_t)address, parts, mode};
    Py_BEGIN_ALLOW_THREADS
    if (check) found = changed(job.parts, parts);
    if (found < 0) {
        if (begun) *(int64_t *)(uintptr_t)begun = parts;
        in_parallel(swap_share, &job, entries_of(job.parts, parts), threads, 4096);
    }
    Py_END_ALLOW_THREADS
    return PyLong_FromSsize_t(found);
}

/* out[i] += rows[r] · columns[c] where positions[i] = r * width + c. Each row and each column is `length` floats long. Four
 * positions of a row at a time, because their sums do not wait for each other. */
typedef struct {
    const float *rows, *columns;
    const void *positions; /* sorted; int32 or int64 */
    float *out;
    int64_t width, length;
    int index_bytes;
} Sampled;

#define SAMPLED(NAME, INDEX)                                                                                  \
    FAST_VERSIONS                                                                                             \
    static void NAME(const Sampled *job, int64_t first, int64_t last) {                                       \
        const INDEX *positions = (const INDEX *)job->positions;                                               \
        const int64_t width = job->width, length = job->length;                                               \
        float *out = job->out;                                                                                \
        int64_t i = first;                                                                                    \
        while (i < last) {                                                                                    \
            const int64_t row = positions[i] / width, begin = row * width, end = begin + width;               \
            const float *r = job->rows + row * length, *columns = job->columns - begin * length;              \
            for (; i + 3 < last && positions[i + 3] < end; i += 4) {                                          \
                const float *a = columns + positions[i] * length, *b = columns + positions[i + 1] * length;   \
                const float *c = columns + positions[i + 2] * length, *d = columns + positions[i + 3] * length; \
                float sa = 0.0f, sb = 0.0f, sc = 0.0f, sd = 0.0f;                                             \
                _Pragma("omp simd reduction(+ : sa, sb, sc, sd)")                                             \
                for (int64_t t = 0; t < length; t++) {                                                        \
                    sa += r[t] * a[t];                                                                        \
                    sb += r[t] * b[t];                                                                        \
                    sc += r[t] * c[t];                                                                        \
                    sd += r[t] * d[t];                                                                        \
                }                                                                                             \
                out[i] += sa, out[i + 1] += sb, out[i + 2] += sc, out[i + 3] += sd;                           \
            }                                                                                                 \
            for (; i < last && positions[i] < end; i++) {                                                     \
                const float *a = columns + positions[i] * length;                                             \
                float sa = 0.0f;                                                                              \
                _Pragma("omp simd reduction(+ : sa)")                                                         \
                for (int64_t t = 0; t < length; t++) sa += r[t] * a[t];                                       \
                out[i] += sa;                                                                                 \
            }                                                                                                 \
        }                                                                                                     \
    }
SAMPLED(sampled_4, int32_t)
SAMPLED(sampled_8, int64_t)

static void *sampled_share(void *argument) {
    const Share *share = (const Share *)argument;
    const Sampled *job = (const Sampled *)share->job;
    (job->index_bytes == 8 ? sampled_8 : sampled_4)(job, share->begin, share->end);
    return NULL;
}

/* Transpose: packed[j * length + t] = from[t * width + j] as float, for `length` tokens, from float32 or bfloat16. */
typedef struct {
    const void *from;
    float *packed;
    int64_t width, length;
    int entry_bytes;
} Pack;

enum { TILE = 16 };

#define PACK(NAME, ENTRY, WIDEN)                                                                       \
    FAST_VERSIONS                                                                                      \
    static void NAME(const Pack *job, int64_t first, int64_t last) {                                   \
        const ENTRY *from = (const ENTRY *)job->from;                                                  \
        const int64_t width = job->width, length = job->length;                                        \
        for (int64_t t = 0; t < length; t += TILE) {                                                   \
            const int64_t tokens = length - t < TILE ? length - t : TILE;                              \
            for (int64_t j = first; j < last; j++) {                                                   \
                float *to = job->packed + j * length + t;                                              \
                if (tokens == TILE)                                                                    \
                    for (int64_t k = 0; k < TILE; k++) to[k] = WIDEN(from[(t + k) * width + j]);       \
                else                                                                                   \
                    for (int64_t k = 0; k < tokens; k++) to[k] = WIDEN(from[(t + k) * width + j]);     \
            }                                                                                          \
        }                                                                                              \
    }
PACK(pack_float, float, )
PACK(pack_half, uint16_t, widened)

static void *pack_share(void *argument) {
    const Share *share = (const Share *)argument;
    const Pack *job = (const Pack *)share->job;
    (job->entry_bytes == 2 ? pack_half : pack_float)(job, share->begin, share->end);
    return NULL;
}

/* The weight gradient at some positions; see reference.sampled_gradient. It takes tokens in blocks that stay in cache.
 * `scratch` has room for block * (rows + width) floats. `out` must hold zeros at the start. */
static PyObject *sampled(PyObject *self, PyObject *args) {
    unsigned long long grad_output, input, positions, out, scratch;
    long long tokens, rows, width, count, block;
    int entry_bytes, index_bytes;
    long threads;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKiLLLKiLKKLl", &grad_output, &input, &entry_bytes, &tokens, &rows, &width, &positions,
                          &index_bytes, &count, &out, &scratch, &block, &threads))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t t = 0; t < tokens; t += block) {
        const int64_t length = tokens - t < block ? tokens - t : block;
        float *packed = (float *)(uintptr_t)scratch;
        const Pack a = {(const char *)(uintptr_t)grad_output + t * rows * entry_bytes, packed, rows, length, entry_bytes};
        const Pack b = {(const char *)(uintptr_t)input + t * width * entry_bytes, packed + rows * length, width, length,
                        entry_bytes};
        const Sampled job = {a.packed, b.packed, (const void *)(uintptr_t)positions, (float *)(uintptr_t)out, width, length,
                             index_bytes};
        in_parallel(pack_share, &a, rows, threads, 256);
        in_parallel(pack_share, &b, width, threads, 256);
        in_parallel(sampled_share, &job, count, threads, 1024);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"swap", swap, METH_VARARGS, "swap(address of an array of parts, how many, mode, whether to check first, address of begun, threads)"},
    {"outside", outside, METH_VARARGS, "outside(address of an array of parts, how many)"},
    {"sampled", sampled, METH_VARARGS, "sampled(grad_output, input, entry bytes, tokens, rows, width, positions, index bytes, count, out, scratch, block, threads)"},
    {"unite", unite, METH_VARARGS, "unite(address of an array of runs, how many, past the last position, merged, counts, index bytes)"},
    {"combine", combine, METH_VARARGS, "combine(address of an array of changes, how many, value bytes, weight, its entry bytes, past the last position, positions, values, base, mode, whether plain)"},
    {"add_products", add_products, METH_VARARGS, "add_products(address of an array of groups, how many, input, its entry bytes, output, its entry bytes, in, out, scratch, threads)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) {
    choose_fetching();
#ifdef __linux__
    *(void **)&gomp_thread = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
    *(void **)&gomp_threads = dlsym(RTLD_DEFAULT, "omp_get_num_threads");
    if (gomp_thread && gomp_threads) *(void **)&gomp_parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
#endif
    return PyModule_Create(&module);
}
