// The elements of a tensor at affine coordinates over a nest of loops: as strides, and as a view.  Below autograd.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "blocks/block.h"

namespace wengert::accumulate {

// Writes the stride along each of `loops` loops, in elements, and returns the place of the first element.
inline std::int64_t locate(const at::Tensor& tensor, const std::vector<blocks::Affine>& axes, std::size_t loops,
                           std::int64_t* strides) {
  std::int64_t offset = 0;
  std::fill(strides, strides + loops, 0);
  const c10::IntArrayRef steps = tensor.strides();
  for (std::size_t a = 0; a < axes.size(); ++a) {
    offset += axes[a].start * steps[a];
    for (std::size_t k = 0; k < loops; ++k) strides[k] += axes[a].step[k] * steps[a];
  }
  return offset;
}

// One axis per loop of `loops`; a view where no loop runs backwards.
at::Tensor window(const at::Tensor& tensor, const std::vector<blocks::Affine>& axes, const blocks::Shape& extents,
                  const std::vector<std::size_t>& loops);

}  // namespace wengert::accumulate
