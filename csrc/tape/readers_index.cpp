// Reads and writes through index tensors.
#include <ATen/Functions.h>
#include <torch/csrc/autograd/generated/Functions.h>

#include <algorithm>

#include "tape/build.h"

namespace wengert::tape {

namespace {

namespace gen = torch::autograd::generated;
using fused::ExprId;
using fused::kOne;
using fused::kZero;
using fused::Prim;

int rank(const Shape& shape) { return static_cast<int>(shape.size()); }

at::Tensor as_index(const at::Tensor& index) { return index.scalar_type() == at::kLong ? index : index.to(at::kLong); }

// One axis of the input is read through an index shaped like the output, or like the output without that axis.
Pullback picked(const Site& s) {  // ints: dim; slot 0: index
  if (!s.has(0)) return opaque();
  const int n = rank(s.x());
  if (n == 0) return s.y().empty() ? identity() : opaque();
  const int axis = wrap_axis(s.integer(0), n);
  const bool kept = rank(s.y()) == n;
  if (s.slot(0).sizes() != at::IntArrayRef(s.y())) return opaque();
  Axes axes = own_axes(rank(s.y()));
  const AxisMap index = looked_up(s.node.slots[0], own_axes(rank(s.y())));
  if (kept) {
    axes[axis] = index;
  } else {
    axes.insert(axes.begin() + axis, index);
  }
  return FactorBuilder(s).finish(kOne, {}, std::move(axes));
}

// The value of a reduction or reordering along one axis that also gives indices; these have no derivative.
template <class N>
void add_picked(Table& t, const char* name) {
  t.add<N>(
      name,
      [](Take& k, const N& n) {
        k.integer(n.dim);
        k.result(n.indices_);
      },
      [](const Site& s) { return s.output == 0 ? picked(s) : opaque(); });
}

Pullback index_select(const Site& s) {  // ints: dim; slot 0: index, one-dimensional or a number
  if (!s.has(0)) return opaque();
  if (s.x().empty()) return s.y().empty() ? identity() : opaque();
  const int axis = wrap_axis(s.integer(0), rank(s.x()));
  Axes axes = own_axes(rank(s.x()));
  axes[axis] = looked_up(s.node.slots[0], s.slot(0).dim() == 0 ? Axes() : Axes{along(axis)});
  return FactorBuilder(s).finish(kOne, {}, std::move(axes));
}

// x[i, :, j] and so on.  ints: one flag per axis of the indexed tensor; slots: the index tensors of the flagged axes.
struct Indexing {
  std::vector<int> axes;  // the indexed axes
  Shape shape;            // of the index tensors, broadcast
  bool adjacent = true;
  int first = 0;  // where the broadcast index axes stand in the result
};

Indexing indexing(const Site& s, int flags, int slots) {
  Indexing result;
  for (int a = 0; a < flags; ++a) {
    if (s.integer(a) == 0) continue;
    if (!result.axes.empty() && result.axes.back() != a - 1) result.adjacent = false;
    result.axes.push_back(a);
  }
  for (int k = 0; k < slots; ++k) {
    const at::IntArrayRef sizes = s.slot(k).sizes();
    if (sizes.size() > result.shape.size()) result.shape.insert(result.shape.begin(), sizes.size() - result.shape.size(), 1);
    for (std::size_t a = 0; a < sizes.size(); ++a) {
      std::int64_t& extent = result.shape[result.shape.size() - sizes.size() + a];
      if (sizes[a] != 1) extent = sizes[a];
    }
  }
  result.first = result.adjacent && !result.axes.empty() ? result.axes[0] : 0;
  return result;
}

// Masks become the index tensors of the axes they cover.
struct Indices {
  std::vector<std::int64_t> flags;
  std::vector<at::Tensor> tensors;
};

template <class N>
Indices unpack_indices(const Take& k, const N& n, std::int64_t axes) {
  Indices result;
  for (const at::Tensor& index : k.unpack(n.indices_, n.indices_released_)) {
    if (!index.defined()) {
      result.flags.push_back(0);
    } else if (index.scalar_type() == at::kBool || index.scalar_type() == at::kByte) {
      for (const at::Tensor& column : index.nonzero().unbind(1)) {
        result.flags.push_back(1);
        result.tensors.push_back(column);
      }
    } else {
      result.flags.push_back(1);
      result.tensors.push_back(as_index(index));
    }
  }
  result.flags.resize(axes, 0);
  return result;
}

template <class N>
void read_index(Take& k, const N& n) {
  const Indices indices = unpack_indices(k, n, std::ssize(n.self_sym_sizes));
  k.integers(indices.flags);
  for (const at::Tensor& index : indices.tensors) k.derived(index);
}

Pullback indexed(const Site& s) {
  const int slots = static_cast<int>(s.node.slots.size());
  const Indexing at = indexing(s, rank(s.x()), slots);
  if (slots != static_cast<int>(at.axes.size())) return opaque();
  const int depth = rank(at.shape);
  Axes axes;
  int next = 0, index = 0;
  for (int a = 0; a < rank(s.x()); ++a) {
    if (next == at.first) next += depth;
    if (s.integer(a) == 0) {
      axes.push_back(along(next++));
      continue;
    }
    const at::IntArrayRef sizes = s.slot(index).sizes();
    Axes where;
    for (std::int64_t q = 0; q < std::ssize(sizes); ++q) {
      where.push_back(sizes[q] == 1 ? at_start(0) : along(static_cast<int>(at.first + depth - std::ssize(sizes) + q)));
    }
    axes.push_back(looked_up(s.node.slots[index++], std::move(where)));
  }
  return FactorBuilder(s).finish(kOne, {}, std::move(axes));
}

// y with values written at indices.  Slots: the index tensors, their flattened position, what is left of self.
template <class N>
void read_index_put(Take& k, const N& n) {
  const Shape& y = k.node().outputs[0].shape;
  const Indices indices = unpack_indices(k, n, std::ssize(y));
  k.integers(indices.flags);
  k.integer(n.accumulate);
  for (const at::Tensor& index : indices.tensors) k.derived(index);
  at::Tensor flat;
  int next = 0;
  for (std::size_t a = 0; a < y.size(); ++a) {
    if (indices.flags[a] == 0) continue;
    const at::Tensor& index = indices.tensors[next++];
    const at::Tensor wrapped = at::where(index < 0, index + y[a], index);
    flat = flat.defined() ? flat * y[a] + wrapped : wrapped;
  }
  if (k.needs(1) && flat.defined()) {
    k.derived(flat.reshape({-1}));
  } else {
    k.no_slot();
  }
  if (!k.needs(0) || n.accumulate) return k.no_slot();
  c10::List<std::optional<at::Tensor>> list;
  int used = 0;
  for (const std::int64_t flag : indices.flags) {
    list.push_back(flag != 0 ? std::optional<at::Tensor>(indices.tensors[used++]) : std::nullopt);
  }
  k.derived(k.flags(y).index_put_(list, k.flags({}).logical_not_()));
}

Pullback index_put(const Site& s) {
  const int slots = static_cast<int>(s.node.slots.size()) - 2;
  const bool accumulate = s.integer(rank(s.y())) != 0;
  if (s.input == 0) {
    if (accumulate) return identity();
    FactorBuilder f(s);
    const ExprId kept = f.read(slots + 1);
    return f.complete() ? f.finish(f.select(kept, kOne, kZero)) : opaque();
  }
  const Indexing at = indexing(s, rank(s.y()), slots);
  if (slots == 0 || slots != static_cast<int>(at.axes.size()) || !s.has(slots)) return opaque();
  Term term;
  Shape shape = s.y();  // of what the values are written into, indexed axes together
  if (!at.adjacent) {
    Gather permute;
    shape.clear();
    for (const bool wanted : {true, false}) {
      for (int a = 0; a < rank(s.y()); ++a) {
        if ((s.integer(a) != 0) != wanted) continue;
        shape.push_back(s.y()[a]);
        permute.axes.push_back(along(a));
      }
    }
    permute.in_shape = shape;
    term.push_back(std::move(permute));
  }
  const auto begin = shape.begin() + at.first, end = begin + slots;
  Shape joined(shape.begin(), begin), written(shape.begin(), begin), values(shape.begin(), begin);
  std::int64_t together = 1;
  for (auto extent = begin; extent != end; ++extent) together *= *extent;
  joined.push_back(together);
  written.push_back(product(at.shape));
  values.insert(values.end(), at.shape.begin(), at.shape.end());
  for (Shape* tail : {&joined, &written, &values}) tail->insert(tail->end(), end, shape.end());
  if (joined != shape) term.push_back(Reshape{joined});
  term.push_back(IndexScatter{written, at.first, s.node.slots[slots]});
  if (values != written) term.push_back(Reshape{values});
  if (values != s.x()) {
    if (s.x().size() > values.size()) return opaque();
    Gather spread;
    spread.in_shape = s.x();
    spread.axes = broadcast(s.x(), values);
    term.push_back(std::move(spread));
  }
  return terms({std::move(term)});
}

// Along one axis: ints dim; slot 0 index, slot 1 what is left of self; real 0 a factor of the source.
Pullback kept_part(const Site& s, int slot) {
  const int axis = wrap_axis(s.integer(0), rank(s.y()));
  FactorBuilder f(s);
  const ExprId kept = f.read(slot, s.y().empty() ? Axes{at_start(0)} : Axes{along(axis)});
  return f.complete() ? f.finish(f.select(kept, kOne, kZero)) : opaque();
}

Pullback written_along(const Site& s, double scale) {
  if (!s.has(0) || s.x().size() != s.y().size() || s.x().empty() || s.slot(0).dim() != 1) return opaque();
  const int axis = wrap_axis(s.integer(0), rank(s.y()));
  Term term = {Step(IndexScatter{s.x(), axis, s.node.slots[0]})};
  if (scale != 1) {
    Gather scaled;
    scaled.in_shape = s.x();
    scaled.axes = own_axes(rank(s.x()));
    scaled.factor.expr = s.pool.constant(scale);
    term.push_back(std::move(scaled));
  }
  return terms({std::move(term)});
}

void take_kept_part(Take& k, std::int64_t dim, const at::Tensor& index) {
  const Shape& y = k.node().outputs[0].shape;
  const std::int64_t extent = y.empty() ? 1 : y[wrap_axis(dim, std::ssize(y))];
  k.derived(k.flags({extent}).index_fill_(0, index, 0));
}

template <class N>
void add_index_fill(Table& t, const char* name) {
  t.add<N>(
      name,
      [](Take& k, const N& n) {
        k.integer(n.dim);
        take_kept_part(k, n.dim, k.unpack(n.index_));
      },
      [](const Site& s) {
        if (s.input == 0) return kept_part(s, 0);
        const int axis = wrap_axis(s.integer(0), rank(s.y()));
        FactorBuilder f(s);
        const ExprId kept = f.read(0, s.y().empty() ? Axes{at_start(0)} : Axes{along(axis)});
        return f.complete() ? f.finish(f.select(kept, kZero, kOne)) : opaque();
      });
}

// scatter and scatter_add.
Pullback scattered(const Site& s) {  // ints: dim, extents of the index; slots: what is left of self, index
  if (s.input == 0) {
    if (!s.has(0)) return identity();  // scatter_add keeps all of self
    FactorBuilder f(s);
    return f.finish(f.select(f.read(0), kOne, kZero));
  }
  const int n = rank(s.y());
  if (n == 0) return opaque();
  const int axis = wrap_axis(s.integer(0), n);
  const bool whole = std::equal(s.x().begin(), s.x().end(), s.node.ints.begin() + 1, s.node.ints.end());
  if (!whole) return opaque();
  if (!s.has(1)) return opaque();
  Term term;
  Shape part = s.x();  // the index may cover only a corner of the other axes
  part[axis] = s.y()[axis];
  IndexScatter scatter{s.x(), axis, s.node.slots[1], {}};
  Scatter corner{part, {}};
  for (int a = 0; a < n; ++a) {
    corner.axes.push_back({.in_axis = a});
    scatter.index_axes.push_back(a);
  }
  if (part != s.y()) term.push_back(std::move(corner));
  term.push_back(std::move(scatter));
  return terms({std::move(term)});
}

template <class N>
void add_scatter(Table& t, const char* name, bool overwrites) {
  static const auto read = [](Take& k, const N& n, bool overwrites) {
    const at::Tensor index = k.unpack(n.index_);
    k.integer(n.dim);
    k.integers(index.sizes());
    if (overwrites && k.needs(0)) {
      k.derived(k.flags(k.node().outputs[0].shape).scatter_(n.dim, index, 0));
    } else {
      k.no_slot();
    }
    k.derived(index);
  };
  if (overwrites) {
    t.add<N>(name, [](Take& k, const N& n) { read(k, n, true); }, scattered);
  } else {
    t.add<N>(name, [](Take& k, const N& n) { read(k, n, false); }, scattered);
  }
}

// Flattened positions; slot 0: position of every element of the output within the flattened input.
Pullback picked_flat(const Site& s, const Shape& over) {
  if (!s.has(0) || s.slot(0).sizes() != at::IntArrayRef(s.y())) return opaque();
  Gather gather;
  gather.in_shape = {product(over)};
  gather.axes = {looked_up(s.node.slots[0], own_axes(rank(s.y())))};
  Term term = {Step(std::move(gather))};
  if (rank(over) != 1) term.push_back(Reshape{over});
  if (over != s.x()) {
    Gather spread;
    spread.in_shape = s.x();
    spread.axes = broadcast(s.x(), over);
    term.push_back(std::move(spread));
  }
  return terms({std::move(term)});
}

void add_masked(Table& t) {
  t.add<gen::MaskedSelectBackward0>(
      "MaskedSelectBackward0",
      [](Take& k, const gen::MaskedSelectBackward0& n) {
        const std::vector<at::Tensor> both = at::broadcast_tensors({k.unpack(n.mask_), k.unpack(n.self_)});
        k.integers(both[0].sizes());
        k.derived(both[0].reshape({-1}).nonzero().squeeze(1));
      },
      [](const Site& s) { return picked_flat(s, Shape(s.node.ints.begin(), s.node.ints.end())); });
  t.add<gen::MaskedScatterBackward0>(
      "MaskedScatterBackward0",
      [](Take& k, const gen::MaskedScatterBackward0& n) {
        const at::Tensor mask = k.unpack(n.mask_).expand(k.node().outputs[0].shape);
        k.derived(mask);
        k.derived(mask.reshape({-1}).nonzero().squeeze(1));
      },
      [](const Site& s) {
        if (s.input == 0) {
          FactorBuilder f(s);
          return f.finish(f.select(f.read(0), kZero, kOne));
        }
        if (!s.has(1)) return opaque();
        const std::int64_t used = s.slot(1).numel();
        if (used == 0) return zero();
        Term term = {Step(Reshape{{product(s.y())}}), Step(IndexScatter{{used}, 0, s.node.slots[1]})};
        Gather front;
        front.in_shape = {product(s.x())};
        front.axes = {along(0)};
        if (used != front.in_shape[0]) term.push_back(front);
        term.push_back(Reshape{s.x()});
        return terms({std::move(term)});
      });
  t.add<gen::TakeBackward0>(
      "TakeBackward0", [](Take& k, const gen::TakeBackward0& n) { k.derived(as_index(k.unpack(n.index_))); },
      [](const Site& s) { return picked_flat(s, s.x()); });
}

// Embedding: ints padding_idx, whether the node adds up plainly; slot 0 the indices.
Pullback embedding(const Site& s) {
  if (!s.has(0) || s.integer(1) == 0 || rank(s.x()) != 2) return opaque();
  const int depth = rank(s.y()) - 1;
  FactorBuilder f(s);
  const Axes where = own_axes(depth);
  ExprId factor = kOne;
  if (s.integer(0) >= 0) factor = f.select(f.compare(Prim::eq, f.read(0, where), f.constant(double(s.integer(0)))), kZero, kOne);
  return f.finish(factor, {}, {looked_up(s.node.slots[0], where), along(depth)});
}

Pullback embedding_backward(const Site& s) {  // slots: indices, flattened indices
  if (!s.has(0) || !s.has(1) || s.integer(1) == 0 || rank(s.y()) != 2) return opaque();
  const int depth = rank(s.x()) - 1;
  Term term = {Step(IndexScatter{{s.slot(1).numel(), s.y()[1]}, 0, s.node.slots[1]})};
  if (rank(s.x()) != 2) term.push_back(Reshape{s.x()});
  if (s.integer(0) >= 0) {
    FactorBuilder f(s);
    const ExprId is_padding = f.compare(Prim::eq, f.read(0, own_axes(depth)), f.constant(double(s.integer(0))));
    Gather masked;
    masked.in_shape = s.x();
    masked.axes = own_axes(rank(s.x()));
    masked.factor = f.factor(f.select(is_padding, kZero, kOne));
    term.push_back(std::move(masked));
  }
  return terms({std::move(term)});
}

void add_embedding(Table& t) {
  t.add<gen::EmbeddingBackward0>(
      "EmbeddingBackward0",
      [](Take& k, const gen::EmbeddingBackward0& n) {
        k.integer(n.padding_idx);
        k.integer(!n.scale_grad_by_freq && !n.sparse);
        k.slot(n.indices_);
      },
      embedding);
  t.add<gen::EmbeddingDenseBackwardBackward0>(
      "EmbeddingDenseBackwardBackward0",
      [](Take& k, const gen::EmbeddingDenseBackwardBackward0& n) {
        const at::Tensor indices = k.unpack(n.indices_);
        k.integer(n.padding_idx);
        k.integer(std::int64_t{1});
        k.derived(indices);
        k.derived(as_index(indices).reshape({-1}));
      },
      embedding_backward);
}

}  // namespace

void add_index(Table& t) {
  t.add<gen::IndexSelectBackward0>(
      "IndexSelectBackward0",
      [](Take& k, const gen::IndexSelectBackward0& n) {
        k.integer(n.dim);
        k.slot(n.index_);
      },
      index_select);
  t.add<gen::GatherBackward0>(
      "GatherBackward0",
      [](Take& k, const gen::GatherBackward0& n) {
        k.integer(n.dim);
        k.slot(n.index_, !n.sparse_grad);
      },
      picked);
  add_picked<gen::MaxBackward0>(t, "MaxBackward0");
  add_picked<gen::MinBackward0>(t, "MinBackward0");
  add_picked<gen::MedianBackward1>(t, "MedianBackward1");
  add_picked<gen::NanmedianBackward1>(t, "NanmedianBackward1");
  add_picked<gen::ModeBackward0>(t, "ModeBackward0");
  add_picked<gen::KthvalueBackward0>(t, "KthvalueBackward0");
  add_picked<gen::SortBackward0>(t, "SortBackward0");
  add_picked<gen::SortBackward1>(t, "SortBackward1");
  add_picked<gen::TopkBackward0>(t, "TopkBackward0");
  t.add<gen::IndexBackward0>("IndexBackward0", read_index<gen::IndexBackward0>, indexed);
  t.add<gen::UnsafeIndexBackward0>("UnsafeIndexBackward0", read_index<gen::UnsafeIndexBackward0>, indexed);
  t.add<gen::IndexPutBackward0>("IndexPutBackward0", read_index_put<gen::IndexPutBackward0>, index_put);
  t.add<gen::UnsafeIndexPutBackward0>("UnsafeIndexPutBackward0", read_index_put<gen::UnsafeIndexPutBackward0>, index_put);
  t.add<gen::IndexPutImplBackward0>("IndexPutImplBackward0", read_index_put<gen::IndexPutImplBackward0>, index_put);
  t.add<gen::IndexAddBackward0>(
      "IndexAddBackward0",
      [](Take& k, const gen::IndexAddBackward0& n) {
        k.integer(n.dim);
        k.real(n.alpha);
        k.slot(n.index_, k.needs(1));
      },
      [](const Site& s) { return s.input == 0 ? identity() : written_along(s, s.real(0)); });
  t.add<gen::IndexCopyBackward0>(
      "IndexCopyBackward0",
      [](Take& k, const gen::IndexCopyBackward0& n) {
        const at::Tensor index = k.unpack(n.index_);
        k.integer(n.dim);
        k.derived(index);
        take_kept_part(k, n.dim, index);
      },
      [](const Site& s) { return s.input == 0 ? kept_part(s, 1) : written_along(s, 1); });
  add_index_fill<gen::IndexFillBackward0>(t, "IndexFillBackward0");
  add_index_fill<gen::IndexFillBackward1>(t, "IndexFillBackward1");
  add_scatter<gen::ScatterBackward0>(t, "ScatterBackward0", true);
  add_scatter<gen::ScatterBackward1>(t, "ScatterBackward1", true);
  add_scatter<gen::ScatterAddBackward0>(t, "ScatterAddBackward0", false);
  add_masked(t);
  add_embedding(t);
}

}  // namespace wengert::tape
