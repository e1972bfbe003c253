/* Per-sample gradients of a layer norm's or RMS norm's weight and bias, without the normalised rows in memory. */

#define NORM_TILE 4   /* vectors of columns at a time */
#define NORM_ROWS 32  /* added up by themselves, for their digits */

/* The rows' means (0 unless centred) and 1 / their deviations, out [count][2]. */
static void norm_statistics(float *out, const float *x, int64_t stride, const int64_t *rows, int64_t count, int64_t width, float eps,
                            int centred, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < count; k++) {
    const float *at = x + rows[k] * stride;
    const int64_t whole = width / LANES * LANES;
    float mean = 0;
    if (centred) {
      vec sum = {0};
      for (int64_t c = 0; c < whole; c += LANES) sum += *(const vec *)(at + c);
      mean = sum_of_lanes(sum);
      for (int64_t c = whole; c < width; c++) mean += at[c];
      mean /= width;
    }
    vec squares = {0};
    for (int64_t c = 0; c < whole; c += LANES) {
      const vec d = *(const vec *)(at + c) - mean;
      squares += d * d;
    }
    float variance = sum_of_lanes(squares);
    for (int64_t c = whole; c < width; c++) variance += (at[c] - mean) * (at[c] - mean);
    out[2 * k] = mean;
    out[2 * k + 1] = 1 / __builtin_sqrtf(variance / width + eps);
  }
}

/* weight [samples][width]: each sample's sum of g times the normalised x; bias [samples][width] or NULL: of g. `rows` and
 * `offsets` as in square_accumulate; room [offsets[samples]][2]. */
void norm_sums(float *weight, float *bias, float *room, const float *g, int64_t g_stride, const float *x, int64_t x_stride,
               const int64_t *rows, const int64_t *offsets, int64_t samples, int64_t width, float eps, int centred, int threads) {
  const int64_t across = (width + NORM_TILE * LANES - 1) / (NORM_TILE * LANES);
  norm_statistics(room, x, x_stride, rows, offsets[samples], width, eps, centred, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < samples * across; task++) {
    const int64_t b = task / across, first = task % across * NORM_TILE * LANES, there = least(width - first, NORM_TILE * LANES);
    vec of_weight[NORM_TILE] = {{0}}, of_bias[NORM_TILE] = {{0}};
    for (int64_t begin = offsets[b]; begin < offsets[b + 1]; begin += NORM_ROWS) {
      vec w[NORM_TILE] = {{0}}, s[NORM_TILE] = {{0}};
      for (int64_t k = begin; k < least(begin + NORM_ROWS, offsets[b + 1]); k++) {
        const float *from_g = g + rows[k] * g_stride + first, *from_x = x + rows[k] * x_stride + first;
        float edge[2][NORM_TILE * LANES];
        if (there < NORM_TILE * LANES) {
          memset(edge, 0, sizeof edge);
          memcpy(edge[0], from_g, there * sizeof(float));
          memcpy(edge[1], from_x, there * sizeof(float));
          from_g = edge[0];
          from_x = edge[1];
        }
#pragma GCC unroll 4
        for (int i = 0; i < NORM_TILE; i++) {
          const vec own = *(const vec *)(from_g + i * LANES);
          w[i] += own * ((*(const vec *)(from_x + i * LANES) - room[2 * k]) * room[2 * k + 1]);
          s[i] += own;
        }
      }
      for (int i = 0; i < NORM_TILE; i++) {
        of_weight[i] += w[i];
        of_bias[i] += s[i];
      }
    }
    memcpy(weight + b * width + first, of_weight, there * sizeof(float));
    if (bias) memcpy(bias + b * width + first, of_bias, there * sizeof(float));
  }
}
