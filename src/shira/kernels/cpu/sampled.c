/* The gradient of a weight at a mask's positions: a dot product of two rows for each position. native.py and images.py call it;
 * ../reference.py specifies it.
 *
 * sampled: of a linear layer. A row holds what one output, or one input, has for each token.
 *
 * sampled_images: of a convolution. A row holds what one channel has at all places of some images, line after line. So one step
 * of the kernel is a shift of the input's row. Each line, and each image, is followed by as many zeros in the gradient as the
 * largest shift reaches beyond its end. With a stride, one place of the kernel meets a part of the input only, a phase. The
 * input's row has its phases one after the other.
 */
#include "native.h"

/* out[i] += rows[r] · columns[starts[c]] where positions[i] = r * width + c. Both are `length` floats long. */
typedef struct {
    const float *rows, *columns;
    const int64_t *starts; /* [width] */
    const void *positions; /* [count], sorted; int32 or int64 */
    float *out;
    int64_t count, width, pitch, length; /* pitch: floats from one of `rows` to the next */
    int index_bytes;
    int64_t *next; /* for parts of the columns: [rows], the first position of each row that is not done yet */
    int64_t end_column; /* of the part */
} Sampled;

#if defined(__GNUC__) || defined(__clang__)
enum { WIDE = 8 }; /* floats that are multiplied at once: where wider vectors exist, they are not faster (docs/notebook.md) */
typedef float Wide __attribute__((vector_size(WIDE * sizeof(float)), aligned(4), may_alias));
typedef int32_t WideBits __attribute__((vector_size(WIDE * sizeof(float)), aligned(4), may_alias));
#define ONLY(floats, bits) ((Wide)((WideBits)(floats) & (bits)))
#else
enum { WIDE = 1 };
typedef float Wide;
typedef int32_t WideBits;
#define ONLY(floats, bits) (floats)
#endif
enum { TOGETHER = 8 }; /* sums that are computed at once, because one does not wait for another */

#define WIDE_AT(address) (*(const Wide *)(address))

/* out[k] += r · columns[k], for k below `count`. rest: a mask of bits for each of the last WIDE floats, those that no vector
 * before has. The others are taken as 0, whatever they hold. */
INLINE void add_dots(const float *r, const int32_t *rest, const float *const *columns, int64_t length, float *out,
                     const int count) {
    Wide sums[TOGETHER] = {0};
    const WideBits bits = *(const WideBits *)rest;
    (void)bits; /* vectors of one float leave no rest */
    for (int64_t t = 0; t + WIDE <= length; t += WIDE)
        for (int k = 0; k < count; k++) sums[k] += WIDE_AT(r + t) * WIDE_AT(columns[k] + t);
    for (int k = 0; k < count; k++) {
        float lanes[WIDE];
        if (length % WIDE)
            sums[k] += ONLY(WIDE_AT(r + length - WIDE), bits) * ONLY(WIDE_AT(columns[k] + length - WIDE), bits);
        memcpy(lanes, &sums[k], sizeof lanes);
        for (int half = WIDE / 2; half; half /= 2)
            for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
        out[k] += lanes[0];
    }
}

/* NAME_row: the positions from `i` on that are below `last` and before `end`, all in one row. Returns the next one.
 * NAME: positions first to last - 1. NAME_part: of rows first to last - 1, those in a part of the columns. NAME_find: the first
 * position of each row. */
