#include "blocks/builder.h"

#include <algorithm>
#include <iterator>

#include "blocks/join_nests.h"
#include "blocks/layout.h"

namespace wengert::blocks {

namespace {

// Below this many multiplications one fused loop nest beats a separate matrix product.
constexpr std::int64_t kMinMatmulWork = 8192;
// A sub-value is computed on its own if that saves this much of the joint nest, and the nest is not tiny.
constexpr std::int64_t kMinHoistedWork = 8192;
constexpr std::int64_t kMinHoistedRatio = 4;
// Sides of a scaled product where a block's threads load as much of their own matrices as half of the shared one: with 128
// threads, one a column, and fewer than 9 rows, 128 / n products of m rows against n rows of the shared one.
constexpr std::int64_t kRowsForShared = 256;

fused::Dtype compute_dtype(fused::Dtype dtype) {
  switch (dtype) {
    case fused::Dtype::f32:
    case fused::Dtype::bf16:
    case fused::Dtype::f16:
      return fused::Dtype::f32;
    case fused::Dtype::f64:
    case fused::Dtype::i64:
    case fused::Dtype::i32:
    case fused::Dtype::i16:
    case fused::Dtype::i8:
    case fused::Dtype::u8:
    case fused::Dtype::b8:
      return fused::Dtype::f64;  // integers below 2^53 are exact there
  }
  return fused::Dtype::f64;
}

Affine without_loops(const Affine& affine, const std::vector<std::size_t>& kept) {
  Affine out{.start = affine.start, .step = {}};
  out.step.reserve(kept.size());
  for (std::size_t k : kept) out.step.push_back(affine.step[k]);
  return out;
}

std::vector<Read> over_loops(const std::vector<Read>& reads, const std::vector<std::size_t>& kept) {
  std::vector<Read> out = reads;
  for (Read& read : out) {
    for (Affine& axis : read.axes) axis = without_loops(axis, kept);
  }
  return out;
}

// The slot's axes are the kept loops, in order.
Read direct_read(std::int32_t slot, std::size_t loops, const std::vector<std::size_t>& kept) {
  Read read{.slot = slot, .axes = {}};
  for (std::size_t k : kept) read.axes.push_back(loop_coord(loops, k).affine);
  return read;
}

common::Key key_of(const Value& value, const Shape& extents) {
  common::Key key;
  common::KeyPart whole(key, 2 + common::length_in_key(extents));
  whole.put(value.expr);
  whole.put(extents);
  whole.put(value.operands.size());
  for (const Read& read : value.operands) {
    common::KeyPart operand(key, 2);
    operand.put(read.slot);
    operand.put(read.axes.size());
    for (const Affine& affine : read.axes) {
      common::KeyPart axis(key, 1 + common::length_in_key(affine.step));
      axis.put(affine.start);
      axis.put(affine.step);
    }
  }
  return key;
}

}  // namespace

const char* name(Loss loss) {
  switch (loss) {
    case Loss::index_carry:
      return "index carry";
    case Loss::mask:
      return "mask";
    case Loss::unstack:
      return "un-stack";
    case Loss::join:
      return "index join";
    case Loss::larger_than_dense:
      return "larger than dense";
    case Loss::local:
      return "local node";
    case Loss::opaque:
      return "opaque node";
    case Loss::kCount:
      break;
  }
  return "";
}

Builder::Builder(std::vector<Slot> given, Abilities abilities) : abilities_(abilities) {
  plan_.given = given.size();
  plan_.slots = std::move(given);
  turnable_.resize(plan_.given);
}

std::int32_t Builder::new_slot(Shape shape, fused::Dtype dtype, bool requires_grad) {
  plan_.slots.push_back(Slot{.shape = std::move(shape), .dtype = dtype, .zero_filled = false, .requires_grad = requires_grad});
  turnable_.push_back(false);
  return static_cast<std::int32_t>(plan_.slots.size() - 1);
}

// ---------------------------------------------------------------- values

Value Builder::compact_operands(const Value& value, std::vector<Read>& operands) {
  std::vector<fused::ExprId> leaves(value.operands.size(), fused::kNone);
  bool same = true;  // every leaf is what it was
  for (std::int32_t used : pool_.operands(value.expr)) {
    const Read& read = value.operands[used];
    // Where two values come from the same one most operands are where they were.
    auto at = static_cast<std::size_t>(used) < operands.size() && operands[used] == read
                  ? operands.begin() + used
                  : std::find(operands.begin(), operands.end(), read);
    if (at == operands.end()) at = operands.insert(operands.end(), read);
    leaves[used] = pool_.operand(static_cast<std::int32_t>(at - operands.begin()));
    same = same && at - operands.begin() == used;
  }
  return Value{.expr = same ? value.expr : pool_.substitute(pool_, value.expr, leaves), .operands = {}};
}

void Builder::compact(Value& value) {
  std::vector<Read> operands;
  Value out = compact_operands(value, operands);
  out.operands = std::move(operands);
  value = std::move(out);
}

Value Builder::import(fused::ExprId expr, std::vector<Read> operands) {
  Value value{.expr = expr, .operands = std::move(operands)};
  compact(value);
  return value;
}

void Builder::multiply(Value& value, const Value& factor) {
  if (factor.expr == fused::kOne) return;
  value.expr = pool_.mul(value.expr, compact_operands(factor, value.operands).expr);
}

void Builder::hoist(Value& value, const Value& other, const Shape& extents, fused::Dtype dtype) {
  if (pool_.size(value.expr) == 0) return;
  std::int64_t own = 1, joint = 1;
  for (std::size_t k = 0; k < extents.size(); ++k) {
    const bool moves = value.moves(k);
    if (moves) own *= extents[k];
    if (moves || other.moves(k)) joint *= extents[k];
  }
  if (joint >= kMinHoistedWork && joint >= kMinHoistedRatio * own) value = force(value, extents, dtype);
}

void Builder::multiply(Value& value, Value factor, const Shape& extents, fused::Dtype dtype) {
  hoist(value, factor, extents, dtype);
  hoist(factor, value, extents, dtype);
  multiply(value, factor);
}

void Builder::add(Value& value, const Value& term) {
  value.expr = pool_.add(value.expr, compact_operands(term, value.operands).expr);
}

Value Builder::select(const Value& flag, const Value& value) {
  Value out{.expr = fused::kNone, .operands = {}};
  const fused::ExprId condition = compact_operands(flag, out.operands).expr;
  const fused::ExprId args[] = {condition, compact_operands(value, out.operands).expr, pool_.constant(0)};
  out.expr = pool_.apply(fused::Prim::where, args);
  return out;
}

bool Builder::is_large(const Value& value) {
  return value.operands.size() > abilities_.operands || pool_.size(value.expr) > abilities_.instructions;
}

Value Builder::force(const Value& value, const Shape& extents, fused::Dtype dtype, const std::vector<bool>& reduced) {
  std::int32_t leaf = 0;
  if (std::find(reduced.begin(), reduced.end(), true) == reduced.end()) {
    if (pool_.is_constant(value.expr)) return value;
    if (pool_.is_operand(value.expr, &leaf) && slot(value.operands[leaf].slot).dtype == dtype) return value;
  }
  return evaluate(value, extents, dtype, reduced);
}

Value Builder::evaluate(const Value& value, const Shape& extents, fused::Dtype dtype, const std::vector<bool>& reduced) {
  const bool reduces = !reduced.empty();
  const std::size_t n = extents.size();
  std::vector<std::size_t> moving, kept;
  double repeats = 1;  // reduced loops the value does not move along
  for (std::size_t k = 0; k < n; ++k) {
    const bool sums = reduces && reduced[k];
    if (value.moves(k)) {
      moving.push_back(k);
      if (!sums) kept.push_back(k);
    } else if (sums) {
      repeats *= static_cast<double>(extents[k]);
    }
  }
  Value scaled = value;
  if (repeats != 1) scaled.expr = pool_.mul(scaled.expr, pool_.constant(repeats));
  compact(scaled);
  if (compute_dtype(dtype) == dtype) {  // integer slots keep the loops' own order, which read() relies on
    sort_by_memory(scaled.operands, moving);
    kept.clear();
    std::ranges::copy_if(moving, std::back_inserter(kept), [&](std::size_t k) { return !reduces || !reduced[k]; });
  }

  Evaluate step;
  Shape out_shape;
  for (std::size_t k : moving) step.extents.push_back(extents[k]);
  for (std::size_t k : kept) out_shape.push_back(extents[k]);
  fused::ProgramSpec spec{.rank = static_cast<int>(moving.size()),
                          .operands = static_cast<int>(scaled.operands.size()),
                          .compute = compute_dtype(dtype),
                          .outputs = {}};
  fused::OutputSpec output{.expr = scaled.expr, .dtype = dtype, .reduced = 0};
  Target target{.slot = new_slot(out_shape, dtype,
                                 compute_dtype(dtype) == dtype || dtype == fused::Dtype::bf16 || dtype == fused::Dtype::f16),
                .axes = {}};
  for (std::size_t q = 0; q < moving.size(); ++q) {
    if (reduces && reduced[moving[q]]) {
      output.reduced |= 1u << q;
    } else {
      target.axes.push_back(loop_coord(moving.size(), q).affine);
    }
  }
  spec.outputs.push_back(output);
  step.operands = over_loops(scaled.operands, moving);
  step.text = fused::to_text(pool_, spec);
  step.program = fused::intern(step.text);
  Value out{.expr = pool_.operand(0), .operands = {direct_read(target.slot, n, kept)}};
  step.targets.push_back(std::move(target));
  emit(std::move(step));
  return out;
}

void Builder::sort_by_memory(std::span<const Read> operands, std::vector<std::size_t>& loops) const {
  blocks::sort_by_memory(plan_.slots, turnable_, operands, loops);
}

void Builder::force_together(std::span<Value* const> values, const Shape& extents, fused::Dtype dtype) {
  // Values that move along the same loops share one nest; the others are forced on their own.
  std::vector<Value*> group;
  std::vector<std::size_t> moving;
  for (Value* value : values) {
    std::vector<std::size_t> loops;
    for (std::size_t k = 0; k < extents.size(); ++k) {
      if (value->moves(k)) loops.push_back(k);
    }
    if (group.empty()) moving = loops;
    if (loops == moving && group.size() < 16) {
      group.push_back(value);
    } else {
      *value = force(*value, extents, dtype);
    }
  }
  if (group.size() == 1) {
    *group[0] = force(*group[0], extents, dtype);
    return;
  }
  std::vector<Read> operands;
  std::vector<fused::ExprId> exprs;
  int instructions = 0;
  for (Value* value : group) {
    exprs.push_back(compact_operands(*value, operands).expr);
    instructions += pool_.size(exprs.back());
  }
  if (operands.size() > 32 || instructions > 1024) {
    for (Value* value : group) *value = force(*value, extents, dtype);
    return;
  }
  sort_by_memory(operands, moving);
  Evaluate step;
  Shape shape;
  for (std::size_t k : moving) shape.push_back(extents[k]);
  step.extents = shape;
  fused::ProgramSpec spec{.rank = static_cast<int>(moving.size()),
                          .operands = static_cast<int>(operands.size()),
                          .compute = compute_dtype(dtype),
                          .outputs = {}};
  for (std::size_t g = 0; g < group.size(); ++g) {
    spec.outputs.push_back({.expr = exprs[g], .dtype = dtype, .reduced = 0});
    Target target{.slot = new_slot(shape, dtype), .axes = {}};
    for (std::size_t q = 0; q < moving.size(); ++q) target.axes.push_back(loop_coord(moving.size(), q).affine);
    *group[g] = Value{.expr = pool_.operand(0), .operands = {direct_read(target.slot, extents.size(), moving)}};
    step.targets.push_back(std::move(target));
  }
  step.operands = over_loops(operands, moving);
  step.text = fused::to_text(pool_, spec);
  step.program = fused::intern(step.text);
  emit(std::move(step));
}

Value Builder::take_still(Value& value, const std::vector<bool>& dead) {
  std::vector<bool> moves;
  for (const Read& read : value.operands) {
    bool any = false;
    for (std::size_t k = 0; k < dead.size(); ++k) any = any || (dead[k] && read.moves(k));
    moves.push_back(any);
  }
  const auto [moving, still] = pool_.split(value.expr, moves);
  if (still == fused::kOne) return Value{};
  Value out = import(still, value.operands);
  value = import(moving, std::move(value.operands));
  return out;
}

Value Builder::contract(Value value, Value factor, const Shape& extents, const std::vector<bool>& dead, fused::Dtype dtype) {
  // What stands still multiplies the sum: a softmax's p_i would else make a nest over pairs of sum_j v_j p_j.  But what a mask
  // keeps away from the sum may be infinite or nan, so that it stays before the sum too.
  if (pool_.masks(value.expr) || pool_.masks(factor.expr)) return sum(std::move(value), std::move(factor), extents, dead, dtype);
  Value still[] = {take_still(value, dead), take_still(factor, dead)};
  value = sum(std::move(value), std::move(factor), extents, dead, dtype);
  for (Value& part : still) multiply(value, std::move(part), extents, dtype);
  return value;
}

Value Builder::sum(Value value, Value factor, const Shape& extents, const std::vector<bool>& dead, fused::Dtype dtype) {
  // A dead loop along which only one of the two moves is summed there, so that the other stays lazy.
  const std::size_t n = extents.size();
  std::vector<bool> of_value(n), of_factor(n), of_both(n);
  bool any_value = false, any_factor = false, any_both = false;
  const bool masked = pool_.masks(factor.expr);
  double repeats = 1;
  for (std::size_t k = 0; k < n; ++k) {
    if (!dead[k]) continue;
    const bool f = factor.moves(k), v = value.moves(k) || (f && masked);
    if (v && f) of_both[k] = any_both = true;
    if (v && !f) of_value[k] = any_value = true;
    if (!v && f) of_factor[k] = any_factor = true;
    if (!v && !f) repeats *= static_cast<double>(extents[k]);
  }
  if (!any_both) {
    if (any_value) value = force(value, extents, dtype, of_value);
    if (any_factor) factor = force(factor, extents, dtype, of_factor);
    multiply(value, std::move(factor), extents, dtype);
  } else if (as_matmul(value, factor, extents, dead)) {
    if (any_value) value = force(value, extents, dtype, of_value);
    if (any_factor) factor = force(factor, extents, dtype, of_factor);
    value = matmul(std::move(value), std::move(factor), extents, of_both, dtype);
  } else {
    std::vector<bool> summed = of_both;
    for (std::size_t k = 0; k < n; ++k) summed[k] = of_both[k] || of_value[k] || of_factor[k];
    multiply(value, std::move(factor), extents, dtype);
    value = force(value, extents, dtype, summed);
  }
  if (repeats != 1) value.expr = pool_.mul(value.expr, pool_.constant(repeats));
  return value;
}

bool Builder::as_matmul(const Value& value, const Value& factor, const Shape& extents, const std::vector<bool>& dead) const {
  // A constant beside a mask is summed with it, and is no matrix.
  if (pool_.is_constant(value.expr) || pool_.is_constant(factor.expr)) return false;
  std::int64_t batch = 1, m = 1, n = 1, k = 1;
  for (std::size_t i = 0; i < extents.size(); ++i) {
    const bool v = value.moves(i), f = factor.moves(i);
    if (v && f) (dead[i] ? k : batch) *= extents[i];
    if (v && !f && !dead[i]) m *= extents[i];
    if (!v && f && !dead[i]) n *= extents[i];
  }
  if (batch * m * n * k < kMinMatmulWork) return false;
  return (m > 1 && n > 1) || batch == 1;
}

// Where the value is x * s with a read x, and a scaled product of small matrices pays: leaves x and returns s, whose loops become
// the product's batch.
std::optional<Read> Builder::take_scale(Value& value, const Value& other, bool left, const Shape& extents,
                                        const std::vector<bool>& dead, fused::Dtype dtype) {
  if (abilities_.scaled_side == 0 || (dtype != fused::Dtype::f32 && dtype != fused::Dtype::f64)) return std::nullopt;
  if (pool_.is_constant(value.expr) || pool_.is_operand(value.expr) || pool_.prim(value.expr) != fused::Prim::mul) {
    return std::nullopt;
  }
  auto pays = [&](const Value& kept, const Value& scale) {
    std::int64_t batch = 1, k = 1, own = 1, others = 1;
    bool shared = true;  // the other matrix, by all products
    for (std::size_t i = 0; i < extents.size(); ++i) {
      const bool s = scale.moves(i), o = other.moves(i), both = s || (kept.moves(i) && o);
      if (s && !o && !left) return false;  // the product's axes would change places
      if (both) (dead[i] ? k : batch) *= extents[i];
      if (!both && o) others *= extents[i];
      if (!both && !o && kept.moves(i)) own *= extents[i];
      shared = shared && (dead[i] || !both || !o);
    }
    // A thread block loads a shared matrix for few products only: not worth it for a wide one and few rows.
    return batch > 1 && std::max({own, others, k}) <= abilities_.scaled_side &&
           (!shared || kRowsForShared * own >= others * others);
  };
  for (const int scaling : {1, 0}) {
    Value kept = import(pool_.args(value.expr)[1 - scaling], value.operands);
    Value scale = import(pool_.args(value.expr)[scaling], value.operands);
    std::int32_t leaf = 0;
    if (!pool_.is_operand(kept.expr, &leaf) || slot(kept.operands[leaf].slot).dtype != dtype || pool_.is_constant(scale.expr) ||
        !pays(kept, scale)) {
      continue;
    }
    scale = force(scale, extents, dtype);
    pool_.is_operand(scale.expr, &leaf);
    value = std::move(kept);
    return scale.operands[leaf];
  }
  return std::nullopt;
}

Value Builder::matmul(Value value, Value factor, const Shape& extents, const std::vector<bool>& dead, fused::Dtype dtype) {
  Matmul step{.extents = extents, .a = {}, .b = {}, .scale = {}, .batch = {}, .m = {}, .n = {}, .k = {}, .out = -1};
  step.scale = take_scale(value, factor, true, extents, dead, dtype);
  if (!step.scale) step.scale = take_scale(factor, value, false, extents, dead, dtype);
  // force() leaves single reads alone; a constant cannot come here, since both sides move along a dead loop.
  value = force(value, extents, dtype);
  factor = force(factor, extents, dtype);
  std::int32_t v = 0, f = 0;
  pool_.is_operand(value.expr, &v);
  pool_.is_operand(factor.expr, &f);
  step.a = value.operands[v];
  step.b = factor.operands[f];
  for (std::size_t i = 0; i < extents.size(); ++i) {
    const bool in_a = step.a.moves(i), in_b = step.b.moves(i), both = (in_a && in_b) || (step.scale && step.scale->moves(i));
    if (both) (dead[i] ? step.k : step.batch).push_back(i);
    if (!both && in_a) step.m.push_back(i);
    if (!both && in_b) step.n.push_back(i);
  }
  sort_by_memory({&step.a, 1}, step.batch);
  std::stable_partition(step.batch.begin(), step.batch.end(), [&](std::size_t i) { return step.b.moves(i); });
  sort_by_memory({&step.a, 1}, step.m);
  sort_by_memory({&step.a, 1}, step.k);
  sort_by_memory({&step.b, 1}, step.n);
  std::vector<std::size_t> order = step.batch;
  order.insert(order.end(), step.m.begin(), step.m.end());
  order.insert(order.end(), step.n.begin(), step.n.end());
  Shape shape;
  for (std::size_t i : order) shape.push_back(extents[i]);
  step.out = new_slot(shape, dtype);
  turnable_[step.out] = !step.scale;
  Value out{.expr = pool_.operand(0), .operands = {direct_read(step.out, extents.size(), order)}};
  emit(std::move(step));
  return out;
}

// ---------------------------------------------------------------- integer tensors

Value Builder::iota(std::size_t loop, const Shape& extents) {
  auto [at, fresh] = iotas_.try_emplace(extents[loop], -1);
  if (fresh) {
    at->second = new_slot({extents[loop]}, fused::Dtype::i64, false);
    emit(Arange{.out = at->second});
  }
  return Value{.expr = pool_.operand(0), .operands = {direct_read(at->second, extents.size(), {loop})}};
}

Value Builder::coordinate_value(const Coord& coord, const Shape& extents) {
  Value value{.expr = fused::kZero, .operands = {}};
  auto add_multiple = [&](Value term, std::int64_t scale) {
    if (scale != 1) term.expr = pool_.mul(term.expr, pool_.constant(static_cast<double>(scale)));
    add(value, term);
  };
  for (std::size_t k = 0; k < extents.size(); ++k) {
    if (coord.affine.moves(k)) add_multiple(iota(k, extents), coord.affine.step[k]);
  }
  if (coord.has_index()) add_multiple(Value{.expr = pool_.operand(0), .operands = {coord.index}}, coord.index_scale);
  if (coord.affine.start != 0 || value.expr == fused::kZero) {
    value.expr = pool_.add(value.expr, pool_.constant(static_cast<double>(coord.affine.start)));
  }
  return value;
}

Coord Builder::index_coord(const Value& integers, const Shape& extents) {
  Coord coord = constant_coord(extents.size());
  double constant = 0;
  if (pool_.is_constant(integers.expr, &constant)) {
    coord.affine.start = static_cast<std::int64_t>(constant);
    return coord;
  }
  // Hash-consing: the same index computed on two paths is one slot, so that blocks meeting again have equal nests.
  Value value = integers;
  compact(value);
  auto [at, fresh] = evaluated_.try_emplace(key_of(value, extents), -1);
  if (fresh) {
    Value forced = force(value, extents, fused::Dtype::i64);
    std::int32_t leaf = 0;
    pool_.is_operand(forced.expr, &leaf);
    coord.index = forced.operands[leaf];
    coord.index_scale = 1;
    at->second = coord.index.slot;
    return coord;
  }
  std::int32_t leaf = 0;
  if (pool_.is_operand(value.expr, &leaf) && slot(value.operands[leaf].slot).dtype == fused::Dtype::i64) {
    coord.index = value.operands[leaf];
  } else {
    std::vector<std::size_t> moving;
    for (std::size_t k = 0; k < extents.size(); ++k) {
      if (value.moves(k)) moving.push_back(k);
    }
    coord.index = direct_read(at->second, extents.size(), moving);
  }
  coord.index_scale = 1;
  return coord;
}

void Builder::add_scaled(Coord& sum, const Coord& term, std::int64_t scale, const Shape& extents) {
  if (scale == 0) return;
  sum.affine.start += scale * term.affine.start;
  for (std::size_t k = 0; k < extents.size(); ++k) sum.affine.step[k] += scale * term.affine.step[k];
  if (!term.has_index()) return;
  if (!sum.has_index()) {
    sum.index = term.index;
    sum.index_scale = scale * term.index_scale;
  } else if (sum.index == term.index) {
    sum.index_scale += scale * term.index_scale;
  } else {
    Coord both = constant_coord(extents.size());
    both.index = sum.index;
    both.index_scale = sum.index_scale;
    Value value = coordinate_value(both, extents);
    both.index = term.index;
    both.index_scale = scale * term.index_scale;
    add(value, coordinate_value(both, extents));
    Coord joined = index_coord(value, extents);
    sum.index = joined.index;
    sum.index_scale = joined.index_scale;
  }
}

namespace {

struct IndexedLoop {
  std::size_t axis, loop;
};

// Where an index of one loop stands along one axis, and each of the others is run through by a loop of its own.
std::optional<IndexedLoop> indexed_loop(const std::vector<Coord>& coords, const Shape& shape, const Shape& extents) {
  std::optional<IndexedLoop> found;
  std::vector<bool> taken(extents.size(), false);
  for (std::size_t a = 0; a < coords.size(); ++a) {
    std::vector<std::size_t> loops;
    for (std::size_t k = 0; k < extents.size(); ++k) {
      if (coords[a].moves(k)) loops.push_back(k);
    }
    if (loops.size() > 1 || (loops.size() == 1 && taken[loops[0]])) return std::nullopt;
    if (coords[a].has_index()) {
      if (found || loops.empty()) return std::nullopt;
      found = {.axis = a, .loop = loops[0]};
    } else if (loops.empty() ? shape[a] != 1
                             : coords[a] != loop_coord(extents.size(), loops[0]) || extents[loops[0]] != shape[a]) {
      return std::nullopt;
    }
    if (!loops.empty()) taken[loops[0]] = true;
  }
  return shape.size() > 1 ? found : std::nullopt;
}

}  // namespace

Read Builder::read(std::int32_t source, const std::vector<Coord>& coords, const Shape& extents) {
  const std::size_t n = extents.size();
  if (std::none_of(coords.begin(), coords.end(), [](const Coord& coord) { return coord.has_index(); })) {
    Read read{.slot = source, .axes = {}};
    for (const Coord& coord : coords) read.axes.push_back(coord.affine);
    return read;
  }
  const Shape shape = slot(source).shape;
  if (const std::optional<IndexedLoop> one = indexed_loop(coords, shape, extents)) {
    const std::int32_t index = index_over(coords[one->axis], extents, {one->loop});
    Shape out_shape = shape;
    out_shape[one->axis] = extents[one->loop];
    Read read{.slot = take(source, index, one->axis, out_shape), .axes = {}};
    for (const Coord& coord : coords) read.axes.push_back(coord.affine);
    read.axes[one->axis] = loop_coord(n, one->loop).affine;
    return read;
  }
  Coord flat = constant_coord(n);
  std::int64_t stride = 1;
  for (std::size_t a = shape.size(); a-- > 0;) {
    add_scaled(flat, coords[a], stride, extents);
    stride *= shape[a];
  }
  std::vector<std::size_t> moving;
  Shape out_shape;
  for (std::size_t k = 0; k < n; ++k) {
    if (!flat.moves(k)) continue;
    moving.push_back(k);
    out_shape.push_back(extents[k]);
  }
  return direct_read(take(source, index_over(flat, extents, moving), std::nullopt, out_shape), n, moving);
}

// The coordinate's integers in a slot laid out exactly as the loops are.
std::int32_t Builder::index_over(const Coord& coord, const Shape& extents, const std::vector<std::size_t>& loops) {
  const Coord index = index_coord(coordinate_value(coord, extents), extents);  // never constant: it holds an index
  Shape shape;
  for (std::size_t k : loops) shape.push_back(extents[k]);
  const std::int32_t made = index.index.slot;
  if (index.index == direct_read(made, extents.size(), loops) && slot(made).shape == shape) return made;
  return evaluate({.expr = pool_.operand(0), .operands = {index.index}}, extents, fused::Dtype::i64, {}).operands[0].slot;
}

std::int32_t Builder::take(std::int32_t source, std::int32_t index, std::optional<std::size_t> axis, Shape shape) {
  auto [at, fresh] = taken_.try_emplace({source, index, axis}, -1);
  if (fresh) {
    at->second = new_slot(std::move(shape), slot(source).dtype, slot(source).requires_grad);
    emit(Take{.source = source, .index = index, .out = at->second, .axis = axis});
  }
  return at->second;
}

std::int32_t Builder::wrapped_index(std::int32_t source, std::int64_t size) {
  auto [at, fresh] = wrapped_.try_emplace({source, size}, -1);
  if (!fresh) return at->second;
  const Shape shape = slot(source).shape;
  std::vector<std::size_t> all(shape.size());
  for (std::size_t k = 0; k < all.size(); ++k) all[k] = k;
  const fused::ExprId raw = pool_.operand(0);
  const fused::ExprId negative[] = {raw, pool_.constant(0)};
  const fused::ExprId choice[] = {pool_.apply(fused::Prim::lt, negative),
                                  pool_.add(raw, pool_.constant(static_cast<double>(size))), raw};
  Value value{.expr = pool_.apply(fused::Prim::where, choice), .operands = {direct_read(source, shape.size(), all)}};
  Value forced = force(value, shape, fused::Dtype::i64);
  std::int32_t leaf = 0;
  pool_.is_operand(forced.expr, &leaf);
  return at->second = forced.operands[leaf].slot;
}

// ---------------------------------------------------------------- the plan

Plan Builder::finish(std::vector<std::int32_t> results, std::vector<Shape> result_shapes) && {
  plan_.results = std::move(results);
  plan_.result_shapes = std::move(result_shapes);
  join_nests(plan_, abilities_);
  orient(plan_);
  std::vector<std::int64_t> last(plan_.slots.size(), -1);
  for (std::size_t i = 0; i < plan_.steps.size(); ++i) {
    const Touched slots = touched(plan_.steps[i]);
    for (std::int32_t s : slots.read) last[s] = static_cast<std::int64_t>(i);
    for (std::int32_t s : slots.written) last[s] = static_cast<std::int64_t>(i);
  }
  for (std::int32_t s : plan_.results) {
    if (s >= 0) last[s] = -1;
  }
  plan_.last_use.assign(plan_.steps.size(), {});
  for (std::size_t s = plan_.given; s < last.size(); ++s) {
    if (last[s] >= 0) plan_.last_use[last[s]].push_back(static_cast<std::int32_t>(s));
  }
  return std::move(plan_);
}

}  // namespace wengert::blocks
