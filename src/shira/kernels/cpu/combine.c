/* Several adapters' changes to a tensor, combined in one pass over the base; several tensors at once, each by one thread.
 * native.py calls it; fusion/methods.py and fusion/combining.py define the result.
 *
 * It works on one window of positions at a time: each adapter's changes are added to the window, then the touched entries are
 * written out. Most positions have one change, and their new value is final at once. Only where several changes meet, the value
 * is computed again from their sum. Writing out has a second version for processors that can compress vector lanes by a mask
 * (AVX-512 VBMI2). The plain version defines what it does.
 */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off") /* a product is rounded before it is added, as in torch; other compilers do so anyway */
#endif
#include "native.h"

#include <math.h>

#ifdef X86
#include <immintrin.h>
#endif

#define FETCH(address) PREFETCH(address, 3) /* into all caches: several adapters may read the line */

/* One adapter's changes to a tensor; native.py fills an array of these. */
typedef struct {
    const void *positions; /* [count], int32, strictly increasing; or gaps [units] as in a file (docs/format.md) */
    const void *values;    /* [count] */
    void *under;           /* [count], of an overwrite: receives the base's values at its positions; or NULL */
    int64_t count, done;   /* number of entries; number of entries before the window */
    int64_t units, read;   /* of gaps: number of units; number of units that have been read */
    int64_t least;         /* of gaps: the smallest possible next position */
    float strength;
    int32_t is_delta;   /* 1: the values are the changes; 0: the changes are the differences of the values from the base */
    int32_t is_exact;   /* 1: an entry that no other adapter changes gets the value bit for bit */
    int32_t unit_bytes; /* of gaps: 1 or 2; 0: positions */
} Change;

/* The base: a weight, or zeros if that is NULL. At some positions it is not what the weight holds now. */
typedef struct {
    const void *weight;
    const int32_t *positions; /* [count], strictly increasing */
    const void *values;       /* [count], the base's values there */
    int64_t count, done;      /* number of these entries; number of them before the window */
} Base;

/* The result: positions, new values and base values, each with room for the entries of all changes and SLACK more. */
typedef struct {
    int32_t *positions;
    void *values, *base; /* base: NULL if it is not wanted */
} Result;

/* One tensor's changes, and their result; native.py fills an array of these. */
typedef struct {
    Change *changes; /* [count], at most 255 */
    Base base;
    Result to;
    int64_t count, end;              /* end: of the tensor: all positions are below it */
    int64_t found;                   /* receives the number of entries of the result, or WRONG_POSITIONS, or WRONG_GAPS */
    int32_t value_bytes, base_bytes; /* of an entry of the changes' values, and of the base */
    int64_t is_finite;               /* receives whether no new value is NaN or infinite */
} Combination;

enum { WRONG_GAPS = -1, WRONG_POSITIONS = -2 }; /* they do not lead to `count` rising positions below the end */
enum { SUM, MEAN, LARGEST };
enum { NOTHING, ENTRIES, LINES };             /* what of the base to prefetch: for each entry its line, or every line in order */
enum { WINDOW = 1 << 12, BLOCK = 64 };        /* positions in a window; positions written out at once */
/* entries of a change to prefetch ahead; positions to prefetch ahead if every line is fetched; bytes of a cache line */
enum { ENTRIES_AHEAD = 64, POSITIONS_AHEAD = 3 * WINDOW, LINE = 64 };

/* Positions start to start + WINDOW - 1. It fits in cache. */
typedef struct {
    float total[WINDOW];           /* the sum of the changes */
    union {
        float floats[WINDOW];
        uint16_t halves[WINDOW];
    } fresh;                       /* the new value */
    uint8_t met[WINDOW];           /* the number of changes at each position */
    uint16_t meetings[WINDOW + 1]; /* the positions with several changes */
    int32_t decoded[WINDOW];       /* the positions that were decoded from the gaps of the current change */
    union {
        float floats[WINDOW];
        uint16_t halves[WINDOW];
    } base;                        /* the base here, if the weight does not hold all of it */
    int64_t met_at, start, stop;   /* number of meetings; first position; end of the window, or of the tensor */
    int fetches;                   /* NOTHING, ENTRIES or LINES */
} Window;

