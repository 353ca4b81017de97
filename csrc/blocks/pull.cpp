#include "blocks/pull.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <utility>

namespace wengert::blocks {

namespace {

using tape::AxisMap;
using tape::Gather;
using tape::IndexScatter;
using tape::Reshape;
using tape::Scatter;

// Longest product of short loops that is un-stacked rather than masked when several loops move a scattered axis.
constexpr std::int64_t kMaxUnstack = 16;

std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  const std::int64_t q = a / b;
  return a % b != 0 && ((a < 0) != (b < 0)) ? q - 1 : q;
}

Coord compose(Builder& builder, const AxisMap& map, const std::vector<Coord>& out_axes, std::size_t first_new,
              const Shape& extents, std::int64_t size) {
  Coord coord = constant_coord(extents.size(), map.start);
  for (const tape::AxisTerm& term : map.terms) {
    if (static_cast<std::size_t>(term.source) < out_axes.size()) {
      builder.add_scaled(coord, out_axes[term.source], term.step, extents);
    } else {
      coord.affine.step[first_new + term.source - out_axes.size()] += term.step;
    }
  }
  if (map.index_slot >= 0) {
    std::vector<Coord> at;
    const std::int32_t index = builder.wrapped_index(map.index_slot, size);
    const Shape& index_shape = builder.slot(index).shape;
    for (std::size_t a = 0; a < map.index_axes.size(); ++a) {
      at.push_back(compose(builder, map.index_axes[a], out_axes, first_new, extents, index_shape[a]));
    }
    Coord element = constant_coord(extents.size());
    element.index = builder.read(index, at, extents);
    element.index_scale = 1;
    builder.add_scaled(coord, element, 1, extents);
  }
  return coord;
}

// Multiplies by the factor and sums every loop that moves no coordinate any more.
void multiply_and_sum(Builder& builder, Block& block, Value factor) {
  const std::size_t n = block.loops();
  std::vector<bool> dead(n);
  bool any = false;
  for (std::size_t k = 0; k < n; ++k) {
    dead[k] = !block.moves_row(k) && !block.moves_col(k);
    any = any || dead[k];
  }
  if (any) {
    block.value = builder.contract(std::move(block.value), std::move(factor), block.extents, dead, block.dtype);
    for (std::size_t k = n; k-- > 0;) {
      if (dead[k]) drop_loop(block, k);
    }
  } else {
    builder.multiply(block.value, std::move(factor), block.extents, block.dtype);
  }
  normalize(block);
}

void sum_dead_loops(Builder& builder, Block& block) { multiply_and_sum(builder, block, Value{}); }

// ---------------------------------------------------------------- gather form

Block gather(Builder& builder, Block block, const Gather& op) {
  const std::size_t first_new = block.loops();
  append_loops(block, op.loops);
  std::vector<Coord> col;
  for (std::size_t a = 0; a < op.axes.size(); ++a) {
    col.push_back(compose(builder, op.axes[a], block.col, first_new, block.extents, op.in_shape[a]));
  }
  std::vector<Read> operands;
  for (const tape::OperandRead& operand : op.factor.operands) {
    std::vector<Coord> at;
    const Shape shape = builder.slot(operand.slot).shape;
    for (std::size_t a = 0; a < operand.axes.size(); ++a) {
      at.push_back(compose(builder, operand.axes[a], block.col, first_new, block.extents, shape[a]));
    }
    operands.push_back(builder.read(operand.slot, at, block.extents));
  }
  Value factor = builder.import(op.factor.expr, std::move(operands));
  block.col = std::move(col);
  block.col_shape = op.in_shape;
  if (builder.is_large(block.value)) block.value = builder.force(block.value, block.extents, block.dtype);
  multiply_and_sum(builder, block, std::move(factor));
  return block;
}

// ---------------------------------------------------------------- scatter form

// Where the coordinate is not in {offset + step * x : 0 <= x < size} the value becomes 0 and x is clamped.
void mask_axis(Builder& builder, Block& block, std::size_t axis, std::int64_t offset, std::int64_t step, std::int64_t size) {
  builder.lose(Loss::mask);
  fused::ExprPool& pool = builder.pool();
  auto apply = [&pool](fused::Prim prim, fused::ExprId a, fused::ExprId b) {
    const fused::ExprId args[] = {a, b};
    return pool.apply(prim, args);
  };
  auto number = [&pool](std::int64_t value) { return pool.constant(static_cast<double>(value)); };
  const Value at = builder.coordinate_value(block.col[axis], block.extents);
  // x = (at - offset) / step, exact in double
  const fused::ExprId x = pool.div(pool.sub(at.expr, number(offset)), number(step));
  fused::ExprId inside =
      apply(fused::Prim::logical_and, apply(fused::Prim::ge, x, number(0)), apply(fused::Prim::lt, x, number(size)));
  if (std::abs(step) != 1) {
    const fused::ExprId whole[] = {x};
    inside = apply(fused::Prim::logical_and, inside, apply(fused::Prim::eq, x, pool.apply(fused::Prim::floor, whole)));
  }
  const fused::ExprId clamp[] = {inside, x, number(0)};
  Value index{.expr = pool.apply(fused::Prim::where, clamp), .operands = at.operands};
  // The mask is evaluated once in integers: block values may be float32, where large coordinates are not exact.
  const fused::ExprId flag[] = {inside, number(1), number(0)};
  const Coord mask = builder.index_coord({.expr = pool.apply(fused::Prim::where, flag), .operands = at.operands}, block.extents);
  block.value = builder.select(builder.coordinate_value(mask, block.extents), block.value);
  block.col[axis] = builder.index_coord(index, block.extents);
}

// Restricts the loops so that the column coordinate of `axis` is offset + step * x with 0 <= x < size, and makes it x.
void restrict_axis(Builder& builder, Block block, std::size_t axis, std::int64_t offset, std::int64_t step, std::int64_t size,
                   std::vector<Block>& out) {
  const Coord coord = block.col[axis];
  const Affine& at = coord.affine;
  if (coord.has_index()) {
    mask_axis(builder, block, axis, offset, step, size);
    out.push_back(std::move(block));
    return;
  }
  const std::int64_t low = std::min(offset, offset + step * (size - 1)), high = std::max(offset, offset + step * (size - 1));
  const std::int64_t lowest = at.lowest(block.extents), highest = at.highest(block.extents);
  if (size == 0 || highest < low || lowest > high) return;
  const bool divides = (at.start - offset) % step == 0 &&
                       std::all_of(at.step.begin(), at.step.end(), [step](std::int64_t s) { return s % step == 0; });
  if (divides && lowest >= low && highest <= high) {
    Affine& x = block.col[axis].affine;
    x.start = (x.start - offset) / step;
    for (std::int64_t& s : x.step) s /= step;
    out.push_back(std::move(block));
    return;
  }
  std::vector<std::size_t> movers;
  for (std::size_t k = 0; k < block.loops(); ++k) {
    if (at.moves(k)) movers.push_back(k);
  }
  if (movers.empty()) return;  // a fixed coordinate between the steps
  if (movers.size() == 1) {
    const std::size_t k = movers[0];
    const std::int64_t move = at.step[k], period = std::abs(step) / std::gcd(step, move);
    // first i >= bound with low <= start + move * i <= high and the right residue
    std::int64_t first = move > 0 ? floor_div(low - at.start + move - 1, move) : floor_div(high - at.start, move);
    if (move < 0 && at.start + move * first > high) ++first;
    first = std::max<std::int64_t>(first, 0);
    std::int64_t tries = 0;
    while (tries < period && (at.start + move * first - offset) % step != 0) ++first, ++tries;
    if (tries == period) return;
    const std::int64_t edge = move > 0 ? high : low;
    const std::int64_t last = std::min(block.extents[k] - 1, floor_div((edge - at.start) * (move > 0 ? 1 : -1), std::abs(move)));
    if (first > last) return;
    restrict_loop(block, k, first, period, (last - first) / period + 1);
    Affine& x = block.col[axis].affine;
    x.start = (x.start - offset) / step;
    for (std::int64_t& s : x.step) s /= step;
    normalize(block);
    out.push_back(std::move(block));
    return;
  }
  std::sort(movers.begin(), movers.end(), [&](std::size_t a, std::size_t b) { return block.extents[a] < block.extents[b]; });
  std::int64_t product = 1;
  for (std::size_t i = 0; i + 1 < movers.size(); ++i) product *= block.extents[movers[i]];
  if (product > kMaxUnstack) {
    mask_axis(builder, block, axis, offset, step, size);
    out.push_back(std::move(block));
    return;
  }
  builder.lose(Loss::unstack);
  for (std::int64_t i = 0; i < block.extents[movers[0]]; ++i) {
    Block slice = block;
    restrict_loop(slice, movers[0], i, 1, 1);
    drop_loop(slice, movers[0]);
    restrict_axis(builder, std::move(slice), axis, offset, step, size, out);
  }
}

std::vector<Block> scatter(Builder& builder, Block block, const Scatter& op) {
  std::vector<Block> current;
  current.push_back(std::move(block));
  for (std::size_t a = 0; a < op.axes.size(); ++a) {
    const tape::ScatterAxis& axis = op.axes[a];
    const std::int64_t size = axis.in_axis < 0 ? 1 : op.in_shape[axis.in_axis];
    std::vector<Block> next;
    for (Block& b : current) restrict_axis(builder, std::move(b), a, axis.offset, axis.step, size, next);
    current = std::move(next);
  }
  for (Block& b : current) {
    std::vector<Coord> col(op.in_shape.size());
    for (std::size_t a = 0; a < op.axes.size(); ++a) {
      if (op.axes[a].in_axis >= 0) col[op.axes[a].in_axis] = b.col[a];
    }
    b.col = std::move(col);
    b.col_shape = op.in_shape;
    sum_dead_loops(builder, b);  // masking a fixed axis may leave a loop that moves nothing any more
  }
  return current;
}

// ---------------------------------------------------------------- scatter along an index

// The loops that run through the positions of a column axis, each once, as digits do, the lowest first; none if there are others.
std::vector<std::size_t> digits_of(const Block& block, std::size_t axis) {
  const Coord& at = block.col[axis];
  std::vector<std::size_t> digits;
  for (std::size_t k = 0; k < block.loops(); ++k) {
    if (!at.moves(k)) continue;
    for (std::size_t a = 0; a < block.col.size(); ++a) {
      if (a != axis && block.col[a].moves(k)) return {};
    }
    digits.push_back(k);
  }
  const std::vector<std::int64_t>& step = at.affine.step;
  std::ranges::sort(digits, {}, [&](std::size_t k) { return step[k]; });
  std::int64_t count = 1;
  for (const std::size_t k : digits) {
    if (step[k] != count) return {};
    count *= block.extents[k];
  }
  if (at.has_index() || at.affine.start != 0 || count != block.col_shape[axis]) return {};
  return digits;
}

// A position's digits, as `digits_of` lists them.
std::vector<Coord> digits_at(Builder& builder, const Coord& position, const Block& block, const std::vector<std::size_t>& digits,
                             const Shape& extents) {
  if (digits.size() == 1) return {position};
  fused::ExprPool& pool = builder.pool();
  const Value at = builder.coordinate_value(position, extents);
  std::vector<Coord> found;
  fused::ExprId rest = at.expr;
  for (const std::size_t k : digits) {
    const fused::ExprId radix = pool.constant(static_cast<double>(block.extents[k]));
    const fused::ExprId ratio[] = {pool.div(rest, radix)};
    const fused::ExprId next = pool.apply(fused::Prim::floor, ratio);
    const fused::ExprId digit = k == digits.back() ? rest : pool.sub(rest, pool.mul(next, radix));
    found.push_back(builder.index_coord({.expr = digit, .operands = at.operands}, extents));
    rest = next;
  }
  return found;
}

Block index_scatter(Builder& builder, Block block, const IndexScatter& op) {
  const std::size_t axis = op.axis;
  const std::int32_t index = builder.wrapped_index(op.index_slot, block.col_shape[axis]);
  const std::int64_t count = op.in_shape[axis];
  const std::vector<std::size_t> digits = digits_of(block, axis);
  // The chosen position along the axis, given the input's coordinates.
  auto chosen = [&](std::vector<Coord> at_input, std::size_t loop, const Shape& extents) {
    at_input[axis] = loop_coord(extents.size(), loop);
    std::vector<Coord> coords;
    if (op.index_axes.empty()) coords.push_back(at_input[axis]);
    for (std::int32_t a : op.index_axes) coords.push_back(at_input[a]);
    Coord coord = constant_coord(extents.size());
    coord.index = builder.read(index, coords, extents);
    coord.index_scale = 1;
    return coord;
  };
  if (!digits.empty()) {
    // The loops over the axis become a loop over the index: everything that moved along them is now read through the index.
    const std::size_t k = digits.front();
    block.value = builder.force(block.value, block.extents, block.dtype);
    Shape extents = block.extents;
    for (const std::size_t d : digits) extents[d] = d == k ? count : 1;
    const std::vector<Coord> through = digits_at(builder, chosen(block.col, k, extents), block, digits, extents);
    auto substitute = [&](const Affine& affine) {
      Coord coord{.affine = affine, .index_scale = 0, .index = {}};
      for (std::size_t d = 0; d < digits.size(); ++d) {
        const std::int64_t step = std::exchange(coord.affine.step[digits[d]], 0);
        builder.add_scaled(coord, through[d], step, extents);
      }
      return coord;
    };
    auto substitute_read = [&](const Read& read) {
      std::vector<Coord> coords;
      for (const Affine& affine : read.axes) coords.push_back(substitute(affine));
      return builder.read(read.slot, coords, extents);
    };
    auto substitute_coord = [&](const Coord& old) {
      Coord coord = substitute(old.affine);
      if (old.has_index()) {
        Coord part = constant_coord(extents.size());
        part.index = substitute_read(old.index);
        part.index_scale = old.index_scale;
        builder.add_scaled(coord, part, 1, extents);
      }
      return coord;
    };
    for (Coord& coord : block.row) coord = substitute_coord(coord);
    for (std::size_t a = 0; a < block.col.size(); ++a) {
      block.col[a] = a == axis ? loop_coord(extents.size(), k) : substitute_coord(block.col[a]);
    }
    for (Read& operand : block.value.operands) operand = substitute_read(operand);
    block.extents = std::move(extents);
    for (std::size_t d = block.loops(); d-- > 0;) {
      if (d != k && std::ranges::find(digits, d) != digits.end()) drop_loop(block, d);
    }
  } else {
    // Two indexed or partly covered axes meet: compare every pair.
    builder.lose(Loss::join);
    append_loops(block, {count});
    const std::size_t k = block.loops() - 1;
    fused::ExprPool& pool = builder.pool();
    Value difference = builder.coordinate_value(block.col[axis], block.extents);
    Value target = builder.coordinate_value(chosen(block.col, k, block.extents), block.extents);
    target.expr = pool.neg(target.expr);
    builder.add(difference, target);
    const fused::ExprId zero = pool.constant(0);
    const fused::ExprId compare[] = {difference.expr, zero};
    const fused::ExprId flag[] = {pool.apply(fused::Prim::eq, compare), fused::kOne, zero};
    const Coord mask =
        builder.index_coord({.expr = pool.apply(fused::Prim::where, flag), .operands = difference.operands}, block.extents);
    block.value = builder.select(builder.coordinate_value(mask, block.extents), block.value);
    block.col[axis] = loop_coord(block.loops(), k);
  }
  block.col_shape = op.in_shape;
  sum_dead_loops(builder, block);
  return block;
}

// ---------------------------------------------------------------- reshape

// Replaces column axis `a` of size n by two axes of sizes (n / inner, inner).
void split_axis(Builder& builder, Block& block, std::size_t a, std::int64_t inner) {
  const std::int64_t size = block.col_shape[a];
  auto replace = [&](Coord quotient, Coord remainder) {
    block.col[a] = std::move(quotient);
    block.col.insert(block.col.begin() + a + 1, std::move(remainder));
    block.col_shape[a] = size / inner;
    block.col_shape.insert(block.col_shape.begin() + a + 1, inner);
  };
  if (inner == 1) return replace(block.col[a], constant_coord(block.loops()));
  if (inner == size) return replace(constant_coord(block.loops()), block.col[a]);
  if (!block.col[a].has_index()) {
    Block digits = block;
    for (std::size_t k = 0; k < digits.loops(); ++k) {  // split loops that straddle the boundary
      const std::int64_t step = std::abs(digits.col[a].affine.step[k]), extent = digits.extents[k];
      if (step == 0 || step % inner == 0 || inner % step != 0 || step * extent <= inner || extent % (inner / step) != 0) continue;
      split_loop(digits, k, inner / step);
      ++k;
    }
    const Affine& at = digits.col[a].affine;
    Coord quotient = constant_coord(digits.loops(), floor_div(at.start, inner));
    Coord remainder = constant_coord(digits.loops(), at.start - inner * quotient.affine.start);
    for (std::size_t k = 0; k < digits.loops(); ++k) {
      const std::int64_t q = at.step[k] / inner;  // towards zero: a step keeps its sign in both digits
      quotient.affine.step[k] = q;
      remainder.affine.step[k] = at.step[k] - q * inner;
    }
    if (remainder.affine.lowest(digits.extents) >= 0 && remainder.affine.highest(digits.extents) < inner) {
      block = std::move(digits);
      return replace(std::move(quotient), std::move(remainder));
    }
  }
  builder.lose(Loss::index_carry);
  fused::ExprPool& pool = builder.pool();
  const Value at = builder.coordinate_value(block.col[a], block.extents);
  const fused::ExprId width = pool.constant(static_cast<double>(inner));
  const fused::ExprId ratio[] = {pool.div(at.expr, width)};
  const fused::ExprId quotient = pool.apply(fused::Prim::floor, ratio);
  const fused::ExprId remainder = pool.sub(at.expr, pool.mul(quotient, width));
  Coord q = builder.index_coord({.expr = quotient, .operands = at.operands}, block.extents);
  Coord r = builder.index_coord({.expr = remainder, .operands = at.operands}, block.extents);
  replace(std::move(q), std::move(r));
}

Block reshape(Builder& builder, Block block, const Reshape& op) {
  const Shape from = block.col_shape, &to = op.in_shape;
  // Groups of consecutive axes with equal products reshape independently.
  struct Group {
    std::vector<std::size_t> from, to;
  };
  std::vector<Group> groups;
  for (std::size_t i = 0, j = 0; i < from.size() || j < to.size();) {
    Group group;
    std::int64_t p = 1, q = 1;
    if (i < from.size()) p *= from[i], group.from.push_back(i++);
    if (j < to.size()) q *= to[j], group.to.push_back(j++);
    while (p != q) {
      if (p < q) {
        p *= from[i], group.from.push_back(i++);
      } else {
        q *= to[j], group.to.push_back(j++);
      }
    }
    groups.push_back(std::move(group));
  }
  std::vector<Coord> flat;
  Shape flat_shape;
  for (const Group& group : groups) {
    Coord coord = constant_coord(block.loops());
    std::int64_t stride = 1;
    for (std::size_t g = group.from.size(); g-- > 0;) {
      builder.add_scaled(coord, block.col[group.from[g]], stride, block.extents);
      stride *= from[group.from[g]];
    }
    flat.push_back(std::move(coord));
    flat_shape.push_back(stride);
  }
  block.col = std::move(flat);
  block.col_shape = std::move(flat_shape);
  std::size_t at = 0;
  for (const Group& group : groups) {
    if (group.to.empty()) {  // only axes of size one
      block.col.erase(block.col.begin() + at);
      block.col_shape.erase(block.col_shape.begin() + at);
      continue;
    }
    for (std::size_t g = 0; g + 1 < group.to.size(); ++g) {
      std::int64_t inner = 1;
      for (std::size_t h = g + 1; h < group.to.size(); ++h) inner *= to[group.to[h]];
      split_axis(builder, block, at++, inner);
    }
    ++at;
  }
  normalize(block);
  return block;
}

}  // namespace

std::vector<Block> pull(Builder& builder, Block block, const tape::Term& term) {
  std::vector<Block> current;
  if (!block.empty()) current.push_back(std::move(block));
  for (const tape::Step& step : term) {
    std::vector<Block> next;
    for (Block& b : current) {
      if (const auto* op = std::get_if<Gather>(&step)) {
        next.push_back(gather(builder, std::move(b), *op));
      } else if (const auto* op = std::get_if<Scatter>(&step)) {
        for (Block& piece : scatter(builder, std::move(b), *op)) next.push_back(std::move(piece));
      } else if (const auto* op = std::get_if<IndexScatter>(&step)) {
        next.push_back(index_scatter(builder, std::move(b), *op));
      } else {
        next.push_back(reshape(builder, std::move(b), std::get<Reshape>(step)));
      }
    }
    current.clear();
    for (Block& b : next) {
      if (!b.empty() && b.value.expr != fused::kZero) current.push_back(std::move(b));
    }
  }
  return current;
}

}  // namespace wengert::blocks
