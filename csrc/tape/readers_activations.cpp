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

// The slope of an activation, from its argument or its result (operand 0), with the node's parameters (reals).
using Slope = ExprId (*)(const Site&, FactorBuilder&, ExprId);

// Slot 0: argument or result.
template <Slope slope>
Pullback activation(const Site& s) {
  FactorBuilder f(s);
  const ExprId at = f.read(0);
  return f.complete() ? f.finish(slope(s, f, at)) : opaque();
}

// y = g * slope(x): slots x, g; edge 0 is g, edge 1 is x.
template <Slope slope>
Pullback activation_backward(const Site& s) {
  FactorBuilder f(s);
  const ExprId at = f.read(0);
  if (!f.complete()) return opaque();
  const ExprId first = slope(s, f, at);
  if (first == kNone) return opaque();
  if (s.input == 0) return f.finish(first);
  const ExprId second = s.pool.derivative(first, 0);
  if (second == kZero) return zero();
  const ExprId g = f.read(1);
  return f.complete() ? f.finish(s.pool.mul(g, second)) : opaque();
}

ExprId by_argument(const Site& s, FactorBuilder&, ExprId x) {
  const ExprId args[] = {x};
  return s.pool.partial(s.node.reader->prim, 0, args, kNone);
}
ExprId by_result(const Site& s, FactorBuilder&, ExprId y) {
  const ExprId args[] = {kNone};
  return s.pool.partial(s.node.reader->prim, 0, args, y);
}
ExprId with_one(const Site& s, FactorBuilder& f, ExprId x) {
  const ExprId args[] = {x, f.real(0)};
  return s.pool.partial(s.node.reader->prim, 0, args, kNone);
}
ExprId with_two(const Site& s, FactorBuilder& f, ExprId x) {
  const ExprId args[] = {x, f.real(0), f.real(1)};
  return s.pool.partial(s.node.reader->prim, 0, args, kNone);
}
// reals: alpha * scale, scale, input_scale; int 0: read from the result, which for x <= 0 is negcoef (exp(..) - 1).
ExprId elu(const Site& s, FactorBuilder& f, ExprId at) {
  if (s.integer(0) == 0) {
    const ExprId args[] = {at, f.real(0), f.real(1), f.real(2)};
    return s.pool.partial(Prim::elu, 0, args, kNone);
  }
  const ExprId below = s.pool.mul(f.real(2), s.pool.add(at, f.real(0)));
  const ExprId at_zero = s.pool.mul(f.real(2), f.real(0));  // PyTorch's second derivative there is 0
  return f.select(f.compare(Prim::lt, at, f.constant(0)), below,
                  f.select(f.compare(Prim::le, at, f.constant(0)), at_zero, f.real(1)));
}
ExprId gelu(const Site& s, FactorBuilder&, ExprId x) {
  const ExprId args[] = {x};
  return s.pool.partial(s.integer(0) != 0 ? Prim::gelu_tanh : Prim::gelu_erf, 0, args, kNone);
}
ExprId threshold(const Site&, FactorBuilder& f, ExprId x) { return f.select(f.compare(Prim::le, x, f.real(0)), kZero, kOne); }
ExprId shrunk(const Site& s, FactorBuilder& f, ExprId x) {
  const ExprId inside[] = {f.compare(Prim::ge, x, f.constant(-s.real(0))), f.compare(Prim::le, x, f.real(0))};
  return f.select(s.pool.apply(Prim::logical_and, inside), kZero, kOne);
}

template <class N>
void take_elu(Take& k, const N& n) {
  k.real(n.alpha.toDouble() * n.scale.toDouble());
  k.real(n.scale);
  k.real(n.input_scale);
}
template <class N>
void take_celu(Take& k, const N& n) {
  const double alpha = n.alpha.toDouble();
  k.real(alpha);
  k.real(1.0);
  k.real(1.0 / static_cast<double>(static_cast<float>(alpha)));  // as PyTorch rounds it
}

// A row that takes parameters with `params` and slot 0 from self_.
#define WENGERT_SELF_ROW(N, describe, prim, ...) \
  t.add<gen::N>(                                 \
      #N,                                        \
      [](Take& k, const gen::N& n) {             \
        __VA_ARGS__;                             \
        k.slot(n.self_);                         \
      },                                         \
      describe, prim)