#define SAMPLED(NAME, INDEX)                                                                                           \
    INLINE int64_t NAME##_row(const Sampled *job, int64_t row, int64_t i, int64_t last, int64_t end) {                 \
        const INDEX *positions = (const INDEX *)job->positions;                                                        \
        const int64_t length = job->length, *starts = job->starts - row * job->width;                                  \
        const float *r = job->rows + row * job->pitch, *columns[TOGETHER];                                             \
        int32_t rest[WIDE] = {0};                                                                                      \
        if (length < WIDE) {                                                                                           \
            for (; i < last && positions[i] < end; i++)                                                                \
                for (int64_t t = 0; t < length; t++) job->out[i] += r[t] * job->columns[starts[positions[i]] + t];     \
            return i;                                                                                                  \
        }                                                                                                              \
        for (int64_t t = WIDE - length % WIDE; t < WIDE; t++) rest[t] = -1;                                            \
        for (; i + TOGETHER <= last && positions[i + TOGETHER - 1] < end; i += TOGETHER) {                             \
            for (int k = 0; k < TOGETHER; k++) columns[k] = job->columns + starts[positions[i + k]];                   \
            add_dots(r, rest, columns, length, job->out + i, TOGETHER);                                                \
        }                                                                                                              \
        for (; i < last && positions[i] < end; i++) {                                                                  \
            columns[0] = job->columns + starts[positions[i]];                                                          \
            add_dots(r, rest, columns, length, job->out + i, 1);                                                       \
        }                                                                                                              \
        return i;                                                                                                      \
    }                                                                                                                  \
    FAST_VERSIONS                                                                                                      \
    static void NAME(const Sampled *job, int64_t first, int64_t last) {                                                \
        const int64_t width = job->width;                                                                              \
        for (int64_t i = first; i < last;) {                                                                           \
            const int64_t row = ((const INDEX *)job->positions)[i] / width;                                            \
            i = NAME##_row(job, row, i, last, (row + 1) * width);                                                      \
        }                                                                                                              \
    }                                                                                                                  \
    FAST_VERSIONS                                                                                                      \
    static void NAME##_part(const Sampled *job, int64_t first, int64_t last) {                                         \
        for (int64_t row = first; row < last; row++)                                                                   \
            job->next[row] = NAME##_row(job, row, job->next[row], job->count, row * job->width + job->end_column);     \
    }                                                                                                                  \
    static void NAME##_find(const Sampled *job, int64_t rows, int64_t *firsts) {                                       \
        const INDEX *positions = (const INDEX *)job->positions;                                                        \
        int64_t low = 0;                                                                                               \
        for (int64_t row = 0; row < rows; firsts[row++] = low)                                                         \
            for (int64_t high = job->count; low < high;) {                                                             \
                const int64_t middle = low + (high - low) / 2;                                                         \
                if (positions[middle] < row * job->width) low = middle + 1;                                            \
                else high = middle;                                                                                    \
            }                                                                                                          \
    }
SAMPLED(sampled_4, int32_t)
SAMPLED(sampled_8, int64_t)

static void *sampled_share(void *argument) {
    const Share *share = (const Share *)argument;
    const Sampled *job = (const Sampled *)share->job;
    (job->index_bytes == 8 ? sampled_8 : sampled_4)(job, share->begin, share->end);
    return NULL;
}

