// The kernels of row_kernels.h, for the instruction set that the including file is compiled for. Nothing of the
// C++ standard library: see vec.h.
#include "product.h"
#include "row_kernels.h"
#include "vec.h"

namespace {

using fastwm::Binary;
using fastwm::Kernels;
using fastwm::Operand;
using fastwm::Reduce;
using fastwm::UnaryGrad;

// ------------------------------------------------------------------ elementwise

template <typename T, typename F>
FASTWM_INLINE void map(Rows n, const T* x, T* out, F f) {
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t r = 0; r < n.rows; ++r, x += n.ld, out += n.ld) {
    for (int64_t i = 0; i < n.width; i += lanes) {
      store<T>(out + i, f(load<T>(x + i)));
    }
  }
}

template <typename T>
FASTWM_INLINE Vec<T> truth(IVec<T> mask) {
  const Vec<T> one = spread<T>(1);
  return (Vec<T>)(mask & bits<T>(one));
}

template <typename T>
FASTWM_INLINE Vec<T> gelu_tanh_inner(Vec<T> x) {
  return spread<T>(T(0.7978845608028654)) * fma<Vec<T>>(spread<T>(T(0.044715)) * x * x, x, x);
}

// tanh(softplus(x)) as a ratio of polynomials in exp(x): (e^2 + 2 e) / (e^2 + 2 e + 2).
template <typename T>
FASTWM_INLINE Vec<T> tanh_softplus(Vec<T> x) {
  const Vec<T> e = exp_(clamp_<T>(x, T(sizeof(T) == 4 ? -110 : -750), T(20))); // 0 at the lower end
  const Vec<T> n = e * (e + spread<T>(2));
  if constexpr (sizeof(T) == 4) {
    return n * reciprocal_<T>(n + spread<T>(2));
  }
  return n / (n + spread<T>(2));
}

template <typename T>
FASTWM_INLINE Vec<T> softplus_(Vec<T> x, T beta, T threshold) {
  const Vec<T> z = x * spread<T>(beta), zero = spread<T>(0);
  // log(1 + exp(z)) with the part that matters for large z set apart, so that it is not rounded three times.
  const Vec<T> positive = z <= zero ? zero : z; // NaN stays
  const Vec<T> y = (positive + log1p_(exp_(-abs_<T>(z)))) / spread<T>(beta);
  return z > spread<T>(threshold) ? x : y;
}

