// wengert::fused under the vmap of is_grads_batched and vectorize=True, whose headers exclude functorch's: batch axes become
// leading loops of the nest.
#include <ATen/LegacyVmapTransforms.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "ops/fused.h"

namespace wengert::ops {
namespace {

std::vector<at::Tensor> fused_legacy(at::TensorList operands, std::string_view text) {
  at::VmapPhysicalViewVec views = at::MultiBatchVmapTransform::logicalToPhysical(operands);
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::Batched);
  std::vector<at::Tensor> physical;
  physical.reserve(views.size());
  for (at::VmapPhysicalView& view : views) physical.push_back(view.tensor());
  const int axes = static_cast<int>(views.front().numBatchDims());
  std::vector<at::Tensor> results = fused(physical, load(text)->text_with_leading_axes(axes));
  views.front().getPhysicalToLogicalMap().applyInplace(results);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(wengert, Batched, m) { m.impl("fused", fused_legacy); }

}  // namespace wengert::ops
