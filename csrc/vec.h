// Vectors as the compiler has them (GNU vector extensions), in the width of the instruction set that the including
// file is compiled for. Included only by the kernel files of one instruction set (row_kernels_*.cpp): everything here
// is static or in an anonymous namespace, so that no function compiled for a wide set is picked by the linker for all.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define FASTWM_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define FASTWM_BYTES 32
#else
#define FASTWM_BYTES 16
#endif

#define FASTWM_INLINE static inline __attribute__((always_inline))

// A vector of which the compiler shall forget where it came from.
#if defined(__x86_64__) || defined(__i386__)
#define FASTWM_OPAQUE(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define FASTWM_OPAQUE(v) __asm__("" : "+w"(v))
#else
#define FASTWM_OPAQUE(v) __asm__("" : "+m"(v))
#endif

namespace {

// The C library's functions by type; those of <cmath> would be inline functions that the linker may share.
FASTWM_INLINE float sqrt_one(float x) { return sqrtf(x); }
FASTWM_INLINE double sqrt_one(double x) { return sqrt(x); }
FASTWM_INLINE float exp_one(float x) { return expf(x); }
FASTWM_INLINE double exp_one(double x) { return exp(x); }
FASTWM_INLINE float expm1_one(float x) { return expm1f(x); }
FASTWM_INLINE double expm1_one(double x) { return expm1(x); }
FASTWM_INLINE float log_one(float x) { return logf(x); }
FASTWM_INLINE double log_one(double x) { return log(x); }
FASTWM_INLINE float log1p_one(float x) { return log1pf(x); }
FASTWM_INLINE double log1p_one(double x) { return log1p(x); }
FASTWM_INLINE float tanh_one(float x) { return tanhf(x); }
FASTWM_INLINE double tanh_one(double x) { return tanh(x); }
FASTWM_INLINE float erf_one(float x) { return erff(x); }
FASTWM_INLINE double erf_one(double x) { return erf(x); }
FASTWM_INLINE float floor_one(float x) { return floorf(x); }
FASTWM_INLINE double floor_one(double x) { return floor(x); }
FASTWM_INLINE float ceil_one(float x) { return ceilf(x); }
FASTWM_INLINE double ceil_one(double x) { return ceil(x); }
FASTWM_INLINE float nearbyint_one(float x) { return nearbyintf(x); }
FASTWM_INLINE double nearbyint_one(double x) { return nearbyint(x); }
FASTWM_INLINE float trunc_one(float x) { return truncf(x); }
FASTWM_INLINE double trunc_one(double x) { return trunc(x); }
FASTWM_INLINE float sin_one(float x) { return sinf(x); }
FASTWM_INLINE double sin_one(double x) { return sin(x); }
FASTWM_INLINE float cos_one(float x) { return cosf(x); }
FASTWM_INLINE double cos_one(double x) { return cos(x); }
FASTWM_INLINE float pow_one(float x, float y) { return powf(x, y); }
FASTWM_INLINE double pow_one(double x, double y) { return pow(x, y); }

template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int count = FASTWM_BYTES / 4;
  typedef float V __attribute__((vector_size(FASTWM_BYTES)));
  typedef float U __attribute__((vector_size(FASTWM_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(FASTWM_BYTES)));
};

template <>
struct Lanes<double> {
  static constexpr int count = FASTWM_BYTES / 8;
  typedef double V __attribute__((vector_size(FASTWM_BYTES)));
  typedef double U __attribute__((vector_size(FASTWM_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(FASTWM_BYTES)));
};

template <typename T>
using Vec = typename Lanes<T>::V;
template <typename T>
using IVec = typename Lanes<T>::I;

template <typename T>
FASTWM_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::U*>(p);
}

template <typename T>
FASTWM_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Lanes<T>::U*>(p) = v;
}

template <typename T>
FASTWM_INLINE Vec<T> spread(T x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_set1_ps(x);
  } else {
    return (Vec<T>)_mm512_set1_pd(x);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_set1_ps(x);
  } else {
    return (Vec<T>)_mm256_set1_pd(x);
  }
#else
  Vec<T> v;
  for (int i = 0; i < Lanes<T>::count; ++i) {
    v[i] = x;
  }
  return v;
#endif
}

// n < lanes elements; `fill` in the lanes beyond.
template <typename T>
FASTWM_INLINE Vec<T> load_part(const T* p, int64_t n, T fill) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_mask_loadu_ps((__m512)spread<T>(fill), __mmask16((1u << n) - 1), p);
  } else {
    return (Vec<T>)_mm512_mask_loadu_pd((__m512d)spread<T>(fill), __mmask8((1u << n) - 1), p);
  }
