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

// Along one axis, through an index.
struct Along {
  std::int64_t dim;
  Slot index;
};

// One axis of the input is read through an index shaped like the output, or like the output without that axis.
Pullback picked(const Site& s, const Along& p) {
  if (!s.has(p.index)) return opaque();
  const int n = rank(s.x());
  if (n == 0) return s.y().empty() ? identity() : opaque();
  const int axis = wrap_axis(p.dim, n);
  const bool kept = rank(s.y()) == n;
  if (!s.has(p.index, s.y())) return opaque();
  Axes axes = own_axes(rank(s.y()));
  const AxisMap index = looked_up(p.index, own_axes(rank(s.y())));
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
      name, Op::index, [](Take& k, const N& n) { return Along{n.dim, k.result(n.indices_)}; },
      [](const Site& s, const Along& p) { return s.output == 0 ? picked(s, p) : opaque(); });
}

Pullback index_select(const Site& s, const Along& p) {  // the index is one-dimensional or a number
  if (!s.has(p.index)) return opaque();
  if (s.x().empty()) return s.y().empty() ? identity() : opaque();
  const int axis = wrap_axis(p.dim, rank(s.x()));
  Axes axes = own_axes(rank(s.x()));
  axes[axis] = looked_up(p.index, s.slot(p.index).dim() == 0 ? Axes() : Axes{along(axis)});
  return FactorBuilder(s).finish(kOne, {}, std::move(axes));
}

// x[i, :, j] and so on.
struct Indexed {
  Integers flags;  // one per axis of the indexed tensor
  Slots indices;   // of the flagged axes
};

struct Indexing {
  std::vector<int> axes;  // the indexed axes
  Shape shape;            // of the index tensors, broadcast
  bool adjacent = true;
  int first = 0;  // where the broadcast index axes stand in the result
};

