/* The same squares on processors with AMX: units that multiply tiles of bfloat16 and add the products up in float32.
 *
 * A float32 between 2^-110 and 3.39e38 is the sum of two bfloat16, to 2^-16 of it; of the four products of pieces the
 * one of the two small ones is left out, so that a product is off by 3 x 2^-16 of the sum of its terms' sizes at most.
 * Matrices that are bfloat16 have one piece, and lose nothing.
 *
 * Packed, a panel of 16 columns over 32 rows of a sample (a chunk) is one tile of 16 x 16 pairs for each piece. The pair
 * of rows 2k, 2k + 1 in column c lies in line k of a right tile and at place k of line c of a left one.
 */
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 16    /* of a tile */
#define DEEP 32    /* rows of a chunk */
#define ACROSS 24  /* right panels of a block: of 128 rows they stay in the second cache with the block's squares */
#define TALLEST 32 /* left panels of a block */
#define DOWN 4     /* left panels at a time: of 128 rows they stay in the first */

/* Asks the system for the use of tiles by this process. */
static int amx_allowed(void) {
  unsigned long features = 0;
  return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) &&
         !syscall(SYS_arch_prctl, 0x1022 /* ARCH_GET_XCOMP_PERM */, &features) && (features >> 18 & 1);
}

/* 16 numbers rounded to bfloat16, in the low halves. */
static inline __attribute__((always_inline)) __m512i rounded(__m512 x) {
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
}

