// Matrix products of a tile of rows: blocks of MR rows by NV vectors of columns held in registers over the whole of K.
//
// A packed matrix is cut into panels of up to kMaxVectors vectors of columns, as even in width as can be: 13 vectors
// are panels of 4, 3, 3, 3 rather than 4, 4, 4, 1. A panel streams from the second-level cache once per block of rows.
#pragma once

#include "row_kernels.h"
#include "vec.h"

namespace {

using fastwm::Form;
using fastwm::Layout;
using fastwm::Matrix;
using fastwm::Product;
using fastwm::Unary;

#if defined(__AVX512F__) // 32 registers
constexpr int kMaxVectors = 4;
constexpr int rows_of(int nv) {
  return nv == 4 ? 6 : nv == 3 ? 8 : nv == 2 ? 12 : 14;
}
#elif defined(__AVX2__) // 16 registers
constexpr int kMaxVectors = 3;
constexpr int rows_of(int nv) {
  return nv == 3 ? 4 : nv == 2 ? 6 : 10;
}
#else
constexpr int kMaxVectors = 2;
constexpr int rows_of(int nv) {
  return nv == 2 ? 5 : 8;
}
#endif

template <typename T>
int64_t vectors(int64_t n) {
  return fastwm::padded(n) / Lanes<T>::count;
}

template <typename T>
int64_t panels(int64_t n) {
  return (vectors<T>(n) + kMaxVectors - 1) / kMaxVectors;
}

template <typename T>
int64_t packed_size(int64_t k, int64_t n) {
  return k * fastwm::padded(n);
}

struct Panel {
  int64_t first; // vector
  int nv;
};

template <typename T>
FASTWM_INLINE Panel panel_of(int64_t n, int64_t i) {
  const int64_t all = vectors<T>(n), count = panels<T>(n), base = all / count, wide = all % count;
  return {i * base + (i < wide ? i : wide), int(base + (i < wide ? 1 : 0))};
}

template <typename T>
struct Exact {
  using Element = T;
  static inline __attribute__((always_inline)) Vec<T> at(const T* p) { return load<T>(p); }
};

// bfloat16 is the upper half of a float.
struct Rounded {
  using Element = uint16_t;
  static inline __attribute__((always_inline)) Vec<float> at(const uint16_t* p) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return (Vec<float>)_mm512_slli_epi32(wide, 16);
#elif defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return (Vec<float>)_mm256_slli_epi32(wide, 16);
#else
    IVec<float> wide;
    for (int i = 0; i < Lanes<float>::count; ++i) {
      wide[i] = int32_t(uint32_t(p[i]) << 16);
    }
    return (Vec<float>)wide;
#endif
  }
};

// c[MR][NV vectors] = a[MR][K] @ b[K][NV vectors] + bias
template <typename T, typename B, int MR, int NV>
FASTWM_INLINE void block(int64_t k, const T* a, int64_t lda, const typename B::Element* b, const T* bias, T* c,
                         int64_t ldc) {
  constexpr int lanes = Lanes<T>::count;
  Vec<T> acc[MR][NV];
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      acc[i][j] = spread<T>(0);
    }
  }
  for (int64_t p = 0; p < k; ++p) {
    Vec<T> column[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      column[j] = B::at(b + j * lanes);
    }
    b += NV * lanes;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec<T> x = spread<T>(a[i * lda + p]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        acc[i][j] = fma<Vec<T>>(x, column[j], acc[i][j]);
      }
    }
  }
  // The bias last: products added to a large one would each be rounded to its precision.
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    const Vec<T> last = bias ? load<T>(bias + j * lanes) : spread<T>(0);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      store<T>(c + i * ldc + j * lanes, acc[i][j] + last);
    }
  }
}