/* Prefetch one change's share of the base that a later window needs. */
INLINE void fetch(const void *base, int64_t bytes, Py_ssize_t number, Py_ssize_t count) {
    for (int64_t at = bytes / LINE * number / count; at < bytes / LINE * (number + 1) / count; at++)
        FETCH((const char *)base + LINE * at);
}

/* Decode a change's positions in a window from its gaps. Returns how many. Stops at the end of the window, or at `count` in
 * all. */
#define DECODE(NAME, UNIT, LARGEST_UNIT)                                                                              \
    static int64_t NAME(Change *change, Window *window) {                                                             \
        const UNIT *units = (const UNIT *)change->positions;                                                          \
        const int64_t most = change->count - change->done, stop = window->stop;                                       \
        int64_t read = change->read, least = change->least, found = 0;                                                \
        for (; read < change->units && found < most && least + units[read] < stop; read++) {                          \
            least += units[read];                                                                                     \
            if (units[read] == LARGEST_UNIT) continue;                                                                \
            window->decoded[found++] = (int32_t)least++;                                                              \
        }                                                                                                             \
        change->read = read, change->least = least;                                                                   \
        return found;                                                                                                 \
    }
DECODE(decode_bytes, uint8_t, UINT8_MAX)
DECODE(decode_shorts, uint16_t, UINT16_MAX)

/* NAME: add all changes to a window. NAME_one: add one adapter's, compiled for each kind of change. weight: the base from the
 * window's start on; NULL for exact deltas, which do not need it. */
#define ADD(NAME, VALUE, WIDE_VALUE, BASE, WIDE_BASE, NARROW, SAME)                                                    \
    INLINE void NAME##_one(Change *change, const BASE *weight, Window *window, int is_delta, int is_exact, int largest) { \
        const int64_t decoded = change->unit_bytes == 1   ? decode_bytes(change, window)                              \
                                : change->unit_bytes == 2 ? decode_shorts(change, window)                             \
                                                          : -1;                                                       \
        const int64_t count = decoded < 0 ? change->count - change->done : decoded;                                   \
        const int32_t *positions = decoded < 0 ? (const int32_t *)change->positions + change->done : window->decoded; \
        const VALUE *values = (const VALUE *)change->values + change->done;                                           \
        BASE *under = is_delta || !change->under ? NULL : (BASE *)change->under + change->done;                       \
        BASE *fresh = (BASE *)&window->fresh;                                                                         \
        const int64_t start = window->start;                                                                          \
        const int64_t width = window->stop - start;                                                                   \
        const float strength = change->strength;                                                                      \
        const int64_t fetched = weight && window->fetches == ENTRIES ? count - ENTRIES_AHEAD : 0;                     \
        int64_t i = 0, at = -1, met_at = window->met_at;                                                              \
        for (; i < count; i++) {                                                                                      \
            const int64_t last = at;                                                                                  \
            at = positions[i] - start;                                                                                \
            if (at <= last || at >= width) break; /* later; or it does not rise, and is left over */                  \
            if (weight && i < fetched) FETCH(&weight[positions[i + ENTRIES_AHEAD] - start]);                          \
            const BASE bits = weight ? weight[at] : 0;                                                                \
            const float old = WIDE_BASE(bits), value = WIDE_VALUE(values[i]), before = window->total[at];             \
            const float by = strength * (is_delta ? value : value - old);                                             \
            if (under) under[i] = bits;                                                                               \
            window->total[at] = !largest ? before + by : fabsf(by) > fabsf(before) ? by : before;                     \
            fresh[at] = is_exact ? SAME(values[i]) : NARROW(old + (0.0f + by));                                       \
            window->meetings[met_at] = (uint16_t)at;                                                                  \
            met_at += window->met[at]++ == 1;                                                                         \
        }                                                                                                             \
        window->met_at = met_at;                                                                                      \
        change->done += i;                                                                                            \
    }                                                                                                                 \
    INLINE void NAME##_all(Change *changes, Py_ssize_t count, const BASE *weight, Window *window, int largest) {      \
        for (Py_ssize_t c = 0; c < count; c++) {                                                                      \
            Change *change = &changes[c];                                                                             \
            if (window->fetches == LINES) fetch(weight + POSITIONS_AHEAD, sizeof(BASE) * WINDOW, c, count);           \
            if (weight && !change->is_delta && change->is_exact) NAME##_one(change, weight, window, 0, 1, largest);   \
            else if (weight && !change->is_delta) NAME##_one(change, weight, window, 0, 0, largest);                  \
            else if (change->is_exact) NAME##_one(change, NULL, window, 1, 1, largest);                               \
            else NAME##_one(change, weight, window, 1, 0, largest);                                                   \
        }                                                                                                             \
    }                                                                                                                 \
    FAST_VERSIONS                                                                                                     \
    static void NAME(Change *changes, Py_ssize_t count, const void *base, int mode, Window *window) {                 \
        const BASE *weight = (const BASE *)base;                                                                      \
        if (mode == LARGEST) NAME##_all(changes, count, weight, window, 1);                                           \
        else NAME##_all(changes, count, weight, window, 0);                                                           \
        for (int64_t m = 0; m < window->met_at; m++) {                                                                \
            const int64_t at = window->meetings[m];                                                                   \
            const float sum = mode == MEAN ? window->total[at] / (float)window->met[at] : window->total[at];          \
            ((BASE *)&window->fresh)[at] = NARROW((weight ? WIDE_BASE(weight[at]) : 0.0f) + sum);                     \
        }                                                                                                             \
        window->met_at = 0;                                                                                           \
    }
