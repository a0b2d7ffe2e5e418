// The only file that speaks to torch's dispatcher. Operators are defined in Python (fastwm/ops), so that they
// exist, and run on their references, where this library does not; here their CPU kernels are added.
#include "cpu_features.h"
#include "lambda_return.h"

#include <torch/csrc/stable/library.h>

namespace {

int64_t cpu_isa() {
  return static_cast<int64_t>(fastwm::cpu_isa());
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastwm, m) {
  m.def("cpu_isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastwm, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("lambda_return", TORCH_BOX(&fastwm::lambda_return));
  m.impl("lambda_return_backward", TORCH_BOX(&fastwm::lambda_return_backward));
}
