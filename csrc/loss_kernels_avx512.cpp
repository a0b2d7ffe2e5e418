// The loops of the losses for AVX-512. CMakeLists.txt gives this file its own flags.
#include "loss_kernels_impl.h"

namespace fastwm {

const LossKernels<float>* loss_kernels_f32_avx512() {
  return table<float>();
}

const LossKernels<double>* loss_kernels_f64_avx512() {
  return table<double>();
}

} // namespace fastwm
