// The kernel's interface: instruction sets, and a call.
#pragma once

#include "common.h"

namespace native {

struct InstructionSet {
  const char *name;
  Work *work;
  bool supported;
};

// Best first.
const std::vector<InstructionSet> &instruction_sets();

typedef void Pool(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel

// Completes `call` and runs it on threads of `pool` or, without one, its own. False: no memory.
bool attend(Call &call, Work *work, Pool *pool, int threads);

}  // namespace native
