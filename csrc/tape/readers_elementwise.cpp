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
Pullback by_self(const Site& s) {
  FactorBuilder f(s);
  const ExprId args[] = {f.read(0)};
  return f.complete() ? f.finish(s.pool.partial(s.node.reader->prim, 0, args, kNone)) : opaque();
}
Pullback by_result(const Site& s) {
  FactorBuilder f(s);
  const ExprId args[] = {kNone};
  const ExprId result = f.read(0);
  return f.complete() ? f.finish(s.pool.partial(s.node.reader->prim, 0, args, result)) : opaque();
}
template <class N>
void self_row(Table& t, const char* name, Prim prim) {
  t.add<N>(name, [](Take& k, const N& n) { k.slot(n.self_); }, by_self, prim);
}
template <class N>
void result_row(Table& t, const char* name, Prim prim) {
  t.add<N>(name, [](Take& k, const N& n) { k.result(n.result_); }, by_result, prim);
}

// Binary functions: slots are self, other, result; those not saved are not read by the partial.
Pullback by_both(const Site& s) {
  FactorBuilder f(s);
  const ExprId args[] = {f.read_if_saved(0), f.read_if_saved(1)};
  return f.finish(s.pool.partial(s.node.reader->prim, s.input, args, f.read_if_saved(2)));
}
// At ties and bounds PyTorch 2.14 chose anew: clamp with numbers gives 0 at a bound, where it gave 1; clamp with tensors, fmax
// and fmin give half to each side, as maximum always did.
constexpr bool kTiesShare = TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14;

template <class N>
void both_row(Table& t, const char* name, Prim prim) {
  t.add<N>(
      name,
      [](Take& k, const N& n) {
        k.slot(n.self_);
        k.slot(n.other_);
      },
      by_both, prim);
}

// x log(y) and x log1p(y).  The derivative in x is the same product again, 0 wherever the cotangent is 0 even if the logarithm is
// infinite: no factor times the cotangent, so the node is called.
template <class N>
void log_product_row(Table& t, const char* name, Prim prim) {
  t.add<N>(
      name,
      [](Take& k, const N& n) {
        k.slot(n.self_, k.needs(1));
        k.slot(n.other_, k.needs(1));
      },
      [](const Site& s) { return s.input == 0 ? called_elementwise(s) : by_both(s); }, prim);
}

Pullback sign_preserving(const Site& s) { return FactorBuilder(s).finish(kOne); }
Pullback negated(const Site& s) {
  FactorBuilder f(s);
  return f.finish(f.constant(-1));
}
Pullback nothing(const Site&) { return zero(); }
Pullback scaled(const Site& s) {
  FactorBuilder f(s);
  return f.finish(f.real(0));
}

template <class... N>
void zero_rows(Table& t, std::initializer_list<const char*> names) {
  auto name = names.begin();
  (t.add<N>(*name++, nothing), ...);
}

