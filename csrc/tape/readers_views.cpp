// Views and copies that move, drop or repeat axes: gathers without a factor, and reshapes.
#include <torch/csrc/autograd/generated/Functions.h>

#include <algorithm>

#include "tape/build.h"

namespace wengert::tape {

namespace {

namespace gen = torch::autograd::generated;
using fused::kOne;

int rank(const Shape& shape) { return static_cast<int>(shape.size()); }

Pullback moved(const Site& s, Axes axes) { return FactorBuilder(s).finish(kOne, {}, std::move(axes)); }

Pullback reshaped(const Site& s) { return s.x() == s.y() ? identity() : terms({Term{Step(Reshape{s.x()})}}); }

Pullback expanded(const Site& s) { return FactorBuilder(s).finish(kOne); }

struct Transpose {
  std::int64_t dim0, dim1;
};
Pullback transposed(const Site& s, const Transpose& p) {
  Axes axes = own_axes(rank(s.y()));
  if (!axes.empty()) std::swap(axes[wrap_axis(p.dim0, rank(s.x()))], axes[wrap_axis(p.dim1, rank(s.x()))]);
  return moved(s, std::move(axes));
}
Pullback transposed_matrix(const Site& s) { return rank(s.x()) < 2 ? identity() : transposed(s, {0, 1}); }

Pullback permuted(const Site& s, const Integers& dims) {
  const int n = rank(s.x());
  Axes axes(n);
  for (int a = 0; a < n; ++a) axes[wrap_axis(dims[a], n)] = along(a);
  return moved(s, std::move(axes));
}

// The input has axes of extent 1 that the output lacks.
Pullback squeezed_axes(const Site& s, const std::vector<int>& dropped) {
  Axes axes;
  int next = 0;
  for (int a = 0; a < rank(s.x()); ++a) {
    const bool gone = s.x()[a] == 1 && std::find(dropped.begin(), dropped.end(), a) != dropped.end();
    axes.push_back(gone ? at_start(0) : along(next++));
  }
  return next == rank(s.y()) ? moved(s, std::move(axes)) : opaque();
}

Pullback squeezed_all(const Site& s) {
  std::vector<int> all;
  for (int a = 0; a < rank(s.x()); ++a) all.push_back(a);
  return squeezed_axes(s, all);
}

Pullback squeezed(const Site& s, const Integers& dims) { return squeezed_axes(s, wrapped_axes(dims, rank(s.x()))); }

Pullback unsqueezed(const Site& s, std::int64_t dim) {
  const int axis = wrap_axis(dim, rank(s.y()));
  Axes axes = own_axes(rank(s.y()));
  axes.erase(axes.begin() + axis);
  return moved(s, std::move(axes));
}

// The output lacks one axis of the input, which stays at an index.
struct Select {
  std::int64_t dim, index;
};
Pullback selected(const Site& s, const Select& p) {
  const int axis = wrap_axis(p.dim, rank(s.x()));
  Axes axes = own_axes(rank(s.y()));
  axes.insert(axes.begin() + axis, at_start(p.index < 0 ? p.index + s.x()[axis] : p.index));
  return moved(s, std::move(axes));
}
Pullback unbound(const Site& s, std::int64_t dim) { return selected(s, {dim, s.output}); }

Pullback moved_along(const Site& s, int axis, std::int64_t start, std::int64_t step) {
  Axes axes = own_axes(rank(s.y()));
  axes[axis] = along(axis, step, start);
  return moved(s, std::move(axes));
}

std::int64_t clamped_start(std::int64_t start, std::int64_t extent) {
  return std::clamp<std::int64_t>(start < 0 ? start + extent : start, 0, extent);
}

struct Slice {
  std::int64_t dim, start, step;
};
Pullback sliced(const Site& s, const Slice& p) {
  const int axis = wrap_axis(p.dim, rank(s.x()));
  return moved_along(s, axis, clamped_start(p.start, s.x()[axis]), p.step);
}

struct Split {
  std::int64_t dim;
  bool equal;      // then one size stands for all
  Integers sizes;  // of the pieces along dim
};
Pullback split(const Site& s, const Split& p) {
  const int axis = wrap_axis(p.dim, rank(s.x()));
  std::int64_t start = 0;
  for (int o = 0; o < s.output; ++o) start += p.sizes[p.equal ? 0 : o];
  return moved_along(s, axis, start, 1);
}

struct Diagonal {
  std::int64_t offset, dim1, dim2;
};
Pullback diagonal(const Site& s, const Diagonal& p) {
  const int n = rank(s.x());
  const int first = wrap_axis(p.dim1, n), second = wrap_axis(p.dim2, n), last = rank(s.y()) - 1;
  Axes axes;
  int next = 0;
  for (int a = 0; a < n; ++a) {
    if (a == first) {
      axes.push_back(along(last, 1, std::max<std::int64_t>(0, -p.offset)));
    } else if (a == second) {
      axes.push_back(along(last, 1, std::max<std::int64_t>(0, p.offset)));
    } else {
      axes.push_back(along(next++));
    }
  }
  return moved(s, std::move(axes));
}

struct Unfold {
  std::int64_t dimension, step;
};
Pullback unfolded(const Site& s, const Unfold& p) {
  const int n = rank(s.x());
  if (n == 0) return moved(s, {});
  const int axis = wrap_axis(p.dimension, n);
  Axes axes = own_axes(n);
  axes[axis] = along(axis, p.step);
  axes[axis].terms.push_back({n, 1});
  return moved(s, std::move(axes));
}

Pullback flipped(const Site& s, const Integers& dims) {
  Axes axes = own_axes(rank(s.x()));
  for (const int axis : wrapped_axes(dims, rank(s.x()))) axes[axis] = along(axis, -1, s.x()[axis] - 1);
  return moved(s, std::move(axes));
}

struct Strided {
  bool contiguous;      // the input is: its elements are storage positions counted from its own offset
  std::int64_t offset;  // within the input
  Integers strides;     // of the output
};
Pullback strided(const Site& s, const Strided& p) {
  if (!p.contiguous || p.offset < 0) return opaque();
  AxisMap flat = at_start(p.offset);
  std::int64_t last = p.offset;
  for (int a = 0; a < rank(s.y()); ++a) {
    const std::int64_t stride = p.strides[a];
    if (stride != 0) flat.terms.push_back({a, stride});
    last += stride * (s.y()[a] - 1);
  }
  const std::int64_t count = product(s.x());
  if (last >= count) return opaque();
  Gather gather;
  gather.in_shape = {count};
  gather.axes = {std::move(flat)};
  return terms({Term{Step(std::move(gather)), Step(Reshape{s.x()})}});
}

template <class N>
Strided read_strided(Take& k, const N& n) {
  const auto& sizes = n.self_geometry.sym_sizes();
  const auto& strides = n.self_geometry.sym_strides();
  std::int64_t expected = 1;
  bool contiguous = true;
  for (std::int64_t a = std::ssize(sizes) - 1; a >= 0; --a) {
    const std::int64_t extent = Take::concrete(sizes[a]);
    contiguous = contiguous && (extent == 1 || Take::concrete(strides[a]) == expected);
    expected *= extent;
  }
  const std::int64_t own = Take::concrete(n.self_geometry.sym_storage_offset());
  const std::int64_t offset = n.storage_offset.has_value() ? Take::concrete(*n.storage_offset) - own : 0;
  return {contiguous, offset, k.concrete(n.stride)};
}

template <class N>
void add_strided(Table& t, const char* name) {
  t.add<N>(name, Op::view, read_strided<N>, strided);
}

template <class N>
void add_split(Table& t, const char* name) {
  t.add<N>(
      name, Op::view,
      [](Take& k, const N& n) {
        if constexpr (requires { n.split_size; }) {
          return Split{n.dim, true, {k.concrete(n.split_size)}};
        } else {
          return Split{n.dim, false, k.concrete(n.split_sizes)};
        }
      },
      split);
}

template <class N>
void add_slice(Table& t, const char* name) {
  t.add<N>(
      name, Op::view,
      [](Take& k, const N& n) { return Slice{n.dim, n.start.has_value() ? k.concrete(*n.start) : 0, k.concrete(n.step)}; },
      sliced);
}

template <class N>
void add_select(Table& t, const char* name) {
  t.add<N>(name, Op::view, [](Take& k, const N& n) { return Select{n.dim, k.concrete(n.index)}; }, selected);
}

template <class N>
void add_transpose(Table& t, const char* name) {
  t.add<N>(name, Op::view, [](Take&, const N& n) { return Transpose{n.dim0, n.dim1}; }, transposed);
}

template <class N>
void add_permute(Table& t, const char* name) {
  t.add<N>(name, Op::view, [](Take&, const N& n) { return Take::concrete(n.dims); }, permuted);
}

template <class N>
void add_squeeze(Table& t, const char* name) {
  if constexpr (requires(const N& n) { n.dim; }) {
    t.add<N>(
        name, Op::view,
        [](Take&, const N& n) {
          if constexpr (std::is_same_v<decltype(n.dim), std::int64_t>) {
            return Integers{n.dim};
          } else {
            return Take::concrete(n.dim);
          }
        },
        squeezed);
  } else {
    t.add<N>(name, Op::view, squeezed_all);
  }
}

template <class N>
void add_unsqueeze(Table& t, const char* name) {
  t.add<N>(name, Op::view, [](Take&, const N& n) { return n.dim; }, unsqueezed);
}

template <class N>
void add_diagonal(Table& t, const char* name) {
  t.add<N>(name, Op::view, [](Take&, const N& n) { return Diagonal{n.offset, n.dim1, n.dim2}; }, diagonal);
}

template <class N>
void add_unfold(Table& t, const char* name) {
  t.add<N>(name, Op::view, [](Take&, const N& n) { return Unfold{n.dimension, n.step}; }, unfolded);
}

template <class N>
void add_unbind(Table& t, const char* name) {
  t.add<N>(name, Op::view, [](Take&, const N& n) { return n.dim; }, unbound);
}

}  // namespace

void add_views(Table& t) {
  t.add<gen::ViewBackward0>("ViewBackward0", Op::view, reshaped);
  t.add<gen::ViewBackward0_copy>("ViewBackward0_copy", Op::view, reshaped);
  t.add<gen::UnsafeViewBackward0>("UnsafeViewBackward0", Op::view, reshaped);
  t.add<gen::ReshapeAliasBackward0>("ReshapeAliasBackward0", Op::view, reshaped);
  t.add<gen::ReshapeAliasBackward0_copy>("ReshapeAliasBackward0_copy", Op::view, reshaped);
  t.add<gen::ReshapeCopyBackward0>("ReshapeCopyBackward0", Op::view, reshaped);
  t.add<gen::ExpandBackward0>("ExpandBackward0", Op::broadcast, expanded);
  t.add<gen::ExpandBackward0_copy>("ExpandBackward0_copy", Op::broadcast, expanded);
  t.add<gen::TBackward0>("TBackward0", Op::view, transposed_matrix);
  t.add<gen::TBackward1>("TBackward1", Op::view, transposed_matrix);
  t.add<gen::TBackward0_copy>("TBackward0_copy", Op::view, transposed_matrix);
  add_transpose<gen::TransposeBackward0>(t, "TransposeBackward0");
  add_transpose<gen::TransposeBackward1>(t, "TransposeBackward1");
  add_transpose<gen::TransposeBackward0_copy>(t, "TransposeBackward0_copy");
  add_permute<gen::PermuteBackward0>(t, "PermuteBackward0");
  add_permute<gen::PermuteBackward0_copy>(t, "PermuteBackward0_copy");
  add_squeeze<gen::SqueezeBackward0>(t, "SqueezeBackward0");
  add_squeeze<gen::SqueezeBackward1>(t, "SqueezeBackward1");
  add_squeeze<gen::SqueezeBackward2>(t, "SqueezeBackward2");
  add_squeeze<gen::SqueezeBackward3>(t, "SqueezeBackward3");
  add_squeeze<gen::SqueezeBackward4>(t, "SqueezeBackward4");
  add_squeeze<gen::SqueezeBackward5>(t, "SqueezeBackward5");
  add_squeeze<gen::SqueezeBackward0_copy>(t, "SqueezeBackward0_copy");
  add_squeeze<gen::SqueezeBackward1_copy>(t, "SqueezeBackward1_copy");
  add_squeeze<gen::SqueezeBackward2_copy>(t, "SqueezeBackward2_copy");
  add_unsqueeze<gen::UnsqueezeBackward0>(t, "UnsqueezeBackward0");
  add_unsqueeze<gen::UnsqueezeBackward1>(t, "UnsqueezeBackward1");
  add_unsqueeze<gen::UnsqueezeBackward0_copy>(t, "UnsqueezeBackward0_copy");
  add_select<gen::SelectBackward0>(t, "SelectBackward0");
  add_select<gen::SelectBackward0_copy>(t, "SelectBackward0_copy");
  add_slice<gen::SliceBackward0>(t, "SliceBackward0");
  add_slice<gen::SliceBackward0_copy>(t, "SliceBackward0_copy");
  add_split<gen::SplitBackward0>(t, "SplitBackward0");
  add_split<gen::UnsafeSplitBackward0>(t, "UnsafeSplitBackward0");
  add_split<gen::SplitBackward0_copy>(t, "SplitBackward0_copy");
  add_split<gen::SplitWithSizesBackward0>(t, "SplitWithSizesBackward0");
  add_split<gen::UnsafeSplitWithSizesBackward0>(t, "UnsafeSplitWithSizesBackward0");
  add_split<gen::SplitWithSizesBackward0_copy>(t, "SplitWithSizesBackward0_copy");
  add_unbind<gen::UnbindBackward0>(t, "UnbindBackward0");
  add_unbind<gen::UnbindBackward0_copy>(t, "UnbindBackward0_copy");
  add_diagonal<gen::DiagonalBackward0>(t, "DiagonalBackward0");
  add_diagonal<gen::DiagonalBackward0_copy>(t, "DiagonalBackward0_copy");
  add_unfold<gen::UnfoldBackward0>(t, "UnfoldBackward0");
  add_unfold<gen::UnfoldBackward0_copy>(t, "UnfoldBackward0_copy");
  t.add<gen::FlipBackward0>(
      "FlipBackward0", Op::view, [](Take&, const gen::FlipBackward0& n) { return Take::concrete(n.dims); }, flipped);
  add_strided<gen::AsStridedBackward0>(t, "AsStridedBackward0");
  add_strided<gen::AsStridedBackward1>(t, "AsStridedBackward1");
  add_strided<gen::AsStridedBackward0_copy>(t, "AsStridedBackward0_copy");
  // Reads and writes its cotangent's memory from its start, wherever in it the cotangent lies: what PyTorch makes of that only
  // its own calls can say.
  t.add<gen::AsStridedScatterBackward0>(
      "AsStridedScatterBackward0", Op::opaque,
      [](Take&, const gen::AsStridedScatterBackward0&) -> Nothing { throw Unsupported("as_strided_scatter"); },
      [](const Site&, Nothing) { return opaque(); });
}

}  // namespace wengert::tape
