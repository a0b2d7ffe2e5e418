// Rows: how a kernel walks several strided tensors of one shape along one "time" dimension without copying any.
//
// Every other dimension counts rows. Dimensions that all tensors step through alike are merged, so the usual
// layouts ([batch, time, 1], contiguous or transposed, or with an expanded operand) become one stride per tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastwm {

template <std::size_t N>
class Rows {
 public:
  // Tensors share the shape of the first; an absent operand is passed as nullptr and gets stride 0.
  Rows(const std::array<const torch::stable::Tensor*, N>& tensors, int64_t time_dim) {
    const auto& shape = *tensors[0];
    const int64_t ndim = shape.dim();
    time_ = shape.size(time_dim);
    for (int64_t d = ndim - 1; d >= 0; --d) { // innermost first
      const int64_t size = shape.size(d);
      std::array<int64_t, N> strides{};
      for (std::size_t k = 0; k < N; ++k) {
        strides[k] = tensors[k] != nullptr ? tensors[k]->stride(d) : 0;
      }
      if (d == time_dim) {
        time_strides_ = strides;
        continue;
      }
      rows_ *= size;
      if (size == 1) {
        continue;
      }
      if (!dims_.empty() && mergeable(dims_.back(), strides)) {
        dims_.back().size *= size;
      } else {
        dims_.push_back({size, strides});
      }
    }
  }

  int64_t rows() const { return rows_; }
  int64_t time() const { return time_; }
  int64_t time_stride(std::size_t k) const { return time_strides_[k]; }

  // Offsets, in elements, of a row's first time step in each tensor.
  std::array<int64_t, N> offsets(int64_t row) const {
    std::array<int64_t, N> out{};
    for (const Dim& dim : dims_) {
      const int64_t index = row % dim.size;
      row /= dim.size;
      for (std::size_t k = 0; k < N; ++k) {
        out[k] += index * dim.strides[k];
      }
    }
    return out;
  }

 private:
  struct Dim {
    int64_t size;
    std::array<int64_t, N> strides;
  };

  static bool mergeable(const Dim& inner, const std::array<int64_t, N>& outer) {
    for (std::size_t k = 0; k < N; ++k) {
      if (outer[k] != inner.strides[k] * inner.size) {
        return false;
      }
    }
    return true;
  }

  int64_t rows_ = 1;
  int64_t time_ = 0;
  std::array<int64_t, N> time_strides_{};
  std::vector<Dim> dims_;
};

} // namespace fastwm
