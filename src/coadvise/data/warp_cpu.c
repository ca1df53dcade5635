/* An affine map of an image's plane with bicubic interpolation: to the bit what Pillow makes of an RGB image.
 *
 * Pillow's arithmetic is kept, operation by operation, in float64 and without fused multiplications (the caller's
 * -ffp-contract=off); where its order does not matter, since whole numbers are added exactly, it is shortened. All
 * channels of a pixel go through one vector, and a map that leaves rows or columns in their places reads four pixels
 * in place of sixteen.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef double pixel __attribute__((vector_size(32)));
typedef int32_t words __attribute__((vector_size(16)));
typedef uint8_t bytes __attribute__((vector_size(16)));
#define INLINE static inline __attribute__((always_inline))

#if defined(__clang__)
#define LOW_BYTES(v) __builtin_shufflevector((bytes)(v), (bytes)(v), 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12)
#else
#define LOW_BYTES(v) __builtin_shuffle((bytes)(v), (bytes){0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12})
#endif

INLINE int64_t clip(int64_t i, int64_t count) { return i < 0 ? 0 : i >= count ? count - 1 : i; }

INLINE int64_t floor_of(double v) {
    const int64_t i = (int64_t)v;
    return i - (v < (double)i);
}

/* Between b and c, a share t of the way; Pillow's cubic has a slope of (c - a) at b. */
INLINE pixel cubic(pixel a, pixel b, pixel c, pixel d, double t) {
    return b + t * ((c - a) + t * ((2 * (a - b) + c - d) + t * (b - a - c + d)));
}

/* The same of whole numbers, along a line of the image. */
INLINE pixel along(const pixel *line, const int64_t *at, double t) {
    if (t == 0) return line[at[1]];
    const pixel a = line[at[0]], b = line[at[1]], c = line[at[2]], d = line[at[3]], fall = a - b, both = fall + (c - d);
    return b + t * ((c - a) + t * ((fall + both) - t * both));
}

/* image, out [height, width, 4]; the output's pixel (x, y) is the image's at (m0 x + m1 y + m2, m3 x + m4 y + m5), both
 * from their centres, and `fill` where that lies outside. Returns 0, or 1 without memory. */
int warp(const uint8_t *image, int64_t height, int64_t width, const double *m, const uint8_t *fill, uint8_t *out) {
    pixel *wide = aligned_alloc(64, (size_t)(height * width * (int64_t)sizeof(pixel) + 63) / 64 * 64);
    if (!wide) return 1;
    for (int64_t i = 0; i < 4 * height * width; i++) ((double *)wide)[i] = image[i];
    for (int64_t row = 0; row < height; row++)
        for (int64_t column = 0; column < width; column++, out += 4) {
            double x = m[0] * ((double)column + 0.5) + m[1] * ((double)row + 0.5) + m[2];
            double y = m[3] * ((double)column + 0.5) + m[4] * ((double)row + 0.5) + m[5];
            if (!(x >= 0 && x < (double)width && y >= 0 && y < (double)height)) {
                memcpy(out, fill, 4);
                continue;
            }
            x -= 0.5, y -= 0.5;
            const int64_t left = floor_of(x), top = floor_of(y);
            const double dx = x - (double)left, dy = y - (double)top;
            int64_t columns[4] = {left - 1, left, left + 1, left + 2}, rows[4] = {top - 1, top, top + 1, top + 2};
            if (left < 1 || left + 2 >= width || top < 1 || top + 2 >= height) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) columns[i] = clip(columns[i], width), rows[i] = clip(rows[i], height);
            }
            pixel value = along(wide + rows[1] * width, columns, dx);
            if (dy != 0)
                value = cubic(along(wide + rows[0] * width, columns, dx), value, along(wide + rows[2] * width, columns, dx),
                              along(wide + rows[3] * width, columns, dx), dy);
            const words whole = __builtin_convertvector(value, words), low = whole & (whole > 0), over = low > 255;
            const bytes cut = LOW_BYTES((over & 255) | (~over & low)); /* towards zero, as Pillow does */
            memcpy(out, &cut, 4);
        }
    free(wide);
    return 0;
}
