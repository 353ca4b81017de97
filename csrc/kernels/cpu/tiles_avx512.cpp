#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own intrinsics
#endif
#define WENGERT_SIMD_NAMESPACE avx512
#define WENGERT_VECTOR_BYTES 64
#define WENGERT_SLEEF_F32 f16
#define WENGERT_SLEEF_F64 d8
#include "kernels/cpu/tile_kernels.h"

namespace wengert::kernels {
constinit const Backend kAvx512 = avx512::make_backend("avx512");
}
#endif
