// The loops of loss_kernels.h, for the instruction set that the including file is compiled for. Nothing of the C++
// standard library: see vec.h.
#include "loss_kernels.h"
#include "vec.h"

namespace {

using fastwm::BalancedKl;
using fastwm::Distance;
using fastwm::GaussianNll;
using fastwm::LossKernels;
using fastwm::Pair;
using fastwm::TwoHot;

// The loops' bodies are lambdas that are called twice, for whole vectors and for the rest; left as functions they would
// keep their sums in memory and ask at each vector whether it is whole.
#define FASTWM_BODY __attribute__((always_inline))

// ------------------------------------------------------------------ vectors over rows of any width

// f(i, m) for i = 0, lanes, 2 lanes, ...: elements [i, i + m), m = lanes but for the last.
template <typename T, typename F>
FASTWM_INLINE void each(int64_t n, F f) {
  constexpr int64_t lanes = Lanes<T>::count;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    f(i, lanes);
  }
  if (i < n) {
    f(i, n - i);
  }
}

// The m elements at p; `fill` in the lanes beyond.
template <typename T>
FASTWM_INLINE Vec<T> get(const T* p, int64_t m, T fill) {
  return m == Lanes<T>::count ? load<T>(p) : load_part<T>(p, m, fill);
}

template <typename T>
FASTWM_INLINE void put(T* p, int64_t m, Vec<T> v) {
  if (m == Lanes<T>::count) {
    store<T>(p, v);
    return;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << m) - 1), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8((1u << m) - 1), (__m512d)v);
  }
#else
  T lanes[Lanes<T>::count];
  store<T>(lanes, v);
  for (int64_t j = 0; j < m; ++j) {
    p[j] = lanes[j];
  }
#endif
}

template <typename T>
FASTWM_INLINE Vec<T> first_lanes(int64_t m, Vec<T> v) {
  if (m == Lanes<T>::count) {
    return v;
  }
  T lanes[Lanes<T>::count];
  store<T>(lanes, v);
  for (int64_t j = m; j < Lanes<T>::count; ++j) {
    lanes[j] = 0;
  }
  return load<T>(lanes);
}

template <typename T>
FASTWM_INLINE T max_lanes(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_reduce_max_ps((__m512)v);
  } else {
    return _mm512_reduce_max_pd((__m512d)v);
  }
#else
  T most = v[0];
  for (int i = 1; i < Lanes<T>::count; ++i) {
    most = v[i] > most ? v[i] : most;
  }
  return most;
#endif
}

template <typename T>
constexpr T kInfinity = T(__builtin_inf());

// The largest that is a number: a NaN shows in the sum of exponentials.
template <typename T>
FASTWM_INLINE T max_of(const T* x, int64_t n) {
  Vec<T> most = spread<T>(-kInfinity<T>);
  each<T>(n, [&](int64_t i, int64_t m) FASTWM_BODY {
    const Vec<T> v = get<T>(x + i, m, -kInfinity<T>);
    most = v > most ? v : most;
  });
  return max_lanes<T>(most);
}

// e[i] = exp(x[i] - max) and their sum; e may be null.
template <typename T>
FASTWM_INLINE T exp_sum(const T* x, int64_t n, T max, T* e) {
  Vec<T> sum = spread<T>(0);
  each<T>(n, [&](int64_t i, int64_t m) FASTWM_BODY {
    const Vec<T> y = exp_(get<T>(x + i, m, -kInfinity<T>) - spread<T>(max));
    sum += first_lanes<T>(m, y); // beyond the row, max = -inf would give NaN
    if (e != nullptr) {
      put<T>(e + i, m, y);
    }
  });
  return sum_lanes<T>(sum);
}

template <typename T>
struct Soft {
  Vec<T> plus, sigmoid, sigmoid_of_minus; // softplus(x), its derivative, and 1 - that
};

