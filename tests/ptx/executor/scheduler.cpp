// Runs the blocks of a launch one after another, and the threads of a block in turns.
//
// A thread runs until it waits or exits. The order of the threads is free (CUDA promises none), so running a kernel under several
// orders shows results that depend on it: a missing __syncthreads, a write that two threads race for.
#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>

#include "thread.h"

namespace wengert::ptx {
namespace {

constexpr u32 kWarp = 32, kBarriers = 16;
constexpr u32 kMaxThreads = 1024, kMaxSharedBytes = 232448;
constexpr unsigned char kUninitialised = 0xff;  // NaN in every floating-point type
constexpr u64 kEndless = 100'000'000;           // instructions of one thread between two waits: it spins

struct Launch {
  const Instruction* code;
  const Slot* image;  // what the register file of a thread holds when it starts
  const std::int32_t* jumps;
  const unsigned char* parameters;
  const Range* ranges;
  u64 local_size;
  u64 seed;
  u32 registers;
  u32 range_count;
  u32 static_shared;
  u32 dynamic_shared;
  u32 waits;  // whether some instruction may wait: else threads run to their end, one after another
  u32 check;
  u32 order;  // 0 ascending, 1 descending, 2 shuffled
  u32 grid[3];
  u32 block[3];
};

struct Report {
  char message[1024];
  std::int32_t instruction;  // -1: not at an instruction
  u32 block[3];
  u32 thread[3];
};

const Table& operations() {
  static const Table table = [] {
    Table all;
    add_integer_operations(all);
    add_float_operations(all);
    add_conversions(all);
    add_memory_operations(all);
    add_control_operations(all);
    add_warp_operations(all);
    return all;
  }();
  return table;
}

class Scheduler {
 public:
  explicit Scheduler(const Launch& launch) : launch_(launch), handlers_(operations().handlers()) {
    const u32 count = launch.block[0] * launch.block[1] * launch.block[2];
    block_.threads.resize(count);
    block_.ranges.assign(launch.ranges, launch.ranges + launch.range_count);
    block_.check = launch.check != 0;
    block_.jumps = launch.jumps;
    dynamic_shared_begin_ = (launch.static_shared + 15) / 16 * 16;
    block_.shared_size = dynamic_shared_begin_ + launch.dynamic_shared;
    block_.shared_storage.resize(block_.shared_size + kAlignment);
    block_.shared = align(block_.shared_storage);
    block_.local_size = launch.local_size;
    // Threads that never wait use the same registers and local memory one after another.
    const u64 copies = launch.waits ? count : 1;
    block_.local_storage.resize(launch.local_size * copies + kAlignment);
    registers_.resize(u64{launch.registers} * copies);
    for (u32 i = 0; i < count; ++i) {
      Thread& thread = block_.threads[i];
      thread.block = &block_;
      thread.registers = registers_.data() + (launch.waits ? u64{i} * launch.registers : 0);
      thread.linear = i;
      thread.lane = i % kWarp;
      thread.warp = i / kWarp;
    }
    order_.resize(count);
  }

  void run_block(u32 x, u32 y, u32 z) {
    position_[0] = x, position_[1] = y, position_[2] = z;
    std::fill_n(block_.shared, block_.shared_size, kUninitialised);
    choose_order();
    if (!launch_.waits) {
      for (const u32 i : order_) {
        start(block_.threads[i]);
        run(block_.threads[i]);
      }
      return;
    }
    for (Thread& thread : block_.threads) start(thread);
    run_in_turns();
  }

  void report(const Fault& fault, Report& to) const {
    std::snprintf(to.message, sizeof to.message, "%s", fault.what());
    to.instruction = at_ ? static_cast<std::int32_t>(at_ - launch_.code) : -1;
    for (u32 axis = 0; axis < 3; ++axis) {
      to.block[axis] = position_[axis];
      to.thread[axis] = current_ ? index_of(*current_, axis) : 0;
    }
  }

 private:
  static constexpr u64 kAlignment = 128;

  static unsigned char* align(std::vector<unsigned char>& storage) {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<u64>(storage.data()) + kAlignment - 1) / kAlignment * kAlignment);
  }

  u32 index_of(const Thread& thread, u32 axis) const {
    const u32 below = axis == 0 ? 1 : axis == 1 ? launch_.block[0] : launch_.block[0] * launch_.block[1];
    return thread.linear / below % launch_.block[axis];
  }

