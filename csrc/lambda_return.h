// The discounted lambda-return over a trajectory and its gradient. Definition, fake, autograd and the reference
// that these are held against: fastwm/ops/lambda_return.py. CUDA twin: kernels/lambda_return.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fastwm {

using torch::stable::Tensor;

// All tensors are [*batch, time, feature] of one shape, any strides; gamma and lmbda, where given, replace the
// scalars. Returns a fresh tensor with the layout of torch.empty_like(next_value).
Tensor lambda_return(
    const Tensor& next_value,
    const Tensor& reward,
    const Tensor& done,
    const Tensor& terminated,
    const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& lmbda,
    double gamma_scalar,
    double lmbda_scalar);

// (gradient of next_value, gradient of reward): fresh tensors with the layout of torch.empty_like(grad).
std::tuple<Tensor, Tensor> lambda_return_backward(
    const Tensor& grad,
    const Tensor& done,
    const Tensor& terminated,
    const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& lmbda,
    double gamma_scalar,
    double lmbda_scalar);

} // namespace fastwm