ADD(add_floats, float, , float, , , )
ADD(add_halves, uint16_t, widened, uint16_t, widened, rounded, )
ADD(add_mixed, float, , uint16_t, widened, rounded, rounded)

/* One bit for each of eight bytes: whether the byte is not 0. */
static inline uint64_t eight(const uint8_t *bytes) {
    const uint64_t most = 0x7f7f7f7f7f7f7f7fu;
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    word = ((word & most) + most) | word; /* the highest bit of each byte says whether the byte is not 0 */
    return (word >> 7 & 0x0101010101010101u) * 0x0102040810204080u >> 56;
}

/* Write out the touched entries of a window after the `found` earlier entries, and clear the window. Returns the new number.
 * base: as weight in `ADD`. */
#define WRITE(NAME, BASE)                                                                                             \
    FAST_VERSIONS                                                                                                     \
    static int64_t NAME(Window *window, const void *base, Result to, int64_t found) {                                 \
        const BASE *weight = (const BASE *)base, *fresh = (const BASE *)&window->fresh;                               \
        for (int block = 0; block < WINDOW; block += BLOCK) {                                                         \
            uint64_t held = 0;                                                                                        \
            for (int b = 0; b < BLOCK; b += 8) held |= eight(&window->met[block + b]) << b;                           \
            if (!held) continue;                                                                                      \
            for (; held; held &= held - 1, found++) {                                                                 \
                const int at = block + ONES((held & (0 - held)) - 1);                                                 \
                to.positions[found] = (int32_t)(window->start + at);                                                  \
                ((BASE *)to.values)[found] = fresh[at];                                                               \
                if (to.base) ((BASE *)to.base)[found] = weight[at];                                                   \
            }                                                                                                         \
            memset(window->total + block, 0, BLOCK * sizeof(float));                                                  \
            memset(window->met + block, 0, BLOCK);                                                                    \
        }                                                                                                             \
        return found;                                                                                                 \
    }
WRITE(write_floats, float)
WRITE(write_halves, uint16_t)

#ifdef X86
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")))

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt");
}

/* The touched positions of a block, one bit each. Clears the block. */
AVX512 INLINE uint64_t taken(Window *window, int block) {
    const __m512i met = _mm512_loadu_si512(window->met + block);
    const uint64_t held = _mm512_test_epi8_mask(met, met);
    if (held) {
        _mm512_storeu_si512(window->met + block, _mm512_setzero_si512());
        for (int b = block; b < block + BLOCK; b += 16) _mm512_storeu_ps(window->total + b, _mm512_setzero_ps());
    }
    return held;
}

/* Store sixteen entries. Only the first ones are valid; later entries overwrite the others, or they are in the slack. */
AVX512 INLINE void put_floats(Result to, int64_t found, __m512i positions, __m512i fresh, __m512i old) {
    _mm512_storeu_si512(to.positions + found, positions);
    _mm512_storeu_si512((float *)to.values + found, fresh);
    if (to.base) _mm512_storeu_si512((float *)to.base + found, old);
}

