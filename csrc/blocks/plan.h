// A plan: the flat list of steps that computes a derivative, as plain data.  It holds no tensors, only slots, so one plan serves
// every call whose tape has the same signature.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "blocks/block.h"
#include "fused/program.h"

namespace wengert::blocks {

// What the device a plan is for has kernels for, beside plain matrix products, and how large one program may be there before its
// value is computed into memory.  The defaults are what fits the instruction cache and the register file of the interpreter.
struct Abilities {
  std::int64_t scaled_side = 0;  // products of matrices with sides up to this take a scale on the way; 0: none do
  std::size_t operands = 64;     // of a program
  int instructions = 384;
};

// A tensor the plan works on.  Slots 0..given-1 are given by the caller (saved tensors, then cotangents); the others are made by
// steps.
struct Slot {
  Shape shape;
  Shape strides = {};  // in memory, of a given tensor that is not contiguous; where a step's array lies is the plan's choice
  fused::Dtype dtype = fused::Dtype::f32;
  bool zero_filled = false;   // made by several writes into zeros, else by exactly one step that covers it
  bool requires_grad = true;  // integer slots never do
};

// Where one output of a program goes: axes[a] is the coordinate along axis a of the slot, over the loops of the nest.
struct Target {
  std::int32_t slot;
  std::vector<Affine> axes;
  bool accumulate = false;
};

// One fused loop nest.
struct Evaluate {
  Shape extents;
  std::vector<Read> operands;
  std::shared_ptr<const fused::Program> program;
  std::string text;
  std::vector<Target> targets;  // one per output of the program
};

// The nest with loop k in place place[k], but for its program, and the outputs of that program.
Evaluate with_loops_at(Evaluate nest, const std::vector<std::size_t>& place);
std::vector<fused::OutputSpec> with_loops_at(std::vector<fused::OutputSpec> outputs, const std::vector<std::size_t>& place);

// out[batch, m, n] = sum_k a * b, or sum_k a * scale * b; the four lists partition the loops that they move along.
struct Matmul {
  Shape extents;
  Read a, b;
  std::optional<Read> scale;  // moves along loops of batch and k only; the last of batch may be loops that b does not move along
  std::vector<std::size_t> batch, m, n, k;
  std::int32_t out;
};

// out = source.flatten()[index], or along an axis, with an index of one axis, source.index_select(axis, index)
struct Take {
  std::int32_t source, index, out;
  std::optional<std::size_t> axis;
};

// The structure of a PutAdd whose index lies along one axis only: every other axis of `out` is a loop of its own, from 0 in steps
// of 1.
struct IndexedAxis {
  std::size_t axis;
  Read index;  // the position along that axis
  std::vector<std::vector<std::size_t>>
      loops;  // per axis of `out`: its loop or none; for `axis`, the loops that move nothing else
};

// out.flatten()[index] += value over a loop nest; out is zero-filled.
struct PutAdd {
  Shape extents;
  Read value, index;
  std::int32_t out;
  std::optional<IndexedAxis> axis;
  bool distinct = false;  // no place is added to twice, whatever the index holds

  // Whole rows are put along the axis: there is no flat index.
  bool puts_rows() const { return index.slot < 0; }
};

struct Arange {
  std::int32_t out;
};

// Calls a backward node with cotangents that have `batch` leading axes; results get the same leading axes.
struct CallNode {
  std::int32_t node;                     // tape node
  std::size_t batch;                     // number of leading axes
  std::vector<std::int32_t> cotangents;  // slot per node output, -1 = undefined
  std::vector<std::int32_t> results;     // slot per next edge, -1 = not wanted
  std::vector<std::int32_t> zeros;       // outputs that nothing but structural zeros arrives at, left undefined
};

using Step = std::variant<Evaluate, Matmul, Take, PutAdd, Arange, CallNode>;

// The slots a step reads and writes.
struct Touched {
  std::vector<std::int32_t> read, written;
};
Touched touched(const Step& step);

struct Plan {
  std::vector<Slot> slots;
  std::size_t given = 0;
  std::vector<Step> steps;
  std::vector<std::vector<std::int32_t>> last_use;          // per step: slots that no later step or result needs
  std::vector<std::int32_t> results;                        // slot per requested result, -1 = not connected
  std::vector<std::pair<std::int32_t, std::size_t>> reads;  // (node, edge) along which called nodes were read as well, ascending
  bool none_is_zero = false;                                // where a called node gives no gradient; else the plan cannot be run
  std::vector<Shape> result_shapes;                         // a result may view its slot with more or fewer axes of extent 1
};

std::string to_string(const Plan& plan);

}  // namespace wengert::blocks
