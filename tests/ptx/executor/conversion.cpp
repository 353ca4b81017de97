// cvt between all scalar types, and from two floats to a packed pair.
#include <limits>

#include "numbers.h"

namespace wengert::ptx {
namespace {

template <class V>
V round_to_integer(u32 mode, V value) {
  switch (mode) {
    case rounding::kNearest:
      return std::nearbyint(value);
    case rounding::kZero:
      return std::trunc(value);
    case rounding::kDown:
      return std::floor(value);
    default:
      return std::ceil(value);
  }
}

// Clamps to the range of I. A NaN gives 0, or the value with only the top bit set where one of the types has 64 bits.
template <class I, class V>
I float_to_integer(V value, bool source_is_double) {
  if (std::isnan(value)) {
    return source_is_double || sizeof(I) == 8 ? static_cast<I>(std::make_unsigned_t<I>{1} << (sizeof(I) * 8 - 1)) : I{0};
  }
  // Powers of two, so exact in V: the first value above the range and the lowest one in it.
  const V above = std::ldexp(V{1}, std::numeric_limits<I>::digits);
  if (value >= above) return std::numeric_limits<I>::max();
  if (value <= static_cast<V>(std::numeric_limits<I>::min())) return std::numeric_limits<I>::min();
  return static_cast<I>(value);
}

template <class D, class S>
D clamp_integer(S value) {
  const s128 low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
  const s128 wide = value;
  return static_cast<D>(wide < low ? low : wide > high ? high : wide);
}

template <class D, class S>
D convert(const Instruction& instruction, S source) {
  constexpr bool kFromInteger = std::is_integral_v<S>, kToInteger = std::is_integral_v<D>;
  if constexpr (kFromInteger && kToInteger) {
    return has(instruction, flag::kSaturate) ? clamp_integer<D>(source) : static_cast<D>(source);
  } else if constexpr (kToInteger) {
    return float_to_integer<D>(round_to_integer(instruction.rounding, read_float(instruction, source)),
                               std::is_same_v<S, double>);
  } else if constexpr (kFromInteger && std::is_floating_point_v<D>) {
    return write_float<D>(instruction,
                          under_rounding(instruction.rounding, [](auto value) { return static_cast<D>(value); }, source));
  } else if constexpr (kFromInteger) {
    const bool negative = source < 0;
    const u64 magnitude = negative ? 0 - static_cast<u64>(source) : static_cast<u64>(source);
    return write_float<D>(instruction, integer_to_odd(negative, magnitude).value);
  } else if constexpr (std::is_floating_point_v<D>) {
    return write_float<D>(
        instruction,
        under_rounding(instruction.rounding, [](auto value) { return static_cast<D>(value); }, read_float(instruction, source)));
  } else {
    return write_float<D>(instruction, static_cast<double>(read_float(instruction, source)));
  }
}

template <class D, class S>
void add_conversion(Table& table) {
  const std::string types = std::string(".") + kTypeName<D> + "." + kTypeName<S>;
  const auto conversion = [](const Instruction& instruction, S source) { return convert<D>(instruction, source); };
  table.add("cvt" + types, &apply<decltype(conversion), D, S>);
  if constexpr (!std::is_integral_v<D> && std::is_same_v<D, S>) {
    // The same type again, but to an integral value.
    const auto integral = [](const Instruction& instruction, S source) {
      Instruction nearest = instruction;
      nearest.rounding = rounding::kNearest;
      return write_float<D>(nearest, round_to_integer(instruction.rounding, read_float(instruction, source)));
    };
    table.add("cvt.integral" + types, &apply<decltype(integral), D, S>);
  }
}

template <class D, class... Sources>
void add_from_all(Table& table) {
  (add_conversion<D, Sources>(table), ...);
}
template <class... Types>
void add_all_pairs(Table& table) {
  (add_from_all<Types, Types...>(table), ...);
}

template <class T>
void add_packing(Table& table) {
  const auto packing = [](const Instruction& instruction, float high, float low) {
    return Pair<T>{write_float<T>(instruction, low), write_float<T>(instruction, high)};
  };
  table.add(std::string("cvt.") + kTypeName<Pair<T>> + ".f32", &apply<decltype(packing), Pair<T>, float, float>);
}

}  // namespace

void add_conversions(Table& table) {
  add_all_pairs<u8, u16, u32, u64, s8, s16, s32, s64, f16, bf16, float, double>(table);
  add_packing<f16>(table);
  add_packing<bf16>(table);
}

}  // namespace wengert::ptx