AVX512 INLINE void put_halves(Result to, int64_t found, __m512i positions, __m256i fresh, __m256i old) {
    _mm512_storeu_si512(to.positions + found, positions);
    _mm256_storeu_si256((__m256i *)((uint16_t *)to.values + found), fresh);
    if (to.base) _mm256_storeu_si256((__m256i *)((uint16_t *)to.base + found), old);
}

AVX512 static int64_t write_floats_avx512(Window *window, const void *base, Result to, int64_t found) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int block = 0; block < WINDOW; block += BLOCK) {
        uint64_t held = taken(window, block);
        for (int at = block; held; at += 16, held >>= 16) {
            const __mmask16 here = (__mmask16)held;
            const __m512i old =
                to.base ? _mm512_maskz_loadu_epi32(here, (const float *)base + at) : _mm512_setzero_si512();
            const __m512i positions = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)(window->start + at)));
            put_floats(to, found, _mm512_maskz_compress_epi32(here, positions),
                       _mm512_maskz_compress_epi32(here, _mm512_loadu_si512(window->fresh.floats + at)),
                       _mm512_maskz_compress_epi32(here, old));
            found += ONES((uint64_t)here);
        }
    }
    return found;
}

AVX512 static int64_t write_halves_avx512(Window *window, const void *base, Result to, int64_t found) {
    const __m512i lanes = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10,
                                           9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int block = 0; block < WINDOW; block += BLOCK) {
        uint64_t held = taken(window, block);
        for (int at = block; held; at += 32, held >>= 32) {
            const __mmask32 here = (__mmask32)held;
            const __m512i first = _mm512_set1_epi32((int)(window->start + at));
            const __m512i place = _mm512_maskz_compress_epi16(here, lanes);
            const __m512i fresh = _mm512_maskz_compress_epi16(here, _mm512_loadu_si512(window->fresh.halves + at));
            const __m512i beneath =
                to.base ? _mm512_maskz_loadu_epi16(here, (const uint16_t *)base + at) : _mm512_setzero_si512();
            const __m512i old = _mm512_maskz_compress_epi16(here, beneath);
            const int count = ONES((uint64_t)here);
            put_halves(to, found, _mm512_add_epi32(first, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(place))),
                       _mm512_castsi512_si256(fresh), _mm512_castsi512_si256(old));
            if (count > 16)
                put_halves(to, found + 16, _mm512_add_epi32(first, _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(place, 1))),
                           _mm512_extracti64x4_epi64(fresh, 1), _mm512_extracti64x4_epi64(old, 1));
            found += count;
        }
    }
    return found;
}
#else
#define has_avx512() 0
#define write_floats_avx512 write_floats
#define write_halves_avx512 write_halves
#endif

static int64_t entries_of(const Change *changes, int64_t count) {
    int64_t entries = 0;
    for (int64_t c = 0; c < count; c++) entries += changes[c].count;
    return entries;
}

/* The start of the window that holds the smallest possible next position, or `end` if there is none. It is called after an
 * empty window, so that a long distance without positions is skipped. start: of that window; the next one is later, even if
 * positions do not rise. */
static int64_t next_window(const Change *changes, int64_t count, int64_t start, int64_t end) {
    int64_t next = end;
    for (int64_t c = 0; c < count; c++) {
        const Change *change = &changes[c];
        if (change->done == change->count || (change->unit_bytes && change->read == change->units)) continue;
        const int64_t at = change->unit_bytes == 1   ? change->least + ((const uint8_t *)change->positions)[change->read]
                           : change->unit_bytes == 2 ? change->least + ((const uint16_t *)change->positions)[change->read]
                                                     : ((const int32_t *)change->positions)[change->done];
        if (at < next) next = at;
    }
    if (next < start + WINDOW) next = start + WINDOW;
    return next < end ? next & ~(int64_t)(WINDOW - 1) : end;
}

/* Whether no value is NaN or infinite: the exponents of those are all ones. */
#define FINITE(NAME, BITS, EXPONENT)                                                             \
    FAST_VERSIONS                                                                                \
    static int NAME(const void *values, int64_t count) {                                         \
        int wrong = 0;                                                                           \
        for (int64_t i = 0; i < count; i++) wrong |= (((const BITS *)values)[i] & EXPONENT) == EXPONENT; \
        return !wrong;                                                                           \
    }
