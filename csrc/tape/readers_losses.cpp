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

// Coordinates over the elements of a loss: axes of the output, or new loops when it was reduced; the same numbers either way.
Pullback over_elements(const Site& s, FactorBuilder& f, ExprId expr) {
  std::vector<std::int64_t> loops;
  if (s.integer(0) != kNoReduction) loops = s.x();
  return f.finish(expr, std::move(loops), own_axes(static_cast<int>(s.x().size())));
}

// ints: reduction; one table for each edge.
Pullback table_of_elements(const Site& s) {
  if (!s.has(s.input) || s.slot(s.input).sizes() != at::IntArrayRef(s.x())) return opaque();
  if (s.integer(0) == kNoReduction && s.x() != s.y()) return opaque();
  FactorBuilder f(s);
  return over_elements(s, f, f.read(s.input, own_axes(static_cast<int>(s.x().size()))));
}

template <class N>
void add_tabulated(Table& t, const char* name) {
  t.add<N>(
      name,
      [](Take& k, const N& n) {
        k.integer(n.reduction);
        tabulate(k, 2);
      },
      table_of_elements);
}

// Backward ops of losses are elementwise in (grad_output, self, target).
template <class N>
void add_tabulated_backward(Table& t, const char* name) {
  t.add<N>(name, [](Take& k, const N&) { tabulate(k, 3); }, tabulated);
}

// A mean is divided by the elements of one argument or another, depending on the derivative and on vmap: PyTorch knows which.
template <class N>
void take_mse(Take& k, const N& n) {
  if (n.reduction == kMean && k.unpack(n.self_).sizes() != k.unpack(n.target_).sizes())
    throw Unsupported("the mean squared error of broadcast arguments");
  k.integer(n.reduction);
}

double mse_scale(const Site& s, const Shape& elements) {
  return s.integer(0) == kMean ? 2.0 / static_cast<double>(product(elements)) : 2.0;
}

// slots self, target, either of which may be broadcast
Pullback mse(const Site& s) {
  if (!s.has(0) || !s.has(1)) return opaque();
  const Shape elements = at::infer_size(s.slot(0).sizes(), s.slot(1).sizes());
  const bool reduced = s.integer(0) != kNoReduction;
  if (s.slot(s.input).sizes() != at::IntArrayRef(s.x()) || s.y() != (reduced ? Shape() : elements)) return opaque();
  FactorBuilder f(s);
  const auto read = [&](int slot) { return f.read(slot, broadcast(s.slot(slot).sizes(), elements)); };
  const ExprId slope = s.pool.mul(s.pool.sub(read(s.input), read(1 - s.input)), f.constant(mse_scale(s, elements)));
  return f.finish(slope, reduced ? elements : Shape(), broadcast(s.x(), elements));
}

// y = scale (self - target) grad_output; slots self, target, grad_output
Pullback mse_backward(const Site& s) {
  const double scale = mse_scale(s, s.y());
  FactorBuilder f(s);
  if (s.input != 0) {
    const ExprId g = f.read(2);
    return f.complete() ? f.finish(s.pool.mul(g, f.constant(s.input == 1 ? scale : -scale))) : opaque();
  }
  const ExprId self = f.read(0), target = f.read(1);
  return f.complete() ? f.finish(s.pool.mul(s.pool.sub(self, target), f.constant(scale))) : opaque();
}

// Negative log likelihood: ints are the reduction and whether the derivative of ignored samples has to be selected; slots are the
// target with ignored samples made harmless, and the factor of each sample, 0 for ignored ones.
struct Likelihood {
  at::Tensor target, scale;
  bool ignores;
};

// What is infinite or nan does not reach the classes of an ignored sample, which a factor of 0 would let through. Whether there
// is one is asked of a CPU only, where the answer costs less than the masks that most targets then do without; a GPU would have
// to wait.
Likelihood likelihood(const at::Tensor& target, const at::Tensor& weight, std::int64_t ignored, std::int64_t reduction,
                      at::ScalarType dtype) {
  const at::Tensor absent = target == ignored;
  const bool waits = !target.is_cpu();
  Likelihood result;
  result.ignores = !waits && absent.any().item<bool>();
  const bool masks = waits || result.ignores;
  result.target = target.to(at::kLong);
  if (masks) result.target = result.target.masked_fill(absent, 0);
  at::Tensor weights = weight.defined() ? weight.take(result.target) : at::ones(target.sizes(), target.options().dtype(dtype));
  if (masks) weights = weights.masked_fill(absent, 0);
  result.scale = reduction == kMean ? weights / -weights.sum() : -weights;
  return result;
}

