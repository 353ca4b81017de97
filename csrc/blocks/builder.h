// Builds a plan: owns the expressions and the slots, forces lazy values into slots, and counts where structure is lost.
#pragma once
#include <array>
#include <map>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "blocks/plan.h"
#include "common/key.h"
#include "tape/operators.h"

namespace wengert::blocks {

// Where a block may lose structure.  Every loss is counted, so that explain can print it and ratchet tests can hold it.
enum class Loss : std::uint8_t { index_carry, mask, unstack, join, larger_than_dense, local, opaque, kCount };
const char* name(Loss loss);

// A block's value together with where it is written: coords[a] is the coordinate along axis a of the array being assembled.
struct Part {
  Shape extents;
  Value value;
  std::vector<Coord> coords;
};

class Builder {
 public:
  explicit Builder(std::vector<Slot> given, Abilities abilities = {});

  fused::ExprPool& pool() { return pool_; }
  const Slot& slot(std::int32_t s) const { return plan_.slots[s]; }
  void lose(Loss loss) { ++losses_[static_cast<std::size_t>(loss)]; }
  const std::array<std::int64_t, static_cast<std::size_t>(Loss::kCount)>& losses() const { return losses_; }

  // ---- values
  void multiply(Value& value, const Value& factor);
  // The same over a nest, forcing first what would otherwise be computed again along loops that only the other one moves along.
  void multiply(Value& value, Value factor, const Shape& extents, fused::Dtype dtype);
  void add(Value& value, const Value& term);
  // The value of an expression whose leaf k is operands[k].
  Value import(fused::ExprId expr, std::vector<Read> operands);
  // Drops operands the expression no longer uses and merges equal ones.
  void compact(Value& value);
  // where(flag, value, 0): unlike a product, exact where value is not finite.
  Value select(const Value& flag, const Value& value);
  bool is_large(const Value& value);  // beyond what one program should be

  // Evaluates into a new slot that has one axis per loop the value moves along, except `reduced` loops, which are summed.
  // Constants stay constants.  Returns the value as a read of that slot.
  Value force(const Value& value, const Shape& extents, fused::Dtype dtype, const std::vector<bool>& reduced = {});
  // The same without the short cuts: the returned slot has exactly the moving loops as axes.
  Value evaluate(const Value& value, const Shape& extents, fused::Dtype dtype, const std::vector<bool>& reduced);
  // Forces several values over equal nests in one program.
  void force_together(std::span<Value* const> values, const Shape& extents, fused::Dtype dtype);
  // sum over `dead` loops of value * factor; loops keep their numbers, the result does not move along dead ones.
  Value contract(Value value, Value factor, const Shape& extents, const std::vector<bool>& dead, fused::Dtype dtype);

  // ---- integer tensors
  // The coordinate as a lazy integer value.
  Value coordinate_value(const Coord& coord, const Shape& extents);
  // The element of `slot` at the given coordinates; gathers first where they hold indices.
  Read read(std::int32_t slot, const std::vector<Coord>& coords, const Shape& extents);
  // The integer slot with negative entries counted from `size`.
  std::int32_t wrapped_index(std::int32_t slot, std::int64_t size);
  Coord index_coord(const Value& integers, const Shape& extents);  // forces
  void add_scaled(Coord& sum, const Coord& term, std::int64_t scale, const Shape& extents);

  // ---- arrays
  // Sums the parts into a new slot of the given shape.
  std::int32_t assemble(const Shape& shape, fused::Dtype dtype, std::vector<Part> parts);
  // The slot made by an earlier step that already is this array, up to axes of extent 1, or -1.
  std::int32_t as_whole_slot(const Part& part, const Shape& shape, fused::Dtype dtype) const;

  // ---- nodes
  std::int32_t new_slot(Shape shape, fused::Dtype dtype, bool requires_grad = true);
  void emit(Step step) { plan_.steps.push_back(std::move(step)); }
  Plan finish(std::vector<std::int32_t> results, std::vector<Shape> result_shapes) &&;

 private:
  // Leaves what moves along a dead loop, or along none, and returns the factors that stand still along all of them.
  Value take_still(Value& value, const std::vector<bool>& dead);
  Value sum(Value value, Value factor, const Shape& extents, const std::vector<bool>& dead, fused::Dtype dtype);
  Value iota(std::size_t loop, const Shape& extents);
  void sort_by_memory(std::span<const Read> operands, std::vector<std::size_t>& loops) const;
  void hoist(Value& value, const Value& other, const Shape& extents, fused::Dtype dtype);
  bool as_matmul(const Value& value, const Value& factor, const Shape& extents, const std::vector<bool>& dead) const;
  std::optional<Read> take_scale(Value& value, const Value& other, bool left, const Shape& extents, const std::vector<bool>& dead,
                                 fused::Dtype dtype);
  Value matmul(Value value, Value factor, const Shape& extents, const std::vector<bool>& dead, fused::Dtype dtype);
  void write(std::int32_t target, fused::Dtype dtype, std::span<const Part* const> parts, bool accumulate);
  void put_add(std::int32_t target, fused::Dtype dtype, const Part& part);
  Read flat_index(const Part& part, const Shape& shape);
  std::optional<IndexedAxis> indexed_axis(const Part& part, const Shape& shape);
  Value compact_operands(const Value& value, std::vector<Read>& operands);

  std::int32_t index_over(const Coord& coord, const Shape& extents, const std::vector<std::size_t>& loops);
  std::int32_t take(std::int32_t source, std::int32_t index, std::optional<std::size_t> axis, Shape shape);

  fused::ExprPool pool_;
  Abilities abilities_;
  Plan plan_;
  std::vector<bool> turnable_;  // per slot: a product, which may yet lie another way
  std::array<std::int64_t, static_cast<std::size_t>(Loss::kCount)> losses_{};
  std::map<std::int64_t, std::int32_t> iotas_;                             // extent -> slot
  std::map<std::pair<std::int32_t, std::int64_t>, std::int32_t> wrapped_;  // (slot, size) -> slot
  std::map<common::Key, std::int32_t> evaluated_;                          // integer value over a nest -> slot
  std::map<std::tuple<std::int32_t, std::int32_t, std::optional<std::size_t>>, std::int32_t>
      taken_;  // (source, index, axis) -> slot
};

}  // namespace wengert::blocks
