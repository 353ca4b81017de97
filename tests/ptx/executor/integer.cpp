// Integer and bit operations, and moves.
#include <algorithm>
#include <bit>
#include <limits>

#include "thread.h"

namespace wengert::ptx {
namespace {

template <class T>
inline constexpr u32 kWidth = sizeof(T) * 8;

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// The type of twice the width.
template <class T>
using Wide = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, s128, u128>,
                                std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, s64, u64>,
                                                   std::conditional_t<std::is_signed_v<T>, s32, u32>>>;

template <class... Types, class F>
void unary(Table& table, const std::string& name, F) {
  (table.add(name + "." + kTypeName<Types>, &apply<F, Types, Types>), ...);
}
template <class... Types, class F>
void binary(Table& table, const std::string& name, F) {
  (table.add(name + "." + kTypeName<Types>, &apply<F, Types, Types, Types>), ...);
}
template <class... Types, class F>
void ternary(Table& table, const std::string& name, F) {
  (table.add(name + "." + kTypeName<Types>, &apply<F, Types, Types, Types, Types>), ...);
}

template <class T>
T low_product(T a, T b) {
  return static_cast<T>(static_cast<u64>(a) * static_cast<u64>(b));
}
template <class T>
T high_product(T a, T b) {
  return static_cast<T>((static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b)) >> kWidth<T>);
}

// a + b or a - b with the thread's carry, which is a borrow for differences.
template <class T, bool kSubtract>
T with_carry(Thread& thread, const Instruction& instruction, T a, T b) {
  const u128 carry = has(instruction, flag::kCarryIn) && thread.carry;
  const u128 sum = kSubtract ? static_cast<u128>(a) - b - carry : static_cast<u128>(a) + b + carry;
  if (has(instruction, flag::kCarryOut)) thread.carry = ((sum >> kWidth<T>)&1) != 0;
  return static_cast<T>(sum);
}
template <class T, bool kSubtract>
void carry_sum(Thread& thread, const Instruction& instruction) {
  const T a = get<T>(thread, instruction.operand[1]), b = get<T>(thread, instruction.operand[2]);
  put<T>(thread, instruction.operand[0], with_carry<T, kSubtract>(thread, instruction, a, b));
}
template <class T, bool kHigh>
void carry_multiply_add(Thread& thread, const Instruction& instruction) {
  const T a = get<T>(thread, instruction.operand[1]), b = get<T>(thread, instruction.operand[2]);
  const auto product = static_cast<Unsigned<T>>(kHigh ? high_product(a, b) : low_product(a, b));
  const auto c = get<Unsigned<T>>(thread, instruction.operand[3]);
  put<Unsigned<T>>(thread, instruction.operand[0], with_carry<Unsigned<T>, false>(thread, instruction, product, c));
}
template <class... Types>
void add_carry_operations(Table& table) {
  (table.add(std::string("add.carry.") + kTypeName<Types>, &carry_sum<Types, false>), ...);
  (table.add(std::string("sub.carry.") + kTypeName<Types>, &carry_sum<Types, true>), ...);
  (table.add(std::string("mad.lo.carry.") + kTypeName<Types>, &carry_multiply_add<Types, false>), ...);
  (table.add(std::string("mad.hi.carry.") + kTypeName<Types>, &carry_multiply_add<Types, true>), ...);
  (table.add(std::string("mad.hi.carry.") + kTypeName<std::make_signed_t<Types>>,
             &carry_multiply_add<std::make_signed_t<Types>, true>),
   ...);
}

// The 48-bit product of the low 24 bits of each, of which .hi takes the upper 32.
template <bool kHigh, class T>
T product24(T a, T b) {
  const s64 product = s64{static_cast<T>(a << 8) >> 8} * s64{static_cast<T>(b << 8) >> 8};
  return static_cast<T>(kHigh ? product >> 16 : product);
}

template <class... Types>
void add_products(Table& table) {
  const auto wide = []<class T>(T a, T b) { return static_cast<Wide<T>>(static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b)); };
  (table.add(std::string("mul.wide.") + kTypeName<Types>, &apply<decltype(wide), Wide<Types>, Types, Types>), ...);
  const auto wide_add = []<class T>(T a, T b, Wide<T> c) {
    return static_cast<Unsigned<Wide<T>>>(static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b)) + static_cast<Unsigned<Wide<T>>>(c);
  };
  (table.add(std::string("mad.wide.") + kTypeName<Types>, &apply<decltype(wide_add), Wide<Types>, Types, Types, Wide<Types>>),
   ...);
}

