// Attention inside the groups of a map, forward and backward. Included once for each instruction set,
// in a namespace that has LANES, ROWS, vec, ints, halves, and where these macros are defined:
//     HAS_LARGER  larger
//     HAS_POWERS  above_whole, times_power: x - floor(x) and y * 2^floor(x), infinity on overflow
//     HAS_PAIRS   round_bf16, round_both, side_by_side, dot_pairs: numbers in bfloat16, of one vector
//                 or two, and words of both; products of two numbers at once
//     HAS_TILES   begin_tiles, end_tiles, and the macros ZERO_TILE, LOAD_TILE, STORE_TILE,
//                 ADD_PRODUCT: eight registers of LANES rows of LANES words of such pairs, or sums
//     EMULATED    PAIRS and TILES are emulated by the headers below
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
  // A group: its rows of numbers one after another (with PAIRS in bfloat16); panels of keys and values;
  // keys and values as words of a channel.
  float *raw = nullptr, *key_panels = nullptr, *value_panels = nullptr, *keys = nullptr,
        *values = nullptr, *grad_keys = nullptr, *grad_values = nullptr;
  // A block of queries: words along channels, and (PAIRS) along queries; results.
  float *queries = nullptr, *query_pairs = nullptr, *grads = nullptr, *grad_pairs = nullptr,
        *attended = nullptr, *row_max = nullptr, *totals = nullptr, *factors = nullptr;
  // Logits, overwritten by weights, and their gradients; (PAIRS) the words of both.
  float *weights = nullptr, *weight_pairs = nullptr, *ds = nullptr, *ds_words = nullptr,
        *ds_pairs = nullptr;
  // The head's table, and its strips.
  float *flipped = nullptr, *grad_flipped = nullptr, *strips = nullptr, *grad_strips = nullptr;
  int64_t *tokens = nullptr, *next_tokens = nullptr;  // of the group's members, row by row
  const float *bias[BLOCK];
  float *grad_bias[BLOCK];
  int64_t query_tokens[BLOCK];

  // The columns of a group that have strips, and the group's sides.
  struct Strips {
    int64_t first = 0, last = -1, rows = 1, columns = 1;
    INLINE bool has(int64_t column) const { return first <= column && column <= last; }
    INLINE bool is_like(const Strips &o) const { return rows == o.rows && columns == o.columns; }
    INLINE bool operator==(const Strips &o) const {
      return first == o.first && last == o.last && is_like(o);
    }
  } stripped;

  // The current group.
  int64_t group_rows, group_columns, members, next_members = 0, next_head;

  // The current block: its head, its queries, and their number padded to whole tiles.
  int64_t head, first_query = 0, queries_here = 0, query_rows;

  INLINE int64_t dim() const { return D ? D : call.dim; }
  INLINE int64_t wide() const { return (dim() + LANES - 1) / LANES * LANES; }
  INLINE int64_t words() const { return PAIRS ? wide() / 2 : wide(); }  // of a row
  static INLINE int64_t depth(int64_t numbers) { return PAIRS ? (numbers + 1) / 2 : numbers; }
  // A number of keys or queries padded for products; weights of the padding are zeros.
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

  // Rows of `part` of `parts` (q, k, v: 0, 1, 2 of 3).
  template <typename Byte>
  INLINE Rows<Byte> rows_in(Byte *array, int64_t head, int part, int parts) const {
    return {array + (part * call.heads + head) * row_size(), parts * call.heads * row_size()};
  }

  // Converts a row of numbers in memory to words along channels, padded with zeros.
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

  // Interleaves rows in bfloat16 that are `apart` rows apart: a word has one channel of both.
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

  // Loads the queries of a block, padded with zeros. Without PAIRS they are multiplied with the scale of
  // the logits; with PAIRS that would round them.
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

  // Loads rows of keys (part 1) or values (2) of the group; returns their number with the padding.
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

  // Writes the tokens of a group's members, row by row, to `to`.
  void list_tokens(int64_t group, int64_t *to) const {
    const Run &rows = rows_of(group), &columns = columns_of(group);
    const int64_t image = group / (call.rows.size() * call.columns.size());
    for (int64_t y = 0; y < rows.count; y++) {
      const int64_t line = (image * call.height + rows.start + y * rows.step) * call.width;
      for (int64_t x = 0; x < columns.count; x++) *to++ = line + columns.start + x * columns.step;
    }
  }

  // Makes `group` the current group and `next`, of `head`, the next one; none if -1.
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

  // Prefetches rows of the next group and of the results, from `i` to `end` of a block: they are too far
  // apart in memory for the hardware's prefetcher.
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

  // Writes the head's table by offsets key - query, times log2(e).
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

  // Index of a column's strip; index in the table of its offsets to the first column of keys.
  static INLINE int64_t place(const Strips &of, int64_t column) {
    return column % most_strips(of.rows, of.columns) * strip_size(of.rows, of.columns);
  }

  INLINE int64_t offset(const Strips &of, int64_t column) const {
    return (call.largest_rows - of.rows) * across() + call.largest_columns - 1 - column;
  }

  // Sets tokens and biases of the queries from `first` on. Most blocks keep those of the last block.
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

  // The padding of the last tile repeats the last query.
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

  // Strips of the last block are kept: all of them for a group of one block with the same sides.
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

  // Adds the gradient of a strip to that of the table.
  void end_strip(const Strips &of, int64_t column) {
    float *to = grad_flipped + offset(of, column);
    const float *from = grad_strips + place(of, column);
    for (int64_t y = 0; y < 2 * of.rows - 1; y++, to += across(), from += of.columns) {
      int64_t x = 0;
      for (; x + LANES <= of.columns; x += LANES) store(to + x, load(to + x) + load(from + x));
      for (; x < of.columns; x++) to[x] += from[x];
    }
  }

  // Weight of a logit, rounded as its operand is: sums of rounded weights give a single key weight 1.
  static INLINE vec weight(vec logit) { return exp2<PAIRS ? OF_BFLOAT16 : OF_FLOATS>(logit); }

  // Weights as operands of products with the values.
  INLINE float *given() const { return PAIRS ? ds_words : weights; }

  // Stores weights of TILE keys or, at the end, LANES. With TILES a pair is LANES keys apart.
  static INLINE void give_weights(float *to, int64_t at, vec first, vec second) {
    if constexpr (PAIRS) {
      store(to + at / 2, TILES ? words_of(first, second) : round_both(first, second));
    } else {
      store(to + at, first);
      store(to + at + LANES, second);
    }
  }

  struct Place {  // of a tile of logits
    int64_t query, key;
    INLINE void go_on(int64_t members) {
      key += TILE;
      if (key >= members) key = 0, query += ROWS;
    }
  };

  int64_t first_group(int64_t task) const {
    return task / call.heads * call.groups() / call.chunks;
  }

  // In softmax.h. A tile has ROWS queries and COLUMNS registers of keys.
  template <int COLUMNS, Result RESULT>
  INLINE void multiply_tile(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first, int64_t key) const;
  template <int COLUMNS, Result RESULT>
  INLINE void give_weights_tile(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first, int64_t key,
      int64_t count);
  template <int COLUMNS, Result RESULT, bool IS_WHOLE>
  INLINE void give_weights_rows(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first, int64_t key,
      int64_t count);
  template <int COLUMNS>
  INLINE void give_ds_tile(vec (&x)[ROWS][COLUMNS], int64_t i0, int64_t first, int64_t key);
  template <int COLUMNS, Result RESULT>
  INLINE void give_tile(vec (&x)[ROWS][COLUMNS], int64_t i, int64_t first, int64_t key,
      int64_t count);
  template <int COLUMNS, Result RESULT>
  NOINLINE void tile(int64_t i, int64_t first, int64_t key, int64_t count);
  template <Result RESULT> INLINE void tiles(int64_t first, int64_t count);
  template <Result RESULT> NOINLINE void tiles_in_turn(int64_t first, int64_t count);
  INLINE float largest_logit(int64_t i, int64_t many);
  INLINE void update_row_max(int64_t many);
  INLINE vec weigh_row(int64_t i, int64_t many);
  template <bool SUBTRACTS_MAX> NOINLINE void attend();
  INLINE void attend_in_turn();
  INLINE bool add_lanes();

  // In passes.h.
  INLINE void give_block() const;
  inline void forward();
  INLINE void pair_rows(const float *rows, int64_t count, float *to) const;
  INLINE void add_gradients(float *sums, const float *pairs, const float *of_keys, int64_t key,
      int64_t many, int64_t count, int64_t padded, bool is_first) const;
  inline void backward();
  inline void run(int64_t task, int64_t next, bool is_backward);
};

#include "softmax.h"
#include "passes.h"

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
