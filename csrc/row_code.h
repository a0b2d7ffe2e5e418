// A row program as it comes from Python (fastwm/row_program/encode.py): tables of integers, read in place.
#pragma once

#include <cstdint>

namespace fastwm {

// Where a value lies. kChunk: one row per (step of the chunk, row of the tile). kLoop: one per row of the tile. kBatch:
// as kChunk, for values that live within one section. kPersist: one per row, from step to step. kUniform: one for all.
enum class Space : int64_t { kNone, kChunk, kLoop, kBatch, kPersist, kUniform, kImmediate };

enum class Code : int64_t {
  kUnary, kUnaryGrad, kBinary, kWhere, kReduce, kSoftmax, kSoftmaxGrad, kLayerNorm, kLayerNormGrad, kLinear,
  kGroupedLinear, kMemberLinear, kOuter, kGroupedOuter, kMemberOuter, kRowSum, kMemberRowSum, kSlice, kIndex,
  kIndexAdd, kConcat, kOneHot, kTake, kPut, kFill, kLoad, kStore, kCheck,
};

struct Place {
  Space space;
  int64_t offset; // elements per row of its space; of an immediate, its number
  int64_t ld;
  int64_t width;
};

// [length, code, sub, out: Place, operands, attributes, Place per operand, attribute per attribute]
struct Instr {
  const int64_t* at;

  int64_t length() const { return at[0]; }
  Code code() const { return static_cast<Code>(at[1]); }
  int64_t sub() const { return at[2]; }
  const Place& out() const { return reinterpret_cast<const Place&>(at[3]); }
  int64_t operands() const { return at[7]; }
  int64_t attributes() const { return at[8]; }
  const Place& operand(int64_t i) const { return reinterpret_cast<const Place&>(at[9 + 4 * i]); }
  int64_t attribute(int64_t i) const { return at[9 + 4 * operands() + i]; }
};

enum class Role : int64_t { kCarry, kStep, kContext };
enum class Kind : int64_t { kFloat, kBool, kInt };

struct InputEntry {
  Role role;
  Kind kind;
  int64_t width;
  int64_t time_major; // [steps, rows, width] instead of [rows, steps, width]
  Place place; // of a carry: where it persists
  int64_t tensor;
};

struct OutputEntry {
  Kind kind;
  int64_t width;
  int64_t tensor;
};

struct FinalEntry {
  Place place;
  int64_t tensor;
};

// A uniform used element by element: [rows, columns], each row padded, in the staging area.
struct VectorEntry {
  int64_t tensor, rows, columns, offset;
  Kind kind;
};

// A uniform used in products: `count` matrices of [k, n].
struct MatrixEntry {
  int64_t tensor, count, k, n, layout, packed; // packed: element where its panels start
};

// [rows, columns], each row padded, in every group's block of sums.
struct SumEntry {
  int64_t rows, columns, offset, tensor;
};

struct Header {
  int64_t version, inputs, outputs, finals, vectors, matrices, sums;
  int64_t chunk, loop, batch, persist; // elements per row
  int64_t scratch; // elements per row of room within one instruction
  int64_t uniforms, sum_elements, packed_elements;
  int64_t ahead, body, after; // instructions
  int64_t row_bytes; // what one row works on in a step, for choosing the height of a tile
};

constexpr int64_t kVersion = 2;

struct Program {
  const Header* header;
  const InputEntry* inputs;
  const OutputEntry* outputs;
  const FinalEntry* finals;
  const VectorEntry* vectors;
  const MatrixEntry* matrices;
  const SumEntry* sums;
  const int64_t* ahead;
  const int64_t* body;
  const int64_t* after;

  explicit Program(const int64_t* code) {
    auto take = [&](int64_t n, int64_t size) {
      const int64_t* start = code;
      code += n * size / int64_t(sizeof(int64_t));
      return start;
    };
    header = reinterpret_cast<const Header*>(take(1, sizeof(Header)));
    inputs = reinterpret_cast<const InputEntry*>(take(header->inputs, sizeof(InputEntry)));
    outputs = reinterpret_cast<const OutputEntry*>(take(header->outputs, sizeof(OutputEntry)));
    finals = reinterpret_cast<const FinalEntry*>(take(header->finals, sizeof(FinalEntry)));
    vectors = reinterpret_cast<const VectorEntry*>(take(header->vectors, sizeof(VectorEntry)));
    matrices = reinterpret_cast<const MatrixEntry*>(take(header->matrices, sizeof(MatrixEntry)));
    sums = reinterpret_cast<const SumEntry*>(take(header->sums, sizeof(SumEntry)));
    ahead = code;
    body = skip(ahead, header->ahead);
    after = skip(body, header->body);
  }

 private:
  static const int64_t* skip(const int64_t* at, int64_t instructions) {
    for (int64_t i = 0; i < instructions; ++i) {
      at += at[0];
    }
    return at;
  }
};

} // namespace fastwm
