// Runs dumped row programs (tests/test_sanitizers.py) in buffers of their exact sizes, so that a sanitizer sees every
// read past an end, and compares the results with those dumped. No torch, no Python.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define FASTWM_CHECKED(from, bytes) __asan_poison_memory_region(from, bytes)
#else
#define FASTWM_CHECKED(from, bytes) ((void)(from), (void)(bytes))
#endif

#include "../../csrc/row_runner.h"

#include <cmath>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>

namespace {

int64_t thread_count = 1;

struct Threads {
  static int64_t count() { return thread_count; }

  template <typename F>
  static void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
    const int64_t least = std::max<int64_t>(grain, 1);
    const int64_t parts = std::min(thread_count, (end - begin + least - 1) / least);
    if (parts <= 1) {
      if (end > begin) {
        f(begin, end);
      }
      return;
    }
    const int64_t each = (end - begin + parts - 1) / parts;
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t first = begin + i * each, last = std::min(end, first + each);
      if (first < last) {
        threads.emplace_back([&f, first, last] { f(first, last); });
      }
    }
    for (std::thread& t : threads) {
      t.join();
    }
  }
};

class Buffer { // of the exact size, on the heap
 public:
  explicit Buffer(int64_t bytes) : bytes_(bytes), data_(std::malloc(std::size_t(bytes))) {}
  Buffer(Buffer&& other) noexcept : bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() { std::free(data_); }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }
  void fill(int byte) {
    if (bytes_ > 0) {
      std::memset(data_, byte, std::size_t(bytes_));
    }
  }

 private:
  int64_t bytes_;
  void* data_;
};

class Reader {
 public:
  explicit Reader(const char* path) : in_(path, std::ios::binary) {}

  bool more() { return in_.peek() != std::ifstream::traits_type::eof(); }
  int64_t number() {
    int64_t value = 0;
    in_.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }
  double real() {
    double value = 0;
    in_.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }
  Buffer buffer() {
    Buffer found(number());
    in_.read(found.as<char>(), found.bytes());
    return found;
  }
  std::string text() {
    std::string found(std::size_t(number()), ' ');
    in_.read(found.data(), std::streamsize(found.size()));
    return found;
  }

 private:
  std::ifstream in_;
};

template <typename T>
bool near(const Buffer& got, const Buffer& want, double tolerance) {
  const int64_t n = want.bytes() / int64_t(sizeof(T));
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double w = double(want.as<T>()[i]);
    largest = std::isfinite(w) ? std::max(largest, std::fabs(w)) : largest;
  }
  for (int64_t i = 0; i < n; ++i) {
    const double g = double(got.as<T>()[i]), w = double(want.as<T>()[i]);
    if (!(g == w || (std::isnan(g) && std::isnan(w)) || std::fabs(g - w) <= tolerance * (1 + largest))) {
      std::printf("  element %lld of %lld: %g, not %g\n", (long long)i, (long long)n, g, w);
      return false;
    }
  }
  return true;
}

template <typename T>
bool run_case(Reader& in, bool bf16, int64_t isa, bool reverse, int64_t rows, int64_t steps) {
  const double tolerance = in.real();
  const int64_t packed_elements = in.number(), matrices = in.number(), expected = in.number();
  const Buffer code = in.buffer(), immediates = in.buffer(), maps = in.buffer();
  std::vector<Buffer> inputs, outputs, wanted;
  std::vector<int64_t> kinds;
  for (int64_t i = in.number(); i > 0; --i) {
    inputs.push_back(in.buffer());
  }
  for (int64_t i = in.number(); i > 0; --i) {
    kinds.push_back(in.number());
    wanted.push_back(in.buffer());
    outputs.emplace_back(wanted.back().bytes());
  }
  Buffer packed(packed_elements * int64_t(bf16 ? 2 : sizeof(T))), prints(matrices * int64_t(sizeof(int64_t)));
  prints.fill(0);
  const fastwm::Program program(code.as<int64_t>());
  bool good = program.header->version == fastwm::kVersion;
  for (int again = 0; again < 2 && good; ++again) { // the second time matrices are packed already
    std::vector<const void*> from;
    std::vector<void*> to;
    for (Buffer& b : inputs) {
      from.push_back(b.as<void>());
    }
    for (Buffer& b : outputs) {
      b.fill(0xff);
      to.push_back(b.as<void>());
    }
    const int64_t failed = fastwm::run<T, Threads>(program, immediates.as<double>(), maps.as<int64_t>(),
                                                   packed.as<void>(), prints.as<int64_t>(), from, to, rows, steps,
                                                   reverse, bf16, isa);
    good = (failed != 0) == (expected != 0);
    for (std::size_t i = 0; i < outputs.size() && good; ++i) {
      good = kinds[i] == 0 ? near<T>(outputs[i], wanted[i], tolerance)
          : kinds[i] == 1  ? near<uint8_t>(outputs[i], wanted[i], 0)
                           : near<int64_t>(outputs[i], wanted[i], 0);
    }
  }
  return good;
}

} // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::printf("usage: %s DUMP\n", argv[0]);
    return 2;
  }
  Reader in(argv[1]);
  int64_t cases = 0, failures = 0;
  for (; in.more(); ++cases) {
    const std::string name = in.text();
    std::fprintf(stderr, "%s\n", name.c_str()); // the last line before a sanitizer's report
    const bool wide = in.number() != 0, bf16 = in.number() != 0;
    const int64_t isa = std::min(in.number(), int64_t(fastwm::cpu_isa()));
    const bool reverse = in.number() != 0;
    const int64_t rows = in.number(), steps = in.number();
    thread_count = in.number();
    const bool good = wide ? run_case<double>(in, false, isa, reverse, rows, steps)
                           : run_case<float>(in, bf16, isa, reverse, rows, steps);
    if (!good) {
      std::printf("FAILED %s\n", name.c_str());
      ++failures;
    }
  }
  std::printf("%lld cases, %lld failures\n", (long long)cases, (long long)failures);
  return cases > 0 && failures == 0 ? 0 : 1;
}
