/* Involution and its gradients for channels-last tensors, float32 or bfloat16 in memory, float32 in arithmetic.
 *
 *   x     [B, H, W, G, width]     weight [B, h, w, G, K, K]     out [B, h, w, G, width]      (memory order)
 *   out[oh, ow, g] = sum_uv weight[oh, ow, g, u, v] * x[oh*stride + u - pad, ow*stride + v - pad, g],   zeros outside
 *
 * Work is cut into bands of output rows. A band copies each input row that it needs once into a ring of K float32 rows
 * with zeros left and right, so every window lies inside the ring, no tap asks where the border is, and bfloat16 is
 * widened once a value, not once a tap. A ring row is laid out as [plane][column][LANES], a plane being LANES channels
 * of one group: a window is K short runs of memory, at offsets known when compiling, whatever the number of channels.
 *
 * Every value written has one owner and one order of summation: results depend on neither thread count nor run.
 * Groups that are narrower than LANES, or no multiple of it, are padded with zeros.
 */
#include "lanes.h"
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#ifndef __AVX512F__ /* two registers a vec, which GCC keeps in memory unless they are taken apart */
#define PART 8
#else
#define PART LANES
#endif
#define PARTS (LANES / PART)
typedef int32_t lanes_index __attribute__((vector_size(PART * 4)));
typedef float part __attribute__((vector_size(PART * 4), aligned(4), may_alias));
typedef float octet __attribute__((vector_size(32), aligned(4), may_alias));
#define TILE 4 /* output pixels of a row computed together: independent sums hide the latency of an addition */

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (lanes_index){__VA_ARGS__})
#endif
/* Lanes of a (from 0) and b (from PART) for three levels of a tree of sums; _N exchanges neighbours N lanes apart. */
#define B PART
#define KEEP_1(i) i, B + i + 1, i + 2, B + i + 3, i + 4, B + i + 5, i + 6, B + i + 7
#define SWAP_1(i) i + 1, B + i, i + 3, B + i + 2, i + 5, B + i + 4, i + 7, B + i + 6
#define KEEP_2(i) i, i + 1, B + i + 2, B + i + 3, i + 4, i + 5, B + i + 6, B + i + 7
#define SWAP_2(i) i + 2, i + 3, B + i, B + i + 1, i + 6, i + 7, B + i + 4, B + i + 5
#define KEEP_4(i) i, i + 1, i + 2, i + 3, B + i + 4, B + i + 5, B + i + 6, B + i + 7
#define SWAP_4(i) i + 4, i + 5, i + 6, i + 7, B + i, B + i + 1, B + i + 2, B + i + 3
#if PART == 16
#define ALL(lanes) lanes(0), lanes(8)
#else
#define ALL(lanes) lanes(0)
#endif
#define MERGE(a, b, n) (SHUFFLE(a, b, ALL(KEEP_##n)) + SHUFFLE(a, b, ALL(SWAP_##n)))

typedef struct {
    int64_t batch, height, width, groups, group_width, kernel, stride, out_height, out_width, bf16, threads;
    /* derived; floats where they are lengths */
    int64_t pad, blocks, plane, row; /* planes a group; one plane of a ring row; a whole ring row */
    int64_t taps, channels, padded;  /* of one pixel: weights, channels, channels in whole planes */
    int64_t bands, band_rows;
} Plan;

typedef struct {
    float *x, *dx;               /* rings of K rows */
    float *weight, *pixels, *dw; /* widened weights, padded pixels and float32 weight gradients of one tile */
} Scratch;

INLINE int64_t item(const Plan *p) { return p->bf16 ? 2 : 4; }
INLINE const char *at(const void *base, int64_t index, const Plan *p) { return (const char *)base + index * item(p); }

/* ---- memory format: bfloat16 or float32, groups dense or padded ---- */

