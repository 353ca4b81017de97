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

void read_fused(Take& k, const ops::FusedBackward& n) {
  const fused::Program& program = *n.program_;
  k.program(n.program_);
  k.integer(static_cast<std::int64_t>(program.id()));
  const bool called = k.one_row() && std::ssize(program.outputs()) * program.operands() > kMostDerivatives;
  k.integer(called);
  if (called) return;
  std::vector<at::Tensor> operands = k.unpack(n.operands_, false);
  for (int a = 0; a < program.rank(); ++a) {
    std::int64_t extent = 1;
    for (const at::Tensor& operand : operands) extent = operand.size(a) == 1 ? extent : operand.size(a);
    k.integer(extent);
  }
  for (at::Tensor& operand : operands) k.derived(std::move(operand));
}

Pullback describe_fused(const Site& s) {
  const fused::Program& program = *s.node.program;
  if (!(*ops::effects(s.node.program))[s.output * program.operands() + s.input]) return none();
  if (s.integer(1) != 0) return opaque();
  const fused::OutputSpec& output = program.outputs()[s.output];
  const int rank = program.rank();
  std::vector<std::int64_t> loops;
  Axes nest;  // coordinates of the nest by axes of the output and new loops
  for (int a = 0; a < rank; ++a) {
    const std::int64_t extent = s.integer(2 + a);
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
  for (int k = 0; k < program.operands(); ++k) leaves.push_back(f.read(k, restricted(s.slot(k).sizes())));
  try {
    const ExprId expr = s.pool.substitute(program.pool(), output.expr, leaves);
    return f.finish(s.pool.derivative(expr, s.input), std::move(loops), restricted(s.x()));
  } catch (const std::domain_error&) {
    return opaque();  // a primitive without the partial this needs
  }
}

// What PyTorch has in the place of the result decides about the history of what becomes of it.
void read_tether(Take& k, const ops::TetherBackward& n) {
  k.integer(n.source.origin ? n.source.origin->structure : -1);
  k.integer(n.source.result);
}

// The result passes through to where it came from; the other edges receive zeros.
Pullback describe_tether(const Site& s) { return s.input == 0 ? identity() : zero(); }

}  // namespace

void add_fused(Table& t) {
  t.add<ops::FusedBackward>("wengert::FusedBackward", read_fused, describe_fused);
  t.add<ops::TetherBackward>("wengert::TetherBackward", read_tether, describe_tether);
}

}  // namespace wengert::tape
