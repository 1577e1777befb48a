// Logits of tiles, their softmax and its gradient, the output of a block. A part of
// group_attention.h, which includes it once for each instruction set.

// Products of queries and keys or, for DS, of gradients and values.
template <Product HOW, int D>
template <int COLUMNS, Result RESULT>
void Kernel<HOW, D>::multiply_tile(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first,
                                   int64_t key) const {
  constexpr bool HAS_BIAS = RESULT != DS && !PAIRS;  // for which queries are scaled
  if (HAS_BIAS)
    UNROLL for (int i = 0; i < ROWS; i++)
      UNROLL for (int j = 0; j < COLUMNS; j++)
        x[i][j] = load(bias[i0 + i] + first + key + j * LANES);
  multiply<HOW, COLUMNS>(x, (RESULT == DS ? grads : queries) + i0 * words(), words(), 1,
                         (RESULT == DS ? value_panels : key_panels) + (first + key) * words(),
                         TILE, depth(dim()), !HAS_BIAS);
}

// Logits, times log2(e), or weights: in the forward pass (without row_max) as operands of products,
// with their sums by lane; in the backward pass with the pairs of two rows. Keys after the last of
// `count` have no weight.
template <Product HOW, int D>
template <int COLUMNS, Result RESULT>
void Kernel<HOW, D>::give_weights_tile(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first,
                                       int64_t key, int64_t count) {
  if (RESULT == LOGITS || count - key >= COLUMNS * LANES)
    give_weights_rows<COLUMNS, RESULT, true>(x, i0, first, key, count);
  else
    give_weights_rows<COLUMNS, RESULT, false>(x, i0, first, key, count);
}

// Addresses are taken first: a compiler would reload them after each store.
template <Product HOW, int D>
template <int COLUMNS, Result RESULT, bool IS_WHOLE>
void Kernel<HOW, D>::give_weights_rows(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first,
                                       int64_t key, int64_t count) {
  const vec scale = all(call.scale * LOG2_E);
  const float *const *const biases = bias + i0;
  float *const total = totals + i0 * LANES, *const to = weights, *const words = given();
  const int64_t queries_left = queries_here - i0, at_bias = first + key, at = i0 * KEYS + key;
  UNROLL for (int i = 0; i < ROWS; i += 2) {
    if (RESULT == P && i >= queries_left) return;
    vec y[2][COLUMNS];
    UNROLL for (int row = 0; row < 2; row++) {
      const float *const here = biases[i + row] + at_bias;
      UNROLL for (int j = 0; j < COLUMNS; j++) {
        vec &one = y[row][j] = x[i + row][j];
        if (PAIRS) one = one * scale + load(here + j * LANES);
        if (RESULT == LOGITS) continue;
        if (RESULT == P) one = weight(one);
        else one = exp2<PAIRS ? ROUGH : OF_FLOATS>(one - all(row_max[i0 + i + row]));
        if (!IS_WHOLE) one = first_lanes(count - key - j * LANES, one, vec{});
      }
    }
    UNROLL for (int row = 0; row < 2; row++) {
      if (RESULT == P) {
        const vec second = COLUMNS > 1 ? y[row][COLUMNS - 1] : vec{};
        float *sum = total + (i + row) * LANES;
        store(sum, load(sum) + (y[row][0] + second));
        give_weights(words, at + (i + row) * KEYS, y[row][0], second);
      } else {
        UNROLL for (int j = 0; j < COLUMNS; j++)
          store(to + at + (i + row) * KEYS + j * LANES, y[row][j]);
      }
    }
    if constexpr (PAIRS && RESULT == P_AND_P_PAIRS)
      UNROLL for (int j = 0; j < COLUMNS; j++)
        store(weight_pairs + (i0 + i) / 2 * KEYS + key + j * LANES,
              side_by_side(round_both(y[0][j], y[1][j])));
  }
}

