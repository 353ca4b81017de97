// Elementwise arithmetic and functions: the factor is a partial from the primitive table.
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/headeronly/version.h>

#include "tape/build.h"

namespace wengert::tape {

namespace {

namespace gen = torch::autograd::generated;
using fused::ExprId;
using fused::kNone;
using fused::kOne;
using fused::kZero;
using fused::Prim;

// Unary functions whose derivative reads the argument, or the result.
Pullback by_self(const Site& s, Slot self) {
  FactorBuilder f(s);
  const ExprId args[] = {f.read(self)};
  return f.complete() ? f.finish(s.pool.partial(s.node.reader->prim, 0, args, kNone)) : opaque();
}
Pullback by_result(const Site& s, Slot saved) {
  FactorBuilder f(s);
  const ExprId args[] = {kNone};
  const ExprId result = f.read(saved);
  return f.complete() ? f.finish(s.pool.partial(s.node.reader->prim, 0, args, result)) : opaque();
}
template <class N>
void self_row(Table& t, const char* name, Prim prim) {
  t.add<N>(name, Op::elementwise, [](Take& k, const N& n) { return k.saved(n.self_); }, by_self, prim);
}
template <class N>
void result_row(Table& t, const char* name, Prim prim) {
  t.add<N>(name, Op::elementwise, [](Take& k, const N& n) { return k.result(n.result_); }, by_result, prim);
}

// Binary functions; what is not saved is not read by the partial.
struct Binary {
  Slot self, other;
};
struct BinaryWithResult {
  Binary of;
  Slot result;
};
Pullback by_both_and_result(const Site& s, const BinaryWithResult& p) {
  FactorBuilder f(s);
  const ExprId args[] = {f.read_if_saved(p.of.self), f.read_if_saved(p.of.other)};
  return f.finish(s.pool.partial(s.node.reader->prim, s.input, args, f.read_if_saved(p.result)));
}
Pullback by_both(const Site& s, const Binary& p) { return by_both_and_result(s, {p, Slot()}); }
// At ties and bounds PyTorch 2.14 chose anew: clamp with numbers gives 0 at a bound, where it gave 1; clamp with tensors, fmax
// and fmin give half to each side, as maximum always did.
constexpr bool kTiesShare = TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14;

template <class N>
void both_row(Table& t, const char* name, Prim prim) {
  t.add<N>(name, Op::elementwise, [](Take& k, const N& n) { return Binary{k.saved(n.self_), k.saved(n.other_)}; }, by_both, prim);
}

// x log(y) and x log1p(y).  The derivative in x is the same product again, 0 wherever the cotangent is 0 even if the logarithm is
// infinite: no factor times the cotangent, so the node is called.
template <class N>
void log_product_row(Table& t, const char* name, Prim prim) {
  t.add<N>(
      name, Op::elementwise,
      [](Take& k, const N& n) { return Binary{k.saved(n.self_, k.needs(1)), k.saved(n.other_, k.needs(1))}; },
      [](const Site& s, const Binary& p) { return s.input == 0 ? called_elementwise(s) : by_both(s, p); }, prim);
}

// Functions of a number and a tensor.
struct NumberAndTensor {
  double self;
  Slot other;
};
Pullback by_other(const Site& s, const NumberAndTensor& p) {
  FactorBuilder f(s);
  const ExprId args[] = {f.constant(p.self), f.read(p.other)};
  return f.complete() ? f.finish(s.pool.partial(s.node.reader->prim, 1, args, kNone)) : opaque();
}

Pullback sign_preserving(const Site& s) { return FactorBuilder(s).finish(kOne); }
Pullback negated(const Site& s) {
  FactorBuilder f(s);
  return f.finish(f.constant(-1));
}
Pullback nothing(const Site&) { return zero(); }
Pullback scaled(const Site& s, double by) {
  FactorBuilder f(s);
  return f.finish(f.constant(by));
}
Pullback divided(const Site& s, double by) {
  FactorBuilder f(s);
  return f.finish(s.pool.div(kOne, f.constant(by)));
}
Pullback first_scaled(const Site& s, double by) { return s.input == 0 ? scaled(s, by) : sign_preserving(s); }
Pullback second_scaled(const Site& s, double by) { return s.input == 0 ? sign_preserving(s) : scaled(s, by); }

template <class... N>
void zero_rows(Table& t, std::initializer_list<const char*> names) {
  auto name = names.begin();
  (t.add<N>(*name++, Op::zero, nothing), ...);
}

void add_sums(Table& t) {
  t.add<gen::AddBackward0>(
      "AddBackward0", Op::elementwise, [](Take& k, const gen::AddBackward0& n) { return k.number(n.alpha); }, second_scaled);
  t.add<gen::AddBackward1>("AddBackward1", Op::elementwise, sign_preserving);
  t.add<gen::SubBackward0>(
      "SubBackward0", Op::elementwise, [](Take& k, const gen::SubBackward0& n) { return k.number(-n.alpha); }, second_scaled);
  t.add<gen::SubBackward1>("SubBackward1", Op::elementwise, sign_preserving);
  t.add<gen::RsubBackward0>(
      "RsubBackward0", Op::elementwise, [](Take& k, const gen::RsubBackward0& n) { return k.number(-n.alpha); }, first_scaled);
  t.add<gen::RsubBackward1>(
      "RsubBackward1", Op::elementwise, [](Take& k, const gen::RsubBackward1& n) { return k.number(-n.alpha); }, scaled);
  t.add<gen::NegBackward0>("NegBackward0", Op::elementwise, negated);
  t.add<gen::ToCopyBackward0>("ToCopyBackward0", Op::elementwise, sign_preserving);
  t.add<gen::CloneBackward0>("CloneBackward0", Op::elementwise, sign_preserving);
  t.add<gen::AliasBackward0>("AliasBackward0", Op::view, sign_preserving);
  t.add<gen::AliasBackward0_copy>("AliasBackward0_copy", Op::view, sign_preserving);
  t.add<gen::LiftBackward0>("LiftBackward0", Op::view, sign_preserving);
  t.add<gen::LiftFreshBackward0>("LiftFreshBackward0", Op::view, sign_preserving);
  t.add<gen::FracBackward0>("FracBackward0", Op::elementwise, sign_preserving);
  t.add<gen::FmodBackward0>("FmodBackward0", Op::elementwise, sign_preserving);
  t.add<gen::RemainderBackward0>("RemainderBackward0", Op::elementwise, sign_preserving);
  t.add<gen::Deg2RadBackward0>("Deg2RadBackward0", Op::elementwise, [](const Site& s) { return scaled(s, M_PI / 180); });
  t.add<gen::Rad2DegBackward0>("Rad2DegBackward0", Op::elementwise, [](const Site& s) { return scaled(s, 180 / M_PI); });
}

// self + value * tensor1 * tensor2, or tensor1 / tensor2.
struct AddedProduct {
  double value;
  Slot tensor1, tensor2;
};

// With a rounding mode the quotient is a step function.
struct RoundedDiv {
  bool rounds;
  Binary of;
};
struct RoundedDivByNumber {
  bool rounds;
  double by;
};

void add_products(Table& t) {
  t.add<gen::MulBackward0>(
      "MulBackward0", Op::elementwise,
      [](Take& k, const gen::MulBackward0& n) { return Binary{k.saved(n.self_, k.needs(1)), k.saved(n.other_, k.needs(0))}; },
      [](const Site& s, const Binary& p) {
        FactorBuilder f(s);
        return f.finish(f.read(s.input == 0 ? p.other : p.self));
      });
  t.add<gen::MulBackward1>(
      "MulBackward1", Op::elementwise, [](Take& k, const gen::MulBackward1& n) { return k.number(n.other); }, scaled);
  t.add<gen::DivBackward0>(
      "DivBackward0", Op::elementwise,
      [](Take& k, const gen::DivBackward0& n) { return Binary{k.saved(n.self_, k.needs(1)), k.saved(n.other_)}; }, by_both,
      Prim::div);
  t.add<gen::DivBackward1>(
      "DivBackward1", Op::elementwise, [](Take& k, const gen::DivBackward1& n) { return k.number(n.other); }, divided);
  t.add<gen::DivBackward2>(
      "DivBackward2", Op::elementwise,
      [](Take& k, const gen::DivBackward2& n) {
        const bool rounds = n.rounding_mode.has_value();
        return RoundedDiv{rounds, {k.saved(n.self_, !rounds && k.needs(1)), k.saved(n.other_, !rounds)}};
      },
      [](const Site& s, const RoundedDiv& p) { return p.rounds ? zero() : by_both(s, p.of); }, Prim::div);
  t.add<gen::DivBackward3>(
      "DivBackward3", Op::elementwise,
      [](Take& k, const gen::DivBackward3& n) { return RoundedDivByNumber{n.rounding_mode.has_value(), k.number(n.other)}; },
      [](const Site& s, const RoundedDivByNumber& p) { return p.rounds ? zero() : divided(s, p.by); });
  t.add<gen::AddcmulBackward0>(
      "AddcmulBackward0", Op::elementwise,
      [](Take& k, const gen::AddcmulBackward0& n) {
        return AddedProduct{k.number(n.value), k.saved(n.tensor1_, k.needs(2)), k.saved(n.tensor2_, k.needs(1))};
      },
      [](const Site& s, const AddedProduct& p) {
        FactorBuilder f(s);
        if (s.input == 0) return f.finish(kOne);
        return f.finish(s.pool.mul(f.read(s.input == 1 ? p.tensor2 : p.tensor1), f.constant(p.value)));
      });
  t.add<gen::AddcdivBackward0>(
      "AddcdivBackward0", Op::elementwise,
      [](Take& k, const gen::AddcdivBackward0& n) {
        return AddedProduct{k.number(n.value), k.saved(n.tensor1_, k.needs(2)), k.saved(n.tensor2_, k.needs(1) || k.needs(2))};
      },
      [](const Site& s, const AddedProduct& p) {
        FactorBuilder f(s);
        if (s.input == 0) return f.finish(kOne);
        const ExprId below = f.read(p.tensor2);
        if (s.input == 1) return f.finish(s.pool.div(f.constant(p.value), below));
        const ExprId above = f.read(p.tensor1);
        if (!f.complete()) return opaque();
        return f.finish(s.pool.neg(s.pool.div(s.pool.mul(f.constant(p.value), above), s.pool.mul(below, below))));
      });
}

struct PowOfTensor {
  double exponent;
  Slot self;
};
struct PowOfNumber {
  double self;
  Slot exponent, result;
};
struct Ldexp {
  Slot other, result;
};

void add_powers(Table& t) {
  t.add<gen::PowBackward0>(
      "PowBackward0", Op::elementwise,
      [](Take& k, const gen::PowBackward0& n) { return PowOfTensor{k.number(n.exponent), k.saved(n.self_)}; },
      [](const Site& s, const PowOfTensor& p) {
        FactorBuilder f(s);
        if (p.exponent == 0) return zero();
        const ExprId args[] = {f.read(p.self), f.constant(p.exponent)};
        return f.complete() ? f.finish(s.pool.partial(Prim::pow, 0, args, kNone)) : opaque();
      });
  t.add<gen::PowBackward1>(
      "PowBackward1", Op::elementwise,
      [](Take& k, const gen::PowBackward1& n) {
        return BinaryWithResult{{k.saved(n.self_), k.saved(n.exponent_)}, k.result(n.result_, k.needs(1))};
      },
      by_both_and_result, Prim::pow);
  t.add<gen::PowBackward2>(
      "PowBackward2", Op::elementwise,
      [](Take& k, const gen::PowBackward2& n) {
        return PowOfNumber{k.number(n.self), k.saved(n.exponent_), k.result(n.result_)};
      },
      [](const Site& s, const PowOfNumber& p) {
        FactorBuilder f(s);
        const ExprId args[] = {f.constant(p.self), f.read(p.exponent)};
        const ExprId result = f.read(p.result);
        return f.complete() ? f.finish(s.pool.partial(Prim::pow, 1, args, result)) : opaque();
      });
  log_product_row<gen::XlogyBackward0>(t, "XlogyBackward0", Prim::xlogy);
  log_product_row<gen::SpecialXlog1PyBackward0>(t, "SpecialXlog1PyBackward0", Prim::xlog1py);
  t.add<gen::XlogyBackward1>(
      "XlogyBackward1", Op::elementwise,
      [](Take& k, const gen::XlogyBackward1& n) { return NumberAndTensor{k.number(n.self), k.saved(n.other_)}; }, by_other,
      Prim::xlogy);
  t.add<gen::XlogyBackward2>("XlogyBackward2", Op::local, called_elementwise);
  t.add<gen::SpecialXlog1PyBackward1>(
      "SpecialXlog1PyBackward1", Op::elementwise,
      [](Take& k, const gen::SpecialXlog1PyBackward1& n) { return NumberAndTensor{k.number(n.self), k.saved(n.other_)}; },
      by_other, Prim::xlog1py);
  t.add<gen::SpecialXlog1PyBackward2>("SpecialXlog1PyBackward2", Op::local, called_elementwise);
  t.add<gen::LdexpBackward0>(
      "LdexpBackward0", Op::elementwise,
      [](Take& k, const gen::LdexpBackward0& n) { return Ldexp{k.saved(n.other_, k.needs(0)), k.result(n.result_, k.needs(1))}; },
      [](const Site& s, const Ldexp& p) {
        FactorBuilder f(s);
        const ExprId read = f.read(s.input == 0 ? p.other : p.result);
        if (!f.complete()) return opaque();
        return f.finish(s.input == 0 ? f.apply(Prim::exp2, read) : s.pool.mul(read, f.constant(M_LN2)));
      });
}

struct Copysign {
  Slot self, result;
};
Pullback copysign(const Site& s, const Copysign& p) {
  if (s.input == 1) return zero();
  FactorBuilder f(s);
  const ExprId args[] = {f.read(p.self), kNone};
  const ExprId result = f.read(p.result);
  return f.complete() ? f.finish(s.pool.partial(Prim::copysign, 0, args, result)) : opaque();
}

struct Lerp {
  Slot self, end, weight;
};

void add_binary(Table& t) {
  both_row<gen::Atan2Backward0>(t, "Atan2Backward0", Prim::atan2);
  both_row<gen::LogaddexpBackward0>(t, "LogaddexpBackward0", Prim::logaddexp);
  both_row<gen::Logaddexp2Backward0>(t, "Logaddexp2Backward0", Prim::logaddexp2);
  both_row<gen::MaximumBackward0>(t, "MaximumBackward0", Prim::maximum);
  both_row<gen::MinimumBackward0>(t, "MinimumBackward0", Prim::minimum);
  both_row<gen::FmaxBackward0>(t, "FmaxBackward0", kTiesShare ? Prim::maximum : Prim::fmax);
  both_row<gen::FminBackward0>(t, "FminBackward0", kTiesShare ? Prim::minimum : Prim::fmin);
  both_row<gen::FmodBackward1>(t, "FmodBackward1", Prim::fmod);
  both_row<gen::RemainderBackward1>(t, "RemainderBackward1", Prim::remainder);
  t.add<gen::HypotBackward0>(
      "HypotBackward0", Op::elementwise,
      [](Take& k, const gen::HypotBackward0& n) {
        return BinaryWithResult{{k.saved(n.self_), k.saved(n.other_)}, k.result(n.result_)};
      },
      by_both_and_result, Prim::hypot);
  t.add<gen::CopysignBackward0>(
      "CopysignBackward0", Op::elementwise,
      [](Take& k, const gen::CopysignBackward0& n) {
        return Copysign{k.saved(n.self_, k.needs(0)), k.result(n.result_, k.needs(0))};
      },
      copysign);
  t.add<gen::CopysignBackward1>(
      "CopysignBackward1", Op::elementwise,
      [](Take& k, const gen::CopysignBackward1& n) { return Copysign{k.saved(n.self_), k.result(n.result_)}; }, copysign);
  t.add<gen::LerpBackward0>(
      "LerpBackward0", Op::elementwise, [](Take& k, const gen::LerpBackward0& n) { return k.number(n.weight); },
      [](const Site& s, double weight) { return scaled(s, s.input == 0 ? 1 - weight : weight); });
  t.add<gen::LerpBackward1>(
      "LerpBackward1", Op::elementwise,
      [](Take& k, const gen::LerpBackward1& n) {
        return Lerp{k.saved(n.self_, k.needs(2)), k.saved(n.end_, k.needs(2)), k.saved(n.weight_, k.needs(0) || k.needs(1))};
      },
      [](const Site& s, const Lerp& p) {
        FactorBuilder f(s);
        if (s.input == 2) {
          const ExprId self = f.read(p.self), end = f.read(p.end);
          return f.complete() ? f.finish(s.pool.sub(end, self)) : opaque();
        }
        const ExprId weight = f.read(p.weight);
        if (!f.complete()) return opaque();
        return f.finish(s.input == 0 ? s.pool.sub(kOne, weight) : weight);
      });
}

Pullback chosen(const Site& s, Slot condition, bool passes) {  // where the condition is what `passes` says
  FactorBuilder f(s);
  const ExprId holds = f.read(condition);
  if (!f.complete()) return opaque();
  return f.finish(passes ? f.select(holds, kOne, kZero) : f.select(holds, kZero, kOne));
}
Pullback where(const Site& s, Slot condition) { return chosen(s, condition, s.input == 0); }
Pullback mask_filled(const Site& s, Slot mask) { return chosen(s, mask, s.input != 0); }

constexpr Prim kAbove = kTiesShare ? Prim::gt : Prim::ge, kBelow = kTiesShare ? Prim::lt : Prim::le;

struct Bound {
  bool given;
  double at;
};
Bound bound(const std::optional<at::Scalar>& number) {
  return {number.has_value(), Take::number(number.value_or(at::Scalar(0)))};
}

struct Clamp {
  Bound min, max;
  Slot self;
};
Pullback clamped(const Site& s, const Clamp& p) {
  FactorBuilder f(s);
  const ExprId self = f.read(p.self);
  if (!f.complete()) return opaque();
  ExprId inside = kOne;
  if (p.max.given) inside = f.select(f.compare(kBelow, self, f.constant(p.max.at)), inside, kZero);
  if (p.min.given) inside = f.select(f.compare(kAbove, self, f.constant(p.min.at)), inside, kZero);
  return f.finish(inside);
}

// A table of 0, 1 and, at ties, 1/2: what it masks is 0 even where the cotangent is infinite.
Pullback clamped_by_tensors(const Site& s, const Slots& tables) {
  const Slot table = table_of(s, tables);
  if (!s.has(table, s.y())) return opaque();
  FactorBuilder f(s);
  const ExprId share = f.read(table);
  const ExprId given = f.select(f.compare(Prim::eq, share, f.constant(0.5)), f.constant(0.5), kOne);
  return f.finish(f.select(f.compare(Prim::ne, share, f.constant(0)), given, kZero));
}

// One bound: a tensor or a number; the comparison that lets self through is the row's primitive.
struct TensorBound {
  Slot self, bound;
};
Pullback bounded_by_tensor(const Site& s, const TensorBound& p) {
  FactorBuilder f(s);
  const ExprId self = f.read(p.self), bound = f.read(p.bound);
  if (!f.complete()) return opaque();
  const Prim within = s.node.reader->prim;
  if (kTiesShare) {
    const ExprId args[] = {self, bound};
    return f.finish(s.pool.partial(within == kAbove ? Prim::maximum : Prim::minimum, s.input, args, kNone));
  }
  if (s.input == 0) return f.finish(f.select(f.compare(within, self, bound), kOne, kZero));
  return f.finish(f.select(f.compare(within == kAbove ? Prim::lt : Prim::gt, self, bound), kOne, kZero));
}

struct NumberBound {
  double at;
  Slot self;
};
Pullback bounded_by_number(const Site& s, const NumberBound& p) {
  FactorBuilder f(s);
  const ExprId self = f.read(p.self);
  if (!f.complete()) return opaque();
  return f.finish(f.select(f.compare(s.node.reader->prim, self, f.constant(p.at)), kOne, kZero));
}

void add_selections(Table& t) {
  t.add<gen::WhereBackward0>(
      "WhereBackward0", Op::elementwise, [](Take& k, const gen::WhereBackward0& n) { return k.saved(n.condition_); }, where);
  t.add<gen::MaskedFillBackward0>(
      "MaskedFillBackward0", Op::elementwise, [](Take& k, const gen::MaskedFillBackward0& n) { return k.saved(n.mask_); },
      mask_filled);
  t.add<gen::MaskedFillBackward1>(
      "MaskedFillBackward1", Op::elementwise, [](Take& k, const gen::MaskedFillBackward1& n) { return k.saved(n.mask_); },
      mask_filled);
  t.add<gen::ClampBackward1>(
      "ClampBackward1", Op::elementwise,
      [](Take& k, const gen::ClampBackward1& n) { return Clamp{bound(n.min), bound(n.max), k.saved(n.self_)}; }, clamped);
  t.add<gen::ClampBackward0>(
      "ClampBackward0", Op::elementwise, [](Take& k, const gen::ClampBackward0&) { return tabulate(k, 3); }, clamped_by_tensors);
  t.add<gen::ClampMinBackward0>(
      "ClampMinBackward0", Op::elementwise,
      [](Take& k, const gen::ClampMinBackward0& n) { return NumberBound{k.number(n.min), k.saved(n.self_)}; }, bounded_by_number,
      kAbove);
  t.add<gen::ClampMaxBackward0>(
      "ClampMaxBackward0", Op::elementwise,
      [](Take& k, const gen::ClampMaxBackward0& n) { return NumberBound{k.number(n.max), k.saved(n.self_)}; }, bounded_by_number,
      kBelow);
  t.add<gen::ClampMinBackward1>(
      "ClampMinBackward1", Op::elementwise,
      [](Take& k, const gen::ClampMinBackward1& n) { return TensorBound{k.saved(n.self_), k.saved(n.min_)}; }, bounded_by_tensor,
      kAbove);
  t.add<gen::ClampMaxBackward1>(
      "ClampMaxBackward1", Op::elementwise,
      [](Take& k, const gen::ClampMaxBackward1& n) { return TensorBound{k.saved(n.self_), k.saved(n.max_)}; }, bounded_by_tensor,
      kBelow);
  zero_rows<gen::CeilBackward0, gen::FloorBackward0, gen::RoundBackward0, gen::RoundBackward1, gen::TruncBackward0,
            gen::SignBackward0, gen::BernoulliBackward0, gen::FillBackward0, gen::ZeroBackward0>(
      t, {"CeilBackward0", "FloorBackward0", "RoundBackward0", "RoundBackward1", "TruncBackward0", "SignBackward0",
          "BernoulliBackward0", "FillBackward0", "ZeroBackward0"});
}

struct Polygamma {
  std::int64_t order;
  Slot self;
};

void add_functions(Table& t) {
  self_row<gen::AbsBackward0>(t, "AbsBackward0", Prim::abs);
  self_row<gen::SinBackward0>(t, "SinBackward0", Prim::sin);
  self_row<gen::CosBackward0>(t, "CosBackward0", Prim::cos);
  self_row<gen::AsinBackward0>(t, "AsinBackward0", Prim::asin);
  self_row<gen::AcosBackward0>(t, "AcosBackward0", Prim::acos);
  self_row<gen::AtanBackward0>(t, "AtanBackward0", Prim::atan);
  self_row<gen::SinhBackward0>(t, "SinhBackward0", Prim::sinh);
  self_row<gen::CoshBackward0>(t, "CoshBackward0", Prim::cosh);
  self_row<gen::AsinhBackward0>(t, "AsinhBackward0", Prim::asinh);
  self_row<gen::AcoshBackward0>(t, "AcoshBackward0", Prim::acosh);
  self_row<gen::AtanhBackward0>(t, "AtanhBackward0", Prim::atanh);
  self_row<gen::LogBackward0>(t, "LogBackward0", Prim::log);
  self_row<gen::Log2Backward0>(t, "Log2Backward0", Prim::log2);
  self_row<gen::Log10Backward0>(t, "Log10Backward0", Prim::log10);
  self_row<gen::Log1PBackward0>(t, "Log1PBackward0", Prim::log1p);
  self_row<gen::ErfBackward0>(t, "ErfBackward0", Prim::erf);
  self_row<gen::ErfcBackward0>(t, "ErfcBackward0", Prim::erfc);
  self_row<gen::ErfinvBackward0>(t, "ErfinvBackward0", Prim::erfinv);
  self_row<gen::LgammaBackward0>(t, "LgammaBackward0", Prim::lgamma);
  self_row<gen::DigammaBackward0>(t, "DigammaBackward0", Prim::digamma);
  self_row<gen::SincBackward0>(t, "SincBackward0", Prim::sinc);
  result_row<gen::TanBackward0>(t, "TanBackward0", Prim::tan);
  result_row<gen::TanhBackward0>(t, "TanhBackward0", Prim::tanh);
  result_row<gen::SigmoidBackward0>(t, "SigmoidBackward0", Prim::sigmoid);
  result_row<gen::ExpBackward0>(t, "ExpBackward0", Prim::exp);
  result_row<gen::Exp2Backward0>(t, "Exp2Backward0", Prim::exp2);
  result_row<gen::Expm1Backward0>(t, "Expm1Backward0", Prim::expm1);
  result_row<gen::SqrtBackward0>(t, "SqrtBackward0", Prim::sqrt);
  result_row<gen::RsqrtBackward0>(t, "RsqrtBackward0", Prim::rsqrt);
  result_row<gen::ReciprocalBackward0>(t, "ReciprocalBackward0", Prim::reciprocal);
  t.add<gen::PolygammaBackward0>(
      "PolygammaBackward0", Op::elementwise,
      [](Take& k, const gen::PolygammaBackward0& n) { return Polygamma{n.n, k.saved(n.self_)}; },
      [](const Site& s, const Polygamma& p) {
        FactorBuilder f(s);
        const ExprId args[] = {f.constant(static_cast<double>(p.order)), f.read(p.self)};
        return f.complete() ? f.finish(s.pool.partial(Prim::polygamma, 1, args, kNone)) : opaque();
      });
}

template <class N>
void tabulated_row(Table& t, const char* name) {
  t.add<N>(name, Op::elementwise, [](Take& k, const N&) { return tabulate(k, 2); }, tabulated);
}

void add_tabulated(Table& t) {
  tabulated_row<gen::I0Backward0>(t, "I0Backward0");
  tabulated_row<gen::SpecialI0EBackward0>(t, "SpecialI0EBackward0");
  tabulated_row<gen::SpecialI1Backward0>(t, "SpecialI1Backward0");
  tabulated_row<gen::SpecialI1EBackward0>(t, "SpecialI1EBackward0");
  tabulated_row<gen::SpecialErfcxBackward0>(t, "SpecialErfcxBackward0");
  tabulated_row<gen::SpecialEntrBackward0>(t, "SpecialEntrBackward0");
  tabulated_row<gen::SpecialNdtriBackward0>(t, "SpecialNdtriBackward0");
  tabulated_row<gen::SpecialLogNdtrBackward0>(t, "SpecialLogNdtrBackward0");
  tabulated_row<gen::LogitBackward0>(t, "LogitBackward0");
  tabulated_row<gen::MvlgammaBackward0>(t, "MvlgammaBackward0");
  tabulated_row<gen::NanToNumBackward0>(t, "NanToNumBackward0");
}

}  // namespace

void add_elementwise(Table& t) {
  add_sums(t);
  add_products(t);
  add_powers(t);
  add_binary(t);
  add_selections(t);
  add_functions(t);
  add_tabulated(t);
}

}  // namespace wengert::tape
