// The kernel of native.cpp, included there once for each instruction set, in a namespace that has
// LANES, ROWS, vec, ints, halves, and where these macros are defined:
//     HAS_LARGER  larger
//     HAS_POWERS  above_whole, times_power: x - floor(x) and y * 2^floor(x), infinite if too large
//     HAS_PAIRS   round_bf16, round_both, side_by_side, dot_pairs: numbers in bfloat16, of one vector
//                 or two, and words of both; products of two numbers at once
//     HAS_TILES   begin_tiles, end_tiles, and the macros ZERO_TILE, LOAD_TILE, STORE_TILE,
//                 ADD_PRODUCT: eight registers of LANES rows of LANES words of such pairs, or sums
//     EMULATED    both of these in other instructions, which are here
//     OTHERS      what does the work that tiles are not for
//
// A task is one head of some groups. Keys and values of a group are packed once. Then BLOCK queries
// at a time meet KEYS keys at a time: a product of matrices gives their logits, which become
// weights and are multiplied with the values, all in the first level cache. The backward pass
// computes the weights again, from the logarithms of the sums of exponentials.
//
// Weights are 2^(logit - top). A top of 0 mostly does: floats are as exact far from 1 as near it. Where
// the sum of a query's weights is too large or too small for that, the block is computed again: tops
// are the largest logits so far then, and what is summed up before is lessened with them.
//
// Queries are taken column by column of the group: the biases of all queries of one column are one
// strip of the table, of which each query reads a run as long as the group. The gradient of the
// table is summed in strips, too.
//
// Products are of words of 32 bits: of floats or, with PAIRS, of two numbers in bfloat16 each,
// which are multiplied and added up at once. With TILES they are, too, but of whole tiles: ROWS rows
// of words by as many words of TILE columns. Rows have to lie there as they are multiplied, so that
// the gradients of keys and values are summed with their channels as the rows.

#ifdef EMULATED  // for tests: its speed is worth no minutes of compiling
#pragma push_macro("UNROLL")
#undef UNROLL
#define UNROLL
#endif
#ifndef HAS_POWERS
#define HAS_POWERS false
#endif
#ifndef HAS_PAIRS
#define HAS_PAIRS false
#endif
#ifndef HAS_TILES
#define HAS_TILES false
#endif

constexpr int TILE = 2 * LANES;  // keys of a tile of logits; its queries are ROWS
constexpr int64_t BLOCK = (49 + ROWS - 1) / ROWS * ROWS;  // all queries of a group of 7 x 7
constexpr int64_t KEYS = 192;
static_assert(KEYS % TILE == 0 && KEYS % ROWS == 0, "whole tiles");
enum Product { FLOATS, PAIRS_OF_HALVES, TILES_OF_PAIRS };
enum Digits { OF_FLOATS, ROUGH, OF_BFLOAT16 };
enum Result { LOGITS, WEIGHTS, WEIGHTS_TWICE, SLOPES };  // of a tile
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