// One or two rows: a chain of additions per column is shorter than the latency of one allows, so K is cut in four.
// Only where the batch has no more: a row's bits must not depend on how many rows its tile happens to have.
template <typename T, typename B, int MR, int NV>
FASTWM_INLINE void thin_block(int64_t k, const T* a, int64_t lda, const typename B::Element* b, const T* bias, T* c,
                              int64_t ldc) {
  constexpr int lanes = Lanes<T>::count;
  constexpr int cut = MR == 1 ? 4 : 2;
  Vec<T> acc[cut][MR][NV];
#pragma GCC unroll 4
  for (int u = 0; u < cut; ++u) {
#pragma GCC unroll 2
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        acc[u][i][j] = spread<T>(0);
      }
    }
  }
  int64_t p = 0;
  for (; p + cut <= k; p += cut) {
#pragma GCC unroll 4
    for (int u = 0; u < cut; ++u) {
#pragma GCC unroll 2
      for (int i = 0; i < MR; ++i) {
        const Vec<T> x = spread<T>(a[i * lda + p + u]);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) {
          acc[u][i][j] = fma<Vec<T>>(x, B::at(b + (u * NV + j) * lanes), acc[u][i][j]);
        }
      }
    }
    b += cut * NV * lanes;
  }
  for (; p < k; ++p) {
#pragma GCC unroll 2
    for (int i = 0; i < MR; ++i) {
      const Vec<T> x = spread<T>(a[i * lda + p]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        acc[0][i][j] = fma<Vec<T>>(x, B::at(b + j * lanes), acc[0][i][j]);
      }
    }
    b += NV * lanes;
  }
#pragma GCC unroll 2
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      Vec<T> s = acc[0][i][j] + acc[1][i][j];
      if constexpr (cut == 4) {
        s = s + (acc[2][i][j] + acc[3][i][j]);
      }
      store<T>(c + i * ldc + j * lanes, bias ? s + load<T>(bias + j * lanes) : s);
    }
  }
}

template <typename T, typename B, int NV, int MR>
__attribute__((noinline)) void rest_of_rows(bool thin, int64_t rows, int64_t k, const T* a, int64_t lda,
                                            const typename B::Element* b, const T* bias, T* c, int64_t ldc) {
  if constexpr (MR > 0) {
    if (rows == MR) {
      if constexpr (MR <= 2) {
        if (thin) {
          return thin_block<T, B, MR, NV>(k, a, lda, b, bias, c, ldc);
        }
      }
      return block<T, B, MR, NV>(k, a, lda, b, bias, c, ldc);
    }
    rest_of_rows<T, B, NV, MR - 1>(thin, rows, k, a, lda, b, bias, c, ldc);
  }
}

struct Rows { // of whole vectors
  int64_t rows, width, ld;
};

template <typename T>
void unary_rows(Unary op, const T* params, Rows n, const T* x, T* out);

template <typename T>
FASTWM_INLINE void activate(const Product<T>& p, T* c, int64_t rows, int64_t width) {
  if (p.act != fastwm::Unary::kNone) {
    unary_rows<T>(p.act, p.act_params, Rows{rows, width, p.ldc}, c, c);
  }
}

template <typename T, typename B, int NV>
void product_panel(const Product<T>& p, const typename B::Element* b, int64_t column) {
  constexpr int64_t MR = rows_of(NV), width = NV * Lanes<T>::count;
  const T* bias = p.bias ? p.bias + column : nullptr;
  T* c = p.c + column;
  // Blocks of even height: 16 rows are 6, 5, 5 rather than 6, 6, 4.
  const int64_t blocks = (p.rows + MR - 1) / MR;
  int64_t row = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t rows = (p.rows - row + blocks - i - 1) / (blocks - i);
    if (rows == MR) {
      block<T, B, MR, NV>(p.k, p.a + row * p.lda, p.lda, b, bias, c + row * p.ldc, p.ldc);
    } else {
      rest_of_rows<T, B, NV, MR - 1>(p.thin, rows, p.k, p.a + row * p.lda, p.lda, b, bias, c + row * p.ldc, p.ldc);
    }
    activate<T>(p, c + row * p.ldc, rows, width);
    row += rows;
  }
}

template <typename T, typename B>
void product_of(const Product<T>& p) {
  const int64_t count = panels<T>(p.n);
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t i = 0; i < count; ++i) {
    const Panel panel = panel_of<T>(p.n, i);
    const auto* b = static_cast<const typename B::Element*>(p.b) + panel.first * lanes * p.k;
    const int64_t column = panel.first * lanes;
    switch (panel.nv) {
      case 1: product_panel<T, B, 1>(p, b, column); break;
#if defined(__AVX512F__) || defined(__AVX2__)
      case 3: product_panel<T, B, 3>(p, b, column); break;
#endif
#if defined(__AVX512F__)
      case 4: product_panel<T, B, 4>(p, b, column); break;
#endif
      default: product_panel<T, B, 2>(p, b, column); break;
    }
  }
}

