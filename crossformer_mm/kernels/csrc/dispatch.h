// The kernel's interface: instruction sets, and a call.
#pragma once

#include "common.h"

namespace native {

struct InstructionSet {
  const char *name;
  Work<Call> *work;
  Work<BiasCall> *compute_bias;
  Work<WeightCall> *compute_weight_gradient;
  bool supported;
};

// Best first.
const std::vector<InstructionSet> &instruction_sets();

typedef void Pool(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel

// All complete `call` and run it on threads of `pool` or, without one, their own. False: no memory.
bool attend(Call &call, const InstructionSet &set, Pool *pool, int threads);
bool compute_bias(BiasCall &call, const InstructionSet &set, Pool *pool, int threads);
bool compute_weight_gradient(WeightCall &call, const InstructionSet &set, Pool *pool, int threads);

}  // namespace native
