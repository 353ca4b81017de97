// Losses: reductions over all elements unless reduction is none.
#include <ATen/ExpandUtils.h>
#include <ATen/Functions.h>
#include <torch/csrc/autograd/generated/Functions.h>

#include "tape/build.h"

namespace wengert::tape {

namespace {

namespace gen = torch::autograd::generated;
using fused::ExprId;

constexpr std::int64_t kNoReduction = 0, kMean = 1;

struct TableOfElements {
  std::int64_t reduction;
  Slots tables;  // in the shape of the edge's input
};

// Coordinates over the elements of a loss: axes of the output, or new loops when it was reduced; the same numbers either way.
Pullback table_of_elements(const Site& s, const TableOfElements& p) {
  const Slot table = table_of(s, p.tables);
  if (!s.has(table, s.x())) return opaque();
  if (p.reduction == kNoReduction && s.x() != s.y()) return opaque();
  FactorBuilder f(s);
  const int rank = static_cast<int>(s.x().size());
  const ExprId factor = f.read(table, own_axes(rank));
  return f.finish(factor, p.reduction == kNoReduction ? Shape() : s.x(), own_axes(rank));
}

template <class N>
void add_tabulated(Table& t, const char* name) {
  t.add<N>(
      name, Op::reduction, [](Take& k, const N& n) { return TableOfElements{n.reduction, tabulate(k, 2)}; }, table_of_elements);
}

// Backward ops of losses are elementwise in (grad_output, self, target).
template <class N>
void add_tabulated_backward(Table& t, const char* name) {
  t.add<N>(name, Op::elementwise, [](Take& k, const N&) { return tabulate(k, 3); }, tabulated);
}

// A mean is divided by the elements of one argument or another, depending on the derivative and on vmap: PyTorch knows which.
template <class N>
std::int64_t mse_reduction(const Take& k, const N& n) {
  if (n.reduction == kMean && k.unpack(n.self_).sizes() != k.unpack(n.target_).sizes())
    throw Unsupported("the mean squared error of broadcast arguments");
  return n.reduction;
}

double mse_scale(std::int64_t reduction, const Shape& elements) {
  return reduction == kMean ? 2.0 / static_cast<double>(product(elements)) : 2.0;
}

struct Mse {
  std::int64_t reduction;
  Slot self, target;  // either of which may be broadcast
};
Pullback mse(const Site& s, const Mse& p) {
  if (!s.has(p.self) || !s.has(p.target)) return opaque();
  const Shape elements = at::infer_size(s.slot(p.self).sizes(), s.slot(p.target).sizes());
  const bool reduced = p.reduction != kNoReduction;
  const Slot own = s.input == 0 ? p.self : p.target, other = s.input == 0 ? p.target : p.self;
  if (!s.has(own, s.x()) || s.y() != (reduced ? Shape() : elements)) return opaque();
  FactorBuilder f(s);
  const auto read = [&](Slot slot) { return f.read(slot, broadcast(s.slot(slot).sizes(), elements)); };
  const ExprId slope = s.pool.mul(s.pool.sub(read(own), read(other)), f.constant(mse_scale(p.reduction, elements)));
  return f.finish(slope, reduced ? elements : Shape(), broadcast(s.x(), elements));
}

// y = scale (self - target) grad_output
struct MseBackward {
  std::int64_t reduction;
  Slot self, target, grad_output;
};
Pullback mse_backward(const Site& s, const MseBackward& p) {
  const double scale = mse_scale(p.reduction, s.y());
  FactorBuilder f(s);
  if (s.input != 0) {
    const ExprId g = f.read(p.grad_output);
    return f.complete() ? f.finish(s.pool.mul(g, f.constant(s.input == 1 ? scale : -scale))) : opaque();
  }
  const ExprId self = f.read(p.self), target = f.read(p.target);
  return f.complete() ? f.finish(s.pool.mul(s.pool.sub(self, target), f.constant(scale))) : opaque();
}

struct Likelihood {
  std::int64_t reduction;
  bool ignores;  // the derivative of ignored samples has to be selected
  Slot target;   // with ignored samples made harmless
  Slot scale;    // the factor of each sample, 0 for ignored ones
};

// What is infinite or nan does not reach the classes of an ignored sample, which a factor of 0 would let through. Whether there
// is one is asked of a CPU only, where the answer costs less than the masks that most targets then do without; a GPU would have
// to wait.  All that is more than the node itself takes for one row, but for nll_loss2d's,
// whose derivatives want cotangents that are contiguous.
template <class N>
Likelihood take_likelihood(Take& k, const N& n) {
  if (k.one_row() && !std::is_same_v<N, gen::NllLoss2DBackward0>) return {};
  const at::Tensor given = k.unpack(n.target_), weight = k.unpack(n.weight_);
  const at::Tensor absent = given == Take::concrete(n.ignore_index);
  const bool waits = !given.is_cpu();
  const bool ignores = !waits && absent.any().item<bool>(), masks = waits || ignores;
  at::Tensor target = given.to(at::kLong);
  if (masks) target = target.masked_fill(absent, 0);
  at::Tensor weights =
      weight.defined() ? weight.take(target) : at::ones(target.sizes(), target.options().dtype(k.node().outputs[0].dtype));
  if (masks) weights = weights.masked_fill(absent, 0);
  at::Tensor scale = n.reduction == kMean ? weights / -weights.sum() : -weights;
  if (masks && n.reduction == kMean) scale = scale.masked_fill(absent, 0);  // where all are ignored it is nan
  return {n.reduction, ignores, k.derived(target), k.derived(std::move(scale))};
}

ExprId likelihood_factor(const Site& s, FactorBuilder& f, const Likelihood& p, Axes where) {
  const ExprId scale = f.read(p.scale, std::move(where));
  return p.ignores ? f.select(scale, scale, fused::kZero) : scale;
}

// The class axis stands after the first axis, or alone.
Pullback nll(const Site& s, const Likelihood& p) {
  if (!s.has(p.target) || s.output != 0) return opaque();
  const Shape samples = s.slot(p.target).sizes().vec();
  const int depth = static_cast<int>(samples.size());
  if (static_cast<int>(s.x().size()) != depth + 1) return opaque();
  const Axes where = own_axes(depth);
  Axes axes = where;
  axes.insert(axes.begin() + (depth == 0 ? 0 : 1), looked_up(p.target, where));
  FactorBuilder f(s);
  const ExprId scale = likelihood_factor(s, f, p, where);
  return f.finish(scale, p.reduction == kNoReduction ? Shape() : samples, std::move(axes));
}

struct LikelihoodBackward {
  Likelihood of;
  Slot positions;  // of the samples' classes in the flattened output
};

LikelihoodBackward take_likelihood_backward(Take& k, const gen::NllLossBackwardBackward0& n) {
  LikelihoodBackward result{take_likelihood(k, n), {}};
  const Shape& y = k.node().outputs[0].shape;
  if (k.one_row() || y.size() > 2) return result;
  const at::Tensor target = k.unpack(n.target_).to(at::kLong);
  const at::Tensor harmless = target.masked_fill(target == Take::concrete(n.ignore_index), 0);
  result.positions = k.derived(y.size() < 2 ? harmless.reshape({1}) : at::arange(y[0], target.options()) * y[1] + harmless);
  return result;
}

// y[n, target[n]] = scale[n] grad_output[n]
Pullback nll_backward(const Site& s, const LikelihoodBackward& p) {
  if (s.input != 0) return zero();
  if (!s.has(p.of.scale) || !s.has(p.positions)) return opaque();
  const Shape samples = s.slot(p.of.scale).sizes().vec();
  Gather spread;
  spread.in_shape = s.x();
  spread.axes = broadcast(s.x(), samples);
  FactorBuilder f(s);
  spread.factor = f.factor(likelihood_factor(s, f, p.of, own_axes(static_cast<int>(samples.size()))));
  Term term = {Step(Reshape{{product(s.y())}}), Step(IndexScatter{{product(samples)}, 0, p.positions.number})};
  if (samples.size() != 1) term.push_back(Reshape{samples});
  term.push_back(std::move(spread));
  return terms({std::move(term)});
}

}  // namespace

void add_losses(Table& t) {
  t.add<gen::MseLossBackward0>(
      "MseLossBackward0", Op::reduction,
      [](Take& k, const gen::MseLossBackward0& n) { return Mse{mse_reduction(k, n), k.saved(n.self_), k.saved(n.target_)}; },
      mse);
  t.add<gen::MseLossBackwardBackward0>(
      "MseLossBackwardBackward0", Op::elementwise,
      [](Take& k, const gen::MseLossBackwardBackward0& n) {
        return MseBackward{mse_reduction(k, n), k.saved(n.self_, k.needs(0)), k.saved(n.target_, k.needs(0)),
                           k.saved(n.grad_output_, k.needs(1) || k.needs(2))};
      },
      mse_backward);
  add_tabulated<gen::SmoothL1LossBackward0>(t, "SmoothL1LossBackward0");
  add_tabulated<gen::HuberLossBackward0>(t, "HuberLossBackward0");
  add_tabulated<gen::SoftMarginLossBackward0>(t, "SoftMarginLossBackward0");
  add_tabulated<gen::BinaryCrossEntropyBackward0>(t, "BinaryCrossEntropyBackward0");
  add_tabulated<gen::BinaryCrossEntropyWithLogitsBackward0>(t, "BinaryCrossEntropyWithLogitsBackward0");
  add_tabulated_backward<gen::SmoothL1LossBackwardBackward0>(t, "SmoothL1LossBackwardBackward0");
  add_tabulated_backward<gen::HuberLossBackwardBackward0>(t, "HuberLossBackwardBackward0");
  add_tabulated_backward<gen::SoftMarginLossBackwardBackward0>(t, "SoftMarginLossBackwardBackward0");
  add_tabulated_backward<gen::BinaryCrossEntropyBackwardBackward0>(t, "BinaryCrossEntropyBackwardBackward0");
  t.add<gen::NllLossBackward0>("NllLossBackward0", Op::index, take_likelihood<gen::NllLossBackward0>, nll);
  t.add<gen::NllLoss2DBackward0>("NllLoss2DBackward0", Op::index, take_likelihood<gen::NllLoss2DBackward0>, nll);
  t.add<gen::NllLossBackwardBackward0>("NllLossBackwardBackward0", Op::scatter, take_likelihood_backward, nll_backward);
}

}  // namespace wengert::tape