// log(1 + u) and not log1p: what is added to a bound has to be right to the last place of the bound only.
template <typename T>
FASTWM_INLINE Soft<T> soft(Vec<T> x) {
  const Vec<T> zero = spread<T>(0), one = spread<T>(1);
  const Vec<T> u = exp_(-abs_<T>(x)), sum = one + u, large = one / sum, small = u * large;
  const Vec<T> plus = (x <= zero ? zero : x) + log_(sum); // NaN stays
  return {plus, x >= zero ? large : small, x >= zero ? small : large};
}

// ------------------------------------------------------------------ two-hot cross-entropy

template <typename T>
struct Place {
  int64_t lower; // the target lies between this bin and the next
  T lower_weight, upper_weight;
  T slope; // of upper_weight in the target
};

template <typename T>
FASTWM_INLINE Place<T> place(const TwoHot<T>& in, T target) {
  T x = target, slope = 1;
  if (in.symlog) {
    const T size = x < 0 ? -x : x;
    x = x < 0 ? -log1p_one(size) : (x > 0 ? log1p_one(size) : x);
    slope = 1 / (1 + size);
  }
  const T low = in.support[0], high = in.support[in.bins - 1];
  if (x < low || x > high) {
    slope = 0;
  }
  x = x < low ? low : (x > high ? high : x); // NaN stays
  int64_t begin = 0, end = in.bins; // the first bin beyond x, by halving
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (x >= in.support[middle]) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  const int64_t last = in.bins - 2, lower = begin - 1 < 0 ? 0 : (begin - 1 > last ? last : begin - 1);
  const T from = in.support[lower], width = in.support[lower + 1] - from;
  const T upper_weight = (x - from) / width;
  return {lower, 1 - upper_weight, upper_weight, slope / width};
}

template <typename T>
void two_hot(const TwoHot<T>& in, int64_t begin, int64_t end, T* loss) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = in.logits + r * in.bins;
    const Place<T> p = place(in, in.target[r]);
    const T max = max_of(x, in.bins);
    const T log_sum = log_one(exp_sum<T>(x, in.bins, max, nullptr));
    loss[r] = p.lower_weight * (log_sum - (x[p.lower] - max)) + p.upper_weight * (log_sum - (x[p.lower + 1] - max));
  }
}

template <typename T>
void two_hot_grad(
    const TwoHot<T>& in, int64_t begin, int64_t end, const T* grad, T* grad_logits, T* grad_target) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = in.logits + r * in.bins;
    T* out = grad_logits + r * in.bins;
    const Place<T> p = place(in, in.target[r]);
    const T max = max_of(x, in.bins), sum = exp_sum(x, in.bins, max, out), scale = grad[r] / sum;
    each<T>(in.bins, [&](int64_t i, int64_t m) FASTWM_BODY { put<T>(out + i, m, get<T>(out + i, m, T(0)) * spread<T>(scale)); });
    out[p.lower] -= grad[r] * p.lower_weight;
    out[p.lower + 1] -= grad[r] * p.upper_weight;
    if (grad_target != nullptr) {
      grad_target[r] = grad[r] * p.slope * (x[p.lower] - x[p.lower + 1]);
    }
  }
}

// ------------------------------------------------------------------ balanced KL