void add_sums(Table& t) {
  t.add<gen::AddBackward0>(
      "AddBackward0", [](Take& k, const gen::AddBackward0& n) { k.real(n.alpha); },
      [](const Site& s) { return s.input == 0 ? sign_preserving(s) : scaled(s); });
  t.add<gen::AddBackward1>("AddBackward1", sign_preserving);
  t.add<gen::SubBackward0>(
      "SubBackward0", [](Take& k, const gen::SubBackward0& n) { k.real(-n.alpha); },
      [](const Site& s) { return s.input == 0 ? sign_preserving(s) : scaled(s); });
  t.add<gen::SubBackward1>("SubBackward1", sign_preserving);
  t.add<gen::RsubBackward0>(
      "RsubBackward0", [](Take& k, const gen::RsubBackward0& n) { k.real(-n.alpha); },
      [](const Site& s) { return s.input == 0 ? scaled(s) : sign_preserving(s); });
  t.add<gen::RsubBackward1>("RsubBackward1", [](Take& k, const gen::RsubBackward1& n) { k.real(-n.alpha); }, scaled);
  t.add<gen::NegBackward0>("NegBackward0", negated);
  t.add<gen::ToCopyBackward0>("ToCopyBackward0", sign_preserving);
  t.add<gen::CloneBackward0>("CloneBackward0", sign_preserving);
  t.add<gen::AliasBackward0>("AliasBackward0", sign_preserving);
  t.add<gen::AliasBackward0_copy>("AliasBackward0_copy", sign_preserving);
  t.add<gen::LiftBackward0>("LiftBackward0", sign_preserving);
  t.add<gen::LiftFreshBackward0>("LiftFreshBackward0", sign_preserving);
  t.add<gen::FracBackward0>("FracBackward0", sign_preserving);
  t.add<gen::FmodBackward0>("FmodBackward0", sign_preserving);
  t.add<gen::RemainderBackward0>("RemainderBackward0", sign_preserving);
  t.add<gen::Deg2RadBackward0>("Deg2RadBackward0", [](const Site& s) {
    FactorBuilder f(s);
    return f.finish(f.constant(M_PI / 180));
  });
  t.add<gen::Rad2DegBackward0>("Rad2DegBackward0", [](const Site& s) {
    FactorBuilder f(s);
    return f.finish(f.constant(180 / M_PI));
  });
}

void add_products(Table& t) {
  t.add<gen::MulBackward0>(
      "MulBackward0",
      [](Take& k, const gen::MulBackward0& n) {
        k.slot(n.self_, k.needs(1));
        k.slot(n.other_, k.needs(0));
      },
      [](const Site& s) {
        FactorBuilder f(s);
        return f.finish(f.read(1 - s.input));
      });
  t.add<gen::MulBackward1>("MulBackward1", [](Take& k, const gen::MulBackward1& n) { k.real(n.other); }, scaled);
  t.add<gen::DivBackward0>(
      "DivBackward0",
      [](Take& k, const gen::DivBackward0& n) {
        k.slot(n.self_, k.needs(1));
        k.slot(n.other_);
      },
      by_both, Prim::div);
  t.add<gen::DivBackward1>(
      "DivBackward1", [](Take& k, const gen::DivBackward1& n) { k.real(n.other); },
      [](const Site& s) {
        FactorBuilder f(s);
        return f.finish(s.pool.div(kOne, f.real(0)));
      });
  // With a rounding mode the quotient is a step function.
  t.add<gen::DivBackward2>(
      "DivBackward2",
      [](Take& k, const gen::DivBackward2& n) {
        k.integer(n.rounding_mode.has_value());
        k.slot(n.self_, !n.rounding_mode.has_value() && k.needs(1));
        k.slot(n.other_, !n.rounding_mode.has_value());
      },
      [](const Site& s) { return s.integer(0) ? zero() : by_both(s); }, Prim::div);
  t.add<gen::DivBackward3>(
      "DivBackward3",
      [](Take& k, const gen::DivBackward3& n) {
        k.integer(n.rounding_mode.has_value());
        k.real(n.other);
      },
      [](const Site& s) {
        if (s.integer(0)) return zero();
        FactorBuilder f(s);
        return f.finish(s.pool.div(kOne, f.real(0)));
      });
  t.add<gen::AddcmulBackward0>(
      "AddcmulBackward0",
      [](Take& k, const gen::AddcmulBackward0& n) {
        k.real(n.value);
        k.slot(n.tensor1_, k.needs(2));
        k.slot(n.tensor2_, k.needs(1));
      },
      [](const Site& s) {
        FactorBuilder f(s);
        return s.input == 0 ? f.finish(kOne) : f.finish(s.pool.mul(f.read(2 - s.input), f.real(0)));
      });
  t.add<gen::AddcdivBackward0>(
      "AddcdivBackward0",
      [](Take& k, const gen::AddcdivBackward0& n) {
        k.real(n.value);
        k.slot(n.tensor1_, k.needs(2));
        k.slot(n.tensor2_, k.needs(1) || k.needs(2));
      },
      [](const Site& s) {
        FactorBuilder f(s);
        if (s.input == 0) return f.finish(kOne);
        const ExprId below = f.read(1);
        if (s.input == 1) return f.finish(s.pool.div(f.real(0), below));
        const ExprId above = f.read(0);
        if (!f.complete()) return opaque();
        return f.finish(s.pool.neg(s.pool.div(s.pool.mul(f.real(0), above), s.pool.mul(below, below))));
      });
}

