#include "kernels/cpu/backend.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace wengert::kernels {
namespace {

#if defined(__x86_64__)
// NOTE [Two vector lengths]
// 64-byte vectors pay for the elementary functions.  Simple arithmetic is bound by memory, where they measured slower than
// 32-byte ones (a product of 1000 x 1000 floats by a column: 0.73 ms against 0.16 ms on Zen 4, most of it stores that cross cache
// lines). Registers are laid out in memory, so kernels of both lengths can work on the same ones.
const Backend& mixed_backend() {
  static const Backend mixed = [] {
    using fused::Prim;
    Backend backend = kAvx512;
    std::copy(&kAvx2.loads[0][0], &kAvx2.loads[0][0] + 2 * fused::kDtypeCount, &backend.loads[0][0]);
    std::copy(&kAvx2.stores[0][0], &kAvx2.stores[0][0] + 2 * fused::kDtypeCount, &backend.stores[0][0]);
    for (Prim prim : {Prim::add,        Prim::sub,         Prim::mul,         Prim::div,        Prim::maximum,  Prim::minimum,
                      Prim::fmax,       Prim::fmin,        Prim::copysign,    Prim::lt,         Prim::le,       Prim::gt,
                      Prim::ge,         Prim::eq,          Prim::ne,          Prim::neg,        Prim::abs,      Prim::sign,
                      Prim::reciprocal, Prim::square,      Prim::sqrt,        Prim::rsqrt,      Prim::relu,     Prim::relu6,
                      Prim::floor,      Prim::ceil,        Prim::round,       Prim::trunc,      Prim::where,    Prim::clamp,
                      Prim::isnan,      Prim::hardswish,   Prim::hardsigmoid, Prim::hardtanh,   Prim::softsign, Prim::heaviside,
                      Prim::leaky_relu, Prim::logical_and, Prim::logical_or,  Prim::logical_not}) {
      for (int wide = 0; wide < 2; ++wide) {
        backend.kernels[wide][static_cast<int>(prim)] = kAvx2.kernels[wide][static_cast<int>(prim)];
      }
    }
    return backend;
  }();
  return mixed;
}
#endif

const Backend* choose() {
  const char* wish = std::getenv("WENGERT_CPU_CAPABILITY");
  std::string_view limit = wish ? wish : "avx512";
  if (limit == "baseline") return &kBaseline;
#if defined(__x86_64__)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (avx512 && limit != "avx2") return &mixed_backend();
  if (avx2) return &kAvx2;
#endif
  return &kBaseline;
}

}  // namespace

const Backend& backend() {
  static const Backend* chosen = choose();
  return *chosen;
}
[[maybe_unused]] static const Backend& made_at_load = backend();  // see common::ForkSafeMutex

}  // namespace wengert::kernels