template <typename T>
void unary_rows(Unary op, const T* params, Rows n, const T* x, T* out) {
  using V = Vec<T>;
  const V one = spread<T>(1), zero = spread<T>(0);
  switch (op) {
    case Unary::kNeg: return map<T>(n, x, out, [](V v) { return -v; });
    case Unary::kExp: return map<T>(n, x, out, [](V v) { return exp_(v); });
    case Unary::kLog: return map<T>(n, x, out, [](V v) { return log_(v); });
    case Unary::kLog1p: return map<T>(n, x, out, [](V v) { return log1p_(v); });
    case Unary::kExpm1: return map<T>(n, x, out, [](V v) { return expm1_(v); });
    case Unary::kSqrt: return map<T>(n, x, out, [](V v) { return sqrt_<T>(v); });
    case Unary::kRsqrt: return map<T>(n, x, out, [=](V v) { return one / sqrt_<T>(v); });
    case Unary::kReciprocal: return map<T>(n, x, out, [=](V v) { return one / v; });
    case Unary::kSquare: return map<T>(n, x, out, [](V v) { return v * v; });
    case Unary::kAbs: return map<T>(n, x, out, [](V v) { return abs_<T>(v); });
    case Unary::kSign:
      return map<T>(n, x, out, [=](V v) { return v != v ? zero : truth<T>(v > zero) - truth<T>(v < zero); });
    case Unary::kFloor:
      return map<T>(n, x, out, [](V v) { return lanewise<T>(v, [](T s) { return floor_one(s); }); });
    case Unary::kCeil:
      return map<T>(n, x, out, [](V v) { return lanewise<T>(v, [](T s) { return ceil_one(s); }); });
    case Unary::kRound:
      return map<T>(n, x, out, [](V v) { return lanewise<T>(v, [](T s) { return nearbyint_one(s); }); });
    case Unary::kTrunc:
      return map<T>(n, x, out, [](V v) { return lanewise<T>(v, [](T s) { return trunc_one(s); }); });
    case Unary::kSin: return map<T>(n, x, out, [](V v) { return lanewise<T>(v, [](T s) { return sin_one(s); }); });
    case Unary::kCos: return map<T>(n, x, out, [](V v) { return lanewise<T>(v, [](T s) { return cos_one(s); }); });
    case Unary::kErf: return map<T>(n, x, out, [](V v) { return erf_(v); });
    case Unary::kTanh: return map<T>(n, x, out, [](V v) { return tanh_(v); });
    case Unary::kSigmoid: return map<T>(n, x, out, [](V v) { return sigmoid_<T>(v); });
    case Unary::kLogSigmoid:
      return map<T>(n, x, out, [=](V v) { return min_<T>(v, zero) - log1p_(exp_(-abs_<T>(v))); });
    case Unary::kRelu: return map<T>(n, x, out, [=](V v) { return v <= zero ? zero : v; });
    case Unary::kSilu: return map<T>(n, x, out, [](V v) { return v * quick_sigmoid<T>(v); });
    case Unary::kMish: return map<T>(n, x, out, [](V v) { return v * tanh_softplus<T>(v); });
    case Unary::kGelu: {
      const V half = spread<T>(T(0.5)), r = spread<T>(T(0.7071067811865476));
      return map<T>(n, x, out, [=](V v) { return v * half * (one + erf_(v * r)); });
    }
    case Unary::kGeluTanh: {
      const V half = spread<T>(T(0.5));
      return map<T>(n, x, out, [=](V v) { return half * v * (one + tanh_(gelu_tanh_inner<T>(v))); });
    }
    case Unary::kLeakyRelu: {
      const V slope = spread<T>(params[0]);
      return map<T>(n, x, out, [=](V v) { return v > zero ? v : v * slope; });
    }
    case Unary::kSoftplus: {
      const T beta = params[0], threshold = params[1];
      return map<T>(n, x, out, [=](V v) { return softplus_<T>(v, beta, threshold); });
    }
    case Unary::kElu: {
      const V negative = spread<T>(params[0] * params[1]), scale = spread<T>(params[1]), inner = spread<T>(params[2]);
      return map<T>(n, x, out, [=](V v) { return v > zero ? v * scale : expm1_(v * inner) * negative; });
    }
    case Unary::kNot: return map<T>(n, x, out, [=](V v) { return truth<T>(v == zero); });
    case Unary::kIsNan: return map<T>(n, x, out, [](V v) { return truth<T>(v != v); });
    case Unary::kIsFinite: return map<T>(n, x, out, [=](V v) { return truth<T>(v - v == zero); });
    case Unary::kToBool: return map<T>(n, x, out, [=](V v) { return truth<T>(v != zero); });
    case Unary::kSafeTanh: {
      const V top = spread<T>(params[0]);
      return map<T>(n, x, out, [=](V v) { return max_<T>(min_<T>(tanh_(v), top), -top); });
    }
    case Unary::kCopy:
      if (x != out) {
        for (int64_t r = 0; r < n.rows; ++r) {
          memcpy(out + r * n.ld, x + r * n.ld, n.width * sizeof(T));
        }
      }
      return;
    case Unary::kNone: return;
  }
}

template <typename T>
void unary(Unary op, const T* params, int64_t n, const T* x, T* out) {
  unary_rows<T>(op, params, Rows{1, n, n}, x, out);
}

template <typename T, typename F>
FASTWM_INLINE void map2(int64_t n, const T* a, const T* b, T* out, F f) {
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t i = 0; i < n; i += lanes) {
    store<T>(out + i, f(load<T>(a + i), load<T>(b + i)));
  }
}

