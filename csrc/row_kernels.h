// The loops that row programs are made of, as a table of functions per instruction set and element type.
//
// A row value is a matrix [rows, ld]: ld is its width rounded up to kPad elements, so that every loop runs over whole
// vectors. What lies in the padding is never looked at.
#pragma once

#include <cstdint>

namespace fastwm {

constexpr int64_t kPad = 16;

// static: of an inline function the linker would keep one copy, perhaps that of a wide instruction set.
static constexpr int64_t padded(int64_t width) {
  return (width + kPad - 1) / kPad * kPad;
}

// In the order of UNARY in fastwm/row_program/encode.py.
enum class Unary : int64_t {
  kNeg, kExp, kLog, kLog1p, kExpm1, kSqrt, kRsqrt, kReciprocal, kSquare, kAbs, kSign, kFloor, kCeil, kRound, kTrunc,
  kSin, kCos, kErf, kTanh, kSigmoid, kLogSigmoid, kRelu, kSilu, kMish, kGelu, kGeluTanh, kLeakyRelu, kSoftplus, kElu,
  kNot, kIsNan, kIsFinite, kSafeTanh, kCopy, kToBool,
  kNone = -1,
};
enum class UnaryGrad : int64_t {
  kTanh, kSigmoid, kRelu, kSilu, kMish, kGelu, kGeluTanh, kLeakyRelu, kSoftplus, kElu, kLogSigmoid,
};
enum class Binary : int64_t {
  kAdd, kSub, kMul, kDiv, kPow, kMaximum, kMinimum, kGt, kGe, kLt, kLe, kEq, kNe, kAnd, kOr, kXor, kClampMin, kClampMax,
};
enum class Reduce : int64_t { kSum, kMean, kMax, kMin, kLogSumExp, kArgMax, kArgMin };

// An operand of an elementwise op: rows of vectors; or, with `single`, one element for a whole row.
template <typename T>
struct Operand {
  const T* data;
  int64_t row_stride; // 0: the same for every row
  bool single;
};

// A matrix as it lies in the caller's memory.
enum class Layout : int64_t { kKn, kNk };

// The same or, packed, panels of a few vectors of columns, each [K, columns of the panel]; perhaps in bfloat16.
enum class Form : int64_t { kKn, kNk, kPanels, kPanelsBf16 };

template <typename T>
struct Matrix {
  const T* data;
  Layout layout;
  int64_t k, n;
};

template <typename T>
struct Product {
  int64_t rows;
  const T* a; // [rows, K], row stride lda
  int64_t lda;
  const void* b;
  Form form; // of b
  int64_t k, n;
  int64_t ldb; // of kKn: elements from row to row
  const T* bias; // padded to whole vectors, or nullptr
  T* c; // [rows, padded(N)], row stride ldc
  int64_t ldc;
  Unary act; // applied to the result
  const T* act_params;
  bool thin; // the whole batch is one or two rows
};

template <typename T>
struct Kernels {
  void (*unary)(Unary op, const T* params, int64_t n, const T* x, T* out); // n: whole vectors; x may be out
  void (*unary_grad)(UnaryGrad op, const T* params, int64_t n, const T* g, const T* x, T* out);
  void (*binary)(Binary op, int64_t rows, int64_t ld, Operand<T> a, Operand<T> b, T* out);
  void (*where)(int64_t rows, int64_t ld, Operand<T> c, Operand<T> a, Operand<T> b, T* out);
  // [rows, groups * n] -> [rows, groups]
  void (*reduce)(Reduce op, int64_t rows, int64_t groups, int64_t n, const T* x, int64_t ldx, T* out, int64_t ldo);
  void (*softmax)(bool log, int64_t rows, int64_t groups, int64_t n, const T* x, int64_t ldx, T* out, int64_t ldo);
  void (*softmax_grad)(bool log, int64_t rows, int64_t groups, int64_t n, const T* g, int64_t ldg, const T* y,
                       int64_t ldy, T* out, int64_t ldo);
  void (*layer_norm)(int64_t rows, int64_t groups, int64_t n, const T* x, int64_t ldx, const T* w, const T* b, T eps,
                     T* out, int64_t ldo);
  void (*layer_norm_grad)(int64_t rows, int64_t groups, int64_t n, const T* g, int64_t ldg, const T* x, int64_t ldx,
                          const T* w, T eps, T* out, int64_t ldo);
  void (*product)(const Product<T>& p);
  // sum[i][j] += sum over rows of a[r][i] * b[r][j], i < m, j < padded(n); sum has row stride ld, a whole number of
  // vectors. `first`: there is nothing in it yet.
  void (*outer)(int64_t rows, int64_t m, int64_t n, const T* a, int64_t lda, const T* b, int64_t ldb, T* sum,
                int64_t ld, bool first);
  void (*add_rows)(int64_t rows, int64_t width, const T* x, int64_t ldx, T* sum); // sum[j] += sum of x[r][j]
  int64_t (*packed_size)(int64_t k, int64_t n); // in elements
  void (*pack)(const Matrix<T>& from, T* to);
  void (*pack_bf16)(const Matrix<T>& from, uint16_t* to);
  // A number that differs when any of n elements differs (by chance equal: about 2**-60).
  uint64_t (*fingerprint)(const T* data, int64_t n);
  double (*multiply_add_peak)(int64_t repeats); // runs that many blocks of multiply-adds; returns how many flops
};

// Those of wider sets exist where the platform has them (FASTWM_X86).
const Kernels<float>* kernels_f32_avx512();
const Kernels<double>* kernels_f64_avx512();
const Kernels<float>* kernels_f32_avx2();
const Kernels<double>* kernels_f64_avx2();
const Kernels<float>* kernels_f32_portable();
const Kernels<double>* kernels_f64_portable();

} // namespace fastwm