static void *part_share(void *argument) {
    const Share *share = (const Share *)argument;
    const Sampled *job = (const Sampled *)share->job;
    (job->index_bytes == 8 ? sampled_8_part : sampled_4_part)(job, share->begin, share->end);
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

enum { ENOUGH_ROWS = 256, ENOUGH_POSITIONS = 1024 }; /* what is worth another thread */

/* The gradient of a linear layer's weight; see reference.sampled_gradient. It takes tokens in blocks that stay in cache.
 * `starts` has room for width integers, `packed` for block * (rows + width) floats. `out` must hold zeros at the start. */
PyObject *sampled(PyObject *self, PyObject *args) {
    unsigned long long grad_output, input, positions, out, starts_at, packed_at;
    long long tokens, rows, width, count, block;
    int entry_bytes, index_bytes;
    long threads;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKiLLLKiLKKKLl", &grad_output, &input, &entry_bytes, &tokens, &rows, &width, &positions,
                          &index_bytes, &count, &out, &starts_at, &packed_at, &block, &threads))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    int64_t *starts = (int64_t *)(uintptr_t)starts_at;
    float *packed = (float *)(uintptr_t)packed_at;
    for (int64_t t = 0; t < tokens; t += block) {
        const int64_t length = tokens - t < block ? tokens - t : block;
        for (int64_t c = 0; c < width; c++) starts[c] = c * length;
        const Pack a = {(const char *)(uintptr_t)grad_output + t * rows * entry_bytes, packed, rows, length, entry_bytes};
        const Pack b = {(const char *)(uintptr_t)input + t * width * entry_bytes, packed + rows * length, width, length,
                        entry_bytes};
        const Sampled job = {a.packed, b.packed, starts, (const void *)(uintptr_t)positions, (float *)(uintptr_t)out, count,
                             width, length, length, index_bytes, NULL, width};
        in_parallel(pack_share, &a, rows, threads, ENOUGH_ROWS);
        in_parallel(pack_share, &b, width, threads, ENOUGH_ROWS);
        in_parallel(sampled_share, &job, count, threads, ENOUGH_POSITIONS);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* How a kernel slides along one side of an image. images.py fills two of these: of the lines, and of the columns. */
typedef struct {
    int64_t output, input; /* places */
    int64_t kernel, stride, padding, dilation;
    int64_t phases, reach; /* how many phases the kernel meets; the largest shift */
} Side;

/* Lines first to first + lines - 1 of images image to image + images - 1, of a gradient [.., out, lines, columns] and an input
 * [.., in, lines, columns]. */
typedef struct {
    const void *gradient, *input;
    int entry_bytes;
    int64_t out, in;
    Side down, across;
    int64_t image, images, first, lines;
    int64_t channel; /* the first one of the input in `columns` */
    float *rows, *columns;
} Images;

static int64_t pitch_of(const Images *job) { return job->across.output + job->across.reach; }
static int64_t plane_of(const Images *job) { return job->images * (job->lines + job->down.reach) * pitch_of(job); }

/* The input's place that place 0 of the output meets in a phase. */
static int64_t place_of(const Side *side, int64_t phase) {
    return phase * side->dilation % side->stride - side->padding;
}

/* NAME_gradient, NAME_input: the rows of channels begin to end - 1. */
#define PACK_IMAGES(NAME, ENTRY, WIDEN)                                                                                    \
    INLINE void NAME##_line(const ENTRY *from, float *to, int64_t count, int64_t step, int64_t place, int64_t inside) {    \
        int64_t t = 0, first = place < 0 ? (-place + step - 1) / step : 0;                                                 \
        int64_t last = inside > place ? (inside - place + step - 1) / step : 0;                                            \
        if (last > count) last = count;                                                                                    \
        for (; t < first && t < count; t++) to[t] = 0.0f;                                                                  \
        if (step == 1)                                                                                                     \
            for (; t < last; t++) to[t] = WIDEN(from[place + t]);                                                          \
        else                                                                                                               \
            for (; t < last; t++) to[t] = WIDEN(from[place + t * step]);                                                   \
        for (; t < count; t++) to[t] = 0.0f;                                                                               \
    }                                                                                                                      \
    FAST_VERSIONS                                                                                                          \
    static void NAME##_gradient(const Images *job, int64_t begin, int64_t end) {                                           \
        const int64_t height = job->down.output, width = job->across.output, pitch = pitch_of(job);                        \
        for (int64_t o = begin; o < end; o++)                                                                              \
            for (int64_t n = 0; n < job->images; n++) {                                                                    \
                const ENTRY *from = (const ENTRY *)job->gradient +                                                         \
                                    (((job->image + n) * job->out + o) * height + job->first) * width;                     \
                float *to = job->rows + o * plane_of(job) + n * (job->lines + job->down.reach) * pitch;                    \
                for (int64_t y = 0; y < job->lines; y++) NAME##_line(from + y * width, to + y * pitch, pitch, 1, 0, width); \
                memset(to + job->lines * pitch, 0, job->down.reach * pitch * sizeof(float));                               \
            }                                                                                                              \
    }                                                                                                                      \
    FAST_VERSIONS                                                                                                          \
    static void NAME##_input(const Images *job, int64_t begin, int64_t end) {                                              \
        const Side down = job->down, across = job->across;                                                                 \
        const int64_t pitch = pitch_of(job), lines = job->lines + down.reach;                                              \
        float *to = job->columns + begin * down.phases * across.phases * plane_of(job);                                    \
        for (int64_t c = job->channel + begin; c < job->channel + end; c++)                                                \
            for (int64_t p = 0; p < down.phases; p++)                                                                      \
                for (int64_t q = 0; q < across.phases; q++)                                                                \
                    for (int64_t n = 0; n < job->images; n++) {                                                            \
                        const ENTRY *from =                                                                                \
                            (const ENTRY *)job->input + ((job->image + n) * job->in + c) * down.input * across.input;      \
                        for (int64_t y = 0; y < lines; y++, to += pitch) {                                                 \
                            const int64_t line = (job->first + y) * down.stride + place_of(&down, p);                      \
                            const int is_inside = line >= 0 && line < down.input;                                          \
                            NAME##_line(from + (is_inside ? line * across.input : 0), to, pitch, across.stride,            \
                                        place_of(&across, q), is_inside ? across.input : 0);                               \
                        }                                                                                                  \
                    }                                                                                                      \
    }
