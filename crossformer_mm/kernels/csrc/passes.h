// The forward and the backward pass of a group, and the tasks of a thread. A part of
// group_attention.h, which includes it once for each instruction set.

// Writes the output of a block's queries and the logarithms of their sums of exponentials.
template <Product HOW, int D>
void Kernel<HOW, D>::give_block() const {
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

template <Product HOW, int D>
void Kernel<HOW, D>::forward() {
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

// Writes a block of queries or of their gradients as pairs of rows, for `add_gradients`.
template <Product HOW, int D>
void Kernel<HOW, D>::pair_rows(const float *rows, int64_t count, float *to) const {
  interleave(rows, count, TILES ? raw : to);
  if (TILES) transpose(raw, count / 2, wide(), to);
}

// Adds, for `many` keys from `key` on, the products of weights and `grad_pairs` or of DS and
// `query_pairs` over the queries of a block: (members, channels) or, with TILES, (channels, padded).
template <Product HOW, int D>
void Kernel<HOW, D>::add_gradients(float *sums, const float *pairs, const float *of_keys,
    int64_t key, int64_t many, int64_t count, int64_t padded, bool is_first) const {
  if (TILES)
    return multiply_columns<HOW>(pairs, TILE, 1, of_keys, KEYS, depth(in_tiles(count)),
                                 sums + key, padded, many, nullptr, is_first);
  for (int64_t k = 0; k < many; k += ROWS)
    multiply_columns<HOW>(of_keys + k, 1, KEYS, pairs, wide(), depth(count),
                          sums + (key + k) * wide(), wide(), wide(), nullptr, is_first);
}

template <Product HOW, int D>
void Kernel<HOW, D>::backward() {
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

// Runs a task: one head of the groups of one chunk. `next` is this thread's next task.
template <Product HOW, int D>
void Kernel<HOW, D>::run(int64_t task, int64_t next, bool is_backward) {
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

template <Product HOW, int D> void work(const Call &call, Arena &arena, std::atomic<int64_t> *next) {
  Kernel<HOW, D> kernel(call, arena, call.grad_out);
  if (!next) return;  // it was only about the size of the arena
#if HAS_TILES
  if (HOW == TILES_OF_PAIRS) begin_tiles();
#endif
  // The next turn is taken in advance, to prefetch its rows.
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
