#include "lambda_return.h"

#include "rows.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

namespace fastwm {

namespace {

using torch::headeronly::ScalarType;

// A bool tensor holds bytes of 0 or 1; as bool itself the compiler does not vectorise their loads.
using flag_t = uint8_t;

// The recurrence over time is one chain of dependent operations per row. A block of rows goes through it side by
// side: enough chains in flight to hide their latency, few enough that a block's data stays in L1.
constexpr int64_t kBlock = 32;
// Elements below which a thread is not worth waking.
constexpr int64_t kGrain = 16384;

void check(const Tensor& first, const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.is_cpu(), "fastwm::lambda_return: ", name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "fastwm::lambda_return: ", name, " has the wrong dtype");
  bool same = tensor.dim() == first.dim();
  for (int64_t d = 0; same && d < first.dim(); ++d) {
    same = tensor.size(d) == first.size(d);
  }
  STD_TORCH_CHECK(same, "fastwm::lambda_return: ", name, " must have the shape of the first tensor");
}

ScalarType check_first(const Tensor& first) {
  const ScalarType dtype = first.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double,
      "fastwm::lambda_return: only float32 and float64 are supported");
  STD_TORCH_CHECK(first.is_cpu(), "fastwm::lambda_return: the first tensor must be on the CPU");
  STD_TORCH_CHECK(first.dim() >= 2, "fastwm::lambda_return: tensors must be [*batch, time, feature]");
  STD_TORCH_CHECK(first.size(first.dim() - 2) > 0, "fastwm::lambda_return: the time dimension is empty");
  return dtype;
}

const Tensor* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? &*tensor : nullptr;
}

template <typename scalar_t>
const scalar_t* data(const Tensor& tensor) {
  return static_cast<const scalar_t*>(tensor.const_data_ptr());
}

template <typename scalar_t>
const scalar_t* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<scalar_t>(*tensor) : nullptr;
}

template <typename scalar_t>
scalar_t* mutable_data(const Tensor& tensor) {
  return static_cast<scalar_t*>(tensor.mutable_data_ptr());
}

// Where up to kBlock rows begin in each of N tensors.
template <std::size_t N>
struct Block {
  int64_t offsets[N][kBlock];
  int64_t count;
  // Neighbouring rows are neighbouring elements in every tensor (time-major data): a step of the block is
  // contiguous memory and the compiler vectorises over rows.
  bool unit = true;

  Block(const Rows<N>& rows, int64_t begin) : count(std::min(kBlock, rows.rows() - begin)) {
    auto position = rows.at(begin);
    for (int64_t i = 0; i < count; ++i, position.next()) {
      for (std::size_t k = 0; k < N; ++k) {
        offsets[k][i] = position.offset(k);
        unit = unit && (!rows.present(k) || offsets[k][i] == offsets[k][0] + i);
      }
    }
  }
};

// One step of a block in one tensor: lane i is row i.
template <typename T, bool kUnit>
struct Step {
  T* __restrict pointer;
  const int64_t* __restrict offsets;

  template <std::size_t N>
  Step(T* base, std::size_t k, int64_t t, const Rows<N>& rows, const Block<N>& block)
      : pointer(base + t * rows.time_stride(k) + (kUnit ? block.offsets[k][0] : 0)), offsets(block.offsets[k]) {}

  T& operator[](int64_t i) const { return pointer[kUnit ? i : offsets[i]]; }
};

template <typename Kernel>
void run(const Kernel& kernel, const Rows<Kernel::kCount>& rows) {
  const int64_t blocks = (rows.rows() + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kBlock * rows.time()));
  const bool tensors = kernel.gamma != nullptr || kernel.lmbda != nullptr;
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Block<Kernel::kCount> block(rows, b * kBlock);
      if (tensors) {
        block.unit ? kernel.template block<true, true>(rows, block) : kernel.template block<false, true>(rows, block);
      } else {
        block.unit ? kernel.template block<true, false>(rows, block) : kernel.template block<false, false>(rows, block);
      }
    }
  });
}

// A discount or lambda: a tensor's, or the scalar where there is none. Kernels with scalars only (kTensors false)
// are compiled apart: a choice within the loop over rows would keep it from being vectorised.
template <typename scalar_t, bool kUnit, bool kTensors>
struct Coefficient {
  const bool present;
  const scalar_t scalar;
  const Step<const scalar_t, kUnit> step;

  scalar_t operator[](int64_t i) const { return kTensors && present ? step[i] : scalar; }
};

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
  const ScalarType dtype = check_first(next_value);
  check(next_value, "reward", reward, dtype);
  check(next_value, "done", done, ScalarType::Bool);
  check(next_value, "terminated", terminated, ScalarType::Bool);
  if (gamma.has_value()) {
    check(next_value, "gamma", *gamma, dtype);
  }
  if (lmbda.has_value()) {
    check(next_value, "lmbda", *lmbda, dtype);
  }
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
    run(kernel, rows);
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
  const ScalarType dtype = check_first(grad);
  check(grad, "done", done, ScalarType::Bool);
  check(grad, "terminated", terminated, ScalarType::Bool);
  if (gamma.has_value()) {
    check(grad, "gamma", *gamma, dtype);
  }
  if (lmbda.has_value()) {
    check(grad, "lmbda", *lmbda, dtype);
  }
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
    run(kernel, rows);
  };
  dtype == ScalarType::Float ? launch(float{}) : launch(double{});
  return {grad_value, grad_reward};
}

} // namespace fastwm
