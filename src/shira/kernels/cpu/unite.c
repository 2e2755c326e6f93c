/* The union of sorted positions, and the place of each position in it. native.py calls it; ../reference.py specifies it. */
#include "native.h"

/* Sorted positions to merge with others; native.py fills an array of these. */
typedef struct {
    const void *positions; /* [count], int32 or int64, strictly increasing, at least 0 */
    int32_t *places;       /* [count], receives the place of each position in the union */
    int64_t count, done;   /* number of positions; number of positions before the window */
} Run;

/* One window of positions at a time, one bit for each position: it stays in cache, and no two positions are compared, whatever
 * the number of runs. */
enum { WINDOW = 1 << 17, WORDS = WINDOW / 64 };

#define BELOW(bit) (((uint64_t)1 << (bit)) - 1)

/* NAME: merged receives the union; counts receives how many runs have each position of it. Returns the size of the union.
 * NAME_next: the start of the window that holds the next position, or `end` if there is none. It is called after an empty
 * window, so that a long distance without positions is skipped. */
#define UNITE(NAME, INDEX)                                                                                      \
    static int64_t NAME##_next(const Run *runs, Py_ssize_t count, int64_t end) {                                \
        int64_t next = end;                                                                                     \
        for (Py_ssize_t r = 0; r < count; r++)                                                                  \
            if (runs[r].done < runs[r].count && ((const INDEX *)runs[r].positions)[runs[r].done] < next)        \
                next = ((const INDEX *)runs[r].positions)[runs[r].done];                                        \
        return next < end ? next & ~(int64_t)(WINDOW - 1) : end;                                                \
    }                                                                                                           \
    FAST_VERSIONS                                                                                               \
    static int64_t NAME(Run *runs, Py_ssize_t count, int64_t end, INDEX *merged, int32_t *counts) {             \
        int64_t found = 0;                                                                                      \
        for (int64_t start = 0, then; start < end;                                                              \
             start = found > then ? start + WINDOW : NAME##_next(runs, count, end)) {                           \
            then = found;                                                                                       \
            uint64_t held[WORDS] = {0};                                                                         \
            int32_t before[WORDS];                                                                              \
            for (Py_ssize_t r = 0; r < count; r++) {                                                            \
                const INDEX *positions = (const INDEX *)runs[r].positions;                                      \
                for (int64_t i = runs[r].done; i < runs[r].count && positions[i] - start < WINDOW; i++) {       \
                    const uint32_t at = (uint32_t)(positions[i] - start);                                       \
                    held[at / 64] |= (uint64_t)1 << at % 64;                                                    \
                }                                                                                               \
            }                                                                                                   \
            for (int w = 0; w < WORDS; w++) {                                                                   \
                before[w] = (int32_t)found;                                                                     \
                for (uint64_t bits = held[w]; bits; bits &= bits - 1, found++)                                  \
                    merged[found] = (INDEX)(start + w * 64 + ONES((bits & (0 - bits)) - 1)), counts[found] = 0; \
            }                                                                                                   \
            for (Py_ssize_t r = 0; r < count; r++) {                                                            \
                const INDEX *positions = (const INDEX *)runs[r].positions;                                      \
                int64_t i = runs[r].done;                                                                       \
                for (; i < runs[r].count && positions[i] - start < WINDOW; i++) {                               \
                    const uint32_t at = (uint32_t)(positions[i] - start);                                       \
                    const int32_t place = before[at / 64] + ONES(held[at / 64] & BELOW(at % 64));               \
                    runs[r].places[i] = place, counts[place]++;                                                 \
                }                                                                                               \
                runs[r].done = i;                                                                               \
            }                                                                                                   \
        }                                                                                                       \
        return found;                                                                                           \
    }
UNITE(unite_4, int32_t)
UNITE(unite_8, int64_t)

/* The union of runs whose positions are below `end`; returns its size. `merged` and `counts` have room for all positions
 * of all runs. It uses one thread and no shared state, so several threads may call it. */
PyObject *unite(PyObject *self, PyObject *args) {
    unsigned long long address, merged, counts;
    Py_ssize_t count;
    long long end, found;
    int index_bytes;
    (void)self;
    if (!PyArg_ParseTuple(args, "KnLKKi", &address, &count, &end, &merged, &counts, &index_bytes)) return NULL;
    Run *runs = (Run *)(uintptr_t)address;
    Py_BEGIN_ALLOW_THREADS
    found = index_bytes == 8 ? unite_8(runs, count, end, (int64_t *)(uintptr_t)merged, (int32_t *)(uintptr_t)counts)
                             : unite_4(runs, count, end, (int32_t *)(uintptr_t)merged, (int32_t *)(uintptr_t)counts);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(found);
}
