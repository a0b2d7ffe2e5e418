// Runs an encoded row program on plain pointers. Free of torch, which brings the threads (a template parameter), so
// that tests/csrc can build it with sanitizers on its own. Included by one file of a library.
#pragma once

#include "cpu_features.h"
#include "row_code.h"
#include "row_kernels.h"
#include "team.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastwm {

namespace {

constexpr int64_t kTileBytes = 768 << 10; // what a tile's rows may work on: most of a second-level cache
constexpr int64_t kTallest = 192; // rows
constexpr int64_t kChunkRows = 96; // rows times steps that run at once where nothing forces step by step
constexpr int64_t kGroupRows = 32; // least rows per block of sums
constexpr int64_t kSumRows = 192; // the same where sums of outer products are taken, which are read and written each time
constexpr int64_t kGroups = 16; // most blocks of sums: they decide how many threads a gradient can use
constexpr int64_t kGroupBytes = int64_t(64) << 20; // room for all blocks of sums
constexpr int64_t kFewRows = 1; // up to which matrices are read as they are, not packed
constexpr int64_t kSharedProduct = 8192; // elements of a matrix from which threads share a product of few rows
constexpr std::size_t kKept = std::size_t(16) << 20; // scratch that a thread keeps from call to call
#if defined(FASTWM_CHECKED) // tests/csrc: scratch of the exact size, fresh NaN at every call, areas apart
constexpr bool kChecked = true;
constexpr int64_t kGap = 64; // elements between a tile's areas
#else
constexpr bool kChecked = false;
constexpr int64_t kGap = 0;
#endif

template <typename T>
const Kernels<T>* kernels_for(int64_t isa) {
#if defined(FASTWM_X86)
  if (isa >= int64_t(CpuIsa::kAvx512)) {
    return of_dtype<T>(&kernels_f32_avx512, &kernels_f64_avx512);
  }
  if (isa >= int64_t(CpuIsa::kAvx2)) {
    return of_dtype<T>(&kernels_f32_avx2, &kernels_f64_avx2);
  }
#else
  (void)isa;
#endif
  return of_dtype<T>(&kernels_f32_portable, &kernels_f64_portable);
}

// Aligned memory that grows and is kept by its thread: asking the system for it at every call would cost page faults.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  void* get(std::size_t bytes) {
    if (bytes > size_ || kChecked) {
      std::free(data_);
      size_ = kChecked ? bytes : (bytes + 4095) / 4096 * 4096;
      if (posix_memalign(&data_, 64, size_) != 0) {
        data_ = nullptr;
      }
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
      std::memset(data_, kChecked ? 0xff : 0, size_); // the padding of rows is computed with, though never looked at
    }
    return data_;
  }

  void trim() {
    if (size_ > kKept) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
    }
  }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// As an integer; NaN and what no integer holds become 0.
template <typename T>
int64_t whole(T value) {
  return value > T(-9e18) && value < T(9e18) ? static_cast<int64_t>(value) : 0;
}

template <typename T>
struct Shared { // what all tiles read
  const Program& program;
  const Kernels<T>& kernels;
  const double* immediates;
  const int64_t* maps;
  const T* uniforms;
  const void* packed;
  bool bf16;
  bool few; // matrices as they are
  bool reverse;
  int64_t rows, steps;
  int64_t tile, chunk; // rows per tile, steps per chunk
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  std::atomic<int64_t>* failed; // the first step at which a check does not hold; `steps` where all do
  Team* team; // for few rows: threads that share the columns of a product
};

// Elements of a tensor from `first` on, of any kind, as the program's floats.
template <typename T>
void elements(Kind kind, const void* data, int64_t first, int64_t count, T* to) {
  if (kind == Kind::kFloat) {
    std::memcpy(to, static_cast<const T*>(data) + first, count * sizeof(T));
  } else if (kind == Kind::kBool) {
    const auto* from = static_cast<const uint8_t*>(data) + first;
    for (int64_t i = 0; i < count; ++i) {
      to[i] = T(from[i] != 0);
    }
  } else {
    const auto* from = static_cast<const int64_t*>(data) + first;
    for (int64_t i = 0; i < count; ++i) {
      to[i] = T(from[i]);
    }
  }
}

// A sum as one group of rows takes it. It is zero without having been written: what comes first is stored, not added.
template <typename T>
struct Sum {
  T* at;
  int64_t elements;
  bool begun = false;

  T* zeroed() {
    if (!std::exchange(begun, true)) {
      std::memset(at, 0, sizeof(T) * elements);
    }
    return at;
  }
};

