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
    for (std::size_t k = 0; k < N; ++k) {
      present_[k] = tensors[k] != nullptr;
    }
    const auto& shape = *tensors[0];
    const int64_t ndim = shape.dim();
    time_ = shape.size(time_dim);
    for (int64_t d = ndim - 1; d >= 0; --d) { // innermost first
      const int64_t size = shape.size(d);
      std::array<int64_t, N> strides{};
      for (std::size_t k = 0; k < N; ++k) {
        strides[k] = present_[k] ? tensors[k]->stride(d) : 0;
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
  bool present(std::size_t k) const { return present_[k]; }
  int64_t time_stride(std::size_t k) const { return time_strides_[k]; }

  // A row, as the offset in elements of its first time step in each tensor; stepping to the next row needs no
  // division.
  class Position {
   public:
    Position(const Rows& rows, int64_t row) : rows_(rows), index_(rows.dims_.size()) {
      for (std::size_t d = 0; d < rows.dims_.size(); ++d) {
        const Dim& dim = rows.dims_[d];
        index_[d] = row % dim.size;
        row /= dim.size;
        move(dim, index_[d]);
      }
    }

    int64_t offset(std::size_t k) const { return offsets_[k]; }

    void next() {
      for (std::size_t d = 0; d < rows_.dims_.size(); ++d) {
        const Dim& dim = rows_.dims_[d];
        move(dim, 1);
        if (++index_[d] < dim.size) {
          return;
        }
        move(dim, -dim.size);
        index_[d] = 0;
      }
    }

   private:
    template <typename Dim>
    void move(const Dim& dim, int64_t steps) {
      for (std::size_t k = 0; k < N; ++k) {
        offsets_[k] += steps * dim.strides[k];
      }
    }

    const Rows& rows_;
    std::vector<int64_t> index_;
    std::array<int64_t, N> offsets_{};
  };

  Position at(int64_t row) const { return Position(*this, row); }

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

  std::array<bool, N> present_{};
  int64_t rows_ = 1;
  int64_t time_ = 0;
  std::array<int64_t, N> time_strides_{};
  std::vector<Dim> dims_;
};

} // namespace fastwm
