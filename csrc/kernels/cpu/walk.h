#pragma once
#include <algorithm>
#include <cstdint>

#include "fused/program.h"

namespace wengert::kernels {

// Walks a window in row-major order over the loops that are left when neighbours with compatible strides are merged.  Keeps its
// place: a division per loop and tile would cost as much as the tile.
class Walk {
 public:
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
    std::fill_n(index_, rank, 0);
    offset_ = 0;
  }
  // Visits the next n elements as on(offset, step, stride, position, rows, count): `rows` runs of `count` elements `stride`
  // apart; the runs begin `step` apart and follow each other from `position` on.
  template <class On>
  void rows(std::int64_t n, On on) {
    const int inner = rank - 1;
    for (std::int64_t position = 0; position < n;) {
      const std::int64_t left = n - position;
      if (inner > 0 && index_[inner] == 0 && left >= extents[inner]) {
        const std::int64_t most = extents[inner - 1] - index_[inner - 1];
        const std::int64_t rows = left >= most * extents[inner] ? most : left / extents[inner];
        on(offset_, strides[inner - 1], strides[inner], position, rows, extents[inner]);
        position += rows * extents[inner];
        advance(inner - 1, rows);
      } else {
        const std::int64_t count = std::min(left, extents[inner] - index_[inner]);
        on(offset_, 0, strides[inner], position, 1, count);
        position += count;
        advance(inner, count);
      }
    }
  }
  // The same run by run: on(offset, stride, position, count).
  template <class On>
  void runs(std::int64_t n, On on) {
    rows(n, [&](std::int64_t offset, std::int64_t step, std::int64_t stride, std::int64_t position, std::int64_t rows,
                std::int64_t count) {
      for (; rows > 0; --rows, offset += step, position += count) on(offset, stride, position, count);
    });
  }
  void skip(std::int64_t n) {
    if (rank == 1) return advance(0, n);
    rows(n, [](auto...) {});
  }

 private:
  void advance(int k, std::int64_t steps) {
    index_[k] += steps;
    offset_ += steps * strides[k];
    for (; k > 0 && index_[k] == extents[k]; --k) {
      offset_ += strides[k - 1] - extents[k] * strides[k];
      index_[k] = 0;
      ++index_[k - 1];
    }
  }

  std::int64_t index_[fused::kMaxRank];
  std::int64_t offset_ = 0;
};

}  // namespace wengert::kernels
