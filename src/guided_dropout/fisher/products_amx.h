/* out = x W + bias in AMX, for matrices of float32: linear layers' outputs, and their inputs' gradients.
 *
 * Of a part of the rows, of the columns and of the depth at a time both matrices are packed by all threads, and then
 * multiplied in many small tasks: on shared machines one processor may have a third of another's speed.
 */

#define MOST_CHUNKS 16   /* of a part of the depth */
#define PACKED (2 << 20) /* bytes of a part of the rows, and of the columns */
#define TASK_DOWN 16     /* panels of rows of a task */
#define TASK_ACROSS 24   /* and of columns; fewer where there would be few tasks for a thread */
#define TASKS 4

struct matrix { /* x [rows][depth], or W [depth][width], or, turned, W [width][depth] */
  const float *at;
  int64_t stride, rows, columns;
  const int64_t *listed; /* which rows, where it is not all of them */
};

/* A panel of 16 rows, `chunks` of the columns from `column` on; numbers k and k + 16 of a chunk are pairs. Zero beyond the
 * matrix. */
static inline __attribute__((always_inline)) void pack_rows(const struct matrix *x, int64_t panel, int64_t column,
                                                            int64_t chunks, const int turned, __m512i *out) {
  const int64_t row = panel * SIDE, there = x->rows - row;
  const float *from[16];
  for (int i = 0; i < 16; i++)
    from[i] = i < there ? x->at + (x->listed ? x->listed[row + i] : row + i) * x->stride : NULL;
  for (int64_t k = column; k < column + chunks * DEEP; k += DEEP, out += 32) {
    const __mmask16 low = first_of(x->columns - k), high = first_of(x->columns - k - 16);
    __m512i first[16], second[16];
    if (there >= 16 && high == 0xffff)
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        pairs(_mm512_loadu_ps(from[i] + k), _mm512_loadu_ps(from[i] + k + 16), first + i, second + i);
    else
      for (int i = 0; i < 16; i++) {
        const int within = i < there;
        pairs(within ? _mm512_maskz_loadu_ps(low, from[i] + k) : _mm512_setzero_ps(),
              within && high ? _mm512_maskz_loadu_ps(high, from[i] + k + 16) : _mm512_setzero_ps(), first + i, second + i);
      }
    if (turned) {
      transpose(first);
      transpose(second);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) out[i] = first[i];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) out[16 + i] = second[i];
  }
}

/* A panel of 16 columns, `chunks` of the rows from `row` on, in the same pairs. */
static inline __attribute__((always_inline)) void pack_columns(const struct matrix *w, int64_t panel, int64_t row,
                                                               int64_t chunks, __m512i *out) {
  const __mmask16 within = first_of(w->columns - panel * SIDE);
  for (int64_t k = row; k < row + chunks * DEEP; k += DEEP, out += 32) {
    const float *from = w->at + k * w->stride + panel * SIDE, *other = from + 16 * w->stride;
    const int64_t there = w->rows - k;
    for (int i = 0; i < 16; i++, from += w->stride, other += w->stride)
      pairs(i < there ? _mm512_maskz_loadu_ps(within, from) : _mm512_setzero_ps(),
            i + 16 < there ? _mm512_maskz_loadu_ps(within, other) : _mm512_setzero_ps(), out + i, out + 16 + i);
  }
}

static inline __attribute__((always_inline)) void pack_right(const struct matrix *w, int64_t panel, int64_t row, int64_t chunks,
                                                             const int turned, __m512i *out) {
  if (turned) pack_rows(w, panel, row, chunks, 1, out);
  else pack_columns(w, panel, row, chunks, out);
}

/* A tile of products into the rows of out from `row` on, or those listed there, or onto them; `bias` NULL: none. */
static inline __attribute__((always_inline)) void put(const float c[256], float *out, int64_t stride, int64_t row,
                                                      const struct matrix *x, int64_t width, const float *bias, int onto) {
  if (width <= 0) return;
  const __mmask16 within = first_of(width);
  const __m512 start = bias ? _mm512_maskz_loadu_ps(within, bias) : _mm512_setzero_ps();
  for (int r = 0; r < least(16, x->rows - row); r++) {
    float *to = out + (x->listed ? x->listed[row + r] : row + r) * stride;
    const __m512 before = onto ? _mm512_maskz_loadu_ps(within, to) : start;
    _mm512_mask_storeu_ps(to, within, _mm512_load_ps(c + 16 * r) + before);
  }
}