FINITE(finite_floats, uint32_t, 0x7f800000u)
FINITE(finite_halves, uint16_t, 0x7f80u)

/* Whether the gaps, or the positions, gave exactly `count` positions, all below the end. */
static int is_whole(const Change *change) { return change->done == change->count && change->read == change->units; }

/* The base from the window's start on: the weight itself, or a copy with the values that the weight does not hold. */
static const void *base_of(Base *base, Window *window, int bytes) {
    if (!base->weight) return NULL;
    const char *weight = (const char *)base->weight + window->start * bytes;
    if (!base->count) return weight;
    memcpy(&window->base, weight, (size_t)((window->stop - window->start) * bytes));
    while (base->done < base->count && base->positions[base->done] < window->start) base->done++;
    for (; base->done < base->count; base->done++) {
        const int64_t at = base->positions[base->done] - window->start;
        if ((uint64_t)at >= (uint64_t)(window->stop - window->start)) break;
        if (bytes == 4) window->base.floats[at] = ((const float *)base->values)[base->done];
        else window->base.halves[at] = ((const uint16_t *)base->values)[base->done];
    }
    return &window->base;
}

static int64_t fuse(Combination *tensor, int mode, int plain) {
    const int bytes = tensor->base_bytes;
    Change *const changes = tensor->changes;
    const int64_t count = tensor->count, end = tensor->end;
    void (*const add)(Change *, Py_ssize_t, const void *, int, Window *) =
        bytes == 4 ? add_floats : tensor->value_bytes == 2 ? add_halves : add_mixed;
    int64_t (*const write)(Window *, const void *, Result, int64_t) =
        plain || !has_avx512() ? (bytes == 4 ? write_floats : write_halves)
                               : (bytes == 4 ? write_floats_avx512 : write_halves_avx512);
    Base *const base = &tensor->base;
    Window window;
    int64_t found = 0;
    if (base->count && (base->positions[0] < 0 || base->positions[base->count - 1] >= end)) return WRONG_POSITIONS;
    memset(&window, 0, sizeof window);
    if (base->weight && !base->count) window.fetches = entries_of(changes, count) > end * bytes / LINE ? LINES : ENTRIES;
    for (int64_t before; window.start < end;
         window.start = found > before ? window.start + WINDOW : next_window(changes, count, window.start, end)) {
        before = found;
        window.stop = window.start + WINDOW < end ? window.start + WINDOW : end;
        const void *here = base_of(base, &window, bytes);
        add(changes, count, here, mode, &window);
        found = write(&window, here, tensor->to, found);
    }
    for (int64_t c = 0; c < count; c++)
        if (!is_whole(&changes[c])) return changes[c].unit_bytes ? WRONG_GAPS : WRONG_POSITIONS;
    tensor->is_finite = (bytes == 4 ? finite_floats : finite_halves)(tensor->to.values, found);
    return found;
}

typedef struct {
    Combination *tensors;
    int64_t count, *next; /* next: the number of the first tensor that no thread has taken yet */
    int mode, plain;
} Fusion;

/* The number of the next tensor for this thread. Threads exist only with compilers that have this builtin. */
static int64_t taken_next(int64_t *next) {
#if defined(__GNUC__) || defined(__clang__)
    return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
#else
    return (*next)++;
#endif
}

/* Tensors differ in size, so a thread takes another one whenever it is done, in place of a fixed share. */
static void *fuse_some(void *argument) {
    const Fusion *job = (const Fusion *)((const Share *)argument)->job;
    for (int64_t at = taken_next(job->next); at < job->count; at = taken_next(job->next))
        job->tensors[at].found = fuse(&job->tensors[at], job->mode, job->plain);
    return NULL;
}

/* Combine the changes to several tensors. `found` of each says what came of it. */
PyObject *combine(PyObject *self, PyObject *args) {
    unsigned long long address;
    Py_ssize_t count;
    int64_t next = 0;
    int mode, plain;
    long threads;
    (void)self;
    if (!PyArg_ParseTuple(args, "Kniil", &address, &count, &mode, &plain, &threads)) return NULL;
    const Fusion job = {(Combination *)(uintptr_t)address, count, &next, mode, plain};
    Py_BEGIN_ALLOW_THREADS
    in_parallel(fuse_some, &job, count, threads, 1);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