template <class T>
T shift_left(T a, u32 count) {
  return count >= kWidth<T> ? T{0} : static_cast<T>(a << count);
}
template <class T>
T shift_right(T a, u32 count) {
  if (count >= kWidth<T>) return a < 0 ? static_cast<T>(-1) : T{0};
  return static_cast<T>(a >> count);
}
template <class... Types>
void add_shifts(Table& table) {
  const auto left = []<class T>(T a, u32 count) { return shift_left(a, count); };
  const auto right = []<class T>(T a, u32 count) { return shift_right(a, count); };
  (table.add(std::string("shl.") + kTypeName<Types>, &apply<decltype(left), Types, Types, u32>), ...);
  (table.add(std::string("shr.") + kTypeName<Types>, &apply<decltype(right), Types, Types, u32>), ...);
}

template <class T>
T extract_field(T a, u32 position, u32 length) {
  position &= 255;
  length &= 255;
  if (length == 0) return 0;
  const u32 last = std::min(position + length - 1, kWidth<T> - 1);
  const bool fill = std::is_signed_v<T> && ((a >> last) & 1) != 0;
  T field = 0;
  for (u32 bit = 0; bit < kWidth<T>; ++bit) {
    const bool inside = bit < length && position + bit < kWidth<T>;
    const bool set = inside ? ((a >> (position + bit)) & 1) != 0 : fill;
    field = static_cast<T>(field | static_cast<T>(static_cast<Unsigned<T>>(set) << bit));
  }
  return field;
}
template <class T>
T insert_field(T field, T into, u32 position, u32 length) {
  position &= 255;
  length &= 255;
  for (u32 bit = 0; bit < length && position + bit < kWidth<T>; ++bit) {
    const T mask = static_cast<T>(T{1} << (position + bit));
    into = static_cast<T>((into & ~mask) | (((field >> bit) & 1) << (position + bit)));
  }
  return into;
}
template <class T>
u32 find_leading(const Instruction& instruction, T a) {
  auto bits = static_cast<Unsigned<T>>(a);
  if (a < 0) bits = static_cast<Unsigned<T>>(~bits);
  if (bits == 0) return ~u32{0};
  const auto zeros = static_cast<u32>(std::countl_zero(bits));
  return has(instruction, flag::kShiftAmount) ? zeros : kWidth<T> - 1 - zeros;
}
template <class... Types>
void add_bit_fields(Table& table) {
  const auto extract = []<class T>(T a, u32 position, u32 length) { return extract_field(a, position, length); };
  const auto insert = []<class T>(T field, T into, u32 position, u32 length) {
    return insert_field(field, into, position, length);
  };
  const auto find = []<class T>(const Instruction& instruction, T a) { return find_leading(instruction, a); };
  (table.add(std::string("bfe.") + kTypeName<Types>, &apply<decltype(extract), Types, Types, u32, u32>), ...);
  (table.add(std::string("bfi.") + kTypeName<Types>, &apply<decltype(insert), Types, Types, Types, u32, u32>), ...);
  (table.add(std::string("bfind.") + kTypeName<Types>, &apply<decltype(find), u32, Types>), ...);
}

u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 bytes = (static_cast<u64>(b) << 32) | a;
  u32 result = 0;
  for (u32 i = 0; i < 4; ++i) {
    const u32 choice = (selector >> (4 * i)) & 15;
    u32 byte = static_cast<u32>(bytes >> (8 * (choice & 7))) & 255;
    if (choice & 8) byte = (byte & 128) ? 255 : 0;  // replicates the sign
    result |= byte << (8 * i);
  }
  return result;
}

u32 lookup_logic(u32 a, u32 b, u32 c, u32 truth) {
  u32 result = 0;
  for (u32 row = 0; row < 8; ++row) {
    if ((truth >> row) & 1) result |= ((row & 4) ? a : ~a) & ((row & 2) ? b : ~b) & ((row & 1) ? c : ~c);
  }
  return result;
}

template <bool kSignedA, bool kSignedB>
u32 dot4(u32 a, u32 b, u32 sum) {
  for (int i = 0; i < 4; ++i) {
    const auto x = static_cast<u8>(a >> (8 * i)), y = static_cast<u8>(b >> (8 * i));
    sum += static_cast<u32>((kSignedA ? static_cast<s8>(x) : s32{x}) * (kSignedB ? static_cast<s8>(y) : s32{y}));
  }
  return sum;
}

