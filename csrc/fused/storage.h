// Storage types of the 16-bit floats and bool, and the conversions between storage and arithmetic types, on host and device.
#pragma once
#include <string.h>

#include <cstdint>

#include "common/macros.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace wengert::fused {

// Conversions round to nearest even, as PyTorch's do.
struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};
struct Bool {
  std::uint8_t byte;
};

WENGERT_HD float from_bits(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
WENGERT_HD std::uint32_t to_bits(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

template <class T, class S>
WENGERT_HD T widen(S s) {
  return static_cast<T>(s);
}
template <class T>
WENGERT_HD T widen(Bool s) {
  return static_cast<T>(s.byte != 0);
}
template <class T>
WENGERT_HD T widen(Bf16 s) {
  return static_cast<T>(from_bits(static_cast<std::uint32_t>(s.bits) << 16));
}
template <class T>
WENGERT_HD T widen(F16 s) {
#if defined(__F16C__)
  return static_cast<T>(_cvtsh_ss(s.bits));
#else
  std::uint32_t sign = static_cast<std::uint32_t>(s.bits & 0x8000) << 16;
  std::uint32_t exponent = s.bits >> 10 & 31, fraction = s.bits & 1023;
  if (exponent == 31) return static_cast<T>(from_bits(sign | 0x7f800000 | fraction << 13));
  if (exponent == 0) return static_cast<T>((sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f);
  return static_cast<T>(from_bits(sign | (exponent + 112) << 23 | fraction << 13));
#endif
}

template <class S>
struct Narrow {
  template <class T>
  WENGERT_HD static S from(T value) {
    return static_cast<S>(value);
  }
};
template <>
struct Narrow<Bool> {
  template <class T>
  WENGERT_HD static Bool from(T value) {
    return {static_cast<std::uint8_t>(value != 0)};
  }
};
template <>
struct Narrow<Bf16> {
  template <class T>
  WENGERT_HD static Bf16 from(T value) {
    std::uint32_t bits = to_bits(static_cast<float>(value));
    if (value != value) return {0x7fc0};
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};
template <>
struct Narrow<F16> {
  template <class T>
  WENGERT_HD static F16 from(T value) {
#if defined(__F16C__)
    return {_cvtss_sh(static_cast<float>(value), 0)};
#else
    std::uint32_t bits = to_bits(static_cast<float>(value));
    std::uint16_t sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return {static_cast<std::uint16_t>(sign | 0x7e00)};
    if (bits >= 0x477ff000) return {static_cast<std::uint16_t>(sign | 0x7c00)};  // rounds up to 2^16 or is beyond
    if (bits < 0x38800000) {  // subnormal: adding 0.5 aligns the last place at 2^-24
      std::uint32_t aligned = to_bits(from_bits(bits) + 0.5f) - 0x3f000000;
      return {static_cast<std::uint16_t>(sign | aligned)};
    }
    bits += 0xfff + (bits >> 13 & 1);
    return {static_cast<std::uint16_t>(sign | (bits - 0x38000000) >> 13)};
#endif
  }
};

}  // namespace wengert::fused
