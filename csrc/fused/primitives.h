// The table of elementwise primitives: names, arity, values and first partials side by side.
//
// A primitive's value is a template over the element type: float, double, or a SIMD vector of them (kernels/cpu/simd.h).  Its
// partials are a template over an expression handle, so each is written as a formula; higher derivatives come from
// differentiating these formulas.  They are PyTorch's own (derivatives.yaml), conventions at kinks and ties included, and read
// exactly what PyTorch saves for the node: either arguments or the result.
//
// NOTE [Masks]
// zero() is the structural zero: select(c, e, zero()) as a *right* factor selects instead of multiplying, as PyTorch's
// where(c, grad, 0) does: the derivative of sqrt(relu(x)) at x < 0 is 0, not inf * 0.  Where PyTorch multiplies by a number that
// happens to be 0, the formula says num(0).
//
// NOTE [Order]
// What arrives at a node passes the steps of its factor in their order: v * (select(c, a, zero()) * b) is select(c, v * a,
// zero())
// * b.  The values are the same, but a derivative in v then ends at the mask, as in PyTorch: the second derivatives of a norm at
// 0 are finite in a direction (hvp), though its Hessian is not.  Selects that what arrives has passed are marked, as one in the
// forward computation is not to mask v.  v * (1 / b) is v / b, which does not overflow at a subnormal b; reciprocal(b) stands
// where PyTorch multiplies by one.
#pragma once
#include <cstdint>
#include <string_view>

namespace wengert::fused {

// Argument lists of the primitives with parameters:
//   where(c, a, b)  clamp(x, lo, hi)  hardtanh(x, lo, hi)  softplus(x, beta, threshold)  leaky_relu(x, slope)  celu(x, alpha)
//   elu(x, negcoef = alpha * scale, poscoef = scale, negiptcoef = input_scale)  polygamma(n, x)
// Comparisons and logical primitives give 1 or 0; whatever is not 0 (nan too) is true.
// clang-format off
#define WENGERT_FOR_EACH_PRIM(X)                                                                                                  \
  X(add) X(sub) X(mul) X(div) X(pow) X(atan2) X(hypot) X(logaddexp) X(logaddexp2) X(maximum) X(minimum) X(fmax) X(fmin) X(fmod)   \
  X(remainder) X(copysign) X(heaviside) X(xlogy) X(xlog1py) X(lt) X(le) X(gt) X(ge) X(eq) X(ne) X(logical_and) X(logical_or)      \
  X(neg) X(abs) X(sign) X(reciprocal) X(square) X(sqrt) X(rsqrt) X(cbrt) X(exp) X(exp2) X(expm1) X(log) X(log2) X(log10) X(log1p) \
  X(sin) X(cos) X(tan) X(asin) X(acos) X(atan) X(sinh) X(cosh) X(tanh) X(asinh) X(acosh) X(atanh)                                 \
  X(sigmoid) X(logsigmoid) X(silu) X(gelu_erf) X(gelu_tanh) X(mish) X(selu) X(relu) X(relu6) X(hardsigmoid) X(hardswish)          \
  X(tanhshrink) X(softsign) X(erf) X(erfc) X(erfinv) X(lgamma) X(digamma) X(trigamma) X(sinc) X(floor) X(ceil) X(round) X(trunc)  \
  X(logical_not) X(isnan) X(where) X(clamp) X(softplus) X(elu) X(hardtanh) X(leaky_relu) X(celu) X(polygamma)
// clang-format on

enum class Prim : std::uint8_t {
#define WENGERT_ENUMERATE(name) name,
  WENGERT_FOR_EACH_PRIM(WENGERT_ENUMERATE)
#undef WENGERT_ENUMERATE
};

#define WENGERT_COUNT(name) +1
inline constexpr int kPrimCount = 0 WENGERT_FOR_EACH_PRIM(WENGERT_COUNT);
#undef WENGERT_COUNT
inline constexpr int kMaxArity = 4;

struct PrimInfo {
  const char* name;
  int arity;
  bool commutative;
};
const PrimInfo& info(Prim prim);
bool find_prim(std::string_view name, Prim* prim);  // false: no such primitive

}  // namespace wengert::fused
