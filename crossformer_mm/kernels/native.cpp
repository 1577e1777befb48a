// Attention inside the groups of a map, forward and backward, for any processor. See native.py;
// the kernel itself is in native_kernel.h, compiled here for each instruction set.
#ifndef WITHOUT_PYTHON  // for tests/native_driver.cpp
#include <Python.h>
#endif

#include "native_common.h"

using namespace native;

namespace {

// What an instruction set has besides vectors is defined before the kernel is included, which
// undefines it.

#ifdef __x86_64__

#define AVX512_FLOATS                                                                           \
  INLINE vec larger(vec x, vec y) { return (vec)_mm512_max_ps((__m512)x, (__m512)y); }          \
  INLINE vec above_whole(vec x) { return (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_FLOOR); }  \
  INLINE vec times_power(vec y, vec x) { return (vec)_mm512_scalef_ps((__m512)y, (__m512)x); }
#define AVX512_PAIRS                                                                 \
  INLINE halves round_bf16(vec x) { return (halves)_mm512_cvtneps_pbh((__m512)x); }  \
  INLINE vec round_both(vec x, vec y) {                                              \
    return (vec)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);                           \
  }                                                                                  \
  INLINE vec side_by_side(vec both) {                                                \
    const __m512i order = _mm512_set_epi16(                                          \
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,  \
        21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);                                   \
    return (vec)_mm512_permutexvar_epi16(order, (__m512i)both);                      \
  }                                                                                  \
  INLINE vec dot_pairs(vec x, vec y, vec sum) {                                      \
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);             \
  }

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16")
namespace avx512bf16 {
REGISTERS(16)
constexpr int ROWS = 8;
AVX512_PAIRS
AVX512_FLOATS
#define HAS_LARGER
#define HAS_POWERS true
#define HAS_PAIRS true
#include "native_kernel.h"
}  // namespace avx512bf16
END_TARGET

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma")
namespace avx512 {
REGISTERS(16)
constexpr int ROWS = 8;
AVX512_FLOATS
#define HAS_LARGER
#define HAS_POWERS true
#include "native_kernel.h"
}  // namespace avx512
END_TARGET

#ifdef WITH_AMX
BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16,amx-tile,amx-bf16")
namespace amx {
REGISTERS(16)
constexpr int ROWS = 32;
AVX512_PAIRS
AVX512_FLOATS

// Eight tiles of 16 rows of 64 bytes.
INLINE void begin_tiles() {
  struct alignas(64) {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } shape{};
  shape.palette = 1;
  for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
  _tile_loadconfig(&shape);
}

INLINE void end_tiles() { _tile_release(); }

#define ZERO_TILE(tile) _tile_zero(tile)
#define LOAD_TILE(tile, from, step) _tile_loadd(tile, from, (step) * 4)
#define STORE_TILE(tile, to, step) _tile_stored(tile, to, (step) * 4)
#define ADD_PRODUCT(c, a, b) _tile_dpbf16ps(c, a, b)
#define HAS_LARGER
#define HAS_POWERS true
#define HAS_PAIRS true
#define HAS_TILES true
#define OTHERS avx512::work  // heads of other sizes, other types
#include "native_kernel.h"
}  // namespace amx
END_TARGET
#endif

BEGIN_TARGET("avx2,fma")
namespace avx2 {
REGISTERS(8)
constexpr int ROWS = 6;
INLINE vec larger(vec x, vec y) { return (vec)_mm256_max_ps((__m256)x, (__m256)y); }
INLINE vec smaller(vec x, vec y) { return (vec)_mm256_min_ps((__m256)x, (__m256)y); }
#define HAS_LARGER
#include "native_kernel.h"
}  // namespace avx2
END_TARGET

#endif

namespace generic {
REGISTERS(4)
constexpr int ROWS = 6;
#include "native_kernel.h"
}  // namespace generic

struct InstructionSet {
  const char *name;
  Work *work;
  bool supported;
};

#ifdef WITH_AMX
// The tiles' state is so large that Linux gives it to those processes alone that ask for it.
bool may_use_amx() {
  unsigned a, b, c, d;
  constexpr unsigned TILES = 1u << 24, BFLOAT16_IN_TILES = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILES) || !(d & BFLOAT16_IN_TILES))
    return false;
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}
#endif

// Best first. The last is that of AMX and AVX512_BF16 in other instructions, to be tested without.
std::vector<InstructionSet> find_instruction_sets() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  std::vector<InstructionSet> sets = {{"avx512bf16", avx512bf16::work, bf16},
                                      {"avx512", avx512::work, avx512},
                                      {"avx2", avx2::work, avx2},
                                      {"generic", generic::work, true},
                                      {"avx2_wide", work_avx2_wide, avx2}};
  // Intel's take longer for pairs of bfloat16 than for the same numbers as floats.
  if (__builtin_cpu_is("intel")) std::swap(sets[0], sets[1]);
#ifdef WITH_AMX
  sets.insert(sets.begin(), {"amx", amx::work, bf16 && may_use_amx()});
#endif
  return sets;
#else
  return {{"generic", generic::work, true}};
#endif
}

const std::vector<InstructionSet> &instruction_sets() {
  static const std::vector<InstructionSet> sets = find_instruction_sets();
  return sets;
}

struct Team {
  const Call &call;
  Work *work;
  float *memory;
  int64_t floats;  // of each
  std::atomic<int64_t> next{0}, members{0};
};