// The KL divergence of one row; with kGrad also what its gradients are before they are scaled.
template <typename T, bool kGrad>
FASTWM_INLINE double kl_row(const BalancedKl<T>& in, const T* q_logits, const T* p_logits, T* scratch, T* to_q, T* to_p) {
  const int64_t n = in.classes;
  T *const soft_q = scratch, *const soft_p = scratch + n, *const l = scratch + 2 * n, *const qr = scratch + 3 * n;
  const bool mixed = in.unimix != 0;
  const Vec<T> keep = spread<T>(1 - in.unimix), uniform = spread<T>(in.unimix / T(n));
  double kl = 0;
  for (int64_t g = 0; g < in.groups; ++g, q_logits += n, p_logits += n) {
    const T q_max = max_of(q_logits, n), p_max = max_of(p_logits, n);
    const T q_sum = exp_sum(q_logits, n, q_max, soft_q), p_sum = exp_sum(p_logits, n, p_max, soft_p);
    const T q_log = mixed ? 0 : log_one(q_sum), p_log = mixed ? 0 : log_one(p_sum);
    const Vec<T> q_scale = spread<T>(1 / q_sum), p_scale = spread<T>(1 / p_sum);
    Vec<T> divergence = spread<T>(0), mean_l = spread<T>(0), sum_qr = spread<T>(0);
    each<T>(n, [&](int64_t i, int64_t m) FASTWM_BODY {
      const Vec<T> sq = get<T>(soft_q + i, m, T(0)) * q_scale;
      const Vec<T> sp = get<T>(soft_p + i, m, T(0)) * p_scale;
      Vec<T> q = sq, r = spread<T>(1), ratio; // r: (1 - unimix) * sp / p, which is 1 where nothing is mixed
      if (mixed) {
        q = keep * sq + uniform;
        const Vec<T> kept = keep * sp, inverse = spread<T>(1) / (kept + uniform);
        ratio = log_(q * inverse);
        r = kept * inverse;
      } else {
        // Not the logarithm of a softmax, which may have underflowed.
        ratio = (get<T>(q_logits + i, m, T(0)) - spread<T>(q_max) - spread<T>(q_log)) -
            (get<T>(p_logits + i, m, T(0)) - spread<T>(p_max) - spread<T>(p_log));
      }
      divergence += first_lanes<T>(m, q * ratio);
      if constexpr (kGrad) {
        mean_l += first_lanes<T>(m, sq * ratio);
        sum_qr += first_lanes<T>(m, q * r);
        put<T>(soft_q + i, m, sq);
        put<T>(soft_p + i, m, sp);
        put<T>(l + i, m, ratio);
        put<T>(qr + i, m, q * r);
      }
    });
    kl += double(sum_lanes<T>(divergence));
    if constexpr (kGrad) {
      const Vec<T> mean = spread<T>(sum_lanes<T>(mean_l)), sum = spread<T>(sum_lanes<T>(sum_qr));
      each<T>(n, [&](int64_t i, int64_t m) FASTWM_BODY {
        const Vec<T> sq = get<T>(soft_q + i, m, T(0)), sp = get<T>(soft_p + i, m, T(0));
        put<T>(to_q + g * n + i, m, keep * sq * (get<T>(l + i, m, T(0)) - mean));
        put<T>(to_p + g * n + i, m, sp * sum - get<T>(qr + i, m, T(0)));
      });
    }
  }
  return kl;
}

template <typename T>
FASTWM_INLINE bool below(const BalancedKl<T>& in, T kl) {
  return in.free_nats != 0 && kl < in.free_nats; // NaN is not, and spreads
}

template <typename T>
void balanced_kl(const BalancedKl<T>& in, int64_t begin, int64_t end, T* scratch, T* loss) {
  const int64_t width = in.groups * in.classes;
  for (int64_t r = begin; r < end; ++r) {
    T kl = T(kl_row<T, false>(in, in.posterior + r * width, in.prior + r * width, scratch, nullptr, nullptr));
    kl = below(in, kl) ? in.free_nats : kl;
    loss[r] = in.dynamics_scale * kl + in.representation_scale * kl;
  }
}

template <typename T>
void balanced_kl_grad(
    const BalancedKl<T>& in, int64_t begin, int64_t end, const T* grad, T* scratch, T* grad_posterior, T* grad_prior) {
  const int64_t width = in.groups * in.classes;
  for (int64_t r = begin; r < end; ++r) {
    T *const to_q = grad_posterior + r * width, *const to_p = grad_prior + r * width;
    const T kl = T(kl_row<T, true>(in, in.posterior + r * width, in.prior + r * width, scratch, to_q, to_p));
    const bool off = below(in, kl); // a choice, not a product with 0: what is below may not be finite
    const Vec<T> q_scale = spread<T>(grad[r] * in.representation_scale);
    const Vec<T> p_scale = spread<T>(grad[r] * in.dynamics_scale);
    each<T>(width, [&](int64_t i, int64_t m) FASTWM_BODY {
      put<T>(to_q + i, m, off ? spread<T>(0) : get<T>(to_q + i, m, T(0)) * q_scale);
      put<T>(to_p + i, m, off ? spread<T>(0) : get<T>(to_p + i, m, T(0)) * p_scale);
    });
  }
}

