/* Sparse products of several adapters, each for its own rows of a layer's output. native.py calls it; ../reference.py
 * specifies it.
 *
 * A task is up to sixteen rows of one group. Its inputs are widened to float and transposed, so that the inputs of one column lie
 * side by side: each entry of a change is then one vector multiply-add for all rows of the task. The sums of a few output
 * features are kept, and are then added to the output, row by row.
 */
#include "native.h"

/* The rows first to end - 1 of the input and of the output, and the change of the weight for them: [out, in] in compressed
 * rows. native.py fills an array of these. */
typedef struct {
    int64_t first, end;
    const int32_t *starts;  /* [out + 1], where the entries of each row of the weight begin */
    const int32_t *columns; /* [starts[out]], each at least 0 and below `in` */
    const float *changes;   /* [starts[out]] */
} Group;

typedef struct {
    const Group *groups;
    Py_ssize_t count;
    const void *input;     /* [rows, in] */
    void *output;          /* [rows, out] */
    int input_bytes, output_bytes; /* of an entry: 2 for bfloat16, 4 for float */
    int64_t in, out;
    float *scratch; /* for each thread LANES * in */
} Products;

enum { LANES = 16 };    /* rows of a task */
enum { FEATURES = 64 }; /* output features whose sums are kept */

/* packed[j * lanes + r] = from[r * in + j] as float; 0 for the lanes from `rows` on. */
#define PACK(NAME, ENTRY, WIDEN)                                                                    \
    INLINE void NAME##_lanes(const ENTRY *from, float *packed, int64_t rows, int64_t in, const int lanes) { \
        if (rows == lanes)                                                                          \
            for (int64_t j = 0; j < in; j++)                                                        \
                for (int r = 0; r < lanes; r++) packed[j * lanes + r] = WIDEN(from[r * in + j]);    \
        else                                                                                        \
            for (int64_t j = 0; j < in; j++)                                                        \
                for (int r = 0; r < lanes; r++) packed[j * lanes + r] = r < rows ? WIDEN(from[r * in + j]) : 0.0f; \
    }                                                                                               \
    FAST_VERSIONS                                                                                   \
    static void NAME(const void *input, float *packed, int64_t rows, int64_t in, int lanes) {       \
        memset(packed + in * lanes, 0, lanes * sizeof(float));                                      \
        const ENTRY *from = (const ENTRY *)input;                                                   \
        switch (lanes) {                                                                            \
        case 1: NAME##_lanes(from, packed, rows, in, 1); break;                                     \
        case 4: NAME##_lanes(from, packed, rows, in, 4); break;                                     \
        case 8: NAME##_lanes(from, packed, rows, in, 8); break;                                     \
        default: NAME##_lanes(from, packed, rows, in, LANES);                                       \
        }                                                                                           \
    }
PACK(pack_floats, float, )
PACK(pack_halves, uint16_t, widened)

/* Entries of a row of the weight are taken four at a time, and their sums do not wait for each other. What is missing in the last
 * four is the entry after all others, `none`, whose column has inputs of 0. So no branch depends on more than the fours of a row. */
#define FOUR(k, end, none) \
    const int64_t k1 = k + 1 < end ? k + 1 : none, k2 = k + 2 < end ? k + 2 : none, k3 = k + 3 < end ? k + 3 : none

/* NAME: sums[i * lanes + r] = row `first + i` of the change times the input of lane r, for the output features first to last - 1. */
#define SUM(NAME, VECTOR)                                                                                             \
    INLINE void NAME(const Group *group, const float *packed, float *sums, int64_t first, int64_t last, int64_t none) { \
        const int32_t *columns = group->columns, *starts = group->starts + first;                                     \
        const float *changes = group->changes;                                                                        \
        const VECTOR *inputs = (const VECTOR *)packed;                                                                \
        for (int64_t i = 0; i < last - first; i++) {                                                                  \
            const int64_t end = starts[i + 1];                                                                        \
            VECTOR a = {0}, b = {0}, c = {0}, d = {0};                                                                \
            for (int64_t k = starts[i]; k < end; k += 4) {                                                            \
                FOUR(k, end, none);                                                                                   \
                a += changes[k] * inputs[columns[k]];                                                                 \
                b += changes[k1] * inputs[columns[k1]];                                                               \
                c += changes[k2] * inputs[columns[k2]];                                                               \
                d += changes[k3] * inputs[columns[k3]];                                                               \
            }                                                                                                         \
            ((VECTOR *)sums)[i] = (a + b) + (c + d);                                                                  \
        }                                                                                                             \
    }
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Sixteen __attribute__((vector_size(64), aligned(4), may_alias));
SUM(sum_1, float)
SUM(sum_4, Four)
SUM(sum_8, Eight)
SUM(sum_16, Sixteen)