template <typename T>
class Tile {
 public:
  Tile(const Shared<T>& shared, T* memory, std::vector<Sum<T>>& sums) : s_(shared), k_(shared.kernels), sums_(sums) {
    const Header& h = *s_.program.header;
    const int64_t rows = s_.tile, many = s_.tile * s_.chunk;
    chunk_ = memory;
    batch_ = chunk_ + h.chunk * many + kGap;
    loop_ = batch_ + h.batch * many + kGap;
    persist_ = loop_ + h.loop * rows + kGap;
    scratch_ = persist_ + h.persist * rows + kGap;
    indices_ = reinterpret_cast<int32_t*>(scratch_ + h.scratch * many + kGap);
#if defined(FASTWM_CHECKED)
    for (const void* area : {batch_, loop_, persist_, scratch_, reinterpret_cast<T*>(indices_)}) {
      FASTWM_CHECKED(static_cast<const T*>(area) - kGap, kGap * sizeof(T));
    }
#endif
  }

  static std::size_t bytes(const Header& h, int64_t tile, int64_t chunk) {
    const int64_t many = tile * chunk;
    const int64_t elements = (h.chunk + h.batch + h.scratch) * many + (h.loop + h.persist) * tile;
    return sizeof(T) * (elements + 5 * kGap) + sizeof(int32_t) * many;
  }

