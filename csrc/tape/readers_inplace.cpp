// Copies into views: base[part] = source leaves a CopySlices node on the base.
#include <ATen/Functions.h>
#include <torch/csrc/autograd/functions/tensor.h>

#include <optional>

#include "tape/build.h"

namespace wengert::tape {

namespace {

using torch::autograd::CopyBackwards;
using torch::autograd::CopySlices;

Shape concrete(c10::SymIntArrayRef values) {
  Shape result;
  for (const c10::SymInt& value : values) result.push_back(Take::concrete(value));
  return result;
}

// The part of a contiguous base that a view covers, axis by axis; empty where the view is no box of the base.
std::optional<std::vector<ScatterAxis>> box(const at::TensorGeometry& base, const at::TensorGeometry& view) {
  const Shape extents = concrete(base.sym_sizes()), strides = concrete(base.sym_strides());
  const Shape lengths = concrete(view.sym_sizes()), steps = concrete(view.sym_strides());
  const std::int64_t offset = Take::concrete(view.sym_storage_offset()) - Take::concrete(base.sym_storage_offset());
  if (offset < 0) return std::nullopt;
  std::vector<ScatterAxis> axes(extents.size(), ScatterAxis{-1, 0, 1});
  std::int64_t expected = 1;
  for (std::size_t a = extents.size(); a-- > 0;) {
    if (extents[a] != 1 && strides[a] != expected) return std::nullopt;
    axes[a].offset = offset / expected % extents[a];
    expected *= extents[a];
  }
  std::int32_t moving = 0;
  for (std::size_t k = 0; k < lengths.size(); ++k) {
    if (lengths[k] == 1) continue;
    bool found = false;
    for (std::size_t a = 0; a < extents.size() && !found; ++a) {
      if (extents[a] == 1 || axes[a].in_axis >= 0 || steps[k] < strides[a] || steps[k] % strides[a] != 0) continue;
      const std::int64_t step = steps[k] / strides[a];
      if (axes[a].offset + step * (lengths[k] - 1) >= extents[a]) continue;
      axes[a] = {moving++, axes[a].offset, step};
      found = true;
    }
    if (!found) return std::nullopt;
  }
  return axes;
}

struct Copy {
  bool is_box = false;  // else nothing is taken
  c10::SmallVector<ScatterAxis, 4> base = {};
  Integers view = {};  // its shape
  Slot kept = {};      // what is left of the base
};

Copy read_copy(Take& k, const CopySlices& n) {
  if (!n.fn || dynamic_cast<const CopyBackwards*>(n.fn.get()) == nullptr || n.base.sym_numel() == 0 || n.view.sym_numel() == 0)
    return {};
  const auto axes = box(n.base, n.view);
  if (!axes) return {};
  const Shape view = concrete(n.view.sym_sizes());
  Copy result{true, {axes->begin(), axes->end()}, Integers(view), {}};
  if (!k.needs(0)) return result;
  at::Tensor kept = k.flags(concrete(n.base.sym_sizes()));
  const std::int64_t offset = Take::concrete(n.view.sym_storage_offset()) - Take::concrete(n.base.sym_storage_offset());
  kept.as_strided(view, concrete(n.view.sym_strides()), offset).fill_(false);
  result.kept = k.derived(std::move(kept));
  return result;
}

Pullback copied(const Site& s, const Copy& p) {
  if (!p.is_box || p.base.size() != s.y().size() || s.input > 1) return opaque();
  if (s.input == 0) {
    FactorBuilder f(s);
    const fused::ExprId kept = f.read(p.kept);
    return f.complete() ? f.finish(f.select(kept, fused::kOne, fused::kZero)) : opaque();
  }
  const Shape view(p.view.begin(), p.view.end());
  Scatter scatter;
  scatter.axes.assign(p.base.begin(), p.base.end());
  for (const std::int64_t length : view) {
    if (length != 1) scatter.in_shape.push_back(length);
  }
  Term term = {Step(scatter)};
  if (s.x() == view || product(s.x()) == product(view)) {
    if (scatter.in_shape != s.x()) term.push_back(Reshape{s.x()});
    return terms({std::move(term)});
  }
  if (scatter.in_shape != view) term.push_back(Reshape{view});
  if (s.x().size() > view.size()) return opaque();
  Gather spread;
  spread.in_shape = s.x();
  spread.axes = broadcast(s.x(), view);
  term.push_back(std::move(spread));
  return terms({std::move(term)});
}

}  // namespace

void add_inplace(Table& t) { t.add<CopySlices>("torch::autograd::CopySlices", Op::scatter, read_copy, copied); }

}  // namespace wengert::tape
