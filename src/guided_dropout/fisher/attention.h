/* Softmax attention, forward and backward, in float32: for each head of each sample, 32 queries at a time.
 *
 * Scores lie there as [key][query], so that a softmax goes down the lanes and a query's sum needs no shuffle. They are
 * formed again in the backward; of the forward a query's largest score and the sum of its exponentials are kept.
 */

#define QUERIES 32 /* at a time */
#if LANES == 16
#define AR 8
#else
#define AR 4
#endif

struct operand { float *at; int64_t sample, head, row; }; /* strides in elements; those of a row lie side by side */

struct attention {
  struct operand q, k, v, out, dq, dk, dv, dout; /* [samples][heads][queries or keys][width] */
  float *kept;          /* [samples][heads][queries][2]: the largest score; 1 / the sum of exponentials, or 0 */
  const float *mask;    /* [masks][blocks of queries][keys][QUERIES], added to the scores; NULL: none */
  const int64_t *spans; /* [masks][blocks of queries][2]: between these keys are those that a block sees */
  int64_t masks, samples, heads, queries, keys, width;
  float scale;
};

/* acc[i] += the sum over k of left[i * row + k * step] * right[k * next ...]: AR rows, two vectors wide. */
static inline __attribute__((always_inline)) void few_rows(int64_t depth, const float *left, int64_t row, int64_t step,
                                                           const float *right, int64_t next, vec acc[AR][2]) {
  for (int64_t k = 0; k < depth; k++, left += step, right += next) {
    const vec r0 = *(const vec *)right, r1 = *(const vec *)(right + LANES);
#pragma GCC unroll 8
    for (int i = 0; i < AR; i++) {
      acc[i][0] += left[i * row] * r0;
      acc[i][1] += left[i * row] * r1;
    }
  }
}

static inline __attribute__((always_inline)) void take_tile(const float *from, int64_t stride, vec acc[AR][2]) {
#pragma GCC unroll 8
  for (int i = 0; i < AR; i++) {
    acc[i][0] = from ? *(const vec *)(from + i * stride) : (vec){0};
    acc[i][1] = from ? *(const vec *)(from + i * stride + LANES) : (vec){0};
  }
}

static inline __attribute__((always_inline)) void put_tile(float *to, int64_t stride, vec acc[AR][2]) {
#pragma GCC unroll 8
  for (int i = 0; i < AR; i++) {
    *(vec *)(to + i * stride) = acc[i][0];
    *(vec *)(to + i * stride + LANES) = acc[i][1];
  }
}

/* out [keys][QUERIES] = left [keys][wide] right [width][QUERIES], for keys `from` to `to` in whole groups. */
static void scores_of(float *out, const float *left, int64_t wide, const float *right, int64_t width, int64_t from, int64_t to) {
  for (int64_t key = from; key < to; key += AR)
    for (int64_t j = 0; j < QUERIES; j += NR) {
      vec acc[AR][2];
      take_tile(NULL, 0, acc);
      few_rows(width, left + key * wide, wide, 1, right + j, QUERIES, acc);
      put_tile(out + key * QUERIES + j, QUERIES, acc);
    }
}

/* out [QUERIES][wide] = the sum over keys `from` to `to` of weights [keys][QUERIES] times rows [keys][wide]. */
static void mixed(float *out, const float *weights, const float *rows, int64_t wide, int64_t from, int64_t to) {
  for (int64_t i = 0; i < QUERIES; i += AR)
    for (int64_t j = 0; j < wide; j += NR) {
      vec acc[AR][2];
      take_tile(NULL, 0, acc);
      few_rows(to - from, weights + from * QUERIES + i, 1, QUERIES, rows + from * wide + j, wide, acc);
      put_tile(out + i * wide + j, wide, acc);
    }
}

/* out [keys][wide] += weights [keys][QUERIES] times rows [QUERIES][wide], for keys `from` to `to` in whole groups. */
static void add_outer(float *out, const float *weights, const float *rows, int64_t wide, int64_t from, int64_t to) {
  for (int64_t key = from; key < to; key += AR)
    for (int64_t j = 0; j < wide; j += NR) {
      vec acc[AR][2];
      take_tile(out + key * wide + j, wide, acc);
      few_rows(QUERIES, weights + key * QUERIES, QUERIES, 1, rows + j, wide, acc);
      put_tile(out + key * wide + j, wide, acc);
    }
}

static float *of_head(const struct operand *o, int64_t sample, int64_t head) {
  return o->at + sample * o->sample + head * o->head;
}

/* Rows [count][width], times `scale`, into [height][wide]; the rest is zero. */
static void gather_rows(float *out, int64_t height, int64_t wide, const float *rows, int64_t stride, int64_t count, int64_t width,
                        float scale) {
  for (int64_t i = 0; i < height; i++, out += wide) {
    const int64_t there = i < count ? width : 0;
    for (int64_t c = 0; c < there; c++) out[c] = rows[i * stride + c] * scale;
    memset(out + there, 0, (wide - there) * sizeof(float));
  }
}

