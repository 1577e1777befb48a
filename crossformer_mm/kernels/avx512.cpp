// Attention inside groups in bfloat16, for processors with AVX512_BF16. See avx512.py.
//
// A task is one head of one group. Its keys and values are packed once, the way that the
// instruction for products of bfloat16 pairs wants them, and stay in the second level cache.
// Then QUERIES of its queries at a time have all their logits computed, exponentiated and
// multiplied with the values, in the first level cache: no weight ever reaches memory.
#include <Python.h>
#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>

// Compiled for any processor, run where supported() says so.
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512bf16")))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int HEAD_DIM = 32;
constexpr int PAIRS = HEAD_DIM / 2;  // of channels: 32 bits each, multiplied and added at once
constexpr int LANES = 16;            // of a register, in 32 bits
constexpr int KEYS = 2 * LANES;      // in a tile of logits
constexpr int QUERIES = 8;           // in a tile: 16 sums, enough to hide what a product takes

struct Segment {
  int64_t groups, heads, height, width, members, padded;  // padded: members in whole tiles

  Segment(int64_t groups, int64_t heads, int64_t height, int64_t width)
      : groups(groups), heads(heads), height(height), width(width), members(height * width),
        padded((members + KEYS - 1) / KEYS * KEYS) {}

  int64_t token() const { return heads * HEAD_DIM; }  // of the output; three times that of q k v
  int64_t offsets() const { return (2 * height - 1) * (2 * width - 1); }
};

// What one thread works in.
struct Scratch {
  uint32_t *keys;    // (padded / LANES, PAIRS, LANES): a pair of channels of 16 keys side by side
  uint32_t *values;  // (padded / 2, HEAD_DIM): a channel of two keys side by side
  float *logits;     // (QUERIES, stride)
  int64_t stride;    // room for a register that is written beyond the last of a row

  Scratch(char *memory, int64_t padded)
      : keys(reinterpret_cast<uint32_t *>(memory)), values(keys + padded * PAIRS),
        logits(reinterpret_cast<float *>(values + padded * PAIRS)), stride(padded + LANES) {}

  static int64_t bytes(int64_t padded) {
    return 4 * (2 * padded * PAIRS + QUERIES * (padded + LANES));  // a multiple of 64
  }
};

// Columns to rows: 16 registers of 16, in four steps that swap ever larger squares.
AVX512 inline void transpose(__m512i *rows) {
  for (int step = 1; step < LANES; step *= 2) {
    alignas(64) int32_t low[LANES], high[LANES];
    for (int lane = 0; lane < LANES; lane++) {
      low[lane] = lane & step ? LANES + (lane ^ step) : lane;
      high[lane] = lane & step ? LANES + lane : lane ^ step;
    }
    const __m512i to_low = _mm512_load_si512(low), to_high = _mm512_load_si512(high);
    for (int row = 0; row < LANES; row++) {
      if (row & step) continue;
      const __m512i one = rows[row], other = rows[row | step];
      rows[row] = _mm512_permutex2var_epi32(one, to_low, other);
      rows[row | step] = _mm512_permutex2var_epi32(one, to_high, other);
    }
  }
}

// Keys and values of a group, whose members are `stride` numbers apart; padded with zeros.
AVX512 void pack(const uint16_t *k, const uint16_t *v, int64_t stride, const Segment &segment,
                 const Scratch &scratch) {
  const __m512i zero = _mm512_setzero_si512();
  const auto row_of = [&](const uint16_t *x, int64_t row) AVX512 {
    return row < segment.members ? _mm512_loadu_si512(x + row * stride) : zero;
  };
  for (int64_t first = 0; first < segment.padded; first += LANES) {
    __m512i rows[LANES];
    for (int row = 0; row < LANES; row++) rows[row] = row_of(k, first + row);
    transpose(rows);
    for (int pair = 0; pair < PAIRS; pair++)
      _mm512_store_si512(scratch.keys + (first + pair) * LANES, rows[pair]);
  }
  alignas(64) uint16_t order[HEAD_DIM];
  for (int channel = 0; channel < LANES; channel++) {
    order[2 * channel] = channel;
    order[2 * channel + 1] = HEAD_DIM + channel;
  }
  const __m512i low = _mm512_load_si512(order);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(LANES));
  for (int64_t row = 0; row < segment.padded; row += 2) {
    const __m512i one = row_of(v, row), other = row_of(v, row + 1);
    uint32_t *pair = scratch.values + row / 2 * HEAD_DIM;
    _mm512_store_si512(pair, _mm512_permutex2var_epi16(one, low, other));
    _mm512_store_si512(pair + LANES, _mm512_permutex2var_epi16(one, high, other));
  }
}

