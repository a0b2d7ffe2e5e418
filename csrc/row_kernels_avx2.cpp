// The kernels of row programs for AVX2 and FMA. CMakeLists.txt gives this file its own flags.
#include "row_kernels_impl.h"

namespace fastwm {

const Kernels<float>* kernels_f32_avx2() {
  return table<float>();
}

const Kernels<double>* kernels_f64_avx2() {
  return table<double>();
}

} // namespace fastwm
