// The table of elementwise primitives.
#pragma once
#include <cstdint>

namespace wengert::fused {

// clang-format off
enum class Prim : std::uint8_t {
  // two arguments
  add, sub, mul, div, pow, atan2, hypot, logaddexp, logaddexp2, maximum, minimum, fmax, fmin, fmod, remainder, copysign, heaviside, xlogy, xlog1py,
  lt, le, gt, ge, eq, ne, logical_and, logical_or,
  // one argument
  neg, abs, sign, reciprocal, square, sqrt, rsqrt, cbrt, exp, exp2, expm1, log, log2, log10, log1p,
  sin, cos, tan, asin, acos, atan, sinh, cosh, tanh, asinh, acosh, atanh,
  sigmoid, logsigmoid, silu, gelu_erf, gelu_tanh, mish, selu, relu, relu6, hardsigmoid, hardswish, tanhshrink, softsign,
  erf, erfc, erfinv, lgamma, digamma, trigamma, sinc, floor, ceil, round, trunc, logical_not, isnan,
  // three arguments: where(c, a, b); clamp(x, lo, hi); softplus(x, beta, threshold); elu(x, alpha*scale, scale... as documented in the table); hardtanh(x, lo, hi);
  // leaky_relu takes two: (x, slope); celu(x, alpha); polygamma(n, x) takes two
  where, clamp, softplus, elu, hardtanh, leaky_relu, celu, polygamma,
};
// clang-format on

}  // namespace wengert::fused
