// Assembling an array from parts: which cells a part touches, which parts may be written together, and the steps that do it.
#include <algorithm>
#include <cstdlib>
#include <limits>

#include "blocks/builder.h"

namespace wengert::blocks {

namespace {

// Longest loop that is unrolled into separate writes when a part visits cells more than once.
constexpr std::int64_t kMaxUnroll = 64;
constexpr std::size_t kMaxCompared = 256;
constexpr std::size_t kMaxGroup = 16;
constexpr std::size_t kMaxGroupOperands = 32;
constexpr int kMaxGroupInstructions = 1024;

bool has_index(const Part& part) {
  return std::any_of(part.coords.begin(), part.coords.end(), [](const Coord& coord) { return coord.has_index(); });
}

// True if different loop indices provably give different coordinates, looking at the axes chosen by `use`.
bool injective(const Part& part, const std::vector<bool>& use) {
  return std::ranges::all_of(determined_loops(part.extents, part.coords, use), [](bool known) { return known; });
}

bool injective(const Part& part) { return injective(part, std::vector<bool>(part.coords.size(), true)); }

// True if the two parts provably touch no common cell.
bool disjoint(const Part& p, const Part& q) {
  for (std::size_t a = 0; a < p.coords.size(); ++a) {
    if (p.coords[a].has_index() || q.coords[a].has_index()) continue;
    const Affine &x = p.coords[a].affine, &y = q.coords[a].affine;
    if (x.highest(p.extents) < y.lowest(q.extents) || y.highest(q.extents) < x.lowest(p.extents)) return true;
  }
  // Equal motions: where the axes with equal starts determine the loops, a common cell would need equal indices, and then the
  // other axes differ.
  bool differs = false;
  for (std::size_t a = 0; a < p.coords.size(); ++a) {
    if (p.coords[a].has_index() || q.coords[a].has_index()) return false;
    if (p.coords[a].affine.step != q.coords[a].affine.step) return false;
    differs = differs || p.coords[a].affine.start != q.coords[a].affine.start;
  }
  if (!differs) return false;
  Part hull = p;
  for (std::size_t k = 0; k < hull.extents.size(); ++k) hull.extents[k] = std::max(p.extents[k], q.extents[k]);
  std::vector<bool> equal(p.coords.size());
  for (std::size_t a = 0; a < equal.size(); ++a) equal[a] = p.coords[a].affine.start == q.coords[a].affine.start;
  return injective(hull, equal);
}

template <class F>
void each_affine(Part& part, F f) {
  for (Coord& coord : part.coords) {
    f(coord.affine);
    if (!coord.has_index()) continue;
    for (Affine& axis : coord.index.axes) f(axis);
  }
  for (Read& read : part.value.operands) {
    for (Affine& axis : read.axes) f(axis);
  }
}

void drop_unit_loops(Part& part) {
  for (std::size_t k = part.extents.size(); k-- > 0;) {
    if (part.extents[k] != 1) continue;
    part.extents.erase(part.extents.begin() + k);
    each_affine(part, [k](Affine& affine) { affine.step.erase(affine.step.begin() + k); });
  }
}

// Loops in the order of the array's axes, so that what is computed over them lies as the array does.
void order_loops(Part& part) {
  std::vector<std::size_t> order;
  for (const Coord& coord : part.coords) {
    for (std::size_t k = 0; k < part.extents.size(); ++k) {
      if (coord.affine.moves(k) && std::ranges::find(order, k) == order.end()) order.push_back(k);
    }
  }
  for (std::size_t k = 0; k < part.extents.size(); ++k) {
    if (std::ranges::find(order, k) == order.end()) order.push_back(k);
  }
  if (std::ranges::is_sorted(order)) return;
  const auto permute = [&order](const Shape& old) {
    Shape out;
    for (const std::size_t k : order) out.push_back(old[k]);
    return out;
  };
  part.extents = permute(part.extents);
  each_affine(part, [&](Affine& affine) { affine.step = permute(affine.step); });
}

// The part with loop k at i, i + stride, i + 2 stride, ...
Part restricted(const Part& part, std::size_t k, std::int64_t i, std::int64_t stride) {
  Part out = part;
  each_affine(out, [=](Affine& affine) {
    affine.start += affine.step[k] * i;
    affine.step[k] *= stride;
  });
  out.extents[k] = (part.extents[k] - i + stride - 1) / stride;
  drop_unit_loops(out);
  return out;
}

// A loop and how many pieces it falls into, so that they visit fewer cells twice: every stride-th of its turns together.
struct Cut {
  std::size_t loop = 0;
  std::int64_t stride = 0;
};

// Of the loops that share an axis with others, the one that falls into the fewest pieces: windows that overlap q deep into q sets
// of windows side by side, or the shorter loop into its turns.
Cut best_cut(const Part& part) {
  Cut best;
  const auto offer = [&](std::size_t k, std::int64_t stride) {
    if (best.stride == 0 || stride < best.stride) best = {k, stride};
  };
  for (int windows : {0, 1}) {  // of as many pieces, those are better that lie close together
    for (const Coord& coord : part.coords) {
      const std::vector<std::int64_t>& step = coord.affine.step;
      for (std::size_t k = 0; k < part.extents.size(); ++k) {
        std::int64_t others = 1;  // the length of what the other loops visit
        for (std::size_t j = 0; j < part.extents.size(); ++j) {
          if (j != k) others += std::abs(step[j]) * (part.extents[j] - 1);
        }
        if (step[k] == 0 || others == 1) continue;
        const std::int64_t depth = (others + std::abs(step[k]) - 1) / std::abs(step[k]);
        if (windows == 0) {
          offer(k, part.extents[k]);
        } else if (depth > 1 && depth < part.extents[k]) {
          offer(k, depth);
        }
      }
    }
  }
  return best;
}

// Splits parts that visit cells twice into parts that do not; what cannot be split cheaply keeps its overlap (and is
// index-added).
void unroll(const Part& part, std::vector<Part>& out) {
  if (has_index(part) || injective(part)) {
    out.push_back(part);
    return;
  }
  Cut cut = best_cut(part);
  if (cut.stride == 0) {  // a loop that moves nothing
    for (std::size_t k = 1; k < part.extents.size(); ++k) {
      if (part.extents[k] < part.extents[cut.loop]) cut.loop = k;
    }
    cut.stride = part.extents[cut.loop];
  }
  if (cut.stride > kMaxUnroll) {
    out.push_back(part);
    return;
  }
  for (std::int64_t i = 0; i < cut.stride; ++i) unroll(restricted(part, cut.loop, i, cut.stride), out);
}

// True if the position depends on loops that move nothing else, so that whole rows are put there.
bool indexes_rows(const IndexedAxis& along) {
  for (std::size_t a = 0; a < along.loops.size(); ++a) {
    if (a == along.axis) continue;
    for (std::size_t k : along.loops[a]) {
      if (along.index.moves(k)) return false;
    }
  }
  return true;
}

}  // namespace

std::int32_t Builder::assemble(const Shape& shape, fused::Dtype dtype, std::vector<Part> given) {
  std::vector<Part> parts;
  for (Part& part : given) {
    if (std::find(part.extents.begin(), part.extents.end(), 0) != part.extents.end() || part.value.expr == fused::kZero) continue;
    drop_unit_loops(part);
    order_loops(part);
    compact(part.value);
    unroll(part, parts);
  }
  const std::int32_t target = new_slot(shape, dtype);
  // Which parts can simply be stored, and do they cover everything?
  const std::size_t count = parts.size();
  const bool few = count <= kMaxCompared;  // comparing parts is quadratic
  std::vector<bool> affine(count), stores(count, false);
  std::int64_t covered = 0;
  for (std::size_t i = 0; i < count; ++i) {
    affine[i] = !has_index(parts[i]) && injective(parts[i]);
    bool alone = few && affine[i];
    for (std::size_t j = 0; alone && j < i; ++j) alone = disjoint(parts[i], parts[j]);
    stores[i] = alone;
    if (alone) covered += numel(parts[i].extents);
  }
  plan_.slots[target].zero_filled = covered != numel(shape);

  // Parts over equal nests that touch different cells go through one program.  Stores touch nothing that stands before them in
  // the list, but additions may touch what was stored later: so all stores come first.
  std::vector<bool> done(count, false);
  auto group_of = [&](std::size_t i) {
    std::vector<const Part*> group{&parts[i]};
    std::vector<Read> operands = parts[i].value.operands;
    int instructions = pool_.size(parts[i].value.expr);
    for (std::size_t j = i + 1; few && j < count && group.size() < kMaxGroup; ++j) {
      if (done[j] || !affine[j] || stores[j] != stores[i] || parts[j].extents != parts[i].extents) continue;
      const int more = pool_.size(parts[j].value.expr);
      if (instructions + more > kMaxGroupInstructions) continue;
      if (!std::all_of(group.begin(), group.end(), [&](const Part* other) { return disjoint(*other, parts[j]); })) continue;
      std::vector<Read> joined = operands;
      compact_operands(parts[j].value, joined);
      if (joined.size() > kMaxGroupOperands) continue;
      operands = std::move(joined);
      instructions += more;
      group.push_back(&parts[j]);
      done[j] = true;
    }
    return group;
  };
  for (bool storing : {true, false}) {
    for (std::size_t i = 0; i < count; ++i) {
      if (done[i] || stores[i] != storing) continue;
      done[i] = true;
      if (affine[i]) {
        write(target, dtype, group_of(i), !storing);
      } else {
        put_add(target, dtype, parts[i]);
      }
    }
  }
  return target;
}

std::int32_t Builder::as_whole_slot(const Part& part, const Shape& shape, fused::Dtype dtype) const {
  std::int32_t leaf = 0;
  if (has_index(part) || !pool_.is_operand(part.value.expr, &leaf)) return -1;
  const Read& read = part.value.operands[leaf];
  const Slot& source = slot(read.slot);
  if (read.slot < static_cast<std::int32_t>(plan_.given) || source.dtype != dtype) return -1;
  if (numel(part.extents) != numel(shape)) return -1;
  std::size_t a = 0, b = 0;
  for (;; ++a, ++b) {
    while (a < shape.size() && shape[a] == 1) ++a;
    while (b < source.shape.size() && source.shape[b] == 1) ++b;
    if (a == shape.size() || b == source.shape.size()) break;
    if (shape[a] != source.shape[b] || read.axes[b] != part.coords[a].affine) return -1;
  }
  return a == shape.size() && b == source.shape.size() && injective(part) ? read.slot : -1;
}

void Builder::write(std::int32_t target, fused::Dtype dtype, std::span<const Part* const> parts, bool accumulate) {
  Evaluate step;
  step.extents = parts[0]->extents;
  fused::ProgramSpec spec{.rank = static_cast<int>(step.extents.size()),
                          .operands = 0,
                          .compute = dtype == fused::Dtype::f64 ? fused::Dtype::f64 : fused::Dtype::f32,
                          .outputs = {}};
  for (const Part* part : parts) {
    spec.outputs.push_back({.expr = compact_operands(part->value, step.operands).expr, .dtype = dtype, .reduced = 0});
    Target to{.slot = target, .axes = {}, .accumulate = accumulate};
    for (const Coord& coord : part->coords) to.axes.push_back(coord.affine);
    step.targets.push_back(std::move(to));
  }
  spec.operands = static_cast<int>(step.operands.size());
  step.text = fused::to_text(pool_, spec);
  step.program = fused::intern(step.text);
  emit(std::move(step));
}

void Builder::put_add(std::int32_t target, fused::Dtype dtype, const Part& part) {
  plan_.slots[target].zero_filled = true;
  const Shape shape = slot(target).shape;
  const Value value =
      pool_.is_constant(part.value.expr) ? evaluate(part.value, part.extents, dtype, {}) : force(part.value, part.extents, dtype);
  std::int32_t leaf = 0;
  pool_.is_operand(value.expr, &leaf);
  PutAdd step{.extents = part.extents,
              .value = value.operands[leaf],
              .index = {},
              .out = target,
              .axis = indexed_axis(part, shape),
              .distinct = injective(part)};
  if (!step.axis || !indexes_rows(*step.axis)) step.index = flat_index(part, shape);
  emit(std::move(step));
}

// The position in the flattened array.
Read Builder::flat_index(const Part& part, const Shape& shape) {
  Coord flat = constant_coord(part.extents.size());
  std::int64_t stride = 1;
  for (std::size_t a = shape.size(); a-- > 0;) {
    add_scaled(flat, part.coords[a], stride, part.extents);
    stride *= shape[a];
  }
  return evaluate(coordinate_value(flat, part.extents), part.extents, fused::Dtype::i64, {}).operands[0];
}

std::optional<IndexedAxis> Builder::indexed_axis(const Part& part, const Shape& shape) {
  const std::size_t n = part.extents.size();
  IndexedAxis out{.axis = shape.size(), .index = {}, .loops = std::vector<std::vector<std::size_t>>(shape.size())};
  std::vector<bool> used(n, false);
  for (std::size_t a = 0; a < shape.size(); ++a) {
    const Coord& coord = part.coords[a];
    if (coord.has_index()) {
      if (out.axis != shape.size()) return std::nullopt;
      out.axis = a;
      continue;
    }
    std::size_t loop = n, count = 0;
    for (std::size_t k = 0; k < n; ++k) {
      if (coord.moves(k)) loop = k, ++count;
    }
    if (coord.affine.start != 0 || count > 1 || (count == 1 && (coord.affine.step[loop] != 1 || used[loop]))) return std::nullopt;
    if (count == 0 && shape[a] != 1) return std::nullopt;
    if (count == 0) continue;
    used[loop] = true;
    out.loops[a] = {loop};
  }
  if (out.axis == shape.size()) return std::nullopt;
  for (std::size_t k = 0; k < n; ++k) {
    if (!used[k]) out.loops[out.axis].push_back(k);
  }
  const Coord position = index_coord(coordinate_value(part.coords[out.axis], part.extents), part.extents);
  out.index = position.index;
  return out;
}

}  // namespace wengert::blocks
