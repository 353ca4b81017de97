#include "accumulate/window.h"

#include <ATen/Functions.h>
#include <c10/util/SmallVector.h>

#include <cstdlib>

namespace wengert::accumulate {

at::Tensor window(const at::Tensor& tensor, const std::vector<blocks::Affine>& axes, const blocks::Shape& extents,
                  const std::vector<std::size_t>& loops) {
  std::int64_t offset = tensor.storage_offset();
  c10::SmallVector<std::int64_t, 8> sizes, strides, backwards;
  for (std::size_t a = 0; a < axes.size(); ++a) offset += axes[a].start * tensor.stride(static_cast<std::int64_t>(a));
  for (std::size_t k : loops) {
    std::int64_t stride = 0;
    for (std::size_t a = 0; a < axes.size(); ++a) stride += axes[a].step[k] * tensor.stride(static_cast<std::int64_t>(a));
    if (stride < 0) {  // which ATen's strides cannot be
      backwards.push_back(static_cast<std::int64_t>(sizes.size()));
      offset += (extents[k] - 1) * stride;
    }
    sizes.push_back(extents[k]);
    strides.push_back(std::abs(stride));
  }
  const at::Tensor forwards = at::as_strided(tensor, sizes, strides, offset);
  return backwards.empty() ? forwards : forwards.flip(backwards);
}

}  // namespace wengert::accumulate
