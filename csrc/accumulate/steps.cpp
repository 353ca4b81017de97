#include "accumulate/steps.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>

#include "accumulate/execute.h"

namespace wengert::accumulate {

namespace {

std::atomic<std::int64_t> matmul_count{0}, call_count{0}, take_count{0};

// A view's base is one more tensor on the same storage.
bool owns_its_memory(const at::Tensor& tensor) {
  if (!tensor.has_storage()) return true;  // inside the legacy vmap, which has copied
  const c10::Storage& storage = tensor.storage();
  if (tensor.use_count() != 1 || !storage.resizable()) return false;
  return tensor.is_view() ? tensor._base().use_count() == 1 && storage.use_count() == 2 : storage.use_count() == 1;
}

}  // namespace

blocks::Matmul unscaled(const blocks::Matmul& step) {
  blocks::Matmul out = step;
  out.scale.reset();
  const auto rows = std::ranges::find_if(out.batch, [&](std::size_t loop) { return !step.b.moves(loop); });
  out.m.insert(out.m.begin(), rows, out.batch.end());
  out.batch.erase(rows, out.batch.end());
  return out;
}

std::vector<std::size_t> matmul_axes(const blocks::Matmul& step, bool left) {
  std::vector<std::size_t> axes = step.batch;
  const auto& second = left ? step.m : step.k;
  const auto& third = left ? step.k : step.n;
  axes.insert(axes.end(), second.begin(), second.end());
  axes.insert(axes.end(), third.begin(), third.end());
  return axes;
}

at::Tensor matmul(const blocks::Matmul& step, const blocks::Shape& shape, const at::Tensor& a, const at::Tensor& b) {
  auto size = [&](const std::vector<std::size_t>& loops) {
    std::int64_t product = 1;
    for (std::size_t k : loops) product *= step.extents[k];
    return product;
  };
  const std::int64_t batch = size(step.batch), m = size(step.m), n = size(step.n), k = size(step.k);
  const at::Tensor product = step.batch.empty() ? at::mm(a.reshape({m, k}), b.reshape({k, n}))
                                                : at::bmm(a.reshape({batch, m, k}), b.reshape({batch, k, n}));
  return product.view(shape);
}

at::Tensor take(const at::Tensor& source, const at::Tensor& index, std::optional<std::size_t> axis) {
  if (axis) return source.index_select(static_cast<std::int64_t>(*axis), index);
  return source.reshape(-1).index_select(0, index.reshape(-1)).view(index.sizes());
}

at::Tensor result(at::Tensor tensor, const blocks::Shape& shape, Strides strides) {
  // A backward written by the user may have recorded a graph where none is wanted.
  if (tensor.requires_grad() && !at::GradMode::is_enabled()) tensor = tensor.detach();
  const bool fits = strides == Strides::dense ? tensor.is_non_overlapping_and_dense() : tensor.is_contiguous();
  if (!fits) {
    tensor = tensor.clone(at::MemoryFormat::Contiguous);
  } else if (!owns_its_memory(tensor)) {
    tensor = tensor.clone(at::MemoryFormat::Preserve);
  }
  return tensor.sizes() == at::IntArrayRef(shape) ? tensor : tensor.reshape(shape);
}

void count_matmul() { ++matmul_count; }
void count_take() { ++take_count; }
void count_calls(std::int64_t calls) { call_count += calls; }
StepCounts step_counts() { return {.matmuls = matmul_count, .node_calls = call_count, .takes = take_count}; }
void reset_step_counts() { matmul_count = call_count = take_count = 0; }

}  // namespace wengert::accumulate
