// Generalized advantage estimation over a trajectory and its gradient. Definition, fake, autograd and the reference
// that these are held against: fastwm/ops/gae.py. CUDA twin: kernels/gae.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fastwm {

using torch::stable::Tensor;

// (advantage, value target): fresh tensors with the layout of torch.empty_like(value). All tensors are
// [*batch, time, feature] of one shape, any strides; gamma and lmbda, where given, replace the scalars.
std::tuple<Tensor, Tensor> gae(
    const Tensor& value,
    const Tensor& next_value,
    const Tensor& reward,
    const Tensor& done,
    const Tensor& terminated,
    const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& lmbda,
    double gamma_scalar,
    double lmbda_scalar);

// (gradient of value, of next_value, of reward): fresh tensors with the layout of torch.empty_like(grad_advantage).
std::tuple<Tensor, Tensor, Tensor> gae_backward(
    const Tensor& grad_advantage,
    const Tensor& grad_target,
    const Tensor& done,
    const Tensor& terminated,
    const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& lmbda,
    double gamma_scalar,
    double lmbda_scalar);

} // namespace fastwm