// Moves between one register and the equal parts of it.
template <class T>
void pack(Thread& thread, const Instruction& instruction) {
  u64 bits = 0;
  for (int i = 0; i < instruction.count; ++i) {
    bits |= static_cast<u64>(get<T>(thread, instruction.operand[1 + i])) << (i * kWidth<T>);
  }
  put<u64>(thread, instruction.operand[0], bits);
}
template <class T>
void unpack(Thread& thread, const Instruction& instruction) {
  const u64 bits = get<u64>(thread, instruction.operand[instruction.count]);
  for (int i = 0; i < instruction.count; ++i) put<T>(thread, instruction.operand[i], static_cast<T>(bits >> (i * kWidth<T>)));
}

template <class... Types>
void add_moves(Table& table) {
  const auto move = [](auto a) { return a; };
  const auto select = [](auto a, auto b, bool choice) { return choice ? a : b; };
  (table.add(std::string("mov.") + kTypeName<Types>, &apply<decltype(move), Types, Types>), ...);
  (table.add(std::string("selp.") + kTypeName<Types>, &apply<decltype(select), Types, Types, Types, bool>), ...);
  const auto by_sign = [](auto a, auto b, s32 c) { return c >= 0 ? a : b; };
  const auto by_float_sign = [](auto a, auto b, float c) { return c >= 0 ? a : b; };
  (table.add(std::string("slct.s32.") + kTypeName<Types>, &apply<decltype(by_sign), Types, Types, Types, s32>), ...);
  (table.add(std::string("slct.f32.") + kTypeName<Types>, &apply<decltype(by_float_sign), Types, Types, Types, float>), ...);
}

void add_single_width_operations(Table& table) {
  const auto permute = [](u32 a, u32 b, u32 selector) { return permute_bytes(a, b, selector); };
  table.add("prmt.u32", &apply<decltype(permute), u32, u32, u32, u32>);
  const auto logic = [](u32 a, u32 b, u32 c, u32 truth) { return lookup_logic(a, b, c, truth); };
  table.add("lop3.u32", &apply<decltype(logic), u32, u32, u32, u32, u32>);
  const auto funnel = [](const Instruction& instruction, u32 low, u32 high, u32 count) {
    count = has(instruction, flag::kWrap) ? count & 31 : std::min(count, u32{32});
    const u64 both = (static_cast<u64>(high) << 32) | low;
    return static_cast<u32>(has(instruction, flag::kLeft) ? (both << count) >> 32 : both >> count);
  };
  table.add("shf.u32", &apply<decltype(funnel), u32, u32, u32, u32>);
  const auto mask = [](const Instruction& instruction, u32 position, u32 length) {
    if (has(instruction, flag::kWrap)) position &= 31, length &= 31;
    return shift_left(length >= 32 ? ~u32{0} : (u32{1} << length) - 1, position);
  };
  table.add("bmsk.u32", &apply<decltype(mask), u32, u32, u32>);
  const auto extend = []<class T>(const Instruction& instruction, T a, u32 width) {
    if (has(instruction, flag::kWrap)) width &= 31;
    return extract_field(a, 0, std::min(width, u32{32}));
  };
  table.add("szext.u32", &apply<decltype(extend), u32, u32, u32>);
  table.add("szext.s32", &apply<decltype(extend), s32, s32, u32>);
  const auto saturated = [](s32 a, s32 b) {
    return std::clamp<s64>(s64{a} + b, std::numeric_limits<s32>::min(), std::numeric_limits<s32>::max());
  };
  table.add("add.sat.s32", &apply<decltype(saturated), s32, s32, s32>);
  const auto saturated_difference = [](s32 a, s32 b) {
    return std::clamp<s64>(s64{a} - b, std::numeric_limits<s32>::min(), std::numeric_limits<s32>::max());
  };
  table.add("sub.sat.s32", &apply<decltype(saturated_difference), s32, s32, s32>);
  const auto add_dot = [&]<bool kA, bool kB>(const char* name) {
    const auto dot = [](u32 a, u32 b, u32 sum) { return dot4<kA, kB>(a, b, sum); };
    table.add(name, &apply<decltype(dot), u32, u32, u32, u32>);
  };
  add_dot.operator()<false, false>("dp4a.u32.u32");
  add_dot.operator()<true, true>("dp4a.s32.s32");
  add_dot.operator()<false, true>("dp4a.u32.s32");
  add_dot.operator()<true, false>("dp4a.s32.u32");
}

}  // namespace