/* Rows [count][width], each times its own of `scales`, or all times `scale`, out of [...][wide]. */
static void scatter_rows(float *out, int64_t stride, const float *rows, int64_t wide, int64_t count, int64_t width,
                         const float *scales, float scale) {
  for (int64_t i = 0; i < count; i++, out += stride, rows += wide) {
    const float by = scales ? scales[i] : scale;
    for (int64_t c = 0; c < width; c++) out[c] = rows[c] * by;
  }
}

/* [QUERIES][wide] → [width][QUERIES] */
static void turn(float *out, const float *rows, int64_t wide, int64_t width) {
  for (int64_t i = 0; i < QUERIES; i += 8)
    for (int64_t c = 0; c < width; c++)
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) out[c * QUERIES + i + k] = rows[(i + k) * wide + c];
}

struct room { /* of a thread; heights are in whole groups, and what a group reads beyond its rows is there */
  float *keys, *values, *dkeys, *dvalues;             /* [keys][wide] */
  float *scores, *dscores;                            /* [keys][QUERIES] */
  float *queries, *dout, *turned, *turned_dout, *sum; /* [QUERIES][wide], or turned */
  void *all;
};

static struct room make_room(int64_t tall, int64_t wide, int backward) {
  struct room r = {0};
  const int64_t of_keys = tall * wide, of_scores = tall * QUERIES, of_queries = QUERIES * wide;
  float **parts[] = {&r.keys, &r.values, &r.dkeys, &r.dvalues, &r.scores, &r.dscores,
                     &r.queries, &r.dout, &r.turned, &r.turned_dout, &r.sum};
  const int64_t sizes[] = {of_keys, of_keys, backward ? of_keys : 0, backward ? of_keys : 0, of_scores, backward ? of_scores : 0,
                           of_queries, of_queries, of_queries, of_queries, of_queries};
  int64_t whole = 0;
  for (int i = 0; i < 11; i++) whole += padded(sizes[i], 16);
  float *at = r.all = aligned_alloc(64, whole * sizeof(float));
  if (!at) return r;
  for (int i = 0; i < 11; at += padded(sizes[i], 16), i++) *parts[i] = at;
  return r;
}

struct seen { const float *mask; int64_t from, to, whole_to; }; /* by a block of queries; whole_to: in whole groups */

static struct seen seen_by(const struct attention *a, int64_t sample, int64_t block) {
  struct seen s = {NULL, 0, a->keys, padded(a->keys, AR)};
  if (a->mask) {
    const int64_t blocks = (a->queries + QUERIES - 1) / QUERIES, at = (a->masks > 1 ? sample : 0) * blocks + block;
    s.mask = a->mask + at * a->keys * QUERIES;
    s.from = a->spans[2 * at] / AR * AR;
    s.to = a->spans[2 * at + 1];
    s.whole_to = padded(s.to, AR);
  }
  return s;
}

/* Scores [keys][QUERIES] → exponentials, or, where `back`, probabilities, by what was kept. */
static void softmax(float *scores, struct seen s, float largest[QUERIES], float over_sum[QUERIES], int back) {
  for (int64_t j = 0; j < QUERIES; j += LANES) {
    const float *mask = s.mask ? s.mask + j : NULL;
    vec most = (vec){0} - __builtin_inff(), sum = {0}, by = {0};
    if (!back) {
      for (int64_t key = s.from; key < s.to; key++) {
        vec *at = (vec *)(scores + key * QUERIES + j);
        if (mask) *at += *(const vec *)(mask + key * QUERIES);
        most = larger(most, *at);
      }
      most = (vec)((ints)most & ~(ints)(most == -__builtin_inff())); /* nothing to attend to */
    } else {
      most = *(vec *)(largest + j);
      by = *(vec *)(over_sum + j);
    }
    for (int64_t key = s.from; key < s.to; key++) {
      vec *at = (vec *)(scores + key * QUERIES + j);
      const vec score = back && mask ? *at + *(const vec *)(mask + key * QUERIES) : *at;
      const vec e = exp_of(score - most);
      *at = back ? e * by : e;
      sum += e;
    }
    for (int64_t key = s.to; key < s.whole_to; key++) *(vec *)(scores + key * QUERIES + j) = (vec){0};
    if (!back) {
      *(vec *)(largest + j) = most;
      *(vec *)(over_sum + j) = (vec)((ints)(1 / sum) & ~(ints)(sum == 0));
    }
  }
}

