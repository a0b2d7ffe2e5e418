#include "lambda_return.h"

#include "rows.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

namespace fastwm {

namespace {

using torch::headeronly::ScalarType;

// The recurrence over time is one chain of dependent operations per row. A block of rows goes through it side by
// side: enough chains in flight to hide their latency, few enough that the state stays in registers and L1.
constexpr int64_t kBlock = 16;
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

// The offsets of up to kBlock rows in each of N tensors. When neighbouring rows are neighbouring elements in
// every tensor (time-major data), `unit` lets the compiler use vector loads.
template <std::size_t N>
struct Block {
  int64_t offsets[N][kBlock];
  int64_t count;
  bool unit = true;

  Block(const Rows<N>& rows, int64_t begin) : count(std::min(kBlock, rows.rows() - begin)) {
    for (int64_t r = 0; r < count; ++r) {
      const auto row = rows.offsets(begin + r);
      for (std::size_t k = 0; k < N; ++k) {
        offsets[k][r] = row[k];
        unit = unit && row[k] == offsets[k][0] + r;
      }
    }
  }

  template <bool kUnit>
  int64_t at(std::size_t k, int64_t r) const {
    return kUnit ? offsets[k][0] + r : offsets[k][r];
  }
};

template <std::size_t N, typename F>
void for_each_block(const Rows<N>& rows, const F& f) {
  const int64_t blocks = (rows.rows() + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kBlock * rows.time()));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      f(Block<N>(rows, b * kBlock));
    }
  });
}

template <typename scalar_t>
struct Forward {
  enum { kValue, kReward, kDone, kTerminated, kGamma, kLambda, kOut, kCount };

  const scalar_t* value;
  const scalar_t* reward;
  const bool* done;
  const bool* terminated;
  const scalar_t* gamma;
  const scalar_t* lmbda;
  scalar_t* out;
  scalar_t gamma_scalar;
  scalar_t lmbda_scalar;

  // The order of the operations is that of the reference, and each is rounded once: equal to it bit for bit.
  template <bool kUnit>
  void run(const Rows<kCount>& rows, const Block<kCount>& block) const {
    scalar_t carry[kBlock]; // the return of the step after this one
    for (int64_t t = rows.time() - 1; t >= 0; --t) {
      const auto at = [&](std::size_t k, int64_t r) {
        return block.template at<kUnit>(k, r) + t * rows.time_stride(k);
      };
      const bool last = t == rows.time() - 1;
      for (int64_t r = 0; r < block.count; ++r) {
        const scalar_t is_done = done[at(kDone, r)];
        const scalar_t v = value[at(kValue, r)] * static_cast<scalar_t>(!terminated[at(kTerminated, r)]);
        const scalar_t g = gamma != nullptr ? gamma[at(kGamma, r)] : gamma_scalar;
        const scalar_t l = lmbda != nullptr ? lmbda[at(kLambda, r)] : lmbda_scalar;
        // Products with the flag, not a choice: a NaN spreads as it does in the reference.
        const scalar_t next = (last ? v : carry[r]) * (1 - is_done) + v * is_done;
        carry[r] = reward[at(kReward, r)] + g * ((1 - l) * v + l * next);
        out[at(kOut, r)] = carry[r];
      }
    }
  }

  void operator()(const Rows<kCount>& rows) const {
    for_each_block(rows, [&](const Block<kCount>& block) {
      block.unit ? run<true>(rows, block) : run<false>(rows, block);
    });
  }
};

template <typename scalar_t>
struct Backward {
  enum { kGrad, kDone, kTerminated, kGamma, kLambda, kGradValue, kGradReward, kCount };

  const scalar_t* grad;
  const bool* done;
  const bool* terminated;
  const scalar_t* gamma;
  const scalar_t* lmbda;
  scalar_t* grad_value;
  scalar_t* grad_reward;
  scalar_t gamma_scalar;
  scalar_t lmbda_scalar;

  template <bool kUnit>
  void run(const Rows<kCount>& rows, const Block<kCount>& block) const {
    scalar_t carry[kBlock] = {}; // what the steps before this one ask of this step's return
    for (int64_t t = 0; t < rows.time(); ++t) {
      const auto at = [&](std::size_t k, int64_t r) {
        return block.template at<kUnit>(k, r) + t * rows.time_stride(k);
      };
      const bool last = t == rows.time() - 1;
      for (int64_t r = 0; r < block.count; ++r) {
        const scalar_t is_done = done[at(kDone, r)];
        const scalar_t g = gamma != nullptr ? gamma[at(kGamma, r)] : gamma_scalar;
        const scalar_t l = lmbda != nullptr ? lmbda[at(kLambda, r)] : lmbda_scalar;
        const scalar_t total = grad[at(kGrad, r)] + carry[r];
        const scalar_t scaled = g * total;
        carry[r] = scaled * l * (1 - is_done);
        scalar_t dv = scaled * (1 - l) + scaled * l * is_done;
        if (last) {
          dv += carry[r]; // the last step bootstraps from its own next value
        }
        grad_reward[at(kGradReward, r)] = total;
        grad_value[at(kGradValue, r)] = dv * static_cast<scalar_t>(!terminated[at(kTerminated, r)]);
      }
    }
  }

  void operator()(const Rows<kCount>& rows) const {
    for_each_block(rows, [&](const Block<kCount>& block) {
      block.unit ? run<true>(rows, block) : run<false>(rows, block);
    });
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
    Kernel{
        data<scalar_t>(next_value),
        data<scalar_t>(reward),
        data<bool>(done),
        data<bool>(terminated),
        data<scalar_t>(gamma),
        data<scalar_t>(lmbda),
        mutable_data<scalar_t>(out),
        static_cast<scalar_t>(gamma_scalar),
        static_cast<scalar_t>(lmbda_scalar)}(rows);
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
    Kernel{
        data<scalar_t>(grad),
        data<bool>(done),
        data<bool>(terminated),
        data<scalar_t>(gamma),
        data<scalar_t>(lmbda),
        mutable_data<scalar_t>(grad_value),
        mutable_data<scalar_t>(grad_reward),
        static_cast<scalar_t>(gamma_scalar),
        static_cast<scalar_t>(lmbda_scalar)}(rows);
  };
  dtype == ScalarType::Float ? launch(float{}) : launch(double{});
  return {grad_value, grad_reward};
}

} // namespace fastwm
