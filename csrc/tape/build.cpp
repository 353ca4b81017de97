#include "tape/build.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace wengert::tape {

using fused::ExprId;
using fused::kNone;
using fused::Prim;

Pullback opaque() { return {}; }

Pullback none() {
  Pullback result;
  result.kind = Kind::none;
  return result;
}

Pullback zero() {
  Pullback result;
  result.kind = Kind::zero;
  return result;
}

Pullback identity() { return terms({Term()}); }

Pullback terms(std::vector<Term> list) {
  Pullback result;
  result.kind = Kind::terms;
  result.terms = std::move(list);
  return result;
}

AxisMap at_start(std::int64_t start) {
  AxisMap map;
  map.start = start;
  return map;
}

AxisMap along(int source, std::int64_t step, std::int64_t start) {
  AxisMap map;
  map.start = start;
  map.terms.push_back({source, step});
  return map;
}

AxisMap looked_up(Slot slot, Axes index_axes) {
  AxisMap map;
  map.index_slot = slot.number;
  map.index_axes = std::move(index_axes);
  return map;
}

Axes own_axes(int rank) {
  Axes axes;
  axes.reserve(rank);
  for (int a = 0; a < rank; ++a) axes.push_back(along(a));
  return axes;
}

Axes broadcast(at::IntArrayRef small, const Shape& big) {
  const std::int64_t shift = std::ssize(big) - std::ssize(small);
  Axes axes;
  axes.reserve(small.size());
  for (std::int64_t a = 0; a < std::ssize(small); ++a) {
    axes.push_back(small[a] == 1 || a + shift < 0 ? at_start(0) : along(static_cast<int>(a + shift)));
  }
  return axes;
}

Axes broadcast(const Shape& small, const Shape& big) { return broadcast(at::IntArrayRef(small), big); }

std::int64_t product(const Shape& shape) {
  std::int64_t result = 1;
  for (const std::int64_t extent : shape) result *= extent;
  return result;
}

int wrap_axis(std::int64_t axis, std::int64_t rank) {
  return static_cast<int>(axis < 0 ? axis + std::max<std::int64_t>(rank, 1) : axis);
}

ExprId FactorBuilder::read(Slot slot, Axes axes) {
  if (!site_.has(slot)) {
    complete_ = false;
    return kNone;
  }
  operands_.push_back({slot.number, std::move(axes)});
  return site_.pool.operand(static_cast<std::int32_t>(operands_.size()) - 1);
}

ExprId FactorBuilder::select(ExprId condition, ExprId yes, ExprId no) {
  const ExprId args[] = {condition, yes, no};
  return site_.pool.apply(Prim::where, args);
}

ExprId FactorBuilder::compare(Prim prim, ExprId a, ExprId b) {
  const ExprId args[] = {a, b};
  return site_.pool.apply(prim, args);
}

Factor FactorBuilder::factor(ExprId expr) {
  const std::vector<std::int32_t> used = site_.pool.operands(expr);
  Factor factor;
  if (used.size() == operands_.size()) {
    factor.expr = expr;
    factor.operands = operands_;
    return factor;
  }
  std::vector<ExprId> leaves(operands_.size(), fused::kZero);
  for (const std::int32_t old : used) {
    leaves[old] = site_.pool.operand(static_cast<std::int32_t>(factor.operands.size()));
    factor.operands.push_back(operands_[old]);
  }
  factor.expr = site_.pool.substitute(site_.pool, expr, leaves);
  return factor;
}

Pullback FactorBuilder::finish(ExprId expr) {
  if (!complete_) return opaque();
  if (expr == fused::kOne && site_.x() == site_.y()) return identity();
  return finish(expr, {}, broadcast(site_.x(), site_.y()));
}

Pullback FactorBuilder::finish(ExprId expr, std::vector<std::int64_t> loops, Axes axes) {
  if (!complete_ || expr == kNone) return opaque();
  if (expr == fused::kZero) return zero();
  Gather gather;
  gather.in_shape = site_.x();
  gather.loops = std::move(loops);
  gather.axes = std::move(axes);
  gather.factor = factor(expr);
  return terms({Term{Step(std::move(gather))}});
}