#else
  T part[Lanes<T>::count];
  for (int64_t j = 0; j < Lanes<T>::count; ++j) {
    part[j] = j < n ? p[j] : fill;
  }
  return load<T>(part);
#endif
}

// a * b + c; one rounding where the instruction set has it (these files are compiled with -ffp-contract=fast).
template <typename V>
FASTWM_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

template <typename T>
FASTWM_INLINE IVec<T> bits(Vec<T> v) {
  return (IVec<T>)v;
}

// Lane by lane, for functions that libm does better than we could.
template <typename T, typename F>
FASTWM_INLINE Vec<T> lanewise(Vec<T> x, F f) {
  T lanes[Lanes<T>::count];
  store<T>(lanes, x);
  for (int i = 0; i < Lanes<T>::count; ++i) {
    lanes[i] = f(lanes[i]);
  }
  return load<T>(lanes);
}

template <typename T>
FASTWM_INLINE Vec<T> abs_(Vec<T> x) {
  return (Vec<T>)(bits<T>(x) & ~bits<T>(spread<T>(T(-0.0))));
}

template <typename T>
FASTWM_INLINE Vec<T> with_sign_of(Vec<T> magnitude, Vec<T> sign) {
  const IVec<T> mask = bits<T>(spread<T>(T(-0.0)));
  return (Vec<T>)((bits<T>(magnitude) & ~mask) | (bits<T>(sign) & mask));
}

// As torch: NaN where either is NaN.
template <typename T>
FASTWM_INLINE Vec<T> max_(Vec<T> a, Vec<T> b) {
  return ((a > b) | (a != a)) ? a : b;
}
template <typename T>
FASTWM_INLINE Vec<T> min_(Vec<T> a, Vec<T> b) {
  return ((a < b) | (a != a)) ? a : b;
}

// Quicker, for bounds that are numbers: NaN in x stays.
template <typename T>
FASTWM_INLINE Vec<T> clamp_(Vec<T> x, T low, T high) {
  const Vec<T> lo = spread<T>(low), hi = spread<T>(high);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_min_ps((__m512)hi, _mm512_max_ps((__m512)lo, (__m512)x));
  }
#endif
  x = x < lo ? lo : x;
  return x > hi ? hi : x;
}

template <typename T>
FASTWM_INLINE Vec<T> sqrt_(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_sqrt_ps((__m512)x);
  } else {
    return (Vec<T>)_mm512_sqrt_pd((__m512d)x);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_sqrt_ps((__m256)x);
  } else {
    return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
  }
#else
  return lanewise<T>(x, [](T v) { return sqrt_one(v); });
#endif
}

// 1 / x for x in [1, 1e30], to about one unit in the last place: an estimate and a Newton step instead of a division.
template <typename T>
FASTWM_INLINE Vec<T> reciprocal_(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const Vec<T> r = (Vec<T>)_mm512_rcp14_ps((__m512)x);
    return fma<Vec<T>>(r, fma<Vec<T>>(-x, r, spread<T>(1)), r);
  }
#endif
  return spread<T>(1) / x;
}

template <typename T>
FASTWM_INLINE T sum_lanes(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_reduce_add_ps((__m512)v);
  } else {
    return _mm512_reduce_add_pd((__m512d)v);
  }
#else
  T s = 0;
  for (int i = 0; i < Lanes<T>::count; ++i) {
    s += v[i];
  }
  return s;
#endif
}

// ------------------------------------------------------------------ transcendental functions
//
// float: our own, within the bound stated at each (units in the last place, measured over all or most floats by
// tests/row_program/test_accuracy.py). double: libm's, lane by lane, at most 1 ulp.

// 2**n * v for integral n; overflows to infinity and underflows gradually.
FASTWM_INLINE Vec<float> scale_(Vec<float> v, Vec<float> n) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_scalef_ps((__m512)v, (__m512)n);
#else
  // In two halves, so that each is a normal number.
  const IVec<float> whole = __builtin_convertvector(n, IVec<float>);
  const IVec<float> half = whole >> 1, rest = whole - half;
  return v * (Vec<float>)((half + 127) << 23) * (Vec<float>)((rest + 127) << 23);
#endif
}

FASTWM_INLINE Vec<float> round_(Vec<float> x) {
  // Adding 1.5 * 2**23 rounds to the nearest integer for |x| < 2**22.
  const Vec<float> magic = spread<float>(12582912.0f);
  Vec<float> y = x + magic;
  FASTWM_OPAQUE(y); // not to be simplified away
  return y - magic;
}

struct Reduced {
  Vec<float> n, r, p; // exp(x) = 2**n * (1 + p), p = expm1(r)
};

