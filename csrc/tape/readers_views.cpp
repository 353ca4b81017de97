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

Pullback swapped(const Site& s, int first, int second) {
  Axes axes = own_axes(rank(s.y()));
  if (!axes.empty()) std::swap(axes[first], axes[second]);
  return moved(s, std::move(axes));
}

Pullback permuted(const Site& s) {
  const int n = rank(s.x());
  Axes axes(n);
  for (int a = 0; a < n; ++a) axes[wrap_axis(s.integer(a), n)] = along(a);
  return moved(s, std::move(axes));
}

// The input has axes of extent 1 that the output lacks.
Pullback squeezed(const Site& s, const std::vector<int>& dropped) {
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
  return squeezed(s, all);
}

Pullback squeezed_listed(const Site& s) { return squeezed(s, wrapped_axes(s.node.ints, rank(s.x()))); }

Pullback unsqueezed(const Site& s) {
  const int axis = wrap_axis(s.integer(0), rank(s.y()));
  Axes axes = own_axes(rank(s.y()));
  axes.erase(axes.begin() + axis);
  return moved(s, std::move(axes));
}

// The output lacks one axis of the input, which stays at an index.
Pullback selected(const Site& s, int axis, std::int64_t index) {
  Axes axes = own_axes(rank(s.y()));
  if (index < 0) index += s.x()[axis];
  axes.insert(axes.begin() + axis, at_start(index));
  return moved(s, std::move(axes));
}

Pullback sliced(const Site& s, int axis, std::int64_t start, std::int64_t step) {
  Axes axes = own_axes(rank(s.y()));
  axes[axis] = along(axis, step, start);
  return moved(s, std::move(axes));
}

std::int64_t clamped_start(std::int64_t start, std::int64_t extent) {
  return std::clamp<std::int64_t>(start < 0 ? start + extent : start, 0, extent);
}

Pullback slice(const Site& s) {  // ints: dim, start, step
  const int axis = wrap_axis(s.integer(0), rank(s.x()));
  return sliced(s, axis, clamped_start(s.integer(1), s.x()[axis]), s.integer(2));
}

// ints: dim, then the extents of the pieces before each output (one size, or all of them).
Pullback split(const Site& s) {
  const int axis = wrap_axis(s.integer(0), rank(s.x()));
  std::int64_t start = 0;
  for (int o = 0; o < s.output; ++o) start += s.integer(s.integer(1) != 0 ? 2 : 2 + o);
  return sliced(s, axis, start, 1);
}

Pullback diagonal(const Site& s) {  // ints: offset, dim1, dim2
  const int n = rank(s.x());
  const std::int64_t offset = s.integer(0);
  const int first = wrap_axis(s.integer(1), n), second = wrap_axis(s.integer(2), n), last = rank(s.y()) - 1;
  Axes axes;
  int next = 0;
  for (int a = 0; a < n; ++a) {
    if (a == first) {
      axes.push_back(along(last, 1, std::max<std::int64_t>(0, -offset)));
    } else if (a == second) {
      axes.push_back(along(last, 1, std::max<std::int64_t>(0, offset)));
    } else {
      axes.push_back(along(next++));
    }
  }
  return moved(s, std::move(axes));
}

Pullback unfolded(const Site& s) {  // ints: dimension, step
  const int n = rank(s.x());
  if (n == 0) return moved(s, {});
  const int axis = wrap_axis(s.integer(0), n);
  Axes axes = own_axes(n);
  axes[axis] = along(axis, s.integer(1));
  axes[axis].terms.push_back({n, 1});
  return moved(s, std::move(axes));
}

Pullback flipped(const Site& s) {
  Axes axes = own_axes(rank(s.x()));
  for (const int axis : wrapped_axes(s.node.ints, rank(s.x()))) axes[axis] = along(axis, -1, s.x()[axis] - 1);
  return moved(s, std::move(axes));
}

