// The kernels of row programs for AVX-512 F, BW, DQ and VL. CMakeLists.txt gives this file its own flags.
#include "row_kernels_impl.h"

namespace fastwm {

const Kernels<float>* kernels_f32_avx512() {
  return table<float>();
}

const Kernels<double>* kernels_f64_avx512() {
  return table<double>();
}

} // namespace fastwm
