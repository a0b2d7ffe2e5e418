// The kernels of row programs for the platform's baseline. CMakeLists.txt gives this file its own flags.
#include "row_kernels_impl.h"

namespace fastwm {

const Kernels<float>* kernels_f32_portable() {
  return table<float>();
}

const Kernels<double>* kernels_f64_portable() {
  return table<double>();
}

} // namespace fastwm