void add_powers(Table& t) {
  t.add<gen::PowBackward0>(
      "PowBackward0",
      [](Take& k, const gen::PowBackward0& n) {
        k.real(n.exponent);
        k.slot(n.self_);
      },
      [](const Site& s) {
        FactorBuilder f(s);
        if (s.real(0) == 0) return zero();
        const ExprId args[] = {f.read(0), f.real(0)};
        return f.complete() ? f.finish(s.pool.partial(Prim::pow, 0, args, kNone)) : opaque();
      });
  t.add<gen::PowBackward1>(
      "PowBackward1",
      [](Take& k, const gen::PowBackward1& n) {
        k.slot(n.self_);
        k.slot(n.exponent_);
        k.result(n.result_, k.needs(1));
      },
      by_both, Prim::pow);
  t.add<gen::PowBackward2>(
      "PowBackward2",
      [](Take& k, const gen::PowBackward2& n) {
        k.real(n.self);
        k.slot(n.exponent_);
        k.result(n.result_);
      },
      [](const Site& s) {
        FactorBuilder f(s);
        const ExprId args[] = {f.real(0), f.read(0)};
        const ExprId result = f.read(1);
        return f.complete() ? f.finish(s.pool.partial(Prim::pow, 1, args, result)) : opaque();
      });
  // Scalar on one side: slot 0 is the tensor, real 0 the scalar, the primitive's argument number follows from the row.
  static constexpr Describe kScalarSelf = [](const Site& s) {
    FactorBuilder f(s);
    const ExprId args[] = {f.real(0), f.read(0)};
    return f.complete() ? f.finish(s.pool.partial(s.node.reader->prim, 1, args, kNone)) : opaque();
  };
  log_product_row<gen::XlogyBackward0>(t, "XlogyBackward0", Prim::xlogy);
  log_product_row<gen::SpecialXlog1PyBackward0>(t, "SpecialXlog1PyBackward0", Prim::xlog1py);
  t.add<gen::XlogyBackward1>(
      "XlogyBackward1",
      [](Take& k, const gen::XlogyBackward1& n) {
        k.real(n.self);
        k.slot(n.other_);
      },
      kScalarSelf, Prim::xlogy);
  t.add<gen::XlogyBackward2>("XlogyBackward2", called_elementwise);
  t.add<gen::SpecialXlog1PyBackward1>(
      "SpecialXlog1PyBackward1",
      [](Take& k, const gen::SpecialXlog1PyBackward1& n) {
        k.real(n.self);
        k.slot(n.other_);
      },
      kScalarSelf, Prim::xlog1py);
  t.add<gen::SpecialXlog1PyBackward2>("SpecialXlog1PyBackward2", called_elementwise);
  t.add<gen::LdexpBackward0>(
      "LdexpBackward0",
      [](Take& k, const gen::LdexpBackward0& n) {
        k.slot(n.other_, k.needs(0));
        k.result(n.result_, k.needs(1));
      },
      [](const Site& s) {
        FactorBuilder f(s);
        const ExprId read = f.read(s.input);
        if (!f.complete()) return opaque();
        return f.finish(s.input == 0 ? f.apply(Prim::exp2, read) : s.pool.mul(read, f.constant(M_LN2)));
      });
}

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
      "HypotBackward0",
      [](Take& k, const gen::HypotBackward0& n) {
        k.slot(n.self_);
        k.slot(n.other_);
        k.result(n.result_);
      },
      by_both, Prim::hypot);
  static constexpr Describe kCopysign = [](const Site& s) {
    if (s.input == 1) return zero();
    FactorBuilder f(s);
    const ExprId args[] = {f.read(0), kNone};
    const ExprId result = f.read(1);
    return f.complete() ? f.finish(s.pool.partial(Prim::copysign, 0, args, result)) : opaque();
  };
  t.add<gen::CopysignBackward0>(
      "CopysignBackward0",
      [](Take& k, const gen::CopysignBackward0& n) {
        k.slot(n.self_, k.needs(0));
        k.result(n.result_, k.needs(0));
      },
      kCopysign);
  t.add<gen::CopysignBackward1>(
      "CopysignBackward1",
      [](Take& k, const gen::CopysignBackward1& n) {
        k.slot(n.self_);
        k.result(n.result_);
      },
      kCopysign);
  t.add<gen::LerpBackward0>(
      "LerpBackward0", [](Take& k, const gen::LerpBackward0& n) { k.real(n.weight); },
      [](const Site& s) {
        FactorBuilder f(s);
        return f.finish(f.constant(s.input == 0 ? 1 - s.real(0) : s.real(0)));
      });
  t.add<gen::LerpBackward1>(
      "LerpBackward1",
      [](Take& k, const gen::LerpBackward1& n) {
        k.slot(n.self_, k.needs(2));
        k.slot(n.end_, k.needs(2));
        k.slot(n.weight_, k.needs(0) || k.needs(1));
      },
      [](const Site& s) {
        FactorBuilder f(s);
        if (s.input == 2) {
          const ExprId self = f.read(0), end = f.read(1);
          return f.complete() ? f.finish(s.pool.sub(end, self)) : opaque();
        }
        const ExprId weight = f.read(2);
        if (!f.complete()) return opaque();
        return f.finish(s.input == 0 ? s.pool.sub(kOne, weight) : weight);
      });
}

