// Compares the kernel with sums in double, without Python: for sanitizers, other compilers and other
// processors. Every supported instruction set, cases of all kinds, several threads.
//
//     g++ -std=c++17 -O1 -ffp-contract=fast -pthread native_driver.cpp
#include "../../crossformer_mm/kernels/csrc/emulated.cpp"
#include "../../crossformer_mm/kernels/csrc/dispatch.cpp"

#include <cstdio>

namespace {

struct Case {
  int64_t batch, height, width, heads, dim;
  Rule row, column;
  int64_t spare;
};

const Case CASES[] = {
    {1, 1, 1, 1, 1, {1, 1, 0}, {1, 1, 0}, 0},     {2, 14, 15, 2, 32, {7, 1, 0}, {7, 1, 0}, 0},
    {1, 9, 13, 1, 32, {7, 1, 4}, {7, 1, 4}, 1},   {1, 15, 17, 2, 5, {2, 8, 0}, {3, 8, 0}, 0},
    {2, 20, 11, 1, 48, {5, 2, 0}, {3, 2, 0}, 2},  {1, 15, 21, 1, 128, {15, 1, 0}, {21, 1, 0}, 0},
    {1, 1, 230, 1, 32, {1, 1, 0}, {230, 1, 0}, 0}, {1, 230, 1, 2, 17, {115, 2, 0}, {1, 1, 0}, 0}};

float random_number() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.f * 1.7f;
}

// To the numbers of a type and back, so that both sides see the same.
std::vector<char> narrow(DType dtype, std::vector<float> &numbers) {
  std::vector<char> memory(numbers.size() * size_of(dtype));
  for (size_t i = 0; i < numbers.size(); i++) {
    generic::vec x{};
    x[0] = numbers[i];
    generic::store_numbers(dtype, memory.data() + i * size_of(dtype), x, 1);
    numbers[i] = generic::load_numbers(dtype, memory.data() + i * size_of(dtype), 1)[0];
  }
  return memory;
}

double distance(const std::vector<double> &exact, DType dtype, const char *memory) {
  double error = 0, size = 1e-30;
  for (size_t i = 0; i < exact.size(); i++) {
    const double x = generic::load_numbers(dtype, memory + i * size_of(dtype), 1)[0];
    error += (x - exact[i]) * (x - exact[i]);
    size += exact[i] * exact[i];
  }
  return std::sqrt(error / size);
}

int run(const Case &c, DType dtype, const InstructionSet &set) {
  const int64_t tokens = c.batch * c.height * c.width, channels = c.heads * c.dim;
  Call call{};
  call.dtype = dtype, call.batch = c.batch, call.height = c.height, call.width = c.width;
  call.heads = c.heads, call.dim = c.dim, call.scale = 0.3f;
  call.row_rule = c.row, call.column_rule = c.column;
  call.table_rows = 2 * (longest(runs_of(c.height, c.row)) + c.spare) - 1;
  call.table_columns = 2 * (longest(runs_of(c.width, c.column)) + c.spare) - 1;
  const int64_t offsets = call.table_rows * call.table_columns;
  std::vector<float> qkv(tokens * 3 * channels), grad(tokens * channels), table(c.heads * offsets);
  for (auto *numbers : {&qkv, &grad, &table})
    for (float &x : *numbers) x = random_number();

  std::vector<char> qkv_memory = narrow(dtype, qkv), grad_memory = narrow(dtype, grad);
  std::vector<char> out(grad_memory.size()), grad_qkv(qkv_memory.size()), other(qkv_memory.size());
  std::vector<float> norms(tokens * c.heads), grad_table(table.size()), other_table(table.size());
  call.qkv = qkv_memory.data(), call.table = table.data();
  call.out = out.data(), call.norms = norms.data();
  if (!attend(call, set, nullptr, 2)) return 1;
  call.grad_out = grad_memory.data();
  for (int threads : {1, 3}) {
    call.grad_qkv = threads == 1 ? other.data() : grad_qkv.data();
    call.grad_table = threads == 1 ? other_table.data() : grad_table.data();
    if (!attend(call, set, nullptr, threads)) return 1;
  }
  if (other != grad_qkv ||
      std::memcmp(other_table.data(), grad_table.data(), table.size() * sizeof(float))) {
    std::printf("%s: not the same for one thread and three\n", set.name);
    return 1;
  }

  // Sums in double, written down as they are defined.
  std::vector<double> exact(tokens * channels), slopes(qkv.size()), table_slopes(table.size());
  for (int64_t b = 0; b < c.batch; b++)
    for (const Run &rows : call.rows)
      for (const Run &columns : call.columns) {
        const int64_t members = rows.count * columns.count;
        const auto token = [&](int64_t m) {
          return (b * c.height + rows.start + m / columns.count * rows.step) * c.width +
                 columns.start + m % columns.count * columns.step;
        };
        const auto at = [&](int64_t m, int64_t head, int part, int parts) {
          return ((token(m) * parts + part) * c.heads + head) * c.dim;
        };
        for (int64_t head = 0; head < c.heads; head++)
          for (int64_t q = 0; q < members; q++) {
            std::vector<double> weights(members), change(members);
            std::vector<int64_t> offset(members);
            double total = 0, mean = 0;
            for (int64_t k = 0; k < members; k++) {
              offset[k] = (head * call.table_rows + call.table_rows / 2 + q / columns.count -
                           k / columns.count) * call.table_columns + call.table_columns / 2 +
                          q % columns.count - k % columns.count;
              double logit = 0;
              for (int64_t i = 0; i < c.dim; i++)
                logit += static_cast<double>(qkv[at(q, head, 0, 3) + i]) * qkv[at(k, head, 1, 3) + i];
              total += weights[k] = std::exp(logit * call.scale + table[offset[k]]);
            }
            for (int64_t k = 0; k < members; k++) {
              weights[k] /= total;
              for (int64_t i = 0; i < c.dim; i++) {
                const double slope = grad[at(q, head, 0, 1) + i];
                exact[at(q, head, 0, 1) + i] += weights[k] * qkv[at(k, head, 2, 3) + i];
                slopes[at(k, head, 2, 3) + i] += weights[k] * slope;
                change[k] += slope * qkv[at(k, head, 2, 3) + i];
              }
              mean += weights[k] * change[k];
            }
            for (int64_t k = 0; k < members; k++) {
              const double slope = weights[k] * (change[k] - mean);
              table_slopes[offset[k]] += slope;
              for (int64_t i = 0; i < c.dim; i++) {
                slopes[at(q, head, 0, 3) + i] += slope * call.scale * qkv[at(k, head, 1, 3) + i];
                slopes[at(k, head, 1, 3) + i] += slope * call.scale * qkv[at(q, head, 0, 3) + i];
              }
            }
          }
      }
  const double errors[] = {
      distance(exact, dtype, out.data()), distance(slopes, dtype, grad_qkv.data()),
      distance(table_slopes, FLOAT32, reinterpret_cast<char *>(grad_table.data()))};
  const double limit = dtype == FLOAT32 ? 3e-6 : dtype == FLOAT16 ? 2e-3 : 8e-3;
  for (double error : errors)
    // A group of one has gradients of nothing but rounding.
    if (!(error < limit) && tokens > 1) {
      std::printf("%s, type %d, %d x %d: errors %g %g %g\n", set.name, dtype,
                  static_cast<int>(c.height), static_cast<int>(c.width), errors[0], errors[1],
                  errors[2]);
      return 1;
    }
  return 0;
}

