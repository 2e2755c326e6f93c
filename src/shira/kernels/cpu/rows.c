/* Sparse products of several adapters, each for its own rows of a layer's output. native.py calls it; ../reference.py
 * specifies it.
 *
 * A task is up to sixteen rows of one group. Its inputs are widened to float and transposed: those of one column lie side by
 * side, one lane for each row. So an entry of a change is one vector multiply-add for all rows of the task. The sums of a block
 * of output features are kept, and are then added to the output, row by row.
 *
 * The sum of a row and a feature is taken in the same order with any number of lanes, so a row's result does not depend on the
 * other rows of a group.
 */
#include "native.h"

#if defined(__GNUC__) || defined(__clang__)
#define VECTORS
#endif

#ifdef VECTORS
enum { LANES = 16 }; /* the most rows of a task */
#else
enum { LANES = 1 };
#endif
enum { FEATURES = 64 };  /* output features whose sums are kept; a multiple of four */
enum { ENOUGH = 65536 }; /* what is worth another thread, in the units of each_takes */

/* The rows first to end - 1 of the input and of the output, and the change of the weight for them: [out, in] in compressed
 * rows. native.py fills an array of these. */
typedef struct {
    int64_t first, end;
    const int32_t *starts;  /* [out + 1], where the entries of each row of the weight begin */
    const int32_t *columns; /* [starts[out] + 1], each at least 0 and below `in`; the last one is `in` */
    const float *changes;   /* [starts[out] + 1]; the last one is 0 */
} Group;

typedef struct {
    const Group *groups;
    Py_ssize_t count;
    const void *input; /* [rows, in] */
    void *output;      /* [rows, out] */
    int input_bytes, output_bytes; /* of an entry: 2 for bfloat16, 4 for float */
    int64_t in, out;
    float *scratch; /* [threads, LANES * (in + 1)] */
} Products;

static int lanes_for(int64_t rows) { return LANES == 1 || rows == 1 ? 1 : rows <= 4 ? 4 : rows <= 8 ? 8 : LANES; }

#ifdef VECTORS
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
#ifdef __x86_64__
enum { WIDE = 8 }; /* floats of the widest vector: where there are wider ones, they are hardly faster; GCC splits them badly */
#else
enum { WIDE = 4 };
#endif
typedef float Wide __attribute__((vector_size(WIDE * 4), aligned(4), may_alias));
typedef uint16_t FourHalves __attribute__((vector_size(8), aligned(2), may_alias));
typedef uint32_t FourBits __attribute__((vector_size(16)));

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (FourBits){__VA_ARGS__})
#endif

INLINE Four four_floats(const float *from) { return *(const Four *)from; }

INLINE Four four_halves(const uint16_t *from) {
    return (Four)(__builtin_convertvector(*(const FourHalves *)from, FourBits) << 16);
}

/* to[c * stride + r] = row r of the four at place c */
INLINE void transpose(Four a, Four b, Four c, Four d, float *to, int64_t stride) {
    const Four low = PICK(a, b, 0, 4, 1, 5), high = PICK(a, b, 2, 6, 3, 7);
    const Four low2 = PICK(c, d, 0, 4, 1, 5), high2 = PICK(c, d, 2, 6, 3, 7);
    *(Four *)to = PICK(low, low2, 0, 1, 4, 5);
    *(Four *)(to + stride) = PICK(low, low2, 2, 3, 6, 7);
    *(Four *)(to + 2 * stride) = PICK(high, high2, 0, 1, 4, 5);
    *(Four *)(to + 3 * stride) = PICK(high, high2, 2, 3, 6, 7);
}

/* packed[j * lanes + r] = from[r * in + j] as float. Lanes from `rows` on get the last row; their sums are not used. */
#define PACK_LANES(NAME, ENTRY, WIDEN, FOUR_OF)                                                             \
    INLINE void NAME##_lanes(const ENTRY *from, float *packed, int64_t rows, int64_t in, const int lanes) { \
        const ENTRY *lines[LANES];                                                                          \
        for (int r = 0; r < lanes; r++) lines[r] = from + (r < rows ? r : rows - 1) * in;                   \
        int64_t j = 0;                                                                                      \
        for (; j + 3 < in; j += 4)                                                                          \
            for (int r = 0; r < lanes; r += 4)                                                              \
                transpose(FOUR_OF(lines[r] + j), FOUR_OF(lines[r + 1] + j), FOUR_OF(lines[r + 2] + j),      \
                          FOUR_OF(lines[r + 3] + j), packed + j * lanes + r, lanes);                        \
        for (; j < in; j++)                                                                                 \
            for (int r = 0; r < lanes; r++) packed[j * lanes + r] = WIDEN(lines[r][j]);                     \
    }
#else
#define PACK_LANES(NAME, ENTRY, WIDEN, FOUR_OF)                                                       \
    static void NAME##_lanes(const ENTRY *from, float *packed, int64_t rows, int64_t in, int lanes) { \
        (void)from, (void)packed, (void)rows, (void)in, (void)lanes;                                  \
    }
