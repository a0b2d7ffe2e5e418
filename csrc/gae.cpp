#include "gae.h"

#include "trajectory.h"

namespace fastwm {

namespace {

using namespace trajectory;

constexpr const char* kOp = "fastwm::gae";

template <typename scalar_t>
struct Forward {
  enum { kValue, kNext, kReward, kDone, kTerminated, kGamma, kLambda, kAdvantage, kTarget, kCount };

  const scalar_t* value;
  const scalar_t* next_value;
  const scalar_t* reward;
  const flag_t* done;
  const flag_t* terminated;
  const scalar_t* gamma;
  const scalar_t* lmbda;
  scalar_t* advantage;
  scalar_t* target;
  scalar_t gamma_scalar;
  scalar_t lmbda_scalar;
  scalar_t discount_scalar; // lambda * gamma, rounded once

  // The order of the operations is that of the reference, and each is rounded once: equal to it bit for bit.
  template <bool kUnit, bool kTensors>
  void block(const Rows<kCount>& rows, const Block<kCount>& block) const {
    scalar_t following[kBlock] = {}; // the advantage of the step after this one
    for (int64_t t = rows.time() - 1; t >= 0; --t) {
      const Step<const scalar_t, kUnit> values(value, kValue, t, rows, block);
      const Step<const scalar_t, kUnit> nexts(next_value, kNext, t, rows, block);
      const Step<const scalar_t, kUnit> rewards(reward, kReward, t, rows, block);
      const Step<const flag_t, kUnit> dones(done, kDone, t, rows, block);
      const Step<const flag_t, kUnit> ends(terminated, kTerminated, t, rows, block);
      const Coefficient<scalar_t, kUnit, kTensors> gammas{gamma != nullptr, gamma_scalar, {gamma, kGamma, t, rows, block}};
      const Coefficient<scalar_t, kUnit, kTensors> lambdas{lmbda != nullptr, lmbda_scalar, {lmbda, kLambda, t, rows, block}};
      const Step<scalar_t, kUnit> advantages(advantage, kAdvantage, t, rows, block);
      const Step<scalar_t, kUnit> targets(target, kTarget, t, rows, block);
      for (int64_t i = 0; i < block.count; ++i) {
        // Products with the flags, not a choice: a NaN spreads as it does in the reference.
        const scalar_t g = gammas[i] * (1 - static_cast<scalar_t>(ends[i]));
        const scalar_t delta = rewards[i] + g * nexts[i] - values[i];
        const scalar_t both = kTensors ? lambdas[i] * gammas[i] : discount_scalar;
        following[i] = delta + following[i] * (both * (1 - static_cast<scalar_t>(dones[i])));
        advantages[i] = following[i];
        targets[i] = following[i] + values[i];
      }
    }
  }
};

template <typename scalar_t>
struct Backward {
  enum { kGradAdvantage, kGradTarget, kDone, kTerminated, kGamma, kLambda, kGradValue, kGradNext, kGradReward, kCount };

  const scalar_t* grad_advantage;
  const scalar_t* grad_target;
  const flag_t* done;
  const flag_t* terminated;
  const scalar_t* gamma;
  const scalar_t* lmbda;
  scalar_t* grad_value;
  scalar_t* grad_next;
  scalar_t* grad_reward;
  scalar_t gamma_scalar;
  scalar_t lmbda_scalar;
  scalar_t discount_scalar;