  void run(int64_t first, int64_t rows) {
    first_ = first;
    height_ = rows;
    const Header& h = *s_.program.header;
    for (int64_t i = 0; i < h.inputs; ++i) {
      const InputEntry& in = s_.program.inputs[i];
      if (in.role == Role::kCarry) {
        T* to = persist_ + in.place.offset * s_.tile;
        for (int64_t r = 0; r < rows; ++r) {
          read(in, first + r, 0, to + r * in.place.ld);
        }
      }
    }
    const int64_t chunks = (s_.steps + s_.chunk - 1) / s_.chunk;
    for (int64_t c = 0; c < chunks; ++c) {
      start_ = (s_.reverse ? chunks - 1 - c : c) * s_.chunk;
      const int64_t steps = std::min(s_.chunk, s_.steps - start_);
      section(s_.program.ahead, h.ahead, -1, steps);
      for (int64_t t = 0; h.body > 0 && t < steps; ++t) {
        section(s_.program.body, h.body, s_.reverse ? steps - 1 - t : t, 1);
      }
      section(s_.program.after, h.after, -1, steps);
    }
    for (int64_t i = 0; i < h.finals; ++i) {
      const FinalEntry& f = s_.program.finals[i];
      const T* from = persist_ + f.place.offset * s_.tile;
      T* to = static_cast<T*>(s_.outputs[f.tensor]);
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(to + (first + r) * f.place.width, from + r * f.place.ld, f.place.width * sizeof(T));
      }
    }
  }

 private:
  // step: which of the chunk, or -1 for all of them at once.
  void section(const int64_t* code, int64_t instructions, int64_t step, int64_t steps) {
    step_ = step;
    rows_ = step < 0 ? height_ * steps : height_;
    for (int64_t i = 0; i < instructions; ++i) {
      const Instr instr{code};
      execute(instr);
      code += instr.length();
    }
  }

  T* at(const Place& p) const {
    switch (p.space) {
      case Space::kChunk: {
        T* base = chunk_ + p.offset * s_.tile * s_.chunk;
        return step_ < 0 ? base : base + step_ * height_ * p.ld;
      }
      case Space::kLoop: return loop_ + p.offset * s_.tile;
      case Space::kBatch: return batch_ + p.offset * s_.tile * s_.chunk;
      case Space::kPersist: return persist_ + p.offset * s_.tile;
      case Space::kUniform: return const_cast<T*>(s_.uniforms) + p.offset;
      default: return nullptr;
    }
  }

  // An operand of an elementwise op whose result has rows of `width`. Immediates are put where `number` says.
  Operand<T> operand(const Place& p, int64_t width, T* number) const {
    if (p.space == Space::kImmediate) {
      *number = T(s_.immediates[p.offset]);
      return {number, 0, true};
    }
    return {at(p), p.space == Space::kUniform ? 0 : p.ld, p.width == 1 && width != 1};
  }

  void parameters(const Instr& instr, int64_t first, T* to) const { // three immediates from this number on
    const int64_t from = instr.attribute(first);
    for (int64_t i = 0; i < 3; ++i) {
      to[i] = from < 0 ? T(0) : T(s_.immediates[from + i]);
    }
  }

  void read(const InputEntry& in, int64_t row, int64_t step, T* to) const {
    const int64_t index = in.role != Role::kStep ? row
        : in.time_major                         ? step * s_.rows + row
                                                : row * s_.steps + step;
    elements(in.kind, s_.inputs[in.tensor], index * in.width, in.width, to);
  }

  void write(const OutputEntry& out, int64_t row, int64_t step, const T* from) const {
    const int64_t index = row * s_.steps + step;
    void* data = s_.outputs[out.tensor];
    if (out.kind == Kind::kFloat) {
      std::memcpy(static_cast<T*>(data) + index * out.width, from, out.width * sizeof(T));
    } else if (out.kind == Kind::kBool) {
      auto* to = static_cast<uint8_t*>(data) + index * out.width;
      for (int64_t i = 0; i < out.width; ++i) {
        to[i] = from[i] != 0;
      }
    } else {
      auto* to = static_cast<int64_t*>(data) + index * out.width;
      for (int64_t i = 0; i < out.width; ++i) {
        to[i] = whole(from[i]);
      }
    }
  }

  // Row of this section -> (row of the batch, step).
  template <typename F>
  void each_row(F f) const {
    if (step_ >= 0) {
      for (int64_t r = 0; r < rows_; ++r) {
        f(r, first_ + r, start_ + step_);
      }
      return;
    }
    for (int64_t i = 0; i < rows_; i += height_) {
      for (int64_t r = 0; r < height_; ++r) {
        f(i + r, first_ + r, start_ + i / height_);
      }
    }
  }

  const void* matrix(const MatrixEntry& m, int64_t which) const {
    if (s_.few) {
      return static_cast<const T*>(s_.inputs[m.tensor]) + which * m.k * m.n;
    }
    const int64_t at = m.packed + which * k_.packed_size(m.k, m.n);
    return s_.bf16 ? static_cast<const void*>(static_cast<const uint16_t*>(s_.packed) + at)
                   : static_cast<const void*>(static_cast<const T*>(s_.packed) + at);
  }

  Product<T> product(const Instr& instr, const MatrixEntry& m, int64_t act, T* act_params) const {
    Product<T> p{};
    p.form = s_.few ? static_cast<Form>(m.layout) : s_.bf16 ? Form::kPanelsBf16 : Form::kPanels;
    p.k = m.k;
    p.n = m.n;
    p.ldb = m.n;
    p.thin = s_.rows <= 2;
    p.act = static_cast<Unary>(instr.attribute(act));
    parameters(instr, act + 1, act_params);
    p.act_params = act_params;
    return p;
  }

  // A product; its columns shared out where there is a team.
  void multiply(const Product<T>& p) const {
    if (s_.team == nullptr || p.k * p.n < kSharedProduct) {
      return k_.product(p);
    }
    const int64_t parts = std::clamp<int64_t>(p.n / (2 * kPad), 1, s_.team->threads()); // a narrow product is one
    const int64_t width = padded((p.n + parts - 1) / parts);
    s_.team->run((p.n + width - 1) / width, [&](int64_t part) {
      const int64_t first = part * width;
      Product<T> own = p;
      own.n = std::min(width, p.n - first);
      own.b = static_cast<const T*>(p.b) + first * (p.form == Form::kNk ? p.k : 1);
      own.bias = p.bias == nullptr ? nullptr : p.bias + first;
      own.c = p.c + first;
      k_.product(own);
    });
  }

  void copy_rows(int64_t rows, int64_t width, const T* from, int64_t ldf, T* to, int64_t ldt) const {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(to + r * ldt, from + r * ldf, width * sizeof(T));
    }
  }

  // Products of `groups` parts of each row with one matrix, or with one each.
  void grouped(const Instr& instr, bool own) const {
    const MatrixEntry& m = s_.program.matrices[instr.attribute(0)];
    const int64_t groups = instr.attribute(1);
    const bool alike = instr.attribute(2) != 0; // every group reads the same part
    const Place &x = instr.operand(0), &bias = instr.operand(1), &out = instr.out();
    T act_params[3];
    Product<T> p = product(instr, m, 3, act_params);
    p.rows = rows_;
    p.lda = x.ld;
    const bool whole = groups == 1 || m.n % kPad == 0;
    p.ldc = whole ? out.ld : padded(m.n);
    for (int64_t g = 0; g < groups; ++g) {
      p.a = at(x) + (alike ? 0 : g * m.k);
      p.b = matrix(m, own ? g : 0);
      p.bias = bias.space == Space::kNone ? nullptr : at(bias) + (own ? g * padded(m.n) : 0);
      p.c = whole ? at(out) + g * m.n : scratch_;
      multiply(p);
      if (!whole) { // its padding would lie over the next group
        copy_rows(rows_, m.n, scratch_, p.ldc, at(out) + g * m.n, out.ld);
      }
    }
  }

  // Rows of each member of an ensemble, gathered.
  template <typename F>
  void each_member(const Place& index, int64_t members, F f) const {
    const T* chosen = at(index);
    for (int64_t m = 0; m < members; ++m) {
      int64_t count = 0;
      for (int64_t r = 0; r < rows_; ++r) {
        if (chosen[r * index.ld] == T(m)) {
          indices_[count++] = int32_t(r);
        }
      }
      if (count > 0) {
        f(m, count);
      }
    }
  }

  void gather(int64_t count, const T* from, int64_t ld, int64_t width, T* to, int64_t ldt) const {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(to + i * ldt, from + indices_[i] * ld, width * sizeof(T));
    }
  }

  void member_linear(const Instr& instr) const {
    const MatrixEntry& m = s_.program.matrices[instr.attribute(0)];
    const Place &x = instr.operand(0), &bias = instr.operand(1), &index = instr.operand(2), &out = instr.out();
    T act_params[3];
    Product<T> p = product(instr, m, 3, act_params);
    T* a = scratch_;
    T* c = a + rows_ * padded(m.k);
    p.lda = padded(m.k);
    p.ldc = padded(m.n);
    each_member(index, m.count, [&](int64_t member, int64_t count) {
      gather(count, at(x), x.ld, m.k, a, p.lda);
      p.rows = count;
      p.a = a;
      p.c = c;
      p.b = matrix(m, member);
      p.bias = bias.space == Space::kNone ? nullptr : at(bias) + member * padded(m.n);
      multiply(p);
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(at(out) + indices_[i] * out.ld, c + i * p.ldc, m.n * sizeof(T));
      }
    });
  }

  // layout kNk: sum[n][k] += g[n] x[k]; else sum[k][n] += x[k] g[n].
  void outer(const Instr& instr) const {
    const SumEntry& sum = s_.program.sums[instr.attribute(0)];
    const bool nk = instr.attribute(1) != 0;
    const int64_t groups = instr.attribute(2), k = instr.attribute(3), n = instr.attribute(4);
    const bool own = instr.code() == Code::kGroupedOuter, alike = instr.attribute(5) != 0;
    const Place &x = instr.operand(0), &g = instr.operand(1);
    const int64_t height = nk ? n : k;
    Sum<T>& target = sums_[instr.attribute(0)];
    bool first = !target.begun && height * (own ? groups : 1) == sum.rows; // it is written whole
    T* to = first ? target.at : target.zeroed();
    target.begun = true;
    for (int64_t i = 0; i < groups; ++i) {
      add_outer(nk, rows_, k, n, at(x) + (alike ? 0 : i * k), x.ld, at(g) + i * n, g.ld,
                to + (own ? i * height * padded(sum.columns) : 0), padded(sum.columns), first, groups > 1);
      first = first && own;
    }
  }

  void add_outer(bool nk, int64_t rows, int64_t k, int64_t n, const T* x, int64_t ldx, const T* g, int64_t ldg, T* to,
                 int64_t ld, bool first, bool parts) const {
    const T *a = nk ? g : x, *b = nk ? x : g;
    int64_t lda = nk ? ldg : ldx, ldb = nk ? ldx : ldg;
    const int64_t m = nk ? n : k, w = nk ? k : n;
    if (parts && w % kPad != 0) { // whole vectors would reach into the next group, or past the last
      copy_rows(rows, w, b, ldb, scratch_, padded(w));
      b = scratch_;
      ldb = padded(w);
    }
    if (s_.team == nullptr || m * w < kSharedProduct) {
      return k_.outer(rows, m, w, a, lda, b, ldb, to, ld, first);
    }
    const int64_t height = (m + s_.team->threads() - 1) / s_.team->threads();
    s_.team->run((m + height - 1) / height, [&](int64_t part) {
      const int64_t top = part * height;
      k_.outer(rows, std::min(height, m - top), w, a + top, lda, b, ldb, to + top * ld, ld, first);
    });
  }

  void member_outer(const Instr& instr) const {
    const SumEntry& sum = s_.program.sums[instr.attribute(0)];
    const bool nk = instr.attribute(1) != 0;
    const int64_t members = instr.attribute(2), k = instr.attribute(3), n = instr.attribute(4);
    const Place &x = instr.operand(0), &g = instr.operand(1), &index = instr.operand(2);
    T* a = scratch_;
    T* b = a + rows_ * padded(k);
    each_member(index, members, [&](int64_t member, int64_t count) {
      gather(count, at(x), x.ld, k, a, padded(k));
      gather(count, at(g), g.ld, n, b, padded(n));
      T* to = sums_[instr.attribute(0)].zeroed() + member * (nk ? n : k) * padded(sum.columns);
      add_outer(nk, count, k, n, a, padded(k), b, padded(n), to, padded(sum.columns), false, false);
    });
  }

  void row_sum(const Instr& instr) const {
    const SumEntry& sum = s_.program.sums[instr.attribute(0)];
    const Place& g = instr.operand(0);
    T* to = sums_[instr.attribute(0)].zeroed();
    if (instr.code() == Code::kMemberRowSum) {
      const Place& index = instr.operand(1);
      for (int64_t r = 0; r < rows_; ++r) {
        const int64_t member = whole(at(index)[r * index.ld]);
        if (member >= 0 && member < sum.rows) {
          k_.add_rows(1, g.width, at(g) + r * g.ld, g.ld, to + member * padded(sum.columns));
        }
      }
      return;
    }
    for (int64_t i = 0; i < sum.rows; ++i) {
      k_.add_rows(rows_, sum.columns, at(g) + i * sum.columns, g.ld, to + i * padded(sum.columns));
    }
  }

  void execute(const Instr& instr) const {
    const Place& out = instr.out();
    switch (instr.code()) {
      case Code::kUnary: {
        T params[3];
        parameters(instr, 0, params);
        const Place& x = instr.operand(0);
        k_.unary(static_cast<Unary>(instr.sub()), params, rows_ * x.ld, at(x), at(out));
        return;
      }
      case Code::kUnaryGrad: {
        T params[3];
        parameters(instr, 0, params);
        const Place& x = instr.operand(1);
        k_.unary_grad(static_cast<UnaryGrad>(instr.sub()), params, rows_ * x.ld, at(instr.operand(0)), at(x), at(out));
        return;
      }
      case Code::kBinary: {
        T a, b;
        k_.binary(static_cast<Binary>(instr.sub()), rows_, out.ld, operand(instr.operand(0), out.width, &a),
                  operand(instr.operand(1), out.width, &b), at(out));
        return;
      }
      case Code::kWhere: {
        T c, a, b;
        k_.where(rows_, out.ld, operand(instr.operand(0), out.width, &c), operand(instr.operand(1), out.width, &a),
                 operand(instr.operand(2), out.width, &b), at(out));
        return;
      }
      case Code::kReduce: {
        const Place& x = instr.operand(0);
        k_.reduce(static_cast<Reduce>(instr.sub()), rows_, instr.attribute(0), instr.attribute(1), at(x), x.ld, at(out),
                  out.ld);
        return;
      }
      case Code::kSoftmax: {
        const Place& x = instr.operand(0);
        k_.softmax(instr.sub() != 0, rows_, instr.attribute(0), instr.attribute(1), at(x), x.ld, at(out), out.ld);
        return;
      }
      case Code::kSoftmaxGrad: {
        const Place &g = instr.operand(0), &y = instr.operand(1);
        k_.softmax_grad(instr.sub() != 0, rows_, instr.attribute(0), instr.attribute(1), at(g), g.ld, at(y), y.ld,
                        at(out), out.ld);
        return;
      }
      case Code::kLayerNorm: {
        const Place& x = instr.operand(0);
        k_.layer_norm(rows_, instr.attribute(0), instr.attribute(1), at(x), x.ld, at(instr.operand(1)),
                      at(instr.operand(2)), T(s_.immediates[instr.attribute(2)]), at(out), out.ld);
        return;
      }
      case Code::kLayerNormGrad: {
        const Place &g = instr.operand(0), &x = instr.operand(1);
        k_.layer_norm_grad(rows_, instr.attribute(0), instr.attribute(1), at(g), g.ld, at(x), x.ld,
                           at(instr.operand(2)), T(s_.immediates[instr.attribute(2)]), at(out), out.ld);
        return;
      }
      case Code::kLinear: return grouped(instr, false);
      case Code::kGroupedLinear: return grouped(instr, true);
      case Code::kMemberLinear: return member_linear(instr);
      case Code::kOuter:
      case Code::kGroupedOuter: return outer(instr);
      case Code::kMemberOuter: return member_outer(instr);
      case Code::kRowSum:
      case Code::kMemberRowSum: return row_sum(instr);
      case Code::kSlice: { // of a row value, or a uniform as one
        const Place& x = instr.operand(0);
        copy_rows(rows_, out.width, at(x) + instr.attribute(0), x.ld, at(out), out.ld);
        return;
      }
      case Code::kIndex: {
        const Place& x = instr.operand(0);
        const int64_t* map = s_.maps + instr.attribute(0);
        for (int64_t r = 0; r < rows_; ++r) {
          const T* from = at(x) + r * x.ld;
          T* to = at(out) + r * out.ld;
          for (int64_t i = 0; i < out.width; ++i) {
            to[i] = from[map[i]];
          }
        }
        return;
      }
      case Code::kIndexAdd: {
        const Place& g = instr.operand(0);
        const int64_t* map = s_.maps + instr.attribute(0);
        for (int64_t r = 0; r < rows_; ++r) {
          const T* from = at(g) + r * g.ld;
          T* to = at(out) + r * out.ld;
          std::memset(to, 0, out.width * sizeof(T));
          for (int64_t i = 0; i < g.width; ++i) {
            to[map[i]] += from[i];
          }
        }
        return;
      }
      case Code::kConcat: {
        int64_t column = 0;
        for (int64_t i = 0; i < instr.operands(); ++i) {
          const Place& x = instr.operand(i);
          copy_rows(rows_, x.width, at(x), x.ld, at(out) + column, out.ld);
          column += x.width;
        }
        return;
      }
      case Code::kOneHot: {
        const Place& index = instr.operand(0);
        const int64_t n = instr.attribute(1);
        for (int64_t r = 0; r < rows_; ++r) {
          T* to = at(out) + r * out.ld;
          std::memset(to, 0, out.width * sizeof(T));
          for (int64_t g = 0; g < instr.attribute(0); ++g) {
            const int64_t i = whole(at(index)[r * index.ld + g]);
            if (i >= 0 && i < n) {
              to[g * n + i] = T(1);
            }
          }
        }
        return;
      }
      case Code::kTake:
      case Code::kPut: {
        const bool put = instr.code() == Code::kPut;
        const Place &x = instr.operand(0), &index = instr.operand(1);
        const int64_t groups = instr.attribute(0), m = instr.attribute(1), n = instr.attribute(2);
        for (int64_t r = 0; r < rows_; ++r) {
          const T* from = at(x) + r * x.ld;
          T* to = at(out) + r * out.ld;
          if (put) {
            std::memset(to, 0, out.width * sizeof(T));
          }
          for (int64_t g = 0; g < groups; ++g) {
            int64_t i = whole(at(index)[r * index.ld + g]);
            i = i < 0 ? 0 : i >= m ? m - 1 : i;
            std::memcpy(put ? to + (g * m + i) * n : to + g * n, put ? from + g * n : from + (g * m + i) * n,
                        n * sizeof(T));
          }
        }
        return;
      }
      case Code::kFill: {
        const T value = T(s_.immediates[instr.attribute(0)]);
        for (int64_t r = 0; r < rows_; ++r) {
          std::fill_n(at(out) + r * out.ld, out.width, value);
        }
        return;
      }
      case Code::kLoad: {
        const InputEntry& in = s_.program.inputs[instr.attribute(0)];
        T* to = at(out);
        each_row([&](int64_t r, int64_t row, int64_t step) { read(in, row, step, to + r * out.ld); });
        return;
      }
      case Code::kStore: {
        const OutputEntry& o = s_.program.outputs[instr.attribute(0)];
        const Place& x = instr.operand(0);
        const T* from = at(x);
        each_row([&](int64_t r, int64_t row, int64_t step) { write(o, row, step, from + r * x.ld); });
        return;
      }
      case Code::kCheck: {
        const Place& x = instr.operand(0);
        const T* from = at(x);
        int64_t first = s_.steps;
        each_row([&](int64_t r, int64_t, int64_t step) {
          for (int64_t i = 0; i < x.width; ++i) {
            first = from[r * x.ld + i] != 0 ? first : std::min(first, step);
          }
        });
        int64_t known = s_.failed->load(std::memory_order_relaxed);
        while (first < known && !s_.failed->compare_exchange_weak(known, first)) {
        }
        return;
      }
    }
  }

  const Shared<T>& s_;
  const Kernels<T>& k_;
  std::vector<Sum<T>>& sums_; // of this tile's group
  T *chunk_, *batch_, *loop_, *persist_, *scratch_;
  int32_t* indices_;
  int64_t first_ = 0, height_ = 0, start_ = 0, step_ = -1, rows_ = 0;
};

