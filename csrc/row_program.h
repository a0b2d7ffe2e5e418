// Runs a row program for a whole horizon. Definition, fake and encoding: fastwm/ops/row_program.py,
// fastwm/row_program/encode.py; what the ops mean: fastwm/row_program/ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace fastwm {

using torch::stable::Tensor;

// Writes every output, final and sum; returns 0, or 1 + the first step at which a check did
// not hold in some row.
//   code int64, immediates float64, maps int64: the encoded program.
//   packed, prints: room for packed matrices and their fingerprints (int64, one per matrix, 0 when nothing is packed),
//     kept from call to call. Packed in float32, float64 or, with `bf16`, bfloat16.
//   inputs: in the tables' numbering: rows of carries, steps, contexts, then uniforms; contiguous.
//   outputs: [rows, steps, width] and so on, contiguous, written whole.
int64_t run_row_program(
    const Tensor& code,
    const Tensor& immediates,
    const Tensor& maps,
    const Tensor& packed,
    const Tensor& prints,
    const std::vector<Tensor>& inputs,
    const std::vector<Tensor>& outputs,
    int64_t rows,
    int64_t steps,
    bool reverse,
    bool bf16,
    int64_t isa);

double multiply_add_peak(int64_t repeats);

} // namespace fastwm
