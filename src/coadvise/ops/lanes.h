/* Vectors of floats, and how they lie in memory as float32 or bfloat16; for every kernel here. */
#include <stdint.h>

#ifndef LANES /* a kernel may ask for what fits a register: GCC keeps longer ones in memory */
#define LANES 16
#endif
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* LANES values of bfloat16 to float32, and back: to nearest, ties to even; a NaN must not round to infinity. */
INLINE vec widened(const uint16_t *from) { return (vec)(__builtin_convertvector(*(const halves *)from, words) << 16); }

#if LANES == 16 && defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>
/* The instruction takes subnormals for zero. */
INLINE void narrow_to(uint16_t *to, vec value) { *(halves *)to = (halves)_mm512_cvtneps_pbh((__m512)value); }
#else
INLINE void narrow_to(uint16_t *to, vec value) {
    const words bits = (words)value, nan = (words)((bits & 0x7fffffff) > 0x7f800000);
    const words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    *(halves *)to = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), halves);
}
#endif
