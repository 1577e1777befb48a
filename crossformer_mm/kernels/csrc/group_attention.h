// Attention inside the groups of a map, forward and backward. Included once for each instruction set,
// in a namespace that has LANES, ROWS, vec, ints, halves, and where these macros are defined:
//     HAS_LARGER  larger
//     HAS_POWERS  above_whole, times_power: x - floor(x) and y * 2^floor(x), infinite if too large
//     HAS_PAIRS   round_bf16, round_both, side_by_side, dot_pairs: numbers in bfloat16, of one vector
//                 or two, and words of both; products of two numbers at once
//     HAS_TILES   begin_tiles, end_tiles, and the macros ZERO_TILE, LOAD_TILE, STORE_TILE,
//                 ADD_PRODUCT: eight registers of LANES rows of LANES words of such pairs, or sums
//     EMULATED    both of these in other instructions, which are here
//     OTHERS      the function for heads and types that tiles do not support
//
// A task is one head of some groups. Keys and values of a group are packed once. Products of BLOCK
// queries and KEYS keys give logits, which become weights (P) and are multiplied with the values, all
// in the first level cache. The backward pass recomputes the weights from the logarithms of the sums of
// exponentials; DS are the gradients of the logits.
//
// Softmax without max subtraction; rows outside 2^±64 are redone with it: weights are 2^logit, or
// 2^(logit - row_max), where row_max is the largest logit so far and earlier sums are rescaled to it.
//
// Queries are processed column by column of the group: the biases of all queries of one column are one
// strip of the table, of which each query reads a run as long as the group. The gradient of the table
// is summed in strips, too.
//
// The operands of products are words of 32 bits: floats or, with PAIRS, two numbers in bfloat16, whose
// products are added at once. TILES multiply whole tiles of such pairs: ROWS rows of words by as many
// words of TILE columns. They cannot transpose a row, so the gradients of keys and values are summed
// with channels as rows.

#ifdef EMULATED  // for tests: not unrolled, to compile faster
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
enum Result { LOGITS, P, P_AND_P_PAIRS, DS };  // of a tile
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

#include "vectors.h"
#include "tiles.h"
#include "products.h"

// D: the number of channels of a head, or 0 for any.
template <Product HOW, int D> struct Kernel {
  static constexpr bool PAIRS = HOW != FLOATS, TILES = HOW == TILES_OF_PAIRS;
  static_assert(!TILES || (D == ROWS && TILE == ROWS && BLOCK / 2 <= TILE), "whole tiles");

  const Call &call;
  // Of a group, its rows of numbers one after another (with PAIRS in bfloat16); panels of keys and
  // values; keys and values as words of a channel.
  float *raw = nullptr, *key_panels = nullptr, *value_panels = nullptr, *keys = nullptr,
        *values = nullptr, *grad_keys = nullptr, *grad_values = nullptr;
  // Of a block of queries: words along channels, and (PAIRS) along queries; results.
  float *queries = nullptr, *query_pairs = nullptr, *grads = nullptr, *grad_pairs = nullptr,
        *attended = nullptr, *row_max = nullptr, *totals = nullptr, *factors = nullptr;
  // Logits that become weights, their gradients; (PAIRS) the words of both.
  float *weights = nullptr, *weight_pairs = nullptr, *ds = nullptr, *ds_words = nullptr,
        *ds_pairs = nullptr;
  // The head's table, and its strips.
  float *flipped = nullptr, *grad_flipped = nullptr, *strips = nullptr, *grad_strips = nullptr;
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
    row_max = arena.take(BLOCK);
    totals = arena.take(BLOCK * LANES);
    factors = arena.take(BLOCK);
    weights = arena.take(BLOCK * KEYS);
    ds_words = arena.take(PAIRS ? BLOCK * KEYS / 2 : 0);
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
    ds = PAIRS ? weights : arena.take(BLOCK * KEYS);
    weight_pairs = PAIRS ? arena.take(BLOCK * KEYS / 2) : weights;
    ds_pairs = PAIRS ? arena.take(BLOCK * KEYS / 2) : ds;
    if (!PAIRS) ds_words = ds;
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

  // Products of queries and keys or, for ds, of gradients and values.
  template <int COLUMNS, Result RESULT>
  INLINE void multiply_tile(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first, int64_t key) const {
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

  // Of a logit. Sums are of what is multiplied with the values, so that one key has all the weight.
  static INLINE vec weight(vec logit) { return exp2<PAIRS ? OF_BFLOAT16 : OF_FLOATS>(logit); }

  // Weights as they are multiplied with the values.
  INLINE float *given() const { return PAIRS ? ds_words : weights; }

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
  INLINE void give_ds_tile(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first, int64_t key) {
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

  template <int COLUMNS, Result RESULT>
  INLINE void give_tile(vec (&x)[ROWS][COLUMNS], int64_t i, int64_t first, int64_t key,
                        int64_t count) {
    if constexpr (RESULT == DS) give_ds_tile<COLUMNS>(x, i, first, key);
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
  INLINE float largest_logit(int64_t i, int64_t many) {
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

  // Updates `row_max` with these logits. `factors` rescale earlier sums to it. No row waits for the result
  // of another.
  INLINE void update_row_max(int64_t many) {
    for (int64_t i = 0; i < queries_here; i++) {
      const float before = row_max[i], largest = largest_logit(i, many);
      row_max[i] = largest > before ? largest : before;
      factors[i] = before - row_max[i];
    }
    for (int64_t i = 0; i < queries_here; i += LANES) store(factors + i, exp2(load(factors + i)));
  }

  // Logits of a query to weights; returns their sums by lane.
  INLINE vec weigh_row(int64_t i, int64_t many) {
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
  template <bool SUBTRACTS_MAX> NOINLINE void attend() {
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

  // Adds the sums of weights by lane up. Returns whether floats are exact without max subtraction, for
  // values up to 2^63.
  INLINE bool add_lanes() {
    bool fits = true;
    for (int64_t i = 0; i < queries_here; i++) {
      const float total = totals[i] = sum_of(load(totals + i * LANES));
      fits = fits && total > 0x1p-64f && total < 0x1p64f;
    }
    return fits;
  }

  // Writes the output of a block's queries and the logarithms of their sums of exponentials.
  INLINE void give_block() const {
    for (int64_t i = 0; i < queries_here; i += LANES) {
      const vec total = load(totals + i);
      store(factors + i, all(1) / total);
      store(totals + i, (load(row_max + i) + log2(total)) * all(LN_2));
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
  // or of their ds by `query_pairs`, (members, channels) or (channels, padded).
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
        row_max[i] = call.norms[token * call.heads + head] * LOG2_E;
      }
      std::memset(grads + count * words(), 0, (rows - count) * words() * 4);
      for (int64_t i = count; i < rows; i++) totals[i] = 0, row_max[i] = INFINITY;  // weights of 0
      if (PAIRS) pair_rows(queries, rows, query_pairs), pair_rows(grads, rows, grad_pairs);

      for (int64_t key = 0; key < members; key += KEYS) {
        const int64_t many = members - key < KEYS ? members - key : KEYS;
        tiles<P_AND_P_PAIRS>(key, many);
        prefetch(count * key / members, count * (key + many) / members, true);
        tiles<DS>(key, many);
        add_gradients(grad_values, grad_pairs, weight_pairs, key, many, count, padded, first == 0);
        add_gradients(grad_keys, query_pairs, ds_pairs, key, many, count, padded, first == 0);
        for (int64_t i = 0; i < rows; i += ROWS)
          multiply_columns<HOW>(ds_words + i * depth(KEYS), depth(KEYS), 1,
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