PACK_IMAGES(floats, float, )
PACK_IMAGES(halves, uint16_t, widened)

static void *gradient_share(void *argument) {
    const Share *share = (const Share *)argument;
    const Images *job = (const Images *)share->job;
    (job->entry_bytes == 2 ? halves_gradient : floats_gradient)(job, share->begin, share->end);
    return NULL;
}

static void *input_share(void *argument) {
    const Share *share = (const Share *)argument;
    const Images *job = (const Images *)share->job;
    (job->entry_bytes == 2 ? halves_input : floats_input)(job, share->begin, share->end);
    return NULL;
}

/* The gradient of a convolution's weight [out, in, kernel]; see reference.sampled_images. At a time it takes `some_images`
 * images, `some_lines` lines of their outputs, and `some_channels` channels of the input, whose rows stay in cache. `starts`
 * has room for in * kernel + 2 * out integers. `packed` has room for the rows. `out` must hold zeros at the start. */
PyObject *sampled_images(PyObject *self, PyObject *args) {
    unsigned long long gradient, input, sides, positions, out, starts_at, packed_at;
    long long images, outs, ins, count, some_images, some_lines, some_channels;
    int entry_bytes, index_bytes;
    long threads;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKiLLLKKiLKKKLLLl", &gradient, &input, &entry_bytes, &images, &outs, &ins, &sides, &positions,
                          &index_bytes, &count, &out, &starts_at, &packed_at, &some_images, &some_lines, &some_channels,
                          &threads))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    int64_t *starts = (int64_t *)(uintptr_t)starts_at;
    const Side down = ((const Side *)(uintptr_t)sides)[0], across = ((const Side *)(uintptr_t)sides)[1];
    Images job = {(const void *)(uintptr_t)gradient, (const void *)(uintptr_t)input, entry_bytes, outs, ins, down, across,
                  0, 0, 0, 0, 0, (float *)(uintptr_t)packed_at, NULL};
    const int64_t kernel = down.kernel * across.kernel;
    int64_t *firsts = starts + ins * kernel;
    Sampled sums = {job.rows, NULL, starts, (const void *)(uintptr_t)positions, (float *)(uintptr_t)out, count, ins * kernel,
                    0, 0, index_bytes, firsts + outs, 0};
    (index_bytes == 8 ? sampled_8_find : sampled_4_find)(&sums, outs, firsts);
    for (job.image = 0; job.image < images; job.image += some_images)
        for (job.first = 0; job.first < down.output; job.first += some_lines) {
            job.images = images - job.image < some_images ? images - job.image : some_images;
            job.lines = down.output - job.first < some_lines ? down.output - job.first : some_lines;
            const int64_t plane = plane_of(&job), pitch = pitch_of(&job), channel = down.phases * across.phases * plane;
            job.columns = job.rows + outs * plane;
            sums.pitch = plane, sums.length = plane - down.reach * pitch - across.reach;
            for (int64_t i = 0; i < down.kernel; i++)
                for (int64_t j = 0; j < across.kernel; j++) {
                    const int64_t phase = i % down.phases * across.phases + j % across.phases;
                    const int64_t shift =
                        i * down.dilation / down.stride * pitch + j * across.dilation / across.stride + phase * plane;
                    for (int64_t c = 0; c < ins; c++)
                        starts[c * kernel + i * across.kernel + j] = c % some_channels * channel + shift;
                }
            sums.columns = job.columns;
            memcpy(sums.next, firsts, outs * sizeof(int64_t));
            in_parallel(gradient_share, &job, outs, threads, ENOUGH_ROWS);
            for (job.channel = 0; job.channel < ins; job.channel += some_channels) {
                const int64_t channels = ins - job.channel < some_channels ? ins - job.channel : some_channels;
                sums.end_column = (job.channel + channels) * kernel;
                in_parallel(input_share, &job, channels, threads, ENOUGH_ROWS);
                in_parallel(part_share, &sums, outs, count > ENOUGH_POSITIONS ? threads : 1, 1);
            }
        }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
