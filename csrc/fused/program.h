// A program: several expressions over one loop nest, compiled to register bytecode, with a canonical printable text.
//
//   fused v1 rank=2 operands=2 compute=f32
//   t0 = mul a0 a1
//   t1 = where a0 t0 zero        (zero is the structural zero, numbers are literals)
//   out t1 f32
//   out t0 f64 sum=0,1           (summed over loop axes 0 and 1)
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "fused/expression.h"

namespace wengert::fused {

enum class Dtype : std::uint8_t { f32, f64, bf16, f16, i64, i32, i16, i8, u8, b8 };
inline constexpr int kDtypeCount = 10;
const char* name(Dtype dtype);
int size_in_bytes(Dtype dtype);

inline constexpr int kMaxRank = 32;

struct OutputSpec {
  ExprId expr;
  Dtype dtype;
  std::uint32_t reduced = 0;  // bit k: the output sums over loop axis k
};

struct ProgramSpec {
  int rank = 0;                // number of loops of the nest
  int operands = 0;            // operand i of the program is leaf i of the expressions
  Dtype compute = Dtype::f32;  // f32 or f64
  std::vector<OutputSpec> outputs;
};

// Registers hold a tile each.  The first are the operands the program reads, then its constants, then the slots temporaries
// share.
using Register = std::uint32_t;
struct Instruction {
  Prim prim;
  Register result;
  Register args[kMaxArity];
};
struct Bytecode {
  std::vector<std::int32_t> loads;  // register i holds operand loads[i]
  std::vector<double> constants;    // register loads.size() + i
  int slots = 0;                    // registers loads.size() + constants.size() + 0 .. slots - 1
  std::vector<Instruction> instructions;
  std::vector<Register> outputs;  // the register of each output after the last instruction
};

class Program {  // immutable
 public:
  Program(ExprPool pool, ProgramSpec spec);

  const ExprPool& pool() const { return pool_; }
  const ProgramSpec& spec() const { return spec_; }
  int rank() const { return spec_.rank; }
  int operands() const { return spec_.operands; }
  Dtype compute() const { return spec_.compute; }
  const std::vector<OutputSpec>& outputs() const { return spec_.outputs; }
  const Bytecode& bytecode() const { return bytecode_; }
  const std::string& text() const { return text_; }     // canonical
  std::uint64_t id() const { return id_; }              // of this object alone, as long as the process runs
  std::string text_with_leading_axes(int count) const;  // the same program over a nest with `count` more outer loops

 private:
  ExprPool pool_;
  ProgramSpec spec_;
  Bytecode bytecode_;
  std::string text_;
  std::uint64_t id_;
};

std::string to_text(const ExprPool& pool, const ProgramSpec& spec);
// Parses, checks and compiles; the same text gives the same object while it is cached.  Throws std::invalid_argument on bad text.
std::shared_ptr<const Program> intern(std::string_view text);

}  // namespace wengert::fused
