// wengert::fused under torch.func.vmap: the batch axis becomes a leading loop of the nest.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/functorch/DynamicLayer.h>
#include <ATen/functorch/PlumbingHelper.h>
#include <torch/library.h>

#include "ops/fused.h"

namespace wengert::ops {
namespace {

std::vector<at::Tensor> fused_functorch(at::TensorList operands, std::string_view text) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::FuncTorchBatched);
  auto layer = at::functorch::maybeCurrentDynamicLayer();
  TORCH_INTERNAL_ASSERT(layer.has_value());
  const std::int64_t level = layer->layerId();
  if (!at::functorch::isBatchedAtLevel(operands, level)) return fused(operands, std::string(text));
  std::vector<at::Tensor> physical;
  physical.reserve(operands.size());
  for (const at::Tensor& operand : operands) {
    auto [value, batch_axis] = at::functorch::unwrapTensorAtLevel(operand, level);
    physical.push_back(batch_axis ? value.movedim(*batch_axis, 0) : value.unsqueeze(0));
  }
  std::vector<at::Tensor> results = fused(physical, load(text)->text_with_leading_axes(1));
  for (at::Tensor& result : results) result = at::functorch::makeBatched(result, 0, level);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(wengert, FuncTorchBatched, m) { m.impl("fused", fused_functorch); }

}  // namespace wengert::ops