/* What rounding leaves of them. */
static inline __attribute__((always_inline)) __m512 rest(__m512 x) {
  return x - _mm512_castsi512_ps(_mm512_slli_epi32(rounded(x), 16));
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

struct side { /* one of the two matrices, of a sample */
  const void *x;
  const int64_t *rows;
  int64_t stride, width, depth;
};

/* Line i of the tile of a piece: rows 2i and 2i + 1 of 16 columns; zero beyond the matrix. */
static inline __attribute__((always_inline)) __m512i line(const struct side *s, int64_t row, int64_t column, int i,
                                                          const int pieces, const int piece) {
  const int64_t left = s->width - column, t = row + 2 * i;
  const __mmask16 within = left >= SIDE ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
  const __mmask16 even = t < s->depth ? within : 0, odd = t + 1 < s->depth ? within : 0;
  const int64_t first = (even ? s->rows[t] : 0) * s->stride + column;
  const int64_t second = (odd ? s->rows[t + 1] : 0) * s->stride + column;
  __m512i low, high;
  if (pieces == 1) {
    const uint16_t *x = s->x;
    low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, x + first));
    high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, x + second));
  } else {
    const float *x = s->x;
    const __m512 a = _mm512_maskz_loadu_ps(even, x + first), b = _mm512_maskz_loadu_ps(odd, x + second);
    low = rounded(piece ? rest(a) : a);
    high = rounded(piece ? rest(b) : b);
  }
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Panels `from` to `to`: [panel][chunk][piece]. */
static inline __attribute__((always_inline)) void pack_panels(const struct side *s, int64_t from, int64_t to, const int pieces,
                                                              const int turned, __m512i *packed) {
  const int64_t chunks = (s->depth + DEEP - 1) / DEEP;
  for (int64_t k = 0; k < chunks; k++)
    for (int64_t p = from; p < to; p++) {
      __m512i *out = packed + ((p - from) * chunks + k) * pieces * 16;
#pragma GCC unroll 2
      for (int piece = 0; piece < pieces; piece++, out += 16) {
        __m512i tile[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) tile[i] = line(s, k * DEEP, p * SIDE, i, pieces, piece);
        if (turned) transpose(tile);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) out[i] = tile[i];
      }
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

/* The squares of one sample in a block of panels, added to total (from the block's corner on; NULL: not); their sum. */
static inline __attribute__((always_inline)) double block_of(float *total, int64_t n, int64_t height, int64_t width,
                                                             const __m512i *left, const __m512i *right, int64_t chunks,
                                                             const int pieces) {
  const int64_t next = chunks * pieces * 16;
  __m512 sum[4] = {0}; /* not one, for whose last value each addition would wait */
  for (int64_t j = 0; j < width; j += 2 * SIDE)
    for (int64_t i = 0; i < height; i += 2 * SIDE) {
      float c[4][256] __attribute__((aligned(64)));
      four_tiles(left + i / SIDE * next, right + j / SIDE * next, chunks, next, pieces, c);
      for (int q = 0; q < 4; q++) {
        const int64_t y = i + q / 2 * SIDE, x = j + q % 2 * SIDE;
        float *out = total + y * n + x;
        if (!total)
#pragma GCC unroll 16
          for (int r = 0; r < 16; r++) sum[r % 4] += _mm512_load_ps(c[q] + 16 * r) * _mm512_load_ps(c[q] + 16 * r);
        else if (y + SIDE <= height && x + SIDE <= width)
#pragma GCC unroll 16
          for (int r = 0; r < 16; r++, out += n) {
            const __m512 v = _mm512_load_ps(c[q] + 16 * r), square = v * v;
            sum[r % 4] += square;
            _mm512_storeu_ps(out, _mm512_loadu_ps(out) + square);
          }
        else if (x < width) {
          const __mmask16 within = width - x >= SIDE ? 0xffff : (1u << (width - x)) - 1;
          for (int r = 0; r < 16 && y + r < height; r++, out += n) {
            const __m512 v = _mm512_load_ps(c[q] + 16 * r), square = v * v;
            sum[0] += square; /* zero beyond the matrix */
            _mm512_mask_storeu_ps(out, within, _mm512_maskz_loadu_ps(within, out) + square);
          }
        }
      }
    }
  float lanes[16];
  double whole = 0;
  _mm512_storeu_ps(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (int l = 0; l < 16; l++) whole += lanes[l];
  return whole;
}

struct shapes { uint8_t palette, start, unused[14]; uint16_t bytes[16]; uint8_t lines[16]; };

/* Constant: to GCC the instruction that loads it reads 8 bytes, and it leaves out stores to the others. */
static const struct shapes eight_whole_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

struct block { int64_t i0, i1, j0, j1; }; /* left panels i0 to i1 by right ones j0 to j1 */

/* One of them, sample after sample. */
static inline __attribute__((always_inline)) void add_block(float *total, double *sums, struct side l, struct side r,
                                                            const int64_t *rows, const int64_t *offsets, int64_t samples,
                                                            struct block at, const int pieces, __m512i *packed_left,
                                                            __m512i *packed_right) {
  const int64_t m = l.width, n = r.width;
  for (int64_t b = 0; b < samples; b++) {
    l.rows = r.rows = rows + offsets[b];
    l.depth = r.depth = offsets[b + 1] - offsets[b];
    const int64_t chunks = (l.depth + DEEP - 1) / DEEP;
    if (!chunks) continue;
    double whole = 0;
    pack_panels(&r, at.j0, at.j1, pieces, 0, packed_right);
    for (int64_t i = at.i0; i < at.i1; i += DOWN) {
      const int64_t end = least(i + DOWN, at.i1);
      pack_panels(&l, i, end, pieces, 1, packed_left);
      whole += block_of(total ? total + i * SIDE * n + at.j0 * SIDE : NULL, n, least(end * SIDE, m) - i * SIDE,
                        least(at.j1 * SIDE, n) - at.j0 * SIDE, packed_left, packed_right, chunks, pieces);
    }
    if (sums)
#pragma omp atomic
      sums[b] += whole;
  }
}

/* As square_accumulate, of matrices both float32, or both bfloat16 (half); once has_amx was asked. */
int square_accumulate_amx(float *total, double *sums, const void *left, int64_t left_stride, const void *right,
                          int64_t right_stride, const int64_t *rows, const int64_t *offsets, int64_t samples, int64_t m,
                          int64_t n, int threads, int half) {
  const struct side l = {left, NULL, left_stride, m, 0}, r = {right, NULL, right_stride, n, 0};
  const int64_t tall = padded(m, 2 * SIDE) / SIDE, wide = padded(n, 2 * SIDE) / SIDE;
  int64_t across = ACROSS; /* less only where there would be fewer blocks than threads; even */
  while (across > ACROSS / 4 && (tall + DOWN - 1) / DOWN * ((wide + across - 1) / across) < threads) across /= 2;
  const int64_t columns = (wide + across - 1) / across;
  const int64_t deepest = most_rows(offsets, samples);
  if (deepest == 0 || m == 0 || n == 0) return 0;
  /* Each block packs its panels itself, so that they are few; but one for each thread. */
  const int64_t height = least(padded((tall * columns + threads - 1) / threads, DOWN), TALLEST);
  const int64_t blocks_down = (tall + height - 1) / height, chunk = padded(deepest, DEEP) / DEEP * (half ? 1 : 2) * 16 * 64;
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    struct shapes before;
    _tile_storeconfig(&before);
    _tile_loadconfig(&eight_whole_tiles);
    __m512i *packed_left = aligned_alloc(64, chunk * DOWN), *packed_right = aligned_alloc(64, chunk * least(wide, across));
    if (!packed_left || !packed_right) failed = 1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks_down * columns; block++) {
      if (failed) continue;
      const int64_t i = block % blocks_down * height, j = block / blocks_down * across;
      const struct block at = {i, least(i + height, tall), j, least(j + across, wide)};
      if (half) add_block(total, sums, l, r, rows, offsets, samples, at, 1, packed_left, packed_right);
      else add_block(total, sums, l, r, rows, offsets, samples, at, 2, packed_left, packed_right);
    }
    free(packed_left);
    free(packed_right);
    if (before.palette) _tile_loadconfig(&before);
    else _tile_release();
  }
  return failed;
}
