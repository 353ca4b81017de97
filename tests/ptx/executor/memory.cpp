// Loads, stores, atomics and address arithmetic. Every access is checked.
#include <cstdio>
#include <limits>

#include "numbers.h"

namespace wengert::ptx {
namespace {

bool within(u64 address, u64 size, u64 begin, u64 end) { return address >= begin && address <= end && size <= end - address; }

std::string describe(const char* what, u64 size, u64 address) {
  char text[96];
  std::snprintf(text, sizeof text, "%s of %llu bytes at 0x%llx", what, static_cast<unsigned long long>(size),
                static_cast<unsigned long long>(address));
  return text;
}

[[noreturn]] void out_of_bounds(const Block& block, u64 address, u64 size, bool write) {
  std::string text = "out-of-bounds " + describe(write ? "write" : "read", size, address);
  const Range* nearest = nullptr;
  u64 best = ~u64{0};
  for (const Range& range : block.ranges) {
    const u64 distance = address < range.begin ? range.begin - address : address - std::min(address, range.end - 1);
    if (distance < best) best = distance, nearest = &range;
  }
  if (nearest) {
    text += "; nearest is array " + std::to_string(nearest - block.ranges.data()) + " of " +
            std::to_string(nearest->end - nearest->begin) + " bytes, offset " +
            std::to_string(static_cast<s64>(address - nearest->begin));
  }
  throw Fault(text);
}

void require_aligned(u64 address, u64 size) {
  if (address & (size - 1)) throw Fault("misaligned " + describe("access", size, address));
}

u64 local_begin(const Thread& thread) { return thread.registers[special::kLocal]; }

bool is_local(const Thread& thread, u64 address, u64 size) {
  return within(address, size, local_begin(thread), local_begin(thread) + thread.block->local_size);
}
bool is_shared(const Block& block, u64 address, u64 size) {
  const auto begin = reinterpret_cast<u64>(block.shared);
  return within(address, size, begin, begin + block.shared_size);
}

// An atomic on an 8- or 16-bit element is a loop over the 32-bit word around it, which may reach over the end of the array.
bool is_ragged_word(const Block& block, u64 address, u64 size) {
  if (size != 4 || (address & 3)) return false;
  for (const Range& range : block.ranges) {
    if (address + 4 > range.begin && address < range.end && ((range.begin & 3) || (range.end & 3))) return true;
  }
  return false;
}

void check_global(const Block& block, u64 address, u64 size, bool write) {
  if (!block.check) return;
  for (const Range& range : block.ranges) {
    if (!within(address, size, range.begin, range.end)) continue;
    if (write && range.read_only) throw Fault("write to read-only memory: " + describe("write", size, address));
    require_aligned(address, size);
    return;
  }
  if (!is_ragged_word(block, address, size)) out_of_bounds(block, address, size, write);
}

// Where an access of `size` bytes through the address register goes.
unsigned char* resolve(Thread& thread, const Instruction& instruction, std::int32_t base, u64 size, bool write) {
  Block& block = *thread.block;
  const u64 address = thread.registers[base] + static_cast<u64>(instruction.offset);
  switch (instruction.space) {
    case space::kShared: {
      const u64 offset = static_cast<u32>(address);  // 32-bit addresses leave the upper half of a slot open
      if (offset + size > block.shared_size) {
        throw Fault("out-of-bounds shared " + describe(write ? "write" : "read", size, offset) + "; the block has " +
                    std::to_string(block.shared_size));
      }
      require_aligned(offset, size);
      return block.shared + offset;
    }
    case space::kLocal:
      if (!is_local(thread, address, size))
        throw Fault("out-of-bounds local " + describe(write ? "write" : "read", size, address));
      require_aligned(address, size);
      break;
    case space::kGeneric:
      if (is_local(thread, address, size) || is_shared(block, address, size)) {
        require_aligned(address, size);
        break;
      }
      [[fallthrough]];
    case space::kGlobal:
      check_global(block, address, size, write);
      break;
    default:  // parameters
      break;
  }
  return reinterpret_cast<unsigned char*>(address);
}

template <class T>
T read(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
void write(unsigned char* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

template <class T>
void load(Thread& thread, const Instruction& instruction) {
  const int count = instruction.count;
  const unsigned char* from = resolve(thread, instruction, instruction.operand[count], sizeof(T) * count, false);
  for (int i = 0; i < count; ++i) put<T>(thread, instruction.operand[i], read<T>(from + i * sizeof(T)));
}
template <class T>
void store(Thread& thread, const Instruction& instruction) {
  const int count = instruction.count;
  unsigned char* to = resolve(thread, instruction, instruction.operand[count], sizeof(T) * count, true);
  for (int i = 0; i < count; ++i) write<T>(to + i * sizeof(T), get<T>(thread, instruction.operand[i]));
}

// Threads take turns between instructions only, so a plain read, change and write is atomic.
template <class F, class T>
void atomic(Thread& thread, const Instruction& instruction) {
  unsigned char* place = resolve(thread, instruction, instruction.operand[1], sizeof(T), true);
  const T old = read<T>(place);
  const T operand = get<T>(thread, instruction.operand[2]);
  if constexpr (std::is_invocable_v<F, T, T, T>) {
    write<T>(place, static_cast<T>(F{}(old, operand, get<T>(thread, instruction.operand[3]))));
  } else {
    write<T>(place, static_cast<T>(F{}(old, operand)));
  }
  put<T>(thread, instruction.operand[0], old);
}
template <class... Types, class F>
void add_atomic(Table& table, const std::string& name, F) {
  (table.add("atom." + name + "." + kTypeName<Types>, &atomic<F, Types>), ...);
}

template <class T>
T half_sum(T a, T b) {
  return narrow<T>(sum_to_odd(widen(a), widen(b)).value, rounding::kNearest);
}

void add_atomics(Table& table) {
  add_atomic<u32, u64, float, double>(table, "add", [](auto old, auto x) { return old + x; });
  add_atomic<f16, bf16>(table, "add", [](auto old, auto x) { return half_sum(old, x); });
  add_atomic<Pair<f16>, Pair<bf16>>(table, "add", []<class T>(Pair<T> old, Pair<T> x) {
    return Pair<T>{half_sum(old.low, x.low), half_sum(old.high, x.high)};
  });
  add_atomic<u32, u64, s32, s64>(table, "min", [](auto old, auto x) { return std::min(old, x); });
  add_atomic<u32, u64, s32, s64>(table, "max", [](auto old, auto x) { return std::max(old, x); });
  add_atomic<u32, u64>(table, "and", [](auto old, auto x) { return old & x; });
  add_atomic<u32, u64>(table, "or", [](auto old, auto x) { return old | x; });
  add_atomic<u32, u64>(table, "xor", [](auto old, auto x) { return old ^ x; });
  add_atomic<u32, u64>(table, "exch", [](auto, auto x) { return x; });
  add_atomic<u16, u32, u64>(table, "cas", []<class T>(T old, T expected, T x) { return old == expected ? x : old; });
  add_atomic<u32>(table, "inc", [](u32 old, u32 limit) { return old >= limit ? 0 : old + 1; });
  add_atomic<u32>(table, "dec", [](u32 old, u32 limit) { return old == 0 || old > limit ? limit : old - 1; });
}

void address(Thread& thread, const Instruction& instruction) {
  put<u64>(thread, instruction.operand[0], thread.registers[instruction.operand[1]] + static_cast<u64>(instruction.offset));
}
void shared_to_generic(Thread& thread, const Instruction& instruction) {
  const u64 offset = get<u32>(thread, instruction.operand[1]);
  put<u64>(thread, instruction.operand[0], reinterpret_cast<u64>(thread.block->shared) + offset);
}
void generic_to_shared(Thread& thread, const Instruction& instruction) {
  put<u64>(thread, instruction.operand[0],
           get<u64>(thread, instruction.operand[1]) - reinterpret_cast<u64>(thread.block->shared));
}
void is_in_space(Thread& thread, const Instruction& instruction) {
  const u64 where = get<u64>(thread, instruction.operand[1]);
  const bool shared = is_shared(*thread.block, where, 1), local = is_local(thread, where, 1);
  const bool answer = instruction.space == space::kShared  ? shared
                      : instruction.space == space::kLocal ? local
                                                           : !shared && !local;
  put<bool>(thread, instruction.operand[0], answer);
}

// Copies an argument between the parameter areas of caller and callee, both in the thread's local memory.
void copy_parameter(Thread& thread, const Instruction& instruction) {
  auto* local = reinterpret_cast<unsigned char*>(local_begin(thread));
  std::memcpy(local + instruction.target, local + instruction.offset, static_cast<std::size_t>(instruction.count));
}

template <class... Types>
void add_loads_and_stores(Table& table) {
  (table.add(std::string("ld.") + kTypeName<Types>, &load<Types>), ...);
  (table.add(std::string("st.") + kTypeName<Types>, &store<Types>), ...);
}

}  // namespace

void add_memory_operations(Table& table) {
  add_loads_and_stores<u8, u16, u32, u64, s8, s16, s32, s64>(table);
  add_atomics(table);
  table.add("address", &address);
  table.add("shared_to_generic", &shared_to_generic);
  table.add("generic_to_shared", &generic_to_shared);
  table.add("is_in_space", &is_in_space);
  table.add("copy_parameter", &copy_parameter);
}

}  // namespace wengert::ptx
