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

// The reduced axes; none: all.
struct Over {
  bool keepdim = false;
  Integers axes = {};

  std::vector<int> of(std::int64_t rank) const {
    std::vector<int> result = wrapped_axes(axes, rank);
    if (axes.empty()) {
      for (int a = 0; a < rank; ++a) result.push_back(a);
    }
    return result;
  }
};

template <class N>
Over over(const N& n) {
  if constexpr (requires { n.dim.list; }) {
    return {n.keepdim, n.dim.list.has_value() ? Take::concrete(*n.dim.list) : Integers()};
  } else if constexpr (std::is_same_v<decltype(n.dim), std::int64_t>) {
    return {n.keepdim, {n.dim}};
  } else {
    return {n.keepdim, Take::concrete(n.dim)};
  }
}

Reduction geometry(const Site& s, const Over& over) { return reduction(s.x(), over.of(std::ssize(s.x())), over.keepdim); }

// Terms that cancel lose in half precision where they are stored in between; where PyTorch does better it answers.
void refuse_second_derivative_in_half(const Take& k, const char* of, bool is_one = at::GradMode::is_enabled()) {
  const bool half = at::isReducedFloatingType(k.node().outputs[0].dtype);
  if (half && is_one) throw Unsupported(std::string("a second derivative of ") + of + " in half precision");
}

// The table's own derivative is PyTorch's graph of quotients, which overflow where the products themselves do not.
Slots tabulate_products(Take& k) {
  refuse_second_derivative_in_half(k, "a product");
  return tabulate(k, 1);
}

double count(const Reduction& r) {
  double n = 1;
  for (const std::int64_t extent : r.loops) n *= static_cast<double>(extent);
  return n;
}

Integers axes_of(const Over& over, std::int64_t rank) {
  const std::vector<int> axes = over.of(rank);
  return Integers(axes.begin(), axes.end());
}

at::Tensor mean_of(const at::Tensor& self, const Over& over) {
  return self.dim() == 0 ? self : at::mean(self, axes_of(over, self.dim()), /*keepdim=*/true);
}

// The result of a reduction, with the reduced axes back in place.
at::Tensor restored(const Over& over, at::Tensor result, std::int64_t rank) {
  if (over.keepdim || rank == 0) return result;
  for (const std::int64_t axis : axes_of(over, rank)) result = result.unsqueeze(axis);
  return result;
}

Pullback sum(const Site& s, const Over& over) {
  Reduction r = geometry(s, over);
  return FactorBuilder(s).finish(kOne, std::move(r.loops), std::move(r.axes));
}

Pullback mean(const Site& s, const Over& over) {
  Reduction r = geometry(s, over);
  FactorBuilder f(s);
  const ExprId share = f.constant(1 / count(r));
  return f.finish(share, std::move(r.loops), std::move(r.axes));
}

struct Spread {
  Over over;
  double correction;
  Slot self, mean, deviation;  // the last of std only
};

// d var / dx = 2 (x - mean) / (n - correction)
Pullback spread(const Site& s, const Spread& p, bool is_std) {
  Reduction r = geometry(s, p.over);
  const double freedom = count(r) - p.correction;
  if (freedom <= 0) return opaque();
  FactorBuilder f(s);
  const ExprId self = f.read(p.self, r.axes), mean = f.read(p.mean, r.kept);
  const ExprId result = is_std ? f.read(p.deviation) : fused::kNone;
  if (!f.complete()) return opaque();
  ExprId expr = f.constant(2 / freedom);
  if (is_std) {
    const ExprId slope = s.pool.div(kOne, s.pool.mul(result, f.constant(2)));
    expr = s.pool.mul(s.pool.pull(kOne, f.select(f.compare(Prim::eq, result, f.constant(0)), kZero, slope)), expr);
  }
  return f.finish(s.pool.mul(expr, s.pool.sub(self, mean)), std::move(r.loops), std::move(r.axes));
}
Pullback variance(const Site& s, const Spread& p) { return s.output == 0 ? spread(s, p, false) : mean(s, p.over); }
Pullback deviation(const Site& s, const Spread& p) { return s.output == 0 ? spread(s, p, true) : mean(s, p.over); }