  void choose_order() {
    std::iota(order_.begin(), order_.end(), 0u);
    if (launch_.order == 1) std::reverse(order_.begin(), order_.end());
    if (launch_.order != 2) return;
    u64 state = launch_.seed + position_[0] + (u64{position_[1]} << 20) + (u64{position_[2]} << 40);
    const auto draw = [&] { return (state = state * 6364136223846793005u + 1442695040888963407u) >> 33; };
    draw();
    for (u64 i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[draw() % i]);
  }

  void start(Thread& thread) {
    thread.next = 0;
    thread.state = State::kReady;
    thread.carry = false;
    std::copy_n(launch_.image, launch_.registers, thread.registers);
    Slot* registers = thread.registers;
    for (u32 axis = 0; axis < 3; ++axis) {
      registers[special::kTidX + axis] = index_of(thread, axis);
      registers[special::kNtidX + axis] = launch_.block[axis];
      registers[special::kCtaidX + axis] = position_[axis];
      registers[special::kNctaidX + axis] = launch_.grid[axis];
    }
    const u32 bit = 1u << thread.lane;
    registers[special::kLane] = thread.lane;
    registers[special::kWarp] = thread.warp;
    registers[special::kWarps] = (block_.threads.size() + kWarp - 1) / kWarp;
    registers[special::kLanemaskEq] = bit;
    registers[special::kLanemaskLt] = bit - 1;
    registers[special::kLanemaskLe] = bit | (bit - 1);
    registers[special::kLanemaskGt] = ~(bit | (bit - 1));
    registers[special::kLanemaskGe] = ~(bit - 1);
    registers[special::kParameters] = reinterpret_cast<u64>(launch_.parameters);
    unsigned char* local = align(block_.local_storage) + (launch_.waits ? thread.linear * block_.local_size : 0);
    std::fill_n(local, block_.local_size, kUninitialised);
    registers[special::kLocal] = reinterpret_cast<u64>(local);
    registers[special::kDynamicShared] = dynamic_shared_begin_;
    registers[special::kDynamicSharedSize] = launch_.dynamic_shared;
    registers[special::kTotalSharedSize] = block_.shared_size;
  }

  // Runs a thread until it waits or exits.
  void run(Thread& thread) {
    current_ = &thread;
    for (u64 step = 0; step < kEndless; ++step) {
      const Instruction& instruction = launch_.code[thread.next++];
      if (instruction.guard >= 0 && get<bool>(thread, instruction.guard) != (instruction.guard_value != 0)) continue;
      at_ = &instruction;
      handlers_[instruction.operation](thread, instruction);
      if (thread.state != State::kReady) return;
    }
    throw Fault("endless loop: the thread neither waits nor exits");
  }

  void run_in_turns() {
    for (;;) {
      bool progress = false;
      u64 exited = 0;
      for (const u32 i : order_) {
        Thread& thread = block_.threads[i];
        if (thread.state == State::kReady) {
          progress = true;
          run(thread);
          if (thread.state == State::kAtWarp) release_lanes(thread);
        }
        exited += thread.state == State::kExited;
      }
      if (exited == block_.threads.size()) return;
      if (!progress && !release_barriers()) report_deadlock();
    }
  }

  // Lets the lanes of `arrived`'s mask go on if all of them wait for the same operation. Lanes beyond the block do not exist.
  void release_lanes(const Thread& arrived) {
    const u32 first = arrived.warp * kWarp, mask = arrived.mask;
    const Finish finish = arrived.finish;
    Lanes lanes{};
    for (u32 lane = 0; lane < kWarp && first + lane < block_.threads.size(); ++lane) {
      if (!((mask >> lane) & 1)) continue;
      const Thread& other = block_.threads[first + lane];
      if (other.state != State::kAtWarp || other.mask != mask || other.finish != finish) return;
      lanes.mask |= 1u << lane;
      lanes.value[lane] = other.value;
    }
    for (u32 lane = 0; lane < kWarp; ++lane) {
      if (!((lanes.mask >> lane) & 1)) continue;
      Thread& other = block_.threads[first + lane];
      finish(other, *other.waiting, lanes);
      other.state = State::kReady;
    }
  }