INLINE vec load(const float *from) {
  vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE void store(float *to, vec x) { std::memcpy(to, &x, sizeof x); }

INLINE void store_halves(float *to, int64_t at, halves x) {
  std::memcpy(reinterpret_cast<char *>(to) + 2 * at, &x, sizeof x);
}

INLINE vec all(float x) { return x - vec{}; }

#ifndef HAS_LARGER  // y, if one of them is not a number
INLINE vec larger(vec x, vec y) { return x > y ? x : y; }
INLINE vec smaller(vec x, vec y) { return x < y ? x : y; }
#endif

INLINE vec lanes() {
  vec x;
  for (int lane = 0; lane < LANES; lane++) x[lane] = lane;
  return x;
}

// The first `left` lanes of x, and elsewhere y.
INLINE vec first_lanes(int64_t left, vec x, vec y) {
  return lanes() < all(static_cast<float>(left)) ? x : y;
}

INLINE float largest_of(vec x) {
  quad parts[LANES / 4];
  std::memcpy(parts, &x, sizeof x);
  for (int i = 1; i < LANES / 4; i++) parts[0] = parts[0] > parts[i] ? parts[0] : parts[i];
  const float a = parts[0][0] > parts[0][1] ? parts[0][0] : parts[0][1];
  const float b = parts[0][2] > parts[0][3] ? parts[0][2] : parts[0][3];
  return a > b ? a : b;
}

INLINE float sum_of(vec x) {
  quad parts[LANES / 4];
  std::memcpy(parts, &x, sizeof x);
  for (int i = 1; i < LANES / 4; i++) parts[0] += parts[i];
  return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

template <int TERMS> INLINE vec polynomial(vec x, const float (&factors)[TERMS]) {
  vec y = all(factors[0]);
  UNROLL for (int i = 1; i < TERMS; i++) y = y * x + all(factors[i]);
  return y;
}

// Words of two numbers in bfloat16, the lower and the upper half.
INLINE vec words_of(halves x, halves y) {
  return (vec)(__builtin_convertvector(x, ints) | (__builtin_convertvector(y, ints) << 16));
}

// The same of floats that are such numbers, none negative.
INLINE vec words_of(vec x, vec y) { return (vec)((ints)x >> 16 | (ints)y); }

#if !HAS_PAIRS || defined(EMULATED)
INLINE halves round_bf16(vec x) {  // to the nearest, to even between two
  const ints bits = (ints)x, rounded = (bits + (0x7fff + ((bits >> 16) & 1))) >> 16;
  return __builtin_convertvector(x == x ? rounded : ints{} + 0x7fc0, halves);
}

INLINE vec round_both(vec x, vec y) {
  const halves parts[2] = {round_bf16(x), round_bf16(y)};
  vec both;
  std::memcpy(&both, parts, sizeof both);
  return both;
}

INLINE vec side_by_side(vec both) {
  halves parts[2];
  std::memcpy(parts, &both, sizeof both);
  return words_of(parts[0], parts[1]);
}
#endif

// 2^x to 2e-7 of itself, or ROUGHly to 1e-4, or that rounded to bfloat16; 0 far below 2^-126, and
// infinite from 2^128 on. It is 2 to the power of a whole number times the polynomial of least relative
// error for the rest.
template <Digits DIGITS = OF_FLOATS> INLINE vec exp2(vec x) {
#if HAS_POWERS
  const vec rest = above_whole(x);  // from 0 to 1
  // Half of bfloat16's last digit, for numbers from 1 to 2, before what is behind it is cut off.
  constexpr float half = DIGITS == OF_BFLOAT16 ? 0x1p-8f : 0;
  const vec y = DIGITS == OF_FLOATS
                    ? polynomial(rest, {1.8775748e-3f, 8.9893424e-3f, 5.5826318e-2f, 2.4015362e-1f,
                                        6.9315307e-1f, 9.9999993e-1f})
                    : polynomial(rest, {7.802428e-2f, 2.2606712e-1f, 6.9583376e-1f,
                                        9.9992517e-1f + half});
  const vec power = times_power(y, x);
  return DIGITS == OF_BFLOAT16 ? (vec)((ints)power & -0x10000) : power;
#else
  // The nearest whole number, which is rounded to, and moved to where a float has its exponent, by
  // adding a number so large that what is behind the point is lost.
  const vec magic = all(12582912.f + 127.f);
  x = smaller(all(128.f), larger(all(-127.f), x));
  const vec shifted = x + magic, rest = x - (shifted - magic);  // from -1/2 to 1/2
  const vec y = DIGITS == OF_FLOATS
                    ? polynomial(rest, {1.3276459e-3f, 9.6755396e-3f, 5.5507133e-2f, 2.402212e-1f,
                                        6.9314697e-1f, 1.0000001f})
                    : polynomial(rest, {5.5171498e-2f, 2.4261084e-1f, 6.9326099e-1f, 9.9992809e-1f});
  const vec power = y * (vec)((ints)shifted << 23);
  if (DIGITS != OF_BFLOAT16) return power;
  return (vec)(__builtin_convertvector(round_bf16(power), ints) << 16);
#endif
}

// The logarithm to base 2 of a normal float, to 5e-8; of what is not finite, not a number. It is that
// of a power of 2 and the polynomial of least error for a number from sqrt(1/2) to sqrt(2).
INLINE vec log2(vec x) {
  const ints power = ((ints)x - 0x3f3504f3) >> 23;
  const vec rest = (vec)((ints)x - (power << 23)) - all(1);
  const vec y = polynomial(rest, {0.12614846f, -0.20742103f, 0.21566986f, -0.23892035f, 0.28791833f,
                                  -0.36070484f, 0.4809106f, -0.72134733f, 1.442695f});
  return y * rest + __builtin_convertvector(power, vec) + (x - x);
}

#ifdef EMULATED
INLINE vec dot_pairs(vec x, vec y, vec sum) {
  const ints a = (ints)x, b = (ints)y, high = ints{} - 0x10000;
  return (vec)(a & high) * (vec)(b & high) + ((vec)(a << 16) * (vec)(b << 16) + sum);
}
#endif

// Numbers of a row in memory, of whatever type, to floats and back.

INLINE vec from_bits(DType dtype, halves bits) {
  const ints wide = __builtin_convertvector(bits, ints);
  if (dtype == BFLOAT16) return (vec)(wide << 16);
  const vec finite = (vec)((wide & 0x7fff) << 13) * all(5.1922969e33f);  // 2^112
  const ints special = (wide & 0x7c00) == 0x7c00;
  return (vec)((ints)finite | (special & 0x7f800000) | ((wide & 0x8000) << 16));
}

INLINE halves to_bits(DType dtype, vec x) {
  if (dtype == BFLOAT16) return round_bf16(x);
  const ints bits = (ints)x, size = bits & 0x7fffffff;
  const ints normal = (size + (0xfff - (112 << 23)) + ((size >> 13) & 1)) >> 13;
  const ints tiny = (ints)((vec)size + all(0.5f)) - 0x3f000000;
  const ints above = size > 0x7f800000 ? ints{} + 0x7e00 : ints{} + 0x7c00;
  ints result = size < 0x38800000 ? tiny : normal;
  result = size >= 0x47800000 ? above : result;
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000), halves);
}

INLINE vec load_numbers(DType dtype, const char *from, int64_t left) {
  if (dtype == FLOAT32) {
    vec x{};
    std::memcpy(&x, from, left < LANES ? left * 4 : sizeof x);
    return x;
  }
  halves bits{};
  std::memcpy(&bits, from, left < LANES ? left * 2 : sizeof bits);
  return from_bits(dtype, bits);
}

INLINE void store_numbers(DType dtype, char *to, vec x, int64_t left) {
  if (dtype == FLOAT32) {
    std::memcpy(to, &x, left < LANES ? left * 4 : sizeof x);
    return;
  }
  const halves bits = to_bits(dtype, x);
  std::memcpy(to, &bits, left < LANES ? left * 2 : sizeof bits);
}

template <Product HOW> INLINE vec add_product(vec x, vec y, vec sum) {
#if HAS_PAIRS
  if constexpr (HOW != FLOATS) return dot_pairs(x, y, sum);
#endif
  return x * y + sum;
}

#ifdef EMULATED
thread_local vec tiles[8][LANES];
INLINE void begin_tiles() {}
INLINE void end_tiles() {}

NOINLINE void load_tile(int tile, const float *from, int64_t step) {
  for (int i = 0; i < LANES; i++) tiles[tile][i] = load(from + i * step);
}

NOINLINE void store_tile(int tile, float *to, int64_t step) {
  for (int i = 0; i < LANES; i++) store(to + i * step, tiles[tile][i]);
}

NOINLINE void add_product(int c, int a, int b) {
  for (int i = 0; i < LANES; i++)
    for (int k = 0; k < LANES; k++)
      tiles[c][i] = dot_pairs(all(tiles[a][i][k]), tiles[b][k], tiles[c][i]);
}

#define ZERO_TILE(tile) std::memset(tiles[tile], 0, sizeof tiles[tile])
#define LOAD_TILE load_tile
#define STORE_TILE store_tile
#define ADD_PRODUCT add_product
#endif

#if HAS_TILES
// Sums of products, and where they are in memory: the tiles 0 and 1, and below 2 and 3.
template <int COLUMNS> INLINE void begin_sums(const float *c, int64_t c_step, bool is_first) {
  if (is_first) {
    ZERO_TILE(0);
    ZERO_TILE(2);
    if (COLUMNS > 1) ZERO_TILE(1);
    if (COLUMNS > 1) ZERO_TILE(3);
  } else {
    LOAD_TILE(0, c, c_step);
    LOAD_TILE(2, c + LANES * c_step, c_step);
    if (COLUMNS > 1) LOAD_TILE(1, c + LANES, c_step);
    if (COLUMNS > 1) LOAD_TILE(3, c + LANES * c_step + LANES, c_step);
  }
}

