// The cross-entropy between logits over a support and the two-hot encoding of a scalar, and its gradient; the
// encoding itself is never built. Definition, fake, autograd and reference: fastwm/ops/two_hot_cross_entropy.py.
// CUDA twin: kernels/two_hot_cross_entropy.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace fastwm {

using torch::stable::Tensor;

// logits [*batch, bins], target [*batch], bins [bins] ascending -> loss [*batch], fresh and contiguous.
Tensor two_hot_cross_entropy(const Tensor& logits, const Tensor& target, const Tensor& bins, bool symlog);

// (gradient of the logits, of the target), fresh and contiguous.
std::tuple<Tensor, Tensor> two_hot_cross_entropy_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& bins, bool symlog);

} // namespace fastwm
