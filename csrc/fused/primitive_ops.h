// Values and first partials of the primitives; see the notes in primitives.h.
#pragma once
#include "common/macros.h"
#include "fused/primitives.h"
#include "fused/scalar_math.h"

namespace wengert::fused::prim {

struct Fixed {
  static constexpr bool kCommutative = false;
};
struct Commutative {
  static constexpr bool kCommutative = true;
};
template <int N, class Base = Fixed>
struct Arity : Base {
  static constexpr int kArity = N;
};
using Unary = Arity<1>;
using Binary = Arity<2>;
using BinaryCommutative = Arity<2, Commutative>;
using Ternary = Arity<3>;

template <Prim P>
struct Op;

#define WENGERT_VALUE \
  template <class T>  \
  WENGERT_HD static T value
#define WENGERT_PARTIAL \
  template <class E>    \
  static E partial  // (argument number, arguments, result)
#define WENGERT_NO_PARTIALS \
  WENGERT_PARTIAL(int, const E*, E r) { return r.zero(); }

inline constexpr double kLn2 = 0.69314718055994530942;
inline constexpr double kLn10 = 2.3025850929940456840;
inline constexpr double kSqrt1_2 = 0.70710678118654752440;
inline constexpr double kTwoOverSqrtPi = 1.12837916709551257390;
inline constexpr double kGeluBeta = 0.79788456080286535588;  // sqrt(2 / pi)
inline constexpr double kGeluKappa = 0.044715;
inline constexpr double kSeluAlpha = 1.6732632423543772848170429916717;
inline constexpr double kSeluScale = 1.0507009873554804934193349852946;

template <class T>
WENGERT_HD T nan_max(T a, T b) {
  return select((a > b) | (a != a), a, b);
}
template <class T>
WENGERT_HD T nan_min(T a, T b) {
  return select((a < b) | (a != a), a, b);
}

// ---------------------------------------------------------------------------------------------------------------- arithmetic
template <>
struct Op<Prim::add> : BinaryCommutative {
  WENGERT_VALUE(T a, T b) { return a + b; }
  WENGERT_PARTIAL(int, const E*, E r) { return r.one(); }
};
template <>
struct Op<Prim::sub> : Binary {
  WENGERT_VALUE(T a, T b) { return a - b; }
  WENGERT_PARTIAL(int k, const E*, E r) { return k == 0 ? r.one() : r.num(-1); }
};
template <>
struct Op<Prim::mul> : BinaryCommutative {
  WENGERT_VALUE(T a, T b) { return a * b; }
  WENGERT_PARTIAL(int k, const E* a, E) { return a[1 - k]; }
};
template <>
struct Op<Prim::div> : Binary {
  WENGERT_VALUE(T a, T b) { return a / b; }
  WENGERT_PARTIAL(int k, const E* a, E) { return k == 0 ? 1.0 / a[1] : -((a[0] / a[1]) / a[1]); }
};
template <>
struct Op<Prim::neg> : Unary {
  WENGERT_VALUE(T x) { return -x; }
  WENGERT_PARTIAL(int, const E*, E r) { return r.num(-1); }
};
template <>
struct Op<Prim::reciprocal> : Unary {
  WENGERT_VALUE(T x) { return T(1) / x; }
  WENGERT_PARTIAL(int, const E*, E r) { return -(r * r); }
};
template <>
struct Op<Prim::square> : Unary {
  WENGERT_VALUE(T x) { return x * x; }
  WENGERT_PARTIAL(int, const E* a, E) { return 2.0 * a[0]; }
};
template <>
struct Op<Prim::abs> : Unary {
  WENGERT_VALUE(T x) { return abs(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return sign(a[0]); }
};
template <>
struct Op<Prim::sign> : Unary {
  WENGERT_VALUE(T x) { return select(x > T(0), T(1), select(x < T(0), T(-1), T(0))); }
  WENGERT_NO_PARTIALS
};
template <>
struct Op<Prim::fmod> : Binary {
  WENGERT_VALUE(T a, T b) { return fmod(a, b); }
  WENGERT_PARTIAL(int k, const E* a, E r) { return k == 0 ? r.one() : -trunc(a[0] / a[1]); }
};
template <>
struct Op<Prim::remainder> : Binary {
  WENGERT_VALUE(T a, T b) {
    T m = fmod(a, b);
    return select((m != T(0)) & ((b < T(0)) != (m < T(0))), m + b, m);
  }
  // -floor_divide(a, b), which is not floor(a / b) when the quotient rounds up to an integer, and has no derivative
  WENGERT_PARTIAL(int k, const E* a, E r) {
    if (k == 0) return r.one();
    E zero = r.num(0);
    E m = fmod(a[0], a[1]);
    E whole = (a[0] - m) / a[1];
    E below = logical_and(ne(m, zero), ne(lt(a[1], zero), lt(m, zero)));
    return -round(where(eq(a[1], zero), a[0] / a[1], where(below, whole - 1.0, whole)));
  }
};

// ------------------------------------------------------------------------------------------------------------ powers and roots
template <>
struct Op<Prim::sqrt> : Unary {
  WENGERT_VALUE(T x) { return sqrt(x); }
  WENGERT_PARTIAL(int, const E*, E r) { return 1.0 / (2.0 * r); }
};
template <>
struct Op<Prim::rsqrt> : Unary {
  WENGERT_VALUE(T x) { return T(1) / sqrt(x); }
  WENGERT_PARTIAL(int, const E*, E r) { return -0.5 * (r * r * r); }
};
template <>
struct Op<Prim::cbrt> : Unary {
  WENGERT_VALUE(T x) { return cbrt(x); }
  WENGERT_PARTIAL(int, const E*, E r) { return 1.0 / (3.0 * (r * r)); }
};
template <>
struct Op<Prim::pow> : Binary {
  WENGERT_VALUE(T a, T b) { return pow(a, b); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    if (k == 1) return where(logical_and(eq(a[0], r.num(0)), ge(a[1], r.num(0))), r.num(0), r * log(a[0]));
    double exponent = 0;
    if (a[1].is_number(&exponent)) return exponent == 0 ? r.zero() : exponent * pow(a[0], r.num(exponent - 1));
    return where(eq(a[1], r.num(0)), r.zero(), a[1] * pow(a[0], a[1] - 1.0));
  }
};
template <>
struct Op<Prim::hypot> : BinaryCommutative {
  WENGERT_VALUE(T a, T b) { return hypot(a, b); }
  WENGERT_PARTIAL(int k, const E* a, E r) { return a[k] / r; }
};

// ------------------------------------------------------------------------------------------------- exponentials and logarithms
template <>
struct Op<Prim::exp> : Unary {
  WENGERT_VALUE(T x) { return exp(x); }
  WENGERT_PARTIAL(int, const E*, E r) { return r; }
};
template <>
struct Op<Prim::exp2> : Unary {
  WENGERT_VALUE(T x) { return exp2(x); }
  WENGERT_PARTIAL(int, const E*, E r) { return r * kLn2; }
};
template <>
struct Op<Prim::expm1> : Unary {
  WENGERT_VALUE(T x) { return expm1(x); }
  WENGERT_PARTIAL(int, const E*, E r) { return r + 1.0; }
};
template <>
struct Op<Prim::log> : Unary {
  WENGERT_VALUE(T x) { return log(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return 1.0 / a[0]; }
};
template <>
struct Op<Prim::log2> : Unary {
  WENGERT_VALUE(T x) { return log2(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return 1.0 / (a[0] * kLn2); }
};
template <>
struct Op<Prim::log10> : Unary {
  WENGERT_VALUE(T x) { return log10(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return 1.0 / (a[0] * kLn10); }
};
template <>
struct Op<Prim::log1p> : Unary {
  WENGERT_VALUE(T x) { return log1p(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return 1.0 / (a[0] + 1.0); }
};
template <>
struct Op<Prim::logaddexp> : BinaryCommutative {
  WENGERT_VALUE(T a, T b) {
    T m = nan_max(a, b);
    return select((abs(a) == T(kInfinity)) & (a == b), a, m + log1p(exp(-abs(a - b))));
  }
  WENGERT_PARTIAL(int k, const E* a, E) { return 1.0 / (1.0 + exp(a[1 - k] - a[k])); }
};
template <>
struct Op<Prim::logaddexp2> : BinaryCommutative {
  WENGERT_VALUE(T a, T b) {
    T m = nan_max(a, b);
    return select((abs(a) == T(kInfinity)) & (a == b), a, m + log1p(exp2(-abs(a - b))) * T(1 / kLn2));
  }
  WENGERT_PARTIAL(int k, const E* a, E) { return 1.0 / (1.0 + exp2(a[1 - k] - a[k])); }
};
template <>
struct Op<Prim::xlogy> : Binary {
  WENGERT_VALUE(T x, T y) { return select(y != y, y, select(x == T(0), T(0), x * log(y))); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    if (k == 1) return a[0] / a[1];
    return where(logical_and(eq(a[0], r.num(0)), le(a[1], r.num(0))), r.zero(), log(a[1]));
  }
};
template <>
struct Op<Prim::xlog1py> : Binary {
  WENGERT_VALUE(T x, T y) { return select(y != y, y, select(x == T(0), T(0), x * log1p(y))); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    if (k == 1) return a[0] / (a[1] + 1.0);
    return where(logical_and(eq(a[0], r.num(0)), le(a[1], r.num(-1))), r.zero(), log1p(a[1]));
  }
};

// ----------------------------------------------------------------------------------------------- trigonometric and hyperbolic
template <>
struct Op<Prim::sin> : Unary {
  WENGERT_VALUE(T x) { return sin(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return cos(a[0]); }
};
template <>
struct Op<Prim::cos> : Unary {
  WENGERT_VALUE(T x) { return cos(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return -sin(a[0]); }
};
template <>
struct Op<Prim::tan> : Unary {
  WENGERT_VALUE(T x) { return tan(x); }
  WENGERT_PARTIAL(int, const E*, E r) { return 1.0 + r * r; }
};
template <>
struct Op<Prim::asin> : Unary {
  WENGERT_VALUE(T x) { return asin(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return rsqrt(1.0 - a[0] * a[0]); }
};
template <>
struct Op<Prim::acos> : Unary {
  WENGERT_VALUE(T x) { return acos(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return -rsqrt(1.0 - a[0] * a[0]); }
};
template <>
struct Op<Prim::atan> : Unary {
  WENGERT_VALUE(T x) { return atan(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return 1.0 / (a[0] * a[0] + 1.0); }
};
template <>
struct Op<Prim::atan2> : Binary {
  WENGERT_VALUE(T y, T x) { return atan2(y, x); }
  WENGERT_PARTIAL(int k, const E* a, E) {
    E square = a[0] * a[0] + a[1] * a[1];
    E scale = where(eq(square, a[0].num(0)), a[0].num(0), reciprocal(square));
    return k == 0 ? a[1] * scale : -a[0] * scale;
  }
};
template <>
struct Op<Prim::sinh> : Unary {
  WENGERT_VALUE(T x) { return sinh(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return cosh(a[0]); }
};
template <>
struct Op<Prim::cosh> : Unary {
  WENGERT_VALUE(T x) { return cosh(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return sinh(a[0]); }
};
template <>
struct Op<Prim::tanh> : Unary {
  WENGERT_VALUE(T x) { return tanh(x); }
  WENGERT_PARTIAL(int, const E*, E r) { return 1.0 - r * r; }
};
template <>
struct Op<Prim::asinh> : Unary {
  WENGERT_VALUE(T x) { return asinh(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return rsqrt(a[0] * a[0] + 1.0); }
};
template <>
struct Op<Prim::acosh> : Unary {
  WENGERT_VALUE(T x) { return acosh(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return rsqrt(a[0] * a[0] - 1.0); }
};
template <>
struct Op<Prim::atanh> : Unary {
  WENGERT_VALUE(T x) { return atanh(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return reciprocal(1.0 - a[0] * a[0]); }
};
template <>
struct Op<Prim::sinc> : Unary {
  WENGERT_VALUE(T x) {
    T y = x * T(kPi);
    return select(x == T(0), T(1), sin(y) / y);
  }
  WENGERT_PARTIAL(int, const E* a, E r) {
    E y = a[0] * kPi;
    E scale = a[0] * a[0] * kPi;
    return where(eq(scale, r.num(0)), r.zero(), (y * cos(y) - sin(y)) / scale);
  }
};

// ------------------------------------------------------------------------------------------------------------------ activations
template <>
struct Op<Prim::sigmoid> : Unary {
  WENGERT_VALUE(T x) { return T(1) / (T(1) + exp(-x)); }
  WENGERT_PARTIAL(int, const E*, E r) { return (1.0 - r) * r; }
};
template <>
struct Op<Prim::logsigmoid> : Unary {
  WENGERT_VALUE(T x) { return nan_min(x, T(0)) - log1p(exp(-abs(x))); }
  WENGERT_PARTIAL(int, const E* a, E) { return sigmoid(-a[0]); }
};
template <>
struct Op<Prim::silu> : Unary {
  WENGERT_VALUE(T x) { return x / (T(1) + exp(-x)); }
  WENGERT_PARTIAL(int, const E* a, E) {
    E s = sigmoid(a[0]);
    return s * (1.0 + a[0] * (1.0 - s));
  }
};
template <>
struct Op<Prim::gelu_erf> : Unary {
  WENGERT_VALUE(T x) { return x * T(0.5) * (T(1) + erf(x * T(kSqrt1_2))); }
  WENGERT_PARTIAL(int, const E* a, E) {
    E cdf = 0.5 * (1.0 + erf(a[0] * kSqrt1_2));
    return cdf + a[0] * ((kTwoOverSqrtPi * kSqrt1_2 * 0.5) * exp(a[0] * a[0] * -0.5));
  }
};
template <>
struct Op<Prim::gelu_tanh> : Unary {
  WENGERT_VALUE(T x) { return T(0.5) * x * (T(1) + tanh(T(kGeluBeta) * (x + T(kGeluKappa) * (x * x * x)))); }
  WENGERT_PARTIAL(int, const E* a, E) {
    E x = a[0];
    E square = x * x;
    E t = tanh(kGeluBeta * (x + kGeluKappa * (square * x)));
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (kGeluBeta * (1.0 + (3 * kGeluKappa) * square));
  }
};
template <>
struct Op<Prim::mish> : Unary {
  WENGERT_VALUE(T x) { return x * tanh(log1p(exp(x))); }
  WENGERT_PARTIAL(int, const E* a, E) {
    E t = tanh(log1p(exp(a[0])));
    return t + a[0] * sigmoid(a[0]) * (1.0 - t * t);
  }
};
template <>
struct Op<Prim::softplus> : Ternary {
  WENGERT_VALUE(T x, T beta, T threshold) { return select(x * beta > threshold, x, log1p(exp(x * beta)) / beta); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    if (k != 0) return r.none();
    // exactly at the threshold PyTorch's second derivative is 0 though the first is not 1
    E x = a[0] * a[1];
    return where(gt(x, a[2]), r.one(), where(eq(x, a[2]), sigmoid(a[2]), sigmoid(x)));
  }
};
// scale * exp(rate * x) below 0.  At 0 the slope is that of the negative side, but PyTorch's second derivative there is 0. Above,
// the exponential would overflow and a derivative of the selected slope be 0 * inf: it is not evaluated there.
template <class E>
E elu_slope(E x, E scale, E rate, E positive) {
  E zero = x.num(0);
  E negative = lt(x, zero);
  return where(negative, scale * exp(where(negative, x, zero) * rate), where(le(x, zero), scale, positive));
}
template <>
struct Op<Prim::elu> : Arity<4> {
  WENGERT_VALUE(T x, T negcoef, T poscoef, T negiptcoef) {
    return select(x < T(0), expm1(x * negiptcoef) * negcoef, x * poscoef);
  }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    if (k != 0) return r.none();
    return elu_slope(a[0], a[3] * a[1], a[3], a[2]);
  }
};
template <>
struct Op<Prim::selu> : Unary {
  WENGERT_VALUE(T x) { return Op<Prim::elu>::value(x, T(kSeluAlpha * kSeluScale), T(kSeluScale), T(1)); }
  WENGERT_PARTIAL(int, const E* a, E r) { return elu_slope(a[0], r.num(kSeluAlpha * kSeluScale), r.one(), r.num(kSeluScale)); }
};
template <>
struct Op<Prim::celu> : Binary {
  WENGERT_VALUE(T x, T alpha) { return select(x < T(0), expm1(x / alpha) * alpha, x); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    if (k != 0) return r.none();
    return elu_slope(a[0], r.one(), 1.0 / a[1], r.one());
  }
};
template <>
struct Op<Prim::relu> : Unary {
  WENGERT_VALUE(T x) { return select(x <= T(0), T(0), x); }
  WENGERT_PARTIAL(int, const E*, E r) { return where(le(r, r.num(0)), r.zero(), r.one()); }
};
template <>
struct Op<Prim::leaky_relu> : Binary {
  WENGERT_VALUE(T x, T slope) { return select(x > T(0), x, x * slope); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    if (k != 0) return r.none();
    return where(gt(a[0], r.num(0)), r.one(), a[1]);
  }
};
template <>
struct Op<Prim::hardtanh> : Ternary {
  WENGERT_VALUE(T x, T lo, T hi) { return nan_min(nan_max(x, lo), hi); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    if (k != 0) return r.none();
    return where(logical_or(le(a[0], a[1]), ge(a[0], a[2])), r.zero(), r.one());
  }
};
template <>
struct Op<Prim::relu6> : Unary {
  WENGERT_VALUE(T x) { return nan_min(nan_max(x, T(0)), T(6)); }
  WENGERT_PARTIAL(int, const E* a, E r) { return where(logical_or(le(a[0], r.num(0)), ge(a[0], r.num(6))), r.zero(), r.one()); }
};
template <>
struct Op<Prim::hardsigmoid> : Unary {
  WENGERT_VALUE(T x) { return nan_min(nan_max(x + T(3), T(0)), T(6)) / T(6); }
  WENGERT_PARTIAL(int, const E* a, E r) {
    // PyTorch's constant is a float in every precision
    return where(logical_and(gt(a[0], r.num(-3)), lt(a[0], r.num(3))), r.num(1.0f / 6.0f), r.zero());
  }
};
template <>
struct Op<Prim::hardswish> : Unary {
  WENGERT_VALUE(T x) { return x * nan_min(nan_max(x + T(3), T(0)), T(6)) / T(6); }
  WENGERT_PARTIAL(int, const E* a, E r) {
    E bounded = maximum(a[0], r.num(-3));  // what the mask hides stays finite
    return where(le(a[0], r.num(-3)), r.zero(), where(lt(a[0], r.num(3)), bounded / 3.0 + 0.5, r.one()));
  }
};
template <>
struct Op<Prim::tanhshrink> : Unary {
  WENGERT_VALUE(T x) { return x - tanh(x); }
  WENGERT_PARTIAL(int, const E* a, E) {
    E t = tanh(a[0]);
    return 1.0 - (1.0 - t * t);
  }
};
template <>
struct Op<Prim::softsign> : Unary {
  WENGERT_VALUE(T x) { return x / (T(1) + abs(x)); }
  WENGERT_PARTIAL(int, const E* a, E) {
    E scale = 1.0 + abs(a[0]);
    return reciprocal(scale) - ((a[0] / scale) / scale) * sign(a[0]);
  }
};

// ------------------------------------------------------------------------------------------------------------ special functions
template <>
struct Op<Prim::erf> : Unary {
  WENGERT_VALUE(T x) { return erf(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return kTwoOverSqrtPi * exp(-(a[0] * a[0])); }
};
template <>
struct Op<Prim::erfc> : Unary {
  WENGERT_VALUE(T x) { return erfc(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return -kTwoOverSqrtPi * exp(-(a[0] * a[0])); }
};
template <>
struct Op<Prim::erfinv> : Unary {
  WENGERT_VALUE(T x) { return erfinv(x); }
  WENGERT_PARTIAL(int, const E* a, E) {
    E y = erfinv(a[0]);
    return (1 / kTwoOverSqrtPi) * exp(y * y);
  }
};
template <>
struct Op<Prim::lgamma> : Unary {
  WENGERT_VALUE(T x) { return lgamma(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return digamma(a[0]); }
};
template <>
struct Op<Prim::digamma> : Unary {
  WENGERT_VALUE(T x) { return digamma(x); }
  WENGERT_PARTIAL(int, const E* a, E) { return trigamma(a[0]); }
};
template <>
struct Op<Prim::trigamma> : Unary {
  WENGERT_VALUE(T x) { return trigamma(x); }
  WENGERT_PARTIAL(int, const E* a, E r) { return polygamma(r.num(2), a[0]); }
};
template <>
struct Op<Prim::polygamma> : Binary {
  WENGERT_VALUE(T n, T x) { return polygamma(n, x); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    double n = 0;
    return k == 0 || !a[0].is_number(&n) ? r.none() : polygamma(r.num(n + 1), a[1]);
  }
};

// ----------------------------------------------------------------------------------------------- selection, rounding, comparison
template <>
struct Op<Prim::maximum> : Binary {
  WENGERT_VALUE(T a, T b) { return nan_max(a, b); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    return where(lt(a[k], a[1 - k]), r.zero(), where(eq(a[0], a[1]), r.num(0.5), r.one()));
  }
};
template <>
struct Op<Prim::minimum> : Binary {
  WENGERT_VALUE(T a, T b) { return nan_min(a, b); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    return where(gt(a[k], a[1 - k]), r.zero(), where(eq(a[0], a[1]), r.num(0.5), r.one()));
  }
};
template <>
struct Op<Prim::fmax> : Binary {
  WENGERT_VALUE(T a, T b) { return select((a >= b) | (b != b), a, b); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    E first = logical_or(ge(a[0], a[1]), isnan(a[1]));
    return k == 0 ? where(first, r.one(), r.zero()) : where(first, r.zero(), r.one());
  }
};
template <>
struct Op<Prim::fmin> : Binary {
  WENGERT_VALUE(T a, T b) { return select((a <= b) | (b != b), a, b); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    E first = logical_or(le(a[0], a[1]), isnan(a[1]));
    return k == 0 ? where(first, r.one(), r.zero()) : where(first, r.zero(), r.one());
  }
};
template <>
struct Op<Prim::clamp> : Ternary {
  WENGERT_VALUE(T x, T lo, T hi) { return nan_min(nan_max(x, lo), hi); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    if (k == 0) return where(logical_and(ge(a[0], a[1]), le(a[0], a[2])), r.one(), r.zero());
    if (k == 1) return where(logical_and(lt(a[1], a[2]), lt(a[0], a[1])), r.one(), r.zero());
    return where(logical_or(gt(a[0], a[2]), lt(a[2], a[1])), r.one(), r.zero());
  }
};
template <>
struct Op<Prim::where> : Ternary {
  WENGERT_VALUE(T c, T a, T b) { return select(c != T(0), a, b); }
  WENGERT_PARTIAL(int k, const E* a, E r) {
    if (k == 0) return r.zero();
    return k == 1 ? where(a[0], r.one(), r.zero()) : where(a[0], r.zero(), r.one());
  }
};
template <>
struct Op<Prim::copysign> : Binary {
  WENGERT_VALUE(T a, T b) { return copysign(a, b); }
  WENGERT_PARTIAL(int k, const E* a, E r) { return k == 1 ? r.zero() : where(eq(a[0], r.num(0)), r.num(0), r / a[0]); }
};
template <>
struct Op<Prim::heaviside> : Binary {
  WENGERT_VALUE(T x, T v) { return select(x == T(0), v, select(x > T(0), T(1), T(0))); }
  WENGERT_NO_PARTIALS
};
template <>
struct Op<Prim::floor> : Unary {
  WENGERT_VALUE(T x) { return floor(x); }
  WENGERT_NO_PARTIALS
};
template <>
struct Op<Prim::ceil> : Unary {
  WENGERT_VALUE(T x) { return ceil(x); }
  WENGERT_NO_PARTIALS
};
template <>
struct Op<Prim::round> : Unary {  // half to even
  WENGERT_VALUE(T x) { return rint(x); }
  WENGERT_NO_PARTIALS
};
template <>
struct Op<Prim::trunc> : Unary {
  WENGERT_VALUE(T x) { return trunc(x); }
  WENGERT_NO_PARTIALS
};

#define WENGERT_COMPARISON(name, base, condition)                     \
  template <>                                                         \
  struct Op<Prim::name> : base {                                      \
    WENGERT_VALUE(T a, T b) { return select(condition, T(1), T(0)); } \
    WENGERT_NO_PARTIALS                                               \
  };
WENGERT_COMPARISON(lt, Binary, a < b)
WENGERT_COMPARISON(le, Binary, a <= b)
WENGERT_COMPARISON(gt, Binary, a > b)
WENGERT_COMPARISON(ge, Binary, a >= b)
WENGERT_COMPARISON(eq, BinaryCommutative, a == b)
WENGERT_COMPARISON(ne, BinaryCommutative, a != b)
WENGERT_COMPARISON(logical_and, BinaryCommutative, (a != T(0)) & (b != T(0)))
WENGERT_COMPARISON(logical_or, BinaryCommutative, (a != T(0)) | (b != T(0)))
#undef WENGERT_COMPARISON
template <>
struct Op<Prim::logical_not> : Unary {
  WENGERT_VALUE(T x) { return select(x == T(0), T(1), T(0)); }
  WENGERT_NO_PARTIALS
};
template <>
struct Op<Prim::isnan> : Unary {
  WENGERT_VALUE(T x) { return select(x != x, T(1), T(0)); }
  WENGERT_NO_PARTIALS
};

#undef WENGERT_VALUE
#undef WENGERT_PARTIAL
#undef WENGERT_NO_PARTIALS

// Calls f(Op<prim>{}) for a primitive known at run time.
template <class F>
decltype(auto) visit(Prim prim, F&& f) {
  switch (prim) {
#define WENGERT_CASE(name) \
  case Prim::name:         \
    return f(Op<Prim::name>{});
    WENGERT_FOR_EACH_PRIM(WENGERT_CASE)
#undef WENGERT_CASE
  }
  __builtin_unreachable();
}

}  // namespace wengert::fused::prim
