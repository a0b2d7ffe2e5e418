// What every op over tensors asks of them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace fastwm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType check_dtype(const char* op, const Tensor& first) {
  const ScalarType dtype = first.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": only float32 and float64 are supported");
  return dtype;
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

} // namespace fastwm
