#define WENGERT_SIMD_NAMESPACE baseline
#define WENGERT_VECTOR_BYTES 16
#include "kernels/cpu/tile_kernels.h"

namespace wengert::kernels {
constinit const Backend kBaseline = baseline::make_backend("baseline");
}
