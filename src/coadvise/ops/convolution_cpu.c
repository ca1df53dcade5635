/* 3x3 convolution with stride 1, one pixel of zeros around, a bias and ReLU, for channels-last tensors.
 *
 *   x [B, H, W, I]     weight [36, I, O]     bias [O]     out [B, H, W, O]      (memory order)
 *
 * x and out are float32 or bfloat16 in memory, all else is float32.
 *
 * Winograd's F(4x4, 3x3) (Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks*, CVPR 2016): 4x4 outputs
 * come from 36 products a pair of channels in place of 144. Its points are 0, +-3/4, +-3/2 and infinity, not the usual
 * 0, +-1, +-2: all constants of both transforms here are exact, and the result is twice as far from the exact one as a
 * plain sum in float32 is, not four times. `weight` has been transformed already.
 *
 * A thread takes rows of tiles: it transforms a row's inputs, multiplies, and transforms back, all in its own caches.
 * Every value has one owner and one order of summation: results depend on neither thread count nor batch size.
 */
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 7 /* tiles multiplied together: ROWS x COLUMNS sums fill the vector registers */
#define COLUMNS 4
#else
#define LANES 8
#define ROWS 6
#define COLUMNS 2
#endif
#define TILE 4 /* outputs a side; inputs a side are two more */
#define SIDE 6

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t words __attribute__((vector_size(LANES * 4)));
typedef uint32_t bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    int64_t batch, height, width, inputs, outputs, bf16, threads;
} Sizes;

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }

/* Values of an image, `bf16` being a constant. */
INLINE vec get(const int bf16, const void *image, int64_t index) {
    if (!bf16) return load((const float *)image + index);
    return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)image + index), bits) << 16);
}

/* To nearest, ties to even; a NaN must not round to infinity. */
INLINE void put(const int bf16, void *image, int64_t index, vec v) {
    if (!bf16) {
        store((float *)image + index, v);
        return;
    }
    const bits b = (bits)v, nan = (bits)((b & 0x7fffffff) > 0x7f800000), rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    *(halves *)((uint16_t *)image + index) = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), halves);
}

/* Rows of both transforms; with points +-a and +-b even and odd powers come apart. */
#define A 0.75f
#define B 1.5f

INLINE void transform_input(const vec d[SIDE], vec t[SIDE]) {
    const vec even_a = d[4] - B * B * d[2], odd_a = A * (d[3] - B * B * d[1]);
    const vec even_b = d[4] - A * A * d[2], odd_b = B * (d[3] - A * A * d[1]);
    t[0] = A * A * B * B * d[0] - (A * A + B * B) * d[2] + d[4];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = A * A * B * B * d[1] - (A * A + B * B) * d[3] + d[5];
}

INLINE void transform_output(const vec m[SIDE], vec y[TILE]) {
    const vec sum_a = m[1] + m[2], less_a = m[1] - m[2], sum_b = m[3] + m[4], less_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = A * less_a + B * less_b;
    y[2] = A * A * sum_a + B * B * sum_b;
    y[3] = A * A * A * less_a + B * B * B * less_b + m[5];
}

/* A row of tiles from row `top` of the image that begins at `first` to [36, tiles, inputs]. */
INLINE void gather(const int bf16, const void *image, int64_t first, int64_t top, int64_t tiles, int64_t padded, float *made,
                   const Sizes *s) {
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t channel = 0; channel < s->inputs; channel += LANES) {
            vec half[SIDE][SIDE]; /* columns transformed, [column][row] */
            for (int64_t j = 0; j < SIDE; j++) {
                const int64_t column = tile * TILE - 1 + j;
                vec d[SIDE];
                for (int64_t i = 0; i < SIDE; i++) {
                    const int64_t row = top + i;
                    const int inside = row >= 0 && row < s->height && column >= 0 && column < s->width;
                    d[i] = inside ? get(bf16, image, first + (row * s->width + column) * s->inputs + channel) : (vec){0};
                }
                transform_input(d, half[j]);
            }
            for (int64_t i = 0; i < SIDE; i++) {
                vec d[SIDE], t[SIDE];
                for (int64_t j = 0; j < SIDE; j++)
                    d[j] = half[j][i];
                transform_input(d, t);
                for (int64_t j = 0; j < SIDE; j++)
                    store(made + ((i * SIDE + j) * padded + tile) * s->inputs + channel, t[j]);
            }
        }
}