void add_integer_operations(Table& table) {
  // Sums and low products do not depend on the sign, so they exist for unsigned types only.
  binary<u16, u32, u64>(table, "add", []<class T>(T a, T b) { return static_cast<T>(a + b); });
  binary<u16, u32, u64>(table, "sub", []<class T>(T a, T b) { return static_cast<T>(a - b); });
  binary<u16, u32, u64>(table, "mul.lo", [](auto a, auto b) { return low_product(a, b); });
  binary<u16, u32, u64, s16, s32, s64>(table, "mul.hi", [](auto a, auto b) { return high_product(a, b); });
  ternary<u16, u32, u64>(table, "mad.lo", []<class T>(T a, T b, T c) { return static_cast<T>(low_product(a, b) + c); });
  ternary<u16, u32, u64, s16, s32, s64>(table, "mad.hi", []<class T>(T a, T b, T c) {
    return static_cast<Unsigned<T>>(high_product(a, b)) + static_cast<Unsigned<T>>(c);
  });
  add_products<u16, u32, s16, s32>(table);
  binary<u32, s32>(table, "mul24.lo", [](auto a, auto b) { return product24<false>(a, b); });
  binary<u32, s32>(table, "mul24.hi", [](auto a, auto b) { return product24<true>(a, b); });
  ternary<u32, s32>(table, "mad24.lo", [](auto a, auto b, u32 c) { return static_cast<u32>(product24<false>(a, b)) + c; });
  ternary<u32, s32>(table, "mad24.hi", [](auto a, auto b, u32 c) { return static_cast<u32>(product24<true>(a, b)) + c; });
  add_carry_operations<u32, u64>(table);

  // PTX leaves division by zero open; what GPUs return is all ones, and the dividend as remainder.
  binary<u16, u32, u64, s16, s32, s64>(table, "div", []<class T>(T a, T b) -> T {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - static_cast<Unsigned<T>>(a));
    return static_cast<T>(a / b);
  });
  binary<u16, u32, u64, s16, s32, s64>(table, "rem", []<class T>(T a, T b) -> T {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  });
  binary<u16, u32, u64, s16, s32, s64>(table, "min", [](auto a, auto b) { return std::min(a, b); });
  binary<u16, u32, u64, s16, s32, s64>(table, "max", [](auto a, auto b) { return std::max(a, b); });
  ternary<u16, u32, u64, s16, s32, s64>(table, "sad", []<class T>(T a, T b, T c) {
    using U = Unsigned<T>;
    return static_cast<U>(a < b ? static_cast<U>(b) - static_cast<U>(a) : static_cast<U>(a) - static_cast<U>(b)) +
           static_cast<U>(c);
  });
  unary<s16, s32, s64>(table, "neg", []<class T>(T a) { return 0 - static_cast<Unsigned<T>>(a); });
  unary<s16, s32, s64>(table, "abs",
                       []<class T>(T a) { return a < 0 ? 0 - static_cast<Unsigned<T>>(a) : static_cast<Unsigned<T>>(a); });

  binary<bool, u16, u32, u64>(table, "and", []<class T>(T a, T b) { return static_cast<T>(a & b); });
  binary<bool, u16, u32, u64>(table, "or", []<class T>(T a, T b) { return static_cast<T>(a | b); });
  binary<bool, u16, u32, u64>(table, "xor", []<class T>(T a, T b) { return static_cast<T>(a ^ b); });
  unary<bool>(table, "not", [](bool a) { return !a; });
  unary<u16, u32, u64>(table, "not", [](auto a) { return ~a; });
  unary<u16, u32, u64>(table, "cnot", [](auto a) { return a == 0; });
  add_shifts<u16, u32, u64, s16, s32, s64>(table);
  add_bit_fields<u32, u64, s32, s64>(table);
  const auto ones = [](auto a) { return std::popcount(a); };
  table.add("popc.u32", &apply<decltype(ones), u32, u32>);
  table.add("popc.u64", &apply<decltype(ones), u32, u64>);
  const auto zeros = [](auto a) { return std::countl_zero(a); };
  table.add("clz.u32", &apply<decltype(zeros), u32, u32>);
  table.add("clz.u64", &apply<decltype(zeros), u32, u64>);
  unary<u32, u64>(table, "brev", []<class T>(T a) {
    T reversed = 0;
    for (u32 bit = 0; bit < kWidth<T>; ++bit) reversed |= ((a >> bit) & 1) << (kWidth<T> - 1 - bit);
    return reversed;
  });
  add_single_width_operations(table);
  add_moves<bool, u16, u32, u64>(table);
  table.add("pack.u8", &pack<u8>);
  table.add("pack.u16", &pack<u16>);
  table.add("pack.u32", &pack<u32>);
  table.add("unpack.u8", &unpack<u8>);
  table.add("unpack.u16", &unpack<u16>);
  table.add("unpack.u32", &unpack<u32>);
}

}  // namespace wengert::ptx
