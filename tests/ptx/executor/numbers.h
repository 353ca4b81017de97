// Half precision, rounding modes and flushing of subnormals.
#pragma once

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>

#include "thread.h"

namespace wengert::ptx {

// A double rounded to odd: where it is inexact, its last bit is 1. Rounding it once more to at most 51 bits gives what rounding
// the exact value would give (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
struct Odd {
  double value;
};

inline Odd sum_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return {sum};
  const double part = sum - a;
  const double error = (a - (sum - part)) + (b - part);
  if (error == 0 || (std::bit_cast<u64>(sum) & 1)) return {sum};
  return {std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL)};
}

inline Odd integer_to_odd(bool negative, u64 magnitude) {
  constexpr int kSpareBits = 11;
  if (magnitude >> 53) {
    const u64 dropped = magnitude & ((u64{1} << kSpareBits) - 1);
    const double value = std::ldexp(static_cast<double>((magnitude >> kSpareBits) | (dropped != 0)), kSpareBits);
    return {negative ? -value : value};
  }
  const auto value = static_cast<double>(magnitude);
  return {negative ? -value : value};
}

template <class T>
struct HalfFormat;
template <>
struct HalfFormat<f16> {
  static constexpr int kMantissaBits = 10, kLowestExponent = -14;
  static constexpr u32 kInfinity = 0x7c00;
};
template <>
struct HalfFormat<bf16> {
  static constexpr int kMantissaBits = 7, kLowestExponent = -126;
  static constexpr u32 kInfinity = 0x7f80;
};

template <class T>
T narrow(double value, u32 mode) {
  using Format = HalfFormat<T>;
  if (std::isnan(value)) return {0x7fff};
  const u32 sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (std::isinf(value)) return {static_cast<u16>(sign | Format::kInfinity)};
  if (magnitude == 0) return {static_cast<u16>(sign)};
  const int exponent = std::max(std::ilogb(magnitude), Format::kLowestExponent);
  const bool away = mode == (sign ? rounding::kDown : rounding::kUp);
  u32 code = Format::kInfinity;
  if (exponent <= -Format::kLowestExponent + 1) {
    const double scaled = std::ldexp(magnitude, Format::kMantissaBits - exponent);
    const double whole = mode == rounding::kNearest ? std::nearbyint(scaled) : away ? std::ceil(scaled) : std::floor(scaled);
    // The leading bit of a normal number and a carry out of the mantissa both add one to the exponent, as they should.
    code = (static_cast<u32>(exponent - Format::kLowestExponent) << Format::kMantissaBits) + static_cast<u32>(whole);
  }
  if (code >= Format::kInfinity) {
    code = mode == rounding::kNearest || away ? Format::kInfinity : Format::kInfinity - 1;
  }
  return {static_cast<u16>(sign | code)};
}

inline float widen(bf16 value) { return std::bit_cast<float>(static_cast<u32>(value.bits) << 16); }

inline float widen(f16 value) {
  const u32 exponent = (value.bits >> 10) & 31, mantissa = value.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = std::bit_cast<float>(0x7f800000u | (mantissa << 13));
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::bit_cast<float>(((exponent + 112) << 23) | (mantissa << 13));
  }
  return std::copysign(magnitude, (value.bits & 0x8000) ? -1.0f : 1.0f);
}

inline float flush(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; }
inline f16 flush(f16 value) { return (value.bits & 0x7c00) == 0 ? f16{static_cast<u16>(value.bits & 0x8000)} : value; }
inline double flush(double value) { return value; }
inline bf16 flush(bf16 value) { return value; }

// The number in a float operand: float and double are themselves, a half is widened.
template <class T>
auto read_float(const Instruction& instruction, T value) {
  if (has(instruction, flag::kFlush)) value = flush(value);
  if constexpr (std::is_floating_point_v<T>) {
    return value;
  } else {
    return widen(value);
  }
}

// Evaluates f(values...) under a rounding mode. The volatiles keep the compiler from evaluating it outside.
template <class F, class... Values>
auto under_rounding(u32 mode, F f, Values... values) {
  if (mode == rounding::kNearest) return f(values...);
  constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  std::fesetround(kModes[mode]);
  const auto evaluate = [&](volatile Values... copies) {
    volatile auto result = f(static_cast<Values>(copies)...);
    return result;
  };
  const decltype(f(values...)) result = evaluate(values...);
  std::fesetround(FE_TONEAREST);
  return result;
}

template <class V>
V saturate(V value) {
  return value > 0 ? std::min(value, V{1}) : V{0};  // NaN becomes 0
}

// Turns a number into a result of type T, with the modifiers of the instruction.
template <class T, class V>
T write_float(const Instruction& instruction, V value) {
  if (has(instruction, flag::kSaturate)) value = saturate(value);
  if (has(instruction, flag::kRelu) && !(value > 0) && !std::isnan(value)) value = 0;
  T result;
  if constexpr (std::is_floating_point_v<T>) {
    result = static_cast<T>(value);
  } else {
    result = narrow<T>(value, instruction.rounding);
  }
  return has(instruction, flag::kFlush) ? flush(result) : result;
}

template <class V>
bool holds(u32 mode, V x, V y) {
  bool unordered = false;
  if constexpr (std::is_floating_point_v<V>) unordered = std::isnan(x) || std::isnan(y);
  switch (mode) {
    case compare::kEq:
      return x == y;
    case compare::kNe:
      return x != y && !unordered;
    case compare::kLt:
      return x < y;
    case compare::kLe:
      return x <= y;
    case compare::kGt:
      return x > y;
    case compare::kGe:
      return x >= y;
    case compare::kEqu:
      return x == y || unordered;
    case compare::kNeu:
      return x != y;
    case compare::kLtu:
      return x < y || unordered;
    case compare::kLeu:
      return x <= y || unordered;
    case compare::kGtu:
      return x > y || unordered;
    case compare::kGeu:
      return x >= y || unordered;
    case compare::kNum:
      return !unordered;
    default:
      return unordered;
  }
}

}  // namespace wengert::ptx