// Only that threads change no bit, and what sanitizers see: values are compared in test_bias.py.
int run_bias(int64_t rows, int64_t columns, int64_t width, int64_t heads, bool residual,
             const InstructionSet &set) {
  BiasCall call{};
  call.rows = rows, call.columns = columns, call.width = width, call.heads = heads;
  call.residual = residual, call.eps = 1e-5f;
  std::vector<std::vector<float>> parameters;
  for (int i = 0; i < 14; i++) {
    const int64_t out = i > 11 ? heads : width, in = i == 0 ? 2 : i == 4 || i == 8 || i == 12 ? width : 1;
    parameters.emplace_back(out * in);
    for (float &x : parameters.back()) x = random_number();
    call.parameters[i] = parameters.back().data();
  }
  std::vector<float> grad(heads * rows * columns), tables[2], grads[2];
  for (float &x : grad) x = random_number();
  for (int i : {0, 1}) {
    tables[i].resize(grad.size()), grads[i].resize(call.numbers());
    call.table = tables[i].data(), call.grads = grads[i].data();
    call.grad_table = nullptr;
    if (!compute_bias(call, set, nullptr, 1 + 2 * i)) return 1;
    call.grad_table = grad.data();
    if (!compute_bias(call, set, nullptr, 1 + 2 * i)) return 1;
  }
  if (tables[0] == tables[1] && grads[0] == grads[1]) return 0;
  std::printf("%s: position bias: not the same for one thread and three\n", set.name);
  return 1;
}

// The same of the gradient of a convolution's weight: values are compared in test_convolution.py.
int run_weight_gradient(int64_t channels, int64_t outs, int64_t kernel, int64_t stride, int64_t padding,
                        const InstructionSet &set) {
  WeightCall call{};
  call.batch = 2, call.height = 9, call.width = 14, call.channels = channels, call.out_channels = outs;
  call.out_height = (call.height + 2 * padding - kernel) / stride + 1;
  call.out_width = (call.width + 2 * padding - kernel) / stride + 1;
  for (int i : {0, 1}) call.kernel[i] = kernel, call.stride[i] = stride, call.padding[i] = padding;
  std::vector<float> x(call.batch * call.height * call.width * channels);
  std::vector<float> grad_out(call.batch * call.out_height * call.out_width * outs), grads[2];
  for (auto *numbers : {&x, &grad_out})
    for (float &number : *numbers) number = random_number();
  call.x = x.data(), call.grad_out = grad_out.data();
  for (int i : {0, 1}) {
    grads[i].resize(call.numbers());
    call.grad_weight = grads[i].data();
    if (!compute_weight_gradient(call, set, nullptr, 1 + 2 * i)) return 1;
  }
  if (grads[0] == grads[1]) return 0;
  std::printf("%s: gradient of a weight: not the same for one thread and three\n", set.name);
  return 1;
}

}  // namespace

int main() {
  int failures = 0, count = 0;
  for (const InstructionSet &set : instruction_sets()) {
    if (!set.supported) continue;
    std::printf("%s\n", set.name);
    for (const Case &c : CASES)
      for (DType dtype : {FLOAT32, BFLOAT16, FLOAT16}) failures += run(c, dtype, set), count++;
    for (bool residual : {false, true}) {
      failures += run_bias(1, 1, 1, 1, residual, set), count++;
      failures += run_bias(17, 61, 12, 6, residual, set), count++;
      failures += run_bias(13, 25, 64, 5, residual, set), count++;
    }
  }
  for (const InstructionSet &set : instruction_sets()) {  // last: the limits above are for their draws
    if (!set.supported) continue;
    failures += run_weight_gradient(16, 13, 4, 2, 1, set), count++;
    failures += run_weight_gradient(48, 12, 8, 1, 2, set), count++;
    failures += run_weight_gradient(32, 100, 2, 2, 0, set), count++;
  }
  std::printf("%d of %d failed\n", failures, count);
  return failures ? 1 : 0;
}