// 2^x for x <= 0, to 3e-6 of itself: 2^floor(x) times the polynomial of least relative
// error for what is left, which lies in [0, 1). 0 for minus infinity, of which 0 is left.
AVX512 inline __m512 exp2(__m512 x) {
  const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = _mm512_set1_ps(0.01353417f);
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.05201146f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.24144275f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(0.69300383f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(1.0000026f));
  return _mm512_scalef_ps(y, x);
}

AVX512 inline __m512bh bf16_pairs(const uint32_t *packed) {
  return (__m512bh)_mm512_load_si512(packed);
}

AVX512 inline __m512bh everywhere(uint32_t pair) { return (__m512bh)_mm512_set1_epi32(pair); }

// The bias of a query towards all keys: rows of the table, whose offsets are key - query.
AVX512 void write_bias(const float *table, int64_t query, const Segment &segment, float *row) {
  const int64_t across = 2 * segment.width - 1;
  const float *from = table + (segment.height - 1 - query / segment.width) * across +
                      (segment.width - 1 - query % segment.width);
  float *to = row;
  for (int64_t y = 0; y < segment.height; y++, from += across, to += segment.width)
    for (int64_t x = 0; x < segment.width; x += LANES) {
      const int64_t left = segment.width - x;
      const __mmask16 inside = left < LANES ? (1u << left) - 1 : 0xffff;
      // Whole registers: the next ones overwrite what is too much.
      _mm512_storeu_ps(to + x, _mm512_maskz_loadu_ps(inside, from + x));
    }
  for (int64_t key = segment.members; key < segment.padded; key++) row[key] = -INFINITY;
}

// Attention of QUERIES queries from `first` on, fewer at the end of the group.
AVX512 void attend_tile(const uint16_t *q, int64_t first, const float *table, float scale,
                        const Segment &segment, const Scratch &scratch, uint16_t *out) {
  const int64_t stride = scratch.stride;
  alignas(64) uint32_t query[QUERIES][PAIRS];
  for (int i = 0; i < QUERIES; i++) {
    const int64_t member = first + i < segment.members ? first + i : segment.members - 1;
    _mm512_store_si512(query[i], _mm512_loadu_si512(q + member * 3 * segment.token()));
    write_bias(table, member, segment, scratch.logits + i * stride);
  }

  __m512 top[QUERIES];
  UNROLL for (int i = 0; i < QUERIES; i++) top[i] = _mm512_set1_ps(-INFINITY);
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t key = 0; key < segment.padded; key += KEYS) {
    const uint32_t *near = scratch.keys + key * PAIRS, *far = near + LANES * PAIRS;
    __m512 sums[QUERIES][2];
    UNROLL for (int i = 0; i < QUERIES; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    UNROLL for (int pair = 0; pair < PAIRS; pair++) {
      const __m512bh k0 = bf16_pairs(near + pair * LANES), k1 = bf16_pairs(far + pair * LANES);
      UNROLL for (int i = 0; i < QUERIES; i++) {
        const __m512bh both = everywhere(query[i][pair]);
        sums[i][0] = _mm512_dpbf16_ps(sums[i][0], k0, both);
        sums[i][1] = _mm512_dpbf16_ps(sums[i][1], k1, both);
      }
    }
    UNROLL for (int i = 0; i < QUERIES; i++) {
      float *at = scratch.logits + i * stride + key;
      const __m512 x0 = _mm512_fmadd_ps(sums[i][0], factor, _mm512_loadu_ps(at));
      const __m512 x1 = _mm512_fmadd_ps(sums[i][1], factor, _mm512_loadu_ps(at + LANES));
      _mm512_storeu_ps(at, x0);
      _mm512_storeu_ps(at + LANES, x1);
      top[i] = _mm512_max_ps(top[i], _mm512_max_ps(x0, x1));
    }
  }

  // Logits to weights in bfloat16, which take the first half of the row's place.
  const __m512 log2e = _mm512_set1_ps(1.44269504f);
  float total[QUERIES];
  for (int i = 0; i < QUERIES; i++) {
    const float *row = scratch.logits + i * stride;
    uint16_t *weights = reinterpret_cast<uint16_t *>(scratch.logits + i * stride);
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top[i]));
    const auto weight_at = [&](int64_t key) AVX512 {
      return exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + key), largest), log2e));
    };
    __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
    for (int64_t key = 0; key < segment.padded; key += KEYS) {
      const __m512 x0 = weight_at(key), x1 = weight_at(key + LANES);
      sum0 = _mm512_add_ps(sum0, x0);
      sum1 = _mm512_add_ps(sum1, x1);
      _mm512_storeu_si512(weights + key, (__m512i)_mm512_cvtne2ps_pbh(x1, x0));
    }
    total[i] = _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
  }

  __m512 sums[QUERIES][2];
  UNROLL for (int i = 0; i < QUERIES; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  const uint32_t *weights = reinterpret_cast<const uint32_t *>(scratch.logits);
  for (int64_t pair = 0; pair < segment.padded / 2; pair++) {
    const uint32_t *two = scratch.values + pair * HEAD_DIM;
    const __m512bh v0 = bf16_pairs(two), v1 = bf16_pairs(two + LANES);
    UNROLL for (int i = 0; i < QUERIES; i++) {
      const __m512bh both = everywhere(weights[i * stride + pair]);
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], v0, both);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], v1, both);
    }
  }
  for (int i = 0; i < QUERIES && first + i < segment.members; i++) {
    const __m512 one = _mm512_div_ps(_mm512_set1_ps(1.f), _mm512_set1_ps(total[i]));
    _mm512_storeu_si512(out + (first + i) * segment.token(),
                        (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(sums[i][1], one),
                                                     _mm512_mul_ps(sums[i][0], one)));
  }
}