// ------------------------------------------------------------------ Gaussian NLL with soft bounds

// Few features would leave most of a vector empty: rows are taken side by side, kSide elements or one row at a time,
// with the bounds repeated for each.
constexpr int64_t kSide = 256;

template <typename T>
struct Side {
  int64_t rows; // at a time
  T high[kSide], low[kSide]; // used where a row is at most half of kSide
  const T *max_logvar, *min_logvar;

  explicit Side(const GaussianNll<T>& in)
      : rows(in.features > 0 && in.features <= kSide / 2 ? kSide / in.features : 1),
        max_logvar(in.max_logvar),
        min_logvar(in.min_logvar) {
    if (rows > 1) {
      for (int64_t i = 0; i < rows * in.features; ++i) {
        high[i] = in.max_logvar[i % in.features];
        low[i] = in.min_logvar[i % in.features];
      }
      max_logvar = high;
      min_logvar = low;
    }
  }
};

template <typename T>
void gaussian_nll(const GaussianNll<T>& in, int64_t begin, int64_t end, T* loss) {
  const Side<T> side(in);
  for (int64_t first = begin; first < end; first += side.rows) {
    const int64_t rows = end - first < side.rows ? end - first : side.rows, at = first * in.features;
    const auto term = [&](int64_t i, int64_t m) FASTWM_BODY {
      const Vec<T> high = get<T>(side.max_logvar + i, m, T(0)), low = get<T>(side.min_logvar + i, m, T(0));
      const Vec<T> below_max = high - soft<T>(high - get<T>(in.logvar + at + i, m, T(0))).plus;
      const Vec<T> logvar = low + soft<T>(below_max - low).plus;
      const Vec<T> error = get<T>(in.mean + at + i, m, T(0)) - get<T>(in.target + at + i, m, T(0));
      return error * error * exp_(-logvar) + logvar;
    };
    if (side.rows == 1) {
      Vec<T> sum = spread<T>(0);
      each<T>(in.features, [&](int64_t i, int64_t m) FASTWM_BODY { sum += first_lanes<T>(m, term(i, m)); });
      loss[first] = sum_lanes<T>(sum);
      continue;
    }
    T terms[kSide];
    each<T>(rows * in.features, [&](int64_t i, int64_t m) FASTWM_BODY { put<T>(terms + i, m, term(i, m)); });
    for (int64_t r = 0; r < rows; ++r) {
      T sum = 0;
      for (int64_t i = 0; i < in.features; ++i) {
        sum += terms[r * in.features + i];
      }
      loss[first + r] = sum;
    }
  }
}

