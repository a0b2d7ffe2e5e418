// The weighted sub-losses of a world model, all at once, and their gradients. Definition, fake, autograd and
// reference: fastwm/ops/sub_losses.py. CUDA twin: kernels/sub_losses.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace fastwm {

using torch::stable::Tensor;

// One 0-dim tensor per pair: weight * (mean or sum of the distances). Targets have the dtype of their prediction or are
// bool; masks is empty or has one bool tensor per pair, each of its elements standing for equally many neighbours.
// The sums are the same at any number of threads.
std::vector<Tensor> sub_losses(
    const std::vector<Tensor>& predictions,
    const std::vector<Tensor>& targets,
    const std::vector<Tensor>& masks,
    const std::vector<int64_t>& distances,
    const std::vector<double>& weights,
    bool mean);

// The gradient of each prediction, fresh and contiguous.
std::vector<Tensor> sub_losses_backward(
    const std::vector<Tensor>& grads,
    const std::vector<Tensor>& predictions,
    const std::vector<Tensor>& targets,
    const std::vector<Tensor>& masks,
    const std::vector<int64_t>& distances,
    const std::vector<double>& weights,
    bool mean);

} // namespace fastwm