/* Add the products of a task to the output features first to last - 1. */
#define ADD(NAME, ENTRY, WIDEN, NARROW)                                                                            \
    INLINE void NAME##_lanes(const Group *group, const float *packed, ENTRY *to, int64_t rows, int64_t out,        \
                             int64_t first, int64_t last, const int lanes) {                                       \
        float sums[FEATURES * LANES];                                                                              \
        for (int64_t i = first; i < last; i += FEATURES) {                                                         \
            const int64_t count = last - i < FEATURES ? last - i : FEATURES;                                       \
            if (lanes == 1) sum_1(group, packed, sums, i, i + count, group->starts[out]);                          \
            else if (lanes == 4) sum_4(group, packed, sums, i, i + count, group->starts[out]);                          \
            else if (lanes == 8) sum_8(group, packed, sums, i, i + count, group->starts[out]);                          \
            else sum_16(group, packed, sums, i, i + count, group->starts[out]);                          \
            for (int64_t r = 0; r < rows; r++) {                                                                   \
                ENTRY *line = to + r * out + i;                                                                    \
                for (int64_t f = 0; f < count; f++) line[f] = NARROW(WIDEN(line[f]) + sums[f * lanes + r]);        \
            }                                                                                                      \
        }                                                                                                          \
    }                                                                                                              \
    FAST_VERSIONS                                                                                                  \
    static void NAME(const Group *group, const float *packed, void *output, int64_t rows, int64_t out, int64_t first, \
                     int64_t last, int lanes) {                                                                    \
        ENTRY *to = (ENTRY *)output;                                                                               \
        switch (lanes) {                                                                                           \
        case 1: NAME##_lanes(group, packed, to, rows, out, first, last, 1); break;                                 \
        case 4: NAME##_lanes(group, packed, to, rows, out, first, last, 4); break;                                 \
        case 8: NAME##_lanes(group, packed, to, rows, out, first, last, 8); break;                                 \
        default: NAME##_lanes(group, packed, to, rows, out, first, last, LANES);                                   \
        }                                                                                                          \
    }
ADD(add_floats, float, , )
ADD(add_halves, uint16_t, widened, rounded)

static int lanes_for(int64_t rows) { return rows == 1 ? 1 : rows <= 4 ? 4 : rows <= 8 ? 8 : LANES; }

/* The first output feature with `part` entries and features before it. */
static int64_t feature_at(const Group *group, int64_t out, int64_t part) {
    int64_t low = 0, high = out;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (group->starts[middle] + middle < part) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* How long a task takes: its entries and features, and more for more lanes. */
static int64_t effort(const Group *group, int64_t out, int lanes) { return (group->starts[out] + out) * (2 + lanes / 4); }

static void *products_share(void *argument) {
    const Share *share = (const Share *)argument;
    const Products *job = (const Products *)share->job;
    float *packed = job->scratch + share->thread * LANES * (job->in + 1);
    int64_t before = 0;
    for (Py_ssize_t g = 0; g < job->count && before < share->end; g++) {
        const Group *group = &job->groups[g];
        for (int64_t row = group->first; row < group->end && before < share->end; row += LANES) {
            const int64_t rows = group->end - row < LANES ? group->end - row : LANES;
            const int lanes = lanes_for(rows);
            const int64_t all = effort(group, job->out, lanes), each = 2 + lanes / 4;
            const int64_t begin = share->begin > before ? share->begin - before : 0;
            const int64_t end = share->end - before < all ? share->end - before : all;
            before += all;
            if (begin >= end) continue;
            const int64_t first = feature_at(group, job->out, begin / each);
            const int64_t last = end == all ? job->out : feature_at(group, job->out, end / each);
            if (first >= last) continue;
            const char *from = (const char *)job->input + row * job->in * job->input_bytes;
            char *to = (char *)job->output + row * job->out * job->output_bytes;
            (job->input_bytes == 2 ? pack_halves : pack_floats)(from, packed, rows, job->in, lanes);
            (job->output_bytes == 2 ? add_halves : add_floats)(group, packed, to, rows, job->out, first, last, lanes);
        }
    }
    return NULL;
}

static int64_t effort_of(const Products *job) {
    int64_t total = 0;
    for (Py_ssize_t g = 0; g < job->count; g++) {
        const Group *group = &job->groups[g];
        const int64_t rows = group->end - group->first, last = rows % LANES;
        total += rows / LANES * effort(group, job->out, LANES) + (last ? effort(group, job->out, lanes_for(last)) : 0);
    }
    return total;
}

/* Add the products of all groups. Their rows do not overlap, and input and output share no memory. */
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
    in_parallel(products_share, &job, effort_of(&job), threads, 16384);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
