// Activation functions, dropout, and the ops their backward passes consist of (they appear in graphs of gradients).
#include <torch/csrc/autograd/generated/Functions.h>

#include "tape/build.h"

namespace wengert::tape {

namespace {

namespace gen = torch::autograd::generated;
using fused::ExprId;
using fused::kNone;
using fused::kOne;
using fused::kZero;
using fused::Prim;

// The slope of an activation, from its argument or its result, with the numbers of the node.
template <class P>
using Slope = ExprId (*)(const Site&, FactorBuilder&, ExprId at, P with);

template <class P>
struct At {
  Slot saved;  // the argument or the result
  P with;
};
template <class P>
At(Slot, P) -> At<P>;

template <class P, Slope<P> slope>
Pullback activation(const Site& s, const At<P>& p) {
  FactorBuilder f(s);
  const ExprId at = f.read(p.saved);
  return f.complete() ? f.finish(slope(s, f, at, p.with)) : opaque();
}

template <class P>
struct BackwardAt {
  At<P> of;
  Slot grad_output;
};
template <class P>
BackwardAt(At<P>, Slot) -> BackwardAt<P>;

// y = g * slope(x): edge 0 is g, edge 1 is x.
template <class P, Slope<P> slope>
Pullback activation_backward(const Site& s, const BackwardAt<P>& p) {
  FactorBuilder f(s);
  const ExprId at = f.read(p.of.saved);
  if (!f.complete()) return opaque();
  const ExprId first = slope(s, f, at, p.of.with);
  if (first == kNone) return opaque();
  if (s.input == 0) return f.finish(first);
  const ExprId second = s.pool.derivative(first, 0);
  if (second == kZero) return zero();
  const ExprId g = f.read(p.grad_output);
  return f.complete() ? f.finish(s.pool.mul(g, second)) : opaque();
}

ExprId by_argument(const Site& s, FactorBuilder&, ExprId x, Nothing) {
  const ExprId args[] = {x};
  return s.pool.partial(s.node.reader->prim, 0, args, kNone);
}
ExprId by_result(const Site& s, FactorBuilder&, ExprId y, Nothing) {
  const ExprId args[] = {kNone};
  return s.pool.partial(s.node.reader->prim, 0, args, y);
}
ExprId with_one(const Site& s, FactorBuilder& f, ExprId x, double number) {
  const ExprId args[] = {x, f.constant(number)};
  return s.pool.partial(s.node.reader->prim, 0, args, kNone);
}

struct Two {
  double first, second;
};
ExprId with_two(const Site& s, FactorBuilder& f, ExprId x, Two numbers) {
  const ExprId args[] = {x, f.constant(numbers.first), f.constant(numbers.second)};
  return s.pool.partial(s.node.reader->prim, 0, args, kNone);
}

struct Elu {
  bool from_result;  // which for x <= 0 is negative * (exp(input_scale * x) - 1)
  double negative;   // alpha * scale
  double scale, input_scale;
};
ExprId elu(const Site& s, FactorBuilder& f, ExprId at, Elu with) {
  const ExprId negative = f.constant(with.negative), scale = f.constant(with.scale), input_scale = f.constant(with.input_scale);
  if (!with.from_result) {
    const ExprId args[] = {at, negative, scale, input_scale};
    return s.pool.partial(Prim::elu, 0, args, kNone);
  }
  const ExprId below = s.pool.mul(input_scale, s.pool.add(at, negative));
  const ExprId at_zero = s.pool.mul(input_scale, negative);  // PyTorch's second derivative there is 0
  return f.select(f.compare(Prim::lt, at, f.constant(0)), below,
                  f.select(f.compare(Prim::le, at, f.constant(0)), at_zero, scale));
}
template <class N>
Elu elu_of(const N& n, bool from_result) {
  return {from_result, n.alpha.toDouble() * n.scale.toDouble(), Take::number(n.scale), Take::number(n.input_scale)};
}
template <class N>
Elu celu_of(const N& n, bool from_result) {
  const double alpha = n.alpha.toDouble();
  return {from_result, alpha, 1.0, 1.0 / static_cast<double>(static_cast<float>(alpha))};  // as PyTorch rounds it
}

struct Gelu {
  bool tanh;
};
ExprId gelu(const Site& s, FactorBuilder&, ExprId x, Gelu approximate) {
  const ExprId args[] = {x};
  return s.pool.partial(approximate.tanh ? Prim::gelu_tanh : Prim::gelu_erf, 0, args, kNone);
}
ExprId threshold(const Site&, FactorBuilder& f, ExprId x, double at) {
  return f.select(f.compare(Prim::le, x, f.constant(at)), kZero, kOne);
}
ExprId shrunk(const Site& s, FactorBuilder& f, ExprId x, double lambda) {
  const ExprId inside[] = {f.compare(Prim::ge, x, f.constant(-lambda)), f.compare(Prim::le, x, f.constant(lambda))};
  return f.select(s.pool.apply(Prim::logical_and, inside), kZero, kOne);
}

// A row of the node's argument or result and of what `...` takes of the node `n`.
#define WENGERT_SELF_ROW(N, describe, prim, ...) \
  t.add<gen::N>(#N, Op::elementwise, [](Take& k, const gen::N& n) { return At{k.saved(n.self_), __VA_ARGS__}; }, (describe), prim)
#define WENGERT_RESULT_ROW(N, describe, prim, ...) \
  t.add<gen::N>(                                   \
      #N, Op::elementwise, [](Take& k, const gen::N& n) { return At{k.result(n.result_), __VA_ARGS__}; }, (describe), prim)
// The same for a backward op's node, and for one of a piecewise linear function: nothing flows to its argument, so that
// grad_output is not saved.
#define WENGERT_BACKWARD_ROW(N, field, describe, prim, ...)                                        \
  t.add<gen::N>(                                                                                   \
      #N, Op::elementwise,                                                                         \
      [](Take& k, const gen::N& n) {                                                               \
        return BackwardAt{At{k.saved(n.field), __VA_ARGS__}, k.saved(n.grad_output_, k.needs(1))}; \
      },                                                                                           \
      (describe), prim)
#define WENGERT_PIECEWISE_BACKWARD_ROW(N, describe, prim, ...)                                                             \
  t.add<gen::N>(                                                                                                           \
      #N, Op::elementwise, [](Take& k, const gen::N& n) { return BackwardAt{At{k.saved(n.self_), __VA_ARGS__}, Slot()}; }, \
      (describe), prim)

void add_plain(Table& t) {
  constexpr auto plain = activation<Nothing, by_argument>;
  constexpr auto one = activation<double, with_one>;
  constexpr auto two = activation<Two, with_two>;
  WENGERT_SELF_ROW(SiluBackward0, plain, Prim::silu, Nothing());
  WENGERT_SELF_ROW(MishBackward0, plain, Prim::mish, Nothing());
  WENGERT_SELF_ROW(LogSigmoidBackward0, plain, Prim::logsigmoid, Nothing());
  WENGERT_SELF_ROW(HardswishBackward0, plain, Prim::hardswish, Nothing());
  WENGERT_SELF_ROW(GeluBackward0, (activation<Gelu, gelu>), Prim::gelu_erf, Gelu{n.approximate == "tanh"});
  WENGERT_SELF_ROW(LeakyReluBackward0, one, Prim::leaky_relu, k.number(n.negative_slope));
  WENGERT_SELF_ROW(SoftplusBackward0, two, Prim::softplus, Two{k.number(n.beta), k.number(n.threshold)});
  WENGERT_SELF_ROW(HardtanhBackward0, two, Prim::hardtanh, Two{k.number(n.min_val), k.number(n.max_val)});
  WENGERT_SELF_ROW(ThresholdBackward0, (activation<double, threshold>), Prim::relu, k.number(n.threshold));
  WENGERT_SELF_ROW(ThresholdBackward1, (activation<double, threshold>), Prim::relu, k.number(n.threshold));
  WENGERT_SELF_ROW(HardshrinkBackward0, (activation<double, shrunk>), Prim::relu, k.number(n.lambd));
  WENGERT_SELF_ROW(SoftshrinkBackward0, (activation<double, shrunk>), Prim::relu, k.number(n.lambd));
  WENGERT_SELF_ROW(EluBackward0, (activation<Elu, elu>), Prim::elu, elu_of(n, false));
  WENGERT_SELF_ROW(CeluBackward0, (activation<Elu, elu>), Prim::elu, celu_of(n, false));
  WENGERT_RESULT_ROW(EluBackward1, (activation<Elu, elu>), Prim::elu, elu_of(n, true));
  WENGERT_RESULT_ROW(CeluBackward1, (activation<Elu, elu>), Prim::elu, celu_of(n, true));
  WENGERT_RESULT_ROW(ReluBackward0, (activation<Nothing, by_result>), Prim::relu, Nothing());
  // Its result has the sign of its argument, so the slope follows from it alike.
  WENGERT_RESULT_ROW(LeakyReluBackward1, one, Prim::leaky_relu, k.number(n.negative_slope));
}

void add_backward_ops(Table& t) {
  constexpr auto by_output = activation_backward<Nothing, by_result>;
  constexpr auto by_self = activation_backward<Nothing, by_argument>;
  constexpr auto one = activation_backward<double, with_one>;
  constexpr auto two = activation_backward<Two, with_two>;
  WENGERT_BACKWARD_ROW(SigmoidBackwardBackward0, output_, by_output, Prim::sigmoid, Nothing());
  WENGERT_BACKWARD_ROW(TanhBackwardBackward0, output_, by_output, Prim::tanh, Nothing());
  WENGERT_BACKWARD_ROW(HardswishBackwardBackward0, self_, by_self, Prim::hardswish, Nothing());
  WENGERT_BACKWARD_ROW(LogSigmoidBackwardBackward0, self_, by_self, Prim::logsigmoid, Nothing());
  WENGERT_BACKWARD_ROW(GeluBackwardBackward0, self_, (activation_backward<Gelu, gelu>), Prim::gelu_erf,
                       Gelu{n.approximate == "tanh"});
  WENGERT_BACKWARD_ROW(SoftplusBackwardBackward0, self_, two, Prim::softplus, Two{k.number(n.beta), k.number(n.threshold)});
  WENGERT_BACKWARD_ROW(EluBackwardBackward0, self_or_result_, (activation_backward<Elu, elu>), Prim::elu, elu_of(n, n.is_result));
  WENGERT_PIECEWISE_BACKWARD_ROW(ThresholdBackwardBackward0, (activation_backward<double, threshold>), Prim::relu,
                                 k.number(n.threshold));
  WENGERT_PIECEWISE_BACKWARD_ROW(LeakyReluBackwardBackward0, one, Prim::leaky_relu, k.number(n.negative_slope));
  WENGERT_PIECEWISE_BACKWARD_ROW(HardtanhBackwardBackward0, two, Prim::hardtanh, Two{k.number(n.min_val), k.number(n.max_val)});
  WENGERT_PIECEWISE_BACKWARD_ROW(HardshrinkBackwardBackward0, (activation_backward<double, shrunk>), Prim::relu,
                                 k.number(n.lambd));
  WENGERT_PIECEWISE_BACKWARD_ROW(SoftshrinkBackwardBackward0, (activation_backward<double, shrunk>), Prim::relu,
                                 k.number(n.lambd));
}

#undef WENGERT_SELF_ROW
#undef WENGERT_RESULT_ROW
#undef WENGERT_BACKWARD_ROW
#undef WENGERT_PIECEWISE_BACKWARD_ROW

struct Glu {
  std::int64_t dim;
  Slot self;
};
// glu(a, b) = a * sigmoid(b), a and b being the halves of x along dim.
Pullback glu(const Site& s, const Glu& p) {
  if (!s.has(p.self)) return opaque();
  const int rank = static_cast<int>(s.y().size());
  const int axis = wrap_axis(p.dim, rank);
  Axes upper = own_axes(rank);
  upper[axis].start = s.y()[axis];
  FactorBuilder gate(s), linear(s);
  const ExprId b = gate.read(p.self, upper), a = linear.read(p.self, own_axes(rank));
  Pullback result = gate.finish(gate.apply(Prim::sigmoid, b), {}, own_axes(rank));
  const ExprId args[] = {kNone};
  const ExprId slope = s.pool.partial(Prim::sigmoid, 0, args, linear.apply(Prim::sigmoid, linear.read(p.self, upper)));
  result.terms.push_back(std::move(linear.finish(s.pool.mul(a, slope), {}, upper).terms.at(0)));
  return result;
}

struct Prelu {
  Slot self, weight;  // the weight has the rank of self, with extents 1
};
Pullback prelu(const Site& s, const Prelu& p) {
  FactorBuilder f(s);
  const ExprId self = f.read(p.self);
  if (!f.complete()) return opaque();
  const ExprId positive = f.compare(Prim::gt, self, f.constant(0));
  if (s.input == 1) return f.finish(f.select(positive, kZero, self));
  const ExprId weight = f.read(p.weight);
  return f.complete() ? f.finish(f.select(positive, kOne, weight)) : opaque();
}

struct Dropout {
  double scale;
  Slot mask;
};
Pullback dropout(const Site& s, const Dropout& p) {
  FactorBuilder f(s);
  const ExprId mask = f.read(p.mask);
  return f.complete() ? f.finish(s.pool.mul(mask, f.constant(p.scale))) : opaque();
}

void add_rest(Table& t) {
  // PyTorch's slope is 1/6 rounded to single precision, and has no derivative of its own: both are best left to the node.
  t.add<gen::HardsigmoidBackward0>("HardsigmoidBackward0", Op::local, called_elementwise);
  t.add<gen::GluBackward0>(
      "GluBackward0", Op::elementwise, [](Take& k, const gen::GluBackward0& n) { return Glu{n.dim, k.saved(n.self_)}; }, glu);
  t.add<gen::PreluKernelBackward0>(
      "PreluKernelBackward0", Op::elementwise,
      [](Take& k, const gen::PreluKernelBackward0& n) { return Prelu{k.saved(n.self_), k.saved(n.weight_, k.needs(0))}; }, prelu);
  t.add<gen::NativeDropoutBackward0>(
      "NativeDropoutBackward0", Op::elementwise,
      [](Take& k, const gen::NativeDropoutBackward0& n) {
        return Dropout{!n.train.value_or(false) ? 1.0 : n.p == 1 ? 0.0 : 1.0 / (1.0 - n.p), k.result(n.result1_)};
      },
      dropout);
}

}  // namespace

void add_activations(Table& t) {
  add_plain(t);
  add_backward_ops(t);
  add_rest(t);
}

}  // namespace wengert::tape
