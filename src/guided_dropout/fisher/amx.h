/* Float32 in AMX: units that multiply tiles of bfloat16 and add the products up in float32.
 *
 * A float32 between 2^-110 and 3.39e38 is the sum of two bfloat16, to 2^-16 of it; of the four products of pieces the
 * one of the two small ones is left out, so that a product is off by 3 x 2^-16 of the sum of its terms' sizes at most.
 * Matrices that are bfloat16 have one piece, and lose nothing.
 *
 * A panel of 16 columns over 32 rows (a chunk) is one tile of 16 x 16 pairs for each piece, packed [chunk][piece]. The
 * k-th pair of rows in column c lies in line k of a right tile and at place k of line c of a left one; which rows are
 * pairs is all the same where both sides agree.
 */
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 16 /* of a tile */
#define DEEP 32 /* rows of a chunk */

/* Asks the system for the use of tiles by this process. */
static int amx_allowed(void) {
  unsigned long features = 0;
  return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) &&
         !syscall(SYS_arch_prctl, 0x1022 /* ARCH_GET_XCOMP_PERM */, &features) && (features >> 18 & 1);
}

/* A line of a tile for each of two pieces: the pairs (a[i], b[i]). The second piece is what rounding leaves of the first. */
static inline __attribute__((always_inline)) void pairs(__m512 a, __m512 b, __m512i *first, __m512i *second) {
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                       19, 3, 18, 2, 17, 1, 16, 0);
  *first = _mm512_permutexvar_epi16(zip, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  a -= _mm512_castsi512_ps(_mm512_slli_epi32(*first, 16));
  b -= _mm512_castsi512_ps(_mm512_and_si512(*first, _mm512_set1_epi32(0xffff0000)));
  *second = _mm512_permutexvar_epi16(zip, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

/* Of 16 lanes, those below `left`. */
static inline __attribute__((always_inline)) __mmask16 first_of(int64_t left) {
  return left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
}

static inline __attribute__((always_inline)) void transpose(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

/* c = the products of two left panels with two right ones, over the chunks of a sample; `next` panel is so far away. */
static inline __attribute__((always_inline)) void four_tiles(const __m512i *a, const __m512i *b, int64_t chunks, int64_t next,
                                                             const int pieces, float c[4][256]) {
#define LEFT(p) _tile_loadd(4, a + 16 * (p), 64); _tile_loadd(5, a + next + 16 * (p), 64)
#define RIGHT(p) _tile_loadd(6, b + 16 * (p), 64); _tile_loadd(7, b + next + 16 * (p), 64)
#define MULTIPLY _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7)
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < chunks; k++, a += 16 * pieces, b += 16 * pieces) {
    RIGHT(0);
    if (pieces == 2) {
      LEFT(1);
      MULTIPLY;
    }
    LEFT(0);
    MULTIPLY;
    if (pieces == 2) {
      RIGHT(1);
      MULTIPLY;
    }
  }
  _tile_stored(0, c[0], 64);
  _tile_stored(1, c[1], 64);
  _tile_stored(2, c[2], 64);
  _tile_stored(3, c[3], 64);
#undef LEFT
#undef RIGHT
#undef MULTIPLY
}

struct shapes { uint8_t palette, start, unused[14]; uint16_t bytes[16]; uint8_t lines[16]; };

/* Constant: to GCC the instruction that loads it reads 8 bytes, and it leaves out stores to the others. */
static const struct shapes eight_whole_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
