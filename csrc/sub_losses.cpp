#include "sub_losses.h"

#include "loss_op.h"

#include <cstddef>

namespace fastwm {

namespace {

using namespace loss;

constexpr const char* kOp = "fastwm::sub_losses";
// Elements that are summed as one: fixed, so that threads do not change the sum.
constexpr int64_t kChunk = 16384;

// A pair as it came, its tensors kept contiguous.
struct Input {
  Tensor prediction, target, mask;
  Distance distance;
  double weight;
  int64_t numel;
  int64_t per_flag = 0; // 0: no mask
  double count = 0; // what a mean is divided by

  bool is_float() const { return prediction.scalar_type() == ScalarType::Float; }

  template <typename T>
  Pair<T> pair() const {
    const bool flags = target.scalar_type() == ScalarType::Bool;
    return {
        distance,
        data<T>(prediction),
        flags ? nullptr : data<T>(target),
        flags ? data<uint8_t>(target) : nullptr,
        per_flag ? data<uint8_t>(mask) : nullptr,
        per_flag};
  }
};

std::vector<Input> inputs_of(
    const std::vector<Tensor>& predictions,
    const std::vector<Tensor>& targets,
    const std::vector<Tensor>& masks,
    const std::vector<int64_t>& distances,
    const std::vector<double>& weights,
    bool mean) {
  const std::size_t n = predictions.size();
  STD_TORCH_CHECK(
      targets.size() == n && distances.size() == n && weights.size() == n && (masks.empty() || masks.size() == n),
      kOp, ": every prediction needs a target, a distance and a weight, and where there are masks a mask");
  std::vector<Input> inputs;
  for (std::size_t i = 0; i < n; ++i) {
    const ScalarType dtype = check_dtype(kOp, predictions[i]);
    const int64_t numel = predictions[i].numel();
    check(kOp, "prediction", predictions[i], dtype, numel);
    const bool flags = targets[i].scalar_type() == ScalarType::Bool;
    check(kOp, "target", targets[i], flags ? ScalarType::Bool : dtype, numel);
    STD_TORCH_CHECK(distances[i] >= 0 && distances[i] < int64_t(Distance::kCount), kOp, ": no such distance");
    Input input{dense(predictions[i]), dense(targets[i]), targets[i], Distance(distances[i]), weights[i], numel};
    input.count = static_cast<double>(numel);
    if (!masks.empty()) {
      const int64_t count = masks[i].numel();
      check(kOp, "mask", masks[i], ScalarType::Bool, count);
      STD_TORCH_CHECK(
          count > 0 ? numel % count == 0 : numel == 0, kOp, ": a mask of ", count, " elements for ", numel, " does not fit");
      input.mask = dense(masks[i]);
      input.per_flag = count > 0 ? std::max<int64_t>(1, numel / count) : 1;
      if (mean) {
        const uint8_t* flag = data<uint8_t>(input.mask);
        int64_t set = 0;
        for (int64_t j = 0; j < count; ++j) {
          set += flag[j];
        }
        input.count = std::max<double>(1, static_cast<double>(set * (count > 0 ? numel / count : 0)));
      }
    }
    inputs.push_back(input);
  }
  return inputs;
}

struct Chunk {
  std::size_t input;
  int64_t begin, end;
};

std::vector<Chunk> chunks_of(const std::vector<Input>& inputs) {
  std::vector<Chunk> chunks;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    for (int64_t begin = 0; begin < inputs[i].numel; begin += kChunk) {
      chunks.push_back({i, begin, std::min(inputs[i].numel, begin + kChunk)});
    }
  }
  return chunks;
}

template <typename F>
void parallel_chunks(const std::vector<Chunk>& chunks, F f) {
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      f(c, chunks[c]);
    }
  });
}

} // namespace

std::vector<Tensor> sub_losses(
    const std::vector<Tensor>& predictions,
    const std::vector<Tensor>& targets,
    const std::vector<Tensor>& masks,
    const std::vector<int64_t>& distances,
    const std::vector<double>& weights,
    bool mean) {
  const auto inputs = inputs_of(predictions, targets, masks, distances, weights, mean);
  const auto chunks = chunks_of(inputs);
  std::vector<double> sums(chunks.size());
  parallel_chunks(chunks, [&](int64_t c, const Chunk& chunk) {
    const Input& in = inputs[chunk.input];
    sums[c] = in.is_float() ? kernels<float>().pair_sum(in.pair<float>(), chunk.begin, chunk.end)
                            : kernels<double>().pair_sum(in.pair<double>(), chunk.begin, chunk.end);
  });
  std::vector<Tensor> losses;
  std::size_t c = 0;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    double sum = 0;
    for (; c < chunks.size() && chunks[c].input == i; ++c) {
      sum += sums[c];
    }
    const double loss = inputs[i].weight * (mean ? sum / inputs[i].count : sum);
    Tensor out = torch::stable::new_empty(inputs[i].prediction, {});
    if (inputs[i].is_float()) {
      *mutable_data<float>(out) = static_cast<float>(loss);
    } else {
      *mutable_data<double>(out) = loss;
    }
    losses.push_back(out);
  }
  return losses;
}

std::vector<Tensor> sub_losses_backward(
    const std::vector<Tensor>& grads,
    const std::vector<Tensor>& predictions,
    const std::vector<Tensor>& targets,
    const std::vector<Tensor>& masks,
    const std::vector<int64_t>& distances,
    const std::vector<double>& weights,
    bool mean) {
  const auto inputs = inputs_of(predictions, targets, masks, distances, weights, mean);
  STD_TORCH_CHECK(grads.size() == inputs.size(), kOp, ": every prediction needs a gradient of its loss");
  std::vector<Tensor> outputs;
  std::vector<double> scales;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    check(kOp, "grad", grads[i], inputs[i].prediction.scalar_type(), 1);
    const double grad = inputs[i].is_float() ? double(*data<float>(grads[i])) : *data<double>(grads[i]);
    scales.push_back(grad * inputs[i].weight / (mean ? inputs[i].count : 1));
    outputs.push_back(torch::stable::empty_like(inputs[i].prediction));
  }
  const auto chunks = chunks_of(inputs);
  parallel_chunks(chunks, [&](int64_t, const Chunk& chunk) {
    const Input& in = inputs[chunk.input];
    const Tensor& out = outputs[chunk.input];
    const double scale = scales[chunk.input];
    if (in.is_float()) {
      kernels<float>().pair_grad(in.pair<float>(), chunk.begin, chunk.end, float(scale), mutable_data<float>(out));
    } else {
      kernels<double>().pair_grad(in.pair<double>(), chunk.begin, chunk.end, scale, mutable_data<double>(out));
    }
  });
  return outputs;
}

} // namespace fastwm
