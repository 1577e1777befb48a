// The network of the dynamic position bias, and the gradients of its parameters. Included after
// group_attention.h.
//
// A task is CHUNK offsets, OFFSETS at a time, which are the columns of all matrices. The backward pass
// computes the network again. Each task has sums of its own, which are added in their order.

constexpr int64_t OFFSETS = 64;
static_assert(OFFSETS % TILE == 0, "whole tiles");

INLINE int64_t whole(int64_t count, int64_t piece) { return (count + piece - 1) / piece * piece; }

struct BiasNetwork {
  // LayerNorm, ReLU and a linear layer.
  struct Layer {
    const float *gamma, *beta, *bias;
    int64_t out;
    float *weight;                   // a copy that may be read some rows too far
    float *normal, *hidden, *scale;  // normalised, input of the linear layer, 1 / deviations
    float *sums;                     // of the gradients of gamma; beta, weight and bias follow
    float *grad_weight;              // in whole tiles
  };

  const BiasCall &call;
  const int64_t width = call.width, columns = whole(width, TILE);
  Layer layers[3];
  float *row = nullptr, *column = nullptr;  // the offsets
  float *x = nullptr, *out = nullptr, *grad = nullptr, *before = nullptr, *panels = nullptr;

  BiasNetwork(const BiasCall &call, Arena &arena) : call(call) {
    const int64_t rows = std::max(columns, whole(call.heads, TILE)) + ROWS;
    for (float **matrix : {&x, &out, &grad, &before, &panels}) *matrix = arena.take(rows * OFFSETS);
    row = arena.take(OFFSETS), column = arena.take(OFFSETS);
    for (int i = 0; i < 3; i++) {
      Layer &layer = layers[i];
      const float *const *parameters = call.parameters + 2 + 4 * i;
      layer.gamma = parameters[0], layer.beta = parameters[1], layer.bias = parameters[3];
      layer.out = i < 2 ? width : call.heads;
      layer.weight = arena.take((layer.out + ROWS) * width + ROWS);
      layer.normal = arena.take(rows * OFFSETS), layer.hidden = arena.take(rows * OFFSETS);
      layer.scale = arena.take(OFFSETS);
      layer.grad_weight = arena.take((layer.out + ROWS) * columns);
      if (!arena.memory) continue;
      const int64_t numbers = layer.out * width;
      std::memset(layer.weight, 0, (numbers + ROWS * width + ROWS) * 4);
      std::memcpy(layer.weight, parameters[2], numbers * 4);
      std::memset(layer.hidden, 0, rows * OFFSETS * 4);
    }
  }

  // (width, OFFSETS) from x to (out, OFFSETS).
  INLINE void compute(const Layer &layer) {
    for (int64_t t = 0; t < OFFSETS; t += LANES) {
      vec mean{}, square{};
      for (int64_t c = 0; c < width; c++) mean += load(x + c * OFFSETS + t);
      mean /= all(width);
      for (int64_t c = 0; c < width; c++) {
        const vec centred = load(x + c * OFFSETS + t) - mean;
        square += centred * centred;
      }
      vec scale = square / all(width) + all(call.eps);
      for (int lane = 0; lane < LANES; lane++) scale[lane] = 1 / std::sqrt(scale[lane]);
      store(layer.scale + t, scale);
      for (int64_t c = 0; c < width; c++) {
        const vec normal = (load(x + c * OFFSETS + t) - mean) * scale;
        store(layer.normal + c * OFFSETS + t, normal);
        // In this order what is not a number stays.
        store(layer.hidden + c * OFFSETS + t,
              larger(vec{}, normal * all(layer.gamma[c]) + all(layer.beta[c])));
      }
    }
    for (int64_t o = 0; o < layer.out; o++) std::fill_n(out + o * OFFSETS, OFFSETS, layer.bias[o]);
    multiply_rows(layer.weight, width, 1, layer.hidden, width, out, layer.out);
  }

  // to[i] += sum of a[i*row + k*step] * b[k] for rows of OFFSETS numbers.
  INLINE static void multiply_rows(const float *a, int64_t row, int64_t step, const float *b,
                                   int64_t depth, float *to, int64_t count) {
    for (int64_t i = 0; i < count; i += ROWS)
      multiply_columns<FLOATS>(a + i * row, row, step, b, OFFSETS, depth, to + i * OFFSETS, OFFSETS,
                               OFFSETS, nullptr, false);
  }

  void forward(int64_t first, int64_t count) {
    for (int64_t t = 0; t < OFFSETS; t++) {
      row[t] = (first + t) / call.columns - call.rows / 2;
      column[t] = (first + t) % call.columns - call.columns / 2;
    }
    const float *weight = call.parameters[0], *bias = call.parameters[1];
    for (int64_t c = 0; c < width; c++)
      for (int64_t t = 0; t < OFFSETS; t += LANES)
        store(x + c * OFFSETS + t, load(row + t) * all(weight[2 * c]) +
                                       load(column + t) * all(weight[2 * c + 1]) + all(bias[c]));
    for (const Layer &layer : layers) {
      compute(layer);
      if (&layer == layers + 2) break;
      if (call.residual) add(out, x);
      std::swap(x, out);
    }
    if (call.grad_table) return;
    for (int64_t head = 0; head < call.heads; head++)
      std::memcpy(call.table + head * call.offsets() + first, out + head * OFFSETS, count * 4);
  }