template <typename T>
void unary_grad(UnaryGrad op, const T* params, int64_t n, const T* g, const T* x, T* out) {
  using V = Vec<T>;
  const V one = spread<T>(1), zero = spread<T>(0), half = spread<T>(T(0.5));
  switch (op) {
    case UnaryGrad::kTanh: return map2<T>(n, g, x, out, [=](V d, V y) { return d * (one - y * y); });
    case UnaryGrad::kSigmoid: return map2<T>(n, g, x, out, [=](V d, V y) { return d * y * (one - y); });
    case UnaryGrad::kRelu: return map2<T>(n, g, x, out, [=](V d, V v) { return v <= zero ? zero : d; });
    case UnaryGrad::kSilu:
      return map2<T>(n, g, x, out, [=](V d, V v) {
        const V s = quick_sigmoid<T>(v);
        return d * s * fma<V>(v, one - s, one);
      });
    case UnaryGrad::kMish:
      return map2<T>(n, g, x, out, [=](V d, V v) {
        const V t = tanh_softplus<T>(v), s = quick_sigmoid<T>(v);
        return d * fma<V>(v * s, one - t * t, t);
      });
    case UnaryGrad::kGelu: {
      const V r = spread<T>(T(0.7071067811865476)), k = spread<T>(T(0.3989422804014327));
      return map2<T>(n, g, x, out, [=](V d, V v) {
        const V density = v * k * exp_(-half * v * v);
        return d * (half * (one + erf_(v * r)) + density);
      });
    }
    case UnaryGrad::kGeluTanh: {
      const V k = spread<T>(T(0.7978845608028654)), c = spread<T>(T(3 * 0.044715));
      return map2<T>(n, g, x, out, [=](V d, V v) {
        const V t = tanh_(gelu_tanh_inner<T>(v));
        const V inner = k * fma<V>(c * v, v, one);
        return d * half * fma<V>(v * (one - t * t), inner, one + t);
      });
    }
    case UnaryGrad::kLeakyRelu: {
      const V slope = spread<T>(params[0]);
      return map2<T>(n, g, x, out, [=](V d, V v) { return v > zero ? d : d * slope; });
    }
    case UnaryGrad::kSoftplus: {
      const V beta = spread<T>(params[0]), threshold = spread<T>(params[1]);
      return map2<T>(n, g, x, out, [=](V d, V v) {
        const V z = v * beta;
        return z > threshold ? d : d * sigmoid_<T>(z);
      });
    }
    case UnaryGrad::kElu: {
      const V scale = spread<T>(params[1]), inner = spread<T>(params[2]);
      const V negative = spread<T>(params[0] * params[1] * params[2]);
      return map2<T>(n, g, x, out, [=](V d, V v) {
        return d * (v > zero ? scale : negative * exp_(v * inner));
      });
    }
    case UnaryGrad::kLogSigmoid: return map2<T>(n, g, x, out, [=](V d, V v) { return d * sigmoid_<T>(-v); });
  }
}

template <typename T>
FASTWM_INLINE Vec<T> element(const T* row, bool single, int64_t i) {
  return single ? spread<T>(row[0]) : load<T>(row + i);
}

template <typename T, typename F>
FASTWM_INLINE void map_rows(int64_t rows, int64_t ld, Operand<T> a, Operand<T> b, T* out, F f) {
  constexpr int64_t lanes = Lanes<T>::count;
  if (!a.single && !b.single && a.row_stride == ld && b.row_stride == ld) {
    map2<T>(rows * ld, a.data, b.data, out, f);
    return;
  }
  if (b.single && b.row_stride == 0 && !a.single && a.row_stride == ld) { // x with a number
    const Vec<T> y = spread<T>(b.data[0]);
    map<T>(Rows{1, rows * ld, ld}, a.data, out, [=](Vec<T> x) { return f(x, y); });
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = a.data + r * a.row_stride;
    const T* y = b.data + r * b.row_stride;
    for (int64_t i = 0; i < ld; i += lanes) {
      store<T>(out + r * ld + i, f(element<T>(x, a.single, i), element<T>(y, b.single, i)));
    }
  }
}

