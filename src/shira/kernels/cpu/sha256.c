/* SHA-256 of values as little-endian float32, two streams at a time. native.py calls it; sparse.tensor.fingerprint is what it must
 * give, for each.
 *
 * The processor's own instructions wait for each other within a stream: a second one takes the time of none.
 */
#include "native.h"

#ifdef X86
#include <cpuid.h>
#include <immintrin.h>

/* What to hash; native.py fills an array of these. */
typedef struct {
    const void *values;  /* [count], float32 or bfloat16, which is widened */
    uint8_t *digest;     /* gets 32 bytes */
    int64_t count;
    int64_t entry_bytes; /* 4 or 2, the same in all */
} Message;

/* One on its way: its state, as the instructions want it, and what is left. A block has 16 values. */
typedef struct {
    __m128i state[2];
    const Message *message;
    const uint8_t *values;
    int64_t blocks;
} Stream;

static const uint32_t ROUNDS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
static const uint32_t BEGIN[8] = {0x9b05688c, 0x510e527f, 0xbb67ae85, 0x6a09e667,  /* F E B A */
                                  0x5be0cd19, 0x1f83d9ab, 0xa54ff53a, 0x3c6ef372}; /* H G D C */

#define SHA __attribute__((target("sha,sse4.1")))

static int has_sha(void) {
    unsigned a, b = 0, c, d;
    return __builtin_cpu_supports("sse4.1") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
}

/* Four values as the numbers that SHA-256 sees: their bytes the other way round. */
SHA INLINE __m128i four(const void *values, int64_t at, int entry_bytes) {
    const __m128i reversed = _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
    const uint8_t *from = (const uint8_t *)values + at * entry_bytes;
    if (entry_bytes == 4) return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)from), reversed);
    return _mm_shuffle_epi8(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)from)), 16), reversed);
}

/* Some blocks of each of one or two streams, four rounds a turn: FIPS 180-4. */
SHA INLINE void advance(Stream *streams, int count, int64_t blocks, int entry_bytes) {
    __m128i state[2][2], before[2][2], words[2][4];
    for (int s = 0; s < count; s++) memcpy(state[s], streams[s].state, sizeof state[s]);
    for (int64_t block = 0; block < blocks; block++) {
        memcpy(before, state, sizeof before);
#pragma GCC unroll 16
        for (int turn = 0; turn < 16; turn++) {
#pragma GCC unroll 2
            for (int s = 0; s < count; s++) {
                __m128i *const w = words[s], *const now = &w[turn % 4];
                const __m128i last = w[(turn + 3) % 4], between = _mm_alignr_epi8(last, w[(turn + 2) % 4], 4);
                if (turn < 4) *now = four(streams[s].values, 16 * block + 4 * turn, entry_bytes);
                else *now = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(*now, w[(turn + 1) % 4]), between), last);
                const __m128i added = _mm_add_epi32(*now, _mm_loadu_si128((const __m128i *)&ROUNDS[4 * turn]));
                state[s][1] = _mm_sha256rnds2_epu32(state[s][1], state[s][0], added);
                state[s][0] = _mm_sha256rnds2_epu32(state[s][0], state[s][1], _mm_shuffle_epi32(added, 0x0e));
            }
        }
        for (int s = 0; s < count; s++)
            for (int half = 0; half < 2; half++) state[s][half] = _mm_add_epi32(state[s][half], before[s][half]);
    }
    for (int s = 0; s < count; s++) {
        memcpy(streams[s].state, state[s], sizeof state[s]);
        streams[s].values += 16 * blocks * entry_bytes;
        streams[s].blocks -= blocks;
    }
}

SHA static void advance_all(Stream *streams, int count, int64_t blocks, int64_t entry_bytes) {
    if (count == 2 && entry_bytes == 2) advance(streams, 2, blocks, 2);
    else if (count == 2) advance(streams, 2, blocks, 4);
    else if (entry_bytes == 2) advance(streams, 1, blocks, 2);
    else advance(streams, 1, blocks, 4);
}

static void begin(Stream *stream, const Message *message) {
    memcpy(stream->state, BEGIN, sizeof BEGIN);
    stream->message = message;
    stream->values = (const uint8_t *)message->values;
    stream->blocks = message->count / 16;
}

/* The values that do not fill a block, a bit, zeros, and how many bits there were. */
static void finish(Stream *stream) {
    const int64_t rest = stream->message->count % 16;
    const uint64_t bits = (uint64_t)stream->message->count * 32;
    uint32_t words[32] = {0}, state[8];
    for (int64_t i = 0; i < rest; i++) {
        if (stream->message->entry_bytes == 4) memcpy(&words[i], stream->values + 4 * i, 4);
        else memcpy((uint8_t *)&words[i] + 2, stream->values + 2 * i, 2);
    }
    words[rest] = 0x80;
    stream->blocks = rest < 14 ? 1 : 2;
    words[16 * stream->blocks - 2] = __builtin_bswap32((uint32_t)(bits >> 32));
    words[16 * stream->blocks - 1] = __builtin_bswap32((uint32_t)bits);
    stream->values = (const uint8_t *)words;
    advance_all(stream, 1, stream->blocks, 4);
    memcpy(state, stream->state, sizeof state);
    static const int ORDER[8] = {3, 2, 7, 6, 1, 0, 5, 4}; /* A to H */
    for (int i = 0; i < 8; i++) {
        const uint32_t word = __builtin_bswap32(state[ORDER[i]]);
        memcpy(stream->message->digest + 4 * i, &word, 4);
    }
}

static void hash(const Message *messages, Py_ssize_t count) {
    Stream streams[2];
    Py_ssize_t next = 0;
    for (int open = 0;;) {
        while (open < 2 && next < count) begin(&streams[open++], &messages[next++]);
        if (!open) return;
        const int64_t shortest = open == 2 && streams[1].blocks < streams[0].blocks ? streams[1].blocks : streams[0].blocks;
        advance_all(streams, open, shortest, streams[0].message->entry_bytes);
        for (int s = open - 1; s >= 0; s--) {
            if (streams[s].blocks) continue;
            finish(&streams[s]);
            streams[s] = streams[--open];
        }
    }
}
#else
typedef struct {
    int unused;
} Message;
#define has_sha() 0
#define hash(messages, count) ((void)(messages), (void)(count))
#endif

/* Fill in the digests; False if this processor has no instructions for it. Longest first is fastest. */
PyObject *sha256(PyObject *self, PyObject *args) {
    unsigned long long address;
    Py_ssize_t count;
    (void)self;
    if (!PyArg_ParseTuple(args, "Kn", &address, &count)) return NULL;
    if (!has_sha()) Py_RETURN_FALSE;
    Py_BEGIN_ALLOW_THREADS
    hash((const Message *)(uintptr_t)address, count);
    Py_END_ALLOW_THREADS
    Py_RETURN_TRUE;
}
