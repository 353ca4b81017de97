// What the host and generated kernels agree on: threads of a block, size of the parameters, and division by an extent.
#pragma once
#include <cstdint>

#include "common/macros.h"

namespace wengert::fused {

inline constexpr int kBlockThreads = 256;
inline constexpr int kParameterBytes = 32764;  // of a kernel; since compute capability 7.0 and CUDA 12.1

// Words on their way into memory, by way of a kernel's parameters: no copy from the host, so that nothing waits, and a CUDA graph
// keeps them.
struct TablePiece {
  static constexpr int kWords = (kParameterBytes - 16) / 8;

  std::uint64_t* target;
  std::uint64_t words;
  std::uint64_t data[kWords];
};

// Integer division by a number known at launch.
template <class Index>
struct Divisor;

// By the upper half of a product (Granlund and Montgomery, "Division by invariant integers using multiplication"): exact for
// 0 <= n < 2^31, which keeps the sum of the two terms below 2^32.
template <>
struct Divisor<std::int32_t> {
  std::int32_t divisor;
  std::uint32_t magic, shift;

  WENGERT_HD static Divisor of(std::int64_t d) {
    std::uint32_t shift = 0;
    while ((std::uint64_t{1} << shift) < static_cast<std::uint64_t>(d)) ++shift;
    const std::uint64_t rest = (std::uint64_t{1} << shift) - static_cast<std::uint64_t>(d);
    const std::uint64_t magic = (rest << 32) / static_cast<std::uint64_t>(d) + 1;
    return {static_cast<std::int32_t>(d), static_cast<std::uint32_t>(magic), shift};
  }
  WENGERT_HD std::int32_t quotient(std::int32_t n) const {
    const std::uint32_t high =
        static_cast<std::uint32_t>(static_cast<std::uint64_t>(magic) * static_cast<std::uint32_t>(n) >> 32);
    return static_cast<std::int32_t>((high + static_cast<std::uint32_t>(n)) >> shift);
  }
};

template <>
struct Divisor<std::int64_t> {
  std::int64_t divisor;

  WENGERT_HD static Divisor of(std::int64_t d) { return {d}; }
  WENGERT_HD std::int64_t quotient(std::int64_t n) const { return n / divisor; }
};

}  // namespace wengert::fused
