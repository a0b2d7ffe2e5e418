// What this CPU can run, asked once at run time. Kernels choose their instruction set by this, never by
// compiler flags, so one wheel is right on every machine of its platform.
#pragma once

#include <cstdint>

namespace fastwm {

enum class CpuIsa : int64_t {
  kPortable = 0, // what the compiler emits for the platform's baseline
  kAvx2 = 1, // AVX2 and FMA
  kAvx512 = 2, // AVX-512 F, BW, DQ and VL (all server parts that have F have these)
};

// The best set that both the CPU and the operating system (saved register state) support.
CpuIsa cpu_isa();

// A table of kernels is a function of its own for each dtype: T's.
template <typename T, typename F32, typename F64>
auto of_dtype(F32* f32, F64* f64) {
  if constexpr (sizeof(T) == 4) {
    return f32();
  } else {
    return f64();
  }
}

} // namespace fastwm
