// A program: several expressions over one loop nest, compiled to register bytecode, with a canonical printable text.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "fused/expression.h"

namespace wengert::fused {

enum class Dtype : std::uint8_t { f32, f64, bf16, f16, i64, i32, i16, i8, u8, b8 };

struct OutputSpec {
  ExprId expr;
  Dtype dtype;
  std::uint32_t reduced = 0;  // bit k: the output sums over loop axis k
};

struct ProgramSpec {
  int rank = 0;       // number of loops of the nest
  int operands = 0;   // operand i of the program is leaf i of the expressions
  Dtype compute = Dtype::f32;  // f32 or f64
  std::vector<OutputSpec> outputs;
};

class Program;  // immutable

std::string to_text(const ExprPool& pool, const ProgramSpec& spec);
// Parses, checks and compiles; the same text gives the same object while it is cached.  Throws std::invalid_argument on bad text.
std::shared_ptr<const Program> intern(std::string_view text);

}  // namespace wengert::fused