template <int COLUMNS> INLINE void end_sums(float *c, int64_t c_step) {
  STORE_TILE(0, c, c_step);
  STORE_TILE(2, c + LANES * c_step, c_step);
  if (COLUMNS > 1) STORE_TILE(1, c + LANES, c_step);
  if (COLUMNS > 1) STORE_TILE(3, c + LANES * c_step + LANES, c_step);
}

// For LANES words of depth: a is in the tiles 4 and below 5, columns of b in 6.
template <int COLUMNS>
INLINE void add_to_sums(const float *a, int64_t row, const float *b, int64_t b_step) {
  LOAD_TILE(4, a, row);
  LOAD_TILE(6, b, b_step);
  ADD_PRODUCT(0, 4, 6);
  LOAD_TILE(5, a + LANES * row, row);
  ADD_PRODUCT(2, 5, 6);
  if (COLUMNS == 1) return;
  LOAD_TILE(6, b + LANES, b_step);
  ADD_PRODUCT(1, 4, 6);
  ADD_PRODUCT(3, 5, 6);
}

// c[i*c_step + j] = c[...] * !is_first + sum of a[i*row + k] * b[k*b_step + j], for ROWS rows and
// COLUMNS registers of columns.
template <int COLUMNS>
INLINE void multiply_tiles(float *c, int64_t c_step, const float *a, int64_t row, const float *b,
                           int64_t b_step, int64_t depth, bool is_first) {
  asm volatile("" ::: "memory");  // GCC does not know that tiles are read from memory
  begin_sums<COLUMNS>(c, c_step, is_first);
  for (int64_t k = 0; k < depth; k += LANES)
    add_to_sums<COLUMNS>(a + k, row, b + k * b_step, b_step);
  end_sums<COLUMNS>(c, c_step);
}

// Products of ROWS rows of a and TILE columns of b of LANES words each, beside sums in tiles.
INLINE void multiply_beside(float *c, const float *a, const float *b) {
  LOAD_TILE(4, a, LANES);
  LOAD_TILE(5, a + LANES * LANES, LANES);
  for (int64_t j = 0; j < TILE; j += LANES) {
    LOAD_TILE(6, b + j, TILE);
    ZERO_TILE(7);
    ADD_PRODUCT(7, 4, 6);
    STORE_TILE(7, c + j, TILE);
    ZERO_TILE(7);
    ADD_PRODUCT(7, 5, 6);
    STORE_TILE(7, c + LANES * TILE + j, TILE);
  }
}
#endif

// sums[i] += a[i*row + k*step] * b[k*b_step...] for all k; where it is the first, sums are taken for
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
// ROWS rows and COLUMNS registers of columns. Where a block is the first, c is taken for zeros.
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

// Of `count` columns, of which those up to a whole register are there.
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

// Rows of `words` words to panels (rows / TILE, words, TILE); both in whole tiles and fours.
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

