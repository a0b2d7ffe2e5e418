// The balanced KL divergence between two groups of categoricals, with uniform mixture and free nats, and its
// gradient. Definition, fake, autograd and reference: fastwm/ops/balanced_kl.py. CUDA twin: kernels/balanced_kl.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace fastwm {

using torch::stable::Tensor;

// posterior, prior: logits [*batch, groups, classes] -> loss [*batch], fresh and contiguous.
Tensor balanced_kl(
    const Tensor& posterior,
    const Tensor& prior,
    double dynamics_scale,
    double representation_scale,
    double free_nats,
    double unimix);

// (gradient of posterior, of prior), fresh and contiguous.
std::tuple<Tensor, Tensor> balanced_kl_backward(
    const Tensor& grad,
    const Tensor& posterior,
    const Tensor& prior,
    double dynamics_scale,
    double representation_scale,
    double free_nats,
    double unimix);

} // namespace fastwm
