// Small builders that the families of readers share.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "tape/reader.h"

namespace wengert::tape {

using Axes = std::vector<AxisMap>;

Pullback opaque();
Pullback none();
Pullback zero();
Pullback identity();
Pullback terms(std::vector<Term> list);

AxisMap at_start(std::int64_t start);                                      // fixed coordinate
AxisMap along(int source, std::int64_t step = 1, std::int64_t start = 0);  // start + step * source
AxisMap looked_up(Slot slot, Axes index_axes);                             // an element of an integer tensor

Axes own_axes(int rank);                               // coordinate a = source a
Axes broadcast(const Shape& small, const Shape& big);  // right-aligned, axes of extent 1 stay at 0
Axes broadcast(at::IntArrayRef small, const Shape& big);

std::int64_t product(const Shape& shape);
int wrap_axis(std::int64_t axis, std::int64_t rank);  // rank 0 counts as 1, as in PyTorch

// Collects the saved tensors a factor reads.  A wanted tensor that the node did not save makes finish() answer opaque.
class FactorBuilder {
 public:
  explicit FactorBuilder(const Site& site) : site_(site) {}

  fused::ExprId read(Slot slot, Axes axes);
  fused::ExprId read(Slot slot) { return read(slot, site_.has(slot) ? broadcast(site_.slot(slot).sizes(), site_.y()) : Axes()); }
  // For arguments that a partial may do without.
  fused::ExprId read_if_saved(Slot slot) { return site_.has(slot) ? read(slot) : fused::kNone; }
  fused::ExprId constant(double value) { return value == 1 ? fused::kOne : site_.pool.constant(value); }
  fused::ExprId select(fused::ExprId condition, fused::ExprId yes, fused::ExprId no);
  fused::ExprId compare(fused::Prim prim, fused::ExprId a, fused::ExprId b);
  fused::ExprId apply(fused::Prim prim, fused::ExprId a) { return site_.pool.apply(prim, {&a, 1}); }

  bool complete() const { return complete_; }
  Factor factor(fused::ExprId expr);  // drops operands that simplification removed
  // Elementwise with broadcasting of the input.
  Pullback finish(fused::ExprId expr);
  // One gather with the given geometry.
  Pullback finish(fused::ExprId expr, std::vector<std::int64_t> loops, Axes axes);

 private:
  const Site& site_;
  std::vector<OperandRead> operands_;
  bool complete_ = true;
};

// The geometry of a reduction over some axes: the input's coordinates by output axes and new loops.
struct Reduction {
  std::vector<std::int64_t> loops;
  Axes axes;  // of the input, and of saved tensors shaped like it
  Axes kept;  // of saved tensors shaped like the input with the reduced axes of extent 1
};
Reduction reduction(const Shape& x, const std::vector<int>& reduced, bool keepdim);
std::vector<int> wrapped_axes(std::span<const std::int64_t> axes, std::int64_t rank);  // sorted, empty stays empty

// A node that carries some axes along.  `tied` pairs (output axis, input axis) are kept where the extents agree.
Pullback local(const Site& site, const std::vector<std::pair<int, int>>& tied);
// The first `count` axes, as far as both sides have them.
Pullback leading(const Site& site, int count);
// All but the last `y_core` axes of the output and the last `x_core` axes of the input are batch axes, aligned from the right.
Pullback local_batch(const Site& site, int y_core, int x_core);

// The same for a node that works element by element: every axis along which its input does not broadcast is carried along.
Pullback called_elementwise(const Site& site);

// Runs the node once on ones and takes what it gives for each needed edge, one slot an edge.  Where every input element moves
// at most one output element, this is the whole derivative, with PyTorch's own numerics; it stands for ops without a primitive.
Slots tabulate(Take& take, int edges, int output = 0);
// The same as the node answers where a graph is wanted, whether or not one is: some nodes take a shorter way without one, which
// gives up where the longer one does not.
Slots tabulate_fully(Take& take, int edges, int output = 0);
Slot table_of(const Site& site, const Slots& tables);       // of the site's edge
Pullback tabulated(const Site& site, const Slots& tables);  // elementwise: the table has the shape of the output

}  // namespace wengert::tape