// D: the number of channels of a head, or 0 for any.
template <Product HOW, int D> struct Kernel {
  static constexpr bool PAIRS = HOW != FLOATS, TILES = HOW == TILES_OF_PAIRS;
  static_assert(!TILES || (D == ROWS && TILE == ROWS && BLOCK / 2 <= TILE), "whole tiles");

  const Call &call;
  // Of a group, its rows of numbers one after another (with PAIRS in bfloat16); panels of keys and
  // values; keys and values as words of a channel.
  float *raw = nullptr, *key_panels = nullptr, *value_panels = nullptr, *keys = nullptr, *values = nullptr, *grad_keys = nullptr, *grad_values = nullptr;
  // Of a block of queries: words along channels, and (PAIRS) along queries; results.
  float *queries = nullptr, *query_pairs = nullptr, *grads = nullptr, *grad_pairs = nullptr, *attended = nullptr, *tops = nullptr, *totals = nullptr, *factors = nullptr;
  // Logits that become weights, their gradients; (PAIRS) the words of both.
  float *weights = nullptr, *weight_pairs = nullptr, *slopes = nullptr, *slope_words = nullptr, *slope_pairs = nullptr;
  float *flipped = nullptr, *grad_flipped = nullptr, *strips = nullptr, *grad_strips = nullptr;  // the head's table, and its strips
  int64_t *tokens = nullptr, *next_tokens = nullptr;  // of the group's members, row by row
  const float *bias[BLOCK];
  float *grad_bias[BLOCK];
  int64_t query_tokens[BLOCK];

  // Of which columns of a group, of how many rows and columns, the strips are.
  struct Strips {
    int64_t first = 0, last = -1, rows = 1, columns = 1;
    INLINE bool has(int64_t column) const { return first <= column && column <= last; }
    INLINE bool is_like(const Strips &o) const { return rows == o.rows && columns == o.columns; }
    INLINE bool operator==(const Strips &o) const {
      return first == o.first && last == o.last && is_like(o);
    }
  } stripped;

  // Of the group at hand
  int64_t group_rows, group_columns, members, next_members = 0, next_head;

  // Of the block at hand: its head, its queries, and these with what fills up their last tile
  int64_t head, first_query = 0, queries_here = 0, query_rows;

  INLINE int64_t dim() const { return D ? D : call.dim; }
  INLINE int64_t wide() const { return (dim() + LANES - 1) / LANES * LANES; }
  INLINE int64_t words() const { return PAIRS ? wide() / 2 : wide(); }  // of a row
  static INLINE int64_t depth(int64_t numbers) { return PAIRS ? (numbers + 1) / 2 : numbers; }
  // A number of keys or queries as products take it: behind the last, weights are zeros.
  static INLINE int64_t in_tiles(int64_t count) {
    return TILES ? (count + TILE - 1) / TILE * TILE : count;
  }
  static int64_t strip_size(int64_t rows, int64_t columns) {  // with room for what tiles overlap
    return (2 * rows - 1) * columns + 2 * TILE;
  }
  static int64_t most_strips(int64_t rows, int64_t columns) {  // of the columns in which a block is
    return std::min(columns, (BLOCK - 1) / rows + 2);
  }
  INLINE int64_t across() const { return 2 * call.largest_columns - 1; }

  Kernel(const Call &call, Arena &arena, bool backward) : call(call) {
    const int64_t most = call.largest_rows * call.largest_columns;
    const int64_t padded = (most + TILE - 1) / TILE * TILE + TILE, room = padded * wide();
    const int64_t block = BLOCK * wide();
    raw = arena.take(room);
    key_panels = arena.take(room);
    values = arena.take(room);
    queries = arena.take(block);
    attended = arena.take(block);
    tops = arena.take(BLOCK);
    totals = arena.take(BLOCK * LANES);
    factors = arena.take(BLOCK);
    weights = arena.take(BLOCK * KEYS);
    slope_words = arena.take(PAIRS ? BLOCK * KEYS / 2 : 0);
    flipped = arena.take((2 * call.largest_rows - 1) * across() + LANES);
    int64_t strip_room = 0;
    for (const Run &rows : call.rows)
      for (const Run &columns : call.columns)
        strip_room = std::max(strip_room, most_strips(rows.count, columns.count) *
                                              strip_size(rows.count, columns.count));
    strips = arena.take(strip_room);
    tokens = reinterpret_cast<int64_t *>(arena.take(2 * most));
    next_tokens = reinterpret_cast<int64_t *>(arena.take(2 * most));
    if (!backward) return;
    value_panels = arena.take(room);
    keys = PAIRS ? arena.take(room) : raw;
    grad_keys = arena.take(room);
    grad_values = arena.take(room);
    grads = arena.take(block);
    query_pairs = PAIRS ? arena.take(block) : queries;
    grad_pairs = PAIRS ? arena.take(block) : grads;
    slopes = PAIRS ? weights : arena.take(BLOCK * KEYS);
    weight_pairs = PAIRS ? arena.take(BLOCK * KEYS / 2) : weights;
    slope_pairs = PAIRS ? arena.take(BLOCK * KEYS / 2) : slopes;
    if (!PAIRS) slope_words = slopes;
    grad_strips = arena.take(strip_room);
  }

  INLINE DType dtype() const { return PAIRS ? BFLOAT16 : call.dtype; }
  INLINE int64_t row_size() const { return dim() * size_of(dtype()); }  // in bytes

  // Rows of a head in an array of all tokens, by token.
  template <typename Byte> struct Rows {
    Byte *first;
    int64_t step;
    INLINE Byte *operator[](int64_t token) const { return first + token * step; }
  };

  // Those of `part` of `parts` (q, k, v: 0, 1, 2 of 3).
  template <typename Byte>
  INLINE Rows<Byte> rows_in(Byte *array, int64_t head, int part, int parts) const {
    return {array + (part * call.heads + head) * row_size(), parts * call.heads * row_size()};
  }

  // A row of numbers from memory to words along channels, filled up with zeros.
  INLINE void take_row(const char *from, float *to) const {
    if (PAIRS) {
      for (int64_t c = 0; c < wide(); c += LANES) {
        halves x{};
        std::memcpy(&x, from + c * 2, dim() - c < LANES ? (dim() - c) * 2 : sizeof x);
        store_halves(to, c, x);
      }
    } else if (dtype() == FLOAT32) {
      take_row_of<FLOAT32>(from, to);
    } else if (dtype() == BFLOAT16) {
      take_row_of<BFLOAT16>(from, to);
    } else {
      take_row_of<FLOAT16>(from, to);
    }
  }

  template <DType DTYPE> INLINE void take_row_of(const char *from, float *to) const {
    for (int64_t c = 0; c < wide(); c += LANES)
      store(to + c, load_numbers(DTYPE, from + c * size_of(DTYPE), dim() - c));
  }

  INLINE void give_row(const float *from, float factor, char *to) const {
    if (dtype() == FLOAT32) give_row_of<FLOAT32>(from, factor, to);
    else if (dtype() == BFLOAT16) give_row_of<BFLOAT16>(from, factor, to);
    else give_row_of<FLOAT16>(from, factor, to);
  }

  template <DType DTYPE> INLINE void give_row_of(const float *from, float factor, char *to) const {
    for (int64_t c = 0; c < wide(); c += LANES)
      store_numbers(DTYPE, to + c * size_of(DTYPE), load(from + c) * all(factor), dim() - c);
  }

  // Words of two rows in bfloat16 that are so far apart, a channel of both side by side.
  INLINE void interleave(const float *rows, int64_t count, float *to, int64_t apart = 1) const {
    const uint16_t *from = reinterpret_cast<const uint16_t *>(rows);
    for (int64_t row = 0; row < count; row += row % apart + 1 < apart ? 1 : apart + 1)
      for (int64_t c = 0; c < wide(); c += LANES, to += LANES) {
        halves one, other;
        std::memcpy(&one, from + row * wide() + c, sizeof one);
        std::memcpy(&other, from + (row + apart) * wide() + c, sizeof other);
        store(to, words_of(one, other));
      }
  }

  // The queries of a block, filled up with zeros; without PAIRS, in which they would be rounded, times
  // what their logits are scaled with.
  INLINE void take_queries() const {
    const auto rows = rows_in(call.qkv, head, 0, 3);
    const vec factor = all(call.scale * LOG2_E);
    for (int64_t i = 0; i < queries_here; i++) {
      float *to = queries + i * words();
      take_row(rows[query_tokens[i]], to);
      if (!PAIRS)
        for (int64_t c = 0; c < wide(); c += LANES) store(to + c, load(to + c) * factor);
    }
    std::memset(queries + queries_here * words(), 0, (query_rows - queries_here) * words() * 4);
  }

  // Rows of keys (part 1) or values (2) of the group to `to`; returns how many with the padding.
  int64_t take_rows(int part, float *to) const {
    const auto rows = rows_in(call.qkv, head, part, 3);
    for (int64_t m = 0; m < members; m++) take_row(rows[tokens[m]], to + m * words());
    const int64_t padded = (members + TILE - 1) / TILE * TILE;
    std::memset(to + members * words(), 0, (padded - members) * words() * 4);
    return padded;
  }

  const Run &rows_of(int64_t group) const {
    return call.rows[group / call.columns.size() % call.rows.size()];
  }

  const Run &columns_of(int64_t group) const { return call.columns[group % call.columns.size()]; }

  // Tokens of a group's members, row by row, to `to`.
  void list_tokens(int64_t group, int64_t *to) const {
    const Run &rows = rows_of(group), &columns = columns_of(group);
    const int64_t image = group / (call.rows.size() * call.columns.size());
    for (int64_t y = 0; y < rows.count; y++) {
      const int64_t line = (image * call.height + rows.start + y * rows.step) * call.width;
      for (int64_t x = 0; x < columns.count; x++) *to++ = line + columns.start + x * columns.step;
    }
  }

  // Make the next group the one at hand, and this one of a head the next; none if -1.
  void start_group(int64_t group, int64_t next, int64_t head) {
    if (next_members == 0) list_tokens(group, next_tokens);
    std::swap(tokens, next_tokens);
    group_rows = rows_of(group).count, group_columns = columns_of(group).count;
    members = group_rows * group_columns;
    next_members = 0, next_head = head;
    if (next < 0) return;
    next_members = rows_of(next).count * columns_of(next).count;
    list_tokens(next, next_tokens);
  }

  // Rows are far apart in memory, which no processor foresees: ask for those of the next group and
  // those that results go to, those from `i` to `end` of a block at a time.
  INLINE void prefetch(int64_t i, int64_t end, bool backward) const {
    const auto results =
        backward ? rows_in(call.grad_qkv, head, 0, 3) : rows_in(call.out, head, 0, 1);
    end = std::min(end, queries_here);
    for (int64_t at = i; at < end; at++) prefetch_row<true>(results[query_tokens[at]]);
    end = std::min(end, next_members - first_query);
    const auto rows = rows_in(call.qkv, next_head, 0, 3);
    for (int64_t at = i; at < end; at++) {
      const char *row = rows[next_tokens[first_query + at]];
      for (int part = 0; part < 3; part++) prefetch_row(row + part * call.heads * row_size());
    }
    if (!backward) return;
    const auto outs = rows_in(call.out, next_head, 0, 1);
    const auto grad_outs = rows_in(call.grad_out, next_head, 0, 1);
    for (int64_t at = i; at < end; at++) {
      const int64_t token = next_tokens[first_query + at];
      prefetch_row(outs[token]), prefetch_row(grad_outs[token]);
    }
  }

  template <bool WRITE = false> INLINE void prefetch_row(const char *row) const {
    for (int64_t byte = 0; byte < row_size(); byte += 64)
      __builtin_prefetch(row + byte, WRITE, 2);
  }

  // The offsets of key - query, for products with log2(e) at once.
  void flip_table() {
    const int64_t rows = 2 * call.largest_rows - 1;
    const float *middle = call.table + (head * call.table_rows + call.table_rows / 2) *
                                           call.table_columns + call.table_columns / 2;
    for (int64_t y = 0; y < rows; y++)
      for (int64_t x = 0; x < across(); x++)
        flipped[y * across() + x] =
            LOG2_E * middle[(call.largest_rows - 1 - y) * call.table_columns +
                            call.largest_columns - 1 - x];
    for (int64_t i = 0; i < LANES; i++) flipped[rows * across() + i] = 0;
  }

  // Where the strip of a column begins, and, in the table, its offsets to the first column of keys.
  static INLINE int64_t place(const Strips &of, int64_t column) {
    return column % most_strips(of.rows, of.columns) * strip_size(of.rows, of.columns);
  }

  INLINE int64_t offset(const Strips &of, int64_t column) const {
    return (call.largest_rows - of.rows) * across() + call.largest_columns - 1 - column;
  }

  // Tokens and biases of the queries from `first` on. Mostly the biases are those of the block before.
  void start_block(int64_t first, bool backward) {
    const int64_t count = std::min(members - first, BLOCK), column = first / group_rows;
    const Strips of{column, (first + count - 1) / group_rows, group_rows, group_columns};
    const bool is_alike = of == stripped && first == first_query && count == queries_here;
    first_query = first, queries_here = count, query_rows = (count + ROWS - 1) / ROWS * ROWS;
    if (!is_alike) start_biases(of, backward);
    const int64_t *from = tokens + column;
    for (int64_t i = 0, row = first - column * group_rows; i < count; row = 0, from++)
      for (; row < group_rows && i < count; row++, i++) query_tokens[i] = from[row * group_columns];
  }

  // A tile beyond the last query repeats that one.
  void start_biases(const Strips &of, bool backward) {
    change_strips(of, backward);
    int64_t row = first_query % group_rows, column = of.first;
    const int64_t top = (group_rows - 1) * group_columns;  // of a strip, for the first row
    for (int64_t i = 0, at = place(of, column) + top - row * group_columns; i < query_rows; i++) {
      bias[i] = strips + at, grad_bias[i] = grad_strips + at;
      if (i + 1 >= queries_here) continue;
      at -= group_columns;
      if (++row == group_rows) row = 0, at = place(of, ++column) + top;
    }
  }

  // What the block before has had, too, stays: all of a group of one block that is like the last.
  void change_strips(const Strips &of, bool backward) {
    const Strips &before = stripped;
    if (backward)
      for (int64_t column = before.first; column <= before.last; column++)
        if (!of.is_like(before) || !of.has(column)) end_strip(before, column);
    for (int64_t column = of.first; column <= of.last; column++)
      if (!of.is_like(before) || !before.has(column)) begin_strip(of, column, backward);
    stripped = of;
  }

  void begin_strip(const Strips &of, int64_t column, bool backward) {
    const float *from = flipped + offset(of, column);
    float *to = strips + place(of, column);
    for (int64_t y = 0; y < 2 * of.rows - 1; y++, from += across(), to += of.columns)
      for (int64_t x = 0; x < of.columns; x += LANES) store(to + x, load(from + x));
    std::memset(to, 0, 2 * TILE * 4);
    if (backward)
      std::memset(grad_strips + place(of, column), 0, strip_size(of.rows, of.columns) * 4);
  }

  // Add the gradients of a strip up in that of the table.
  void end_strip(const Strips &of, int64_t column) {
    float *to = grad_flipped + offset(of, column);
    const float *from = grad_strips + place(of, column);
    for (int64_t y = 0; y < 2 * of.rows - 1; y++, to += across(), from += of.columns) {
      int64_t x = 0;
      for (; x + LANES <= of.columns; x += LANES) store(to + x, load(to + x) + load(from + x));
      for (; x < of.columns; x++) to[x] += from[x];
    }
  }

  // What follows is of a tile: of ROWS queries and COLUMNS registers of keys.

  // Products of queries and keys or, for slopes, of gradients and values.
  template <int COLUMNS, Result RESULT>
  INLINE void multiply_tile(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first, int64_t key) const {
    constexpr bool HAS_BIAS = RESULT != SLOPES && !PAIRS;  // for which queries are scaled
    if (HAS_BIAS)
      UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int j = 0; j < COLUMNS; j++)
          x[i][j] = load(bias[i0 + i] + first + key + j * LANES);
    multiply<HOW, COLUMNS>(x, (RESULT == SLOPES ? grads : queries) + i0 * words(), words(), 1,
                           (RESULT == SLOPES ? value_panels : key_panels) + (first + key) * words(),
                           TILE, depth(dim()), !HAS_BIAS);
  }

  // Logits, times log2(e), or weights: in the forward pass, with tops of 0, for products, with their
  // sums by lane, in the backward pass with the pairs of two rows. What is behind the last of `count`
  // keys has no weight.
  template <int COLUMNS, Result RESULT>
  INLINE void give_weights_tile(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first, int64_t key,
                                int64_t count) {
    if (RESULT == LOGITS || count - key >= COLUMNS * LANES)
      give_weights_rows<COLUMNS, RESULT, true>(x, i0, first, key, count);
    else
      give_weights_rows<COLUMNS, RESULT, false>(x, i0, first, key, count);
  }

  // Addresses are taken first, so that no compiler takes them again after each number it stores.
  template <int COLUMNS, Result RESULT, bool IS_WHOLE>
  INLINE void give_weights_rows(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first, int64_t key,
                                int64_t count) {
    const vec scale = all(call.scale * LOG2_E);
    const float *const *const biases = bias + i0;
    float *const total = totals + i0 * LANES, *const to = weights, *const words = given();
    const int64_t queries_left = queries_here - i0, at_bias = first + key, at = i0 * KEYS + key;
    UNROLL for (int i = 0; i < ROWS; i += 2) {
      if (RESULT == WEIGHTS && i >= queries_left) return;
      vec y[2][COLUMNS];
      UNROLL for (int row = 0; row < 2; row++) {
        const float *const here = biases[i + row] + at_bias;
        UNROLL for (int j = 0; j < COLUMNS; j++) {
          vec &one = y[row][j] = x[i + row][j];
          if (PAIRS) one = one * scale + load(here + j * LANES);
          if (RESULT == LOGITS) continue;
          if (RESULT == WEIGHTS) one = weight(one);
          else one = exp2<PAIRS ? ROUGH : OF_FLOATS>(one - all(tops[i0 + i + row]));
          if (!IS_WHOLE) one = first_lanes(count - key - j * LANES, one, vec{});
        }
      }
      UNROLL for (int row = 0; row < 2; row++) {
        if (RESULT == WEIGHTS) {
          const vec second = COLUMNS > 1 ? y[row][COLUMNS - 1] : vec{};
          float *sum = total + (i + row) * LANES;
          store(sum, load(sum) + (y[row][0] + second));
          give_weights(words, at + (i + row) * KEYS, y[row][0], second);
        } else {
          UNROLL for (int j = 0; j < COLUMNS; j++)
            store(to + at + (i + row) * KEYS + j * LANES, y[row][j]);
        }
      }
      if constexpr (PAIRS && RESULT == WEIGHTS_TWICE)
        UNROLL for (int j = 0; j < COLUMNS; j++)
          store(weight_pairs + (i0 + i) / 2 * KEYS + key + j * LANES,
                side_by_side(round_both(y[0][j], y[1][j])));
    }
  }

  // Of a logit. Sums are of what is multiplied with the values, so that one key has all the weight.
  static INLINE vec weight(vec logit) { return exp2<PAIRS ? OF_BFLOAT16 : OF_FLOATS>(logit); }

  // Weights as they are multiplied with the values.
  INLINE float *given() const { return PAIRS ? slope_words : weights; }

  // Of TILE keys or, if they are the last, LANES. With TILES those are a pair that are LANES apart.
  static INLINE void give_weights(float *to, int64_t at, vec first, vec second) {
    if constexpr (PAIRS) {
      store(to + at / 2, TILES ? words_of(first, second) : round_both(first, second));
    } else {
      store(to + at, first);
      store(to + at + LANES, second);
    }
  }

  // Gradients of logits: weight * (gradient of the weight - their mean).
  template <int COLUMNS>
  INLINE void give_slopes_tile(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first, int64_t key) {
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
          if constexpr (!PAIRS) store(slopes + here, y[row][j]);
        }
      }
      if constexpr (PAIRS)
        UNROLL for (int j = 0; j < COLUMNS; j++) {
          const vec both = round_both(y[0][j], y[1][j]);
          halves rows[2];
          std::memcpy(rows, &both, sizeof both);
          store_halves(slope_words, at + j * LANES, rows[0]);
          store_halves(slope_words, at + KEYS + j * LANES, rows[1]);
          store(slope_pairs + (i0 + i) / 2 * KEYS + key + j * LANES, side_by_side(both));
        }
    }
  }

  template <int COLUMNS, Result RESULT>
  INLINE void give_tile(vec (&x)[ROWS][COLUMNS], int64_t i, int64_t first, int64_t key,
                        int64_t count) {
    if constexpr (RESULT == SLOPES) give_slopes_tile<COLUMNS>(x, i, first, key);
    else give_weights_tile<COLUMNS, RESULT>(x, i, first, key, count);
  }

  // In a function of its own: all registers are for the sums.
  template <int COLUMNS, Result RESULT>
  NOINLINE void tile(int64_t i, int64_t first, int64_t key, int64_t count) {
    vec x[ROWS][COLUMNS];
    multiply_tile<COLUMNS, RESULT>(x, i, first, key);
    give_tile<COLUMNS, RESULT>(x, i, first, key, count);
  }

  // Of the `count` keys from `first` on.
  template <Result RESULT> INLINE void tiles(int64_t first, int64_t count) {
    if constexpr (TILES) return tiles_in_turn<RESULT>(first, count);
    for (int64_t key = 0; key < count; key += TILE)
      for (int64_t i = 0; i < query_rows; i += ROWS)
        count - key > LANES ? tile<2, RESULT>(i, first, key, count)
                            : tile<1, RESULT>(i, first, key, count);
  }

  // Tiles are multiplied beside what is done with the one before.
  template <Result RESULT> NOINLINE void tiles_in_turn(int64_t first, int64_t count) {
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
  INLINE float top_of(int64_t i, int64_t many) {
    float *row = weights + i * KEYS;
    vec top0 = all(-INFINITY), top1 = top0;
    if (many % LANES) {
      float *at = row + many / LANES * LANES;
      store(at, first_lanes(many % LANES, load(at), top0));  // no weight behind the last
    }
    int64_t key = 0;
    for (; key + LANES < many; key += TILE) {
      top0 = larger(load(row + key), top0);
      top1 = larger(load(row + key + LANES), top1);
    }
    if (key < many) top0 = larger(load(row + key), top0);
    return largest_of(larger(top0, top1));
  }

  // Raises `tops` to the largest logits of those before and these. The factors are what sums up to
  // here are to be multiplied with. A row does not wait for the result of another.
  INLINE void raise_tops(int64_t many) {
    for (int64_t i = 0; i < queries_here; i++) {
      const float before = tops[i], top = top_of(i, many);
      tops[i] = top > before ? top : before;
      factors[i] = before - tops[i];
    }
    for (int64_t i = 0; i < queries_here; i += LANES) store(factors + i, exp2(load(factors + i)));
  }

  // Logits of a query to weights; returns their sums by lane.
  INLINE vec weigh_row(int64_t i, int64_t many) {
    const vec top = all(tops[i]);
    vec sum0{}, sum1{};
    int64_t at = i * KEYS, key = 0;
    for (; key + LANES < many; key += TILE, at += TILE) {
      const vec x0 = weight(load(weights + at) - top);
      const vec x1 = weight(load(weights + at + LANES) - top);
      give_weights(given(), at, x0, x1);
      sum0 += x0, sum1 += x1;
    }
    if (key < many) {
      const vec x = weight(load(weights + at) - top);
      give_weights(given(), at, x, vec{});
      sum0 += x;
    }
    return sum0 + sum1;
  }

  // What the queries of a block attend to, and sums of their weights by lane, with tops of 0 or, if it
  // RAISES them, of the largest logits.
  template <bool RAISES> NOINLINE void attend() {
    for (int64_t i = 0; i < query_rows; i++) tops[i] = RAISES ? -INFINITY : 0;
    std::memset(totals, 0, query_rows * LANES * 4);
    if constexpr (TILES && !RAISES) return attend_in_turn();
    for (int64_t key = 0; key < members; key += KEYS) {
      const int64_t many = members - key < KEYS ? members - key : KEYS;
      prefetch(queries_here * key / members, queries_here * (key + many) / members, false);
      tiles<RAISES ? LOGITS : WEIGHTS>(key, many);
      if (RAISES) {
        raise_tops(many);
        for (int64_t i = 0; i < queries_here; i++) {
          float *total = totals + i * LANES;
          store(total, load(total) * all(factors[i]) + weigh_row(i, many));
        }
      }
      for (int64_t i = 0; i < query_rows; i += ROWS)
        multiply_columns<HOW>(given() + i * depth(KEYS), depth(KEYS), 1,
                              values + depth(key) * wide(), wide(), depth(in_tiles(many)),
                              attended + i * wide(), wide(), wide(),
                              RAISES && key > 0 ? factors + i : nullptr, key == 0);
    }
  }

  struct Place {  // of a tile of logits
    int64_t query, key;
    INLINE void go_on(int64_t members) {
      key += TILE;
      if (key >= members) key = 0, query += ROWS;
    }
  };

  // The same a tile at a time: the next one of logits is multiplied beside the weights of this one and
  // what is attended with those of the last, whose sums stay in tiles from the first key to the last.
  INLINE void attend_in_turn() {
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
        add_to_sums<2>(slope_words + (last.query * KEYS + n % 2 * TILE) / 2, KEYS / 2,
                       values + last.key / 2 * wide(), wide());
        if (last.key + TILE >= members) end_sums<2>(attended + last.query * wide(), wide());
        last.go_on(members);
      }
      asm volatile("" ::: "memory");
      if (n > 0 && n <= number) {
        const int64_t at = (n - 1) % 2 * TILE;
        give_weights_tile<2, WEIGHTS>(logits[(n - 1) % 2], here.query, here.key - at, at,
                                      members - here.key + at);
        here.go_on(members);
      }
    }
