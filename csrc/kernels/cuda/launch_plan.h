// Which kernels evaluate a program over a strided loop nest on a GPU, and how they are launched: geometry only, no CUDA call.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "fused/cuda_source.h"
#include "kernels/views.h"

namespace wengert::kernels::cuda {

// What plans take from the device; the defaults are an H100's.
struct Limits {
  int multiprocessors = 132;
  int threads_per_multiprocessor = 2048;
  // Iterations and offsets (in elements) up to here have 32-bit indices.  Threads past the end count on beyond the last element,
  // by less than the distance to 2^31.
  std::int64_t narrow_index = (std::int64_t{1} << 31) - (std::int64_t{1} << 20);
  int iterations_per_lane = 16;  // of a summed range, before it is worth a second launch to share it out further
};

// Generated source and its entry.  Those used last are kept, one object per text; ids are never used twice.
struct Kernel {
  std::uint64_t id;
  std::string entry;
  std::string source;
};

struct Launch {
  std::shared_ptr<const Kernel> kernel;
  std::array<unsigned, 3> grid, block;
  unsigned shared_bytes = 0;     // dynamic; kernels here have static shared memory only
  std::vector<char> parameters;  // the kernel's one parameter, a struct by value
  // Positions in `parameters` of 64-bit addresses that count from the start of the workspace.
  std::vector<std::size_t> workspace_pointers;
  std::int64_t bytes_read = 0, bytes_written = 0;  // distinct bytes of memory

  // The parameters as they are launched: addresses within the workspace become absolute.
  std::vector<char> parameters_at(const void* workspace) const;
};

struct Plan {
  std::vector<Launch> launches;  // in this order on one stream
  std::int64_t workspace_bytes = 0;
  std::int64_t minimum_bytes = 0;  // each operand read once and each output written once

  std::int64_t bytes() const {
    std::int64_t total = 0;
    for (const Launch& launch : launches) total += launch.bytes_read + launch.bytes_written;
    return total;
  }
};

// Views hold device addresses, which are not followed.  The workspace must be aligned to kWorkspaceAlignment.  Throws
// std::length_error where a kernel cannot take as many outputs or elements.
inline constexpr int kWorkspaceAlignment = 256;
Plan plan(const fused::Program& program, std::span<const std::int64_t> extents, std::span<const OperandView> operands,
          std::span<const OutputView> outputs, const Limits& limits = {});

// What the kept ones take in memory.
std::size_t kernel_bytes();
void forget_kernels();

}  // namespace wengert::kernels::cuda
