// Scalar elementary functions under one name for float and double, on host and device; rare special functions by series.
#pragma once
#include <math.h>

#include "common/macros.h"

namespace wengert::fused::prim {

inline constexpr double kPi = 3.14159265358979323846;
inline constexpr double kInfinity = HUGE_VAL;
inline constexpr double kNan = NAN;

template <class T>
WENGERT_HD T select(bool condition, T a, T b) {
  return condition ? a : b;
}

#define WENGERT_SCALAR_UNARY(name)                                            \
  WENGERT_HD float name(float x) { return static_cast<float>(::name##f(x)); } \
  WENGERT_HD double name(double x) { return ::name(x); }
WENGERT_SCALAR_UNARY(sqrt)
WENGERT_SCALAR_UNARY(cbrt)
WENGERT_SCALAR_UNARY(exp)
WENGERT_SCALAR_UNARY(exp2)
WENGERT_SCALAR_UNARY(expm1)
WENGERT_SCALAR_UNARY(log)
WENGERT_SCALAR_UNARY(log2)
WENGERT_SCALAR_UNARY(log10)
WENGERT_SCALAR_UNARY(log1p)
WENGERT_SCALAR_UNARY(sin)
WENGERT_SCALAR_UNARY(cos)
WENGERT_SCALAR_UNARY(tan)
WENGERT_SCALAR_UNARY(asin)
WENGERT_SCALAR_UNARY(acos)
WENGERT_SCALAR_UNARY(atan)
WENGERT_SCALAR_UNARY(sinh)
WENGERT_SCALAR_UNARY(cosh)
WENGERT_SCALAR_UNARY(tanh)
WENGERT_SCALAR_UNARY(asinh)
WENGERT_SCALAR_UNARY(acosh)
WENGERT_SCALAR_UNARY(atanh)
WENGERT_SCALAR_UNARY(erf)
WENGERT_SCALAR_UNARY(erfc)
WENGERT_SCALAR_UNARY(lgamma)
WENGERT_SCALAR_UNARY(floor)
WENGERT_SCALAR_UNARY(ceil)
WENGERT_SCALAR_UNARY(rint)
WENGERT_SCALAR_UNARY(trunc)
#undef WENGERT_SCALAR_UNARY

#define WENGERT_SCALAR_BINARY(name)                                   \
  WENGERT_HD float name(float a, float b) { return ::name##f(a, b); } \
  WENGERT_HD double name(double a, double b) { return ::name(a, b); }
WENGERT_SCALAR_BINARY(pow)
WENGERT_SCALAR_BINARY(atan2)
WENGERT_SCALAR_BINARY(hypot)
WENGERT_SCALAR_BINARY(fmod)
WENGERT_SCALAR_BINARY(copysign)
#undef WENGERT_SCALAR_BINARY

WENGERT_HD float abs(float x) { return ::fabsf(x); }
WENGERT_HD double abs(double x) { return ::fabs(x); }

// In special_functions.h; they work in double for both types.
WENGERT_OUTLINED double digamma_series(double x);
WENGERT_OUTLINED double polygamma_series(double n, double x);
WENGERT_OUTLINED double erfinv_series(double x);

#define WENGERT_BY_SERIES(name)                                                   \
  WENGERT_HD float name(float x) { return static_cast<float>(name##_series(x)); } \
  WENGERT_HD double name(double x) { return name##_series(x); }
WENGERT_BY_SERIES(digamma)
WENGERT_BY_SERIES(erfinv)
#undef WENGERT_BY_SERIES
WENGERT_HD float polygamma(float n, float x) { return static_cast<float>(polygamma_series(n, x)); }
WENGERT_HD double polygamma(double n, double x) { return polygamma_series(n, x); }
WENGERT_HD float trigamma(float x) { return static_cast<float>(polygamma_series(1, x)); }
WENGERT_HD double trigamma(double x) { return polygamma_series(1, x); }

}  // namespace wengert::fused::prim
