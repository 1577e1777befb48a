// Products of matrices, and the transposition that they need.
// A part of group_attention.h, which includes it once for each instruction set.

// sums[i] += a[i*row + k*step] * b[k*b_step...] for all k; if `is_first`, sums are taken for
// zeros.
template <Product HOW, int COLUMNS>
INLINE void multiply(vec (&sums)[ROWS][COLUMNS], const float *a, int64_t row, int64_t step,
                     const float *b, int64_t b_step, int64_t depth, bool is_first) {
#if HAS_TILES
  if constexpr (HOW == TILES_OF_PAIRS)
    return multiply_tiles<COLUMNS>(reinterpret_cast<float *>(sums), COLUMNS * LANES, a, row, b,
                                   b_step, depth, is_first);
#endif
  if (is_first)
    UNROLL for (int i = 0; i < ROWS; i++)
      UNROLL for (int j = 0; j < COLUMNS; j++) sums[i][j] = vec{};
  for (int64_t k = 0; k < depth; k++, a += step, b += b_step) {
    vec right[COLUMNS];
    UNROLL for (int j = 0; j < COLUMNS; j++) right[j] = load(b + j * LANES);
    UNROLL for (int i = 0; i < ROWS; i++) {
      const vec left = all(a[i * row]);
      UNROLL for (int j = 0; j < COLUMNS; j++)
        sums[i][j] = add_product<HOW>(left, right[j], sums[i][j]);
    }
  }
}

// c[i*c_step + j] = c[i*c_step + j] * factors[i] + sum of a[i*row + k*step] * b[k*b_step + j], for
// ROWS rows and COLUMNS registers of columns. If `is_first`, c is taken for zeros.
template <Product HOW, int COLUMNS>
NOINLINE void multiply_block(const float *a, int64_t row, int64_t step, const float *b,
                             int64_t b_step, int64_t depth, float *c, int64_t c_step,
                             const float *factors, bool is_first) {
#if HAS_TILES
  if constexpr (HOW == TILES_OF_PAIRS) {
    if (factors)
      for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) {
          float *at = c + i * c_step + j * LANES;
          store(at, load(at) * all(factors[i]));
        }
    return multiply_tiles<COLUMNS>(c, c_step, a, row, b, b_step, depth, is_first);
  }
#endif
  vec sums[ROWS][COLUMNS];
  UNROLL for (int i = 0; i < ROWS; i++)
    UNROLL for (int j = 0; j < COLUMNS; j++) {
      sums[i][j] = is_first ? vec{} : load(c + i * c_step + j * LANES);
      if (factors) sums[i][j] *= all(factors[i]);
    }
  multiply<HOW, COLUMNS>(sums, a, row, step, b, b_step, depth, false);
  UNROLL for (int i = 0; i < ROWS; i++)
    UNROLL for (int j = 0; j < COLUMNS; j++) store(c + i * c_step + j * LANES, sums[i][j]);
}

// The same for `count` columns, padded to whole registers.
template <Product HOW>
INLINE void multiply_columns(const float *a, int64_t row, int64_t step, const float *b,
                             int64_t b_step, int64_t depth, float *c, int64_t c_step, int64_t count,
                             const float *factors, bool is_first) {
  for (int64_t j = 0; j < count; j += TILE)
    if (count - j > LANES)
      multiply_block<HOW, 2>(a, row, step, b + j, b_step, depth, c + j, c_step, factors, is_first);
    else
      multiply_block<HOW, 1>(a, row, step, b + j, b_step, depth, c + j, c_step, factors, is_first);
}

// Transposes rows of `words` words to panels (rows / TILE, words, TILE); both in whole tiles and fours.
void transpose(const float *rows, int64_t count, int64_t words, float *panels) {
  for (int64_t row = 0; row < count; row += 4) {
    const float *from = rows + row * words;
    float *to = panels + row / TILE * TILE * words + row % TILE;
    for (int64_t word = 0; word < words; word += 4) {
      quad a, b, c, d;
      std::memcpy(&a, from + word, 16);
      std::memcpy(&b, from + words + word, 16);
      std::memcpy(&c, from + 2 * words + word, 16);
      std::memcpy(&d, from + 3 * words + word, 16);
      const quad ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
      const quad AB = SHUFFLE(a, b, 2, 6, 3, 7), CD = SHUFFLE(c, d, 2, 6, 3, 7);
      const quad columns[4] = {SHUFFLE(ab, cd, 0, 1, 4, 5), SHUFFLE(ab, cd, 2, 3, 6, 7),
                               SHUFFLE(AB, CD, 0, 1, 4, 5), SHUFFLE(AB, CD, 2, 3, 6, 7)};
      for (int i = 0; i < 4; i++) std::memcpy(to + (word + i) * TILE, &columns[i], 16);
    }
  }
}