// ------------------------------------------------------------------ few rows: matrices as they are
//
// With one or two rows a product costs what reading the matrix costs, and packing would read it once more.

// The sums over the lanes of four vectors.
template <typename T>
FASTWM_INLINE void sums_of_four(const Vec<T>* v, T* out) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    const __m512 four = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) {
    out[i] = sum_lanes<T>(v[i]);
  }
}

// c[MR][NB] of a matrix [N, K]: dot products of rows with rows.
template <typename T, int MR, int NB>
FASTWM_INLINE void dot_block(int64_t k, const T* a, int64_t lda, const T* w, const T* bias, T* c, int64_t ldc) {
  constexpr int lanes = Lanes<T>::count;
  Vec<T> acc[MR][NB];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < NB; ++j) {
      acc[i][j] = spread<T>(0);
    }
  }
  auto add = [&](auto at, int64_t p) __attribute__((always_inline)) {
    Vec<T> x[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      x[i] = at(a + i * lda + p);
    }
#pragma GCC unroll 16
    for (int j = 0; j < NB; ++j) {
      const Vec<T> y = at(w + j * k + p);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        acc[i][j] = fma<Vec<T>>(x[i], y, acc[i][j]);
      }
    }
  };
  int64_t p = 0;
  for (; p + lanes <= k; p += lanes) {
    add([](const T* q) __attribute__((always_inline)) { return load<T>(q); }, p);
  }
  if (p < k) {
    const int64_t rest = k - p;
    add([rest](const T* q) __attribute__((always_inline)) { return load_part<T>(q, rest, T(0)); }, p);
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
    T sums[NB < 4 ? 4 : NB];
    if constexpr (NB % 4 == 0) {
#pragma GCC unroll 4
      for (int j = 0; j < NB; j += 4) {
        sums_of_four<T>(&acc[i][j], sums + j);
      }
    } else {
      for (int j = 0; j < NB; ++j) {
        sums[j] = sum_lanes<T>(acc[i][j]);
      }
    }
    for (int j = 0; j < NB; ++j) {
      c[i * ldc + j] = bias ? sums[j] + bias[j] : sums[j];
    }
  }
}

template <typename T, int MR>
void dot_rows(const Product<T>& p, int64_t row) {
  constexpr int NB = MR == 1 ? 8 : 4;
  const T* w = static_cast<const T*>(p.b);
  const T* a = p.a + row * p.lda;
  T* c = p.c + row * p.ldc;
  int64_t n = 0;
  for (; n + NB <= p.n; n += NB) {
    dot_block<T, MR, NB>(p.k, a, p.lda, w + n * p.k, p.bias ? p.bias + n : nullptr, c + n, p.ldc);
  }
  for (; n + 4 <= p.n; n += 4) {
    dot_block<T, MR, 4>(p.k, a, p.lda, w + n * p.k, p.bias ? p.bias + n : nullptr, c + n, p.ldc);
  }
  for (; n < p.n; ++n) {
    dot_block<T, MR, 1>(p.k, a, p.lda, w + n * p.k, p.bias ? p.bias + n : nullptr, c + n, p.ldc);
  }
}

// c[MR][NV vectors] of a matrix [K, N], columns from `b` on.
template <typename T, int MR, int NV>
FASTWM_INLINE void column_block(const Product<T>& p, const T* a, const T* b, const T* bias, T* c) {
  constexpr int lanes = Lanes<T>::count;
  Vec<T> acc[MR][NV];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      acc[i][j] = spread<T>(0);
    }
  }
  for (int64_t k = 0; k < p.k; ++k) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const Vec<T> y = load<T>(b + j * lanes);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        acc[i][j] = fma<Vec<T>>(spread<T>(a[i * p.lda + k]), y, acc[i][j]);
      }
    }
    b += p.ldb;
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      store<T>(c + i * p.ldc + j * lanes, bias ? acc[i][j] + load<T>(bias + j * lanes) : acc[i][j]);
    }
  }
}

