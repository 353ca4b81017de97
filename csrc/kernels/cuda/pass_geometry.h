// What one kernel does with a nest: which loops it has, what it reads and writes, how many elements a thread takes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cuda/launch_plan.h"
#include "kernels/loops.h"

namespace wengert::kernels::cuda {

using GpuLoops = Loops<LoopOutput>;

// Adds the bytes of memory the nest touches, each once.
void count_traffic(const GpuLoops& loops, std::int64_t* read, std::int64_t* written);

// Instructions of the program as they stand in its code, where those that repeat are a loop.
std::size_t code_size(const fused::Program& program, const GpuLoops& loops);

// Neighbours along the innermost loop that a thread takes together: as many as are one memory access in all views.
int choose_width(const GpuLoops& loops, std::size_t instructions, int sums);
// Groups a thread has on their way at once: single elements need more than vectors to keep the memory busy, but each takes a
// register for every operand.
int choose_unroll(const fused::KernelShape& shape, std::size_t instructions, bool sums);
// The part of a kernel's shape that all variants share.
fused::KernelShape shape_of(const fused::Program& program, const GpuLoops& loops, const Limits& limits, int width);

// Some of a nest's loops, outer to inner; one loop of a single iteration where there is none.
struct SomeLoops {
  std::vector<int> loops;
  std::int64_t elements = 1;

  int rank() const { return std::max<int>(1, static_cast<int>(loops.size())); }
};
// The loops whose bit in `reduced` is `wanted`.
SomeLoops select_loops(const GpuLoops& loops, std::uint32_t reduced, bool wanted);

}  // namespace wengert::kernels::cuda
