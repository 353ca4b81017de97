// Nests of strided loops on the host: the steps that every planner of a kernel takes first.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

namespace wengert::kernels::cuda {

template <std::size_t views>
struct StridedLoop {
  std::int64_t extent;
  std::array<std::int64_t, views> strides;  // of each view, in elements
};

// Outermost first.
template <std::size_t views>
using StridedLoops = std::vector<StridedLoop<views>>;

// Drops loops of one iteration and joins neighbours that every view walks through as one.
template <std::size_t views>
void collapse(StridedLoops<views>& loops) {
  StridedLoops<views> out;
  for (const auto& loop : loops) {
    if (loop.extent == 1) continue;
    bool joins = !out.empty();
    for (std::size_t v = 0; joins && v < views; ++v) joins = out.back().strides[v] == loop.strides[v] * loop.extent;
    if (joins) {
      out.back() = {out.back().extent * loop.extent, loop.strides};
    } else {
      out.push_back(loop);
    }
  }
  loops = std::move(out);
}

template <std::size_t views>
std::int64_t iterations(const StridedLoops<views>& loops) {
  std::int64_t product = 1;
  for (const auto& loop : loops) product *= loop.extent;
  return product;
}

// Elements that a view visits, each counted once: loops it does not move along visit them again.
template <std::size_t views>
std::int64_t distinct(const StridedLoops<views>& loops, std::size_t view) {
  std::int64_t product = 1;
  for (const auto& loop : loops) product *= loop.strides[view] != 0 || loop.extent == 0 ? loop.extent : 1;
  return product;
}

// Largest distance of a visited element from the first.
template <std::size_t views>
std::int64_t reach(const StridedLoops<views>& loops, std::size_t view) {
  std::int64_t sum = 0;
  for (const auto& loop : loops) sum += std::abs(loop.strides[view]) * (loop.extent - 1);
  return sum;
}

}  // namespace wengert::kernels::cuda
