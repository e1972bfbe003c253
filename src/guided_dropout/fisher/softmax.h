/* Exponentials, and what a cross-entropy over a vocabulary needs of them. */

typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(4)));

/* exp, for x <= 0 to 2 in 10^7 of itself; below -87 zero. NaN stays. */
static inline __attribute__((always_inline)) vec exp_of(vec x) {
  const vec magic = (vec){0} + 12582912.f; /* to round to whole numbers */
  const ints large = ~(ints)(x < -87.f);   /* or NaN */
  const vec whole = (x * 1.44269504f + magic) - magic;
  const vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const vec power = (vec)((__builtin_convertvector(whole, ints) + 127) << 23);
  return (vec)((ints)(p * power) & large);
}

static inline __attribute__((always_inline)) vec larger(vec a, vec b) {
  const ints which = (ints)(a < b);
  return (vec)(((ints)b & which) | ((ints)a & ~which));
}

#define STRETCH (64 * LANES) /* of a row that is added up by itself, for its digits */

/* Of each row its largest element and the sum of all exponentials above it, out [rows][2]. */
void exponential_sums(float *out, const float *x, int64_t stride, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t row = 0; row < rows; row++) {
    const float *at = x + row * stride;
    const int64_t whole = width / LANES * LANES;
    vec lanes = (vec){0} - __builtin_inff();
    for (int64_t i = 0; i < whole; i += LANES) lanes = larger(lanes, *(const vec *)(at + i));
    float most = -__builtin_inff();
    for (int64_t i = whole; i < width; i++) most = at[i] > most ? at[i] : most;
    for (int l = 0; l < LANES; l++) most = lanes[l] > most ? lanes[l] : most;
    double sum = 0;
    for (int64_t begin = 0; begin < whole; begin += STRETCH) {
      vec part[2] = {{0}, {0}};
      const int64_t end = least(begin + STRETCH, whole);
      int64_t i = begin;
      for (; i + 2 * LANES <= end; i += 2 * LANES) {
        part[0] += exp_of(*(const vec *)(at + i) - most);
        part[1] += exp_of(*(const vec *)(at + i + LANES) - most);
      }
      if (i < end) part[0] += exp_of(*(const vec *)(at + i) - most);
      sum += sum_of_lanes(part[0] + part[1]);
    }
    vec rest = (vec){0} - __builtin_inff();
    for (int64_t i = whole; i < width; i++) rest[i - whole] = at[i] - most;
    out[2 * row] = most;
    out[2 * row + 1] = sum + sum_of_lanes(exp_of(rest));
  }
}

/* x [rows][width] = (exp(x - norms) - 1 at the row's target) times the row's scale, in place. */
void cross_entropy_gradient(float *x, int64_t stride, const float *norms, const float *scales, const int64_t *targets, int64_t rows,
                            int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t row = 0; row < rows; row++) {
    float *at = x + row * stride;
    const float norm = norms[row], scale = scales[row];
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) *(vec *)(at + i) = exp_of(*(const vec *)(at + i) - norm) * scale;
    vec rest = {0};
    memcpy(&rest, at + i, (width - i) * sizeof(float));
    rest = exp_of(rest - norm) * scale;
    memcpy(at + i, &rest, (width - i) * sizeof(float));
    at[targets[row]] -= scale;
  }
}
