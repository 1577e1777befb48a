// One call of a kernel: memory, threads, and the sums of gradients over tasks.
#include "dispatch.h"

#include "instruction_sets.h"

namespace {

template <class Calls> struct Team {
  const Calls &call;
  Work<Calls> *work;
  float *memory;
  int64_t floats;  // of each
  std::atomic<int64_t> next{0}, members{0};
};

// Flushes weights below 2^-126 to zero while it lives: subnormal floats are a hundred times as slow.
struct FlushedToZero {
#ifdef __x86_64__
  const unsigned before = _mm_getcsr();
  FlushedToZero() { _mm_setcsr(before | _MM_FLUSH_ZERO_ON); }
  ~FlushedToZero() { _mm_setcsr(before); }
#endif
};

template <class Calls> void join(void *data) {
  auto &team = *static_cast<Team<Calls> *>(data);
  Arena arena{team.memory + team.members++ * team.floats};
  const FlushedToZero flushed;
  team.work(team.call, arena, &team.next);
}

// Sums the parts of the table's gradient in a fixed order, each offset in its place.
void add_parts(const Call &call) {
  const int64_t rows = 2 * call.largest_rows - 1, across = 2 * call.largest_columns - 1;
  const int64_t size = call.table_rows * call.table_columns;
  std::memset(call.grad_table, 0, call.heads * size * 4);
  for (int64_t chunk = 0; chunk < call.chunks; chunk++)
    for (int64_t head = 0; head < call.heads; head++) {
      const float *part = call.grad_parts + (chunk * call.heads + head) * call.part;
      float *middle = call.grad_table + head * size +
                      call.table_rows / 2 * call.table_columns + call.table_columns / 2;
      for (int64_t y = 0; y < rows; y++)
        for (int64_t x = 0; x < across; x++)
          middle[(call.largest_rows - 1 - y) * call.table_columns + call.largest_columns - 1 - x] +=
              part[y * across + x];
    }
}

// Adds `count` arrays of `numbers` in a fixed order.
void add_up(const float *arrays, int64_t count, int64_t numbers, float *to) {
  std::memcpy(to, arrays, numbers * 4);
  for (int64_t array = 1; array < count; array++)
    for (int64_t i = 0; i < numbers; i++) to[i] += arrays[array * numbers + i];
}

struct Memory {  // aligned to lines of the cache
  float *floats;
  explicit Memory(int64_t count)
      : floats(static_cast<float *>(std::aligned_alloc(64, (count + 16) / 16 * 64))) {}
  ~Memory() { std::free(floats); }
};

// Runs all tasks. False: no memory.
template <class Calls>
bool run_on(Pool *pool, int threads, const Calls &call, Work<Calls> *work) {
  Arena size{nullptr};
  work(call, size, nullptr);
  const Memory memory(size.taken * threads);
  if (!memory.floats) return false;
  Team<Calls> team{call, work, memory.floats, size.taken};
  if (threads > 1 && pool) {
    pool(join<Calls>, &team, threads, 0);
    return true;
  }
  std::vector<std::thread> others;
  try {
    while (static_cast<int>(others.size()) + 1 < threads) others.emplace_back(join<Calls>, &team);
  } catch (const std::system_error &) {  // no more threads than these
  }
  join<Calls>(&team);
  for (std::thread &other : others) other.join();
  return true;
}

}  // namespace

const std::vector<InstructionSet> &native::instruction_sets() {
  static const std::vector<InstructionSet> sets = find_instruction_sets();
  return sets;
}

bool native::attend(Call &call, const InstructionSet &set, Pool *pool, int threads) {
  call.rows = runs_of(call.height, call.row_rule);
  call.columns = runs_of(call.width, call.column_rule);
  call.largest_rows = longest(call.rows);
  call.largest_columns = longest(call.columns);
  // Enough tasks to balance many threads, few enough parts of the table's gradient.
  constexpr int64_t TASKS = 256;
  call.chunks = std::min(call.groups(), (TASKS + call.heads - 1) / call.heads);
  call.part = (2 * call.largest_rows - 1) * (2 * call.largest_columns - 1);
  threads = static_cast<int>(std::min<int64_t>(threads, call.tasks()));
  if (threads < 1) return true;
  // Heads of the same groups are adjacent in memory and share cache lines: a thread takes several in
  // turn, but few enough to balance the threads.
  constexpr int64_t TURNS = 32;
  call.in_turn = std::clamp<int64_t>(call.tasks() / (TURNS * threads), 1, call.heads);

  const Memory parts(call.grad_out ? call.tasks() * call.part : 0);
  if (!parts.floats) return false;
  call.grad_parts = parts.floats;
  if (!run_on(pool, threads, call, set.work)) return false;
  if (call.grad_out) add_parts(call);
  return true;
}

bool native::compute_bias(BiasCall &call, const InstructionSet &set, Pool *pool, int threads) {
  threads = static_cast<int>(std::min<int64_t>(threads, call.tasks()));
  const Memory sums(call.grad_table ? call.tasks() * call.numbers() : 0);
  if (!sums.floats) return false;
  call.sums = sums.floats;
  if (!run_on(pool, threads, call, set.compute_bias)) return false;
  if (call.grad_table) add_up(call.sums, call.tasks(), call.numbers(), call.grads);
  return true;
}

bool native::compute_weight_gradient(WeightCall &call, const InstructionSet &set, Pool *pool,
                                     int threads) {
  threads = static_cast<int>(std::min<int64_t>(threads, call.tasks()));
  const bool is_one = call.parts() == 1;
  const Memory sums(is_one ? 0 : call.parts() * call.numbers());
  if (!sums.floats) return false;
  call.sums = is_one ? call.grad_weight : sums.floats;
  if (!run_on(pool, threads, call, set.compute_weight_gradient)) return false;
  if (!is_one) add_up(call.sums, call.parts(), call.numbers(), call.grad_weight);
  return true;
}
