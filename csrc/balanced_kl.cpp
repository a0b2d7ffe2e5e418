#include "balanced_kl.h"

#include "loss_op.h"

#include <vector>

namespace fastwm {

namespace {

using namespace loss;

constexpr const char* kOp = "fastwm::balanced_kl";

struct Scales {
  double dynamics, representation, free_nats, unimix;
};

int64_t check_input(const Tensor& posterior, const Tensor& prior) {
  const ScalarType dtype = check_dtype(kOp, posterior);
  STD_TORCH_CHECK(posterior.is_cpu(), kOp, ": posterior must be on the CPU");
  STD_TORCH_CHECK(posterior.dim() >= 2, kOp, ": logits must be [*batch, groups, classes]");
  check(kOp, "prior", prior, dtype, posterior.numel());
  STD_TORCH_CHECK(prior.dim() == posterior.dim(), kOp, ": prior must have the shape of posterior");
  for (int64_t d = 0; d < prior.dim(); ++d) {
    STD_TORCH_CHECK(prior.size(d) == posterior.size(d), kOp, ": prior must have the shape of posterior");
  }
  return rows_of(posterior, 2);
}

// f(in, begin, end, scratch) over rows.
template <typename F>
void over_rows(int64_t rows, const Tensor& posterior, const Tensor& prior, const Scales& scales, F f) {
  const auto launch = [&]<typename T>(T) {
    const BalancedKl<T> in{
        posterior.size(posterior.dim() - 2),
        posterior.size(posterior.dim() - 1),
        data<T>(posterior),
        data<T>(prior),
        static_cast<T>(scales.unimix),
        static_cast<T>(scales.free_nats),
        static_cast<T>(scales.dynamics),
        static_cast<T>(scales.representation)};
    parallel_rows(rows, in.groups * in.classes, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(4 * in.classes);
      f(in, begin, end, scratch.data());
    });
  };
  posterior.scalar_type() == ScalarType::Float ? launch(float{}) : launch(double{});
}

} // namespace

Tensor balanced_kl(
    const Tensor& posterior_,
    const Tensor& prior_,
    double dynamics_scale,
    double representation_scale,
    double free_nats,
    double unimix) {
  const int64_t rows = check_input(posterior_, prior_);
  const Tensor posterior = dense(posterior_), prior = dense(prior_);
  Tensor loss = new_rows(posterior, 2);
  const Scales scales{dynamics_scale, representation_scale, free_nats, unimix};
  over_rows(
      rows,
      posterior,
      prior,
      scales,
      [&]<typename T>(const BalancedKl<T>& in, int64_t begin, int64_t end, T* scratch) {
        kernels<T>().balanced_kl(in, begin, end, scratch, mutable_data<T>(loss));
      });
  return loss;
}

std::tuple<Tensor, Tensor> balanced_kl_backward(
    const Tensor& grad_,
    const Tensor& posterior_,
    const Tensor& prior_,
    double dynamics_scale,
    double representation_scale,
    double free_nats,
    double unimix) {
  const int64_t rows = check_input(posterior_, prior_);
  check(kOp, "grad", grad_, posterior_.scalar_type(), rows);
  const Tensor grad = dense(grad_), posterior = dense(posterior_), prior = dense(prior_);
  Tensor grad_posterior = torch::stable::empty_like(posterior), grad_prior = torch::stable::empty_like(prior);
  const Scales scales{dynamics_scale, representation_scale, free_nats, unimix};
  over_rows(
      rows,
      posterior,
      prior,
      scales,
      [&]<typename T>(const BalancedKl<T>& in, int64_t begin, int64_t end, T* scratch) {
        kernels<T>().balanced_kl_grad(
            in,
            begin,
            end,
            data<T>(grad),
            scratch,
            mutable_data<T>(grad_posterior),
            mutable_data<T>(grad_prior));
      });
  return {grad_posterior, grad_prior};
}

} // namespace fastwm
