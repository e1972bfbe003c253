/* Squares of per-sample products, fused: the product of a sample's rows never leaves the registers.
 *
 *   total[i][j] += sum_b ( sum_{t in sample b} left[t][i] * right[t][j] )^2
 *
 * and, where only a sample's sum over i and j is wanted, by its Gram matrices, half of each. Beside them norms.h,
 * softmax.h and attention.h.
 *
 * Plain C with vector types of GCC and Clang, no intrinsics but in squares_amx.h, for processors that have such units;
 * built by build.py for the machine at hand.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define MR 12
#define GR 5
#elif defined(__AVX__)
#define LANES 8
#define MR 6
#define GR 3
#else
#define LANES 4
#define MR 6
#define GR 3
#endif
#define NR (2 * LANES)

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));

/* One register tile: MR x NR products over `depth` rows. left is packed [depth][MR], right [depth][NR]. */
static inline __attribute__((always_inline)) void tile(int64_t depth, const float *restrict left, const float *restrict right,
                        vec acc[MR][2]) {
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) acc[i][0] = acc[i][1] = (vec){0};
  for (int64_t k = 0; k < depth; k++, left += MR, right += NR) {
    const vec r0 = *(const vec *)right, r1 = *(const vec *)(right + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      acc[i][0] += left[i] * r0;
      acc[i][1] += left[i] * r1;
    }
  }
}

/* Columns c0 .. c0+width of the rows of one sample, in panels of `panel` columns, zero-padded: [panels][depth][panel]. */
static inline __attribute__((always_inline)) void pack(const float *x, int64_t stride, const int64_t *rows, int64_t depth,
                                                       int64_t c0, int64_t width, int panel, float *out) {
  for (int64_t p = 0; p < width; p += panel) {
    const int64_t w = width - p < panel ? width - p : panel;
    const float *from = x + c0 + p;
    if (w == panel) /* a copy of constant size is a few moves */
      for (int64_t k = 0; k < depth; k++, out += panel) memcpy(out, from + rows[k] * stride, panel * sizeof(float));
    else
      for (int64_t k = 0; k < depth; k++, out += panel) {
        memset(out, 0, panel * sizeof(float));
        memcpy(out, from + rows[k] * stride, w * sizeof(float));
      }
  }
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static int64_t most_rows(const int64_t *offsets, int64_t samples) {
  int64_t most = 0;
  for (int64_t b = 0; b < samples; b++) most = offsets[b + 1] - offsets[b] > most ? offsets[b + 1] - offsets[b] : most;
  return most;
}

/* total [m][n] (row stride n) or NULL; sums [samples] float64 or NULL; offsets [samples + 1] into rows. Returns 0, or 1
 * where memory ran out. */
int square_accumulate(float *total, double *sums, const float *left, int64_t left_stride, const float *right,
                      int64_t right_stride, const int64_t *rows, const int64_t *offsets, int64_t samples, int64_t m, int64_t n,
                      int threads) {
  const int64_t deepest = most_rows(offsets, samples);
  if (deepest == 0 || n == 0) return 0;
  const int64_t nc = least(padded(n, NR), 12 * NR);
  int64_t mc = 16 * MR;
  while (mc > 2 * MR && ((m + mc - 1) / mc) * ((n + nc - 1) / nc) < 4 * threads) mc -= 2 * MR;
  const int64_t mblocks = (m + mc - 1) / mc, blocks = mblocks * ((n + nc - 1) / nc);
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    float *packed_right = aligned_alloc(64, padded(deepest * nc * 4, 64)), *packed_left = aligned_alloc(64, padded(deepest * mc * 4, 64));
    if (!packed_right || !packed_left) failed = 1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t block = 0; block < blocks; block++) {
      if (failed) continue;
      const int64_t i0 = block % mblocks * mc, j0 = block / mblocks * nc;
      const int64_t height = least(mc, m - i0), width = least(nc, n - j0);
      for (int64_t b = 0; b < samples; b++) {
        const int64_t depth = offsets[b + 1] - offsets[b];
        if (depth == 0) continue;
        pack(right, right_stride, rows + offsets[b], depth, j0, width, NR, packed_right);
        pack(left, left_stride, rows + offsets[b], depth, i0, height, MR, packed_left);
        vec sum = {0};
        for (int64_t j = 0; j < width; j += NR) {
          for (int64_t i = 0; i < height; i += MR) {
            vec acc[MR][2];
            tile(depth, packed_left + i * depth, packed_right + j * depth, acc);
#pragma GCC unroll 16
            for (int r = 0; r < MR; r++) { acc[r][0] *= acc[r][0]; acc[r][1] *= acc[r][1]; }
            if (sums)
#pragma GCC unroll 16
              for (int r = 0; r < MR; r++) sum += acc[r][0] + acc[r][1];
            if (!total) continue;
            float *out = total + (i0 + i) * n + j0 + j;
            if (height - i >= MR && width - j >= NR) {
#pragma GCC unroll 16
              for (int r = 0; r < MR; r++) {
                *(vec *)(out + r * n) += acc[r][0];
                *(vec *)(out + r * n + LANES) += acc[r][1];
              }
            } else {
              float spill[MR][NR];
#pragma GCC unroll 16
              for (int r = 0; r < MR; r++) { *(vec *)spill[r] = acc[r][0]; *(vec *)(spill[r] + LANES) = acc[r][1]; }
              for (int64_t r = 0; r < least(MR, height - i); r++)
                for (int64_t c = 0; c < least(NR, width - j); c++) out[r * n + c] += spill[r][c];
            }
          }
        }
        if (sums) {
          double whole = 0;
          for (int l = 0; l < LANES; l++) whole += sum[l];
#pragma omp atomic
          sums[b] += whole;
        }
      }
    }
    free(packed_right);
    free(packed_left);
  }
  return failed;
}

