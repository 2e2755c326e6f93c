/* Switching on the CPU. ../reference.py specifies it; native.py calls it.
 *
 * swap: copies old entries of weights to a stash, and writes new ones, in one pass over the touched cache lines. Each line is
 * prefetched, because sparse positions are too far apart for the hardware prefetcher.
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

static PyMethodDef methods[] = {
    {"swap", swap, METH_VARARGS, "swap(address of an array of parts, how many, mode, whether to check first, address of begun, threads)"},
    {"outside", outside, METH_VARARGS, "outside(address of an array of parts, how many)"},
    {"sampled", sampled, METH_VARARGS, "sampled(grad_output, input, entry bytes, tokens, rows, width, positions, index bytes, count, out, starts, packed, block, threads)"},
    {"sampled_images", sampled_images, METH_VARARGS, "sampled_images(grad_output, input, entry bytes, images, out, in, address of two sides, positions, index bytes, count, out, starts, packed, some images, some lines, threads)"},
    {"unite", unite, METH_VARARGS, "unite(address of an array of runs, how many, past the last position, merged, counts, index bytes)"},
    {"combine", combine, METH_VARARGS, "combine(address of an array of combinations, how many, mode, whether plain, threads)"},
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
