// Strided blocks: pieces of a Jacobian as loop nests
//
//     for i in extents:   J[row(i), col(i)] += value(i)
//
// with every coordinate affine in the loops, optionally plus one element of an integer tensor, and `value` a lazy expression of
// strided reads.  Loops that move both sides are tied (diagonal, batch) and never expanded.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "fused/program.h"

namespace wengert::blocks {

using Shape = std::vector<std::int64_t>;

std::int64_t numel(const Shape& shape);

// start + sum_k step[k] * i_k
struct Affine {
  std::int64_t start = 0;
  std::vector<std::int64_t> step;  // one per loop

  bool moves(std::size_t k) const { return step[k] != 0; }
  bool is_constant() const;
  std::int64_t lowest(const Shape& extents) const;
  std::int64_t highest(const Shape& extents) const;
  bool operator==(const Affine&) const = default;
};

// The element of a plan slot at one affine coordinate per axis of that slot.
struct Read {
  std::int32_t slot = -1;
  std::vector<Affine> axes;

  bool moves(std::size_t k) const;
  bool operator==(const Read&) const = default;
};

// A coordinate along one axis of the row or column tensor.  index_scale = 0: purely affine.
struct Coord {
  Affine affine;
  std::int64_t index_scale = 0;
  Read index;

  bool has_index() const { return index_scale != 0; }
  bool moves(std::size_t k) const { return affine.moves(k) || (has_index() && index.moves(k)); }
  bool operator==(const Coord&) const = default;
};

Coord constant_coord(std::size_t loops, std::int64_t start = 0);
Coord loop_coord(std::size_t loops, std::size_t loop, std::int64_t step = 1);

// Per loop: whether the coordinates along the axes chosen by `use` provably determine it.
std::vector<bool> determined_loops(const Shape& extents, const std::vector<Coord>& coords, const std::vector<bool>& use);

// A lazy value over the loops: leaf k of `expr` is operands[k].
struct Value {
  fused::ExprId expr = fused::kOne;
  std::vector<Read> operands;

  bool moves(std::size_t k) const;
  bool operator==(const Value&) const = default;
};

struct Block {
  Shape extents;
  Value value;
  std::vector<Coord> row, col;  // one per axis of the row tensor and of the column tensor
  Shape row_shape, col_shape;
  fused::Dtype dtype = fused::Dtype::f32;  // of the column tensor, hence of the value

  std::size_t loops() const { return extents.size(); }
  bool moves_row(std::size_t k) const;
  bool moves_col(std::size_t k) const;
  bool empty() const;            // some extent is zero
  std::int64_t logical() const;  // number of (row, col) pairs the nest visits
  std::int64_t stored() const;   // number of distinct values
};

// Applies f(Affine&) to every coordinate and read of the block.
template <class F>
void for_each_affine(Block& block, F&& f) {
  auto each_read = [&](Read& read) {
    for (Affine& axis : read.axes) f(axis);
  };
  for (auto* side : {&block.row, &block.col}) {
    for (Coord& coord : *side) {
      f(coord.affine);
      if (coord.has_index()) each_read(coord.index);
    }
  }
  for (Read& operand : block.value.operands) each_read(operand);
}

Block identity(const Shape& shape, fused::Dtype dtype);

// Loop surgery.  All of it is exact: the nest visits the same pairs (restrict: the chosen sub-range) with the same values.
void append_loops(Block& block, const Shape& extents);
void drop_loop(Block& block, std::size_t k);                       // keeps i_k = 0
void split_loop(Block& block, std::size_t k, std::int64_t inner);  // i_k = i_k' * inner + i_{k+1}'
void restrict_loop(Block& block, std::size_t k, std::int64_t first, std::int64_t stride, std::int64_t count);
void permute_loops(Block& block, const std::vector<std::size_t>& order);

// Normal form: no loop of extent 1, first motion of every loop positive, loops sorted by (extent, motions).
void normalize(Block& block);
bool same_nest(const Block& a, const Block& b);  // of normalised blocks
std::size_t nest_hash(const Block& block);       // equal for blocks with the same nest

Block transposed(Block block);
std::string to_string(const Block& block);

}  // namespace wengert::blocks