Indexing indexing(const Site& s, const Indexed& p) {
  Indexing result;
  for (int a = 0; a < std::ssize(p.flags); ++a) {
    if (p.flags[a] == 0) continue;
    if (!result.axes.empty() && result.axes.back() != a - 1) result.adjacent = false;
    result.axes.push_back(a);
  }
  for (const Slot index : p.indices) {
    const at::IntArrayRef sizes = s.slot(index).sizes();
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
  Integers flags;
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

Indexed taken(Take& k, const Indices& indices) {
  Indexed result{indices.flags, {}};
  for (const at::Tensor& index : indices.tensors) result.indices.push_back(k.derived(index));
  return result;
}

Pullback indexed(const Site& s, const Indexed& p) {
  const Indexing at = indexing(s, p);
  if (p.indices.size() != at.axes.size()) return opaque();
  const int depth = rank(at.shape);
  Axes axes;
  int next = 0, index = 0;
  for (int a = 0; a < rank(s.x()); ++a) {
    if (next == at.first) next += depth;
    if (p.flags[a] == 0) {
      axes.push_back(along(next++));
      continue;
    }
    const Slot read = p.indices[index++];
    const at::IntArrayRef sizes = s.slot(read).sizes();
    Axes where;
    for (std::int64_t q = 0; q < std::ssize(sizes); ++q) {
      where.push_back(sizes[q] == 1 ? at_start(0) : along(static_cast<int>(at.first + depth - std::ssize(sizes) + q)));
    }
    axes.push_back(looked_up(read, std::move(where)));
  }
  return FactorBuilder(s).finish(kOne, {}, std::move(axes));
}

template <class N>
void add_index_read(Table& t, const char* name) {
  t.add<N>(
      name, Op::index, [](Take& k, const N& n) { return taken(k, unpack_indices(k, n, std::ssize(n.self_sym_sizes))); }, indexed);
}

// y with values written at indices.
struct IndexPut {
  Indexed at;
  bool accumulate;
  Slot flat;  // the flattened position of the indices
  Slot kept;  // what is left of self
};

template <class N>
IndexPut read_index_put(Take& k, const N& n) {
  const Shape& y = k.node().outputs[0].shape;
  const Indices indices = unpack_indices(k, n, std::ssize(y));
  IndexPut result{taken(k, indices), n.accumulate, {}, {}};
  at::Tensor flat;
  int next = 0;
  for (std::size_t a = 0; a < y.size(); ++a) {
    if (indices.flags[a] == 0) continue;
    const at::Tensor& index = indices.tensors[next++];
    const at::Tensor wrapped = at::where(index < 0, index + y[a], index);
    flat = flat.defined() ? flat * y[a] + wrapped : wrapped;
  }
  if (k.needs(1) && flat.defined()) result.flat = k.derived(flat.reshape({-1}));
  if (!k.needs(0) || n.accumulate) return result;
  c10::List<std::optional<at::Tensor>> list;
  int used = 0;
  for (const std::int64_t flag : indices.flags) {
    list.push_back(flag != 0 ? std::optional<at::Tensor>(indices.tensors[used++]) : std::nullopt);
  }
  result.kept = k.derived(k.flags(y).index_put_(list, k.flags({}).logical_not_()));
  return result;
}

Pullback index_put(const Site& s, const IndexPut& p) {
  if (s.input == 0) {
    if (p.accumulate) return identity();
    FactorBuilder f(s);
    const ExprId kept = f.read(p.kept);
    return f.complete() ? f.finish(f.select(kept, kOne, kZero)) : opaque();
  }
  const Indexing at = indexing(s, p.at);
  const std::size_t count = at.axes.size();
  if (count == 0 || p.at.indices.size() != count || !s.has(p.flat)) return opaque();
  Term term;
  Shape shape = s.y();  // of what the values are written into, indexed axes together
  if (!at.adjacent) {
    Gather permute;
    shape.clear();
    for (const bool wanted : {true, false}) {
      for (int a = 0; a < rank(s.y()); ++a) {
        if ((p.at.flags[a] != 0) != wanted) continue;
        shape.push_back(s.y()[a]);
        permute.axes.push_back(along(a));
      }
    }
    permute.in_shape = shape;
    term.push_back(std::move(permute));
  }
  const auto begin = shape.begin() + at.first, end = begin + static_cast<std::ptrdiff_t>(count);
  Shape joined(shape.begin(), begin), written(shape.begin(), begin), values(shape.begin(), begin);
  std::int64_t together = 1;
  for (auto extent = begin; extent != end; ++extent) together *= *extent;
  joined.push_back(together);
  written.push_back(product(at.shape));
  values.insert(values.end(), at.shape.begin(), at.shape.end());
  for (Shape* tail : {&joined, &written, &values}) tail->insert(tail->end(), end, shape.end());
  if (joined != shape) term.push_back(Reshape{joined});
  term.push_back(IndexScatter{written, at.first, p.flat.number});
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

template <class N>
void add_index_put(Table& t, const char* name) {
  t.add<N>(name, Op::scatter, read_index_put<N>, index_put);
}

// What a write along one axis leaves of self.
struct Kept {
  std::int64_t dim;
  Slot kept;
};
ExprId kept_along(const Site& s, FactorBuilder& f, const Kept& p) {
  return f.read(p.kept, s.y().empty() ? Axes{at_start(0)} : Axes{along(wrap_axis(p.dim, rank(s.y())))});
}
Pullback kept_part(const Site& s, const Kept& p) {
  FactorBuilder f(s);
  const ExprId kept = kept_along(s, f, p);
  return f.complete() ? f.finish(f.select(kept, kOne, kZero)) : opaque();
}
Pullback replaced_part(const Site& s, const Kept& p) {
  FactorBuilder f(s);
  const ExprId kept = kept_along(s, f, p);
  return f.complete() ? f.finish(f.select(kept, kZero, kOne)) : opaque();
}

Pullback written_along(const Site& s, const Along& p, double scale) {
  if (!s.has(p.index) || s.x().size() != s.y().size() || s.x().empty() || s.slot(p.index).dim() != 1) return opaque();
  const int axis = wrap_axis(p.dim, rank(s.y()));
  Term term = {Step(IndexScatter{s.x(), axis, p.index.number})};
  if (scale != 1) {
    Gather scaled;
    scaled.in_shape = s.x();
    scaled.axes = own_axes(rank(s.x()));
    scaled.factor.expr = s.pool.constant(scale);
    term.push_back(std::move(scaled));
  }
  return terms({std::move(term)});
}

Slot take_kept_part(Take& k, std::int64_t dim, const at::Tensor& index) {
  const Shape& y = k.node().outputs[0].shape;
  const std::int64_t extent = y.empty() ? 1 : y[wrap_axis(dim, std::ssize(y))];
  return k.derived(k.flags({extent}).index_fill_(0, index, 0));
}

template <class N>
void add_index_fill(Table& t, const char* name) {
  t.add<N>(
      name, Op::elementwise, [](Take& k, const N& n) { return Kept{n.dim, take_kept_part(k, n.dim, k.unpack(n.index_))}; },
      [](const Site& s, const Kept& p) { return s.input == 0 ? kept_part(s, p) : replaced_part(s, p); });
}

struct IndexAdd {
  Along at;
  double alpha;
};
struct IndexCopy {
  Along at;
  Slot kept;  // what is left of self
};

void add_along(Table& t) {
  t.add<gen::IndexSelectBackward0>(
      "IndexSelectBackward0", Op::index,
      [](Take& k, const gen::IndexSelectBackward0& n) { return Along{n.dim, k.saved(n.index_)}; }, index_select);
  t.add<gen::GatherBackward0>(
      "GatherBackward0", Op::index,
      [](Take& k, const gen::GatherBackward0& n) { return Along{n.dim, k.saved(n.index_, !n.sparse_grad)}; }, picked);
  t.add<gen::IndexAddBackward0>(
      "IndexAddBackward0", Op::scatter,
      [](Take& k, const gen::IndexAddBackward0& n) {
        return IndexAdd{{n.dim, k.saved(n.index_, k.needs(1))}, k.number(n.alpha)};
      },
      [](const Site& s, const IndexAdd& p) { return s.input == 0 ? identity() : written_along(s, p.at, p.alpha); });
  t.add<gen::IndexCopyBackward0>(
      "IndexCopyBackward0", Op::scatter,
      [](Take& k, const gen::IndexCopyBackward0& n) {
        const at::Tensor index = k.unpack(n.index_);
        return IndexCopy{{n.dim, k.derived(index)}, take_kept_part(k, n.dim, index)};
      },
      [](const Site& s, const IndexCopy& p) {
        return s.input == 0 ? kept_part(s, {p.at.dim, p.kept}) : written_along(s, p.at, 1);
      });
  add_index_fill<gen::IndexFillBackward0>(t, "IndexFillBackward0");
  add_index_fill<gen::IndexFillBackward1>(t, "IndexFillBackward1");
}

// scatter and scatter_add.
struct Scattered {
  std::int64_t dim;
  Integers extents;  // of the index
  Slot kept;         // what is left of self; scatter_add keeps all of it
  Slot index;
};
Pullback scattered(const Site& s, const Scattered& p) {
  if (s.input == 0) {
    if (!s.has(p.kept)) return identity();
    FactorBuilder f(s);
    return f.finish(f.select(f.read(p.kept), kOne, kZero));
  }
  const int n = rank(s.y());
  if (n == 0) return opaque();
  const int axis = wrap_axis(p.dim, n);
  if (!std::equal(s.x().begin(), s.x().end(), p.extents.begin(), p.extents.end())) return opaque();
  if (!s.has(p.index)) return opaque();
  Term term;
  Shape part = s.x();  // the index may cover only a corner of the other axes
  part[axis] = s.y()[axis];
  IndexScatter scatter{s.x(), axis, p.index.number, {}};
  Scatter corner{part, {}};
  for (int a = 0; a < n; ++a) {
    corner.axes.push_back({.in_axis = a});
    scatter.index_axes.push_back(a);
  }
  if (part != s.y()) term.push_back(std::move(corner));
  term.push_back(std::move(scatter));
  return terms({std::move(term)});
}

template <class N, bool overwrites>
void add_scatter(Table& t, const char* name) {
  t.add<N>(
      name, Op::scatter,
      [](Take& k, const N& n) {
        const at::Tensor index = k.unpack(n.index_);
        Scattered result{n.dim, Integers(index.sizes()), {}, {}};
        if (overwrites && k.needs(0)) result.kept = k.derived(k.flags(k.node().outputs[0].shape).scatter_(n.dim, index, 0));
        result.index = k.derived(index);
        return result;
      },
      scattered);
}

// Positions of every element of the output within the flattened input, which is broadcast to `over` first.
Pullback picked_flat(const Site& s, Slot positions, const Shape& over) {
  if (!s.has(positions, s.y())) return opaque();
  Gather gather;
  gather.in_shape = {product(over)};
  gather.axes = {looked_up(positions, own_axes(rank(s.y())))};
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

struct MaskedSelect {
  Integers shape;  // that mask and input are broadcast to
  Slot positions;
};
struct MaskedScatter {
  Slot mask, positions;
};

void add_masked(Table& t) {
  t.add<gen::MaskedSelectBackward0>(
      "MaskedSelectBackward0", Op::index,
      [](Take& k, const gen::MaskedSelectBackward0& n) {
        const std::vector<at::Tensor> both = at::broadcast_tensors({k.unpack(n.mask_), k.unpack(n.self_)});
        return MaskedSelect{Integers(both[0].sizes()), k.derived(both[0].reshape({-1}).nonzero().squeeze(1))};
      },
      [](const Site& s, const MaskedSelect& p) { return picked_flat(s, p.positions, Shape(p.shape.begin(), p.shape.end())); });
  t.add<gen::MaskedScatterBackward0>(
      "MaskedScatterBackward0", Op::scatter,
      [](Take& k, const gen::MaskedScatterBackward0& n) {
        const at::Tensor mask = k.unpack(n.mask_).expand(k.node().outputs[0].shape);
        return MaskedScatter{k.derived(mask), k.derived(mask.reshape({-1}).nonzero().squeeze(1))};
      },
      [](const Site& s, const MaskedScatter& p) {
        if (s.input == 0) {
          FactorBuilder f(s);
          return f.finish(f.select(f.read(p.mask), kZero, kOne));
        }
        if (!s.has(p.positions)) return opaque();
        const std::int64_t used = s.slot(p.positions).numel();
        if (used == 0) return zero();
        Term term = {Step(Reshape{{product(s.y())}}), Step(IndexScatter{{used}, 0, p.positions.number})};
        Gather front;
        front.in_shape = {product(s.x())};
        front.axes = {along(0)};
        if (used != front.in_shape[0]) term.push_back(front);
        term.push_back(Reshape{s.x()});
        return terms({std::move(term)});
      });
  t.add<gen::TakeBackward0>(
      "TakeBackward0", Op::index, [](Take& k, const gen::TakeBackward0& n) { return k.derived(as_index(k.unpack(n.index_))); },
      [](const Site& s, Slot positions) { return picked_flat(s, positions, s.x()); });
}

struct Embedding {
  std::int64_t padding;  // the index that receives no gradient; negative: none does
  bool plain;            // the node adds up plainly
  Slot indices;
};
Pullback embedding(const Site& s, const Embedding& p) {
  if (!s.has(p.indices) || !p.plain || rank(s.x()) != 2) return opaque();
  const int depth = rank(s.y()) - 1;
  FactorBuilder f(s);
  const Axes where = own_axes(depth);
  ExprId factor = kOne;
  if (p.padding >= 0)
    factor = f.select(f.compare(Prim::eq, f.read(p.indices, where), f.constant(double(p.padding))), kZero, kOne);
  return f.finish(factor, {}, {looked_up(p.indices, where), along(depth)});
}

struct EmbeddingBackward {
  std::int64_t padding;
  Slot indices, flat;  // the second is the first with one axis
};
Pullback embedding_backward(const Site& s, const EmbeddingBackward& p) {
  if (!s.has(p.indices) || !s.has(p.flat) || rank(s.y()) != 2) return opaque();
  const int depth = rank(s.x()) - 1;
  Term term = {Step(IndexScatter{{s.slot(p.flat).numel(), s.y()[1]}, 0, p.flat.number})};
  if (rank(s.x()) != 2) term.push_back(Reshape{s.x()});
  if (p.padding >= 0) {
    FactorBuilder f(s);
    const ExprId is_padding = f.compare(Prim::eq, f.read(p.indices, own_axes(depth)), f.constant(double(p.padding)));
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
      "EmbeddingBackward0", Op::index,
      [](Take& k, const gen::EmbeddingBackward0& n) {
        return Embedding{k.concrete(n.padding_idx), !n.scale_grad_by_freq && !n.sparse, k.saved(n.indices_)};
      },
      embedding);
  t.add<gen::EmbeddingDenseBackwardBackward0>(
      "EmbeddingDenseBackwardBackward0", Op::scatter,
      [](Take& k, const gen::EmbeddingDenseBackwardBackward0& n) {
        const at::Tensor indices = k.unpack(n.indices_);
        return EmbeddingBackward{k.concrete(n.padding_idx), k.derived(indices), k.derived(as_index(indices).reshape({-1}))};
      },
      embedding_backward);
}

}  // namespace

void add_index(Table& t) {
  add_along(t);
  add_picked<gen::MaxBackward0>(t, "MaxBackward0");
  add_picked<gen::MinBackward0>(t, "MinBackward0");
  add_picked<gen::MedianBackward1>(t, "MedianBackward1");
  add_picked<gen::NanmedianBackward1>(t, "NanmedianBackward1");
  add_picked<gen::ModeBackward0>(t, "ModeBackward0");
  add_picked<gen::KthvalueBackward0>(t, "KthvalueBackward0");
  add_picked<gen::SortBackward0>(t, "SortBackward0");
  add_picked<gen::SortBackward1>(t, "SortBackward1");
  add_picked<gen::TopkBackward0>(t, "TopkBackward0");
  add_index_read<gen::IndexBackward0>(t, "IndexBackward0");
  add_index_read<gen::UnsafeIndexBackward0>(t, "UnsafeIndexBackward0");
  add_index_put<gen::IndexPutBackward0>(t, "IndexPutBackward0");
  add_index_put<gen::UnsafeIndexPutBackward0>(t, "UnsafeIndexPutBackward0");
  add_index_put<gen::IndexPutImplBackward0>(t, "IndexPutImplBackward0");
  add_scatter<gen::ScatterBackward0, true>(t, "ScatterBackward0");
  add_scatter<gen::ScatterBackward1, true>(t, "ScatterBackward1");
  add_scatter<gen::ScatterAddBackward0, false>(t, "ScatterAddBackward0");
  add_masked(t);
  add_embedding(t);
}

}  // namespace wengert::tape
