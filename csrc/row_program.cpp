#include "row_program.h"

#include "row_runner.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

namespace fastwm {

namespace {

struct TorchThreads {
  static int64_t count() { return torch::stable::get_num_threads(); }

  template <typename F>
  static void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
    torch::stable::parallel_for(begin, end, grain, f);
  }
};

// Every tensor of the size and dtype that the tables say: all that stands between a mistake of the caller and its memory.
void check_tensors(const Program& program, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
                 torch::headeronly::ScalarType floats, int64_t rows, int64_t steps) {
  const Header& h = *program.header;
  using torch::headeronly::ScalarType;
  auto check = [&](const std::vector<Tensor>& tensors, const char* what, int64_t at, int64_t numel, Kind kind) {
    STD_TORCH_CHECK(at >= 0 && at < int64_t(tensors.size()) && tensors[at].numel() == numel, "row program: ", what, " ",
                    at, " must have ", numel, " elements");
    const ScalarType type = kind == Kind::kFloat ? floats : kind == Kind::kBool ? ScalarType::Bool : ScalarType::Long;
    STD_TORCH_CHECK(tensors[at].scalar_type() == type, "row program: ", what, " ", at, " has another dtype");
  };
  STD_TORCH_CHECK(rows >= 0 && steps >= 0, "row program: rows and steps must not be negative");
  for (int64_t i = 0; i < h.inputs; ++i) {
    const InputEntry& e = program.inputs[i];
    check(inputs, "input", e.tensor, e.width * rows * (e.role == Role::kStep ? steps : 1), e.kind);
  }
  for (int64_t i = 0; i < h.vectors; ++i) {
    const VectorEntry& e = program.vectors[i];
    check(inputs, "input", e.tensor, e.rows * e.columns, e.kind);
  }
  for (int64_t i = 0; i < h.matrices; ++i) {
    const MatrixEntry& e = program.matrices[i];
    check(inputs, "input", e.tensor, e.count * e.k * e.n, Kind::kFloat);
  }
  for (int64_t i = 0; i < h.outputs; ++i) {
    const OutputEntry& e = program.outputs[i];
    check(outputs, "output", e.tensor, e.width * rows * steps, e.kind);
  }
  for (int64_t i = 0; i < h.finals; ++i) {
    check(outputs, "output", program.finals[i].tensor, program.finals[i].place.width * rows, Kind::kFloat);
  }
  for (int64_t i = 0; i < h.sums; ++i) {
    check(outputs, "output", program.sums[i].tensor, program.sums[i].rows * program.sums[i].columns, Kind::kFloat);
  }
}

} // namespace

int64_t run_row_program(
    const Tensor& code, const Tensor& immediates, const Tensor& maps, const Tensor& packed, const Tensor& prints,
    const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, int64_t rows, int64_t steps, bool reverse,
    bool bf16, int64_t isa) {
  const Program program(static_cast<const int64_t*>(code.const_data_ptr()));
  STD_TORCH_CHECK(program.header->version == kVersion, "row program of version ", program.header->version);
  const bool wide = packed.scalar_type() == torch::headeronly::ScalarType::Double;
  const auto floats = wide ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
  check_tensors(program, inputs, outputs, floats, rows, steps);
  std::vector<const void*> from;
  std::vector<void*> to;
  for (const Tensor& t : inputs) {
    from.push_back(t.const_data_ptr());
  }
  for (const Tensor& t : outputs) {
    to.push_back(t.mutable_data_ptr());
  }
  const auto* numbers = static_cast<const double*>(immediates.const_data_ptr());
  const auto* indices = static_cast<const int64_t*>(maps.const_data_ptr());
  auto* state = static_cast<int64_t*>(prints.mutable_data_ptr());
  const int64_t best = isa < 0 ? int64_t(cpu_isa()) : std::min(isa, int64_t(cpu_isa()));
  void* panels = packed.mutable_data_ptr();
  return wide ? run<double, TorchThreads>(program, numbers, indices, panels, state, from, to, rows, steps, reverse,
                                          false, best)
              : run<float, TorchThreads>(program, numbers, indices, panels, state, from, to, rows, steps, reverse, bf16,
                                         best);
}

double multiply_add_peak(int64_t repeats) {
  return kernels_for<float>(int64_t(cpu_isa()))->multiply_add_peak(repeats);
}

} // namespace fastwm