  INLINE void add(float *to, const float *from) const {
    for (int64_t i = 0; i < width * OFFSETS; i += LANES) store(to + i, load(to + i) + load(from + i));
  }

  // From `grad`, of the output of a layer, to `before`, of its input.
  INLINE void differentiate(const Layer &layer) {
    float *gamma = layer.sums, *beta = gamma + width, *bias = beta + width + layer.out * width;
    for (int64_t o = 0; o < layer.out; o++) bias[o] += sum(grad + o * OFFSETS);
    transpose(layer.hidden, columns, OFFSETS, panels);
    for (int64_t j = 0; j < columns; j += TILE)
      for (int64_t o = 0; o < layer.out; o += ROWS)
        multiply_columns<FLOATS>(grad + o * OFFSETS, OFFSETS, 1, panels + j * OFFSETS, TILE, OFFSETS,
                                 layer.grad_weight + o * columns + j, columns, TILE, nullptr, false);
    std::memset(before, 0, width * OFFSETS * 4);
    multiply_rows(layer.weight, 1, width, grad, layer.out, before, width);
    for (int64_t c = 0; c < width; c++) {
      vec of_gamma{}, of_beta{};
      for (int64_t t = c * OFFSETS; t < (c + 1) * OFFSETS; t += LANES) {
        const vec slope = load(layer.hidden + t) <= vec{} ? vec{} : load(before + t);
        of_gamma += slope * load(layer.normal + t);
        of_beta += slope;
        store(before + t, slope * all(layer.gamma[c]));
      }
      gamma[c] += sum_of(of_gamma);
      beta[c] += sum_of(of_beta);
    }
    for (int64_t t = 0; t < OFFSETS; t += LANES) {
      vec mean{}, along{};
      for (int64_t c = t; c < width * OFFSETS; c += OFFSETS) {
        mean += load(before + c);
        along += load(before + c) * load(layer.normal + c);
      }
      mean /= all(width);
      along /= all(width);
      for (int64_t c = t; c < width * OFFSETS; c += OFFSETS)
        store(before + c, (load(before + c) - mean - load(layer.normal + c) * along) *
                              load(layer.scale + t));
    }
  }

  static INLINE float sum(const float *numbers) {
    vec total{};
    for (int64_t t = 0; t < OFFSETS; t += LANES) total += load(numbers + t);
    return sum_of(total);
  }

  static INLINE float sum_of_products(const float *a, const float *b) {
    vec total{};
    for (int64_t t = 0; t < OFFSETS; t += LANES) total += load(a + t) * load(b + t);
    return sum_of(total);
  }

  void backward(int64_t first, int64_t count, float *sums) {
    std::memset(grad, 0, call.heads * OFFSETS * 4);
    for (int64_t head = 0; head < call.heads; head++)
      std::memcpy(grad + head * OFFSETS, call.grad_table + head * call.offsets() + first, count * 4);
    for (int i = 2; i >= 0; i--) {
      differentiate(layers[i]);
      if (call.residual && i < 2) add(before, grad);
      std::swap(grad, before);
    }
    for (int64_t c = 0; c < width; c++) {
      sums[2 * c] += sum_of_products(grad + c * OFFSETS, row);
      sums[2 * c + 1] += sum_of_products(grad + c * OFFSETS, column);
      sums[2 * width + c] += sum(grad + c * OFFSETS);
    }
  }

  void run(int64_t task) {
    float *sums = nullptr;
    if (call.grad_table) {
      sums = call.sums + task * call.numbers();
      std::memset(sums, 0, call.numbers() * 4);
      float *at = sums + 3 * width;
      for (Layer &layer : layers) {
        layer.sums = at;
        at += (2 + layer.out) * width + layer.out;
        std::memset(layer.grad_weight, 0, (layer.out + ROWS) * columns * 4);
      }
    }
    const int64_t end = std::min((task + 1) * BiasCall::CHUNK, call.offsets());
    for (int64_t first = task * BiasCall::CHUNK; first < end; first += OFFSETS) {
      forward(first, std::min(OFFSETS, end - first));
      if (sums) backward(first, std::min(OFFSETS, end - first), sums);
    }
    if (!sums) return;
    for (const Layer &layer : layers)
      for (int64_t o = 0; o < layer.out; o++)
        std::memcpy(layer.sums + (2 + o) * width, layer.grad_weight + o * columns, width * 4);
  }
};

void compute_bias(const BiasCall &call, Arena &arena, std::atomic<int64_t> *next) {
  BiasNetwork network(call, arena);
  if (!next) return;  // it was only about the size of the arena
  for (int64_t task = (*next)++; task < call.tasks(); task = (*next)++) network.run(task);
}