  bool release_barriers() {
    bool released = false;
    for (u32 barrier = 0; barrier < kBarriers; ++barrier) {
      u32 waiting = 0, wanted = 0, live = 0, set = 0;
      for (const Thread& thread : block_.threads) {
        live += thread.state != State::kExited;
        if (thread.state != State::kAtBarrier || thread.barrier != barrier) continue;
        ++waiting;
        wanted = thread.barrier_threads;
        set += static_cast<u32>(thread.value);
      }
      if (waiting == 0 || waiting != (wanted ? wanted : live)) continue;
      check_aligned(barrier);
      Lanes gathered{};
      gathered.mask = waiting;
      gathered.value[0] = set;
      for (Thread& thread : block_.threads) {
        if (thread.state != State::kAtBarrier || thread.barrier != barrier) continue;
        if (thread.finish) thread.finish(thread, *thread.waiting, gathered);
        thread.state = State::kReady;
      }
      released = true;
    }
    return released;
  }

  // __syncthreads in a branch that only a part of a warp takes is undefined, even if the others reach another __syncthreads.
  void check_aligned(u32 barrier) {
    std::map<u32, const Thread*> seen;
    for (const Thread& thread : block_.threads) {
      if (thread.state != State::kAtBarrier || thread.barrier != barrier || !has(*thread.waiting, flag::kAligned)) continue;
      const Thread* first = seen.emplace(thread.warp, &thread).first->second;
      if (first->waiting == thread.waiting) continue;
      blame(thread);
      throw Fault("threads of one warp wait at different barriers: PTX lines " + std::to_string(first->waiting->line) + " and " +
                  std::to_string(thread.waiting->line));
    }
  }

  [[noreturn]] void report_deadlock() {
    std::map<std::int32_t, u32> waiting;
    u32 exited = 0;
    for (const Thread& thread : block_.threads) {
      if (thread.state == State::kExited) {
        ++exited;
        continue;
      }
      if (waiting.empty()) blame(thread);
      ++waiting[thread.waiting->line];
      if (thread.state == State::kAtWarp) check_lanes_alive(thread);
    }
    std::string text = "deadlock:";
    for (const auto& [line, count] : waiting)
      text += " " + std::to_string(count) + " threads wait at PTX line " + std::to_string(line) + ",";
    throw Fault(text + " " + std::to_string(exited) + " have exited");
  }

  void check_lanes_alive(const Thread& thread) {
    for (u32 lane = 0; lane < kWarp; ++lane) {
      const u32 other = thread.warp * kWarp + lane;
      if (!((thread.mask >> lane) & 1) || other >= block_.threads.size() || block_.threads[other].state != State::kExited)
        continue;
      blame(thread);
      throw Fault("the mask of a warp operation names lane " + std::to_string(lane) + ", which has exited");
    }
  }

  void blame(const Thread& thread) {
    current_ = &thread;
    at_ = thread.waiting;
  }

  const Launch& launch_;
  const Handler* handlers_;
  Block block_;
  std::vector<Slot> registers_;
  std::vector<u32> order_;
  u32 dynamic_shared_begin_ = 0;
  u32 position_[3] = {};
  const Thread* current_ = nullptr;
  const Instruction* at_ = nullptr;
};

}  // namespace
}  // namespace wengert::ptx

extern "C" {

int ptx_operation_count() { return static_cast<int>(wengert::ptx::operations().names().size()); }
const char* ptx_operation_name(int i) { return wengert::ptx::operations().names()[static_cast<std::size_t>(i)].c_str(); }

// Returns 0, or 1 with the report filled in.
int ptx_launch(const wengert::ptx::Launch* launch, wengert::ptx::Report* report) {
  using namespace wengert::ptx;
  const u64 threads = u64{launch->block[0]} * launch->block[1] * launch->block[2];
  report->instruction = -1;
  if (threads == 0 || threads > kMaxThreads) {
    std::snprintf(report->message, sizeof report->message, "%llu threads in a block", static_cast<unsigned long long>(threads));
    return 1;
  }
  if (u64{launch->static_shared} + launch->dynamic_shared > kMaxSharedBytes) {
    std::snprintf(report->message, sizeof report->message, "more shared memory than any GPU has");
    return 1;
  }
  Scheduler scheduler(*launch);
  try {
    for (u32 z = 0; z < launch->grid[2]; ++z) {
      for (u32 y = 0; y < launch->grid[1]; ++y) {
        for (u32 x = 0; x < launch->grid[0]; ++x) scheduler.run_block(x, y, z);
      }
    }
  } catch (const Fault& fault) {
    scheduler.report(fault, *report);
    return 1;
  }
  return 0;
}

}  // extern "C"
