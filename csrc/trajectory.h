// What the kernels over a trajectory share: their checks, and how a block of rows goes through time side by side.
#pragma once

#include "rows.h"
#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

namespace fastwm::trajectory {

// A bool tensor holds bytes of 0 or 1; as bool itself the compiler does not vectorise their loads.
using flag_t = uint8_t;

// The recurrence over time is one chain of dependent operations per row. A block of rows goes through it side by
// side: enough chains in flight to hide their latency, few enough that a block's data stays in L1.
constexpr int64_t kBlock = 32;
// Elements below which a thread is not worth waking.
constexpr int64_t kGrain = 16384;

inline void check_like(const char* op, const Tensor& first, const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
  bool same = tensor.dim() == first.dim();
  for (int64_t d = 0; same && d < first.dim(); ++d) {
    same = tensor.size(d) == first.size(d);
  }
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape of the first tensor");
}

inline ScalarType check_trajectory(const char* op, const Tensor& first) {
  const ScalarType dtype = check_dtype(op, first);
  STD_TORCH_CHECK(first.is_cpu(), op, ": the first tensor must be on the CPU");
  STD_TORCH_CHECK(first.dim() >= 2, op, ": tensors must be [*batch, time, feature]");
  return dtype;
}

inline void check_coefficients(
    const char* op, const Tensor& first, const std::optional<Tensor>& gamma, const std::optional<Tensor>& lmbda) {
  if (gamma.has_value()) {
    check_like(op, first, "gamma", *gamma, first.scalar_type());
  }
  if (lmbda.has_value()) {
    check_like(op, first, "lmbda", *lmbda, first.scalar_type());
  }
}

inline const Tensor* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? &*tensor : nullptr;
}

using fastwm::data;

template <typename scalar_t>
const scalar_t* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<scalar_t>(*tensor) : nullptr;
}

// Where up to kBlock rows begin in each of N tensors.
template <std::size_t N>
struct Block {
  int64_t offsets[N][kBlock];
  int64_t count;
  // Neighbouring rows are neighbouring elements in every tensor (time-major data): a step of the block is
  // contiguous memory and the compiler vectorises over rows.
  bool unit = true;

  Block(const Rows<N>& rows, int64_t begin) : count(std::min(kBlock, rows.rows() - begin)) {
    auto position = rows.at(begin);
    for (int64_t i = 0; i < count; ++i, position.next()) {
      for (std::size_t k = 0; k < N; ++k) {
        offsets[k][i] = position.offset(k);
        unit = unit && (!rows.present(k) || offsets[k][i] == offsets[k][0] + i);
      }
    }
  }
};

// One step of a block in one tensor: lane i is row i.
template <typename T, bool kUnit>
struct Step {
  T* __restrict pointer;
  const int64_t* __restrict offsets;

  template <std::size_t N>
  Step(T* base, std::size_t k, int64_t t, const Rows<N>& rows, const Block<N>& block)
      : pointer(base + t * rows.time_stride(k) + (kUnit ? block.offsets[k][0] : 0)), offsets(block.offsets[k]) {}

  T& operator[](int64_t i) const { return pointer[kUnit ? i : offsets[i]]; }
};

template <typename Kernel>
void run_blocks(const Kernel& kernel, const Rows<Kernel::kCount>& rows) {
  const int64_t blocks = (rows.rows() + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kBlock * std::max<int64_t>(1, rows.time())));
  const bool tensors = kernel.gamma != nullptr || kernel.lmbda != nullptr;
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Block<Kernel::kCount> block(rows, b * kBlock);
      if (tensors) {
        block.unit ? kernel.template block<true, true>(rows, block) : kernel.template block<false, true>(rows, block);
      } else {
        block.unit ? kernel.template block<true, false>(rows, block) : kernel.template block<false, false>(rows, block);
      }
    }
  });
}

// A discount or lambda: a tensor's, or the scalar where there is none. Kernels with scalars only (kTensors false)
// are compiled apart: a choice within the loop over rows would keep it from being vectorised.
template <typename scalar_t, bool kUnit, bool kTensors>
struct Coefficient {
  const bool present;
  const scalar_t scalar;
  const Step<const scalar_t, kUnit> step;

  scalar_t operator[](int64_t i) const { return kTensors && present ? step[i] : scalar; }
};

} // namespace fastwm::trajectory
