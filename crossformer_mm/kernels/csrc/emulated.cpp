// AVX512_BF16 and AMX emulated in AVX2, to be tested on any processor. An object of its own, because it
// takes as long to compile as all the rest.
#include "common.h"

#ifdef __x86_64__

using namespace native;

namespace {

BEGIN_TARGET("avx2,fma")
namespace emulated {
REGISTERS(16)
constexpr int ROWS = 32;
#define HAS_PAIRS true
#define HAS_TILES true
#define EMULATED
#include "group_attention.h"
}  // namespace emulated
END_TARGET

}  // namespace

void native::work_emulated(const Call &call, Arena &arena, std::atomic<int64_t> *next) {
  emulated::work(call, arena, next);
}

#endif
