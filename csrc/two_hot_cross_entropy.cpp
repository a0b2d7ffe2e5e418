#include "two_hot_cross_entropy.h"

#include "loss_op.h"

namespace fastwm {

namespace {

using namespace loss;

constexpr const char* kOp = "fastwm::two_hot_cross_entropy";

template <typename F>
void with_input(const Tensor& logits, const Tensor& target, const Tensor& bins, bool symlog, F f) {
  const auto launch = [&]<typename T>(T) {
    f(TwoHot<T>{bins.numel(), data<T>(bins), symlog, data<T>(logits), data<T>(target)});
  };
  logits.scalar_type() == ScalarType::Float ? launch(float{}) : launch(double{});
}

int64_t check_input(const Tensor& logits, const Tensor& target, const Tensor& bins) {
  const ScalarType dtype = check_dtype(kOp, logits);
  STD_TORCH_CHECK(logits.is_cpu(), kOp, ": logits must be on the CPU");
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.size(logits.dim() - 1) >= 2, kOp, ": logits must be [*batch, bins >= 2]");
  const int64_t rows = rows_of(logits, 1);
  check(kOp, "target", target, dtype, rows);
  check(kOp, "bins", bins, dtype, logits.size(logits.dim() - 1));
  return rows;
}

} // namespace

Tensor two_hot_cross_entropy(const Tensor& logits_, const Tensor& target_, const Tensor& bins_, bool symlog) {
  const int64_t rows = check_input(logits_, target_, bins_);
  const Tensor logits = dense(logits_), target = dense(target_), bins = dense(bins_);
  Tensor loss = new_rows(logits, 1);
  with_input(logits, target, bins, symlog, [&]<typename T>(const TwoHot<T>& in) {
    parallel_rows(rows, in.bins, [&](int64_t begin, int64_t end) {
      kernels<T>().two_hot(in, begin, end, mutable_data<T>(loss));
    });
  });
  return loss;
}

std::tuple<Tensor, Tensor> two_hot_cross_entropy_backward(
    const Tensor& grad_, const Tensor& logits_, const Tensor& target_, const Tensor& bins_, bool symlog) {
  const int64_t rows = check_input(logits_, target_, bins_);
  check(kOp, "grad", grad_, logits_.scalar_type(), rows);
  const Tensor grad = dense(grad_), logits = dense(logits_), target = dense(target_),
               bins = dense(bins_);
  Tensor grad_logits = torch::stable::empty_like(logits), grad_target = torch::stable::empty_like(target);
  with_input(logits, target, bins, symlog, [&]<typename T>(const TwoHot<T>& in) {
    parallel_rows(rows, in.bins, [&](int64_t begin, int64_t end) {
      kernels<T>().two_hot_grad(
          in, begin, end, data<T>(grad), mutable_data<T>(grad_logits), mutable_data<T>(grad_target));
    });
  });
  return {grad_logits, grad_target};
}

} // namespace fastwm
