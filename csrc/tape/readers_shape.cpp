// Joining, padding, shifting and masking: scatters, reshapes and constant masks.
#include <ATen/Functions.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <torch/csrc/autograd/generated/Functions.h>

#include <algorithm>

#include "tape/build.h"

namespace wengert::tape {

namespace {

namespace gen = torch::autograd::generated;
using fused::ExprId;
using fused::kOne;
using fused::kZero;

int rank(const Shape& shape) { return static_cast<int>(shape.size()); }

Scatter scatter_of(const Shape& in_shape) {
  Scatter scatter;
  scatter.in_shape = in_shape;
  for (int a = 0; a < rank(in_shape); ++a) scatter.axes.push_back({a, 0, 1});
  return scatter;
}

Pullback placed(const Shape& x, int axis, std::int64_t offset, std::int64_t step) {
  Scatter scatter = scatter_of(x);
  scatter.axes[axis].offset = offset;
  scatter.axes[axis].step = step;
  return terms({Term{Step(std::move(scatter))}});
}

Gather window(const Shape& in_shape, int axis, std::int64_t start) {
  Gather gather;
  gather.in_shape = in_shape;
  gather.axes = own_axes(rank(in_shape));
  gather.axes[axis].start = start;
  return gather;
}

// One axis is new in the output and fixed.
Pullback inserted(const Site& s, int axis, std::int64_t index) {
  Scatter scatter = scatter_of(s.x());
  if (index < 0) index += s.y()[axis];
  scatter.axes.insert(scatter.axes.begin() + axis, ScatterAxis{-1, index, 1});
  return terms({Term{Step(std::move(scatter))}});
}

Pullback stacked(const Site& s, std::int64_t dim) { return inserted(s, wrap_axis(dim, rank(s.y())), s.input); }

struct Cat {
  std::int64_t dim;
  Integers extents;  // of the inputs along dim
};
Pullback cat(const Site& s, const Cat& p) {
  const int axis = wrap_axis(p.dim, rank(s.y()));
  if (s.x().size() != s.y().size()) return opaque();
  std::int64_t offset = 0;
  for (int j = 0; j < s.input; ++j) offset += p.extents[j];
  return s.x() == s.y() ? identity() : placed(s.x(), axis, offset, 1);
}

Cat read_cat(Take& k, const gen::CatBackward0& n) {
  Cat result{n.dim, {}};
  const int axis = wrap_axis(n.dim, std::ssize(k.node().outputs[0].shape));
  for (const auto& sizes : n.tensors_args_sizes_symint) {
    // Empty one-dimensional tensors are skipped by cat whatever the others' rank.
    const bool skipped = sizes.size() == 1 && Take::concrete(sizes[0]) == 0;
    result.extents.push_back(skipped ? 0 : Take::concrete(sizes.at(axis)));
  }
  return result;
}

Pullback padded(const Site& s, const Integers& pad) {  // pairs (before, after), last axis first; negative crops
  Shape cropped = s.x();
  Scatter scatter = scatter_of(cropped);
  Gather crop;
  crop.in_shape = s.x();
  crop.axes = own_axes(rank(s.x()));
  for (std::size_t pair = 0; 2 * pair + 1 < pad.size(); ++pair) {
    const int axis = rank(s.x()) - 1 - static_cast<int>(pair);
    const std::int64_t before = pad[2 * pair], after = pad[2 * pair + 1];
    cropped[axis] += std::min<std::int64_t>(before, 0) + std::min<std::int64_t>(after, 0);
    scatter.axes[axis].offset = std::max<std::int64_t>(before, 0);
    crop.axes[axis].start = std::max<std::int64_t>(-before, 0);
  }
  if (product(cropped) == 0) return zero();
  scatter.in_shape = cropped;
  Term term;
  if (cropped != s.y()) term.push_back(std::move(scatter));
  if (cropped != s.x()) term.push_back(std::move(crop));
  return terms({std::move(term)});
}

// Each shifted axis is two pieces; several axes give every combination of pieces.
struct Roll {
  Integers shifts, axes;  // no axes: the flattened tensor
};
Pullback rolled(const Site& s, const Roll& p) {
  const bool flat = p.axes.empty();
  const Shape shape = flat ? Shape{product(s.x())} : s.x();
  std::vector<Term> list = {Term()};
  if (flat && shape != s.x()) list[0].push_back(Reshape{shape});
  for (std::size_t q = 0; q < p.shifts.size(); ++q) {
    const int axis = flat ? 0 : wrap_axis(p.axes[q], rank(shape));
    if (axis >= rank(shape)) continue;
    const std::int64_t extent = shape[axis], shift = ((p.shifts[q] % extent) + extent) % extent;
    if (shift == 0) continue;
    std::vector<Term> next;
    for (const auto& [to, length, from] :
         {std::tuple{shift, extent - shift, std::int64_t{0}}, {std::int64_t{0}, shift, extent - shift}}) {
      Shape piece = shape;
      piece[axis] = length;
      Scatter scatter = scatter_of(piece);
      scatter.axes[axis].offset = to;
      for (Term term : list) {
        term.push_back(scatter);
        term.push_back(window(shape, axis, from));
        next.push_back(std::move(term));
      }
    }
    list = std::move(next);
  }
  if (flat && shape != s.x()) {
    for (Term& term : list) term.push_back(Reshape{s.x()});
  }
  return terms(std::move(list));
}

// Copies side by side: every output axis is (copy, coordinate).
Pullback repeated(const Site& s) {
  const int lead = rank(s.y()) - rank(s.x());
  Shape digits;
  Gather gather;
  gather.in_shape = s.x();
  for (int a = 0; a < rank(s.y()); ++a) {
    const std::int64_t extent = a < lead ? 1 : s.x()[a - lead];
    digits.push_back(s.y()[a] / extent);
    digits.push_back(extent);
    if (a >= lead) gather.axes.push_back(along(2 * a + 1));
  }
  return terms({Term{Step(Reshape{digits}), Step(std::move(gather))}});
}

// tril and triu by a mask over the last two axes, and what a write leaves of the tensor it writes into.
Pullback masked(const Site& s, Slot kept) {
  FactorBuilder f(s);
  const ExprId mask = f.read(kept);
  return f.complete() ? f.finish(f.select(mask, kOne, kZero)) : opaque();
}

template <class N>
Slot read_triangle(Take& k, const N& n, at::Tensor (*triangle)(const at::Tensor&, std::int64_t)) {
  const Shape& y = k.node().outputs[0].shape;
  return k.derived(triangle(k.flags({y[y.size() - 2], y[y.size() - 1]}), k.concrete(n.diagonal)));
}

struct Diagonal {
  std::int64_t offset, dim1, dim2;
};

// The input's last axis runs along a diagonal of two axes of the output.
Pullback along_diagonal(const Site& s, const Diagonal& p) {
  const int n = rank(s.y());
  const int first = wrap_axis(p.dim1, n), second = wrap_axis(p.dim2, n);
  const std::int64_t rows = s.y()[first], columns = s.y()[second];
  // y is a permutation of z, whose last two axes hold the diagonal.
  Shape z;
  Gather permute;
  permute.axes.resize(n);
  bool moved = false;
  int next = 0;
  Axes sources;
  for (int a = 0; a < n; ++a) {
    if (a == first || a == second) continue;
    moved = moved || a != next++;
    z.push_back(s.y()[a]);
    sources.push_back(along(a));
  }
  moved = moved || first != n - 2 || second != n - 1;
  z.push_back(rows);
  z.push_back(columns);
  sources.push_back(along(first));
  sources.push_back(along(second));
  permute.in_shape = z;
  permute.axes = std::move(sources);
  Shape flat(z.begin(), z.end() - 2);
  flat.push_back(rows * columns);
  Scatter scatter = scatter_of(s.x());
  scatter.axes.back().offset = std::max<std::int64_t>(0, -p.offset) * columns + std::max<std::int64_t>(0, p.offset);
  scatter.axes.back().step = columns + 1;
  Term term;
  if (moved) term.push_back(std::move(permute));
  term.push_back(Reshape{flat});
  term.push_back(std::move(scatter));
  return terms({std::move(term)});
}

template <class N>
void add_diagonal_writer(Table& t, const char* name) {
  t.add<N>(name, Op::scatter, [](Take&, const N& n) { return Diagonal{n.offset, n.dim1, n.dim2}; }, along_diagonal);
}

struct Refold {
  std::int64_t dim, size, step;
};

// The adjoint of unfold adds overlapping windows: one scatter for each position within the window.
Pullback refolded(const Site& s, const Refold& p) {
  constexpr std::int64_t kMostWindows = 64;
  if (s.y().empty() || p.size > kMostWindows) return opaque();
  const int axis = wrap_axis(p.dim, rank(s.y()));
  Shape piece(s.x().begin(), s.x().end() - 1);
  std::vector<Term> list;
  for (std::int64_t w = 0; w < p.size; ++w) {
    Scatter scatter = scatter_of(piece);
    scatter.axes[axis].offset = w;
    scatter.axes[axis].step = p.step;
    Gather select;
    select.in_shape = s.x();
    select.axes = own_axes(rank(piece));
    select.axes.push_back(at_start(w));
    list.push_back(Term{Step(std::move(scatter)), Step(std::move(select))});
  }
  return terms(std::move(list));
}

struct Rotation {
  std::int64_t turns;  // quarters
  Integers axes;       // two
};
// A quarter turn is a flip and a swap.
Pullback rotated(const Site& s, const Rotation& p) {
  const int n = rank(s.x());
  const int first = wrap_axis(p.axes[0], n), second = wrap_axis(p.axes[1], n);
  const std::int64_t turns = ((p.turns % 4) + 4) % 4;
  Axes axes = own_axes(n);
  const auto back = [&](int source, int axis) { return along(source, -1, s.x()[axis] - 1); };
  if (turns == 1) {
    axes[first] = along(second);
    axes[second] = back(first, second);
  } else if (turns == 2) {
    axes[first] = back(first, first);
    axes[second] = back(second, second);
  } else if (turns == 3) {
    axes[first] = back(second, first);
    axes[second] = along(first);
  }
  return FactorBuilder(s).finish(kOne, {}, std::move(axes));
}

std::int64_t clamped_start(std::int64_t start, std::int64_t extent) {
  return std::clamp<std::int64_t>(start < 0 ? start + extent : start, 0, extent);
}

struct Slice {
  std::int64_t dim, start, step;
};
Pullback slice_written(const Site& s, const Slice& p) {
  const int axis = wrap_axis(p.dim, rank(s.y()));
  return placed(s.x(), axis, clamped_start(p.start, s.y()[axis]), p.step);
}

struct Select {
  std::int64_t dim, index;
};
Pullback select_written(const Site& s, const Select& p) { return inserted(s, wrap_axis(p.dim, rank(s.y())), p.index); }

// Ops that write a tensor (edge 1) into a part of another (edge 0).
template <class Part>
struct Write {
  Part part;
  Slot kept;  // what is left of the other
};
template <class Part>
Write(Part, Slot) -> Write<Part>;

template <class Part, Pullback (*written)(const Site&, const Part&)>
Pullback overwritten(const Site& s, const Write<Part>& p) {
  return s.input == 0 ? masked(s, p.kept) : written(s, p.part);
}

// `clear` fills the part with false.
template <class F>
Slot kept_by(Take& k, const F& clear) {
  if (!k.needs(0)) return {};
  at::Tensor kept = k.flags(k.node().outputs[0].shape);
  clear(kept);
  return k.derived(std::move(kept));
}

Pullback trace(const Site& s) {
  const std::int64_t length = std::min(s.x()[0], s.x()[1]);
  return FactorBuilder(s).finish(kOne, {length}, {along(0), along(0)});
}

void add_writers(Table& t) {
  t.add<gen::SliceBackwardBackward0>(
      "SliceBackwardBackward0", Op::scatter,
      [](Take& k, const gen::SliceBackwardBackward0& n) { return Slice{n.dim, k.concrete(n.start), k.concrete(n.step)}; },
      slice_written);
  t.add<gen::SelectBackwardBackward0>(
      "SelectBackwardBackward0", Op::scatter,
      [](Take& k, const gen::SelectBackwardBackward0& n) { return Select{n.dim, k.concrete(n.index)}; }, select_written);
  t.add<gen::SliceScatterBackward0>(
      "SliceScatterBackward0", Op::scatter,
      [](Take& k, const gen::SliceScatterBackward0& n) {
        return Write{Slice{n.dim, n.start.has_value() ? k.concrete(*n.start) : 0, k.concrete(n.step)},
                     kept_by(k, [&](at::Tensor& kept) { kept.slice_symint(n.dim, n.start, n.end, n.step).fill_(false); })};
      },
      overwritten<Slice, slice_written>);
  t.add<gen::SelectScatterBackward0>(
      "SelectScatterBackward0", Op::scatter,
      [](Take& k, const gen::SelectScatterBackward0& n) {
        return Write{Select{n.dim, k.concrete(n.index)},
                     kept_by(k, [&](at::Tensor& kept) { kept.select_symint(n.dim, n.index).fill_(false); })};
      },
      overwritten<Select, select_written>);
  t.add<gen::DiagonalScatterBackward0>(
      "DiagonalScatterBackward0", Op::scatter,
      [](Take& k, const gen::DiagonalScatterBackward0& n) {
        return Write{Diagonal{n.offset, n.dim1, n.dim2},
                     kept_by(k, [&](at::Tensor& kept) { kept.diagonal(n.offset, n.dim1, n.dim2).fill_(false); })};
      },
      overwritten<Diagonal, along_diagonal>);
  add_diagonal_writer<gen::DiagEmbedBackward0>(t, "DiagEmbedBackward0");
  add_diagonal_writer<gen::DiagonalBackwardBackward0>(t, "DiagonalBackwardBackward0");
  t.add<gen::UnfoldBackwardBackward0>(
      "UnfoldBackwardBackward0", Op::scatter,
      [](Take&, const gen::UnfoldBackwardBackward0& n) { return Refold{n.dim, Take::concrete(n.size), Take::concrete(n.step)}; },
      refolded);
}

}  // namespace

void add_shape(Table& t) {
  t.add<gen::CatBackward0>("CatBackward0", Op::scatter, read_cat, cat);
  t.add<gen::StackBackward0>("StackBackward0", Op::scatter, [](Take&, const gen::StackBackward0& n) { return n.dim; }, stacked);
  t.add<gen::ConstantPadNdBackward0>(
      "ConstantPadNdBackward0", Op::scatter, [](Take& k, const gen::ConstantPadNdBackward0& n) { return k.concrete(n.pad); },
      padded);
  t.add<gen::RollBackward0>(
      "RollBackward0", Op::scatter,
      [](Take& k, const gen::RollBackward0& n) { return Roll{k.concrete(n.shifts), Take::concrete(n.dims)}; }, rolled);
  t.add<gen::RepeatBackward0>("RepeatBackward0", Op::broadcast, repeated);
  t.add<gen::TrilBackward0>(
      "TrilBackward0", Op::elementwise, [](Take& k, const gen::TrilBackward0& n) { return read_triangle(k, n, at::tril); },
      masked);
  t.add<gen::TriuBackward0>(
      "TriuBackward0", Op::elementwise, [](Take& k, const gen::TriuBackward0& n) { return read_triangle(k, n, at::triu); },
      masked);
  t.add<gen::Rot90Backward0>(
      "Rot90Backward0", Op::view, [](Take&, const gen::Rot90Backward0& n) { return Rotation{n.k, Take::concrete(n.dims)}; },
      rotated);
  t.add<gen::TraceBackward0>("TraceBackward0", Op::reduction, trace);
  // copy_: what was there before is overwritten, the source is broadcast and cast.
  t.add<torch::autograd::CopyBackwards>("torch::autograd::CopyBackwards", Op::elementwise,
                                        [](const Site& s) { return s.input == 0 ? zero() : FactorBuilder(s).finish(kOne); });
  add_writers(t);
}

}  // namespace wengert::tape