template <typename T, int MR>
void column_rows(const Product<T>& p, int64_t row) {
  constexpr int64_t lanes = Lanes<T>::count;
  const T* w = static_cast<const T*>(p.b);
  const T* a = p.a + row * p.lda;
  T* c = p.c + row * p.ldc;
  if (p.n < lanes) {
    for (int i = 0; i < MR; ++i) {
      for (int64_t n = 0; n < p.n; ++n) {
        T s = 0;
        for (int64_t k = 0; k < p.k; ++k) {
          s += a[i * p.lda + k] * w[k * p.ldb + n];
        }
        c[i * p.ldc + n] = p.bias ? s + p.bias[n] : s;
      }
    }
    return;
  }
  auto bias = [&](int64_t n) { return p.bias ? p.bias + n : nullptr; };
  int64_t n = 0;
  for (; n + 4 * lanes <= p.n; n += 4 * lanes) {
    column_block<T, MR, 4>(p, a, w + n, bias(n), c + n);
  }
  for (; n + lanes <= p.n; n += lanes) {
    column_block<T, MR, 1>(p, a, w + n, bias(n), c + n);
  }
  if (n < p.n) { // the last vector, over some columns a second time
    n = p.n - lanes;
    column_block<T, MR, 1>(p, a, w + n, bias(n), c + n);
  }
}

template <typename T>
void raw_product(const Product<T>& p) {
  const bool nk = p.form == Form::kNk;
  for (int64_t row = 0; row < p.rows; row += 4) {
    switch (p.rows - row) {
      case 1: nk ? dot_rows<T, 1>(p, row) : column_rows<T, 1>(p, row); break;
      case 2: nk ? dot_rows<T, 2>(p, row) : column_rows<T, 2>(p, row); break;
      case 3: nk ? dot_rows<T, 3>(p, row) : column_rows<T, 3>(p, row); break;
      default: nk ? dot_rows<T, 4>(p, row) : column_rows<T, 4>(p, row); break;
    }
  }
  activate<T>(p, p.c, p.rows, fastwm::padded(p.n));
}

template <typename T>
void product(const Product<T>& p) {
  if (p.form == Form::kKn || p.form == Form::kNk) {
    return raw_product<T>(p);
  }
  if constexpr (sizeof(T) == 4) {
    if (p.form == Form::kPanelsBf16) {
      return product_of<T, Rounded>(p);
    }
  }
  product_of<T, Exact<T>>(p);
}

// ------------------------------------------------------------------ sums of outer products