template <class N>
void take_likelihood(Take& k, const N& n) {
  const Likelihood terms = likelihood(k.unpack(n.target_), k.unpack(n.weight_), Take::concrete(n.ignore_index), n.reduction,
                                      k.node().outputs[0].dtype);
  k.integer(n.reduction);
  k.integer(terms.ignores);
  k.derived(terms.target);
  k.derived(terms.scale);
}

ExprId likelihood_factor(const Site& s, FactorBuilder& f, Axes where) {
  const ExprId scale = f.read(1, std::move(where));
  return s.integer(1) != 0 ? f.select(scale, scale, fused::kZero) : scale;
}

// The class axis stands after the first axis, or alone.
Pullback nll(const Site& s) {
  if (!s.has(0) || s.output != 0) return opaque();
  const Shape samples = s.slot(0).sizes().vec();
  const int depth = static_cast<int>(samples.size());
  if (static_cast<int>(s.x().size()) != depth + 1) return opaque();
  const Axes where = own_axes(depth);
  Axes axes = where;
  axes.insert(axes.begin() + (depth == 0 ? 0 : 1), looked_up(s.node.slots[0], where));
  FactorBuilder f(s);
  const ExprId scale = likelihood_factor(s, f, where);
  return f.finish(scale, s.integer(0) == kNoReduction ? Shape() : samples, std::move(axes));
}

template <class N>
void take_likelihood_backward(Take& k, const N& n) {
  take_likelihood(k, n);
  const Shape& y = k.node().outputs[0].shape;
  if (y.size() > 2) return k.no_slot();
  const at::Tensor target = k.unpack(n.target_).to(at::kLong);
  const at::Tensor harmless = target.masked_fill(target == Take::concrete(n.ignore_index), 0);
  k.derived(y.size() < 2 ? harmless.reshape({1}) : at::arange(y[0], target.options()) * y[1] + harmless);
}

// y[n, target[n]] = scale[n] grad_output[n]
Pullback nll_backward(const Site& s) {
  if (s.input != 0) return zero();
  if (!s.has(1) || !s.has(2)) return opaque();
  const Shape samples = s.slot(1).sizes().vec();
  Gather spread;
  spread.in_shape = s.x();
  spread.axes = broadcast(s.x(), samples);
  FactorBuilder f(s);
  spread.factor = f.factor(likelihood_factor(s, f, own_axes(static_cast<int>(samples.size()))));
  Term term = {Step(Reshape{{product(s.y())}}), Step(IndexScatter{{product(samples)}, 0, s.node.slots[2]})};
  if (samples.size() != 1) term.push_back(Reshape{samples});
  term.push_back(std::move(spread));
  return terms({std::move(term)});
}

}  // namespace

void add_losses(Table& t) {
  t.add<gen::MseLossBackward0>(
      "MseLossBackward0",
      [](Take& k, const gen::MseLossBackward0& n) {
        take_mse(k, n);
        k.slot(n.self_);
        k.slot(n.target_);
      },
      mse);
  t.add<gen::MseLossBackwardBackward0>(
      "MseLossBackwardBackward0",
      [](Take& k, const gen::MseLossBackwardBackward0& n) {
        take_mse(k, n);
        k.slot(n.self_, k.needs(0));
        k.slot(n.target_, k.needs(0));
        k.slot(n.grad_output_, k.needs(1) || k.needs(2));
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
  t.add<gen::NllLossBackward0>("NllLossBackward0", take_likelihood<gen::NllLossBackward0>, nll);
  t.add<gen::NllLoss2DBackward0>("NllLoss2DBackward0", take_likelihood<gen::NllLoss2DBackward0>, nll);
  t.add<gen::NllLossBackwardBackward0>("NllLossBackwardBackward0", take_likelihood_backward<gen::NllLossBackwardBackward0>,
                                       nll_backward);
}

}  // namespace wengert::tape