template <typename T>
FASTWM_INLINE Vec<T> pow_(Vec<T> x, Vec<T> y) {
  T a[Lanes<T>::count], b[Lanes<T>::count];
  store<T>(a, x);
  store<T>(b, y);
  for (int i = 0; i < Lanes<T>::count; ++i) {
    a[i] = pow_one(a[i], b[i]);
  }
  return load<T>(a);
}

template <typename T>
void binary(Binary op, int64_t rows, int64_t ld, Operand<T> a, Operand<T> b, T* out) {
  using V = Vec<T>;
  const V zero = spread<T>(0);
  switch (op) {
    case Binary::kAdd: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return x + y; });
    case Binary::kSub: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return x - y; });
    case Binary::kMul: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return x * y; });
    case Binary::kDiv: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return x / y; });
    case Binary::kPow: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return pow_<T>(x, y); });
    case Binary::kMaximum: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return max_<T>(x, y); });
    case Binary::kMinimum: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return min_<T>(x, y); });
    case Binary::kClampMin: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return max_<T>(x, y); });
    case Binary::kClampMax: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return min_<T>(x, y); });
    case Binary::kGt: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return truth<T>(x > y); });
    case Binary::kGe: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return truth<T>(x >= y); });
    case Binary::kLt: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return truth<T>(x < y); });
    case Binary::kLe: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return truth<T>(x <= y); });
    case Binary::kEq: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return truth<T>(x == y); });
    case Binary::kNe: return map_rows<T>(rows, ld, a, b, out, [](V x, V y) { return truth<T>(x != y); });
    case Binary::kAnd:
      return map_rows<T>(rows, ld, a, b, out, [=](V x, V y) { return truth<T>((x != zero) & (y != zero)); });
    case Binary::kOr:
      return map_rows<T>(rows, ld, a, b, out, [=](V x, V y) { return truth<T>((x != zero) | (y != zero)); });
    case Binary::kXor:
      return map_rows<T>(rows, ld, a, b, out, [=](V x, V y) { return truth<T>((x != zero) ^ (y != zero)); });
  }
}

template <typename T>
void where(int64_t rows, int64_t ld, Operand<T> c, Operand<T> a, Operand<T> b, T* out) {
  constexpr int64_t lanes = Lanes<T>::count;
  const Vec<T> zero = spread<T>(0);
  for (int64_t r = 0; r < rows; ++r) {
    const T* z = c.data + r * c.row_stride;
    const T* x = a.data + r * a.row_stride;
    const T* y = b.data + r * b.row_stride;
    for (int64_t i = 0; i < ld; i += lanes) {
      store<T>(out + r * ld + i,
               element<T>(z, c.single, i) != zero ? element<T>(x, a.single, i) : element<T>(y, b.single, i));
    }
  }
}

// ------------------------------------------------------------------ within the row

template <typename T>
FASTWM_INLINE T max_of(const T* x, int64_t n) { // NaN where one is
  constexpr int64_t lanes = Lanes<T>::count;
  T best = x[0];
  int64_t i = 0;
  if (n >= lanes) {
    Vec<T> v = load<T>(x);
    for (i = lanes; i + lanes <= n; i += lanes) {
      v = max_<T>(v, load<T>(x + i));
    }
    best = v[0];
    for (int k = 1; k < lanes; ++k) {
      best = (best > v[k] || best != best) ? best : v[k];
    }
  }
  for (; i < n; ++i) {
    best = (best > x[i] || best != best) ? best : x[i];
  }
  return best;
}

template <typename T, typename F>
FASTWM_INLINE T sum_over(int64_t n, F f) { // f(i, vector?) : value of element i, or of a vector of them
  constexpr int64_t lanes = Lanes<T>::count;
  T s = 0;
  int64_t i = 0;
  if (n >= lanes) {
    Vec<T> v = spread<T>(0);
    for (; i + lanes <= n; i += lanes) {
      v = v + f.wide(i);
    }
    s = sum_lanes<T>(v);
  }
  for (; i < n; ++i) {
    s += f.one(i);
  }
  return s;
}