template <class N>
Spread take_spread(Take& k, const N& n) {
  const Over axes = over(n);
  const at::Tensor self = k.unpack(n.self_);
  Spread taken{axes, k.number(n.correction.value_or(at::Scalar(1))), k.derived(self), k.derived(mean_of(self, axes)), {}};
  if constexpr (requires { n.result_; }) {
    taken.deviation = k.result(n.result_);
  } else if constexpr (requires { n.result0_; }) {
    taken.deviation = k.result(n.result0_);
  }
  return taken;
}

// The derivative of softmax and log_softmax, whose result p or log p is the slot:
//   softmax:      dy_i = p_i (dx_i - sum_k p_k dx_k)    pulled back:  (v_i - sum_k v_k p_k) p_i
//   log_softmax:  dy_i = dx_i - sum_k p_k dx_k          pulled back:  v_i - p_i sum_k v_k
// The difference comes before the product: where probabilities are 0 and 1 it cancels exactly, which rounded products would not.
Pullback softmax_along(const Site& s, std::int64_t dim, Slot slot, bool logarithm) {
  const int rank = static_cast<int>(s.x().size());
  if (rank == 0) return opaque();
  const int axis = wrap_axis(dim, rank);
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

struct Softmax {
  std::int64_t dim;
  Slot result;
};
Pullback softmax(const Site& s, const Softmax& p) { return softmax_along(s, p.dim, p.result, false); }
Pullback log_softmax(const Site& s, const Softmax& p) { return softmax_along(s, p.dim, p.result, true); }

struct SoftmaxBackward {
  std::int64_t dim;
  Slot grad_output, output;
};

// The ops that softmax's backward is made of; g is grad_output, o is output.
//   softmax:      y = (g - sum_k g_k o_k) o       log_softmax:  y = g - exp(o) sum_k g_k
Pullback backward_of_softmax(const Site& s, const SoftmaxBackward& p, bool logarithm) {
  const int rank = static_cast<int>(s.x().size());
  if (rank == 0 || !s.has(p.output)) return opaque();
  if (s.input == 0 && !logarithm) return softmax_along(s, p.dim, p.output, false);
  const int axis = wrap_axis(p.dim, rank);
  const std::vector<std::int64_t> loops = {s.x()[axis]};
  Axes at_loop = own_axes(rank);
  at_loop[axis] = along(rank);
  Pullback result = terms({});
  const auto add = [&](Pullback part) { result.terms.push_back(std::move(part.terms.at(0))); };
  if (s.input == 0) {
    FactorBuilder outer(s);
    add(identity());
    add(outer.finish(s.pool.neg(outer.apply(Prim::exp, outer.read(p.output))), loops, at_loop));
    return result;
  }
  if (!s.has(p.grad_output)) return opaque();
  FactorBuilder total(s);
  const ExprId g_loop = total.read(p.grad_output, at_loop);
  if (logarithm) {
    add(total.finish(s.pool.neg(s.pool.mul(g_loop, total.apply(Prim::exp, total.read(p.output)))), loops, own_axes(rank)));
    return result;
  }
  FactorBuilder diagonal(s), outer(s);
  add(diagonal.finish(diagonal.read(p.grad_output)));
  add(total.finish(s.pool.neg(s.pool.mul(g_loop, total.read(p.output, at_loop))), loops, own_axes(rank)));
  const ExprId o = outer.read(p.output);
  add(outer.finish(s.pool.neg(s.pool.mul(o, outer.read(p.grad_output, at_loop))), loops, at_loop));
  return result;
}

Pullback softmax_backward(const Site& s, const SoftmaxBackward& p) { return backward_of_softmax(s, p, false); }
Pullback log_softmax_backward(const Site& s, const SoftmaxBackward& p) { return backward_of_softmax(s, p, true); }

template <class N>
void add_softmax(Table& t, const char* name, Pullback (*describe)(const Site&, const Softmax&)) {
  t.add<N>(
      name, Op::reduction,
      [](Take& k, const N& n) {
        refuse_second_derivative_in_half(k, "softmax");
        return Softmax{n.dim, k.result(n.result_)};
      },
      describe);
}

template <class N>
void add_softmax_backward(Table& t, const char* name, Pullback (*describe)(const Site&, const SoftmaxBackward&)) {
  t.add<N>(
      name, Op::reduction,
      [](Take& k, const N& n) {
        refuse_second_derivative_in_half(k, "softmax", true);
        return SoftmaxBackward{n.dim, k.saved(n.grad_output_, k.needs(1)), k.saved(n.output_)};
      },
      describe);
}

struct Logsumexp {
  Over over;
  Slot self, result;
};
Pullback logsumexp(const Site& s, const Logsumexp& p) {
  if (p.over.axes.empty() && !s.x().empty()) return opaque();
  Reduction r = geometry(s, p.over);
  FactorBuilder f(s);
  const ExprId self = f.read(p.self, r.axes), result = f.read(p.result);
  if (!f.complete()) return opaque();
  return f.finish(f.apply(Prim::exp, s.pool.sub(self, result)), std::move(r.loops), std::move(r.axes));
}

struct Nansum {
  Over over;
  Slot self;
};
Pullback nansum(const Site& s, const Nansum& p) {
  Reduction r = geometry(s, p.over);
  FactorBuilder f(s);
  const ExprId self = f.read(p.self, r.axes);
  if (!f.complete()) return opaque();
  const ExprId counted = f.apply(Prim::logical_not, f.apply(Prim::isnan, self));
  return f.finish(counted, std::move(r.loops), std::move(r.axes));
}

// amax and amin split evenly between ties.
struct Extreme {
  Over over;
  Slot self, result, ties;  // how many there are
};
Pullback extreme(const Site& s, const Extreme& p) {
  Reduction r = geometry(s, p.over);
  FactorBuilder f(s);
  const ExprId self = f.read(p.self, r.axes), result = f.read(p.result), ties = f.read(p.ties, r.kept);
  if (!f.complete()) return opaque();
  return f.finish(s.pool.div(f.compare(Prim::eq, self, result), ties), std::move(r.loops), std::move(r.axes));
}

template <class N>
void add_extreme(Table& t, const char* name) {
  t.add<N>(
      name, Op::reduction,
      [](Take& k, const N& n) {
        const Over axes = over(n);
        const at::Tensor self = k.unpack(n.self_), result = k.unpack(n.result_, /*is_result=*/true);
        const at::Tensor ties = self.detach() == restored(axes, result.detach(), self.dim());
        return Extreme{axes, k.derived(self), k.derived(result),
                       k.derived(self.dim() == 0 ? ties : at::sum(ties, axes_of(axes, self.dim()), /*keepdim=*/true))};
      },
      extreme);
}

// Reductions to one number by choice: the gradient is spread evenly over the chosen ones.
struct Choice {
  Slot chosen, count;
};
Pullback spread_evenly(const Site& s, const Choice& p) {
  Reduction r = geometry(s, {});
  FactorBuilder f(s);
  const ExprId chosen = f.read(p.chosen, r.axes), count = f.read(p.count);
  if (!f.complete()) return opaque();
  return f.finish(f.select(chosen, s.pool.div(kOne, count), kZero), std::move(r.loops), std::move(r.axes));
}

template <class N>
void add_choice(Table& t, const char* name) {
  t.add<N>(
      name, Op::reduction,
      [](Take& k, const N& n) {
        const at::Tensor self = k.unpack(n.self_).detach(), result = k.unpack(n.result_, /*is_result=*/true).detach();
        const at::Tensor chosen = at::where(result.isnan(), self.isnan(), self == result);
        return Choice{k.derived(chosen), k.derived(chosen.sum())};
      },
      spread_evenly);
}

// The largest magnitude is tabulated, other orders have a formula.
struct Norm {
  Over over;
  double order;
  Slot self, result;  // the first is the table where there is one
};
Pullback norm(const Site& s, const Norm& p) {
  Reduction r = geometry(s, p.over);
  FactorBuilder f(s);
  const double order = p.order;
  if (order == 0) return none();
  if (std::isinf(order) && !s.has(p.self, s.x())) return opaque();
  const ExprId self = f.read(p.self, r.axes), result = std::isinf(order) || order == 1 ? kOne : f.read(p.result);
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

template <class N>
Norm take_norm(Take& k, const N& n, Over over, const at::Scalar& p) {
  const double order = k.number(p);
  const Slot self = std::isinf(order) ? tabulate(k, 1)[0] : k.saved(n.self_);
  return {std::move(over), order, self, k.result(n.result_, !std::isinf(order) && order != 1)};
}

struct TableOver {
  Over over;
  Slots tables;  // in the shape of the edge's input
};
Pullback table_over_input(const Site& s, const TableOver& p) {
  Reduction r = geometry(s, p.over);
  const Slot table = table_of(s, p.tables);
  if (!s.has(table, s.x())) return opaque();
  FactorBuilder f(s);
  const ExprId factor = f.read(table, r.axes);
  return f.finish(factor, std::move(r.loops), std::move(r.axes));
}

void add_norms(Table& t) {
  t.add<gen::LinalgVectorNormBackward0>(
      "LinalgVectorNormBackward0", Op::reduction,
      [](Take& k, const gen::LinalgVectorNormBackward0& n) { return take_norm(k, n, over(n), n.ord); }, norm);
  t.add<gen::NormBackward0>(
      "NormBackward0", Op::reduction, [](Take& k, const gen::NormBackward0& n) { return take_norm(k, n, {}, n.p); }, norm);
  t.add<gen::NormBackward1>(
      "NormBackward1", Op::reduction,
      [](Take& k, const gen::NormBackward1& n) { return take_norm(k, n, over(n), n.p.value_or(at::Scalar(2))); }, norm);
  t.add<gen::DistBackward0>(
      "DistBackward0", Op::reduction, [](Take& k, const gen::DistBackward0&) { return TableOver{{}, tabulate(k, 2)}; },
      table_over_input);
}

void add_choices(Table& t) {
  add_extreme<gen::AmaxBackward0>(t, "AmaxBackward0");
  add_extreme<gen::AminBackward0>(t, "AminBackward0");
  add_choice<gen::MaxBackward1>(t, "MaxBackward1");
  add_choice<gen::MinBackward1>(t, "MinBackward1");
  add_choice<gen::MedianBackward0>(t, "MedianBackward0");
  add_choice<gen::NanmedianBackward0>(t, "NanmedianBackward0");
}

}  // namespace

void add_reductions(Table& t) {
  t.add<gen::SumBackward0>("SumBackward0", Op::reduction, [](const Site& s) { return sum(s, {}); });
  t.add<gen::SumBackward1>("SumBackward1", Op::reduction, [](Take&, const gen::SumBackward1& n) { return over(n); }, sum);
  t.add<gen::MeanBackward0>("MeanBackward0", Op::reduction, [](const Site& s) { return mean(s, {}); });
  t.add<gen::MeanBackward1>("MeanBackward1", Op::reduction, [](Take&, const gen::MeanBackward1& n) { return over(n); }, mean);
  t.add<gen::NansumBackward0>(
      "NansumBackward0", Op::reduction, [](Take& k, const gen::NansumBackward0& n) { return Nansum{over(n), k.saved(n.self_)}; },
      nansum);
  t.add<gen::VarBackward0>("VarBackward0", Op::reduction, take_spread<gen::VarBackward0>, variance);
  t.add<gen::VarMeanBackward0>("VarMeanBackward0", Op::reduction, take_spread<gen::VarMeanBackward0>, variance);
  t.add<gen::StdBackward0>("StdBackward0", Op::reduction, take_spread<gen::StdBackward0>, deviation);
  t.add<gen::StdMeanBackward0>("StdMeanBackward0", Op::reduction, take_spread<gen::StdMeanBackward0>, deviation);
  add_softmax<gen::SoftmaxBackward0>(t, "SoftmaxBackward0", softmax);
  add_softmax<gen::SafeSoftmaxBackward0>(t, "SafeSoftmaxBackward0", softmax);
  add_softmax<gen::LogSoftmaxBackward0>(t, "LogSoftmaxBackward0", log_softmax);
  add_softmax_backward<gen::SoftmaxBackwardDataBackward0>(t, "SoftmaxBackwardDataBackward0", softmax_backward);
  add_softmax_backward<gen::LogSoftmaxBackwardDataBackward0>(t, "LogSoftmaxBackwardDataBackward0", log_softmax_backward);
  t.add<gen::LogsumexpBackward0>(
      "LogsumexpBackward0", Op::reduction,
      [](Take& k, const gen::LogsumexpBackward0& n) { return Logsumexp{over(n), k.saved(n.self_), k.result(n.result_)}; },
      logsumexp);
  t.add<gen::ProdBackward0>(
      "ProdBackward0", Op::reduction, [](Take& k, const gen::ProdBackward0&) { return TableOver{{}, tabulate_products(k)}; },
      table_over_input);
  t.add<gen::ProdBackward1>(
      "ProdBackward1", Op::reduction,
      [](Take& k, const gen::ProdBackward1& n) { return TableOver{over(n), tabulate_products(k)}; }, table_over_input);
  add_norms(t);
  add_choices(t);
}

}  // namespace wengert::tape
