// A launch of a kernel that nvcc compiles (csrc/kernels/cuda/*.cu), as data.  Plans are made on the host with no CUDA call.
// These headers are C++17, which nvcc of every supported toolkit reads.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace wengert::fused {
enum class Dtype : std::uint8_t;
}

namespace wengert::kernels::cuda {

struct StaticLaunch {
  const char* entry;  // the kernel's extern "C" name
  std::array<unsigned, 3> grid, block;
  unsigned shared_bytes;         // dynamic
  std::vector<char> parameters;  // the kernel's one parameter, a struct by value
  std::int64_t bytes_read, bytes_written;

  bool empty() const { return grid[0] == 0; }
};

template <class Parameters>
std::vector<char> bytes_of(const Parameters& parameters) {
  static_assert(std::is_trivially_copyable_v<Parameters> && sizeof(Parameters) <= 4096, "the limit of older drivers");
  std::vector<char> bytes(sizeof(Parameters));
  std::memcpy(bytes.data(), &parameters, sizeof(Parameters));
  return bytes;
}

inline constexpr std::int64_t kMostBlocks = (std::int64_t{1} << 31) - 1;  // of a grid's first axis

}  // namespace wengert::kernels::cuda
