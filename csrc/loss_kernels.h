// The loops of the losses, compiled once per instruction set (loss_kernels_*.cpp). Plain pointers, contiguous
// rows; no allocation, no threads. What they compute: fastwm/ops/ (the file of the op's name).
#pragma once

#include <stdint.h>

namespace fastwm {

// What a sub-loss measures between prediction and target, in the numbering of fastwm/ops/sub_losses.py.
enum class Distance : int64_t { kL1, kL2, kSmoothL1, kBinaryCrossEntropy, kBinaryCrossEntropyWithLogits, kCount };

template <typename T>
struct TwoHot {
  int64_t bins; // at least 2
  const T* support; // [bins], ascending
  bool symlog; // of the target, before it is placed on the support
  const T* logits; // [rows, bins]
  const T* target; // [rows]
};

template <typename T>
struct BalancedKl {
  int64_t groups, classes;
  const T* posterior; // [rows, groups, classes]
  const T* prior;
  T unimix, free_nats, dynamics_scale, representation_scale;
};

template <typename T>
struct GaussianNll {
  int64_t features;
  const T* mean; // [rows, features]
  const T* logvar;
  const T* target;
  const T* max_logvar; // [features]
  const T* min_logvar;
};

template <typename T>
struct Pair {
  Distance distance;
  const T* prediction;
  const T* target; // or, where it is null, flags
  const uint8_t* flags;
  const uint8_t* mask; // null, or one flag for each `per_flag` neighbouring elements
  int64_t per_flag;
};

template <typename T>
struct LossKernels {
  // Rows [begin, end) each.
  void (*two_hot)(const TwoHot<T>& in, int64_t begin, int64_t end, T* loss);
  // grad_target may be null.
  void (*two_hot_grad)(const TwoHot<T>& in, int64_t begin, int64_t end, const T* grad, T* grad_logits, T* grad_target);
  // scratch: room for 4 * classes.
  void (*balanced_kl)(const BalancedKl<T>& in, int64_t begin, int64_t end, T* scratch, T* loss);
  void (*balanced_kl_grad)(const BalancedKl<T>& in, int64_t begin, int64_t end, const T* grad, T* scratch,
                           T* grad_posterior, T* grad_prior);
  void (*gaussian_nll)(const GaussianNll<T>& in, int64_t begin, int64_t end, T* loss);
  // Adds the rows' share to grad_max and grad_min, [features] each.
  void (*gaussian_nll_grad)(const GaussianNll<T>& in, int64_t begin, int64_t end, const T* grad, T* grad_mean,
                            T* grad_logvar, double* grad_max, double* grad_min);
  // The sum of the distances of elements [begin, end).
  double (*pair_sum)(const Pair<T>& in, int64_t begin, int64_t end);
  // grad[i] = scale * derivative of element i's distance.
  void (*pair_grad)(const Pair<T>& in, int64_t begin, int64_t end, T scale, T* grad);
};

// Those of wider sets exist where the platform has them (FASTWM_X86).
const LossKernels<float>* loss_kernels_f32_avx512();
const LossKernels<double>* loss_kernels_f64_avx512();
const LossKernels<float>* loss_kernels_f32_avx2();
const LossKernels<double>* loss_kernels_f64_avx2();
const LossKernels<float>* loss_kernels_f32_portable();
const LossKernels<double>* loss_kernels_f64_portable();

} // namespace fastwm
