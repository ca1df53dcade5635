/* Attention of all heads for inference, float32: softmax(q k^T / sqrt(d)) v.
 *
 *   qkv [B, N, 3, heads, d]     out [B, N, heads, d]      (memory order)
 *
 * A thread takes one head of one image at a time: it copies the keys, transposed, and the values into its own caches and
 * goes through the queries in bands. Every value has one owner and one order of summation: results depend on neither
 * thread count nor batch size.
 */
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 7 /* queries multiplied together: ROWS x COLUMNS sums fill the vector registers */
#define COLUMNS 4
#else
#define LANES 8
#define ROWS 6
#define COLUMNS 2
#endif
#define BLOCKS 4 /* of ROWS queries in a band: columns of the keys are in the nearest cache for all of them */

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t words __attribute__((vector_size(LANES * 4)));
#define INLINE static inline __attribute__((always_inline))

/* The lanes of v with those exchanged that are n apart. */
#define EIGHT(from, n) from ^ n, (from + 1) ^ n, (from + 2) ^ n, (from + 3) ^ n, (from + 4) ^ n, (from + 5) ^ n, (from + 6) ^ n, (from + 7) ^ n
#if LANES == 16
#define ALL(n) EIGHT(0, n), EIGHT(8, n)
#else
#define ALL(n) EIGHT(0, n)
#endif
#if defined(__clang__)
#define EXCHANGED(v, n) __builtin_shufflevector(v, v, ALL(n))
#else
#define EXCHANGED(v, n) __builtin_shuffle(v, (words){ALL(n)})
#endif

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE vec larger(vec a, vec b) {
    const words where = a > b;
    return (vec)((where & (words)a) | (~where & (words)b));
}

INLINE vec largest_lane(vec v) {
#if LANES == 16
    v = larger(v, EXCHANGED(v, 8));
#endif
    v = larger(v, EXCHANGED(v, 4));
    v = larger(v, EXCHANGED(v, 2));
    return larger(v, EXCHANGED(v, 1));
}

INLINE vec sum_of_lanes(vec v) {
#if LANES == 16
    v += EXCHANGED(v, 8);
#endif
    v += EXCHANGED(v, 4);
    v += EXCHANGED(v, 2);
    return v + EXCHANGED(v, 1);
}

/* e to the power of x for x up to 0, within 2 units of the last place; 0 below -87. A NaN stays. */
INLINE vec exponential(vec x) {
    const vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the nearest integer lies in the low bits */
    const vec n = shifted - 12582912.0f, power = (vec)(((words)shifted + 127) << 23);
    const vec r = x - n * 0.693145752f - n * 1.42860677e-6f; /* ln 2 in two parts */
    vec y = r * 1.98756915e-4f + 1.39819994e-3f;
    y = y * r + 8.33345205e-3f;
    y = y * r + 4.16657962e-2f;
    y = y * r + 1.66666657e-1f;
    y = y * r + 0.5f;
    y = (y * r * r + r + 1.0f) * power;
    return (vec)((words)y & ~(words)(x < -87.0f));
}

/* ROWS rows of a times `count` rows of b to ROWS rows of c, `columns` vectors wide. */
INLINE void product(const int columns, const float *a, int64_t a_step, const float *b, int64_t b_step, float *c,
                    int64_t c_step, int64_t count) {
    vec sum[ROWS][COLUMNS] = {0};
    for (int64_t k = 0; k < count; k++, b += b_step) {
        vec factor[COLUMNS];
        for (int j = 0; j < columns; j++) factor[j] = load(b + j * LANES);
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < columns; j++) sum[i][j] += a[i * a_step + k] * factor[j];
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < columns; j++) store(c + i * c_step + j * LANES, sum[i][j]);
}

static void multiply(const float *a, int64_t a_step, const float *b, int64_t b_step, float *c, int64_t c_step, int64_t count) {
    product(COLUMNS, a, a_step, b, b_step, c, c_step, count);
}

static void multiply_narrow(const float *a, int64_t a_step, const float *b, int64_t b_step, float *c, int64_t c_step, int64_t count) {
    product(1, a, a_step, b, b_step, c, c_step, count);
}

/* A query's scores to weights that are yet to be divided by their sum, which every lane of the result has. */
INLINE vec weigh(float *scores, int64_t tokens, int64_t padded) {
    for (int64_t n = tokens; n < padded; n++) scores[n] = -__builtin_inff();
    vec top = load(scores), sum = {0};
    for (int64_t n = LANES; n < padded; n += LANES) top = larger(load(scores + n), top);
    top = largest_lane(top);
    for (int64_t n = 0; n < padded; n += LANES) {
        const vec weight = exponential(load(scores + n) - top);
        store(scores + n, weight);
        sum += weight;
    }
    return sum_of_lanes(sum);
}