// Gradients of logits: weight * (gradient of the weight - their mean).
template <Product HOW, int D>
template <int COLUMNS>
void Kernel<HOW, D>::give_ds_tile(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first, int64_t key) {
  UNROLL for (int i = 0; i < ROWS; i += 2) {
    const int64_t at = (i0 + i) * KEYS + key;
    vec y[2][COLUMNS];
    UNROLL for (int row = 0; row < 2; row++) {
      float *to = grad_bias[i0 + i + row] + first + key;
      const vec mean = all(totals[i0 + i + row]);
      UNROLL for (int j = 0; j < COLUMNS; j++) {
        const int64_t here = at + row * KEYS + j * LANES;
        y[row][j] = load(weights + here) * (x[i + row][j] - mean);
        store(to + j * LANES, load(to + j * LANES) + y[row][j]);
        if constexpr (!PAIRS) store(ds + here, y[row][j]);
      }
    }
    if constexpr (PAIRS)
      UNROLL for (int j = 0; j < COLUMNS; j++) {
        const vec both = round_both(y[0][j], y[1][j]);
        halves rows[2];
        std::memcpy(rows, &both, sizeof both);
        store_halves(ds_words, at + j * LANES, rows[0]);
        store_halves(ds_words, at + KEYS + j * LANES, rows[1]);
        store(ds_pairs + (i0 + i) / 2 * KEYS + key + j * LANES, side_by_side(both));
      }
  }
}

template <Product HOW, int D>
template <int COLUMNS, Result RESULT>
void Kernel<HOW, D>::give_tile(vec (&x)[ROWS][COLUMNS], int64_t i, int64_t first, int64_t key,
                               int64_t count) {
  if constexpr (RESULT == DS) give_ds_tile<COLUMNS>(x, i, first, key);
  else give_weights_tile<COLUMNS, RESULT>(x, i, first, key, count);
}

// Not inlined, so that the sums have all registers.
template <Product HOW, int D>
template <int COLUMNS, Result RESULT>
void Kernel<HOW, D>::tile(int64_t i, int64_t first, int64_t key, int64_t count) {
  vec x[ROWS][COLUMNS];
  multiply_tile<COLUMNS, RESULT>(x, i, first, key);
  give_tile<COLUMNS, RESULT>(x, i, first, key, count);
}

// Tiles of the `count` keys from `first` on.
template <Product HOW, int D>
template <Result RESULT>
void Kernel<HOW, D>::tiles(int64_t first, int64_t count) {
  if constexpr (TILES) return tiles_in_turn<RESULT>(first, count);
  for (int64_t key = 0; key < count; key += TILE)
    for (int64_t i = 0; i < query_rows; i += ROWS)
      count - key > LANES ? tile<2, RESULT>(i, first, key, count)
                          : tile<1, RESULT>(i, first, key, count);
}

// The product of a tile overlaps with the softmax of the one before.
template <Product HOW, int D>
template <Result RESULT>
void Kernel<HOW, D>::tiles_in_turn(int64_t first, int64_t count) {
  vec x[2][ROWS][2];
  const int64_t down = query_rows / ROWS, number = (count + TILE - 1) / TILE * down;
  for (int64_t n = 0; n <= number; n++) {
    const int64_t last = n - 1;
    if (n < number) multiply_tile<2, RESULT>(x[n % 2], n % down * ROWS, first, n / down * TILE);
    if (n > 0)
      give_tile<2, RESULT>(x[last % 2], last % down * ROWS, first, last / down * TILE, count);
  }
}

// The largest logit of a query.
template <Product HOW, int D>
float Kernel<HOW, D>::largest_logit(int64_t i, int64_t many) {
  float *row = weights + i * KEYS;
  vec max0 = all(-INFINITY), max1 = max0;
  if (many % LANES) {
    float *at = row + many / LANES * LANES;
    store(at, first_lanes(many % LANES, load(at), max0));  // no weight behind the last
  }
  int64_t key = 0;
  for (; key + LANES < many; key += TILE) {
    max0 = larger(load(row + key), max0);
    max1 = larger(load(row + key + LANES), max1);
  }
  if (key < many) max0 = larger(load(row + key), max0);
  return largest_of(larger(max0, max1));
}

// Updates `row_max` with these logits; `factors` rescale earlier sums to it. Rows are independent.
template <Product HOW, int D>
void Kernel<HOW, D>::update_row_max(int64_t many) {
  for (int64_t i = 0; i < queries_here; i++) {
    const float before = row_max[i], largest = largest_logit(i, many);
    row_max[i] = largest > before ? largest : before;
    factors[i] = before - row_max[i];
  }
  for (int64_t i = 0; i < queries_here; i += LANES) store(factors + i, exp2(load(factors + i)));
}

