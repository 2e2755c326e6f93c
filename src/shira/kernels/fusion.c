/* Sparse tensors that meet, for the CPU. native.py calls these.
 *
 * merge: the union of sorted positions, and the place of each in it. reference.py says what it must do.
 *
 * fused: the same, and what becomes of the values there, in one pass; ../methods.py and ../fusion.py say what.
 */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off") /* a product is rounded before it is added, as in torch; others do so unasked */
#endif
#include "native.h"

#include <math.h>

#if defined(__GNUC__) || defined(__clang__)
#define FETCH(address) __builtin_prefetch((address), 0, 3) /* several adapters may have it */
#else
#define FETCH(address) ((void)0)
#endif

/* Sorted positions that are to be merged with others. */
typedef struct {
    const void *positions; /* [count], int32 or int64, strictly rising, at least 0 */
    int32_t *places;       /* [count], gets the place of each among the merged ones */
    int64_t count, done;   /* how many; how many lie before the window */
} Run;

/* A window of positions at a time, one bit each: it stays in cache, and any number of runs merge without a comparison. */
enum { WINDOW = 1 << 17, WORDS = WINDOW / 64 };

#if defined(__GNUC__) || defined(__clang__)
#define ONES(word) __builtin_popcountll(word)
#else
static inline int ONES(uint64_t word) {
    word -= word >> 1 & 0x5555555555555555u;
    word = (word & 0x3333333333333333u) + (word >> 2 & 0x3333333333333333u);
    return (int)(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
}
#endif
#define BELOW(bit) (((uint64_t)1 << (bit)) - 1)

/* merged: gets the union; touched: how many runs have each. Returns its size. */
#define MERGE(NAME, INDEX)                                                                                      \
    FAST_VERSIONS                                                                                               \
    static int64_t NAME(Run *runs, Py_ssize_t count, int64_t last, INDEX *merged, int32_t *touched) {           \
        int64_t found = 0;                                                                                      \
        for (int64_t start = 0; start < last; start += WINDOW) {                                                \
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
                    merged[found] = (INDEX)(start + w * 64 + ONES((bits & (0 - bits)) - 1)), touched[found] = 0; \
            }                                                                                                   \
            for (Py_ssize_t r = 0; r < count; r++) {                                                            \
                const INDEX *positions = (const INDEX *)runs[r].positions;                                      \
                int64_t i = runs[r].done;                                                                       \
                for (; i < runs[r].count && positions[i] - start < WINDOW; i++) {                               \
                    const uint32_t at = (uint32_t)(positions[i] - start);                                       \
                    const int32_t place = before[at / 64] + ONES(held[at / 64] & BELOW(at % 64));               \
                    runs[r].places[i] = place, touched[place]++;                                                \
                }                                                                                               \
                runs[r].done = i;                                                                               \
            }                                                                                                   \
        }                                                                                                       \
        return found;                                                                                           \
    }
MERGE(merge_4, int32_t)
MERGE(merge_8, int64_t)

/* The union of some runs, whose positions are below `last`, with room for all they hold. One thread: several may merge. */
PyObject *merge(PyObject *self, PyObject *args) {
    unsigned long long address, merged, touched;
    Py_ssize_t count;
    long long last, found;
    int index_bytes;
    (void)self;
    if (!PyArg_ParseTuple(args, "KnLKKi", &address, &count, &last, &merged, &touched, &index_bytes)) return NULL;
    Run *runs = (Run *)(uintptr_t)address;
    int32_t *counts = (int32_t *)(uintptr_t)touched;
    Py_BEGIN_ALLOW_THREADS
    found = index_bytes == 8 ? merge_8(runs, count, last, (int64_t *)(uintptr_t)merged, counts)
                             : merge_4(runs, count, last, (int32_t *)(uintptr_t)merged, counts);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(found);
}

/* What one adapter makes of some entries; native.py fills an array of these. */
typedef struct {
    const int32_t *positions; /* [count], strictly rising, at least 0 */
    const void *values;       /* [count] */
    void *under;              /* [count], gets the base under each */
    int64_t count, done;      /* how many; how many lie before the window */
    float strength;
    int32_t is_delta; /* or an overwrite, whose change is its difference from the base */
    int32_t is_exact; /* where it is alone, its value comes out bit for bit */
} Change;

