#include "accumulate/static_steps.h"

#include <ATen/Functions.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <numeric>
#include <optional>

#include "accumulate/window.h"
#include "kernels/cuda/materialize.h"
#include "kernels/cuda/segment_sum.h"
#include "kernels/cuda/small_matmul.h"
#include "kernels/cuda/strided_loops.h"
#include "ops/backend.h"
#include "ops/fused.h"

namespace wengert::accumulate {

namespace {

namespace cuda = kernels::cuda;

using Strides = std::vector<std::int64_t>;

struct Located {
  const char* data = nullptr;
  Strides strides;  // one per loop
};

Located located(const at::Tensor& tensor, const std::vector<blocks::Affine>& axes, std::size_t loops) {
  Located out{.data = nullptr, .strides = Strides(loops)};
  const std::int64_t offset = locate(tensor, axes, loops, out.strides.data());
  out.data = static_cast<const char*>(tensor.const_data_ptr()) + offset * static_cast<std::int64_t>(tensor.element_size());
  return out;
}

bool is_floating(fused::Dtype dtype) { return at::isFloatingType(ops::to_scalar_type(dtype)); }

enum Side { kA, kB, kScale, kSides };

// Some loops as one, or nothing if an operand does not walk through them that way.
std::optional<cuda::StridedLoop<kSides>> joined(const std::vector<std::size_t>& loops, const blocks::Shape& extents,
                                                const std::array<Located, kSides>& operands) {
  cuda::StridedLoops<kSides> out;
  for (std::size_t k : loops) {
    out.push_back({extents[k], {operands[kA].strides[k], operands[kB].strides[k], operands[kScale].strides[k]}});
  }
  cuda::collapse(out);
  if (out.empty()) return cuda::StridedLoop<kSides>{1, {}};
  return out.size() == 1 ? std::optional(out[0]) : std::nullopt;
}

// A segment costs this many bytes besides its row (it is counted, searched for and read): more than the zeros it spares, where
// rows are short and most of them stay empty.
constexpr std::int64_t kSegmentBytes = 24;
constexpr std::int64_t kFewSegments = 1 << 16;  // launches cost more than these
constexpr std::int64_t kMostSegmentsPerRow = 4;

}  // namespace

bool is_copy(const blocks::Evaluate& step, const blocks::Plan& plan) {
  const fused::Bytecode& code = step.program->bytecode();
  if (!code.instructions.empty()) return false;
  const std::int32_t slot = step.targets[0].slot;
  const fused::Dtype dtype = plan.slots[slot].dtype;
  if (!is_floating(dtype)) return false;
  for (std::size_t i = 0; i < step.targets.size(); ++i) {
    const blocks::Target& target = step.targets[i];
    if (target.slot != slot || target.accumulate || step.program->outputs()[i].reduced != 0) return false;
    if (code.outputs[i] >= code.loads.size()) return false;  // a constant
    if (plan.slots[step.operands[code.loads[code.outputs[i]]].slot].dtype != dtype) return false;
  }
  return true;
}

bool launch_materialize(const blocks::Evaluate& step, std::span<const at::Tensor> operands, at::Tensor& out) {
  const std::size_t loops = step.extents.size();
  const fused::Bytecode& code = step.program->bytecode();
  std::vector<cuda::MaterializeBlock> blocks;
  for (std::size_t i = 0; i < step.targets.size(); ++i) {
    cuda::MaterializeBlock block{.start = 0, .extents = step.extents, .steps = Strides(loops), .strides = {}, .value = nullptr};
    block.start = locate(out, step.targets[i].axes, loops, block.steps.data());
    const std::int32_t operand = code.loads[code.outputs[i]];
    Located value = located(operands[operand], step.operands[operand].axes, loops);
    block.strides = std::move(value.strides);
    block.value = value.data;
    blocks.push_back(std::move(block));
  }
  const auto launch = cuda::plan_materialize(out.mutable_data_ptr(), ops::to_dtype(out.scalar_type()), out.numel(), blocks);
  if (!launch) return false;
  std::vector<at::Tensor> touched(operands.begin(), operands.end());
  touched.push_back(out);
  ops::launch(out.device(), *launch, touched);
  return true;
}

bool launch_small_matmul(const blocks::Matmul& step, const at::Tensor& a, const at::Tensor& b, const at::Tensor& scale,
                         at::Tensor& out) {
  const at::ScalarType dtype = out.scalar_type();
  if ((dtype != at::kFloat && dtype != at::kDouble) || a.scalar_type() != dtype || b.scalar_type() != dtype) return false;
  if (scale.defined() && scale.scalar_type() != dtype) return false;
  const std::size_t loops = step.extents.size();
  std::array<Located, kSides> operands{
      located(a, step.a.axes, loops), located(b, step.b.axes, loops),
      scale.defined() ? located(scale, step.scale->axes, loops) : Located{.data = nullptr, .strides = Strides(loops)}};
  const auto m = joined(step.m, step.extents, operands), n = joined(step.n, step.extents, operands),
             k = joined(step.k, step.extents, operands);
  if (!m || !n || !k) return false;
  cuda::SmallMatmul product{.dtype = ops::to_dtype(dtype),
                            .batch = {},
                            .m = m->extent,
                            .n = n->extent,
                            .k = k->extent,
                            .a = operands[kA].data,
                            .b = operands[kB].data,
                            .scale = operands[kScale].data,
                            .out = out.mutable_data_ptr(),
                            .a_strides = {},
                            .b_strides = {},
                            .scale_strides = {},
                            .out_strides = {}};
  std::int64_t batches = 1;
  for (std::size_t l = 0; l < step.batch.size(); ++l) {
    const std::size_t loop = step.batch[l];
    batches *= step.extents[loop];
    product.batch.push_back(step.extents[loop]);
    product.a_strides.push_back(operands[kA].strides[loop]);
    product.b_strides.push_back(operands[kB].strides[loop]);
    product.scale_strides.push_back(operands[kScale].strides[loop]);
    product.out_strides.push_back(out.stride(static_cast<std::int64_t>(l)));
  }
  if (batches <= 1) return false;  // one product is the library's
  product.a_strides.insert(product.a_strides.end(), {m->strides[kA], k->strides[kA]});
  product.b_strides.insert(product.b_strides.end(), {k->strides[kB], n->strides[kB]});
  product.scale_strides.push_back(k->strides[kScale]);
  product.out_strides.insert(product.out_strides.end(), {n->extent, 1});
  const auto launch = cuda::plan_small_matmul(product);
  if (!launch) return false;
  c10::SmallVector<at::Tensor, 4> touched{a, b, out};
  if (scale.defined()) touched.push_back(scale);
  ops::launch(out.device(), *launch, touched);
  return true;
}

RowSum row_sum(const blocks::PutAdd& step, const at::Tensor& value, const at::Tensor& index, const at::Tensor& out) {
  std::vector<std::size_t> loops(step.extents.size());
  std::iota(loops.begin(), loops.end(), 0);
  if (!step.puts_rows()) {
    return {.out = out.view(-1),
            .index = window(index, step.index.axes, step.extents, loops).reshape(-1),
            .values = window(value, step.value.axes, step.extents, loops).reshape(-1),
            .covers = true};
  }
  const blocks::IndexedAxis& along = *step.axis;
  const std::vector<std::size_t>& positions = along.loops[along.axis];
  std::vector<std::size_t> value_loops = positions;
  const auto axis = static_cast<std::int64_t>(along.axis);
  Strides sizes{out.size(axis)}, strides{out.stride(axis)};
  bool covers = true;
  for (std::int64_t a = 0; a < out.dim(); ++a) {
    if (a == axis) continue;
    for (std::size_t k : along.loops[static_cast<std::size_t>(a)]) {
      value_loops.push_back(k);
      sizes.push_back(step.extents[k]);
      strides.push_back(out.stride(a));
      covers = covers && step.extents[k] == out.size(a);
    }
  }
  const at::Tensor values = window(value, step.value.axes, step.extents, value_loops);
  return {.out = at::as_strided(out, sizes, strides, out.storage_offset()),
          .index = window(index, along.index.axes, step.extents, positions).reshape(-1),
          .values = positions.empty() ? values.unsqueeze(0) : values.flatten(0, static_cast<std::int64_t>(positions.size()) - 1),
          .covers = covers};
}

bool launch_segment_sum(const RowSum& sum, bool accumulate) {
  const at::ScalarType dtype = sum.out.scalar_type();
  if (!at::isFloatingType(dtype) || sum.values.scalar_type() != dtype) return false;
  const std::int64_t segments = sum.out.size(0), positions = sum.index.numel();
  const std::int64_t row_bytes =
      segments == 0 ? 0 : sum.out.numel() / segments * static_cast<std::int64_t>(sum.out.element_size());
  if (segments > kFewSegments && segments > kMostSegmentsPerRow * positions && row_bytes < kSegmentBytes) return false;
  cuda::SegmentSum plan{.dtype = ops::to_dtype(dtype),
                        .values = sum.values.const_data_ptr(),
                        .position_stride = sum.values.stride(0),
                        .order = nullptr,
                        .positions = positions,
                        .starts = nullptr,
                        .targets = nullptr,
                        .segments = segments,
                        .out = sum.out.mutable_data_ptr(),
                        .target_stride = sum.out.stride(0),
                        .inner = sum.out.sizes().slice(1).vec(),
                        .value_strides = sum.values.strides().slice(1).vec(),
                        .out_strides = sum.out.strides().slice(1).vec(),
                        .accumulate = accumulate};
  if (!cuda::plan_segment_sum(plan)) return false;  // before any work for it
  const auto [sorted, order] = at::sort(sum.index, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const at::Tensor starts = at::searchsorted(sorted, at::arange(segments + 1, sorted.options()));
  plan.order = order.const_data_ptr<std::int64_t>();
  plan.starts = starts.const_data_ptr<std::int64_t>();
  ops::launch(sum.out.device(), *cuda::plan_segment_sum(plan), {sum.values, order, starts, sum.out});
  return true;
}

}  // namespace wengert::accumulate