static void head_forward(const struct attention *a, int64_t sample, int64_t head, struct room r) {
  const int64_t wide = padded(a->width, NR), tall = padded(a->keys, AR);
  gather_rows(r.keys, tall, wide, of_head(&a->k, sample, head), a->k.row, a->keys, a->width, 1);
  gather_rows(r.values, tall, wide, of_head(&a->v, sample, head), a->v.row, a->keys, a->width, 1);
  for (int64_t q = 0; q < a->queries; q += QUERIES) {
    const int64_t count = least(QUERIES, a->queries - q);
    const struct seen s = seen_by(a, sample, q / QUERIES);
    float largest[QUERIES], over_sum[QUERIES], *kept = a->kept + ((sample * a->heads + head) * a->queries + q) * 2;
    gather_rows(r.queries, QUERIES, wide, of_head(&a->q, sample, head) + q * a->q.row, a->q.row, count, a->width, a->scale);
    turn(r.turned, r.queries, wide, a->width);
    scores_of(r.scores, r.keys, wide, r.turned, a->width, s.from, s.whole_to);
    softmax(r.scores, s, largest, over_sum, 0);
    mixed(r.sum, r.scores, r.values, wide, s.from, s.to);
    scatter_rows(of_head(&a->out, sample, head) + q * a->out.row, a->out.row, r.sum, wide, count, a->width, over_sum, 0);
    for (int64_t i = 0; i < count; i++) {
      kept[2 * i] = largest[i];
      kept[2 * i + 1] = over_sum[i];
    }
  }
}

static void head_backward(const struct attention *a, int64_t sample, int64_t head, struct room r) {
  const int64_t wide = padded(a->width, NR), tall = padded(a->keys, AR), width = a->width;
  gather_rows(r.keys, tall, wide, of_head(&a->k, sample, head), a->k.row, a->keys, width, 1);
  gather_rows(r.values, tall, wide, of_head(&a->v, sample, head), a->v.row, a->keys, width, 1);
  memset(r.dkeys, 0, tall * wide * sizeof(float));
  memset(r.dvalues, 0, tall * wide * sizeof(float));
  for (int64_t q = 0; q < a->queries; q += QUERIES) {
    const int64_t count = least(QUERIES, a->queries - q);
    const struct seen s = seen_by(a, sample, q / QUERIES);
    const float *kept = a->kept + ((sample * a->heads + head) * a->queries + q) * 2;
    const float *out = of_head(&a->out, sample, head) + q * a->out.row;
    float largest[QUERIES] = {0}, over_sum[QUERIES] = {0}, common[QUERIES] = {0}; /* zero: a row beyond the last */
    gather_rows(r.queries, QUERIES, wide, of_head(&a->q, sample, head) + q * a->q.row, a->q.row, count, width, a->scale);
    gather_rows(r.dout, QUERIES, wide, of_head(&a->dout, sample, head) + q * a->dout.row, a->dout.row, count, width, 1);
    turn(r.turned, r.queries, wide, width);
    turn(r.turned_dout, r.dout, wide, width);
    for (int64_t i = 0; i < count; i++) {
      vec parts = {0};
      int64_t c = 0;
      for (; c + LANES <= width; c += LANES) parts += *(const vec *)(out + i * a->out.row + c) * *(vec *)(r.dout + i * wide + c);
      common[i] = sum_of_lanes(parts);
      for (; c < width; c++) common[i] += out[i * a->out.row + c] * r.dout[i * wide + c];
      largest[i] = kept[2 * i];
      over_sum[i] = kept[2 * i + 1];
    }
    scores_of(r.scores, r.keys, wide, r.turned, width, s.from, s.whole_to);
    softmax(r.scores, s, largest, over_sum, 1);
    scores_of(r.dscores, r.values, wide, r.turned_dout, width, s.from, s.whole_to);
    for (int64_t key = s.from; key < s.whole_to; key++)
      for (int64_t j = 0; j < QUERIES; j += LANES) {
        vec *at = (vec *)(r.dscores + key * QUERIES + j);
        *at = (*at - *(vec *)(common + j)) * *(vec *)(r.scores + key * QUERIES + j);
      }
    add_outer(r.dvalues, r.scores, r.dout, wide, s.from, s.whole_to);
    add_outer(r.dkeys, r.dscores, r.queries, wide, s.from, s.whole_to);
    mixed(r.sum, r.dscores, r.keys, wide, s.from, s.to);
    scatter_rows(of_head(&a->dq, sample, head) + q * a->dq.row, a->dq.row, r.sum, wide, count, width, NULL, a->scale);
  }
  scatter_rows(of_head(&a->dk, sample, head), a->dk.row, r.dkeys, wide, a->keys, width, NULL, 1);
  scatter_rows(of_head(&a->dv, sample, head), a->dv.row, r.dvalues, wide, a->keys, width, NULL, 1);
}

/* The output and what is kept, or, where `backward`, the three gradients. Returns 0, or 1 where memory ran out. */
int attend(const struct attention *a, int backward, int threads) {
  const int64_t wide = padded(a->width, NR), tall = padded(a->keys, AR);
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    const struct room r = make_room(tall, wide, backward);
    if (!r.all) failed = 1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < a->samples * a->heads; task++) {
      if (failed) continue;
      (backward ? head_backward : head_forward)(a, task / a->heads, task % a->heads, r);
    }
    free(r.all);
  }
  return failed;
}