/* What comes out: positions, new values and the base there, with room for all changes. And how it is made. */
typedef struct {
    int32_t *positions;
    void *values, *base;
    const void *weight; /* the base; NULL: zeros, and nobody wants to know what lies under */
    int mode;
} Result;

enum { SUM, MEAN, LARGEST };
enum { NEAR = 1 << 12, SOON = 64 }; /* positions at a time, so that what is added up stays in cache; entries to fetch ahead */

static inline uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return value == value ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0; /* to even; NaN stays */
}

#define FUSED(NAME, VALUE, WIDE_VALUE, BASE, WIDE_BASE, NARROW)                                                       \
    FAST_VERSIONS                                                                                                     \
    static int64_t NAME(Change *changes, Py_ssize_t count, int64_t last, Result to) {                                 \
        const BASE *weight = (const BASE *)to.weight;                                                                 \
        float total[NEAR] = {0}, alone[NEAR]; /* the sum of the changes; the new value if there is but one */         \
        int32_t met[NEAR] = {0};              /* how many changes */                                                  \
        uint64_t held[NEAR / 64] = {0};       /* whether there is any */                                              \
        int64_t found = 0;                                                                                            \
        for (int64_t start = 0; start < last; start += NEAR) {                                                        \
            for (Py_ssize_t c = 0; c < count; c++) {                                                                  \
                const Change change = changes[c];                                                                     \
                const VALUE *values = (const VALUE *)change.values;                                                   \
                BASE *under = (BASE *)change.under;                                                                   \
                int64_t i = change.done;                                                                              \
                for (; i < change.count && change.positions[i] - start < NEAR; i++) {                                 \
                    const int64_t where = change.positions[i], at = where - start;                                    \
                    if (weight && i + SOON < change.count) FETCH(&weight[change.positions[i + SOON]]);                \
                    const BASE bits = weight ? weight[where] : 0;                                                     \
                    const float old = WIDE_BASE(bits), value = WIDE_VALUE(values[i]), before = total[at];             \
                    const float by = change.strength * (change.is_delta ? value : value - old);                       \
                    if (weight) under[i] = bits;                                                                      \
                    total[at] = to.mode != LARGEST ? before + by : fabsf(by) > fabsf(before) ? by : before;           \
                    alone[at] = change.is_exact ? value : old + (0.0f + by);                                          \
                    held[at / 64] |= (uint64_t)1 << at % 64, met[at]++;                                               \
                }                                                                                                     \
                changes[c].done = i;                                                                                  \
            }                                                                                                         \
            for (int w = 0; w < NEAR / 64; held[w++] = 0) {                                                           \
                for (uint64_t bits = held[w]; bits; bits &= bits - 1, found++) {                                      \
                    const int at = w * 64 + ONES((bits & (0 - bits)) - 1);                                            \
                    const BASE old = weight ? weight[start + at] : 0;                                                 \
                    const float sum = to.mode == MEAN ? total[at] / (float)met[at] : total[at];                       \
                    to.positions[found] = (int32_t)(start + at);                                                      \
                    ((BASE *)to.values)[found] = NARROW(met[at] == 1 ? alone[at] : WIDE_BASE(old) + sum);             \
                    if (weight) ((BASE *)to.base)[found] = old;                                                       \
                    total[at] = 0.0f, met[at] = 0;                                                                    \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
        return found;                                                                                                 \
    }
FUSED(fused_floats, float, , float, , )
FUSED(fused_halves, uint16_t, widened, uint16_t, widened, rounded)
FUSED(fused_mixed, float, , uint16_t, widened, rounded)

/* Base and what comes of some changes, all below `last`. One thread: several may do this. */
PyObject *fused(PyObject *self, PyObject *args) {
    unsigned long long address, weight, positions, values, base;
    Py_ssize_t count;
    long long last, found;
    int value_bytes, base_bytes, mode;
    (void)self;
    if (!PyArg_ParseTuple(args, "KniKiLKKKi", &address, &count, &value_bytes, &weight, &base_bytes, &last, &positions, &values,
                          &base, &mode))
        return NULL;
    Change *changes = (Change *)(uintptr_t)address;
    const Result to = {(int32_t *)(uintptr_t)positions, (void *)(uintptr_t)values, (void *)(uintptr_t)base,
                       (const void *)(uintptr_t)weight, mode};
    Py_BEGIN_ALLOW_THREADS
    found = (base_bytes == 4 ? fused_floats : value_bytes == 2 ? fused_halves : fused_mixed)(changes, count, last, to);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(found);
}