// Uniforms used element by element, copied so that whole vectors can be read of them.
template <typename T>
void stage(const Program& program, const std::vector<const void*>& inputs, T* to) {
  for (int64_t i = 0; i < program.header->vectors; ++i) {
    const VectorEntry& v = program.vectors[i];
    const int64_t ld = padded(v.columns);
    for (int64_t r = 0; r < v.rows; ++r) {
      T* row = to + v.offset + r * ld;
      elements(v.kind, inputs[v.tensor], r * v.columns, v.columns, row);
      std::memset(row + v.columns, 0, (ld - v.columns) * sizeof(T));
    }
  }
}

// Packs what changed since the last call. By content: a write through `.data` changes no version and no address.
template <typename T, typename Threads>
void refresh(const Program& program, const Kernels<T>& k, const std::vector<const void*>& inputs, void* packed,
             int64_t* prints, bool bf16) {
  const int64_t count = program.header->matrices;
  Threads::parallel_for(0, count, count > 0 && program.header->packed_elements > (1 << 18) ? 1 : count + 1,
                              [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const MatrixEntry& m = program.matrices[i];
      const T* data = static_cast<const T*>(inputs[m.tensor]);
      const auto print = int64_t(k.fingerprint(data, m.count * m.k * m.n) | 1); // never 0: that is "nothing yet"
      if (prints[i] == print) {
        continue;
      }
      for (int64_t c = 0; c < m.count; ++c) {
        const Matrix<T> from{data + c * m.k * m.n, static_cast<Layout>(m.layout), m.k, m.n};
        const int64_t at = m.packed + c * k.packed_size(m.k, m.n);
        if (bf16) {
          k.pack_bf16(from, static_cast<uint16_t*>(packed) + at);
        } else {
          k.pack(from, static_cast<T*>(packed) + at);
        }
      }
      prints[i] = print;
    }
  });
}

