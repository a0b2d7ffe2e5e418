#include "cpu_features.h"

namespace fastwm {

namespace {

CpuIsa detect() {
#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__i386__))
  // These builtins also ask (xgetbv) whether the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) {
    return CpuIsa::kAvx512;
  }
  if (avx2) {
    return CpuIsa::kAvx2;
  }
#endif
  return CpuIsa::kPortable;
}

} // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = detect();
  return isa;
}

} // namespace fastwm