INLINE void widen(const void *from, float *to, int64_t count, const Plan *p) {
    if (!p->bf16) {
        memcpy(to, from, (size_t)count * 4);
        return;
    }
    const uint16_t *source = from;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store(to + i, widened(source + i));
    for (; i < count; i++) {
        const uint32_t bits = (uint32_t)source[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}

INLINE void narrow(const float *from, void *to, int64_t count, const Plan *p) {
    if (!p->bf16) {
        memcpy(to, from, (size_t)count * 4);
        return;
    }
    uint16_t *target = to;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) narrow_to(target + i, load(from + i));
    for (; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, 4);
        target[i] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

/* Pixels in memory to float32 planes and back: channel block i of a pixel lies at planes[i * plane]. The lanes beyond a
 * group's width are zero before and stay zero. */
static void unpack(const void *from, float *planes, int64_t plane, int64_t pixels, int64_t step, const Plan *p) {
    for (int64_t pixel = 0; pixel < pixels; pixel++, planes += step) {
        const char *source = at(from, pixel * p->channels, p);
        if (p->group_width % LANES == 0)
            for (int64_t i = 0; i < p->groups * p->blocks; i++, source += LANES * item(p))
                widen(source, planes + i * plane, LANES, p);
        else
            for (int64_t i = 0; i < p->groups * p->blocks; i++) {
                int64_t count = least(LANES, p->group_width - i % p->blocks * LANES);
                widen(source, planes + i * plane, count, p);
                source += count * item(p);
            }
    }
}

static void pack(const float *planes, int64_t plane, void *to, int64_t pixels, int64_t step, const Plan *p) {
    for (int64_t pixel = 0; pixel < pixels; pixel++, planes += step) {
        char *target = (char *)at(to, pixel * p->channels, p);
        if (p->group_width % LANES == 0)
            for (int64_t i = 0; i < p->groups * p->blocks; i++, target += LANES * item(p))
                narrow(planes + i * plane, target, LANES, p);
        else
            for (int64_t i = 0; i < p->groups * p->blocks; i++) {
                int64_t count = least(LANES, p->group_width - i % p->blocks * LANES);
                narrow(planes + i * plane, target, count, p);
                target += count * item(p);
            }
    }
}

/* Whether arithmetic can read and write pixels in place. */
INLINE int direct(const Plan *p) { return !p->bf16 && p->padded == p->channels; }

/* ---- the ring of rows ---- */

INLINE float *slot(float *ring, int64_t row, const Plan *p) { return ring + (row + p->pad) % p->kernel * p->row; }

static void stage_rows(const void *x, float *ring, int64_t image, int64_t from, int64_t to, const Plan *p) {
    for (int64_t row = from; row < to; row++) {
        float *inner = slot(ring, row, p) + p->pad * LANES; /* the sides were zeroed once */
        if (row < 0 || row >= p->height)
            memset(slot(ring, row, p), 0, (size_t)p->row * 4);
        else
            unpack(at(x, (image * p->height + row) * p->width * p->channels, p), inner, p->plane, p->width, LANES, p);
    }
}

static void flush_row(float *ring, void *dx, int64_t image, int64_t row, const Plan *p) {
    float *from = slot(ring, row, p);
    void *to = (char *)at(dx, (image * p->height + row) * p->width * p->channels, p);
    pack(from + p->pad * LANES, p->plane, to, p->width, LANES, p);
    memset(from, 0, (size_t)p->row * 4);
}

/* ---- one plane's arithmetic for T pixels; K, T and S, the stride, are constants where it counts ---- */

INLINE void convolve(const int K, const int T, const int64_t S, float *const *rows, int64_t offset, const float *weight,
                     int64_t taps, float *out, int64_t out_step) {
    part sum[TILE][PARTS] = {0};
    for (int u = 0; u < K; u++) {
        const float *row = rows[u] + offset;
#if PARTS == 1
#pragma GCC unroll 8
#else /* more taps at a time would not leave the sums their registers */
#pragma GCC unroll 1
#endif
        for (int v = 0; v < K; v++, row += LANES)
#pragma GCC unroll 4
            for (int t = 0; t < T; t++)
                for (int i = 0; i < PARTS; i++)
                    sum[t][i] += weight[t * taps + u * K + v] * *(const part *)(row + t * S * LANES + i * PART);
    }
    for (int t = 0; t < T; t++)
        for (int i = 0; i < PARTS; i++) *(part *)(out + t * out_step + i * PART) = sum[t][i];
}

/* Pixels side by side add to the same columns: each is loaded and stored once for all of them. */
INLINE void scatter(const int K, const int T, const int64_t S, float *const *rows, int64_t offset, int64_t from,
                    int64_t to, const float *weight, int64_t taps, const float *gradient, int64_t step) {
    vec value[TILE];
    for (int t = 0; t < T; t++) value[t] = load(gradient + t * step);
    for (int64_t u = from; u < to; u++) {
        float *row = rows[u] + offset;
#pragma GCC unroll 16
        for (int column = 0; column < (T - 1) * S + K; column++) {
            vec sum = load(row + column * LANES);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const int v = column - t * (int)S;
                if (v >= 0 && v < K) sum += weight[t * taps + u * K + v] * value[t];
            }
            store(row + column * LANES, sum);
        }
    }
}

/* Lane i: the sum over all lanes of p[i]. A tree: a blend, a shuffle and an addition a product, not four of each. */
INLINE octet sums_of(const part *p) {
    const part ab = MERGE(p[0], p[1], 1), cd = MERGE(p[2], p[3], 1);
    const part ef = MERGE(p[4], p[5], 1), gh = MERGE(p[6], p[7], 1);
    const part abcd = MERGE(ab, cd, 2), efgh = MERGE(ef, gh, 2), all = MERGE(abcd, efgh, 4);
    octet parts[PART / 8];
    memcpy(parts, &all, sizeof all);
    for (int i = 1; i < PART / 8; i++) parts[0] += parts[i];
    return parts[0];
}

/* One tap's products, folded to a part. */
INLINE part product(const part *gradient, const float *x) {
    part p = gradient[0] * *(const part *)x;
    for (int i = 1; i < PARTS; i++) p += gradient[i] * *(const part *)(x + i * PART);
    return p;
}

INLINE void correlate(const int K, float *const *rows, int64_t offset, const float *gradient, float *dw, int add) {
    const int taps = K * K;
    part g[PARTS];
    for (int i = 0; i < PARTS; i++) g[i] = *(const part *)(gradient + i * PART);
    int k = 0;
#pragma GCC unroll 6
    for (; k + 8 <= taps; k += 8) { /* an odd K has K*K = 8m + 1 */
        part p[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) p[i] = product(g, rows[(k + i) / K] + offset + (k + i) % K * LANES);
        octet sums = sums_of(p);
        if (add) sums += *(const octet *)(dw + k);
        *(octet *)(dw + k) = sums;
    }
    const part last = product(g, rows[K - 1] + offset + (K - 1) * LANES);
    const float sum = sums_of((part[]){last, last, last, last, last, last, last, last})[0];
    dw[k] = add ? dw[k] + sum : sum;
}

/* ---- one output row ---- */

/* Weights and their gradients pass once: those of a tile two further on are fetched, a share of them with each group. */
INLINE void fetch(const int writing, const void *base, int64_t ow, const int K, const int T, int64_t group, const Plan *p) {
    const int64_t share = T * K * K * item(p);
    const char *from = at(base, (ow + 2 * T) * p->taps, p) + group * share;
    for (int64_t byte = 0; byte < share; byte += 64)
        if (writing)
            __builtin_prefetch(from + byte, 1);
        else
            __builtin_prefetch(from + byte);
}

INLINE void forward_tile(const int K, const int T, const int64_t S, const Plan *p, float *const *rows, int64_t ow,
                         const void *weight, void *out, Scratch *s) {
    const float *w = (const float *)at(weight, ow * p->taps, p);
    if (p->bf16) widen(w, s->weight, T * p->taps, p), w = s->weight;
    float *o = direct(p) ? (float *)out + ow * p->channels : s->pixels;
    for (int64_t group = 0; group < p->groups; group++) {
        fetch(0, weight, ow, K, T, group, p);
        for (int64_t block = 0; block < p->blocks; block++) {
            const int64_t i = group * p->blocks + block;
            convolve(K, T, S, rows, i * p->plane + ow * S * LANES, w + group * K * K, p->taps, o + i * LANES, p->padded);
        }
    }
    if (!direct(p)) pack(o, LANES, (char *)at(out, ow * p->channels, p), T, p->padded, p);
}

INLINE void forward_row(const int K, const Plan *p, float *const *rows, const void *weight, void *out, Scratch *s) {
    int64_t ow = 0;
    for (; ow + TILE <= p->out_width; ow += TILE)
        if (p->stride == 1)
            forward_tile(K, TILE, 1, p, rows, ow, weight, out, s);
        else if (p->stride == 2)
            forward_tile(K, TILE, 2, p, rows, ow, weight, out, s);
        else
            forward_tile(K, TILE, p->stride, p, rows, ow, weight, out, s);
    for (; ow < p->out_width; ow++) forward_tile(K, 1, p->stride, p, rows, ow, weight, out, s);
}

typedef struct { /* one output row: which window rows take part in dx, and where things lie; dw NULL: dx only */
    float *const *x, *const *dx;
    int64_t from, to;
    const void *gradient, *weight;
    void *dw;
} BackwardRow;

INLINE void backward_tile(const int K, const int T, const int64_t S, const Plan *p, const BackwardRow *r, int64_t ow,
                          Scratch *s) {
    const float *g = (const float *)at(r->gradient, ow * p->channels, p);
    const float *w = (const float *)at(r->weight, ow * p->taps, p);
    float *d = p->bf16 ? s->dw : (float *)r->dw + ow * p->taps;
    if (!direct(p)) unpack(g, s->pixels, LANES, T, p->padded, p), g = s->pixels;
    if (p->bf16) widen(w, s->weight, T * p->taps, p), w = s->weight;
    for (int64_t group = 0; group < p->groups; group++) {
        const int64_t tap = group * K * K;
        fetch(0, r->weight, ow, K, T, group, p);
        if (r->dw) fetch(1, r->dw, ow, K, T, group, p);
        for (int64_t block = 0; block < p->blocks; block++) {
            const int64_t i = group * p->blocks + block, offset = i * p->plane + ow * S * LANES;
            scatter(K, T, S, r->dx, offset, r->from, r->to, w + tap, p->taps, g + i * LANES, p->padded);
            for (int t = 0; r->dw && t < T; t++) {
                const float *value = g + t * p->padded + i * LANES;
                correlate(K, r->x, offset + t * S * LANES, value, d + t * p->taps + tap, block > 0);
            }
        }
    }
    if (r->dw && p->bf16) narrow(d, (char *)at(r->dw, ow * p->taps, p), T * p->taps, p);
}

INLINE void backward_row(const int K, const Plan *p, const BackwardRow *r, Scratch *s) {
    int64_t ow = 0;
    for (; p->stride == 1 && ow + TILE <= p->out_width; ow += TILE) backward_tile(K, TILE, 1, p, r, ow, s);
    for (; p->stride == 2 && ow + TILE <= p->out_width; ow += TILE) backward_tile(K, TILE, 2, p, r, ow, s);
    for (; ow < p->out_width; ow++) backward_tile(K, 1, p->stride, p, r, ow, s);
}

#define FOR_KERNEL(call, ...)                     \
    switch (p->kernel) {                          \
        case 3: call(3, __VA_ARGS__); break;      \
        case 5: call(5, __VA_ARGS__); break;      \
        case 7: call(7, __VA_ARGS__); break;      \
        default: call((int)p->kernel, __VA_ARGS__); \
    }

/* ---- one band of output rows [first, last) ---- */

static void forward_band(const Plan *p, const void *x, const void *weight, void *out, int64_t image, int64_t first,
                         int64_t last, Scratch *s) {
    float *rows[p->kernel];
    for (int64_t oh = first, staged = -p->pad + first * p->stride; oh < last; oh++) {
        const int64_t top = oh * p->stride - p->pad, pixel = (image * p->out_height + oh) * p->out_width;
        stage_rows(x, s->x, image, most(staged, top), top + p->kernel, p);
        staged = top + p->kernel;
        for (int64_t u = 0; u < p->kernel; u++) rows[u] = slot(s->x, top + u, p);
        const void *w = at(weight, pixel * p->taps, p);
        void *o = (char *)at(out, pixel * p->channels, p);
        FOR_KERNEL(forward_row, p, rows, w, o, s)
    }
}

/* Owns the weight gradient of its output rows and the input gradient of the input rows [first, last) * stride. */
static void backward_band(const Plan *p, const void *gradient, const void *x, const void *weight, void *dx, void *dw,
                              int64_t image, int64_t first, int64_t last, Scratch *s) {
    const int64_t floor_row = first * p->stride, ceil_row = least(last * p->stride, p->height);
    const int64_t reach = p->pad / p->stride;
    const int64_t end = least((ceil_row - 1 + p->pad) / p->stride + 1, p->out_height);
    float *x_rows[p->kernel], *dx_rows[p->kernel];
    int64_t staged = floor_row - p->pad, done = floor_row;
    for (int64_t oh = most(first - reach, 0); oh < end; oh++) { /* neighbours' rows too: their windows reach in here */
        const int64_t top = oh * p->stride - p->pad, pixel = (image * p->out_height + oh) * p->out_width;
        const int own = first <= oh && oh < last;
        if (own) stage_rows(x, s->x, image, most(staged, top), top + p->kernel, p), staged = top + p->kernel;
        for (int64_t u = 0; u < p->kernel; u++)
            x_rows[u] = slot(s->x, top + u, p), dx_rows[u] = slot(s->dx, top + u, p);
        const BackwardRow r = {.x = x_rows, .dx = dx_rows,
                               .from = most(floor_row - top, 0), .to = least(ceil_row - top, p->kernel),
                               .gradient = at(gradient, pixel * p->channels, p),
                               .weight = at(weight, pixel * p->taps, p),
                               .dw = own ? (char *)at(dw, pixel * p->taps, p) : NULL};
        FOR_KERNEL(backward_row, p, &r, s)
        const int64_t complete = oh + 1 < end ? least(top + p->stride, ceil_row) : ceil_row;
        for (; done < complete; done++) flush_row(s->dx, dx, image, done, p); /* no later window reaches these rows */
    }
}

/* ---- entry ---- */

static int64_t scratch_floats(const Plan *p) { /* rounded up to whole cache lines, so threads share none */
    int64_t floats = 2 * p->kernel * p->row + 2 * TILE * p->taps + TILE * p->padded;
    return (floats + 15) / 16 * 16;
}

static void plan_work(Plan *p) {
    p->pad = (p->kernel - 1) / 2;
    p->blocks = (p->group_width + LANES - 1) / LANES;
    p->plane = (p->width + 2 * p->pad) * LANES;
    p->row = p->groups * p->blocks * p->plane;
    if (p->row / 16 % 2 == 0) p->row += 16; /* an odd number of cache lines, so that rows do not collide in the cache */
    p->taps = p->groups * p->kernel * p->kernel;
    p->channels = p->groups * p->group_width;
    p->padded = p->groups * p->blocks * LANES;
    const int64_t work = p->batch * p->out_height * p->out_width * p->taps * p->blocks;
    p->threads = work < (1 << 15) ? 1 : p->threads; /* waking threads costs more than this much arithmetic */
    /* Whole images when there are enough of them: a band restages its neighbours' rows. */
    p->bands = p->threads == 1 || p->batch >= 4 * p->threads ? 1 : 4 * p->threads / p->batch;
    p->band_rows = most((p->out_height + p->bands - 1) / p->bands, 1);
    p->bands = (p->out_height + p->band_rows - 1) / p->band_rows;
}

/* sizes: batch, height, width, groups, group width, kernel, stride, out height, out width, bf16, threads.
 * Forward: out is written. Backward (gradient given): dx and dw are written. Returns 1 when memory ran out, else 0. */
int involution(const int64_t *sizes, const void *x, const void *weight, void *out, const void *gradient, void *dx,
               void *dw) {
    Plan plan = {0};
    memcpy(&plan, sizes, 11 * sizeof(int64_t));
    if (plan.batch == 0) return 0;
    plan_work(&plan);
    const Plan *p = &plan;
    const int64_t floats = scratch_floats(p);
    float *memory = aligned_alloc(64, (size_t)(p->threads * floats) * 4);
    if (!memory) return 1;
#pragma omp parallel num_threads(p->threads)
    {
        float *mine = memory + omp_get_thread_num() * floats;
        memset(mine, 0, (size_t)floats * 4);
        Scratch s = {.x = mine, .dx = mine + p->kernel * p->row};
        s.weight = s.dx + p->kernel * p->row;
        s.dw = s.weight + TILE * p->taps;
        s.pixels = s.dw + TILE * p->taps;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < p->batch * p->bands; i++) {
            const int64_t image = i / p->bands, first = i % p->bands * p->band_rows;
            const int64_t last = least(first + p->band_rows, p->out_height);
            if (gradient)
                backward_band(p, gradient, x, weight, dx, dw, image, first, last, &s);
            else
                forward_band(p, x, weight, out, image, first, last, &s);
        }
    }
    free(memory);
    return 0;
}