// The same for a backward op's node, whose slot 1 is grad_output_.
#define WENGERT_BACKWARD_ROW(N, field, describe, prim, ...) \
  t.add<gen::N>(                                            \
      #N,                                                   \
      [](Take& k, const gen::N& n) {                        \
        __VA_ARGS__;                                        \
        k.slot(n.field);                                    \
        k.slot(n.grad_output_, k.needs(1));                 \
      },                                                    \
      describe, prim)

void add_plain(Table& t) {
  WENGERT_SELF_ROW(SiluBackward0, activation<by_argument>, Prim::silu);
  WENGERT_SELF_ROW(MishBackward0, activation<by_argument>, Prim::mish);
  WENGERT_SELF_ROW(LogSigmoidBackward0, activation<by_argument>, Prim::logsigmoid);
  WENGERT_SELF_ROW(HardswishBackward0, activation<by_argument>, Prim::hardswish);
  WENGERT_SELF_ROW(GeluBackward0, activation<gelu>, Prim::gelu_erf, k.integer(n.approximate == "tanh"));
  WENGERT_SELF_ROW(LeakyReluBackward0, activation<with_one>, Prim::leaky_relu, k.real(n.negative_slope));
  WENGERT_SELF_ROW(SoftplusBackward0, activation<with_two>, Prim::softplus, k.real(n.beta); k.real(n.threshold));
  WENGERT_SELF_ROW(HardtanhBackward0, activation<with_two>, Prim::hardtanh, k.real(n.min_val); k.real(n.max_val));
  WENGERT_SELF_ROW(ThresholdBackward0, activation<threshold>, Prim::relu, k.real(n.threshold));
  WENGERT_SELF_ROW(ThresholdBackward1, activation<threshold>, Prim::relu, k.real(n.threshold));
  WENGERT_SELF_ROW(HardshrinkBackward0, activation<shrunk>, Prim::relu, k.real(n.lambd));
  WENGERT_SELF_ROW(SoftshrinkBackward0, activation<shrunk>, Prim::relu, k.real(n.lambd));
  WENGERT_SELF_ROW(EluBackward0, activation<elu>, Prim::elu, k.integer(std::int64_t{0}); take_elu(k, n));
  WENGERT_SELF_ROW(CeluBackward0, activation<elu>, Prim::elu, k.integer(std::int64_t{0}); take_celu(k, n));
  t.add<gen::ReluBackward0>(
      "ReluBackward0", [](Take& k, const gen::ReluBackward0& n) { k.result(n.result_); }, activation<by_result>, Prim::relu);
  t.add<gen::EluBackward1>(
      "EluBackward1",
      [](Take& k, const gen::EluBackward1& n) {
        k.integer(std::int64_t{1});
        take_elu(k, n);
        k.result(n.result_);
      },
      activation<elu>);
  t.add<gen::CeluBackward1>(
      "CeluBackward1",
      [](Take& k, const gen::CeluBackward1& n) {
        k.integer(std::int64_t{1});
        take_celu(k, n);
        k.result(n.result_);
      },
      activation<elu>);
  // Its result has the sign of its argument, so the slope follows from it alike.
  t.add<gen::LeakyReluBackward1>(
      "LeakyReluBackward1",
      [](Take& k, const gen::LeakyReluBackward1& n) {
        k.real(n.negative_slope);
        k.result(n.result_);
      },
      activation<with_one>, Prim::leaky_relu);
}