#endif

/* Widen and transpose the inputs of a task, and set those of the column `in` to 0. */
#define PACK(NAME, ENTRY, WIDEN, FOUR_OF)                                                     \
    PACK_LANES(NAME, ENTRY, WIDEN, FOUR_OF)                                                   \
    FAST_VERSIONS                                                                             \
    static void NAME(const void *input, float *packed, int64_t rows, int64_t in, int lanes) { \
        const ENTRY *from = (const ENTRY *)input;                                             \
        memset(packed + in * lanes, 0, lanes * sizeof(float));                                \
        if (lanes == 1)                                                                       \
            for (int64_t j = 0; j < in; j++) packed[j] = WIDEN(from[j]);                      \
        else if (lanes == 4) NAME##_lanes(from, packed, rows, in, 4);                         \
        else if (lanes == 8) NAME##_lanes(from, packed, rows, in, 8);                         \
        else NAME##_lanes(from, packed, rows, in, LANES);                                     \
    }
PACK(pack_floats, float, , four_floats)
PACK(pack_halves, uint16_t, widened, four_halves)

/* NAME: sums[i * lanes + r] = row `first + i` of the change times the inputs of lane r, for `count` rows. The lanes are PIECES
 * vectors.
 *
 * Entries are taken four at a time, and the four sums do not wait for each other. What is missing in the last four of a row is
 * the entry `none`, after all others, whose column has inputs of 0. So the only branch is on the number of fours. The processor
 * guesses it right more often than the number of entries, and a wrong guess takes as long as twenty entries. */
#define SUM(NAME, VECTOR, PIECES)                                                                                        \
    INLINE void NAME(const Group *group, const float *packed, float *sums, int64_t first, int64_t count, int64_t none) { \
        const int32_t *columns = group->columns, *starts = group->starts + first;                                        \
        const float *changes = group->changes;                                                                           \
        const VECTOR(*inputs)[PIECES] = (const VECTOR(*)[PIECES])packed;                                                 \
        for (int64_t i = 0; i < count; i++) {                                                                            \
            const int64_t end = starts[i + 1];                                                                           \
            VECTOR a[PIECES] = {0}, b[PIECES] = {0}, c[PIECES] = {0}, d[PIECES] = {0};                                   \
            for (int64_t k = starts[i]; k < end; k += 4) {                                                               \
                const int64_t k1 = k + 1 < end ? k + 1 : none, k2 = k + 2 < end ? k + 2 : none;                          \
                const int64_t k3 = k + 3 < end ? k + 3 : none;                                                           \
                for (int p = 0; p < PIECES; p++) {                                                                       \
                    a[p] += changes[k] * inputs[columns[k]][p];                                                          \
                    b[p] += changes[k1] * inputs[columns[k1]][p];                                                        \
                    c[p] += changes[k2] * inputs[columns[k2]][p];                                                        \
                    d[p] += changes[k3] * inputs[columns[k3]][p];                                                        \
                }                                                                                                        \
            }                                                                                                            \
            for (int p = 0; p < PIECES; p++) ((VECTOR *)sums)[i * PIECES + p] = (a[p] + b[p]) + (c[p] + d[p]);           \
        }                                                                                                                \
    }
SUM(sum_1, float, 1)

#ifdef VECTORS
SUM(sum_4, Four, 1)
SUM(sum_8, Wide, 8 / WIDE)
SUM(sum_16, Wide, 16 / WIDE)

/* by_row[r * FEATURES + i]: the sum of lane r and feature first + i, for `count` features. */
INLINE void sum_lanes(const Group *group, const float *packed, float *by_row, int64_t first, int64_t count, int64_t none,
                      const int lanes) {
    float sums[FEATURES * LANES];
    if (lanes == 4) sum_4(group, packed, sums, first, count, none);
    else if (lanes == 8) sum_8(group, packed, sums, first, count, none);
    else sum_16(group, packed, sums, first, count, none);
    for (int64_t i = count; i & 3; i++) /* fill the last four features */
        for (int r = 0; r < lanes; r++) sums[i * lanes + r] = 0.0f;
    for (int64_t i = 0; i < count; i += 4)
        for (int r = 0; r < lanes; r += 4) {
            const float *from = sums + i * lanes + r;
            transpose(four_floats(from), four_floats(from + lanes), four_floats(from + 2 * lanes),
                      four_floats(from + 3 * lanes), by_row + r * FEATURES + i, FEATURES);
        }
}
#else
#define sum_lanes(group, packed, by_row, first, count, none, lanes) ((void)0)
#endif