#endif
  }

  // Sums of weights of a block's queries, instead of those by lane. Returns whether all are such that
  // floats are exact for tops of 0, for values up to 2^63, too.
  INLINE bool add_lanes() {
    bool fits = true;
    for (int64_t i = 0; i < queries_here; i++) {
      const float total = totals[i] = sum_of(load(totals + i * LANES));
      fits = fits && total > 0x1p-64f && total < 0x1p64f;
    }
    return fits;
  }

  // What the queries of a block attend to, and the logarithms of their sums of exponentials.
  INLINE void give_block() const {
    for (int64_t i = 0; i < queries_here; i += LANES) {
      const vec total = load(totals + i);
      store(factors + i, all(1) / total);
      store(totals + i, (load(tops + i) + log2(total)) * all(LN_2));
    }
    const auto rows = rows_in(call.out, head, 0, 1);
    float *norms = call.norms + head;
    for (int64_t i = 0; i < queries_here; i++) {
      give_row(attended + i * wide(), factors[i], rows[query_tokens[i]]);
      norms[query_tokens[i] * call.heads] = totals[i];
    }
  }

  void forward() {
    const int64_t padded = take_rows(1, raw);
    transpose(raw, padded, words(), key_panels);
    take_rows(2, PAIRS ? raw : values);
    if (PAIRS) interleave(raw, padded, values, TILES ? LANES : 1);  // see give_weights
    for (int64_t first = 0; first < members; first += BLOCK) {
      start_block(first, false);
      take_queries();
      attend<false>();
      if (!add_lanes()) {
        attend<true>();
        add_lanes();
      }
      give_block();
    }
  }

  // A block of queries or of their gradients, as pairs of rows, for `add_gradients`.
  INLINE void pair_rows(const float *rows, int64_t count, float *to) const {
    interleave(rows, count, TILES ? raw : to);
    if (TILES) transpose(raw, count / 2, wide(), to);
  }

  // Sums over the queries of a block for `many` keys from `key` on: of their weights by `grad_pairs`
  // or of their slopes by `query_pairs`, (members, channels) or (channels, padded).
  INLINE void add_gradients(float *sums, const float *pairs, const float *of_keys, int64_t key,
                            int64_t many, int64_t count, int64_t padded, bool is_first) const {
    if (TILES)
      return multiply_columns<HOW>(pairs, TILE, 1, of_keys, KEYS, depth(in_tiles(count)),
                                   sums + key, padded, many, nullptr, is_first);
    for (int64_t k = 0; k < many; k += ROWS)
      multiply_columns<HOW>(of_keys + k, 1, KEYS, pairs, wide(), depth(count),
                            sums + (key + k) * wide(), wide(), wide(), nullptr, is_first);
  }

  void backward() {
    const int64_t padded = take_rows(2, raw);
    transpose(raw, padded, words(), value_panels);
    take_rows(1, raw);
    transpose(raw, padded, words(), key_panels);
    if (PAIRS) interleave(raw, padded, keys);
    for (int64_t first = 0; first < members; first += BLOCK) {
      start_block(first, true);
      const int64_t count = queries_here, rows = query_rows;
      take_queries();
      const auto outs = rows_in(call.out, head, 0, 1);
      const auto grad_outs = rows_in(call.grad_out, head, 0, 1);
      for (int64_t i = 0; i < count; i++) {
        const int64_t token = query_tokens[i];
        const char *out = outs[token], *grad = grad_outs[token];
        take_row(grad, grads + i * words());
        vec sum{};
        for (int64_t c = 0; c < dim(); c += LANES) {
          const int64_t from = c * size_of(dtype());
          sum += load_numbers(dtype(), out + from, dim() - c) *
                 load_numbers(dtype(), grad + from, dim() - c);
        }
        totals[i] = sum_of(sum);
        tops[i] = call.norms[token * call.heads + head] * LOG2_E;
      }
      std::memset(grads + count * words(), 0, (rows - count) * words() * 4);
      for (int64_t i = count; i < rows; i++) totals[i] = 0, tops[i] = INFINITY;  // weights of 0
      if (PAIRS) pair_rows(queries, rows, query_pairs), pair_rows(grads, rows, grad_pairs);

      for (int64_t key = 0; key < members; key += KEYS) {
        const int64_t many = members - key < KEYS ? members - key : KEYS;
        tiles<WEIGHTS_TWICE>(key, many);
        prefetch(count * key / members, count * (key + many) / members, true);
        tiles<SLOPES>(key, many);
        add_gradients(grad_values, grad_pairs, weight_pairs, key, many, count, padded, first == 0);
        add_gradients(grad_keys, query_pairs, slope_pairs, key, many, count, padded, first == 0);
        for (int64_t i = 0; i < rows; i += ROWS)
          multiply_columns<HOW>(slope_words + i * depth(KEYS), depth(KEYS), 1,
                                keys + depth(key) * wide(), wide(), depth(in_tiles(many)),
                                attended + i * wide(), wide(), wide(), nullptr, key == 0);
      }
      const auto grad_queries = rows_in(call.grad_qkv, head, 0, 3);
      for (int64_t i = 0; i < count; i++)
        give_row(attended + i * wide(), call.scale, grad_queries[query_tokens[i]]);
    }
    if (TILES) {  // from channels as rows
      transpose(grad_keys, wide(), padded, raw);
      std::swap(grad_keys, raw);
      transpose(grad_values, wide(), padded, raw);
      std::swap(grad_values, raw);
    }
    const auto of_keys = rows_in(call.grad_qkv, head, 1, 3);
    const auto of_values = rows_in(call.grad_qkv, head, 2, 3);
    for (int64_t m = 0; m < members; m++) {
      give_row(grad_keys + m * wide(), PAIRS ? call.scale : LN_2, of_keys[tokens[m]]);
      give_row(grad_values + m * wide(), 1, of_values[tokens[m]]);
    }
  }

  int64_t first_group(int64_t task) const {
    return task / call.heads * call.groups() / call.chunks;
  }

  // One head of the groups of one chunk; the next task is that of this thread.
  void run(int64_t task, int64_t next, bool is_backward) {
    head = task % call.heads;
    flip_table();
    stripped = Strips{};
    if (is_backward) {
      grad_flipped = call.grad_parts + task * call.part;
      std::memset(grad_flipped, 0, call.part * 4);
    }
    const int64_t end = first_group(task + call.heads);
    for (int64_t group = first_group(task); group < end; group++) {
      if (group + 1 < end) start_group(group, group + 1, head);
      else start_group(group, next < call.tasks() ? first_group(next) : -1, next % call.heads);
      is_backward ? backward() : forward();
    }
    if (is_backward) change_strips(Strips{}, true);
  }
};