// The input is contiguous, so its elements are storage positions counted from its own offset.
Pullback strided(const Site& s) {  // ints: contiguous, offset within the input, strides of the output
  if (!s.integer(0) || s.integer(1) < 0) return opaque();
  AxisMap flat = at_start(s.integer(1));
  std::int64_t last = s.integer(1);
  for (int a = 0; a < rank(s.y()); ++a) {
    const std::int64_t stride = s.integer(2 + a);
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
void read_strided(Take& k, const N& n) {
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
  k.integer(contiguous);
  k.integer(n.storage_offset.has_value() ? Take::concrete(*n.storage_offset) - own : 0);
  k.integers(n.stride);
}

template <class N>
void add_split(Table& t, const char* name) {
  t.add<N>(
      name,
      [](Take& k, const N& n) {
        k.integer(n.dim);
        if constexpr (requires { n.split_size; }) {
          k.integer(1);
          k.integer(n.split_size);
        } else {
          k.integer(std::int64_t{0});
          k.integers(n.split_sizes);
        }
      },
      split);
}

template <class N>
void add_slice(Table& t, const char* name) {
  t.add<N>(
      name,
      [](Take& k, const N& n) {
        k.integer(n.dim);
        k.integer(n.start.has_value() ? Take::concrete(*n.start) : 0);
        k.integer(n.step);
      },
      slice);
}

template <class N>
void add_select(Table& t, const char* name) {
  t.add<N>(
      name,
      [](Take& k, const N& n) {
        k.integer(n.dim);
        k.integer(n.index);
      },
      [](const Site& s) { return selected(s, wrap_axis(s.integer(0), rank(s.x())), s.integer(1)); });
}

template <class N>
void add_transpose(Table& t, const char* name) {
  t.add<N>(
      name,
      [](Take& k, const N& n) {
        k.integer(n.dim0);
        k.integer(n.dim1);
      },
      [](const Site& s) { return swapped(s, wrap_axis(s.integer(0), rank(s.x())), wrap_axis(s.integer(1), rank(s.x()))); });
}

template <class N>
void add_permute(Table& t, const char* name) {
  t.add<N>(name, [](Take& k, const N& n) { k.integers(n.dims); }, permuted);
}

template <class N>
void add_squeeze(Table& t, const char* name) {
  if constexpr (requires(const N& n) { n.dim; }) {
    t.add<N>(
        name,
        [](Take& k, const N& n) {
          if constexpr (std::is_same_v<decltype(n.dim), std::int64_t>) {
            k.integer(n.dim);
          } else {
            k.integers(n.dim);
          }
        },
        squeezed_listed);
  } else {
    t.add<N>(name, squeezed_all);
  }
}

template <class N>
void add_unsqueeze(Table& t, const char* name) {
  t.add<N>(name, [](Take& k, const N& n) { k.integer(n.dim); }, unsqueezed);
}

template <class N>
void add_diagonal(Table& t, const char* name) {
  t.add<N>(
      name,
      [](Take& k, const N& n) {
        k.integer(n.offset);
        k.integer(n.dim1);
        k.integer(n.dim2);
      },
      diagonal);
}

template <class N>
void add_unfold(Table& t, const char* name) {
  t.add<N>(
      name,
      [](Take& k, const N& n) {
        k.integer(n.dimension);
        k.integer(n.step);
      },
      unfolded);
}

constexpr Describe kTransposed = [](const Site& s) { return rank(s.x()) < 2 ? identity() : swapped(s, 0, 1); };

template <class N>
void add_unbind(Table& t, const char* name) {
  t.add<N>(
      name, [](Take& k, const N& n) { k.integer(n.dim); },
      [](const Site& s) { return selected(s, wrap_axis(s.integer(0), rank(s.x())), s.output); });
}

}  // namespace

void add_views(Table& t) {
  t.add<gen::ViewBackward0>("ViewBackward0", reshaped);
  t.add<gen::ViewBackward0_copy>("ViewBackward0_copy", reshaped);
  t.add<gen::UnsafeViewBackward0>("UnsafeViewBackward0", reshaped);
  t.add<gen::ReshapeAliasBackward0>("ReshapeAliasBackward0", reshaped);
  t.add<gen::ReshapeAliasBackward0_copy>("ReshapeAliasBackward0_copy", reshaped);
  t.add<gen::ReshapeCopyBackward0>("ReshapeCopyBackward0", reshaped);
  t.add<gen::ExpandBackward0>("ExpandBackward0", expanded);
  t.add<gen::ExpandBackward0_copy>("ExpandBackward0_copy", expanded);
  t.add<gen::TBackward0>("TBackward0", kTransposed);
  t.add<gen::TBackward1>("TBackward1", kTransposed);
  t.add<gen::TBackward0_copy>("TBackward0_copy", kTransposed);
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
  t.add<gen::FlipBackward0>("FlipBackward0", [](Take& k, const gen::FlipBackward0& n) { k.integers(n.dims); }, flipped);
  t.add<gen::AsStridedBackward0>("AsStridedBackward0", read_strided<gen::AsStridedBackward0>, strided);
  // Reads and writes its cotangent's memory from its start, wherever in it the cotangent lies: what PyTorch makes of that only
  // its own calls can say.
  t.add<gen::AsStridedScatterBackward0>(
      "AsStridedScatterBackward0", [](Take&, const gen::AsStridedScatterBackward0&) { throw Unsupported("as_strided_scatter"); },
      [](const Site&) { return opaque(); });
  t.add<gen::AsStridedBackward1>("AsStridedBackward1", read_strided<gen::AsStridedBackward1>, strided);
  t.add<gen::AsStridedBackward0_copy>("AsStridedBackward0_copy", read_strided<gen::AsStridedBackward0_copy>, strided);
}

}  // namespace wengert::tape
