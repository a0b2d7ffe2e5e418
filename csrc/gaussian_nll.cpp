#include "gaussian_nll.h"

#include "loss_op.h"

#include <vector>

namespace fastwm {

namespace {

using namespace loss;

constexpr const char* kOp = "fastwm::gaussian_nll";
// Rows whose shares of the bounds' gradients are summed as one: fixed, so that threads do not change the sum.
constexpr int64_t kBlock = 64;

int64_t check_input(
    const Tensor& mean,
    const Tensor& logvar,
    const Tensor& target,
    const Tensor& max_logvar,
    const Tensor& min_logvar) {
  const ScalarType dtype = check_dtype(kOp, mean);
  STD_TORCH_CHECK(mean.is_cpu(), kOp, ": mean must be on the CPU");
  STD_TORCH_CHECK(mean.dim() >= 1, kOp, ": mean must be [*batch, features]");
  check(kOp, "logvar", logvar, dtype, mean.numel());
  check(kOp, "target", target, dtype, mean.numel());
  check(kOp, "max_logvar", max_logvar, dtype, mean.size(mean.dim() - 1));
  check(kOp, "min_logvar", min_logvar, dtype, mean.size(mean.dim() - 1));
  return rows_of(mean, 1);
}

template <typename T>
GaussianNll<T> input(
    const Tensor& mean,
    const Tensor& logvar,
    const Tensor& target,
    const Tensor& max_logvar,
    const Tensor& min_logvar) {
  return {
      max_logvar.numel(), data<T>(mean), data<T>(logvar), data<T>(target), data<T>(max_logvar), data<T>(min_logvar)};
}

} // namespace

Tensor gaussian_nll(
    const Tensor& mean_,
    const Tensor& logvar_,
    const Tensor& target_,
    const Tensor& max_logvar_,
    const Tensor& min_logvar_) {
  const int64_t rows = check_input(mean_, logvar_, target_, max_logvar_, min_logvar_);
  const Tensor mean = dense(mean_), logvar = dense(logvar_), target = dense(target_),
               max_logvar = dense(max_logvar_), min_logvar = dense(min_logvar_);
  Tensor loss = new_rows(mean, 1);
  const auto launch = [&]<typename T>(T) {
    const auto in = input<T>(mean, logvar, target, max_logvar, min_logvar);
    parallel_rows(rows, in.features, [&](int64_t begin, int64_t end) {
      kernels<T>().gaussian_nll(in, begin, end, mutable_data<T>(loss));
    });
  };
  mean.scalar_type() == ScalarType::Float ? launch(float{}) : launch(double{});
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_nll_backward(
    const Tensor& grad_,
    const Tensor& mean_,
    const Tensor& logvar_,
    const Tensor& target_,
    const Tensor& max_logvar_,
    const Tensor& min_logvar_) {
  const int64_t rows = check_input(mean_, logvar_, target_, max_logvar_, min_logvar_);
  check(kOp, "grad", grad_, mean_.scalar_type(), rows);
  const Tensor grad = dense(grad_), mean = dense(mean_), logvar = dense(logvar_), target = dense(target_),
               max_logvar = dense(max_logvar_), min_logvar = dense(min_logvar_);
  Tensor grad_mean = torch::stable::empty_like(mean), grad_logvar = torch::stable::empty_like(logvar),
         grad_max = torch::stable::empty_like(max_logvar), grad_min = torch::stable::empty_like(min_logvar);
  const auto launch = [&]<typename T>(T) {
    const auto in = input<T>(mean, logvar, target, max_logvar, min_logvar);
    const int64_t blocks = (rows + kBlock - 1) / kBlock, width = in.features;
    std::vector<double> shares(2 * blocks * width, 0.0); // of each block: its part of grad_max, then of grad_min
    parallel_rows(blocks, kBlock * width, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        double* share = shares.data() + 2 * b * width;
        kernels<T>().gaussian_nll_grad(
            in,
            b * kBlock,
            std::min(rows, (b + 1) * kBlock),
            data<T>(grad),
            mutable_data<T>(grad_mean),
            mutable_data<T>(grad_logvar),
            share,
            share + width);
      }
    });
    for (int64_t i = 0; i < width; ++i) {
      double high = 0, low = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        high += shares[2 * b * width + i];
        low += shares[(2 * b + 1) * width + i];
      }
      mutable_data<T>(grad_max)[i] = static_cast<T>(high);
      mutable_data<T>(grad_min)[i] = static_cast<T>(low);
    }
  };
  mean.scalar_type() == ScalarType::Float ? launch(float{}) : launch(double{});
  return {grad_mean, grad_logvar, grad_max, grad_min};
}

} // namespace fastwm