// Turns the logits of a query into weights; returns their sums by lane.
template <Product HOW, int D>
vec Kernel<HOW, D>::weigh_row(int64_t i, int64_t many) {
  const vec shift = all(row_max[i]);
  vec sum0{}, sum1{};
  int64_t at = i * KEYS, key = 0;
  for (; key + LANES < many; key += TILE, at += TILE) {
    const vec x0 = weight(load(weights + at) - shift);
    const vec x1 = weight(load(weights + at + LANES) - shift);
    give_weights(given(), at, x0, x1);
    sum0 += x0, sum1 += x1;
  }
  if (key < many) {
    const vec x = weight(load(weights + at) - shift);
    give_weights(given(), at, x, vec{});
    sum0 += x;
  }
  return sum0 + sum1;
}

// Weighted sums of values for the queries of a block, and sums of their weights by lane.
template <Product HOW, int D>
template <bool SUBTRACTS_MAX>
void Kernel<HOW, D>::attend() {
  for (int64_t i = 0; i < query_rows; i++) row_max[i] = SUBTRACTS_MAX ? -INFINITY : 0;
  std::memset(totals, 0, query_rows * LANES * 4);
  if constexpr (TILES && !SUBTRACTS_MAX) return attend_in_turn();
  for (int64_t key = 0; key < members; key += KEYS) {
    const int64_t many = members - key < KEYS ? members - key : KEYS;
    prefetch(queries_here * key / members, queries_here * (key + many) / members, false);
    tiles<SUBTRACTS_MAX ? LOGITS : P>(key, many);
    if (SUBTRACTS_MAX) {
      update_row_max(many);
      for (int64_t i = 0; i < queries_here; i++) {
        float *total = totals + i * LANES;
        store(total, load(total) * all(factors[i]) + weigh_row(i, many));
      }
    }
    for (int64_t i = 0; i < query_rows; i += ROWS)
      multiply_columns<HOW>(given() + i * depth(KEYS), depth(KEYS), 1,
                            values + depth(key) * wide(), wide(), depth(in_tiles(many)),
                            attended + i * wide(), wide(), wide(),
                            SUBTRACTS_MAX && key > 0 ? factors + i : nullptr, key == 0);
  }
}

// The same, a tile at a time: the product of the next logits overlaps with the weights of this tile and
// the product of the last weights with values, whose sums stay in tiles from the first key to the last.
template <Product HOW, int D>
void Kernel<HOW, D>::attend_in_turn() {
#if HAS_TILES
  vec logits[2][ROWS][2];
  const int64_t number = query_rows / ROWS * ((members + TILE - 1) / TILE);
  const int64_t share = queries_here / number + 1;
  Place next{}, here{}, last{};
  for (int64_t n = 0; n < number + 2; n++) {
    prefetch(n * share, (n + 1) * share, false);
    asm volatile("" ::: "memory");  // see multiply_tiles
    if (n < number) {
      multiply_beside(reinterpret_cast<float *>(logits[n % 2]), queries + next.query * words(),
                      key_panels + next.key * words());
      next.go_on(members);
    }
    if (n > 1) {
      if (last.key == 0) begin_sums<2>(nullptr, 0, true);
      add_to_sums<2>(ds_words + (last.query * KEYS + n % 2 * TILE) / 2, KEYS / 2,
                     values + last.key / 2 * wide(), wide());
      if (last.key + TILE >= members) end_sums<2>(attended + last.query * wide(), wide());
      last.go_on(members);
    }
    asm volatile("" ::: "memory");
    if (n > 0 && n <= number) {
      const int64_t at = (n - 1) % 2 * TILE;
      give_weights_tile<2, P>(logits[(n - 1) % 2], here.query, here.key - at, at,
                                    members - here.key + at);
      here.go_on(members);
    }
  }
#endif
}

// Reduces the sums of weights over lanes. Returns whether floats are exact without max subtraction, for
// values up to 2^63.
template <Product HOW, int D>
bool Kernel<HOW, D>::add_lanes() {
  bool fits = true;
  for (int64_t i = 0; i < queries_here; i++) {
    const float total = totals[i] = sum_of(load(totals + i * LANES));
    fits = fits && total > 0x1p-64f && total < 0x1p64f;
  }
  return fits;
}