template <typename T, int MI, int NV>
FASTWM_INLINE void outer_block(int64_t rows, const T* a, int64_t lda, const T* b, int64_t ldb, T* sum, int64_t ld,
                             bool first) {
  constexpr int lanes = Lanes<T>::count;
  Vec<T> acc[MI][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MI; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      acc[i][j] = first ? spread<T>(0) : load<T>(sum + i * ld + j * lanes);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    Vec<T> y[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      y[j] = load<T>(b + r * ldb + j * lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < MI; ++i) {
      const Vec<T> x = spread<T>(a[r * lda + i]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        acc[i][j] = fma<Vec<T>>(x, y[j], acc[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MI; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      store<T>(sum + i * ld + j * lanes, acc[i][j]);
    }
  }
}

template <typename T, int NV, int MI>
__attribute__((noinline)) void outer_rest(int64_t m, int64_t rows, const T* a, int64_t lda, const T* b, int64_t ldb,
                                          T* sum, int64_t ld, bool first) {
  if constexpr (MI > 0) {
    if (m == MI) {
      return outer_block<T, MI, NV>(rows, a, lda, b, ldb, sum, ld, first);
    }
    outer_rest<T, NV, MI - 1>(m, rows, a, lda, b, ldb, sum, ld, first);
  }
}

template <typename T, int NV>
void outer_panel(int64_t rows, int64_t m, const T* a, int64_t lda, const T* b, int64_t ldb, T* sum, int64_t ld,
                 bool first) {
  constexpr int64_t MI = rows_of(NV);
  const int64_t blocks = (m + MI - 1) / MI;
  int64_t i = 0;
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t count = (m - i + blocks - k - 1) / (blocks - k);
    if (count == MI) {
      outer_block<T, MI, NV>(rows, a + i, lda, b, ldb, sum + i * ld, ld, first);
    } else {
      outer_rest<T, NV, MI - 1>(count, rows, a + i, lda, b, ldb, sum + i * ld, ld, first);
    }
    i += count;
  }
}

template <typename T>
void outer(int64_t rows, int64_t m, int64_t n, const T* a, int64_t lda, const T* b, int64_t ldb, T* sum, int64_t ld,
           bool first) {
  const int64_t count = panels<T>(n);
  for (int64_t i = 0; i < count; ++i) {
    const Panel panel = panel_of<T>(n, i);
    const int64_t column = panel.first * Lanes<T>::count;
    switch (panel.nv) {
      case 1: outer_panel<T, 1>(rows, m, a, lda, b + column, ldb, sum + column, ld, first); break;
#if defined(__AVX512F__) || defined(__AVX2__)
      case 3: outer_panel<T, 3>(rows, m, a, lda, b + column, ldb, sum + column, ld, first); break;
#endif
#if defined(__AVX512F__)
      case 4: outer_panel<T, 4>(rows, m, a, lda, b + column, ldb, sum + column, ld, first); break;
#endif
      default: outer_panel<T, 2>(rows, m, a, lda, b + column, ldb, sum + column, ld, first); break;
    }
  }
}

// ------------------------------------------------------------------ packing

template <typename T, typename To, typename F>
FASTWM_INLINE void pack_with(const Matrix<T>& from, To* to, F convert) {
  constexpr int64_t lanes = Lanes<T>::count;
  const int64_t count = panels<T>(from.n);
  for (int64_t i = 0; i < count; ++i) {
    const Panel panel = panel_of<T>(from.n, i);
    const int64_t first = panel.first * lanes, width = panel.nv * lanes;
    const int64_t real = from.n - first < width ? from.n - first : width; // the rest is padding
    if (from.layout == Layout::kKn) {
      for (int64_t k = 0; k < from.k; ++k) {
        const T* row = from.data + k * from.n + first;
        for (int64_t j = 0; j < real; ++j) {
          to[k * width + j] = convert(row[j]);
        }
        for (int64_t j = real; j < width; ++j) {
          to[k * width + j] = To(0);
        }
      }
    } else {
      // In blocks of 16 rows of K, so that what is read and what is written both stay in the first-level cache.
      for (int64_t k0 = 0; k0 < from.k; k0 += 16) {
        const int64_t k1 = k0 + 16 < from.k ? k0 + 16 : from.k;
        for (int64_t j = 0; j < real; ++j) {
          const T* row = from.data + (first + j) * from.k;
          for (int64_t k = k0; k < k1; ++k) {
            to[k * width + j] = convert(row[k]);
          }
        }
        for (int64_t j = real; j < width; ++j) {
          for (int64_t k = k0; k < k1; ++k) {
            to[k * width + j] = To(0);
          }
        }
      }
    }
    to += from.k * width;
  }
}

template <typename T>
void pack(const Matrix<T>& from, T* to) {
  pack_with<T>(from, to, [](T x) { return x; });
}

template <typename T>
void pack_bf16(const Matrix<T>& from, uint16_t* to) {
  pack_with<T>(from, to, [](T x) {
    const float f = float(x);
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
      return uint16_t((u >> 16) | 0x40); // NaN stays one
    }
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16); // to nearest, ties to even
  });
}

// ------------------------------------------------------------------ the machine's limit

// Multiply-adds on registers alone, as many in flight as it takes.
template <typename T>
double multiply_add_peak(int64_t repeats) {
  constexpr int chains = 12, lanes = Lanes<T>::count;
  Vec<T> acc[chains];
  const Vec<T> a = spread<T>(T(0.999)), b = spread<T>(T(0.001));
  for (int i = 0; i < chains; ++i) {
    acc[i] = spread<T>(T(i));
  }
  for (int64_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) {
      acc[i] = fma<Vec<T>>(acc[i], a, b);
    }
  }
  T total = 0;
  for (int i = 0; i < chains; ++i) {
    total += acc[i][0];
  }
  volatile T sink = total;
  (void)sink;
  return 2.0 * double(repeats) * chains * lanes;
}

} // namespace