template <typename T>
struct Plain {
  const T* x;
  inline __attribute__((always_inline)) Vec<T> wide(int64_t i) const { return load<T>(x + i); }
  inline __attribute__((always_inline)) T one(int64_t i) const { return x[i]; }
};

template <typename T>
struct Times {
  const T *x, *y;
  inline __attribute__((always_inline)) Vec<T> wide(int64_t i) const { return load<T>(x + i) * load<T>(y + i); }
  inline __attribute__((always_inline)) T one(int64_t i) const { return x[i] * y[i]; }
};

template <typename T>
struct SquaredFrom {
  const T* x;
  T mean;
  inline __attribute__((always_inline)) Vec<T> wide(int64_t i) const {
    const Vec<T> d = load<T>(x + i) - spread<T>(mean);
    return d * d;
  }
  inline __attribute__((always_inline)) T one(int64_t i) const { return (x[i] - mean) * (x[i] - mean); }
};

// exp of n elements (any n), from x - shift into out.
template <typename T>
FASTWM_INLINE void exp_shifted(const T* x, T shift, T* out, int64_t n) {
  constexpr int64_t lanes = Lanes<T>::count;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    store<T>(out + i, exp_(load<T>(x + i) - spread<T>(shift)));
  }
  if (i < n) {
    T rest[lanes] = {};
    for (int64_t k = i; k < n; ++k) {
      rest[k - i] = x[k] - shift;
    }
    store<T>(rest, exp_(load<T>(rest)));
    for (int64_t k = i; k < n; ++k) {
      out[k] = rest[k - i];
    }
  }
}

template <typename T>
FASTWM_INLINE T log_one(T x) {
  return log_(spread<T>(x))[0];
}

template <typename T>
FASTWM_INLINE T exp_sum(const T* x, T shift, int64_t n) {
  constexpr int64_t lanes = Lanes<T>::count;
  Vec<T> total = spread<T>(0);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    total = total + exp_(load<T>(x + i) - spread<T>(shift));
  }
  T s = sum_lanes<T>(total);
  if (i < n) {
    T rest[lanes];
    for (int64_t k = 0; k < lanes; ++k) {
      rest[k] = i + k < n ? x[i + k] - shift : T(-__builtin_inff());
    }
    s += sum_lanes<T>(exp_(load<T>(rest)));
  }
  return s;
}

template <typename T>
void reduce(Reduce op, int64_t rows, int64_t groups, int64_t n, const T* x, int64_t ldx, T* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      const T* p = x + r * ldx + g * n;
      T y = 0;
      switch (op) {
        case Reduce::kSum: y = sum_over<T>(n, Plain<T>{p}); break;
        case Reduce::kMean: y = sum_over<T>(n, Plain<T>{p}) / T(n); break;
        case Reduce::kMax: y = max_of<T>(p, n); break;
        case Reduce::kMin:
          y = p[0];
          for (int64_t i = 1; i < n; ++i) {
            y = (y < p[i] || y != y) ? y : p[i];
          }
          break;
        case Reduce::kLogSumExp: {
          const T m = max_of<T>(p, n);
          const T shift = m - m == 0 ? m : T(0); // infinite or NaN
          y = shift + log_one<T>(exp_sum<T>(p, shift, n));
          break;
        }
        case Reduce::kArgMax:
        case Reduce::kArgMin: { // the first of equals; a NaN wins
          int64_t best = 0;
          if (op == Reduce::kArgMax) {
            const T m = max_of<T>(p, n);
            if (m == m) {
              while (p[best] != m) {
                ++best;
              }
            } else {
              while (p[best] == p[best]) {
                ++best;
              }
            }
          } else {
            for (int64_t i = 1; i < n; ++i) {
              best = (p[i] < p[best] || (p[i] != p[i] && p[best] == p[best])) ? i : best;
            }
          }
          y = T(best);
          break;
        }
      }
      out[r * ldo + g] = y;
    }
  }
}

