// The loops of the losses for any processor of the platform. CMakeLists.txt gives this file its own flags.
#include "loss_kernels_impl.h"

namespace fastwm {

const LossKernels<float>* loss_kernels_f32_portable() {
  return table<float>();
}

const LossKernels<double>* loss_kernels_f64_portable() {
  return table<double>();
}

} // namespace fastwm
