#if defined(__x86_64__)
#define WENGERT_SIMD_NAMESPACE avx2
#define WENGERT_VECTOR_BYTES 32
#define WENGERT_SLEEF_F32 f8
#define WENGERT_SLEEF_F64 d4
#include "kernels/cpu/tile_kernels.h"

namespace wengert::kernels {
constinit const Backend kAvx2 = avx2::make_backend("avx2");
}
#endif
