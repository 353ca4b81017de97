#include "fused/footprint.h"

namespace wengert::fused {

std::size_t footprint(const Program& program) {
  // A node of the pool with its place in the table of the pool, which is at most half full.
  constexpr std::size_t kNode = 32 + 4 * sizeof(ExprId);
  const Bytecode& code = program.bytecode();
  const std::size_t nodes = 2 + code.loads.size() + code.constants.size() + code.instructions.size();
  return sizeof(Program) + program.text().capacity() + nodes * kNode + program.outputs().capacity() * sizeof(OutputSpec) +
         code.loads.capacity() * sizeof(std::int32_t) + code.constants.capacity() * sizeof(double) +
         code.instructions.capacity() * sizeof(Instruction) + code.outputs.capacity() * sizeof(Register);
}

}  // namespace wengert::fused