std::vector<int> wrapped_axes(std::span<const std::int64_t> axes, std::int64_t rank) {
  std::vector<int> result;
  for (const std::int64_t axis : axes) {
    const int wrapped = wrap_axis(axis, rank);
    if (wrapped < rank) result.push_back(wrapped);
  }
  std::sort(result.begin(), result.end());
  return result;
}

Reduction reduction(const Shape& x, const std::vector<int>& reduced, bool keepdim) {
  const int rank = static_cast<int>(x.size());
  const int y_rank = keepdim ? rank : rank - static_cast<int>(reduced.size());
  Reduction result;
  int next = 0;
  for (int a = 0; a < rank; ++a) {
    if (std::find(reduced.begin(), reduced.end(), a) != reduced.end()) {
      result.axes.push_back(along(y_rank + static_cast<int>(result.loops.size())));
      result.kept.push_back(at_start(0));
      result.loops.push_back(x[a]);
      if (keepdim) ++next;
    } else {
      result.axes.push_back(along(next));
      result.kept.push_back(along(next));
      ++next;
    }
  }
  return result;
}

Pullback local(const Site& site, const std::vector<std::pair<int, int>>& tied) {
  Pullback result;
  result.local.tied.assign(site.y().size(), -1);
  bool any = false;
  for (const auto& [y_axis, x_axis] : tied) {
    if (y_axis < 0 || x_axis < 0 || y_axis >= std::ssize(site.y()) || x_axis >= std::ssize(site.x())) continue;
    if (site.y()[y_axis] != site.x()[x_axis]) continue;
    result.local.tied[y_axis] = x_axis;
    any = true;
  }
  result.kind = any ? Kind::local : Kind::opaque;
  return result;
}

Pullback leading(const Site& s, int count) {
  const auto rank = [](const Shape& shape) { return static_cast<int>(shape.size()); };
  std::vector<std::pair<int, int>> tied;
  for (int a = 0; a < std::min({count, rank(s.x()), rank(s.y())}); ++a) tied.emplace_back(a, a);
  return local(s, tied);
}

Pullback local_batch(const Site& site, int y_core, int x_core) {
  std::vector<std::pair<int, int>> tied;
  int y_axis = static_cast<int>(site.y().size()) - y_core - 1;
  int x_axis = static_cast<int>(site.x().size()) - x_core - 1;
  for (; y_axis >= 0 && x_axis >= 0; --y_axis, --x_axis) tied.emplace_back(y_axis, x_axis);
  return local(site, tied);
}

Pullback called_elementwise(const Site& site) { return local_batch(site, 0, 0); }

namespace {

torch::autograd::variable_list answer_to_ones(const Take& take, int output) {
  const Node& node = take.node();
  torch::autograd::variable_list seeds(node.outputs.size());
  const Meta& meta = node.outputs[output];
  seeds[output] = at::ones(meta.shape, at::TensorOptions().dtype(meta.dtype).device(take.fn()->input_metadata(output).device()));
  return (*take.fn())(std::move(seeds));
}

Slots take_tables(Take& take, int edges, const torch::autograd::variable_list& grads) {
  Slots tables;
  for (int edge = 0; edge < edges; ++edge)
    tables.push_back(take.derived(take.needs(edge) && edge < std::ssize(grads) ? grads[edge] : at::Tensor()));
  return tables;
}

}  // namespace

Slots tabulate(Take& take, int edges, int output) { return take_tables(take, edges, answer_to_ones(take, output)); }

Slots tabulate_fully(Take& take, int edges, int output) {
  torch::autograd::variable_list grads;
  {
    const at::AutoGradMode with_graph(true);
    grads = answer_to_ones(take, output);
  }
  if (!at::GradMode::is_enabled()) {
    for (at::Tensor& grad : grads) grad = grad.defined() ? grad.detach() : grad;
  }
  return take_tables(take, edges, grads);
}

Slot table_of(const Site& site, const Slots& tables) { return site.input < std::ssize(tables) ? tables[site.input] : Slot(); }

Pullback tabulated(const Site& site, const Slots& tables) {
  const Slot table = table_of(site, tables);
  if (!site.has(table, site.y())) return opaque();
  FactorBuilder f(site);
  return f.finish(f.read(table));
}

}  // namespace wengert::tape
