// The loops of the losses for AVX2 and FMA. CMakeLists.txt gives this file its own flags.
#include "loss_kernels_impl.h"

namespace fastwm {

const LossKernels<float>* loss_kernels_f32_avx2() {
  return table<float>();
}

const LossKernels<double>* loss_kernels_f64_avx2() {
  return table<double>();
}

} // namespace fastwm
