#include "lambda_return.h"

#include "trajectory.h"

namespace fastwm {

namespace {

using namespace trajectory;

constexpr const char* kOp = "fastwm::lambda_return";

template <typename scalar_t>
struct Forward {
  enum { kValue, kReward, kDone, kTerminated, kGamma, kLambda, kOut, kCount };

  const scalar_t* value;
  const scalar_t* reward;
  const flag_t* done;
  const flag_t* terminated;
  const scalar_t* gamma;
  const scalar_t* lmbda;
  scalar_t* out;
  scalar_t gamma_scalar;
  scalar_t lmbda_scalar;

  // The order of the operations is that of the reference, and each is rounded once: equal to it bit for bit.
  template <bool kUnit, bool kTensors>
  void block(const Rows<kCount>& rows, const Block<kCount>& block) const {
    scalar_t following[kBlock]; // the return of the step after this one
    for (int64_t t = rows.time() - 1; t >= 0; --t) {
      const bool last = t == rows.time() - 1;
      const Step<const scalar_t, kUnit> values(value, kValue, t, rows, block);
      const Step<const scalar_t, kUnit> rewards(reward, kReward, t, rows, block);
      const Step<const flag_t, kUnit> dones(done, kDone, t, rows, block);
      const Step<const flag_t, kUnit> ends(terminated, kTerminated, t, rows, block);
      const Coefficient<scalar_t, kUnit, kTensors> gammas{gamma != nullptr, gamma_scalar, {gamma, kGamma, t, rows, block}};
      const Coefficient<scalar_t, kUnit, kTensors> lambdas{lmbda != nullptr, lmbda_scalar, {lmbda, kLambda, t, rows, block}};
      const Step<scalar_t, kUnit> outs(out, kOut, t, rows, block);
      for (int64_t i = 0; i < block.count; ++i) {
        const scalar_t is_done = dones[i];
        const scalar_t l = lambdas[i];
        const scalar_t v = values[i] * (1 - static_cast<scalar_t>(ends[i]));
        // Products with the flag, not a choice: a NaN spreads as it does in the reference.
        const scalar_t bootstrap = (last ? v : following[i]) * (1 - is_done) + v * is_done;
        following[i] = rewards[i] + gammas[i] * ((1 - l) * v + l * bootstrap);
        outs[i] = following[i];
      }
    }
  }
};

template <typename scalar_t>
struct Backward {
  enum { kGrad, kDone, kTerminated, kGamma, kLambda, kGradValue, kGradReward, kCount };

  const scalar_t* grad;
  const flag_t* done;
  const flag_t* terminated;
  const scalar_t* gamma;
  const scalar_t* lmbda;
  scalar_t* grad_value;
  scalar_t* grad_reward;
  scalar_t gamma_scalar;
  scalar_t lmbda_scalar;