AVX512 void attend_task(int64_t task, const uint16_t *qkv, const float *table, float scale,
                        const Segment &segment, const Scratch &scratch, uint16_t *out) {
  // All groups of a head one after another, while its table is in the cache.
  const int64_t head = task / segment.groups, group = task % segment.groups;
  const int64_t token = segment.token();
  const uint16_t *q = qkv + group * segment.members * 3 * token + head * HEAD_DIM;
  pack(q + token, q + 2 * token, 3 * token, segment, scratch);
  for (int64_t first = 0; first < segment.members; first += QUERIES)
    attend_tile(q, first, table + head * segment.offsets(), scale, segment, scratch,
                out + group * segment.members * token + head * HEAD_DIM);
}

bool attend(const uint16_t *qkv, uint16_t *out, const float *table, float scale, int threads,
            const Segment &segment) {
  const int64_t bytes = Scratch::bytes(segment.padded);
  char *memory = static_cast<char *>(std::aligned_alloc(64, threads * bytes));
  if (!memory) return false;
  const int64_t tasks = segment.groups * segment.heads;
  // Its threads are PyTorch's own, where both use the same OpenMP.
#pragma omp parallel num_threads(threads)
  {
    const Scratch scratch(memory + omp_get_thread_num() * bytes, segment.padded);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++)
      attend_task(task, qkv, table, scale, segment, scratch, out);
  }
  std::free(memory);
  return true;
}

PyObject *py_attend(PyObject *, PyObject *args) {
  unsigned long long qkv, out, table;
  long long groups, heads, height, width;
  float scale;
  int threads;
  if (!PyArg_ParseTuple(args, "KKKLLLLfi", &qkv, &out, &table, &groups, &heads, &height, &width,
                        &scale, &threads))
    return nullptr;
  bool done;
  Py_BEGIN_ALLOW_THREADS;
  done = attend(reinterpret_cast<const uint16_t *>(qkv), reinterpret_cast<uint16_t *>(out),
                reinterpret_cast<const float *>(table), scale, threads,
                Segment(groups, heads, height, width));
  Py_END_ALLOW_THREADS;
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject *py_supported(PyObject *, PyObject *) {
  __builtin_cpu_init();
  return PyBool_FromLong(__builtin_cpu_supports("avx512bf16") &&
                         __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq"));
}

PyMethodDef methods[] = {
    {"attend", py_attend, METH_VARARGS,
     "attend(qkv, out, table, groups, heads, height, width, scale, threads): addresses of "
     "contiguous arrays first."},
    {"supported", py_supported, METH_NOARGS, "Whether this processor has the instructions."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_avx512", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__avx512() { return PyModule_Create(&module); }
