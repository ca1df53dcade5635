/* Batch norm, the addition of a shortcut and the ReLU that follow it, and their gradients, in two passes each over
 * memory. Channels-last tensors, float32 or bfloat16 in memory, float32 in arithmetic, double where chunks come together.
 *
 *   out = relu(weight * (x - mean) / sqrt(var + eps) + bias + shortcut)        [pixels, channels] in memory order
 *
 * Where channels are no multiple of LANES, `repeat` pixels in a row count as one of `width` channels, a multiple.
 *
 * Pixels are cut into chunks by their number and width alone, and the chunks' sums are added in one order: results
 * depend on neither thread count nor run.
 */
#if defined(__AVX512F__)
#define LANES 16
#define BLOCK 4 /* vectors of channels whose sums stay in registers at a time */
#elif defined(__AVX__)
#define LANES 8
#define BLOCK 2
#else
#define LANES 4
#define BLOCK 2
#endif
#include "lanes.h"
#include <math.h>
#include <stdlib.h>

#define CHUNK (1 << 15) /* values; waking a thread for fewer costs more than it saves */

typedef struct {
    int64_t pixels, channels, bf16, relu, threads;
    int64_t width, repeat, rows, chunk_rows, chunks; /* derived; a row has `width` values */
} Plan;

typedef int16_t shorts __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

typedef struct { /* tensors, NULL where a call has none; `dout` is the gradient of `out` */
    const void *x, *shortcut, *dout;
    void *out, *dx, *dshortcut;
} Tensors;

INLINE vec get(const int bf16, const void *base, int64_t index) {
    return bf16 ? widened((const uint16_t *)base + index) : load((const float *)base + index);
}

INLINE void put(const int bf16, void *base, int64_t index, vec value) {
    if (bf16)
        narrow_to((uint16_t *)base + index, value);
    else
        store((float *)base + index, value);
}

INLINE vec masked(vec value, words mask) { return (vec)((words)value & mask); }

/* The gradient behind the ReLU: that of what was positive. In bfloat16 the signs of 16-bit integers tell. */
INLINE vec before_relu(const int bf16, const int relu, const Tensors *t, int64_t index) {
    if (!relu) return get(bf16, t->dout, index);
    if (!bf16) return masked(load((const float *)t->dout + index), (words)(load((const float *)t->out + index) > 0));
    const shorts out = *(const shorts *)((const uint16_t *)t->out + index);
    const halves gradient = *(const halves *)((const uint16_t *)t->dout + index) & (halves)(out > 0);
    return widened((const uint16_t *)&gradient);
}

/* ---- one chunk: n rows from `row` on; bf16, relu, extra (a shortcut) and count are constants where it counts ---- */

/* Mean, and sum of squared distances from it. Distances are first taken from the first row: sums of plain squares would
 * lose what distinguishes values far from zero. */
INLINE void moments(const int bf16, const int count, const Plan *p, const Tensors *t, int64_t row, int64_t n, int64_t at,
                    float *mean, float *squares) {
    vec first[BLOCK], sum[BLOCK] = {0}, square[BLOCK] = {0};
    for (int i = 0; i < count; i++) first[i] = get(bf16, t->x, row * p->width + at + i * LANES);
    for (int64_t r = row; r < row + n; r++)
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
            const vec distance = get(bf16, t->x, r * p->width + at + i * LANES) - first[i];
            sum[i] += distance, square[i] += distance * distance;
        }
    for (int i = 0; i < count; i++) {
        const vec shift = sum[i] / (float)n;
        store(mean + at + i * LANES, first[i] + shift);
        store(squares + at + i * LANES, square[i] - shift * sum[i]);
    }
}

/* Sums of the gradient and of gradient * (x - mean); the gradient is the shortcut's as well. */
INLINE void sums(const int bf16, const int relu, const int extra, const int count, const Plan *p, const Tensors *t,
                 const float *mean, int64_t row, int64_t n, int64_t at, float *of_g, float *of_gx) {
    vec sum_g[BLOCK] = {0}, sum_gx[BLOCK] = {0};
    for (int64_t r = row; r < row + n; r++)
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
            const int64_t k = r * p->width + at + i * LANES;
            const vec g = before_relu(bf16, relu, t, k);
            if (extra) put(bf16, t->dshortcut, k, g);
            sum_g[i] += g, sum_gx[i] += g * (get(bf16, t->x, k) - load(mean + at + i * LANES));
        }
    for (int i = 0; i < count; i++) store(of_g + at + i * LANES, sum_g[i]), store(of_gx + at + i * LANES, sum_gx[i]);
}