  template <bool kUnit, bool kTensors>
  void block(const Rows<kCount>& rows, const Block<kCount>& block) const {
    scalar_t carry[kBlock] = {}; // what the steps before this one ask of this step's return
    for (int64_t t = 0; t < rows.time(); ++t) {
      const bool last = t == rows.time() - 1;
      const Step<const scalar_t, kUnit> grads(grad, kGrad, t, rows, block);
      const Step<const flag_t, kUnit> dones(done, kDone, t, rows, block);
      const Step<const flag_t, kUnit> ends(terminated, kTerminated, t, rows, block);
      const Coefficient<scalar_t, kUnit, kTensors> gammas{gamma != nullptr, gamma_scalar, {gamma, kGamma, t, rows, block}};
      const Coefficient<scalar_t, kUnit, kTensors> lambdas{lmbda != nullptr, lmbda_scalar, {lmbda, kLambda, t, rows, block}};
      const Step<scalar_t, kUnit> to_values(grad_value, kGradValue, t, rows, block);
      const Step<scalar_t, kUnit> to_rewards(grad_reward, kGradReward, t, rows, block);
      for (int64_t i = 0; i < block.count; ++i) {
        const scalar_t is_done = dones[i];
        const scalar_t l = lambdas[i];
        const scalar_t total = grads[i] + carry[i];
        const scalar_t scaled = gammas[i] * total;
        carry[i] = scaled * l * (1 - is_done);
        // The last step bootstraps from its own next value, so its carry comes back to it.
        const scalar_t dv = scaled * (1 - l) + scaled * l * is_done + (last ? carry[i] : 0);
        to_rewards[i] = total;
        to_values[i] = dv * (1 - static_cast<scalar_t>(ends[i]));
      }
    }
  }
};

} // namespace

Tensor lambda_return(
    const Tensor& next_value,
    const Tensor& reward,
    const Tensor& done,
    const Tensor& terminated,
    const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& lmbda,
    double gamma_scalar,
    double lmbda_scalar) {
  const ScalarType dtype = check_trajectory(kOp, next_value);
  STD_TORCH_CHECK(next_value.size(next_value.dim() - 2) > 0, kOp, ": the time dimension is empty");
  check_like(kOp, next_value, "reward", reward, dtype);
  check_like(kOp, next_value, "done", done, ScalarType::Bool);
  check_like(kOp, next_value, "terminated", terminated, ScalarType::Bool);
  check_coefficients(kOp, next_value, gamma, lmbda);
  Tensor out = torch::stable::empty_like(next_value);
  const auto launch = [&]<typename scalar_t>(scalar_t) {
    using Kernel = Forward<scalar_t>;
    const Rows<Kernel::kCount> rows(
        {&next_value, &reward, &done, &terminated, pointer(gamma), pointer(lmbda), &out}, next_value.dim() - 2);
    const Kernel kernel{
        data<scalar_t>(next_value),
        data<scalar_t>(reward),
        data<flag_t>(done),
        data<flag_t>(terminated),
        data<scalar_t>(gamma),
        data<scalar_t>(lmbda),
        mutable_data<scalar_t>(out),
        static_cast<scalar_t>(gamma_scalar),
        static_cast<scalar_t>(lmbda_scalar)};
    run_blocks(kernel, rows);
  };
  dtype == ScalarType::Float ? launch(float{}) : launch(double{});
  return out;
}

std::tuple<Tensor, Tensor> lambda_return_backward(
    const Tensor& grad,
    const Tensor& done,
    const Tensor& terminated,
    const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& lmbda,
    double gamma_scalar,
    double lmbda_scalar) {
  const ScalarType dtype = check_trajectory(kOp, grad);
  STD_TORCH_CHECK(grad.size(grad.dim() - 2) > 0, kOp, ": the time dimension is empty");
  check_like(kOp, grad, "done", done, ScalarType::Bool);
  check_like(kOp, grad, "terminated", terminated, ScalarType::Bool);
  check_coefficients(kOp, grad, gamma, lmbda);
  Tensor grad_value = torch::stable::empty_like(grad);
  Tensor grad_reward = torch::stable::empty_like(grad);
  const auto launch = [&]<typename scalar_t>(scalar_t) {
    using Kernel = Backward<scalar_t>;
    const Rows<Kernel::kCount> rows(
        {&grad, &done, &terminated, pointer(gamma), pointer(lmbda), &grad_value, &grad_reward}, grad.dim() - 2);
    const Kernel kernel{
        data<scalar_t>(grad),
        data<flag_t>(done),
        data<flag_t>(terminated),
        data<scalar_t>(gamma),
        data<scalar_t>(lmbda),
        mutable_data<scalar_t>(grad_value),
        mutable_data<scalar_t>(grad_reward),
        static_cast<scalar_t>(gamma_scalar),
        static_cast<scalar_t>(lmbda_scalar)};
    run_blocks(kernel, rows);
  };
  dtype == ScalarType::Float ? launch(float{}) : launch(double{});
  return {grad_value, grad_reward};
}

} // namespace fastwm