template <typename T>
void gaussian_nll_grad(
    const GaussianNll<T>& in,
    int64_t begin,
    int64_t end,
    const T* grad,
    T* grad_mean,
    T* grad_logvar,
    double* grad_max,
    double* grad_min) {
  const Vec<T> one = spread<T>(1);
  const Side<T> side(in);
  T grads[kSide], to_max[kSide], to_min[kSide];
  for (int64_t first = begin; first < end; first += side.rows) {
    const int64_t rows = end - first < side.rows ? end - first : side.rows;
    // One row may be longer than what is side by side.
    for (int64_t from = 0; from < rows * in.features; from += kSide) {
      const int64_t left = rows * in.features - from, n = left < kSide ? left : kSide;
      const int64_t at = first * in.features + from;
      for (int64_t i = 0, r = first, column = from; i < n; ++i) {
        grads[i] = grad[r];
        if (++column == in.features) {
          column = 0;
          ++r;
        }
      }
      each<T>(n, [&](int64_t i, int64_t m) FASTWM_BODY {
        const Vec<T> g = get<T>(grads + i, m, T(0));
        const Vec<T> high = get<T>(side.max_logvar + from + i, m, T(0));
        const Vec<T> low = get<T>(side.min_logvar + from + i, m, T(0));
        const Soft<T> upper = soft<T>(high - get<T>(in.logvar + at + i, m, T(0)));
        const Soft<T> lower = soft<T>(high - upper.plus - low);
        const Vec<T> precision = exp_(-(low + lower.plus));
        const Vec<T> error = get<T>(in.mean + at + i, m, T(0)) - get<T>(in.target + at + i, m, T(0));
        const Vec<T> to_logvar = g * (one - error * error * precision); // the bounded one
        const Vec<T> to_below_max = to_logvar * lower.sigmoid;
        put<T>(grad_mean + at + i, m, g * spread<T>(2) * error * precision);
        put<T>(grad_logvar + at + i, m, to_below_max * upper.sigmoid);
        put<T>(to_max + i, m, to_below_max * upper.sigmoid_of_minus);
        put<T>(to_min + i, m, to_logvar * lower.sigmoid_of_minus);
      });
      for (int64_t i = 0; i < n;) {
        const int64_t column = (from + i) % in.features;
        const int64_t count = in.features - column < n - i ? in.features - column : n - i;
        for (int64_t j = 0; j < count; ++j) {
          grad_max[column + j] += double(to_max[i + j]);
          grad_min[column + j] += double(to_min[i + j]);
        }
        i += count;
      }
    }
  }
}

// ------------------------------------------------------------------ sub-losses

template <typename T, Distance kDistance>
FASTWM_INLINE Vec<T> distance(Vec<T> x, Vec<T> y) {
  const Vec<T> zero = spread<T>(0), one = spread<T>(1), d = x - y;
  if constexpr (kDistance == Distance::kL1) {
    return abs_<T>(d);
  } else if constexpr (kDistance == Distance::kL2) {
    return d * d;
  } else if constexpr (kDistance == Distance::kSmoothL1) {
    const Vec<T> size = abs_<T>(d);
    return size < one ? spread<T>(T(0.5)) * d * d : size - spread<T>(T(0.5));
  } else if constexpr (kDistance == Distance::kBinaryCrossEntropy) {
    // torch's bound on a logarithm, so that certainty costs 100 and not infinity.
    const Vec<T> least = spread<T>(-100), log_x = max_<T>(log_(x), least), log_rest = max_<T>(log1p_(-x), least);
    const Vec<T> loss = (y - one) * log_rest - y * log_x;
    return ((x >= zero) & (x <= one)) ? loss : spread<T>(T(__builtin_nan("")));
  } else {
    const Vec<T> positive = x <= zero ? zero : x; // NaN stays
    return positive - x * y + log1p_(exp_(-abs_<T>(x)));
  }
}

template <typename T, Distance kDistance>
FASTWM_INLINE Vec<T> derivative(Vec<T> x, Vec<T> y) {
  const Vec<T> zero = spread<T>(0), one = spread<T>(1), d = x - y;
  if constexpr (kDistance == Distance::kL1) {
    return d > zero ? one : (d < zero ? -one : zero);
  } else if constexpr (kDistance == Distance::kL2) {
    return d + d;
  } else if constexpr (kDistance == Distance::kSmoothL1) {
    return clamp_<T>(d, T(-1), T(1));
  } else if constexpr (kDistance == Distance::kBinaryCrossEntropy) {
    const Vec<T> slope = d / max_<T>((one - x) * x, spread<T>(T(1e-12))); // torch's bound
    return ((x >= zero) & (x <= one)) ? slope : zero;
  } else {
    return sigmoid_<T>(x) - y;
  }
}

// Elements that are staged at a time: flags as numbers, a mask as one number per element.
constexpr int64_t kStage = 256;

