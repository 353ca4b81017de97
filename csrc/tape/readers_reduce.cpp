// Reductions: new loops run over the reduced axes; softmax and its kin are a diagonal plus an outer product.
#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/generated/Functions.h>

#include <cmath>
#include <string>

#include "tape/build.h"

namespace wengert::tape {

namespace {

namespace gen = torch::autograd::generated;
using fused::ExprId;
using fused::kOne;
using fused::kZero;
using fused::Prim;

// Every reduction row takes: ints keepdim, then the reduced axes (none = all).
Reduction geometry(const Site& s) {
  const std::int64_t rank = std::ssize(s.x());
  std::vector<int> axes = wrapped_axes(std::span(s.node.ints).subspan(1), rank);
  if (s.node.ints.size() == 1) {
    for (int a = 0; a < rank; ++a) axes.push_back(a);
  }
  return reduction(s.x(), axes, s.integer(0) != 0);
}

// Terms that cancel lose in half precision where they are stored in between; where PyTorch does better it answers.
void refuse_second_derivative_in_half(const Take& k, const char* of) {
  const bool half = at::isReducedFloatingType(k.node().outputs[0].dtype);
  if (half && at::GradMode::is_enabled()) throw Unsupported(std::string("a second derivative of ") + of + " in half precision");
}

// The table's own derivative is PyTorch's graph of quotients, which overflow where the products themselves do not.
void tabulate_products(Take& k) {
  refuse_second_derivative_in_half(k, "a product");
  tabulate(k, 1);
}

void take_axes(Take& k, bool keepdim, const std::vector<std::int64_t>& axes) {
  k.integer(keepdim);
  k.integers(axes);
}
void take_axes(Take& k, bool keepdim, const c10::OptionalArray<std::int64_t>& axes) {
  take_axes(k, keepdim, axes.list.value_or(std::vector<std::int64_t>()));
}

double count(const Reduction& r) {
  double n = 1;
  for (const std::int64_t extent : r.loops) n *= static_cast<double>(extent);
  return n;
}

std::vector<std::int64_t> concrete_axes(const Take& k, std::int64_t rank) {
  std::vector<std::int64_t> axes;
  for (const int a : wrapped_axes(std::span(k.node().ints).subspan(1), rank)) axes.push_back(a);
  if (k.node().ints.size() == 1) {
    for (std::int64_t a = 0; a < rank; ++a) axes.push_back(a);
  }
  return axes;
}

at::Tensor mean_of(const Take& k, const at::Tensor& self) {
  return self.dim() == 0 ? self : at::mean(self, concrete_axes(k, self.dim()), /*keepdim=*/true);
}

// The result of a reduction over the taken axes, with these axes back in place.
at::Tensor restored(const Take& k, at::Tensor result, std::int64_t rank) {
  if (k.node().ints[0] != 0 || rank == 0) return result;
  for (const std::int64_t axis : concrete_axes(k, rank)) result = result.unsqueeze(axis);
  return result;
}

Pullback sum(const Site& s) {
  Reduction r = geometry(s);
  return FactorBuilder(s).finish(kOne, std::move(r.loops), std::move(r.axes));
}

Pullback mean(const Site& s) {
  Reduction r = geometry(s);
  FactorBuilder f(s);
  const ExprId share = f.constant(1 / count(r));
  return f.finish(share, std::move(r.loops), std::move(r.axes));
}

// d var / dx = 2 (x - mean) / (n - correction); slots self, mean, result (of std).
Pullback spread(const Site& s, bool is_std) {
  Reduction r = geometry(s);
  const double freedom = count(r) - s.real(0);
  if (freedom <= 0) return opaque();
  FactorBuilder f(s);
  const ExprId self = f.read(0, r.axes), mean = f.read(1, r.kept);
  const ExprId result = is_std ? f.read(2) : fused::kNone;
  if (!f.complete()) return opaque();
  ExprId expr = f.constant(2 / freedom);
  if (is_std) {
    const ExprId slope = s.pool.div(kOne, s.pool.mul(result, f.constant(2)));
    expr = s.pool.mul(s.pool.pull(kOne, f.select(f.compare(Prim::eq, result, f.constant(0)), kZero, slope)), expr);
  }
  return f.finish(s.pool.mul(expr, s.pool.sub(self, mean)), std::move(r.loops), std::move(r.axes));
}

template <class N>
void take_spread(Take& k, const N& n) {
  take_axes(k, n.keepdim, n.dim);
  k.real(n.correction.value_or(at::Scalar(1)));
  const at::Tensor self = k.unpack(n.self_);
  k.derived(self);
  k.derived(mean_of(k, self));
}

// The derivative of softmax and log_softmax, whose result p or log p is the slot:
//   softmax:      dy_i = p_i (dx_i - sum_k p_k dx_k)    pulled back:  (v_i - sum_k v_k p_k) p_i
//   log_softmax:  dy_i = dx_i - sum_k p_k dx_k          pulled back:  v_i - p_i sum_k v_k
// The difference comes before the product: where probabilities are 0 and 1 it cancels exactly, which rounded products would not.
Pullback softmax(const Site& s, bool logarithm, int slot) {
  const int rank = static_cast<int>(s.x().size());
  if (rank == 0) return opaque();
  const int axis = wrap_axis(s.integer(0), rank);
  Axes along_loop = own_axes(rank);
  along_loop[axis] = along(rank);
  FactorBuilder outer(s), diagonal(s);
  const ExprId shares = logarithm ? outer.apply(Prim::exp, outer.read(slot, along_loop)) : outer.read(slot);
  const ExprId factor = logarithm ? kOne : diagonal.read(slot);
  if (!outer.complete()) return opaque();
  Pullback result = identity();
  result.terms.push_back(std::move(outer.finish(s.pool.neg(shares), {s.x()[axis]}, along_loop).terms[0]));
  if (!logarithm) result.after = std::move(diagonal.finish(factor).terms[0]);
  return result;
}

// The ops that softmax's backward is made of; slots grad_output (g), output (o).
//   softmax:      y = (g - sum_k g_k o_k) o       log_softmax:  y = g - exp(o) sum_k g_k
Pullback softmax_backward(const Site& s, bool logarithm) {
  const int rank = static_cast<int>(s.x().size());
  if (rank == 0 || !s.has(1)) return opaque();
  if (s.input == 0 && !logarithm) return softmax(s, false, 1);
  const int axis = wrap_axis(s.integer(0), rank);
  const std::vector<std::int64_t> loops = {s.x()[axis]};
  Axes at_loop = own_axes(rank);
  at_loop[axis] = along(rank);
  Pullback result = terms({});
  const auto add = [&](Pullback part) { result.terms.push_back(std::move(part.terms.at(0))); };
  if (s.input == 0) {
    FactorBuilder outer(s);
    add(identity());
    add(outer.finish(s.pool.neg(outer.apply(Prim::exp, outer.read(1))), loops, at_loop));
    return result;
  }
  if (!s.has(0)) return opaque();
  FactorBuilder total(s);
  const ExprId g_loop = total.read(0, at_loop);
  if (logarithm) {
    add(total.finish(s.pool.neg(s.pool.mul(g_loop, total.apply(Prim::exp, total.read(1)))), loops, own_axes(rank)));
    return result;
  }
  FactorBuilder diagonal(s), outer(s);
  add(diagonal.finish(diagonal.read(0)));
  add(total.finish(s.pool.neg(s.pool.mul(g_loop, total.read(1, at_loop))), loops, own_axes(rank)));
  const ExprId o = outer.read(1);
  add(outer.finish(s.pool.neg(s.pool.mul(o, outer.read(0, at_loop))), loops, at_loop));
  return result;
}

template <class N>
void add_softmax(Table& t, const char* name, Describe describe) {
  t.add<N>(
      name,
      [](Take& k, const N& n) {
        refuse_second_derivative_in_half(k, "softmax");
        k.integer(n.dim);
        k.result(n.result_);
      },
      describe);
}

template <class N>
void take_softmax_backward(Take& k, const N& n) {
  refuse_second_derivative_in_half(k, "softmax");
  k.integer(n.dim);
  k.slot(n.grad_output_, k.needs(1));
  k.slot(n.output_);
}

Pullback logsumexp(const Site& s) {
  if (s.node.ints.size() == 1 && !s.x().empty()) return opaque();
  Reduction r = geometry(s);
  FactorBuilder f(s);
  const ExprId self = f.read(0, r.axes), result = f.read(1);
  if (!f.complete()) return opaque();
  return f.finish(f.apply(Prim::exp, s.pool.sub(self, result)), std::move(r.loops), std::move(r.axes));
}

// amax and amin split evenly between ties; slots self, result, number of ties.
Pullback extreme(const Site& s) {
  Reduction r = geometry(s);
  FactorBuilder f(s);
  const ExprId self = f.read(0, r.axes), result = f.read(1), ties = f.read(2, r.kept);
  if (!f.complete()) return opaque();
  return f.finish(s.pool.div(f.compare(Prim::eq, self, result), ties), std::move(r.loops), std::move(r.axes));
}

template <class N>
void take_extreme(Take& k, const N& n) {
  take_axes(k, n.keepdim, n.dim);
  const at::Tensor self = k.unpack(n.self_), result = k.unpack(n.result_, /*is_result=*/true);
  const at::Tensor ties = self.detach() == restored(k, result.detach(), self.dim());
  k.derived(self);
  k.derived(result);
  k.derived(self.dim() == 0 ? ties : at::sum(ties, concrete_axes(k, self.dim()), /*keepdim=*/true));
}

// Reductions to one number by choice: the gradient is spread evenly over the chosen ones; slots chosen, number of them.
Pullback spread_evenly(const Site& s) {
  Reduction r = geometry(s);
  FactorBuilder f(s);
  const ExprId chosen = f.read(0, r.axes), ties = f.read(1);
  if (!f.complete()) return opaque();
  return f.finish(f.select(chosen, s.pool.div(kOne, ties), kZero), std::move(r.loops), std::move(r.axes));
}

template <class N>
void take_spread_evenly(Take& k, const N& n) {
  k.integer(std::int64_t{0});
  const at::Tensor self = k.unpack(n.self_).detach(), result = k.unpack(n.result_, /*is_result=*/true).detach();
  const at::Tensor chosen = at::where(result.isnan(), self.isnan(), self == result);
  k.derived(chosen);
  k.derived(chosen.sum());
}

// The largest magnitude is tabulated, other orders have a formula.  slots: the data, or the table; the norm.
Pullback norm(const Site& s) {
  Reduction r = geometry(s);
  FactorBuilder f(s);
  const double order = s.real(0);
  if (order == 0) return none();
  if (std::isinf(order) && !(s.has(0) && s.slot(0).sizes() == at::IntArrayRef(s.x()))) return opaque();
  const ExprId self = f.read(0, r.axes), result = std::isinf(order) || order == 1 ? kOne : f.read(1);
  if (!f.complete()) return opaque();
  const auto power = [&](ExprId base, double exponent) {
    const ExprId args[] = {base, f.constant(exponent)};
    return s.pool.apply(Prim::pow, args);
  };
  const auto is_zero = [&](ExprId value) { return f.compare(Prim::eq, value, f.constant(0)); };
  const auto finish = [&](ExprId slope) { return f.finish(slope, std::move(r.loops), std::move(r.axes)); };
  if (std::isinf(order)) return finish(self);
  const ExprId sign = f.apply(Prim::sign, self), magnitude = f.apply(Prim::abs, self);
  if (order == 1) return finish(sign);
  // Where the norm is 0 PyTorch masks in two ways: with a number that what arrives is multiplied by, ...
  if (order == 2) return finish(f.select(is_zero(result), f.constant(0), s.pool.div(self, result)));
  if (order < 1) {
    const ExprId own = s.pool.mul(sign, f.select(is_zero(self), f.constant(0), power(magnitude, order - 1)));
    return finish(s.pool.mul(own, power(result, 1 - order)));
  }
  // ... or what arrives itself, before it is multiplied.
  const ExprId own = order < 2 ? s.pool.mul(sign, power(magnitude, order - 1)) : s.pool.mul(self, power(magnitude, order - 2));
  const ExprId scale = f.select(is_zero(result), kZero, s.pool.div(kOne, power(result, order - 1)));
  return finish(s.pool.mul(s.pool.pull(kOne, scale), own));
}

void take_norm(Take& k, const SavedVariable& self, const SavedVariable& result, const at::Scalar& p) {
  k.real(p);
  const double order = k.node().reals[0];
  std::isinf(order) ? tabulate(k, 1) : k.slot(self);
  k.result(result, !std::isinf(order) && order != 1);
}

Pullback table_over_input(const Site& s) {
  Reduction r = geometry(s);
  if (!s.has(s.input) || s.slot(s.input).sizes() != at::IntArrayRef(s.x())) return opaque();
  FactorBuilder f(s);
  const ExprId table = f.read(s.input, r.axes);
  return f.finish(table, std::move(r.loops), std::move(r.axes));
}

void add_norms(Table& t) {
  t.add<gen::LinalgVectorNormBackward0>(
      "LinalgVectorNormBackward0",
      [](Take& k, const gen::LinalgVectorNormBackward0& n) {
        take_axes(k, n.keepdim, n.dim);
        take_norm(k, n.self_, n.result_, n.ord);
      },
      norm);
  t.add<gen::NormBackward0>(
      "NormBackward0",
      [](Take& k, const gen::NormBackward0& n) {
        k.integer(std::int64_t{0});
        take_norm(k, n.self_, n.result_, n.p);
      },
      norm);
  t.add<gen::NormBackward1>(
      "NormBackward1",
      [](Take& k, const gen::NormBackward1& n) {
        take_axes(k, n.keepdim, n.dim);
        take_norm(k, n.self_, n.result_, n.p.value_or(at::Scalar(2)));
      },
      norm);
  t.add<gen::DistBackward0>(
      "DistBackward0",
      [](Take& k, const gen::DistBackward0&) {
        k.integer(std::int64_t{0});
        tabulate(k, 2);
      },
      table_over_input);
}

void add_choices(Table& t) {
  t.add<gen::AmaxBackward0>("AmaxBackward0", take_extreme<gen::AmaxBackward0>, extreme);
  t.add<gen::AminBackward0>("AminBackward0", take_extreme<gen::AminBackward0>, extreme);
  t.add<gen::MaxBackward1>("MaxBackward1", take_spread_evenly<gen::MaxBackward1>, spread_evenly);
  t.add<gen::MinBackward1>("MinBackward1", take_spread_evenly<gen::MinBackward1>, spread_evenly);
  t.add<gen::MedianBackward0>("MedianBackward0", take_spread_evenly<gen::MedianBackward0>, spread_evenly);
  t.add<gen::NanmedianBackward0>("NanmedianBackward0", take_spread_evenly<gen::NanmedianBackward0>, spread_evenly);
}

}  // namespace

void add_reductions(Table& t) {
  t.add<gen::SumBackward0>("SumBackward0", [](Take& k, const gen::SumBackward0&) { k.integer(std::int64_t{0}); }, sum);
  t.add<gen::SumBackward1>("SumBackward1", [](Take& k, const gen::SumBackward1& n) { take_axes(k, n.keepdim, n.dim); }, sum);
  t.add<gen::MeanBackward0>("MeanBackward0", [](Take& k, const gen::MeanBackward0&) { k.integer(std::int64_t{0}); }, mean);
  t.add<gen::MeanBackward1>("MeanBackward1", [](Take& k, const gen::MeanBackward1& n) { take_axes(k, n.keepdim, n.dim); }, mean);
  t.add<gen::NansumBackward0>(
      "NansumBackward0",
      [](Take& k, const gen::NansumBackward0& n) {
        take_axes(k, n.keepdim, n.dim);
        k.slot(n.self_);
      },
      [](const Site& s) {
        Reduction r = geometry(s);
        FactorBuilder f(s);
        const ExprId self = f.read(0, r.axes);
        if (!f.complete()) return opaque();
        const ExprId counted = f.apply(Prim::logical_not, f.apply(Prim::isnan, self));
        return f.finish(counted, std::move(r.loops), std::move(r.axes));
      });
  t.add<gen::VarBackward0>("VarBackward0", take_spread<gen::VarBackward0>, [](const Site& s) { return spread(s, false); });
  t.add<gen::VarMeanBackward0>("VarMeanBackward0", take_spread<gen::VarMeanBackward0>,
                               [](const Site& s) { return s.output == 0 ? spread(s, false) : mean(s); });
  t.add<gen::StdBackward0>(
      "StdBackward0",
      [](Take& k, const gen::StdBackward0& n) {
        take_spread(k, n);
        k.result(n.result_);
      },
      [](const Site& s) { return spread(s, true); });
  t.add<gen::StdMeanBackward0>(
      "StdMeanBackward0",
      [](Take& k, const gen::StdMeanBackward0& n) {
        take_spread(k, n);
        k.result(n.result0_);
      },
      [](const Site& s) { return s.output == 0 ? spread(s, true) : mean(s); });
  add_softmax<gen::SoftmaxBackward0>(t, "SoftmaxBackward0", [](const Site& s) { return softmax(s, false, 0); });
  add_softmax<gen::SafeSoftmaxBackward0>(t, "SafeSoftmaxBackward0", [](const Site& s) { return softmax(s, false, 0); });
  add_softmax<gen::LogSoftmaxBackward0>(t, "LogSoftmaxBackward0", [](const Site& s) { return softmax(s, true, 0); });
  t.add<gen::SoftmaxBackwardDataBackward0>("SoftmaxBackwardDataBackward0",
                                           take_softmax_backward<gen::SoftmaxBackwardDataBackward0>,
                                           [](const Site& s) { return softmax_backward(s, false); });
  t.add<gen::LogSoftmaxBackwardDataBackward0>("LogSoftmaxBackwardDataBackward0",
                                              take_softmax_backward<gen::LogSoftmaxBackwardDataBackward0>,
                                              [](const Site& s) { return softmax_backward(s, true); });
  t.add<gen::LogsumexpBackward0>(
      "LogsumexpBackward0",
      [](Take& k, const gen::LogsumexpBackward0& n) {
        take_axes(k, n.keepdim, n.dim);
        k.slot(n.self_);
        k.result(n.result_);
      },
      logsumexp);
  t.add<gen::ProdBackward0>(
      "ProdBackward0",
      [](Take& k, const gen::ProdBackward0&) {
        k.integer(std::int64_t{0});
        tabulate_products(k);
      },
      table_over_input);
  t.add<gen::ProdBackward1>(
      "ProdBackward1",
      [](Take& k, const gen::ProdBackward1& n) {
        take_axes(k, n.keepdim, std::vector{n.dim});
        tabulate_products(k);
      },
      table_over_input);
  add_norms(t);
  add_choices(t);
}

}  // namespace wengert::tape
