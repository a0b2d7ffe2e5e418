// The only file that speaks to torch's dispatcher. Operators are defined in Python (fastwm/ops), so that they
// exist, and run on their references, where this library does not; here their CPU kernels are added.
#include "balanced_kl.h"
#include "cpu_features.h"
#include "gae.h"
#include "gaussian_nll.h"
#include "lambda_return.h"
#include "loss_op.h"
#include "row_program.h"
#include "sub_losses.h"
#include "two_hot_cross_entropy.h"

#include <torch/csrc/stable/library.h>

namespace {

int64_t cpu_isa() {
  return static_cast<int64_t>(fastwm::cpu_isa());
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastwm, m) {
  m.def("cpu_isa() -> int");
  m.def("multiply_add_peak(int repeats) -> float");
  m.def("limit_loss_isa(int isa) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastwm, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("multiply_add_peak", TORCH_BOX(&fastwm::multiply_add_peak));
  m.impl("limit_loss_isa", TORCH_BOX(&fastwm::loss::limit_isa));
}

STABLE_TORCH_LIBRARY_IMPL(fastwm, CPU, m) {
  m.impl("balanced_kl", TORCH_BOX(&fastwm::balanced_kl));
  m.impl("balanced_kl_backward", TORCH_BOX(&fastwm::balanced_kl_backward));
  m.impl("gaussian_nll", TORCH_BOX(&fastwm::gaussian_nll));
  m.impl("gaussian_nll_backward", TORCH_BOX(&fastwm::gaussian_nll_backward));
  m.impl("gae", TORCH_BOX(&fastwm::gae));
  m.impl("gae_backward", TORCH_BOX(&fastwm::gae_backward));
  m.impl("lambda_return", TORCH_BOX(&fastwm::lambda_return));
  m.impl("lambda_return_backward", TORCH_BOX(&fastwm::lambda_return_backward));
  m.impl("row_program", TORCH_BOX(&fastwm::run_row_program));
  m.impl("sub_losses", TORCH_BOX(&fastwm::sub_losses));
  m.impl("sub_losses_backward", TORCH_BOX(&fastwm::sub_losses_backward));
  m.impl("two_hot_cross_entropy", TORCH_BOX(&fastwm::two_hot_cross_entropy));
  m.impl("two_hot_cross_entropy_backward", TORCH_BOX(&fastwm::two_hot_cross_entropy_backward));
}
