// The gradient of the weight of a convolution, from maps with channels last. Included after
// group_attention.h.
//
// A task is one row of the kernel, OUTS channels out and a part of the rows of the map; each has sums
// of its own. They are outer products of the channels out and in at every position, in rows of the map
// that stay in the second level cache.

struct WeightGradient {
  const WeightCall &call;
  const int64_t across = call.kernel[1], channels = call.channels, width = call.out_width;
  float *panels, *sums;  // (outs / ROWS, width, ROWS) of a row of grad_out; (outs, across, channels)

  WeightGradient(const WeightCall &call, Arena &arena) : call(call) {
    const int64_t outs = std::min(WeightCall::OUTS, call.out_channels) + ROWS;
    panels = arena.take(outs * width + ROWS);
    sums = arena.take(outs * across * channels);
  }

  // Copies `outs` channels of a row of grad_out; those of the last panel are padded with zeros.
  INLINE void take_row(const float *from, int64_t outs) const {
    for (int64_t x = 0; x < width; x++, from += call.out_channels) {
      float *to = panels + x * ROWS;
      int64_t o = 0;
      for (; o + ROWS <= outs; o += ROWS, to += width * ROWS) std::memcpy(to, from + o, ROWS * 4);
      for (int64_t i = 0; i < ROWS && o < outs; i++) to[i] = o + i < outs ? from[o + i] : 0;
    }
  }

  // Adds the products of the row of grad_out in `panels` and a row of the map.
  INLINE void add_row(const float *row, int64_t outs) const {
    const int64_t stride = call.stride[1];
    for (int64_t k = 0; k < across; k++) {
      // Positions out whose column in the map, x*stride + shift, is inside.
      const int64_t shift = k - call.padding[1];
      const int64_t first = shift < 0 ? (stride - 1 - shift) / stride : 0;
      const int64_t end = std::min(width, (call.width - 1 - shift + stride) / stride);
      if (first >= end) continue;
      const float *from = row + (first * stride + shift) * channels;
      for (int64_t c = 0; c < channels; c += TILE)
        for (int64_t o = 0; o < outs; o += ROWS)
          multiply_columns<FLOATS>(panels + o * width + first * ROWS, 1, ROWS, from + c,
                                   stride * channels, end - first,
                                   sums + (o * across + k) * channels + c, across * channels,
                                   std::min<int64_t>(TILE, channels - c), nullptr, false);
    }
  }

  void run(int64_t task) const {
    const int64_t k = task % call.kernel[0], block = task / call.kernel[0] % call.blocks();
    const int64_t part = task / call.kernel[0] / call.blocks(), parts = call.parts();
    const int64_t first = block * WeightCall::OUTS, size = across * channels;
    const int64_t outs = std::min(WeightCall::OUTS, call.out_channels - first);
    const int64_t rows = call.batch * call.out_height;
    std::memset(sums, 0, (outs + ROWS) * size * 4);
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
      const int64_t y = row % call.out_height * call.stride[0] - call.padding[0] + k;
      if (y < 0 || y >= call.height) continue;
      take_row(call.grad_out + row * width * call.out_channels + first, outs);
      add_row(call.x + (row / call.out_height * call.height + y) * call.width * channels, outs);
    }
    float *to = call.sums + ((part * call.out_channels + first) * call.kernel[0] + k) * size;
    for (int64_t o = 0; o < outs; o++, to += call.kernel[0] * size)
      std::memcpy(to, sums + o * size, size * 4);
  }
};

void compute_weight_gradient(const WeightCall &call, Arena &arena, std::atomic<int64_t> *next) {
  const WeightGradient gradient(call, arena);
  if (!next) return;  // it was only about the size of the arena
  for (int64_t task = (*next)++; task < call.tasks(); task = (*next)++) gradient.run(task);
}