template <typename T, typename F>
FASTWM_INLINE void staged(const Pair<T>& in, int64_t begin, int64_t end, F f) {
  T target[kStage], counts[kStage];
  for (int64_t at = begin; at < end; at += kStage) {
    const int64_t n = end - at < kStage ? end - at : kStage;
    const T* y = in.target == nullptr ? target : in.target + at;
    if (in.target == nullptr) {
      for (int64_t i = 0; i < n; ++i) {
        target[i] = T(in.flags[at + i]);
      }
    }
    if (in.mask != nullptr) {
      int64_t flag = at / in.per_flag, left = in.per_flag - at % in.per_flag;
      for (int64_t i = 0; i < n; ++i) {
        counts[i] = T(in.mask[flag]);
        if (--left == 0) {
          ++flag;
          left = in.per_flag;
        }
      }
    }
    f(at, n, y, in.mask == nullptr ? nullptr : counts);
  }
}

template <typename T, Distance kDistance>
double sum_of(const Pair<T>& in, int64_t begin, int64_t end) {
  double total = 0;
  staged<T>(in, begin, end, [&](int64_t at, int64_t n, const T* y, const T* counts) FASTWM_BODY {
    Vec<T> sum = spread<T>(0);
    each<T>(n, [&](int64_t i, int64_t m) FASTWM_BODY {
      Vec<T> loss = distance<T, kDistance>(get<T>(in.prediction + at + i, m, T(0)), get<T>(y + i, m, T(0)));
      if (counts != nullptr) {
        // Selected, not multiplied: what does not count may not be finite.
        loss = get<T>(counts + i, m, T(0)) != spread<T>(0) ? loss : spread<T>(0);
      }
      sum += first_lanes<T>(m, loss);
    });
    total += double(sum_lanes<T>(sum));
  });
  return total;
}

template <typename T, Distance kDistance>
void grad_of(const Pair<T>& in, int64_t begin, int64_t end, T scale, T* grad) {
  staged<T>(in, begin, end, [&](int64_t at, int64_t n, const T* y, const T* counts) FASTWM_BODY {
    each<T>(n, [&](int64_t i, int64_t m) FASTWM_BODY {
      Vec<T> g = derivative<T, kDistance>(get<T>(in.prediction + at + i, m, T(0)), get<T>(y + i, m, T(0)));
      g *= spread<T>(scale);
      if (counts != nullptr) {
        g = get<T>(counts + i, m, T(0)) != spread<T>(0) ? g : spread<T>(0);
      }
      put<T>(grad + at + i, m, g);
    });
  });
}

template <typename T>
double pair_sum(const Pair<T>& in, int64_t begin, int64_t end) {
  switch (in.distance) {
    case Distance::kL1: return sum_of<T, Distance::kL1>(in, begin, end);
    case Distance::kL2: return sum_of<T, Distance::kL2>(in, begin, end);
    case Distance::kSmoothL1: return sum_of<T, Distance::kSmoothL1>(in, begin, end);
    case Distance::kBinaryCrossEntropy: return sum_of<T, Distance::kBinaryCrossEntropy>(in, begin, end);
    default: return sum_of<T, Distance::kBinaryCrossEntropyWithLogits>(in, begin, end);
  }
}

template <typename T>
void pair_grad(const Pair<T>& in, int64_t begin, int64_t end, T scale, T* grad) {
  switch (in.distance) {
    case Distance::kL1: return grad_of<T, Distance::kL1>(in, begin, end, scale, grad);
    case Distance::kL2: return grad_of<T, Distance::kL2>(in, begin, end, scale, grad);
    case Distance::kSmoothL1: return grad_of<T, Distance::kSmoothL1>(in, begin, end, scale, grad);
    case Distance::kBinaryCrossEntropy: return grad_of<T, Distance::kBinaryCrossEntropy>(in, begin, end, scale, grad);
    default: return grad_of<T, Distance::kBinaryCrossEntropyWithLogits>(in, begin, end, scale, grad);
  }
}

template <typename T>
const LossKernels<T>* table() {
  static constexpr LossKernels<T> kernels = {
      two_hot<T>, two_hot_grad<T>, balanced_kl<T>, balanced_kl_grad<T>, gaussian_nll<T>, gaussian_nll_grad<T>,
      pair_sum<T>, pair_grad<T>,
  };
  return &kernels;
}

} // namespace