FASTWM_INLINE Reduced exp_reduced(Vec<float> x) {
  const Vec<float> n = round_(x * spread<float>(1.44269504088896341f));
  Vec<float> r = fma(n, spread<float>(-0.693359375f), x);
  r = fma(n, spread<float>(2.12194440e-4f), r);
  Vec<float> p = spread<float>(1.9875691500e-4f);
  p = fma(p, r, spread<float>(1.3981999507e-3f));
  p = fma(p, r, spread<float>(8.3334519073e-3f));
  p = fma(p, r, spread<float>(4.1665795894e-2f));
  p = fma(p, r, spread<float>(1.6666665459e-1f));
  p = fma(p, r, spread<float>(5.0000001201e-1f));
  p = fma(p * r, r, r);
  return {n, r, p};
}

// 2 ulp (normal results).
FASTWM_INLINE Vec<float> exp_(Vec<float> x) {
  const Reduced e = exp_reduced(clamp_<float>(x, -110.0f, 100.0f));
  return scale_(e.p + spread<float>(1), e.n);
}
FASTWM_INLINE Vec<double> exp_(Vec<double> x) {
  return lanewise<double>(x, [](double v) { return exp_one(v); });
}

// 2 ulp.
FASTWM_INLINE Vec<float> expm1_(Vec<float> x) {
  const Reduced e = exp_reduced(clamp_<float>(x, -110.0f, 100.0f));
  const Vec<float> one = spread<float>(1), s = scale_(one, e.n);
  const Vec<float> y = fma(s, e.p, s - one);
  return e.n > spread<float>(126) ? scale_(e.p + one, e.n) : y;
}
FASTWM_INLINE Vec<double> expm1_(Vec<double> x) {
  return lanewise<double>(x, [](double v) { return expm1_one(v); });
}

// 1 ulp for normal x; -inf at 0, NaN below.
FASTWM_INLINE Vec<float> log_(Vec<float> x) {
  const Vec<float> given = x, one = spread<float>(1);
  const IVec<float> tiny = x < spread<float>(1.17549435e-38f);
  x = tiny ? x * spread<float>(8388608.0f) : x; // denormals
  IVec<float> e = ((bits<float>(x) >> 23) & 255) - 126;
  Vec<float> m = (Vec<float>)((bits<float>(x) & 0x007fffff) | 0x3f000000); // [0.5, 1)
  const IVec<float> low = m < spread<float>(0.707106781186547524f);
  e += low; // true is -1
  m = (low ? m + m : m) - one;
  Vec<float> exponent = __builtin_convertvector(e, Vec<float>);
  exponent = tiny ? exponent - spread<float>(23) : exponent;
  const Vec<float> z = m * m;
  Vec<float> y = spread<float>(7.0376836292e-2f);
  y = fma(y, m, spread<float>(-1.1514610310e-1f));
  y = fma(y, m, spread<float>(1.1676998740e-1f));
  y = fma(y, m, spread<float>(-1.2420140846e-1f));
  y = fma(y, m, spread<float>(1.4249322787e-1f));
  y = fma(y, m, spread<float>(-1.6668057665e-1f));
  y = fma(y, m, spread<float>(2.0000714765e-1f));
  y = fma(y, m, spread<float>(-2.4999993993e-1f));
  y = fma(y, m, spread<float>(3.3333331174e-1f));
  y = y * m * z;
  y = fma(exponent, spread<float>(-2.12194440e-4f), y);
  y = fma(z, spread<float>(-0.5f), y);
  y = m + y;
  y = fma(exponent, spread<float>(0.693359375f), y);
  const Vec<float> infinity = spread<float>(__builtin_inff());
  y = given == infinity ? infinity : y;
  y = given == spread<float>(0) ? -infinity : y;
  return ((given < spread<float>(0)) | (given != given)) ? spread<float>(__builtin_nanf("")) : y;
}
FASTWM_INLINE Vec<double> log_(Vec<double> x) {
  return lanewise<double>(x, [](double v) { return log_one(v); });
}

// 3 ulp. log(u) * x / (u - 1) with u = 1 + x takes back the rounding of u.
FASTWM_INLINE Vec<float> log1p_(Vec<float> x) {
  const Vec<float> one = spread<float>(1), u = x + one, d = u - one;
  Vec<float> y = log_(u) * (x / d);
  y = d == spread<float>(0) ? x : y;
  return u == spread<float>(__builtin_inff()) ? u : (u == spread<float>(0) ? -spread<float>(__builtin_inff()) : y);
}
FASTWM_INLINE Vec<double> log1p_(Vec<double> x) {
  return lanewise<double>(x, [](double v) { return log1p_one(v); });
}

