/* Squares of per-sample products, fused: the product of a sample's rows never leaves the registers.
 *
 *   total[i][j] += sum_b ( sum_{t in sample b} left[t][i] * right[t][j] )^2
 *
 * Plain C with vector types of GCC and Clang, no intrinsics; built by kernels.py for the machine at hand.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define MR 12
#elif defined(__AVX__)
#define LANES 8
#define MR 6
#else
#define LANES 4
#define MR 6
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

/* total [m][n] (row stride n) or NULL; sums [samples] float64 or NULL; offsets [samples + 1] into rows. Returns 0, or 1
 * where memory ran out. */
int square_accumulate(float *total, double *sums, const float *left, int64_t left_stride, const float *right,
                      int64_t right_stride, const int64_t *rows, const int64_t *offsets, int64_t samples, int64_t m, int64_t n,
                      int threads) {
  int64_t deepest = 0;
  for (int64_t b = 0; b < samples; b++) deepest = offsets[b + 1] - offsets[b] > deepest ? offsets[b + 1] - offsets[b] : deepest;
  if (deepest == 0) return 0;
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
