#include "accumulate/execute.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/grad_mode.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "accumulate/run.h"
#include "accumulate/sweep.h"
#include "ops/fused.h"

namespace wengert::accumulate {

namespace {

using blocks::Affine;
using blocks::Evaluate;
using blocks::Matmul;
using blocks::Plan;
using blocks::PutAdd;
using blocks::Read;
using blocks::Slot;
using blocks::Take;

// From this size on, zeros come from calloc: fresh pages are zero already and are only touched where blocks are written.
constexpr std::size_t kLazyZeroBytes = 64 * 1024;

at::Tensor empty(const Slot& slot, at::Device device) {
  const at::ScalarType dtype = to_aten(slot.dtype);
  if (device.is_cpu()) return at::detail::empty_cpu(slot.shape, dtype, false, std::nullopt);  // past the dispatcher
  return at::empty(slot.shape, at::TensorOptions().dtype(dtype).device(device));
}

at::Tensor zeros(const Slot& slot, at::Device device) {
  const at::ScalarType dtype = to_aten(slot.dtype);
  if (!device.is_cpu()) return at::zeros(slot.shape, at::TensorOptions().dtype(dtype).device(device));
  const std::size_t bytes = static_cast<std::size_t>(blocks::numel(slot.shape)) * c10::elementSize(dtype);
  if (bytes < kLazyZeroBytes) {
    at::Tensor out = empty(slot, device);
    std::memset(out.mutable_data_ptr(), 0, bytes);
    return out;
  }
  void* data = std::calloc(bytes, 1);
  TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "wengert: could not allocate ", bytes,
                   " bytes for a dense result of shape ", c10::IntArrayRef(slot.shape));
  return at::from_blob(data, slot.shape, [](void* p) { std::free(p); }, at::TensorOptions().dtype(dtype));
}

// The tensor's elements at some coordinates over the given loops; a view where no loop runs backwards.  Below the dispatcher's
// autograd, so it costs little.
at::Tensor window(const at::Tensor& tensor, const std::vector<Affine>& axes, const blocks::Shape& extents,
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

bool runs_backwards(const std::vector<Affine>& axes) {
  return std::ranges::any_of(
      axes, [](const Affine& axis) { return std::ranges::any_of(axis.step, [](std::int64_t step) { return step < 0; }); });
}

// A large product of two windows, say an outer product of each sample: the interpreter gathers short rows, ATen's loop need not.
bool is_product(const Evaluate& step, const Plan& plan) {
  constexpr std::int64_t kLarge = 1 << 17;
  const fused::Bytecode& code = step.program->bytecode();
  if (code.instructions.size() != 1 || code.instructions[0].prim != fused::Prim::mul || code.loads.size() != 2) return false;
  const fused::OutputSpec& output = step.program->outputs()[0];
  if (step.targets.size() != 1 || output.reduced != 0 || step.targets[0].accumulate) return false;
  if (runs_backwards(step.targets[0].axes)) return false;  // it has to be a view, to be written to
  for (const Read& read : step.operands) {
    if (plan.slots[read.slot].dtype != output.dtype) return false;
  }
  return output.dtype == step.program->compute() && blocks::numel(step.extents) >= kLarge;
}

std::vector<std::size_t> all_loops(const blocks::Shape& extents) {
  std::vector<std::size_t> loops(extents.size());
  for (std::size_t k = 0; k < loops.size(); ++k) loops[k] = k;
  return loops;
}

class MemoryRun : public Run<MemoryRun> {
 public:
  using Run::Run;
  using Run::run;

  // The slot's tensor, allocated at its first mention.
  at::Tensor& made(std::int32_t s) {
    at::Tensor& tensor = slots_[s];
    if (tensor.defined()) return tensor;
    const Slot& slot = plan_.slots[s];
    tensor = slot.zero_filled ? zeros(slot, tape_.device) : empty(slot, tape_.device);
    return tensor;
  }

  void run(const Evaluate& step) {
    if (tape_.device.is_cpu() && is_product(step, plan_)) {
      const std::vector<std::size_t> loops = all_loops(step.extents);
      auto view = [&](const auto& at) { return window(made(at.slot), at.axes, step.extents, loops); };
      at::Tensor out = view(step.targets[0]);
      const std::vector<std::int32_t>& loads = step.program->bytecode().loads;
      at::mul_out(out, view(step.operands[loads[0]]), view(step.operands[loads[1]]));
      return;
    }
    const std::size_t n = step.extents.size();
    c10::SmallVector<std::int64_t, 128> strides;
    c10::SmallVector<ops::OperandView, 32> operands;
    c10::SmallVector<ops::OutputView, 16> outputs;
    strides.resize(n * (step.operands.size() + step.targets.size()));
    std::int64_t* at = strides.data();
    auto locate = [&](const at::Tensor& tensor, const std::vector<Affine>& axes) {
      std::int64_t offset = 0;
      std::fill(at, at + n, 0);
      const c10::IntArrayRef steps = tensor.strides();
      for (std::size_t a = 0; a < axes.size(); ++a) {
        offset += axes[a].start * steps[a];
        for (std::size_t k = 0; k < n; ++k) at[k] += axes[a].step[k] * steps[a];
      }
      return offset * static_cast<std::int64_t>(tensor.element_size());
    };
    for (const Read& read : step.operands) {
      const at::Tensor& tensor = made(read.slot);
      const std::int64_t offset = locate(tensor, read.axes);
      operands.push_back({.data = static_cast<const char*>(tensor.const_data_ptr()) + offset,
                          .dtype = plan_.slots[read.slot].dtype,
                          .strides = at,
                          .in_host_memory = tensor.device() != tape_.device});
      at += n;
    }
    for (const blocks::Target& target : step.targets) {
      const at::Tensor& tensor = made(target.slot);
      const std::int64_t offset = locate(tensor, target.axes);
      outputs.push_back({.data = static_cast<char*>(tensor.mutable_data_ptr()) + offset,
                         .dtype = plan_.slots[target.slot].dtype,
                         .strides = at,
                         .accumulate = target.accumulate});
      at += n;
    }
    ops::evaluate(tape_.device, *step.program, step.extents, operands, outputs);
  }

  void run(const Matmul& step) {
    count_matmul();
    slots_[step.out] =
        accumulate::matmul(step, plan_.slots[step.out].shape,
                           window(on_device(made(step.a.slot)), step.a.axes, step.extents, matmul_axes(step, true)),
                           window(on_device(made(step.b.slot)), step.b.axes, step.extents, matmul_axes(step, false)));
  }

  void run(const Take& step) {
    count_take();
    slots_[step.out] = accumulate::take(on_device(made(step.source)), on_device(made(step.index)));
  }

  void run(const PutAdd& step) {
    const std::vector<std::size_t> loops = all_loops(step.extents);
    const at::Tensor index = window(on_device(made(step.index.slot)), step.index.axes, step.extents, loops).reshape(-1);
    const at::Tensor value = window(on_device(made(step.value.slot)), step.value.axes, step.extents, loops).reshape(-1);
    at::Tensor out = made(step.out).view(-1);
    if (tape_.device.is_cpu()) {
      out.index_add_(0, index, value);
    } else {
      out.index_put_({index}, value, true);  // sorts first: index_add_ on CUDA adds in any order
    }
  }

  void run(const blocks::Arange& step) {
    slots_[step.out] = at::arange(plan_.slots[step.out].shape[0], at::TensorOptions().dtype(at::kLong).device(tape_.device));
  }
};

}  // namespace

std::vector<at::Tensor> execute(const Plan& plan, const tape::Tape& tape, at::TensorList cotangents) {
  torch::autograd::AutoGradMode no_grad(false);
  return MemoryRun(plan, tape, cotangents)();
}

}  // namespace wengert::accumulate