// Weights below 2^-126 are zeros to the processor while one of these lives: those that are not
// normal floats take it a hundred times as long.
struct FlushedToZero {
#ifdef __x86_64__
  const unsigned before = _mm_getcsr();
  FlushedToZero() { _mm_setcsr(before | _MM_FLUSH_ZERO_ON); }
  ~FlushedToZero() { _mm_setcsr(before); }
#endif
};

extern "C" void join(void *data) {
  Team &team = *static_cast<Team *>(data);
  Arena arena{team.memory + team.members++ * team.floats};
  const FlushedToZero flushed;
  team.work(team.call, arena, &team.next);
}

typedef void Pool(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel

void run_on(Pool *pool, int threads, Team &team) {
  if (threads == 1) return join(&team);
  if (pool) return pool(join, &team, threads, 0);
  std::vector<std::thread> others;
  try {
    while (static_cast<int>(others.size()) + 1 < threads) others.emplace_back(join, &team);
  } catch (const std::system_error &) {  // no more threads than these
  }
  join(&team);
  for (std::thread &other : others) other.join();
}

// The parts of the table's gradient, in one order, and each offset where it belongs.
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

struct Memory {  // aligned to lines of the cache
  float *floats;
  explicit Memory(int64_t count)
      : floats(static_cast<float *>(std::aligned_alloc(64, (count + 16) / 16 * 64))) {}
  ~Memory() { std::free(floats); }
};

bool attend(Call &call, Work *work, Pool *pool, int threads) {
  call.largest_rows = longest(call.rows);
  call.largest_columns = longest(call.columns);
  // Enough tasks for many threads and an even end, few enough parts of the table's gradient.
  constexpr int64_t TASKS = 256;
  call.chunks = std::min(call.groups(), (TASKS + call.heads - 1) / call.heads);
  call.part = (2 * call.largest_rows - 1) * (2 * call.largest_columns - 1);
  threads = static_cast<int>(std::min<int64_t>(threads, call.tasks()));
  if (threads < 1) return true;
  // Other heads of the same groups lie beside in memory, and are brought near with them: a thread
  // takes some in turn, but has turns enough for an even end.
  constexpr int64_t TURNS = 32;
  call.in_turn = std::clamp<int64_t>(call.tasks() / (TURNS * threads), 1, call.heads);

  Arena size{nullptr};
  work(call, size, nullptr);
  const Memory memory(size.taken * threads);
  const Memory parts(call.grad_out ? call.tasks() * call.part : 0);
  if (!memory.floats || !parts.floats) return false;
  call.grad_parts = parts.floats;
  Team team{call, work, memory.floats, size.taken};
  run_on(pool, threads, team);
  if (call.grad_out) add_parts(call);
  return true;
}

#ifndef WITHOUT_PYTHON

PyObject *py_attend(PyObject *, PyObject *args) {
  const char *name;
  unsigned long long pool, qkv, table, out, norms, grad_out, grad_qkv, grad_table;
  int threads, dtype;
  long long batch, height, width, heads, dim, table_rows, table_columns;
  long long row[3], column[3];
  float scale;
  if (!PyArg_ParseTuple(args, "sKiiKKKKKKKLLLLLLL(LLL)(LLL)f", &name, &pool, &threads, &dtype, &qkv,
                        &table, &out, &norms, &grad_out, &grad_qkv, &grad_table, &batch, &height,
                        &width, &heads, &dim, &table_rows, &table_columns, &row[0], &row[1],
                        &row[2], &column[0], &column[1], &column[2], &scale))
    return nullptr;
  Work *work = nullptr;
  for (const InstructionSet &set : instruction_sets())
    if (set.supported && !std::strcmp(set.name, name)) work = set.work;
  if (!work) return PyErr_Format(PyExc_ValueError, "instruction set %s is not supported", name);
  bool done;
  Py_BEGIN_ALLOW_THREADS;
  Call call{static_cast<DType>(dtype), batch, height, width, heads, dim, table_rows, table_columns,
            scale, reinterpret_cast<const char *>(qkv), reinterpret_cast<const float *>(table),
            reinterpret_cast<char *>(out), reinterpret_cast<float *>(norms),
            reinterpret_cast<const char *>(grad_out), reinterpret_cast<char *>(grad_qkv),
            reinterpret_cast<float *>(grad_table), runs_of(height, row[0], row[1], row[2]),
            runs_of(width, column[0], column[1], column[2])};
  done = attend(call, work, reinterpret_cast<Pool *>(pool), threads);
  Py_END_ALLOW_THREADS;
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject *py_supported(PyObject *, PyObject *) {
  PyObject *names = PyList_New(0);
  for (const InstructionSet &set : instruction_sets()) {
    PyObject *name = names && set.supported ? PyUnicode_FromString(set.name) : nullptr;
    if (name) PyList_Append(names, name);
    Py_XDECREF(name);
  }
  return names;
}

PyMethodDef methods[] = {
    {"attend", py_attend, METH_VARARGS,
     "attend(instructions, pool, threads, dtype, qkv, table, out, norms, grad_out, grad_qkv,\n"
     "grad_table, batch, height, width, heads, dim, table_rows, table_columns, rows, columns,\n"
     "scale): with addresses of contiguous arrays; those of gradients are 0 in the forward pass."},
    {"supported", py_supported, METH_NOARGS,
     "Names of the instruction sets that this processor has, best first."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

#endif

}  // namespace

#ifndef WITHOUT_PYTHON
PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
#endif