// Fresh memory costs a page fault for every 4 KiB that is first written; huge pages spare most of them.
inline void ask_for_huge_pages(void* data, std::size_t bytes) {
#if defined(__linux__)
  constexpr std::size_t huge = std::size_t(2) << 20;
  const auto first = (reinterpret_cast<std::uintptr_t>(data) + huge - 1) / huge * huge;
  const auto last = (reinterpret_cast<std::uintptr_t>(data) + bytes) / huge * huge;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#else
  (void)data;
  (void)bytes;
#endif
}

// Threads: static int64_t count(); static void parallel_for(begin, end, grain, f), as at::parallel_for.
template <typename T, typename Threads>
int64_t run(const Program& program, const double* immediates, const int64_t* maps, void* packed, int64_t* prints,
            std::vector<const void*> inputs, std::vector<void*> outputs, int64_t rows, int64_t steps, bool reverse,
            bool bf16, int64_t isa) {
  const Header& h = *program.header;
  const Kernels<T>& k = *kernels_for<T>(isa);
  for (int64_t i = 0; i < h.outputs; ++i) {
    const OutputEntry& o = program.outputs[i];
    const int64_t item = o.kind == Kind::kFloat ? int64_t(sizeof(T)) : o.kind == Kind::kBool ? 1 : 8;
    ask_for_huge_pages(outputs[o.tensor], std::size_t(rows * steps * o.width * item));
  }
  const bool few = rows <= kFewRows && !bf16;
  if (!few) {
    refresh<T, Threads>(program, k, inputs, packed, prints, bf16);
  }
  thread_local Scratch uniforms;
  T* staged = static_cast<T*>(uniforms.get(sizeof(T) * std::max<int64_t>(h.uniforms, 1)));
  stage<T>(program, inputs, staged);
  std::atomic<int64_t> failed{steps};
  const int64_t threads = std::max<int64_t>(1, Threads::count());
  Team team(threads);
  int64_t largest = 0;
  for (int64_t i = 0; i < h.matrices; ++i) {
    largest = std::max(largest, program.matrices[i].k * program.matrices[i].n);
  }
  const bool teamed = few && rows > 0 && threads > 1 && largest >= kSharedProduct;
  Shared<T> shared{program, k,     immediates, maps, staged, packed,  bf16,    few,
                   reverse, rows,  steps,      0,    0,      inputs,  outputs, &failed, teamed ? &team : nullptr};

  // Rows are cut into groups, one after the other on a thread, and those into tiles. With sums the cut must not depend
  // on the number of threads, so that they come out the same.
  // A tile's rows should fit the cache; but where the matrices do not, each tile reads all of them at each step from
  // further away, and must have rows enough to make up for it.
  const int64_t tile_bytes = std::max(kTileBytes, h.packed_elements * int64_t(sizeof(T)) / 2);
  const int64_t tallest = std::clamp<int64_t>(tile_bytes / std::max<int64_t>(1, h.row_bytes) / 12 * 12, 24, kTallest);
  int64_t groups;
  if (h.sums > 0) {
    // A thread's tiles should be tall, for the sums are read and written once per tile; but two threads shall share 64
    // rows.
    const int64_t most = rows < 4 * kGroupRows ? rows / kGroupRows : rows / (2 * kGroupRows);
    const int64_t room = kGroupBytes / std::max<int64_t>(1, h.sum_elements * int64_t(sizeof(T)));
    groups = std::clamp<int64_t>(std::min(most, room), 1, kGroups);
  } else {
    groups = std::max<int64_t>(1, (rows + tallest - 1) / tallest); // one even without rows
    groups = std::min((groups + threads - 1) / threads * threads, std::max<int64_t>(1, rows / 8));
  }
  const int64_t per_group = std::max<int64_t>(1, (rows + groups - 1) / groups);
  groups = rows == 0 ? 0 : (rows + per_group - 1) / per_group;
  const int64_t tiles = (per_group + tallest - 1) / tallest;
  shared.tile = (per_group + tiles - 1) / tiles;
  const int64_t at_once = h.sums > 0 ? kSumRows : kChunkRows;
  shared.chunk = h.ahead + h.after == 0
      ? 1
      : std::clamp<int64_t>(at_once / shared.tile, 1, std::max<int64_t>(steps, 1));

  thread_local Scratch sum_scratch;
  // Each group sums in a block of its own; a single group straight into the result where that has no padding.
  T* sums = nullptr;
  const int64_t blocks = std::max<int64_t>(groups, 1);
  if (h.sums > 0) {
    sums = static_cast<T*>(sum_scratch.get(sizeof(T) * h.sum_elements * blocks));
  }
  auto direct = [&](const SumEntry& e) { return blocks == 1 && e.columns % kPad == 0; };
  auto sums_of = [&](int64_t group) {
    std::vector<Sum<T>> found;
    for (int64_t i = 0; i < h.sums; ++i) {
      const SumEntry& e = program.sums[i];
      T* to = direct(e) ? static_cast<T*>(outputs[e.tensor]) : sums + group * h.sum_elements + e.offset;
      found.push_back({to, e.rows * padded(e.columns)});
    }
    return found;
  };
  auto work = [&](int64_t begin, int64_t end) {
    thread_local Scratch memory;
    T* room = static_cast<T*>(memory.get(Tile<T>::bytes(h, shared.tile, shared.chunk)));
    for (int64_t g = begin; g < end; ++g) {
      std::vector<Sum<T>> taken = sums_of(g);
      Tile<T> tile(shared, room, taken);
      const int64_t last = std::min(rows, (g + 1) * per_group);
      for (int64_t first = g * per_group; first < last; first += shared.tile) {
        tile.run(first, std::min(shared.tile, last - first));
      }
      for (Sum<T>& sum : taken) {
        sum.zeroed(); // those that nothing was added to
      }
    }
    memory.trim();
  };
  if (teamed) { // few rows are one group
    Threads::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      if (begin == 0) {
        const Team::Lead lead(team);
        work(0, groups);
      }
      if (end > 1) {
        team.help();
      }
    });
  } else {
    Threads::parallel_for(0, groups, 1, work);
  }
  if (groups == 0) {
    for (Sum<T>& sum : sums_of(0)) {
      sum.zeroed();
    }
  }
  const int64_t at_a_time = h.sum_elements * blocks > (1 << 18) ? 1 : h.sums + 1;
  Threads::parallel_for(0, h.sums, at_a_time, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const SumEntry& e = program.sums[i];
      if (direct(e)) {
        continue;
      }
      for (int64_t r = 0; r < e.rows; ++r) {
        T* to = static_cast<T*>(outputs[e.tensor]) + r * e.columns;
        const T* from = sums + e.offset + r * padded(e.columns);
        std::memcpy(to, from, sizeof(T) * e.columns);
        for (int64_t g = 1; g < blocks; ++g) {
          from += h.sum_elements;
          for (int64_t c = 0; c < e.columns; ++c) {
            to[c] += from[c];
          }
        }
      }
    }
  });
  sum_scratch.trim();
  uniforms.trim();
  return failed.load() < steps ? failed.load() + 1 : 0;
}

} // namespace

} // namespace fastwm