typedef struct {
    int64_t tokens, padded, width, step, heads; /* padded: to whole vectors; step: of one token in qkv */
    float *key, *value, *score;                 /* [width, padded], [tokens, width], [BLOCKS * ROWS, padded] */
} Head;

static void copy_keys_and_values(const float *keys, float scale, const Head *h) {
    for (int64_t n = 0; n < h->tokens; n++, keys += h->step) {
        for (int64_t k = 0; k < h->width; k++) h->key[k * h->padded + n] = keys[k] * scale;
        memcpy(h->value + n * h->width, keys + h->heads * h->width, (size_t)h->width * 4);
    }
}

/* Queries `first` and on, up to BLOCKS * ROWS of them. */
static void answer_band(const float *query, int64_t first, float *out, const Head *h) {
    const int64_t out_step = h->heads * h->width;
    int64_t start[BLOCKS], blocks = 0, n = 0;
    for (int64_t row = first; blocks < BLOCKS && row < h->tokens; row += ROWS)
        start[blocks++] = least(row, h->tokens - ROWS); /* a last block begins earlier and makes the same once more */
    for (; n + COLUMNS * LANES <= h->padded; n += COLUMNS * LANES)
        for (int64_t i = 0; i < blocks; i++)
            multiply(query + start[i] * h->step, h->step, h->key + n, h->padded, h->score + i * ROWS * h->padded + n,
                     h->padded, h->width);
    for (; n < h->padded; n += LANES)
        for (int64_t i = 0; i < blocks; i++)
            multiply_narrow(query + start[i] * h->step, h->step, h->key + n, h->padded,
                            h->score + i * ROWS * h->padded + n, h->padded, h->width);
    for (int64_t i = 0; i < blocks; i++) {
        float *weight = h->score + i * ROWS * h->padded, *to = out + start[i] * out_step;
        vec sum[ROWS];
        for (int64_t row = 0; row < ROWS; row++) sum[row] = weigh(weight + row * h->padded, h->tokens, h->padded);
        for (int64_t k = 0; k < h->width; k += COLUMNS * LANES)
            multiply(weight, h->padded, h->value + k, h->width, to + k, out_step, h->tokens);
        for (int64_t row = 0; row < ROWS; row++)
            for (int64_t k = 0; k < h->width; k += LANES)
                store(to + row * out_step + k, load(to + row * out_step + k) / sum[row]);
    }
}

/* At least how many tokens there must be, and what a head's width must be a multiple of. */
int64_t tokens_at_least(void) { return ROWS; }
int64_t width_multiple(void) { return COLUMNS * LANES; }

/* sizes: batch, tokens, heads, width of a head, threads. Returns 0, or 1 without memory. */
int attention(const int64_t *sizes, const float *qkv, float *out) {
    const int64_t batch = sizes[0], tokens = sizes[1], heads = sizes[2], width = sizes[3];
    const Head plan = {tokens, (tokens + LANES - 1) / LANES * LANES, width, 3 * heads * width, heads, NULL, NULL, NULL};
    const int64_t keys = width * plan.padded, values = tokens * width, scores = BLOCKS * ROWS * plan.padded;
    const float scale = 1 / __builtin_sqrtf((float)width);
    int failed = 0;
#pragma omp parallel num_threads((int)sizes[4]) reduction(| : failed)
    {
        Head h = plan;
        h.key = aligned_alloc(64, (size_t)((keys + values + scores) * 4 + 63) / 64 * 64);
        h.value = h.key + keys, h.score = h.value + values;
        failed = h.key == NULL;
        if (!failed) memset(h.key, 0, (size_t)keys * 4); /* the keys beyond the last stay so */
#pragma omp for schedule(static)
        for (int64_t task = 0; task < batch * heads; task++) {
            if (failed) continue;
            const int64_t image = task / heads, head = task % heads;
            const float *query = qkv + image * tokens * h.step + head * width;
            copy_keys_and_values(query + heads * width, scale, &h);
            for (int64_t first = 0; first < tokens; first += BLOCKS * ROWS)
                answer_band(query, first, out + (image * tokens * heads + head) * width, &h);
        }
        free(h.key);
    }
    return failed;
}
