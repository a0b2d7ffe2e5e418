#include "loss_op.h"

#include "cpu_features.h"

#include <atomic>

namespace fastwm::loss {

namespace {

std::atomic<int64_t> isa_limit{INT64_MAX};

} // namespace

int64_t limit_isa(int64_t isa) {
  return isa_limit.exchange(isa);
}

template <typename T>
const LossKernels<T>& kernels() {
#if defined(FASTWM_X86)
  const int64_t isa = std::min(int64_t(cpu_isa()), isa_limit.load());
  if (isa >= int64_t(CpuIsa::kAvx512)) {
    return *of_dtype<T>(&loss_kernels_f32_avx512, &loss_kernels_f64_avx512);
  }
  if (isa >= int64_t(CpuIsa::kAvx2)) {
    return *of_dtype<T>(&loss_kernels_f32_avx2, &loss_kernels_f64_avx2);
  }
#endif
  return *of_dtype<T>(&loss_kernels_f32_portable, &loss_kernels_f64_portable);
}

template const LossKernels<float>& kernels<float>();
template const LossKernels<double>& kernels<double>();

} // namespace fastwm::loss