  template <bool kUnit, bool kTensors>
  void block(const Rows<kCount>& rows, const Block<kCount>& block) const {
    scalar_t carry[kBlock] = {}; // what the steps before this one ask of this step's advantage
    for (int64_t t = 0; t < rows.time(); ++t) {
      const Step<const scalar_t, kUnit> grads(grad_advantage, kGradAdvantage, t, rows, block);
      const Step<const scalar_t, kUnit> targets(grad_target, kGradTarget, t, rows, block);
      const Step<const flag_t, kUnit> dones(done, kDone, t, rows, block);
      const Step<const flag_t, kUnit> ends(terminated, kTerminated, t, rows, block);
      const Coefficient<scalar_t, kUnit, kTensors> gammas{gamma != nullptr, gamma_scalar, {gamma, kGamma, t, rows, block}};
      const Coefficient<scalar_t, kUnit, kTensors> lambdas{lmbda != nullptr, lmbda_scalar, {lmbda, kLambda, t, rows, block}};
      const Step<scalar_t, kUnit> to_values(grad_value, kGradValue, t, rows, block);
      const Step<scalar_t, kUnit> to_nexts(grad_next, kGradNext, t, rows, block);
      const Step<scalar_t, kUnit> to_rewards(grad_reward, kGradReward, t, rows, block);
      for (int64_t i = 0; i < block.count; ++i) {
        const scalar_t to_target = targets[i];
        const scalar_t total = grads[i] + to_target + carry[i];
        const scalar_t both = kTensors ? lambdas[i] * gammas[i] : discount_scalar;
        const scalar_t g = gammas[i] * (1 - static_cast<scalar_t>(ends[i]));
        carry[i] = total * (both * (1 - static_cast<scalar_t>(dones[i])));
        to_rewards[i] = total;
        to_nexts[i] = total * g;
        to_values[i] = to_target - total;
      }
    }
  }
};

} // namespace

std::tuple<Tensor, Tensor> gae(
    const Tensor& value,
    const Tensor& next_value,
    const Tensor& reward,
    const Tensor& done,
    const Tensor& terminated,
    const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& lmbda,
    double gamma_scalar,
    double lmbda_scalar) {
  const ScalarType dtype = check_trajectory(kOp, value);
  check_like(kOp, value, "next_value", next_value, dtype);
  check_like(kOp, value, "reward", reward, dtype);
  check_like(kOp, value, "done", done, ScalarType::Bool);
  check_like(kOp, value, "terminated", terminated, ScalarType::Bool);
  check_coefficients(kOp, value, gamma, lmbda);
  Tensor advantage = torch::stable::empty_like(value);
  Tensor target = torch::stable::empty_like(value);
  const auto launch = [&]<typename scalar_t>(scalar_t) {
    using Kernel = Forward<scalar_t>;
    const Rows<Kernel::kCount> rows(
        {&value, &next_value, &reward, &done, &terminated, pointer(gamma), pointer(lmbda), &advantage, &target},
        value.dim() - 2);
    const Kernel kernel{
        data<scalar_t>(value),
        data<scalar_t>(next_value),
        data<scalar_t>(reward),
        data<flag_t>(done),
        data<flag_t>(terminated),
        data<scalar_t>(gamma),
        data<scalar_t>(lmbda),
        mutable_data<scalar_t>(advantage),
        mutable_data<scalar_t>(target),
        static_cast<scalar_t>(gamma_scalar),
        static_cast<scalar_t>(lmbda_scalar),
        static_cast<scalar_t>(lmbda_scalar * gamma_scalar)};
    run_blocks(kernel, rows);
  };
  dtype == ScalarType::Float ? launch(float{}) : launch(double{});
  return {advantage, target};
}

std::tuple<Tensor, Tensor, Tensor> gae_backward(
    const Tensor& grad_advantage,
    const Tensor& grad_target,
    const Tensor& done,
    const Tensor& terminated,
    const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& lmbda,
    double gamma_scalar,
    double lmbda_scalar) {
  const ScalarType dtype = check_trajectory(kOp, grad_advantage);
  check_like(kOp, grad_advantage, "grad_target", grad_target, dtype);
  check_like(kOp, grad_advantage, "done", done, ScalarType::Bool);
  check_like(kOp, grad_advantage, "terminated", terminated, ScalarType::Bool);
  check_coefficients(kOp, grad_advantage, gamma, lmbda);
  Tensor grad_value = torch::stable::empty_like(grad_advantage);
  Tensor grad_next = torch::stable::empty_like(grad_advantage);
  Tensor grad_reward = torch::stable::empty_like(grad_advantage);
  const auto launch = [&]<typename scalar_t>(scalar_t) {
    using Kernel = Backward<scalar_t>;
    const Rows<Kernel::kCount> rows(
        {&grad_advantage,
         &grad_target,
         &done,
         &terminated,
         pointer(gamma),
         pointer(lmbda),
         &grad_value,
         &grad_next,
         &grad_reward},
        grad_advantage.dim() - 2);
    const Kernel kernel{
        data<scalar_t>(grad_advantage),
        data<scalar_t>(grad_target),
        data<flag_t>(done),
        data<flag_t>(terminated),
        data<scalar_t>(gamma),
        data<scalar_t>(lmbda),
        mutable_data<scalar_t>(grad_value),
        mutable_data<scalar_t>(grad_next),
        mutable_data<scalar_t>(grad_reward),
        static_cast<scalar_t>(gamma_scalar),
        static_cast<scalar_t>(lmbda_scalar),
        static_cast<scalar_t>(lmbda_scalar * gamma_scalar)};
    run_blocks(kernel, rows);
  };
  dtype == ScalarType::Float ? launch(float{}) : launch(double{});
  return {grad_value, grad_next, grad_reward};
}

} // namespace fastwm
