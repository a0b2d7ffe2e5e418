// What the ops of the losses share: their checks, their input as the loops take it, and which loops.
#pragma once

#include "loss_kernels.h"
#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace fastwm::loss {

// Elements below which a thread is not worth waking.
constexpr int64_t kGrain = 4096;

// The loops for this CPU, or of a narrower set if limit_isa() asked for it.
template <typename T>
const LossKernels<T>& kernels();
extern template const LossKernels<float>& kernels<float>();
extern template const LossKernels<double>& kernels<double>();

// For tests: the widest instruction set that the loops may have from now on. Returns what it was.
int64_t limit_isa(int64_t isa);

inline void check(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.numel() == numel, op, ": ", name, " has ", tensor.numel(), " elements instead of ", numel);
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The size of the leading dimensions, all but the last `trailing`, and a fresh tensor of them.
inline int64_t rows_of(const Tensor& tensor, int64_t trailing) {
  int64_t rows = 1;
  for (int64_t d = 0; d + trailing < tensor.dim(); ++d) {
    rows *= tensor.size(d);
  }
  return rows;
}

inline Tensor new_rows(const Tensor& tensor, int64_t trailing) {
  const auto sizes = tensor.sizes();
  return torch::stable::new_empty(tensor, {sizes.data(), sizes.size() - trailing});
}

// f(begin, end) over rows of that many elements each.
template <typename F>
void parallel_rows(int64_t rows, int64_t width, F f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)), f);
}

} // namespace fastwm::loss
