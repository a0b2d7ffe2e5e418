// The Gaussian negative log-likelihood with soft bounds on the log-variance, and its gradient. Definition, fake,
// autograd and reference: fastwm/ops/gaussian_nll.py. CUDA twin: kernels/gaussian_nll.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace fastwm {

using torch::stable::Tensor;

// mean, logvar, target [*batch, features], max_logvar, min_logvar [features] -> loss [*batch], fresh and contiguous.
Tensor gaussian_nll(
    const Tensor& mean,
    const Tensor& logvar,
    const Tensor& target,
    const Tensor& max_logvar,
    const Tensor& min_logvar);

// (gradient of mean, of logvar, of max_logvar, of min_logvar), fresh and contiguous. The sums over rows are the same at
// any number of threads.
std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_nll_backward(
    const Tensor& grad,
    const Tensor& mean,
    const Tensor& logvar,
    const Tensor& target,
    const Tensor& max_logvar,
    const Tensor& min_logvar);

} // namespace fastwm
