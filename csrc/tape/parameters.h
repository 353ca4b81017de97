// The typed parameters of a row: what reading a node takes from it and describing it is given.
//
// They are one number (integer, bool, double) or slot, or an aggregate of numbers, slots, lists and further aggregates.  Between
// reading and describing they are numbers in the node's lists, which are part of the signature: what describe is given is signed,
// whatever it is.
#pragma once
#include <ATen/core/DimVector.h>

#include <concepts>
#include <cstdint>
#include <iterator>
#include <tuple>
#include <type_traits>

#include "tape/tape.h"

namespace wengert::tape {

// A saved tensor: its number on the tape, -1 where it is absent or not needed.
struct Slot {
  std::int32_t number = -1;
};

using Integers = at::DimVector;  // these and a few slots lie within the parameters: reading a usual node allocates nothing
using Slots = c10::SmallVector<Slot, 4>;

struct Nothing {};  // the parameters of a row that takes none

namespace parameters {

struct Anything {
  template <class T>
  operator T() const;  // NOLINT: implicit, as it stands for a field of any type
};

template <class P, class... Given>
consteval int count_fields() {
  if constexpr (requires { P{Given{}..., Anything{}}; }) {
    return count_fields<P, Given..., Anything>();
  } else {
    return sizeof...(Given);
  }
}

template <class P>
auto fields(P& p) {
  constexpr int kCount = count_fields<std::remove_const_t<P>>();
  static_assert(kCount <= 5, "write one more line here");
  if constexpr (kCount == 1) {
    auto& [a] = p;
    return std::tie(a);
  } else if constexpr (kCount == 2) {
    auto& [a, b] = p;
    return std::tie(a, b);
  } else if constexpr (kCount == 3) {
    auto& [a, b, c] = p;
    return std::tie(a, b, c);
  } else if constexpr (kCount == 4) {
    auto& [a, b, c, d] = p;
    return std::tie(a, b, c, d);
  } else if constexpr (kCount == 5) {
    auto& [a, b, c, d, e] = p;
    return std::tie(a, b, c, d, e);
  } else {
    return std::tie();
  }
}

template <class T>
concept List = requires(T& list) { list.resize(1), list.begin(); };

// Calls `end` with each number and slot, in the order of declaration; a list has its length in front.
template <class End, class T>
void visit(End& end, T& value) {
  using Plain = std::remove_const_t<T>;
  if constexpr (std::is_arithmetic_v<Plain> || std::same_as<Plain, Slot>) {
    end(value);
  } else if constexpr (List<Plain>) {
    std::int64_t length = std::ssize(value);
    end(length);
    if constexpr (!std::is_const_v<T>) value.resize(length);
    for (auto& item : value) visit(end, item);
  } else {
    std::apply([&end](auto&... field) { (visit(end, field), ...); }, fields(value));
  }
}

struct Writer {
  Node& node;
  void operator()(std::integral auto value) { node.ints.push_back(value); }
  void operator()(double value) { node.reals.push_back(value); }
  void operator()(Slot slot) { node.slots.push_back(slot.number); }
};

struct Reader {
  const Node& node;
  int ints = 0, reals = 0, slots = 0;  // how many were read
  template <std::integral T>
  void operator()(T& value) {
    value = static_cast<T>(node.ints[ints++]);
  }
  void operator()(double& value) { value = node.reals[reals++]; }
  void operator()(Slot& slot) { slot.number = node.slots[slots++]; }
};

template <class P>
void write(const P& given, Node& node) {
  Writer writer{node};
  visit(writer, given);
}

template <class P>
P read(const Node& node) {
  P result{};
  Reader reader{node};
  visit(reader, result);
  return result;
}

}  // namespace parameters

}  // namespace wengert::tape
