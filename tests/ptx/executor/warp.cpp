// Operations that the lanes of a warp do together: shuffles, votes, matches, reductions, bar.warp.sync.
//
// A lane leaves its value and its mask and waits. When all lanes of the mask have arrived at the same kind of operation with the
// same mask, the scheduler hands every one of them what the others brought, and it finishes.
#include <algorithm>
#include <bit>

#include "thread.h"

namespace wengert::ptx {
namespace {

// What a shuffle returns for a source lane that does not take part; the hardware leaves it open.
constexpr u32 kPoison = 0x7fc0dead;

void arrive(Thread& thread, const Instruction& instruction, u32 mask, Slot value, Finish finish) {
  if (!((mask >> thread.lane) & 1))
    throw Fault("lane " + std::to_string(thread.lane) + " is not in the mask of its own warp operation");
  thread.waiting = &instruction;
  thread.mask = mask;
  thread.value = value;
  thread.finish = finish;
  thread.state = State::kAtWarp;
}

bool takes_part(const Lanes& lanes, u32 lane) { return (lanes.mask >> lane) & 1; }

enum class Shuffle { kUp, kDown, kButterfly, kIndex };

// Operands: result, predicate, value, b, clamp and segment, mask. The lane arithmetic is the one of the PTX manual.
template <Shuffle kMode>
void finish_shuffle(Thread& thread, const Instruction& instruction, const Lanes& lanes) {
  const auto lane = static_cast<s32>(thread.lane);
  const auto b = static_cast<s32>(get<u32>(thread, instruction.operand[3]) & 31);
  const u32 control = get<u32>(thread, instruction.operand[4]);
  const auto clamp = static_cast<s32>(control & 31), segment = static_cast<s32>((control >> 8) & 31);
  const s32 highest = (lane & segment) | (clamp & ~segment), lowest = lane & segment;
  s32 source = 0;
  bool valid = false;
  switch (kMode) {
    case Shuffle::kUp:
      source = lane - b;
      valid = source >= highest;
      break;
    case Shuffle::kDown:
      source = lane + b;
      valid = source <= highest;
      break;
    case Shuffle::kButterfly:
      source = lane ^ b;
      valid = source <= highest;
      break;
    case Shuffle::kIndex:
      source = lowest | (b & ~segment);
      valid = source <= highest;
      break;
  }
  if (!valid) source = lane;
  const bool present = takes_part(lanes, static_cast<u32>(source));
  put<u32>(thread, instruction.operand[0], present ? static_cast<u32>(lanes.value[source]) : kPoison);
  put<bool>(thread, instruction.operand[1], valid);
}
template <Shuffle kMode>
void shuffle(Thread& thread, const Instruction& instruction) {
  arrive(thread, instruction, get<u32>(thread, instruction.operand[5]), get<u32>(thread, instruction.operand[2]),
         &finish_shuffle<kMode>);
}

// Operands: result, predicate, mask. F takes the ballot and the lanes that voted.
template <class F>
void vote(Thread& thread, const Instruction& instruction) {
  const Finish finish = [](Thread& waiter, const Instruction& at, const Lanes& lanes) {
    u32 ballot = 0;
    for (u32 lane = 0; lane < 32; ++lane) ballot |= static_cast<u32>(takes_part(lanes, lane) && lanes.value[lane]) << lane;
    put<u32>(waiter, at.operand[0], static_cast<u32>(F{}(ballot, lanes.mask)));
  };
  arrive(thread, instruction, get<u32>(thread, instruction.operand[2]), get<bool>(thread, instruction.operand[1]), finish);
}

// Operands: result, predicate, value, mask.
template <class T, bool kAll>
void match(Thread& thread, const Instruction& instruction) {
  const Finish finish = [](Thread& waiter, const Instruction& at, const Lanes& lanes) {
    u32 equal = 0;
    for (u32 lane = 0; lane < 32; ++lane) {
      equal |= static_cast<u32>(takes_part(lanes, lane) && lanes.value[lane] == lanes.value[waiter.lane]) << lane;
    }
    const bool unanimous = equal == lanes.mask;
    put<u32>(waiter, at.operand[0], kAll && !unanimous ? 0 : equal);
    put<bool>(waiter, at.operand[1], unanimous);
  };
  arrive(thread, instruction, get<u32>(thread, instruction.operand[3]), get<T>(thread, instruction.operand[2]), finish);
}

// Operands: result, value, mask.
template <class F, class T>
void reduce(Thread& thread, const Instruction& instruction) {
  const Finish finish = [](Thread& waiter, const Instruction& at, const Lanes& lanes) {
    T total{};
    bool first = true;
    for (u32 lane = 0; lane < 32; ++lane) {
      if (!takes_part(lanes, lane)) continue;
      const T value = static_cast<T>(lanes.value[lane]);
      total = first ? value : static_cast<T>(F{}(total, value));
      first = false;
    }
    put<T>(waiter, at.operand[0], total);
  };
  arrive(thread, instruction, get<u32>(thread, instruction.operand[2]), static_cast<Slot>(get<T>(thread, instruction.operand[1])),
         finish);
}
template <class... Types, class F>
void add_reduction(Table& table, const std::string& name, F) {
  (table.add("redux." + name + "." + kTypeName<Types>, &reduce<F, Types>), ...);
}

void synchronize(Thread& thread, const Instruction& instruction) {
  arrive(thread, instruction, get<u32>(thread, instruction.operand[0]), 0, [](Thread&, const Instruction&, const Lanes&) {});
}

}  // namespace

void add_warp_operations(Table& table) {
  table.add("shfl.up", &shuffle<Shuffle::kUp>);
  table.add("shfl.down", &shuffle<Shuffle::kDown>);
  table.add("shfl.bfly", &shuffle<Shuffle::kButterfly>);
  table.add("shfl.idx", &shuffle<Shuffle::kIndex>);
  const auto ballot = [](u32 votes, u32) { return votes; };
  const auto all = [](u32 votes, u32 lanes) { return votes == lanes; };
  const auto any = [](u32 votes, u32) { return votes != 0; };
  const auto uniform = [](u32 votes, u32 lanes) { return votes == lanes || votes == 0; };
  table.add("vote.ballot", &vote<decltype(ballot)>);
  table.add("vote.all", &vote<decltype(all)>);
  table.add("vote.any", &vote<decltype(any)>);
  table.add("vote.uni", &vote<decltype(uniform)>);
  table.add("match.any.u32", &match<u32, false>);
  table.add("match.any.u64", &match<u64, false>);
  table.add("match.all.u32", &match<u32, true>);
  table.add("match.all.u64", &match<u64, true>);
  add_reduction<u32, s32>(table, "add", [](u32 a, u32 b) { return a + b; });
  add_reduction<u32, s32>(table, "min", [](auto a, auto b) { return std::min(a, b); });
  add_reduction<u32, s32>(table, "max", [](auto a, auto b) { return std::max(a, b); });
  add_reduction<u32>(table, "and", [](u32 a, u32 b) { return a & b; });
  add_reduction<u32>(table, "or", [](u32 a, u32 b) { return a | b; });
  add_reduction<u32>(table, "xor", [](u32 a, u32 b) { return a ^ b; });
  table.add("bar.warp", &synchronize);
}

}  // namespace wengert::ptx