void add_backward_ops(Table& t) {
  WENGERT_BACKWARD_ROW(SigmoidBackwardBackward0, output_, activation_backward<by_result>, Prim::sigmoid);
  WENGERT_BACKWARD_ROW(TanhBackwardBackward0, output_, activation_backward<by_result>, Prim::tanh);
  WENGERT_BACKWARD_ROW(HardswishBackwardBackward0, self_, activation_backward<by_argument>, Prim::hardswish);
  WENGERT_BACKWARD_ROW(LogSigmoidBackwardBackward0, self_, activation_backward<by_argument>, Prim::logsigmoid);
  WENGERT_BACKWARD_ROW(GeluBackwardBackward0, self_, activation_backward<gelu>, Prim::gelu_erf,
                       k.integer(n.approximate == "tanh"));
  WENGERT_BACKWARD_ROW(SoftplusBackwardBackward0, self_, activation_backward<with_two>, Prim::softplus, k.real(n.beta);
                       k.real(n.threshold));
  WENGERT_BACKWARD_ROW(EluBackwardBackward0, self_or_result_, activation_backward<elu>, Prim::elu, k.integer(n.is_result);
                       take_elu(k, n));
  // Piecewise linear: nothing flows to the argument, so grad_output is not saved.
  WENGERT_SELF_ROW(ThresholdBackwardBackward0, activation_backward<threshold>, Prim::relu, k.real(n.threshold));
  WENGERT_SELF_ROW(LeakyReluBackwardBackward0, activation_backward<with_one>, Prim::leaky_relu, k.real(n.negative_slope));
  WENGERT_SELF_ROW(HardtanhBackwardBackward0, activation_backward<with_two>, Prim::hardtanh, k.real(n.min_val);
                   k.real(n.max_val));
  WENGERT_SELF_ROW(HardshrinkBackwardBackward0, activation_backward<shrunk>, Prim::relu, k.real(n.lambd));
  WENGERT_SELF_ROW(SoftshrinkBackwardBackward0, activation_backward<shrunk>, Prim::relu, k.real(n.lambd));
}

#undef WENGERT_SELF_ROW
#undef WENGERT_BACKWARD_ROW

// glu(a, b) = a * sigmoid(b), a and b being the halves of x along dim.
Pullback glu(const Site& s) {
  if (!s.has(0)) return opaque();
  const int rank = static_cast<int>(s.y().size());
  const int axis = wrap_axis(s.integer(0), rank);
  Axes upper = own_axes(rank);
  upper[axis].start = s.y()[axis];
  FactorBuilder gate(s), linear(s);
  const ExprId b = gate.read(0, upper), a = linear.read(0, own_axes(rank));
  Pullback result = gate.finish(gate.apply(Prim::sigmoid, b), {}, own_axes(rank));
  const ExprId args[] = {kNone};
  const ExprId slope = s.pool.partial(Prim::sigmoid, 0, args, linear.apply(Prim::sigmoid, linear.read(0, upper)));
  result.terms.push_back(std::move(linear.finish(s.pool.mul(a, slope), {}, upper).terms.at(0)));
  return result;
}

Pullback prelu(const Site& s) {  // slots self, weight; the weight has the rank of self, with extents 1
  FactorBuilder f(s);
  const ExprId self = f.read(0);
  if (!f.complete()) return opaque();
  const ExprId positive = f.compare(Prim::gt, self, f.constant(0));
  if (s.input == 1) return f.finish(f.select(positive, kZero, self));
  const ExprId weight = f.read(1);
  return f.complete() ? f.finish(f.select(positive, kOne, weight)) : opaque();
}

void add_rest(Table& t) {
  // PyTorch's slope is 1/6 rounded to single precision, and has no derivative of its own: both are best left to the node.
  t.add<gen::HardsigmoidBackward0>("HardsigmoidBackward0", called_elementwise);
  t.add<gen::GluBackward0>(
      "GluBackward0",
      [](Take& k, const gen::GluBackward0& n) {
        k.integer(n.dim);
        k.slot(n.self_);
      },
      glu);
  t.add<gen::PreluKernelBackward0>(
      "PreluKernelBackward0",
      [](Take& k, const gen::PreluKernelBackward0& n) {
        k.slot(n.self_);
        k.slot(n.weight_, k.needs(0));
      },
      prelu);
  t.add<gen::NativeDropoutBackward0>(
      "NativeDropoutBackward0",
      [](Take& k, const gen::NativeDropoutBackward0& n) {
        k.real(!n.train.value_or(false) ? 1.0 : n.p == 1 ? 0.0 : 1.0 / (1.0 - n.p));
        k.result(n.result1_);
      },
      [](const Site& s) {
        FactorBuilder f(s);
        const ExprId mask = f.read(0);
        return f.complete() ? f.finish(s.pool.mul(mask, f.real(0))) : opaque();
      });
}

}  // namespace

void add_activations(Table& t) {
  add_plain(t);
  add_backward_ops(t);
  add_rest(t);
}

}  // namespace wengert::tape
