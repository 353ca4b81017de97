#include "kernels/cpu/backend.h"

#include <cstdlib>
#include <string_view>

namespace wengert::kernels {
namespace {

const Backend* choose() {
  const char* wish = std::getenv("WENGERT_CPU_CAPABILITY");
  std::string_view limit = wish ? wish : "avx512";
  if (limit == "baseline") return &kBaseline;
#if defined(__x86_64__)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (avx512 && limit != "avx2") return &kAvx512;
  if (avx2) return &kAvx2;
#endif
  return &kBaseline;
}

}  // namespace

const Backend& backend() {
  static const Backend* chosen = choose();
  return *chosen;
}

}  // namespace wengert::kernels