void add_selections(Table& t) {
  t.add<gen::WhereBackward0>(
      "WhereBackward0", [](Take& k, const gen::WhereBackward0& n) { k.slot(n.condition_); },
      [](const Site& s) {
        FactorBuilder f(s);
        const ExprId condition = f.read(0);
        if (!f.complete()) return opaque();
        return f.finish(s.input == 0 ? f.select(condition, kOne, kZero) : f.select(condition, kZero, kOne));
      });
  static constexpr Describe kMaskedFill = [](const Site& s) {
    FactorBuilder f(s);
    const ExprId mask = f.read(0);
    if (!f.complete()) return opaque();
    return f.finish(s.input == 0 ? f.select(mask, kZero, kOne) : f.select(mask, kOne, kZero));
  };
  t.add<gen::MaskedFillBackward0>(
      "MaskedFillBackward0", [](Take& k, const gen::MaskedFillBackward0& n) { k.slot(n.mask_); }, kMaskedFill);
  t.add<gen::MaskedFillBackward1>(
      "MaskedFillBackward1", [](Take& k, const gen::MaskedFillBackward1& n) { k.slot(n.mask_); }, kMaskedFill);
  static constexpr Prim kAbove = kTiesShare ? Prim::gt : Prim::ge, kBelow = kTiesShare ? Prim::lt : Prim::le;
  t.add<gen::ClampBackward1>(
      "ClampBackward1",
      [](Take& k, const gen::ClampBackward1& n) {
        for (const auto& bound : {n.min, n.max}) {
          k.integer(bound.has_value());
          k.real(bound.value_or(at::Scalar(0)));
        }
        k.slot(n.self_);
      },
      [](const Site& s) {
        FactorBuilder f(s);
        const ExprId self = f.read(0);
        if (!f.complete()) return opaque();
        ExprId inside = kOne;
        if (s.integer(1) != 0) inside = f.select(f.compare(kBelow, self, f.real(1)), inside, kZero);
        if (s.integer(0) != 0) inside = f.select(f.compare(kAbove, self, f.real(0)), inside, kZero);
        return f.finish(inside);
      });
  t.add<gen::ClampBackward0>(
      "ClampBackward0", [](Take& k, const gen::ClampBackward0&) { tabulate(k, 3); },
      [](const Site& s) {  // a table of 0, 1 and, at ties, 1/2: what it masks is 0 even where the cotangent is infinite
        if (!s.has(s.input) || s.slot(s.input).sizes() != at::IntArrayRef(s.y())) return opaque();
        FactorBuilder f(s);
        const ExprId share = f.read(s.input);
        const ExprId given = f.select(f.compare(Prim::eq, share, f.constant(0.5)), f.constant(0.5), kOne);
        return f.finish(f.select(f.compare(Prim::ne, share, f.constant(0)), given, kZero));
      });
  // One bound: a tensor or a number; the comparison that lets self through is the row's primitive.
  static constexpr Describe kTensorBound = [](const Site& s) {
    FactorBuilder f(s);
    const ExprId self = f.read(0), bound = f.read(1);
    if (!f.complete()) return opaque();
    const Prim within = s.node.reader->prim;
    if (kTiesShare) {
      const ExprId args[] = {self, bound};
      return f.finish(s.pool.partial(within == kAbove ? Prim::maximum : Prim::minimum, s.input, args, kNone));
    }
    if (s.input == 0) return f.finish(f.select(f.compare(within, self, bound), kOne, kZero));
    return f.finish(f.select(f.compare(within == kAbove ? Prim::lt : Prim::gt, self, bound), kOne, kZero));
  };
  static constexpr Describe kNumberBound = [](const Site& s) {
    FactorBuilder f(s);
    const ExprId self = f.read(0);
    if (!f.complete()) return opaque();
    return f.finish(f.select(f.compare(s.node.reader->prim, self, f.real(0)), kOne, kZero));
  };
  t.add<gen::ClampMinBackward0>(
      "ClampMinBackward0",
      [](Take& k, const gen::ClampMinBackward0& n) {
        k.real(n.min);
        k.slot(n.self_);
      },
      kNumberBound, kAbove);
  t.add<gen::ClampMaxBackward0>(
      "ClampMaxBackward0",
      [](Take& k, const gen::ClampMaxBackward0& n) {
        k.real(n.max);
        k.slot(n.self_);
      },
      kNumberBound, kBelow);
  t.add<gen::ClampMinBackward1>(
      "ClampMinBackward1",
      [](Take& k, const gen::ClampMinBackward1& n) {
        k.slot(n.self_);
        k.slot(n.min_);
      },
      kTensorBound, kAbove);
  t.add<gen::ClampMaxBackward1>(
      "ClampMaxBackward1",
      [](Take& k, const gen::ClampMaxBackward1& n) {
        k.slot(n.self_);
        k.slot(n.max_);
      },
      kTensorBound, kBelow);
  zero_rows<gen::CeilBackward0, gen::FloorBackward0, gen::RoundBackward0, gen::RoundBackward1, gen::TruncBackward0,
            gen::SignBackward0, gen::BernoulliBackward0, gen::FillBackward0, gen::ZeroBackward0>(
      t, {"CeilBackward0", "FloorBackward0", "RoundBackward0", "RoundBackward1", "TruncBackward0", "SignBackward0",
          "BernoulliBackward0", "FillBackward0", "ZeroBackward0"});
}

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
  static constexpr Describe kPolygamma = [](const Site& s) {
    FactorBuilder f(s);
    const ExprId args[] = {f.constant(static_cast<double>(s.integer(0))), f.read(0)};
    return f.complete() ? f.finish(s.pool.partial(Prim::polygamma, 1, args, kNone)) : opaque();
  };
  t.add<gen::PolygammaBackward0>(
      "PolygammaBackward0",
      [](Take& k, const gen::PolygammaBackward0& n) {
        k.integer(n.n);
        k.slot(n.self_);
      },
      kPolygamma);
}

template <class N>
void tabulated_row(Table& t, const char* name) {
  t.add<N>(name, [](Take& k, const N&) { tabulate(k, 2); }, tabulated);
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