INLINE void moments_of(const int bf16, const int relu, const int extra, const Plan *p, const Tensors *t, const float *unused,
                       int64_t row, int64_t n, float *mean, float *squares) {
    (void)relu, (void)extra, (void)unused;
    int64_t at = 0;
    for (; at + BLOCK * LANES <= p->width; at += BLOCK * LANES) moments(bf16, BLOCK, p, t, row, n, at, mean, squares);
    for (; at < p->width; at += LANES) moments(bf16, 1, p, t, row, n, at, mean, squares);
}

INLINE void sums_of(const int bf16, const int relu, const int extra, const Plan *p, const Tensors *t, const float *mean,
                    int64_t row, int64_t n, float *of_g, float *of_gx) {
    int64_t at = 0;
    for (; at + BLOCK * LANES <= p->width; at += BLOCK * LANES)
        sums(bf16, relu, extra, BLOCK, p, t, mean, row, n, at, of_g, of_gx);
    for (; at < p->width; at += LANES) sums(bf16, relu, extra, 1, p, t, mean, row, n, at, of_g, of_gx);
}

/* out = a * (x - mean) + b, with what follows; factors [3][width] are mean, a and b. */
INLINE void normalise(const int bf16, const int relu, const int extra, const Plan *p, const Tensors *t, const float *factors,
                  int64_t row, int64_t n) {
    for (int64_t r = row; r < row + n; r++)
        for (int64_t at = 0; at < p->width; at += LANES) {
            const int64_t k = r * p->width + at;
            const vec distance = get(bf16, t->x, k) - load(factors + at);
            vec value = distance * load(factors + p->width + at) + load(factors + 2 * p->width + at);
            if (extra) value += get(bf16, t->shortcut, k);
            if (relu) value = masked(value, ~(words)(value < 0)); /* a NaN stays */
            put(bf16, t->out, k, value);
        }
}

/* dx = a * gradient + b * (x - mean) + c; factors [4][width] are mean, a, b and c. */
INLINE void gradient_of_x(const int bf16, const int relu, const int extra, const Plan *p, const Tensors *t, const float *factors,
                    int64_t row, int64_t n) {
    for (int64_t r = row; r < row + n; r++)
        for (int64_t at = 0; at < p->width; at += LANES) {
            const int64_t k = r * p->width + at;
            const vec g = extra ? get(bf16, t->dshortcut, k) : before_relu(bf16, relu, t, k);
            const vec distance = get(bf16, t->x, k) - load(factors + at);
            put(bf16, t->dx, k,
                g * load(factors + p->width + at) + distance * load(factors + 2 * p->width + at) +
                    load(factors + 3 * p->width + at));
        }
}

/* ---- all chunks; in the second pass backwards (-1): the last are still in the cache ---- */

#define WITH(bf16, relu, extra, f, ...) \
    case bf16 << 2 | relu << 1 | extra: f(bf16, relu, extra, __VA_ARGS__); break;
#define EACH(order, f, ...)                                                                             \
    _Pragma("omp parallel for schedule(static) num_threads(p->threads)")                                \
    for (int64_t k = 0; k < p->chunks; k++) {                                                           \
        const int64_t i = order < 0 ? p->chunks - 1 - k : k;                                            \
        const int64_t row = i * p->chunk_rows, n = least(p->chunk_rows, p->rows - row);                 \
        switch (p->bf16 << 2 | p->relu << 1 | extra) {                                                  \
            WITH(0, 0, 0, f, __VA_ARGS__) WITH(0, 0, 1, f, __VA_ARGS__) WITH(0, 1, 0, f, __VA_ARGS__)   \
            WITH(0, 1, 1, f, __VA_ARGS__) WITH(1, 0, 0, f, __VA_ARGS__) WITH(1, 0, 1, f, __VA_ARGS__)   \
            WITH(1, 1, 0, f, __VA_ARGS__) WITH(1, 1, 1, f, __VA_ARGS__)                                 \
        }                                                                                               \
    }

static int64_t greatest_common_divisor(int64_t a, int64_t b) { return b ? greatest_common_divisor(b, a % b) : a; }

static Plan plan_of(const int64_t *sizes) {
    Plan p = {.pixels = sizes[0], .channels = sizes[1], .bf16 = sizes[2], .relu = sizes[3], .threads = sizes[4]};
    p.repeat = LANES / greatest_common_divisor(p.channels, LANES);
    p.width = p.repeat * p.channels, p.rows = p.pixels / p.repeat;
    p.chunk_rows = most(CHUNK / p.width, 1);
    p.chunks = (p.rows + p.chunk_rows - 1) / p.chunk_rows;
    p.threads = least(p.threads, p.chunks);
    return p;
}

/* sizes: pixels, channels, bf16, relu, threads. Writes out and, in training, mean and var [channels], which otherwise are
 * given; var is the mean squared distance. Pixels must be a multiple of LANES / gcd(channels, LANES).
 * Returns 1 when memory ran out, else 0. */
