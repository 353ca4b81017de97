// Branches, calls, exits and barriers.
#include <string>

#include "thread.h"

namespace wengert::ptx {
namespace {

void nothing(Thread&, const Instruction&) {}

void branch(Thread& thread, const Instruction& instruction) { thread.next = instruction.target; }

void branch_by_table(Thread& thread, const Instruction& instruction) {
  const u32 index = get<u32>(thread, instruction.operand[0]);
  if (index >= static_cast<u32>(instruction.count)) throw Fault("jump table index " + std::to_string(index) + " out of range");
  thread.next = thread.block->jumps[instruction.target + static_cast<std::int32_t>(index)];
}

// Functions do not recurse, so each keeps its return address in a register of its own.
void call(Thread& thread, const Instruction& instruction) {
  put<s32>(thread, instruction.operand[0], thread.next);
  thread.next = instruction.target;
}
void return_from_call(Thread& thread, const Instruction& instruction) { thread.next = get<s32>(thread, instruction.operand[0]); }

void exit_thread(Thread& thread, const Instruction&) { thread.state = State::kExited; }

void trap(Thread&, const Instruction&) { throw Fault("trap"); }
void unsupported(Thread&, const Instruction&) { throw Fault("unsupported PTX"); }

// __assertfail(message, file, line, ...): the operands are where the arguments lie in local memory.
void assert_failed(Thread& thread, const Instruction& instruction) {
  const auto argument = [&]<class T>(int i, T) {
    T value;
    std::memcpy(&value,
                reinterpret_cast<const void*>(thread.registers[special::kLocal] + static_cast<u64>(instruction.operand[i])),
                sizeof value);
    return value;
  };
  const char* message = argument(0, static_cast<const char*>(nullptr));
  const char* file = argument(1, static_cast<const char*>(nullptr));
  throw Fault(std::string("device assert failed: ") + message + " (" + file + ":" + std::to_string(argument(2, u32{0})) + ")");
}

// clock, clock64, globaltimer: they only promise to go on.
void tick(Thread& thread, const Instruction& instruction) { put<u64>(thread, instruction.operand[0], ++thread.block->clock); }

// Operands: result, barrier, number of threads (0 for the whole block), predicate.
template <bool kReduce>
void barrier(Thread& thread, const Instruction& instruction) {
  thread.barrier = get<u32>(thread, instruction.operand[1]);
  thread.barrier_threads = get<u32>(thread, instruction.operand[2]);
  thread.value = kReduce && get<bool>(thread, instruction.operand[3]);
  if (thread.barrier >= 16) throw Fault("barrier " + std::to_string(thread.barrier) + " does not exist");
  if (thread.barrier_threads % 32) throw Fault("a barrier's thread count must be a multiple of 32");
  thread.waiting = &instruction;
  thread.state = State::kAtBarrier;
  thread.finish = nullptr;
}

// The value gathered by a bar.red is handed over as the first lane's; the mask carries how many threads took part.
template <class F>
void reducing_barrier(Thread& thread, const Instruction& instruction) {
  barrier<true>(thread, instruction);
  thread.finish = [](Thread& waiter, const Instruction& at, const Lanes& gathered) {
    put<u32>(waiter, at.operand[0], static_cast<u32>(F{}(static_cast<u32>(gathered.value[0]), gathered.mask)));
  };
}

}  // namespace

void add_control_operations(Table& table) {
  table.add("nothing", &nothing);
  table.add("bra", &branch);
  table.add("brx", &branch_by_table);
  table.add("call", &call);
  table.add("return", &return_from_call);
  table.add("exit", &exit_thread);
  table.add("trap", &trap);
  table.add("unsupported", &unsupported);
  table.add("assert_failed", &assert_failed);
  table.add("clock", &tick);
  table.add("bar.sync", &barrier<false>);
  const auto count = [](u32 set, u32) { return set; };
  const auto all = [](u32 set, u32 threads) { return set == threads; };
  const auto any = [](u32 set, u32) { return set != 0; };
  table.add("bar.red.popc", &reducing_barrier<decltype(count)>);
  table.add("bar.red.and", &reducing_barrier<decltype(all)>);
  table.add("bar.red.or", &reducing_barrier<decltype(any)>);
}

}  // namespace wengert::ptx
