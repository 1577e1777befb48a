// Shared by all objects of the kernel: compiler directives, and the call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#if defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define WITH_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

#ifdef __clang__
#pragma clang diagnostic ignored "-Wpsabi"  // no vector is handed to another object file
#define UNROLL _Pragma("clang loop unroll(full)")
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define TARGET_TEXT(text) _Pragma(#text)
#define BEGIN_TARGET(features) \
  TARGET_TEXT(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (quad_ints){__VA_ARGS__})
#define TARGET_TEXT(text) _Pragma(#text)
#define BEGIN_TARGET(features) _Pragma("GCC push_options") TARGET_TEXT(GCC target(features))
#define END_TARGET _Pragma("GCC pop_options")
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// The types of an instruction set with registers of LANES floats.
#define REGISTERS(lanes)                                                \
  constexpr int LANES = lanes;                                          \
  typedef float vec __attribute__((vector_size(4 * lanes)));            \
  typedef int32_t ints __attribute__((vector_size(4 * lanes)));         \
  typedef uint16_t halves __attribute__((vector_size(2 * lanes)));

namespace native {

typedef float quad __attribute__((vector_size(16)));
typedef int32_t quad_ints __attribute__((vector_size(16)));

enum DType : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

INLINE int64_t size_of(DType dtype) { return dtype == FLOAT32 ? 4 : 2; }

// A group of one axis: `count` positions, `step` apart.
struct Run {
  int64_t start, step, count;
};

// AxisRule of grouping.py.
struct Rule {
  int64_t size, interval, lead;
};

// The groups of an axis of `length` positions.
inline std::vector<Run> runs_of(int64_t length, const Rule &rule) {
  const int64_t interval = std::min(rule.interval, length), lead = rule.lead;
  const int64_t size = std::min(rule.size, (length + interval - 1) / interval);
  std::vector<Run> runs;
  int64_t start = 0;
  if (lead) {
    start = std::min(size - lead, length);
    runs.push_back({0, 1, start});
  }
  for (; start < length; start += size * interval) {
    const int64_t tile = std::min(size * interval, length - start);
    for (int64_t i = 0; i < std::min(interval, tile); i++)
      runs.push_back({start + i, interval, (tile - i + interval - 1) / interval});
  }
  return runs;
}

inline int64_t longest(const std::vector<Run> &runs) {
  int64_t count = 0;
  for (const Run &run : runs) count = std::max(count, run.count);
  return count;
}

// What native.py passes, in the same order. Arrays are contiguous.
struct Arguments {
  DType dtype;
  int64_t batch, height, width, heads, dim, table_rows, table_columns;
  Rule row_rule, column_rule;
  const char *qkv;
  const float *table;
  char *out;
  float *norms;
  const char *grad_out;  // none: forward
  char *grad_qkv;
  float *grad_table;
  float scale;
};

struct Call : Arguments {
  std::vector<Run> rows, columns;

  // The partition does not depend on the number of threads, so that sums do not, either.
  int64_t largest_rows, largest_columns, chunks, part;
  float *grad_parts;  // (chunks, heads, part): the table's gradient, flipped
  int64_t in_turn;    // how many tasks a thread takes at once

  int64_t groups() const { return batch * rows.size() * columns.size(); }
  int64_t tasks() const { return heads * chunks; }
};

// Allocates pieces of memory, or only counts them.
struct Arena {
  float *memory;
  int64_t taken = 0;

  float *take(int64_t floats) {
    float *piece = memory ? memory + taken : nullptr;
    taken += (floats + 15) / 16 * 16;
    return piece;
  }
};

// The dynamic position bias: what bias_native.py passes, in the same order.
struct BiasArguments {
  int64_t rows, columns, width, heads, residual;
  const float *parameters[14];  // in their order
  float *table;
  const float *grad_table;  // none: forward
  float *grads;             // of all parameters, one after another
  float eps;
};

struct BiasCall : BiasArguments {
  static constexpr int64_t CHUNK = 256;  // offsets of a task
  float *sums;                           // (tasks, numbers): the gradients from each

  int64_t offsets() const { return rows * columns; }
  int64_t tasks() const { return (offsets() + CHUNK - 1) / CHUNK; }
  int64_t numbers() const { return width * (2 * width + heads + 11) + heads; }  // of the parameters
};

// The gradient of a convolution's weight: what convolution_native.py passes, in the same order. Pairs
// are along rows and columns; arrays have channels last.
struct WeightArguments {
  int64_t batch, height, width, channels, out_height, out_width, out_channels;
  int64_t kernel[2], stride[2], padding[2];
  const float *x, *grad_out;
  float *grad_weight;  // (out_channels, kernel, channels)
};

struct WeightCall : WeightArguments {
  static constexpr int64_t OUTS = 48;   // channels out of a task
  static constexpr int64_t TASKS = 16;  // at least, for few threads to share evenly
  float *sums;                          // (parts of the rows, numbers): the gradients from each

  int64_t blocks() const { return (out_channels + OUTS - 1) / OUTS; }
  int64_t parts() const {
    const int64_t tasks = blocks() * kernel[0];
    return (TASKS + tasks - 1) / tasks;
  }
  int64_t tasks() const { return parts() * blocks() * kernel[0]; }
  int64_t numbers() const { return out_channels * kernel[0] * kernel[1] * channels; }
};

// Takes tasks from the counter, which threads share; without one, only counts the memory.
template <class Calls> using Work = void(const Calls &, Arena &, std::atomic<int64_t> *);

#ifdef __x86_64__
Work<Call> work_emulated;  // in emulated.cpp
#endif

}  // namespace native