int batch_norm(const int64_t *sizes, double eps, int training, const void *x, const float *weight, const float *bias,
               const void *shortcut, void *out, float *mean, float *var) {
    const Plan plan = plan_of(sizes), *p = &plan;
    const Tensors tensors = {.x = x, .shortcut = shortcut, .out = out}, *t = &tensors;
    const int64_t width = p->width, extra = shortcut != NULL;
    float *factors = malloc((size_t)(width * (3 + 2 * p->chunks)) * sizeof(float)), *parts = factors + 3 * width;
    double *total = malloc((size_t)(2 * p->channels) * sizeof(double));
    if (!factors || !total) return free(factors), free(total), 1;
    if (training) {
        EACH(1, moments_of, p, t, NULL, row, n, parts + 2 * i * width, parts + (2 * i + 1) * width)
        double *center = total, *squares = total + p->channels;
        for (int64_t c = 0; c < 2 * p->channels; c++) total[c] = 0;
        for (int64_t i = 0; i < p->chunks; i++) {
            const double n = least(p->chunk_rows, p->rows - i * p->chunk_rows);
            const float *of = parts + 2 * i * width;
            for (int64_t k = 0; k < p->repeat; k++)
                for (int64_t c = 0; c < p->channels; c++) center[c] += n * of[k * p->channels + c];
        }
        for (int64_t c = 0; c < p->channels; c++) center[c] /= (double)p->pixels;
        for (int64_t i = 0; i < p->chunks; i++) {
            const double n = least(p->chunk_rows, p->rows - i * p->chunk_rows);
            const float *of = parts + 2 * i * width, *around = of + width;
            for (int64_t k = 0; k < p->repeat; k++)
                for (int64_t c = 0; c < p->channels; c++) {
                    const double distance = of[k * p->channels + c] - center[c];
                    squares[c] += around[k * p->channels + c] + n * distance * distance;
                }
        }
        for (int64_t c = 0; c < p->channels; c++)
            mean[c] = (float)center[c], var[c] = (float)(squares[c] / (double)p->pixels);
    }
    for (int64_t k = 0; k < width; k++) {
        const int64_t c = k % p->channels;
        factors[k] = mean[c], factors[width + k] = (float)(weight[c] / sqrt(var[c] + eps)), factors[2 * width + k] = bias[c];
    }
    EACH(-1, normalise, p, t, factors, row, n)
    free(factors), free(total);
    return 0;
}

/* As above, of a batch that made mean and var itself. Writes dx, dweight, dbias and, if it is not NULL, dshortcut. */
int batch_norm_backward(const int64_t *sizes, double eps, const void *dout, const void *x, void *out, const float *weight,
                        const float *mean, const float *var, void *dx, void *dshortcut, float *dweight, float *dbias) {
    const Plan plan = plan_of(sizes), *p = &plan;
    const Tensors tensors = {.x = x, .dout = dout, .out = out, .dx = dx, .dshortcut = dshortcut}, *t = &tensors;
    const int64_t width = p->width, extra = dshortcut != NULL;
    float *factors = malloc((size_t)(width * (4 + 2 * p->chunks)) * sizeof(float)), *parts = factors + 4 * width;
    double *total = malloc((size_t)(2 * p->channels) * sizeof(double));
    if (!factors || !total) return free(factors), free(total), 1;
    for (int64_t k = 0; k < width; k++) factors[k] = mean[k % p->channels];
    EACH(1, sums_of, p, t, factors, row, n, parts + 2 * i * width, parts + (2 * i + 1) * width)
    double *of_g = total, *of_gx = total + p->channels;
    for (int64_t c = 0; c < 2 * p->channels; c++) total[c] = 0;
    for (int64_t i = 0; i < p->chunks; i++)
        for (int64_t k = 0; k < p->repeat; k++)
            for (int64_t c = 0; c < p->channels; c++) {
                of_g[c] += parts[2 * i * width + k * p->channels + c];
                of_gx[c] += parts[(2 * i + 1) * width + k * p->channels + c];
            }
    for (int64_t k = 0; k < width; k++) {
        const int64_t c = k % p->channels;
        const double inverse = 1 / sqrt(var[c] + eps), a = weight[c] * inverse;
        const double b = -a * inverse * inverse * of_gx[c] / (double)p->pixels;
        factors[width + k] = (float)a, factors[2 * width + k] = (float)b;
        factors[3 * width + k] = (float)(-a * of_g[c] / (double)p->pixels);
        if (k < p->channels) dbias[c] = (float)of_g[c], dweight[c] = (float)(of_gx[c] * inverse);
    }
    EACH(-1, gradient_of_x, p, t, factors, row, n)
    free(factors), free(total);
    return 0;
}