static inline __attribute__((always_inline)) float sum_of_lanes(vec v) {
  typedef float four __attribute__((vector_size(16)));
#if LANES == 16
  typedef float eight __attribute__((vector_size(32)));
  const union { vec whole; eight part[2]; } first = {v};
  const union { eight whole; four part[2]; } second = {first.part[0] + first.part[1]};
  const four x = second.part[0] + second.part[1];
#elif LANES == 8
  const union { vec whole; four part[2]; } second = {v};
  const four x = second.part[0] + second.part[1];
#else
  const four x = v;
#endif
  return (x[0] + x[2]) + (x[1] + x[3]);
}

/* out[i][j] = a[i] . b[j], over `width` elements. */
static inline __attribute__((always_inline)) void dots(int64_t width, const float *const a[GR], const float *const b[GR],
                                                       float out[GR][GR]) {
  vec acc[GR][GR], right[GR];
#pragma GCC unroll 8
  for (int i = 0; i < GR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < GR; j++) acc[i][j] = (vec){0};
  int64_t k = 0;
  for (; k + LANES <= width; k += LANES) {
#pragma GCC unroll 8
    for (int j = 0; j < GR; j++) right[j] = *(const vec *)(b[j] + k);
#pragma GCC unroll 8
    for (int i = 0; i < GR; i++) {
      const vec left = *(const vec *)(a[i] + k);
#pragma GCC unroll 8
      for (int j = 0; j < GR; j++) acc[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < GR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < GR; j++) {
      out[i][j] = sum_of_lanes(acc[i][j]);
      for (int64_t q = k; q < width; q++) out[i][j] += a[i][q] * b[j][q];
    }
}

#define GBLOCK (4 * GR)

/* sums[b] += sum over rows t, u of sample b of (left[t] . left[u]) (right[t] . right[u]); sizes[b] += the same of the terms'
 * sizes. Each pair of rows is met once. */
void gram_sums(double *sums, double *sizes, const float *left, int64_t left_stride, const float *right, int64_t right_stride,
               const int64_t *rows, const int64_t *offsets, int64_t samples, int64_t m, int64_t n, int threads) {
  const int64_t deepest = most_rows(offsets, samples);
  const int64_t blocks = (deepest + GBLOCK - 1) / GBLOCK;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < samples * blocks; task++) {
    const int64_t b = task / blocks, begin = task % blocks * GBLOCK, depth = offsets[b + 1] - offsets[b];
    const int64_t *own = rows + offsets[b];
    const int64_t end = least(begin + GBLOCK, depth);
    double whole = 0, size = 0;
    for (int64_t j0 = begin; j0 < depth; j0 += GR)
      for (int64_t i0 = begin; i0 < end && i0 <= j0; i0 += GR) {
        const float *a[GR], *c[GR];
        float of_left[GR][GR], of_right[GR][GR];
        for (int r = 0; r < GR; r++) { /* past the end the last row stands in, and does not count */
          a[r] = left + own[least(i0 + r, depth - 1)] * left_stride;
          c[r] = left + own[least(j0 + r, depth - 1)] * left_stride;
        }
        dots(m, a, c, of_left);
        for (int r = 0; r < GR; r++) {
          a[r] = right + own[least(i0 + r, depth - 1)] * right_stride;
          c[r] = right + own[least(j0 + r, depth - 1)] * right_stride;
        }
        dots(n, a, c, of_right);
        double part = 0, of_part = 0;
        if (j0 > i0 && j0 + GR <= depth) {
          for (int i = 0; i < GR; i++) {
            double line = 0, of_line = 0;
            for (int j = 0; j < GR; j++) {
              const double term = (double)of_left[i][j] * of_right[i][j];
              line += term;
              of_line += __builtin_fabs(term);
            }
            part += 2 * line;
            of_part += 2 * of_line;
          }
        } else
          for (int i = 0; i < GR && i0 + i < depth; i++)
            for (int j = 0; j < GR && j0 + j < depth; j++) {
              const int weight = j0 + j > i0 + i ? 2 : j0 + j == i0 + i;
              const double term = weight * (double)of_left[i][j] * of_right[i][j];
              part += term;
              of_part += __builtin_fabs(term);
            }
        whole += part;
        size += of_part;
      }
#pragma omp atomic
    sums[b] += whole;
#pragma omp atomic
    sizes[b] += size;
  }
}

#include "norms.h"
#include "softmax.h"
#include "attention.h"

/* Clang once named the first two without the second line. */
#if !defined(WITHOUT_AMX) && defined(__linux__) && (defined(__AMX_TILE__) || defined(__AMXTILE__)) && \
    (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include "amx.h"
#include "products_amx.h"
#include "squares_amx.h"
int has_amx(void) { return amx_allowed(); }
#else
int has_amx(void) { return 0; }
#endif
