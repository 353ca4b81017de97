// The linear operators a tape consists of.  Each describes, for one (node output, node input) pair, how the output's axes relate
// to the input's axes; blocks/ pulls strided blocks through them without knowing which PyTorch op they came from.
#pragma once
#include <cstdint>
#include <variant>
#include <vector>

#include "fused/expression.h"

namespace wengert::tape {

using Shape = std::vector<std::int64_t>;

struct AxisTerm {
  std::int32_t source;  // 0..rank(output)-1: that output axis; rank(output)+q: new loop q
  std::int64_t step;
};

// A coordinate along one axis: start + sum_t step_t * source_t [+ index(coordinates)].
struct AxisMap {
  std::int64_t start = 0;
  std::vector<AxisTerm> terms;
  std::int32_t index_slot = -1;     // an integer tensor (tape slot) whose element is added; negative entries count from the end
  std::vector<AxisMap> index_axes;  // where it is read: one affine coordinate per axis of the index tensor
};

// A saved tensor read over the output's axes and the new loops: one affine coordinate per axis of that tensor.
struct OperandRead {
  std::int32_t slot;
  std::vector<AxisMap> axes;
};

// A factor: leaf k of expr is operands[k].
struct Factor {
  fused::ExprId expr = fused::kOne;
  std::vector<OperandRead> operands;
};

// Gather form: y[o] = sum over new loops l of  factor(o, l) * x[axes(o, l)].
// Elementwise with broadcasting, expand, sum, mean, select, slice, unbind, permute, flip, diagonal, unfold, matrix products
// (the new loop is the contracted axis), index reads.
struct Gather {
  Shape in_shape;
  std::vector<std::int64_t> loops;  // extents of the new loops
  std::vector<AxisMap> axes;        // one per input axis
  Factor factor;
};

// Scatter form: y[offset + step * x coordinate] = x, zero elsewhere (cat, stack, pad, roll, backward of slice and select).
struct ScatterAxis {
  std::int32_t in_axis;  // the input axis that moves this output axis, or -1: the output axis is fixed at offset
  std::int64_t offset = 0;
  std::int64_t step = 1;  // nonzero, may be negative
};
struct Scatter {
  Shape in_shape;
  std::vector<ScatterAxis> axes;  // one per output axis; every input axis is named exactly once
};

// y[.., index(x coordinates), ..] += x[.., j, ..] along one axis; the other axes are equal on both sides (index_add, scatter_add,
// index_copy's source, ...).
struct IndexScatter {
  Shape in_shape;
  std::int32_t axis;
  std::int32_t index_slot;
  std::vector<std::int32_t> index_axes = {};  // the input axis behind each axis of the index; empty: one axis, `axis` itself
};

// y = x.reshape(shape of y), row-major on both sides.
struct Reshape {
  Shape in_shape;
};

using Step = std::variant<Gather, Scatter, IndexScatter, Reshape>;
using Term = std::vector<Step>;  // applied one after the other, from the output towards the input

// The node itself has to be called, but some axes are only carried along.
struct Local {
  std::vector<std::int32_t> tied;  // per output axis: the input axis it equals, or -1 where the node couples
};

enum class Kind : std::uint8_t {
  none,    // this input does not receive a gradient from this output, as PyTorch's None says
  zero,    // the gradient is zero
  terms,   // sum of the terms; an empty term is the identity
  local,   // linear; call the node, tied axes stay tied
  opaque,  // call the node with everything it has
};

struct Pullback {
  Kind kind = Kind::opaque;
  std::vector<Term> terms;
  Term after;  // applied to the sum of the terms, for formulas that subtract before they multiply
  Local local;
};

}  // namespace wengert::tape
