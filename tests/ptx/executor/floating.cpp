// Floating-point operations on f16, bf16, f32, f64 and packed pairs, and comparisons.
//
// Each result is rounded once. Half precision is computed in double: exactly, or rounded to odd where double is not enough.
// The .approx forms are computed as accurately as the others, so a test must keep the tolerance a GPU needs.
#include <limits>

#include "numbers.h"

namespace wengert::ptx {
namespace {

double as_argument(float value, double) { return value; }
Odd as_argument(float value, Odd) { return {value}; }

// One element: widens, computes in V, rounds. V is the type F sees for half precision: double, or Odd where F needs it to be
// exact.
template <class F, class T, class V, class... Sources>
T element(const Instruction& instruction, Sources... sources) {
  if constexpr (std::is_floating_point_v<T>) {
    return write_float<T>(instruction, under_rounding(instruction.rounding, F{}, read_float(instruction, sources)...));
  } else if constexpr (std::is_same_v<V, Odd>) {
    return write_float<T>(instruction, F{}(as_argument(read_float(instruction, sources), Odd{})...).value);
  } else {
    return write_float<T>(instruction, F{}(as_argument(read_float(instruction, sources), double{})...));
  }
}

template <class F, class T, class V, std::size_t... I>
void scalar(Thread& thread, const Instruction& instruction, std::index_sequence<I...>) {
  put<T>(thread, instruction.operand[0], element<F, T, V>(instruction, get<T>(thread, instruction.operand[1 + I])...));
}
template <class F, class T, class V, std::size_t... I>
void pair(Thread& thread, const Instruction& instruction, std::index_sequence<I...>) {
  const Pair<T> sources[] = {get<Pair<T>>(thread, instruction.operand[1 + I])...};
  put<Pair<T>>(thread, instruction.operand[0],
               {element<F, T, V>(instruction, sources[I].low...), element<F, T, V>(instruction, sources[I].high...)});
}
template <class F, class T, class V, std::size_t kArity>
void scalar_operation(Thread& thread, const Instruction& instruction) {
  scalar<F, T, V>(thread, instruction, std::make_index_sequence<kArity>{});
}
template <class F, class T, class V, std::size_t kArity>
void pair_operation(Thread& thread, const Instruction& instruction) {
  pair<F, T, V>(thread, instruction, std::make_index_sequence<kArity>{});
}

template <std::size_t kArity, class V, class... Types, class F>
void add_scalars(Table& table, const std::string& name, F) {
  (table.add(name + "." + kTypeName<Types>, &scalar_operation<F, Types, V, kArity>), ...);
}
template <std::size_t kArity, class V, class... Types, class F>
void add_pairs(Table& table, const std::string& name, F) {
  (table.add(name + "." + kTypeName<Pair<Types>>, &pair_operation<F, Types, V, kArity>), ...);
}
template <std::size_t kArity, class V, class F>
void add_all_types(Table& table, const std::string& name, F f) {
  add_scalars<kArity, V, f16, bf16, float, double>(table, name, f);
  add_pairs<kArity, V, f16, bf16>(table, name, f);
}

// Of zeros the negative one is smaller; a NaN loses against a number, unless the instruction says that it wins.
template <bool kMaximum, class V>
V extremum(V a, V b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  if (a == b) return std::signbit(a) == kMaximum ? b : a;
  return (a < b) == kMaximum ? b : a;
}
template <bool kMaximum, class T>
T extremum_element(const Instruction& instruction, T a, T b) {
  const auto x = read_float(instruction, a), y = read_float(instruction, b);
  const bool poisoned = has(instruction, flag::kPropagateNan) && (std::isnan(x) || std::isnan(y));
  return write_float<T>(instruction, poisoned ? std::numeric_limits<decltype(x + y)>::quiet_NaN() : extremum<kMaximum>(x, y));
}
template <bool kMaximum, class... Types>
void add_extremum(Table& table, const std::string& name) {
  const auto scalar = [](const Instruction& instruction, auto a, auto b) {
    return extremum_element<kMaximum>(instruction, a, b);
  };
  (table.add(name + "." + kTypeName<Types>, &apply<decltype(scalar), Types, Types, Types>), ...);
  const auto both = []<class T>(const Instruction& instruction, Pair<T> a, Pair<T> b) {
    return Pair<T>{extremum_element<kMaximum>(instruction, a.low, b.low),
                   extremum_element<kMaximum>(instruction, a.high, b.high)};
  };
  table.add(name + ".f16x2", &apply<decltype(both), Pair<f16>, Pair<f16>, Pair<f16>>);
  table.add(name + ".bf16x2", &apply<decltype(both), Pair<bf16>, Pair<bf16>, Pair<bf16>>);
}

double sum(double a, double b) { return a + b; }
float sum(float a, float b) { return a + b; }
Odd sum(Odd a, Odd b) { return sum_to_odd(a.value, b.value); }
double product(double a, double b) { return a * b; }
float product(float a, float b) { return a * b; }
Odd product(Odd a, Odd b) { return {a.value * b.value}; }  // exact: two half mantissas fit one double's
double negated(double a) { return -a; }
float negated(float a) { return -a; }
Odd negated(Odd a) { return {-a.value}; }
double fused(double a, double b, double c) { return std::fma(a, b, c); }
float fused(float a, float b, float c) { return std::fma(a, b, c); }
Odd fused(Odd a, Odd b, Odd c) { return sum(product(a, b), c); }

void add_arithmetic(Table& table) {
  const auto add = [](auto a, auto b) { return sum(a, b); };
  const auto subtract = [](auto a, auto b) { return sum(a, negated(b)); };
  const auto multiply = [](auto a, auto b) { return product(a, b); };
  const auto multiply_add = [](auto a, auto b, auto c) { return fused(a, b, c); };
  add_all_types<2, Odd>(table, "add", add);
  add_all_types<2, Odd>(table, "sub", subtract);
  add_all_types<2, Odd>(table, "mul", multiply);
  add_all_types<3, Odd>(table, "fma", multiply_add);
  add_pairs<2, Odd, float>(table, "add", add);
  add_pairs<2, Odd, float>(table, "sub", subtract);
  add_pairs<2, Odd, float>(table, "mul", multiply);
  add_pairs<3, Odd, float>(table, "fma", multiply_add);
  add_scalars<2, double, float, double>(table, "div", [](auto a, auto b) { return a / b; });
  add_scalars<1, double, float, double>(table, "rcp", [](auto a) { return 1 / a; });
  add_scalars<1, double, float, double>(table, "sqrt", [](auto a) { return std::sqrt(a); });
  add_extremum<false, f16, bf16, float, double>(table, "min");
  add_extremum<true, f16, bf16, float, double>(table, "max");
}

void add_transcendentals(Table& table) {
  const auto exponential = [](double a) { return std::exp2(a); };
  const auto hyperbolic = [](double a) { return std::tanh(a); };
  add_all_types<1, double>(table, "ex2", exponential);
  add_all_types<1, double>(table, "tanh", hyperbolic);
  add_scalars<1, double, float, double>(table, "rsqrt", [](double a) { return 1 / std::sqrt(a); });
  add_scalars<1, double, float>(table, "lg2", [](double a) { return std::log2(a); });
  add_scalars<1, double, float>(table, "sin", [](double a) { return std::sin(a); });
  add_scalars<1, double, float>(table, "cos", [](double a) { return std::cos(a); });
}

void add_sign_operations(Table& table) {
  add_scalars<1, double, float, double>(table, "neg", [](auto a) { return -a; });
  add_scalars<1, double, float, double>(table, "abs", [](auto a) { return std::fabs(a); });
  const auto copy_sign = [](auto sign, auto magnitude) { return std::copysign(magnitude, sign); };
  table.add("copysign.f32", &apply<decltype(copy_sign), float, float, float>);
  table.add("copysign.f64", &apply<decltype(copy_sign), double, double, double>);
  // On halves they act on the sign bits, so that a NaN keeps its payload.
  const auto flip = []<class T>(const Instruction& instruction, T a) {
    if (has(instruction, flag::kFlush)) a = flush(a);
    return T{static_cast<u16>(a.bits ^ 0x8000)};
  };
  const auto clear = []<class T>(const Instruction& instruction, T a) {
    if (has(instruction, flag::kFlush)) a = flush(a);
    return T{static_cast<u16>(a.bits & 0x7fff)};
  };
  table.add("neg.f16", &apply<decltype(flip), f16, f16>);
  table.add("neg.bf16", &apply<decltype(flip), bf16, bf16>);
  table.add("abs.f16", &apply<decltype(clear), f16, f16>);
  table.add("abs.bf16", &apply<decltype(clear), bf16, bf16>);
  const auto flip_both = [](u32 a) { return a ^ 0x80008000; };
  const auto clear_both = [](u32 a) { return a & 0x7fff7fff; };
  for (const char* type : {"f16x2", "bf16x2"}) {
    table.add(std::string("neg.") + type, &apply<decltype(flip_both), u32, u32>);
    table.add(std::string("abs.") + type, &apply<decltype(clear_both), u32, u32>);
  }
}

template <class T>
auto comparable(const Instruction& instruction, T value) {
  if constexpr (std::is_integral_v<T>) {
    return value;
  } else {
    return read_float(instruction, value);
  }
}

// A predicate; "set" turns it into a number.
template <class... Types>
void add_comparisons(Table& table) {
  const auto test = [](const Instruction& instruction, auto a, auto b) {
    return holds(instruction.mode, comparable(instruction, a), comparable(instruction, b));
  };
  (table.add(std::string("setp.") + kTypeName<Types>, &apply<decltype(test), bool, Types, Types>), ...);
}

// The result is a pair of ones and zeros, or of masks.
template <class T, bool kMask>
void set_pair(Thread& thread, const Instruction& instruction) {
  const auto a = get<Pair<T>>(thread, instruction.operand[1]), b = get<Pair<T>>(thread, instruction.operand[2]);
  const auto one = [&](T x, T y) {
    const bool outcome = holds(instruction.mode, read_float(instruction, x), read_float(instruction, y));
    return kMask ? T{static_cast<u16>(outcome ? 0xffff : 0)} : narrow<T>(outcome, rounding::kNearest);
  };
  put<Pair<T>>(thread, instruction.operand[0], {one(a.low, b.low), one(a.high, b.high)});
}
template <class T>
void setp_pair(Thread& thread, const Instruction& instruction) {
  const auto a = get<Pair<T>>(thread, instruction.operand[2]), b = get<Pair<T>>(thread, instruction.operand[3]);
  put<bool>(thread, instruction.operand[0],
            holds(instruction.mode, read_float(instruction, a.low), read_float(instruction, b.low)));
  put<bool>(thread, instruction.operand[1],
            holds(instruction.mode, read_float(instruction, a.high), read_float(instruction, b.high)));
}

template <class... Types>
void add_classification(Table& table) {
  const auto finite = [](auto a) { return std::isfinite(a); };
  const auto infinite = [](auto a) { return std::isinf(a); };
  const auto number = [](auto a) { return !std::isnan(a); };
  const auto not_a_number = [](auto a) { return std::isnan(a); };
  const auto normal = [](auto a) { return std::isnormal(a); };
  const auto subnormal = [](auto a) { return std::fpclassify(a) == FP_SUBNORMAL; };
  (table.add(std::string("testp.finite.") + kTypeName<Types>, &apply<decltype(finite), bool, Types>), ...);
  (table.add(std::string("testp.infinite.") + kTypeName<Types>, &apply<decltype(infinite), bool, Types>), ...);
  (table.add(std::string("testp.number.") + kTypeName<Types>, &apply<decltype(number), bool, Types>), ...);
  (table.add(std::string("testp.notanumber.") + kTypeName<Types>, &apply<decltype(not_a_number), bool, Types>), ...);
  (table.add(std::string("testp.normal.") + kTypeName<Types>, &apply<decltype(normal), bool, Types>), ...);
  (table.add(std::string("testp.subnormal.") + kTypeName<Types>, &apply<decltype(subnormal), bool, Types>), ...);
}

}  // namespace

void add_float_operations(Table& table) {
  add_arithmetic(table);
  add_transcendentals(table);
  add_sign_operations(table);
  add_comparisons<u16, u32, u64, s16, s32, s64, f16, bf16, float, double>(table);
  table.add("set.f16x2", &set_pair<f16, false>);
  table.add("set.bf16x2", &set_pair<bf16, false>);
  table.add("set.mask.f16x2", &set_pair<f16, true>);
  table.add("set.mask.bf16x2", &set_pair<bf16, true>);
  table.add("setp.f16x2", &setp_pair<f16>);
  table.add("setp.bf16x2", &setp_pair<bf16>);
  add_classification<float, double>(table);
}

}  // namespace wengert::ptx