/* out [rows][width]; x [rows][depth] (row stride x_stride); of both the `count` rows that are listed, in ascending order, the
 * others of out becoming zero, or, where `listed` is NULL, all; w [depth][width], or, where `turned`, [width][depth] (row stride
 * w_stride); bias [width] or NULL. Depth 0 is not for it. Returns 0, or 1 where memory ran out. */
int multiply_amx(float *out, const float *x, int64_t x_stride, const float *w, int64_t w_stride, const float *bias,
                 const int64_t *listed, int64_t count, int64_t rows, int64_t depth, int64_t width, int turned, int threads) {
  const struct matrix left = {x, x_stride, listed ? count : rows, depth, listed};
  const struct matrix right = {w, w_stride, turned ? width : depth, turned ? depth : width, NULL};
  const int64_t all_chunks = padded(depth, DEEP) / DEEP, parts = (all_chunks + MOST_CHUNKS - 1) / MOST_CHUNKS;
  const int64_t most_chunks = (all_chunks + parts - 1) / parts, panel_bytes = most_chunks * 2 * 16 * 64;
  const int64_t most = PACKED / panel_bytes / 2 * 2; /* panels of a part */
  const int64_t tall = padded(left.rows, 2 * SIDE) / SIDE, wide = padded(width, 2 * SIDE) / SIDE;
  __m512i *packed_left = aligned_alloc(64, panel_bytes * least(tall, most));
  __m512i *packed_right = aligned_alloc(64, panel_bytes * least(wide, most));
  const int failed = !packed_left || !packed_right;
  if (!failed) {
    if (listed)
      for (int64_t k = 0, next = 0; k <= count; k++) {
        const int64_t end = k < count ? listed[k] : rows;
        memset(out + next * width, 0, (end - next) * width * sizeof(float));
        next = end + 1;
      }
#pragma omp parallel num_threads(threads)
    {
      struct shapes before;
      _tile_storeconfig(&before);
      _tile_loadconfig(&eight_whole_tiles);
      for (int64_t j0 = 0; j0 < wide; j0 += most)
        for (int64_t i0 = 0; i0 < tall; i0 += most)
          for (int64_t k0 = 0; k0 < all_chunks; k0 += most_chunks) {
            const int64_t chunks = least(most_chunks, all_chunks - k0), next = chunks * 2 * 16;
            const int64_t i1 = least(i0 + most, tall), j1 = least(j0 + most, wide);
            const int64_t down = (i1 - i0 + TASK_DOWN - 1) / TASK_DOWN;
            int64_t breadth = TASK_ACROSS;
            while (breadth > 4 && down * ((j1 - j0 + breadth - 1) / breadth) < TASKS * threads) breadth = breadth / 4 * 2;
            const int64_t across = (j1 - j0 + breadth - 1) / breadth;
            if (tall > most || parts > 1 || j0 == 0) /* else it is there */
#pragma omp for schedule(dynamic, 2) nowait
              for (int64_t i = i0; i < i1; i++) pack_rows(&left, i, k0 * DEEP, chunks, 0, packed_left + (i - i0) * next);
            if (down > 1 && (parts > 1 || i0 == 0))
#pragma omp for schedule(dynamic, 2) nowait
              for (int64_t j = j0; j < j1; j++) pack_right(&right, j, k0 * DEEP, chunks, turned, packed_right + (j - j0) * next);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < down * across; task++) {
              const int64_t top = i0 + task % down * TASK_DOWN, bottom = least(top + TASK_DOWN, i1);
              const int64_t first = j0 + task / down * breadth, last = least(first + breadth, j1);
              if (down == 1) /* nobody else needs them */
                for (int64_t j = first; j < last; j++)
                  pack_right(&right, j, k0 * DEEP, chunks, turned, packed_right + (j - j0) * next);
              for (int64_t i = top; i < bottom; i += 2)
                for (int64_t j = first; j < last; j += 2) {
                  float c[4][256] __attribute__((aligned(64)));
                  four_tiles(packed_left + (i - i0) * next, packed_right + (j - j0) * next, chunks, next, 2, c);
                  for (int q = 0; q < 4; q++) {
                    const int64_t z = (j + q % 2) * SIDE;
                    put(c[q], out + z, width, (i + q / 2) * SIDE, &left, width - z, bias ? bias + z : NULL, k0 > 0);
                  }
                }
            }
          }
      if (before.palette) _tile_loadconfig(&before);
      else _tile_release();
    }
  }
  free(packed_left);
  free(packed_right);
  return failed;
}
