// The kernel, compiled for each instruction set, and the sets that this processor has. A part of
// dispatch.cpp.
#pragma once

#include "dispatch.h"

using namespace native;

namespace {

// The macros of an instruction set are defined before group_attention.h is included, which undefines
// them. The other kernels are in float32: sets that add only bfloat16 have no version of their own.

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
#include "group_attention.h"
}  // namespace avx512bf16
END_TARGET

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma")
namespace avx512 {
REGISTERS(16)
constexpr int ROWS = 8;
AVX512_FLOATS
#define HAS_LARGER
#define HAS_POWERS true
#include "group_attention.h"
#include "position_bias.h"
#include "weight_gradient.h"
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
#include "group_attention.h"
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
#include "group_attention.h"
#include "position_bias.h"
#include "weight_gradient.h"
}  // namespace avx2
END_TARGET

#endif

namespace generic {
REGISTERS(4)
constexpr int ROWS = 6;
#include "group_attention.h"
#include "position_bias.h"
#include "weight_gradient.h"
}  // namespace generic

#ifdef WITH_AMX
// The state of the tiles is large: Linux allocates it only for processes that ask for it.
bool may_use_amx() {
  unsigned a, b, c, d;
  constexpr unsigned TILES = 1u << 24, BFLOAT16_IN_TILES = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILES) || !(d & BFLOAT16_IN_TILES))
    return false;
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}
#endif

#define IN_FLOATS(set) set::compute_bias, set::compute_weight_gradient

// Best first. The last emulates AMX and AVX512_BF16, for tests.
std::vector<InstructionSet> find_instruction_sets() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  std::vector<InstructionSet> sets = {
      {"avx512bf16", avx512bf16::work, IN_FLOATS(avx512), bf16},
      {"avx512", avx512::work, IN_FLOATS(avx512), avx512},
      {"avx2", avx2::work, IN_FLOATS(avx2), avx2},
      {"generic", generic::work, IN_FLOATS(generic), true},
      {"emulated", work_emulated, IN_FLOATS(avx2), avx2}};
  // Intel's processors are slower with pairs of bfloat16 than with the same numbers as floats.
  if (__builtin_cpu_is("intel")) std::swap(sets[0], sets[1]);
#ifdef WITH_AMX
  sets.insert(sets.begin(), {"amx", amx::work, IN_FLOATS(avx512), bf16 && may_use_amx()});
#endif
  return sets;
#else
  return {{"generic", generic::work, IN_FLOATS(generic), true}};
#endif
}

}  // namespace