template <typename T>
FASTWM_INLINE void scale_by(T* x, T factor, int64_t n) {
  constexpr int64_t lanes = Lanes<T>::count;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    store<T>(x + i, load<T>(x + i) * spread<T>(factor));
  }
  for (; i < n; ++i) {
    x[i] *= factor;
  }
}

template <typename T>
void softmax(bool log, int64_t rows, int64_t groups, int64_t n, const T* x, int64_t ldx, T* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * ldx;
    T* to = out + r * ldo;
    if (!log && n < Lanes<T>::count && groups > 1) {
      // Small groups (SimNorm): subtract each group's largest, one exp over the whole row, divide.
      for (int64_t g = 0; g < groups; ++g) {
        const T m = max_of<T>(from + g * n, n);
        for (int64_t i = g * n; i < (g + 1) * n; ++i) {
          to[i] = from[i] - m;
        }
      }
      exp_shifted<T>(to, T(0), to, groups * n);
      for (int64_t g = 0; g < groups; ++g) {
        T* p = to + g * n;
        T total = 0;
        for (int64_t i = 0; i < n; ++i) {
          total += p[i];
        }
        const T factor = T(1) / total;
        for (int64_t i = 0; i < n; ++i) {
          p[i] *= factor;
        }
      }
      continue;
    }
    for (int64_t g = 0; g < groups; ++g) {
      const T* p = from + g * n;
      T* q = to + g * n;
      const T m = max_of<T>(p, n);
      if (log) {
        const T rest = log_one<T>(exp_sum<T>(p, m, n));
        for (int64_t i = 0; i < n; ++i) {
          q[i] = (p[i] - m) - rest; // m + rest would lose the rest where m is large
        }
      } else {
        exp_shifted<T>(p, m, q, n);
        scale_by<T>(q, T(1) / sum_over<T>(n, Plain<T>{q}), n);
      }
    }
  }
}

template <typename T>
void softmax_grad(bool log, int64_t rows, int64_t groups, int64_t n, const T* g, int64_t ldg, const T* y, int64_t ldy,
                  T* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < groups; ++k) {
      const T* d = g + r * ldg + k * n;
      const T* p = y + r * ldy + k * n;
      T* q = out + r * ldo + k * n;
      if (log) {
        const T s = sum_over<T>(n, Plain<T>{d});
        exp_shifted<T>(p, T(0), q, n);
        for (int64_t i = 0; i < n; ++i) {
          q[i] = d[i] - q[i] * s;
        }
      } else {
        const T s = sum_over<T>(n, Times<T>{d, p});
        for (int64_t i = 0; i < n; ++i) {
          q[i] = p[i] * (d[i] - s);
        }
      }
    }
  }
}

template <typename T>
void layer_norm(int64_t rows, int64_t groups, int64_t n, const T* x, int64_t ldx, const T* w, const T* b, T eps, T* out,
                int64_t ldo) {
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      const T* p = x + r * ldx + g * n;
      T* q = out + r * ldo + g * n;
      const T mean = sum_over<T>(n, Plain<T>{p}) / T(n);
      const T rstd = T(1) / sqrt_one(sum_over<T>(n, SquaredFrom<T>{p, mean}) / T(n) + eps);
      int64_t i = 0;
      for (; i + lanes <= n; i += lanes) {
        Vec<T> v = (load<T>(p + i) - spread<T>(mean)) * spread<T>(rstd);
        v = w ? v * load<T>(w + i) : v;
        store<T>(q + i, b ? v + load<T>(b + i) : v);
      }
      for (; i < n; ++i) {
        T v = (p[i] - mean) * rstd;
        v = w ? v * w[i] : v;
        q[i] = b ? v + b[i] : v;
      }
    }
  }
}