template <Product HOW, int D> void work(const Call &call, Arena &arena, std::atomic<int64_t> *next) {
  Kernel<HOW, D> kernel(call, arena, call.grad_out);
  if (!next) return;  // it was only about the size of the arena
#if HAS_TILES
  if (HOW == TILES_OF_PAIRS) begin_tiles();
#endif
  // The next turn is taken beforehand, to ask for its rows.
  for (int64_t task = next->fetch_add(call.in_turn), following; task < call.tasks(); task = following) {
    following = next->fetch_add(call.in_turn);
    const int64_t end = std::min(task + call.in_turn, call.tasks());
    for (; task < end; task++)
      kernel.run(task, task + 1 < end ? task + 1 : following, call.grad_out);
  }
#if HAS_TILES
  if (HOW == TILES_OF_PAIRS) end_tiles();
#endif
}

void work(const Call &call, Arena &arena, std::atomic<int64_t> *next) {
  const bool halves = call.dtype == BFLOAT16;
#if HAS_TILES
  if (halves && call.dim == ROWS) return work<TILES_OF_PAIRS, ROWS>(call, arena, next);
#endif
#ifdef OTHERS
  OTHERS(call, arena, next);
#else
  constexpr Product HALVES = HAS_PAIRS ? PAIRS_OF_HALVES : FLOATS;
  if (call.dim == 32)
    halves ? work<HALVES, 32>(call, arena, next) : work<FLOATS, 32>(call, arena, next);
  else
    halves ? work<HALVES, 0>(call, arena, next) : work<FLOATS, 0>(call, arena, next);
#endif
}

#ifdef EMULATED
#pragma pop_macro("UNROLL")
#endif
#undef HAS_LARGER
#undef HAS_POWERS
#undef HAS_PAIRS
#undef HAS_TILES
#undef EMULATED
#undef ZERO_TILE
#undef LOAD_TILE
#undef STORE_TILE
#undef ADD_PRODUCT
#undef OTHERS
