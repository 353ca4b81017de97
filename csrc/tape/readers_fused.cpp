// The node of wengert::fused: a loop nest whose factor is the symbolic derivative of its expression.
#include <stdexcept>

#include "ops/fused_autograd.h"
#include "ops/tether.h"
#include "tape/build.h"

namespace wengert::tape {

namespace {

using fused::ExprId;

// A node has a derivative for every output and operand. Written down one by one they are many times the node's own work; where
// one row alone arrives, with no structure to keep, calling the node computes their sum.
constexpr int kMostDerivatives = 32;

struct Nest {
  std::int64_t program;  // whose id tells it apart
  bool called;           // then nothing else is taken
  Integers extents;
  Slots operands;
};

Nest read_fused(Take& k, const ops::FusedBackward& n) {
  const fused::Program& program = *n.program_;
  k.program(n.program_);
  Nest nest{static_cast<std::int64_t>(program.id()),
            k.one_row() && std::ssize(program.outputs()) * program.operands() > kMostDerivatives,
            {},
            {}};
  if (nest.called) return nest;
  std::vector<at::Tensor> operands = k.unpack(n.operands_, false);
  for (int a = 0; a < program.rank(); ++a) {
    std::int64_t extent = 1;
    for (const at::Tensor& operand : operands) extent = operand.size(a) == 1 ? extent : operand.size(a);
    nest.extents.push_back(extent);
  }
  for (at::Tensor& operand : operands) nest.operands.push_back(k.derived(std::move(operand)));
  return nest;
}

Pullback describe_fused(const Site& s, const Nest& p) {
  const fused::Program& program = *s.node.program;
  if (!(*ops::effects(s.node.program))[s.output * program.operands() + s.input]) return none();
  if (p.called) return opaque();
  const fused::OutputSpec& output = program.outputs()[s.output];
  const int rank = program.rank();
  std::vector<std::int64_t> loops;
  Axes nest;  // coordinates of the nest by axes of the output and new loops
  for (int a = 0; a < rank; ++a) {
    const std::int64_t extent = p.extents[a];
    if ((output.reduced >> a & 1) != 0 && extent != 1) {
      nest.push_back(along(rank + static_cast<int>(loops.size())));
      loops.push_back(extent);
    } else {
      nest.push_back(along(a));
    }
  }
  const auto restricted = [&](at::IntArrayRef sizes) {
    Axes axes = nest;
    for (int a = 0; a < rank; ++a) {
      if (sizes[a] == 1) axes[a] = at_start(0);
    }
    return axes;
  };
  FactorBuilder f(s);
  std::vector<ExprId> leaves;
  for (const Slot operand : p.operands) leaves.push_back(f.read(operand, restricted(s.slot(operand).sizes())));
  try {
    const ExprId expr = s.pool.substitute(program.pool(), output.expr, leaves);
    return f.finish(s.pool.derivative(expr, s.input), std::move(loops), restricted(s.x()));
  } catch (const std::domain_error&) {
    return opaque();  // a primitive without the partial this needs
  }
}

// What PyTorch has in the place of the result decides about the history of what becomes of it.
struct Source {
  std::int64_t origin, result;
};
Source read_tether(Take&, const ops::TetherBackward& n) {
  const bool known = n.source.origin && n.source.origin->is_known();
  return {known ? n.source.origin->structure : -1, n.source.result};
}

// The result passes through to where it came from; the other edges receive zeros.
Pullback describe_tether(const Site& s, const Source&) { return s.input == 0 ? identity() : zero(); }

}  // namespace

void add_fused(Table& t) {
  t.add<ops::FusedBackward>("wengert::FusedBackward", Op::program, read_fused, describe_fused);
  t.add<ops::TetherBackward>("wengert::TetherBackward", Op::view, read_tether, describe_tether);
}

}  // namespace wengert::tape
