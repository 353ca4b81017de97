// The state of one simulated thread and of the block it belongs to, and how operations reach their registers.
//
// A thread is plain data: a register file and the index of its next instruction. A thread that must wait (barrier, shuffle, vote)
// says so in its state and is left alone until the scheduler lets it go on. So no stacks are switched, and the order in which the
// threads run is a loop over a list.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "encoding.h"

namespace wengert::ptx {

// A fault of the kernel; the scheduler adds where it happened.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Slot = std::uint64_t;

enum class State { kReady, kAtWarp, kAtBarrier, kExited };

struct Thread;
struct Block;
using Handler = void (*)(Thread&, const Instruction&);

// What the lanes of one warp operation brought along.
struct Lanes {
  std::uint32_t mask;  // the lanes that take part
  Slot value[32];
};
using Finish = void (*)(Thread&, const Instruction&, const Lanes&);

struct Thread {
  Block* block = nullptr;
  Slot* registers = nullptr;
  std::int32_t next = 0;
  State state = State::kReady;
  std::uint32_t linear = 0;
  std::uint32_t lane = 0;
  std::uint32_t warp = 0;
  bool carry = false;
  // While waiting:
  const Instruction* waiting = nullptr;
  Finish finish = nullptr;
  std::uint32_t mask = 0;
  Slot value = 0;
  std::uint32_t barrier = 0;
  std::uint32_t barrier_threads = 0;  // 0: all threads of the block
};

struct Range {
  std::uint64_t begin;
  std::uint64_t end;
  std::uint32_t read_only;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Range> ranges;  // what global accesses may touch
  bool check = true;
  std::vector<unsigned char> shared_storage;
  unsigned char* shared = nullptr;
  std::uint32_t shared_size = 0;
  std::vector<unsigned char> local_storage;
  std::uint64_t local_size = 0;  // of one thread
  const std::int32_t* jumps = nullptr;
  std::uint64_t clock = 0;
};

template <class T>
T get(const Thread& thread, std::int32_t slot) {
  if constexpr (std::is_same_v<T, bool>) {
    return thread.registers[slot] != 0;
  } else {
    T value;
    std::memcpy(&value, &thread.registers[slot], sizeof value);
    return value;
  }
}

// Integers are extended to the whole slot, signed ones with their sign, because a register may be wider than what is written.
template <class T>
void put(Thread& thread, std::int32_t slot, T value) {
  if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
    thread.registers[slot] = static_cast<Slot>(static_cast<std::int64_t>(value));
  } else if constexpr (std::is_integral_v<T>) {
    thread.registers[slot] = static_cast<Slot>(value);
  } else {
    Slot bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    thread.registers[slot] = bits;
  }
}

inline bool has(const Instruction& instruction, std::uint32_t flag) { return (instruction.flags & flag) != 0; }

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;
__extension__ using u128 = unsigned __int128;
__extension__ using s128 = __int128;

struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};
template <class T>
struct Pair {
  T low, high;
};

template <class T>
inline constexpr const char* kTypeName = nullptr;
template <>
inline constexpr const char* kTypeName<bool> = "pred";
template <>
inline constexpr const char* kTypeName<u8> = "u8";
template <>
inline constexpr const char* kTypeName<u16> = "u16";
template <>
inline constexpr const char* kTypeName<u32> = "u32";
template <>
inline constexpr const char* kTypeName<u64> = "u64";
template <>
inline constexpr const char* kTypeName<s8> = "s8";
template <>
inline constexpr const char* kTypeName<s16> = "s16";
template <>
inline constexpr const char* kTypeName<s32> = "s32";
template <>
inline constexpr const char* kTypeName<s64> = "s64";
template <>
inline constexpr const char* kTypeName<f16> = "f16";
template <>
inline constexpr const char* kTypeName<bf16> = "bf16";
template <>
inline constexpr const char* kTypeName<float> = "f32";
template <>
inline constexpr const char* kTypeName<double> = "f64";
template <>
inline constexpr const char* kTypeName<Pair<u16>> = "u16x2";
template <>
inline constexpr const char* kTypeName<Pair<s16>> = "s16x2";
template <>
inline constexpr const char* kTypeName<Pair<f16>> = "f16x2";
template <>
inline constexpr const char* kTypeName<Pair<bf16>> = "bf16x2";
template <>
inline constexpr const char* kTypeName<Pair<float>> = "f32x2";

// All operations by name; the assembler looks its instructions up in it.
class Table {
 public:
  void add(std::string name, Handler handler) {
    names_.push_back(std::move(name));
    handlers_.push_back(handler);
  }

  const std::vector<std::string>& names() const { return names_; }
  const Handler* handlers() const { return handlers_.data(); }

 private:
  std::vector<std::string> names_;
  std::vector<Handler> handlers_;
};

// Applies F to source registers of types Sources. F may ask for the instruction as its first argument.
template <class F, class Result, class... Sources>
void apply(Thread& thread, const Instruction& instruction) {
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    if constexpr (std::is_invocable_v<F, const Instruction&, Sources...>) {
      put<Result>(thread, instruction.operand[0],
                  static_cast<Result>(F{}(instruction, get<Sources>(thread, instruction.operand[1 + I])...)));
    } else {
      put<Result>(thread, instruction.operand[0], static_cast<Result>(F{}(get<Sources>(thread, instruction.operand[1 + I])...)));
    }
  }(std::index_sequence_for<Sources...>{});
}

void add_integer_operations(Table& table);
void add_float_operations(Table& table);
void add_conversions(Table& table);
void add_memory_operations(Table& table);
void add_control_operations(Table& table);
void add_warp_operations(Table& table);

}  // namespace wengert::ptx