// 2 ulp.
FASTWM_INLINE Vec<float> tanh_(Vec<float> x) {
  const Vec<float> a = abs_<float>(x), z = x * x;
  Vec<float> p = spread<float>(-5.70498872745e-3f);
  p = fma(p, z, spread<float>(2.06390887954e-2f));
  p = fma(p, z, spread<float>(-5.37397155531e-2f));
  p = fma(p, z, spread<float>(1.33314422036e-1f));
  p = fma(p, z, spread<float>(-3.33332819422e-1f));
  p = fma(p * z, x, x);
  const Vec<float> e = exp_(clamp_<float>(a + a, 0.0f, 40.0f));
  const Vec<float> far = fma(spread<float>(-2), reciprocal_<float>(e + spread<float>(1)), spread<float>(1));
  const Vec<float> y = a < spread<float>(0.625f) ? p : with_sign_of<float>(far, x);
  return x == x ? y : x;
}
FASTWM_INLINE Vec<double> tanh_(Vec<double> x) {
  return lanewise<double>(x, [](double v) { return tanh_one(v); });
}

// 3 ulp.
template <typename T>
FASTWM_INLINE Vec<T> sigmoid_(Vec<T> x) {
  return spread<T>(1) / (spread<T>(1) + exp_(-x));
}

// 1 / (1 + exp(-x)) for use inside products with x: no division, and base 2 throughout. Below -87, where what is left of
// it does not matter, it is 0: then the product is 0, or NaN at -inf, as torch has it. 4 ulp; without multiply-add
// (portable) 4 + |x| / 1.2.
template <typename T>
FASTWM_INLINE Vec<T> quick_sigmoid(Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    const IVec<float> gone = x < spread<float>(-87.0f);
    x = x > spread<float>(87.0f) ? spread<float>(87.0f) : x; // NaN stays
    Vec<float> same = x;
    FASTWM_OPAQUE(same); // else the first multiply-add below becomes t - n
    const Vec<float> t = same * spread<float>(-1.44269504088896341f);
#if defined(__AVX512F__)
    const Vec<float> n = (Vec<float>)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Vec<float> n = round_(t);
#endif
    // -x * log2(e) - n, log2(e) in two parts: the rounding of t would be |x| / 1.4 ulp of the result.
    Vec<float> r = fma(x, spread<float>(-1.44269504088896341f), -n);
    r = fma(x, spread<float>(-1.92596303e-8f), r);
    Vec<float> p = spread<float>(1.535336188e-4f); // 2**r on [-0.5, 0.5], less than rounding
    p = fma(p, r, spread<float>(1.339887440e-3f));
    p = fma(p, r, spread<float>(9.618437357e-3f));
    p = fma(p, r, spread<float>(5.550332471e-2f));
    p = fma(p, r, spread<float>(2.402264791e-1f));
    p = fma(p, r, spread<float>(6.931472029e-1f));
    p = fma(p, r, spread<float>(1.0f));
    const Vec<float> y = reciprocal_<float>(spread<float>(1) + scale_(p, n));
    return gone ? spread<float>(0) : y;
  } else {
    return sigmoid_<T>(x);
  }
}

// 2 ulp.
FASTWM_INLINE Vec<float> erf_(Vec<float> a) {
  const Vec<float> t = abs_<float>(a), s = a * a;
  Vec<float> r = fma(spread<float>(-1.72853470e-5f), t, spread<float>(3.83197126e-4f));
  const Vec<float> u = fma(spread<float>(-3.88396438e-3f), t, spread<float>(2.42546219e-2f));
  r = fma(r, s, u);
  r = fma(r, t, spread<float>(-1.06777877e-1f));
  r = fma(r, t, spread<float>(-6.34846687e-1f));
  r = fma(r, t, spread<float>(-1.28717512e-1f));
  r = fma(r, t, -t);
  const Vec<float> far = with_sign_of<float>(spread<float>(1) - exp_(r), a);
  Vec<float> q = spread<float>(-5.96761703e-4f);
  q = fma(q, s, spread<float>(4.99119423e-3f));
  q = fma(q, s, spread<float>(-2.67681349e-2f));
  q = fma(q, s, spread<float>(1.12819925e-1f));
  q = fma(q, s, spread<float>(-3.76125336e-1f));
  q = fma(q, s, spread<float>(1.28379166e-1f));
  q = fma(q, a, a);
  // Past 4 it is 1 to the last bit; the polynomial would turn at infinity.
  const Vec<float> one = with_sign_of<float>(spread<float>(1), a);
  const Vec<float> y = t > spread<float>(0.927734375f) ? (t > spread<float>(4.0f) ? one : far) : q;
  return a == a ? y : a;
}
FASTWM_INLINE Vec<double> erf_(Vec<double> x) {
  return lanewise<double>(x, [](double v) { return erf_one(v); });
}

} // namespace
