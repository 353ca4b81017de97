#pragma once
#include <algorithm>
#include <cstdint>

#include "fused/program.h"

namespace wengert::kernels {

// Walks a window in row-major order over the loops that are left when neighbours with compatible strides are merged.
struct Walk {
  int rank = 0;
  std::int64_t extents[fused::kMaxRank];
  std::int64_t strides[fused::kMaxRank];

  void start(int loops, const std::int64_t* lengths, const std::int64_t* given) {
    rank = 0;
    for (int k = 0; k < loops; ++k) {
      if (lengths[k] == 1) continue;
      if (rank > 0 && strides[rank - 1] == given[k] * lengths[k]) {
        extents[rank - 1] *= lengths[k];
        strides[rank - 1] = given[k];
      } else {
        extents[rank] = lengths[k];
        strides[rank++] = given[k];
      }
    }
    if (rank == 0) extents[0] = 1, strides[0] = 0, rank = 1;
  }
  // Calls on(offset, stride, position, count) for each run of the inner loop within the n elements from linear index `first` on.
  template <class On>
  void runs(std::int64_t first, std::int64_t n, On on) const {
    std::int64_t index[fused::kMaxRank];
    std::int64_t offset = 0;
    for (int k = rank - 1; k >= 0; --k) {
      index[k] = k == 0 ? first : first % extents[k];
      if (k > 0) first /= extents[k];
      offset += index[k] * strides[k];
    }
    const int inner = rank - 1;
    for (std::int64_t position = 0; position < n;) {
      std::int64_t count = std::min(n - position, extents[inner] - index[inner]);
      on(offset, strides[inner], position, count);
      position += count;
      index[inner] += count;
      offset += count * strides[inner];
      for (int k = inner; k > 0 && index[k] == extents[k]; --k) {
        offset += strides[k - 1] - extents[k] * strides[k];
        index[k] = 0;
        ++index[k - 1];
      }
    }
  }
};

}  // namespace wengert::kernels