/* Add the products of a task to the output features first to last - 1. */
#define ADD(NAME, ENTRY, WIDEN, NARROW)                                                                               \
    INLINE void NAME##_lanes(const Group *group, const float *packed, ENTRY *to, int64_t rows, int64_t out,           \
                             int64_t first, int64_t last, const int lanes) {                                          \
        float by_row[LANES * FEATURES];                                                                               \
        for (int64_t i = first; i < last; i += FEATURES) {                                                            \
            const int64_t count = last - i < FEATURES ? last - i : FEATURES;                                          \
            if (lanes == 1) sum_1(group, packed, by_row, i, count, group->starts[out]);                               \
            else sum_lanes(group, packed, by_row, i, count, group->starts[out], lanes);                               \
            for (int64_t r = 0; r < rows; r++) {                                                                      \
                ENTRY *line = to + r * out + i;                                                                       \
                for (int64_t f = 0; f < count; f++) line[f] = NARROW(WIDEN(line[f]) + by_row[r * FEATURES + f]);      \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
    FAST_VERSIONS                                                                                                     \
    static void NAME(const Group *group, const float *packed, void *output, int64_t rows, int64_t out, int64_t first, \
                     int64_t last, int lanes) {                                                                       \
        ENTRY *to = (ENTRY *)output;                                                                                  \
        if (lanes == 1) NAME##_lanes(group, packed, to, 1, out, first, last, 1);                                      \
        else if (lanes == 4) NAME##_lanes(group, packed, to, rows, out, first, last, 4);                              \
        else if (lanes == 8) NAME##_lanes(group, packed, to, rows, out, first, last, 8);                              \
        else NAME##_lanes(group, packed, to, rows, out, first, last, LANES);                                          \
    }
ADD(add_floats, float, , )
ADD(add_halves, uint16_t, widened, rounded)

/* The first output feature before which there are `part` entries and features. */
static int64_t feature_at(const Group *group, int64_t out, int64_t part) {
    int64_t low = 0, high = out;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (group->starts[middle] + middle < part) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* How long an entry or a feature of a task takes, in units of about 0.07 ns: as measured from 1 to 16 lanes. */
static int64_t each_takes(int lanes) { return 8 + lanes; }

static int64_t task_takes(const Group *group, int64_t out, int lanes) {
    return (group->starts[out] + out) * each_takes(lanes);
}

static int64_t all_take(const Products *job) {
    int64_t total = 0;
    for (Py_ssize_t g = 0; g < job->count; g++) {
        const Group *group = &job->groups[g];
        const int64_t rows = group->end - group->first, last = rows % LANES;
        total += rows / LANES * task_takes(group, job->out, LANES);
        if (last) total += task_takes(group, job->out, lanes_for(last));
    }
    return total;
}

/* The part of each task that lies between two points in the time that all tasks take. Each thread packs the inputs itself. */
static void *products_share(void *argument) {
    const Share *share = (const Share *)argument;
    const Products *job = (const Products *)share->job;
    float *packed = job->scratch + share->thread * LANES * (job->in + 1);
    int64_t before = 0;
    for (Py_ssize_t g = 0; g < job->count; g++) {
        const Group *group = &job->groups[g];
        for (int64_t row = group->first; row < group->end && before < share->end; row += LANES) {
            const int64_t rows = group->end - row < LANES ? group->end - row : LANES;
            const int lanes = lanes_for(rows);
            const int64_t whole = task_takes(group, job->out, lanes);
            const int64_t begin = share->begin > before ? share->begin - before : 0;
            const int64_t end = share->end - before < whole ? share->end - before : whole;
            before += whole;
            if (begin >= end) continue;
            const int64_t first = feature_at(group, job->out, begin / each_takes(lanes));
            const int64_t last = end == whole ? job->out : feature_at(group, job->out, end / each_takes(lanes));
            const char *from = (const char *)job->input + row * job->in * job->input_bytes;
            char *to = (char *)job->output + row * job->out * job->output_bytes;
            if (first >= last) continue;
            (job->input_bytes == 2 ? pack_halves : pack_floats)(from, packed, rows, job->in, lanes);
            (job->output_bytes == 2 ? add_halves : add_floats)(group, packed, to, rows, job->out, first, last, lanes);
        }
    }
    return NULL;
}

/* Add the products of all groups. Their rows do not overlap; input and output share no memory. `scratch` has room for
 * LANES * (in + 1) floats for each thread. */
PyObject *add_products(PyObject *self, PyObject *args) {
    unsigned long long address, input, output, scratch;
    Py_ssize_t count;
    long long in, out;
    int input_bytes, output_bytes;
    long threads;
    (void)self;
    if (!PyArg_ParseTuple(args, "KnKiKiLLKl", &address, &count, &input, &input_bytes, &output, &output_bytes, &in, &out,
                          &scratch, &threads))
        return NULL;
    const Products job = {(const Group *)(uintptr_t)address, count, (const void *)(uintptr_t)input, (void *)(uintptr_t)output,
                          input_bytes, output_bytes, in, out, (float *)(uintptr_t)scratch};
    Py_BEGIN_ALLOW_THREADS
    in_parallel(products_share, &job, all_take(&job), threads, ENOUGH);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