// With h the normalised x and d = g * w: (d - mean(d) - h * mean(d * h)) * rstd.
template <typename T>
void layer_norm_grad(int64_t rows, int64_t groups, int64_t n, const T* g, int64_t ldg, const T* x, int64_t ldx,
                     const T* w, T eps, T* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < groups; ++k) {
      const T* d = g + r * ldg + k * n;
      const T* p = x + r * ldx + k * n;
      T* q = out + r * ldo + k * n;
      const T mean = sum_over<T>(n, Plain<T>{p}) / T(n);
      const T rstd = T(1) / sqrt_one(sum_over<T>(n, SquaredFrom<T>{p, mean}) / T(n) + eps);
      T sum_d = 0, sum_dh = 0;
      for (int64_t i = 0; i < n; ++i) {
        const T e = w ? d[i] * w[i] : d[i];
        sum_d += e;
        sum_dh += e * ((p[i] - mean) * rstd);
      }
      const T mean_d = sum_d / T(n), mean_dh = sum_dh / T(n);
      for (int64_t i = 0; i < n; ++i) {
        const T e = w ? d[i] * w[i] : d[i];
        q[i] = (e - mean_d - (p[i] - mean) * rstd * mean_dh) * rstd;
      }
    }
  }
}

template <typename T>
void add_rows(int64_t rows, int64_t width, const T* x, int64_t ldx, T* sum) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; ++i) {
      sum[i] += x[r * ldx + i];
    }
  }
}

// ------------------------------------------------------------------ staleness

template <typename T>
uint64_t fingerprint(const T* data, int64_t n) {
  // As xxHash's long inputs: a product of the halves of each 64-bit word, both mixed with a key of its own, plus
  // the word itself. Additions alone depend on one another, so it runs as fast as memory is read.
  typedef uint64_t W __attribute__((vector_size(FASTWM_BYTES)));
  typedef W U __attribute__((aligned(4), may_alias));
  constexpr int64_t lanes = FASTWM_BYTES / 8, chains = 4;
  const char* p = reinterpret_cast<const char*>(data);
  const int64_t bytes = n * int64_t(sizeof(T));
  W sum[chains], key[chains];
  for (int64_t j = 0; j < chains; ++j) {
    for (int64_t k = 0; k < lanes; ++k) {
      sum[j][k] = 0x9e3779b97f4a7c15ull * uint64_t(j * lanes + k + 1);
      key[j][k] = 0xc2b2ae3d27d4eb4full * uint64_t(j * lanes + k + 1);
    }
  }
  const W low = W{} + 0xffffffffull, next = W{} + 0x165667b19e3779f9ull;
  int64_t i = 0;
  for (; i + chains * FASTWM_BYTES <= bytes; i += chains * FASTWM_BYTES) {
    for (int64_t j = 0; j < chains; ++j) {
      const W word = *reinterpret_cast<const U*>(p + i + j * FASTWM_BYTES), mixed = word ^ key[j];
#if defined(__AVX512F__)
      sum[j] += word + (W)_mm512_mul_epu32((__m512i)mixed, (__m512i)(mixed >> 32));
#else
      sum[j] += word + (mixed & low) * (mixed >> 32);
#endif
      key[j] += next;
    }
  }
  (void)low;
  uint64_t hash = 0x9e3779b97f4a7c15ull ^ uint64_t(n);
  auto fold = [&](uint64_t word) {
    hash = (hash ^ word) * 0xff51afd7ed558ccdull;
    hash ^= hash >> 32;
  };
  for (int64_t j = 0; j < chains; ++j) {
    for (int64_t k = 0; k < lanes; ++k) {
      fold(sum[j][k]);
    }
  }
  for (; i < bytes; i += 4) {
    uint32_t word;
    memcpy(&word, p + i, 4);
    fold(word);
  }
  return hash;
}

template <typename T>
const Kernels<T>* table() {
  static const Kernels<T> kernels = {
      &unary<T>, &unary_grad<T>, &binary<T>, &where<T>, &reduce<T>, &softmax<T>, &softmax_grad<T>, &layer_norm<T>,
      &layer_norm_grad<T>, &product<T>, &outer<T>, &add_rows<T>, &packed_size<T>, &pack<T>, &pack_bf16<T>,
      &fingerprint<T>, &multiply_add_peak<T>,
  };
  return &kernels;
}

} // namespace