/* [36, tiles, inputs] times [36, inputs, outputs] to [36, tiles, outputs]. */
static void multiply(const float *made, const float *weight, int64_t padded, float *products, const Sizes *s) {
    for (int64_t p = 0; p < SIDE * SIDE; p++)
        for (int64_t column = 0; column < s->outputs; column += COLUMNS * LANES)
            for (int64_t row = 0; row < padded; row += ROWS) {
                const float *a = made + (p * padded + row) * s->inputs;
                const float *b = weight + p * s->inputs * s->outputs + column;
                float *c = products + (p * padded + row) * s->outputs + column;
                vec sum[ROWS][COLUMNS] = {0};
                for (int64_t k = 0; k < s->inputs; k++, b += s->outputs) {
                    vec factor[COLUMNS];
                    for (int j = 0; j < COLUMNS; j++)
                        factor[j] = load(b + j * LANES);
                    for (int i = 0; i < ROWS; i++)
                        for (int j = 0; j < COLUMNS; j++)
                            sum[i][j] += a[i * s->inputs + k] * factor[j];
                }
                for (int i = 0; i < ROWS; i++)
                    for (int j = 0; j < COLUMNS; j++)
                        store(c + i * s->outputs + j * LANES, sum[i][j]);
            }
}

/* [36, tiles, outputs] to a row of tiles from row `top` of the image that begins at `first`. */
INLINE void scatter(const int bf16, const float *products, int64_t first, int64_t top, int64_t tiles, int64_t padded,
                    const float *bias, void *image, const Sizes *s) {
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t channel = 0; channel < s->outputs; channel += LANES) {
            vec half[SIDE][TILE]; /* [column][row] */
            for (int64_t j = 0; j < SIDE; j++) {
                vec m[SIDE];
                for (int64_t i = 0; i < SIDE; i++)
                    m[i] = load(products + ((i * SIDE + j) * padded + tile) * s->outputs + channel);
                transform_output(m, half[j]);
            }
            const vec shift = load(bias + channel);
            for (int64_t i = 0; i < TILE && top + i < s->height; i++) {
                vec m[SIDE], y[TILE];
                for (int64_t j = 0; j < SIDE; j++)
                    m[j] = half[j][i];
                transform_output(m, y);
                for (int64_t j = 0; j < TILE && tile * TILE + j < s->width; j++) {
                    const vec sum = y[j] + shift;
                    const vec answer = (vec)((words)sum & ~(words)(sum < 0)); /* a NaN stays */
                    put(bf16, image, first + ((top + i) * s->width + tile * TILE + j) * s->outputs + channel, answer);
                }
            }
        }
}

/* How many channels go in, and come out, must be multiples of these. */
int64_t inputs_multiple(void) { return LANES; }
int64_t outputs_multiple(void) { return COLUMNS * LANES; }

INLINE void row_of_tiles(const int bf16, const void *x, const float *weight, const float *bias, void *out, int64_t image,
                         int64_t top, int64_t tiles, int64_t padded, float *made, float *products, const Sizes *s) {
    const int64_t pixels = image * s->height * s->width;
    gather(bf16, x, pixels * s->inputs, top - 1, tiles, padded, made, s);
    multiply(made, weight, padded, products, s);
    scatter(bf16, products, pixels * s->outputs, top, tiles, padded, bias, out, s);
}

/* sizes: batch, height, width, inputs, outputs, bf16, threads. Returns 0, or 1 without memory. */
int convolution(const int64_t *sizes, const void *x, const float *weight, const float *bias, void *out) {
    const Sizes s = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
    const int64_t tiles = (s.width + TILE - 1) / TILE, rows = (s.height + TILE - 1) / TILE;
    const int64_t padded = (tiles + ROWS - 1) / ROWS * ROWS, step = 64 / sizeof(float);
    const int64_t in = (SIDE * SIDE * padded * s.inputs + step - 1) / step * step, all = in + SIDE * SIDE * padded * s.outputs;
    int failed = 0;
#pragma omp parallel num_threads((int)s.threads) reduction(| : failed)
    {
        float *made = aligned_alloc(64, (size_t)((all * (int64_t)sizeof(float) + 63) / 64 * 64)), *products = made + in;
        failed = made == NULL;
        if (!failed)
            for (int64_t i = 0; i < in; i++)
                made[i] = 0; /* tiles beyond the last one stay so */
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.batch * rows; task++) {
            if (failed)
                continue;
            const int64_t image = task / rows, top = task % rows * TILE;
            if (s.bf16)
                row_of_tiles(1, x, weight, bias, out, image, top, tiles, padded, made, products, &s);
            else
                row_of_tiles(0, x, weight, bias, out, image, top, tiles, padded, made, products, &s);
        }
        free(made);
    }
    return failed;
}
