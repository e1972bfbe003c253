/* The same squares in AMX: each block packs its panels itself, sample after sample. */

#define ACROSS 24  /* right panels of a block: of 128 rows they stay in the second cache with the block's squares */
#define TALLEST 32 /* left panels of a block */
#define DOWN 4     /* left panels at a time: of 128 rows they stay in the first */

struct side { /* one of the two matrices, of a sample */
  const void *x;
  const int64_t *rows;
  int64_t stride, width, depth;
};

/* Panels `from` to `to` of a sample; rows 2k and 2k + 1 are pairs. Zero beyond the matrix and the sample. */
static inline __attribute__((always_inline)) void pack_panels(const struct side *s, int64_t from, int64_t to, const int pieces,
                                                              const int turned, __m512i *packed) {
  const int64_t chunks = (s->depth + DEEP - 1) / DEEP;
  for (int64_t k = 0; k < chunks; k++)
    for (int64_t p = from; p < to; p++) {
      __m512i *out = packed + ((p - from) * chunks + k) * pieces * 16, first[16], second[16];
      const int64_t column = p * SIDE;
      const __mmask16 within = first_of(s->width - column);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const int64_t t = k * DEEP + 2 * i;
        const __mmask16 even = t < s->depth ? within : 0, odd = t + 1 < s->depth ? within : 0;
        const int64_t a = (even ? s->rows[t] : 0) * s->stride + column, b = (odd ? s->rows[t + 1] : 0) * s->stride + column;
        if (pieces == 1) {
          const uint16_t *x = s->x;
          first[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, x + a)),
                                     _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, x + b)), 16));
        } else {
          const float *x = s->x;
          pairs(_mm512_maskz_loadu_ps(even, x + a), _mm512_maskz_loadu_ps(odd, x + b), first + i, second + i);
        }
      }
      if (turned) transpose(first);
      if (turned && pieces == 2) transpose(second);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) out[i] = first[i];
      if (pieces == 2)
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) out[16 + i] = second[i];
    }
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
          const __mmask16 within = first_of(width - x);
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
