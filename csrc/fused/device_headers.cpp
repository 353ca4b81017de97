// The text of the headers that generated kernels include.  The assembler looks for them below csrc, and no dependency file names
// them: setup.py and CMakeLists.txt say where they are and on what this file depends.
#include "fused/cuda_source.h"

#if defined(__APPLE__)
#define WENGERT_TEXT_SECTION ".const\n"
#define WENGERT_CODE_SECTION ".text\n"
#else
#define WENGERT_TEXT_SECTION ".pushsection .rodata\n"
#define WENGERT_CODE_SECTION ".popsection\n"
#endif
#define WENGERT_QUOTE(x) #x
#define WENGERT_LABEL(prefix, symbol) WENGERT_QUOTE(prefix) #symbol

#define WENGERT_EMBED(symbol, path)                                                    \
  extern "C" __attribute__((visibility("hidden"))) const char wengert_text_##symbol[]; \
  __asm__(WENGERT_TEXT_SECTION WENGERT_LABEL_OF(symbol) ":\n.incbin \"" path "\"\n.byte 0\n" WENGERT_CODE_SECTION);
#define WENGERT_EXPAND_LABEL(prefix, symbol) WENGERT_LABEL(prefix, wengert_text_##symbol)
#define WENGERT_LABEL_OF(symbol) WENGERT_EXPAND_LABEL(__USER_LABEL_PREFIX__, symbol)

WENGERT_EMBED(macros, "common/macros.h")
WENGERT_EMBED(kernel_abi, "fused/kernel_abi.h")
WENGERT_EMBED(nest_kernel, "fused/nest_kernel.h")
WENGERT_EMBED(primitive_ops, "fused/primitive_ops.h")
WENGERT_EMBED(primitives, "fused/primitives.h")
WENGERT_EMBED(scalar_math, "fused/scalar_math.h")
WENGERT_EMBED(special_functions, "fused/special_functions.h")
WENGERT_EMBED(storage, "fused/storage.h")

namespace wengert::fused {
namespace {

// NVRTC has no standard headers; these say what the embedded ones need of them.  Mathematical functions are built in.
constexpr const char* kCstdint = R"(#pragma once
namespace std {
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
}
)";
constexpr const char* kStringView = R"(#pragma once
namespace std {
class string_view;
}
)";
constexpr const char* kMath = R"(#pragma once
#define HUGE_VAL __builtin_bit_cast(double, 0x7ff0000000000000ull)
#define NAN __builtin_bit_cast(float, 0x7fc00000u)
)";
constexpr const char* kString = "#pragma once\n";  // memcpy is built in

}  // namespace

std::span<const EmbeddedHeader> device_headers() {
  static constexpr EmbeddedHeader kHeaders[] = {
      {"common/macros.h", wengert_text_macros},
      {"fused/kernel_abi.h", wengert_text_kernel_abi},
      {"fused/nest_kernel.h", wengert_text_nest_kernel},
      {"fused/primitive_ops.h", wengert_text_primitive_ops},
      {"fused/primitives.h", wengert_text_primitives},
      {"fused/scalar_math.h", wengert_text_scalar_math},
      {"fused/special_functions.h", wengert_text_special_functions},
      {"fused/storage.h", wengert_text_storage},
      {"cstdint", kCstdint},
      {"string_view", kStringView},
      {"math.h", kMath},
      {"string.h", kString},
  };
  return kHeaders;
}

}  // namespace wengert::fused
