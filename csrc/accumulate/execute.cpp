#include "accumulate/execute.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/grad_mode.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "accumulate/run.h"
#include "accumulate/static_steps.h"
#include "accumulate/window.h"
#include "ops/backend.h"
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
  const at::ScalarType dtype = ops::to_scalar_type(slot.dtype);
  if (device.is_cpu()) return at::detail::empty_cpu(slot.shape, dtype, false, std::nullopt);  // past the dispatcher
  return at::empty(slot.shape, at::TensorOptions().dtype(dtype).device(device));
}

at::Tensor zeros(const Slot& slot, at::Device device) {
  const at::ScalarType dtype = ops::to_scalar_type(slot.dtype);
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
  // With PyTorch's allocator, from which a storage that is resized takes its new memory.
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, c10::DataPtr(data, data, &std::free, device),
                       c10::GetCPUAllocator(), /*resizable=*/true);
  at::Tensor out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                            c10::scalarTypeToTypeMeta(dtype));
  out.unsafeGetTensorImpl()->set_sizes_contiguous(slot.shape);
  return out;
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
    if (launches_ && is_first_copy(step) && materialized(step)) return;
    const std::size_t n = step.extents.size();
    c10::SmallVector<std::int64_t, 128> strides;
    c10::SmallVector<ops::OperandView, 32> operands;
    c10::SmallVector<ops::OutputView, 16> outputs;
    strides.resize(n * (step.operands.size() + step.targets.size()));
    std::int64_t* at = strides.data();
    auto bytes = [&](const at::Tensor& tensor, const std::vector<Affine>& axes) {
      return locate(tensor, axes, n, at) * static_cast<std::int64_t>(tensor.element_size());
    };
    for (const Read& read : step.operands) {
      const at::Tensor& tensor = made(read.slot);
      const std::int64_t offset = bytes(tensor, read.axes);
      operands.push_back({.data = static_cast<const char*>(tensor.const_data_ptr()) + offset,
                          .dtype = plan_.slots[read.slot].dtype,
                          .strides = at,
                          .in_host_memory = tensor.device() != tape_.device});
      at += n;
    }
    for (const blocks::Target& target : step.targets) {
      const at::Tensor& tensor = made(target.slot);
      const std::int64_t offset = bytes(tensor, target.axes);
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
    const at::Tensor &a = on_device(made(step.a.slot)), &b = on_device(made(step.b.slot));
    const at::Tensor& scale = step.scale ? on_device(made(step.scale->slot)) : none_;
    if (launches_) {
      at::Tensor fresh = empty(plan_.slots[step.out], tape_.device);
      if (launch_small_matmul(step, a, b, scale, fresh)) {
        slots_[step.out] = std::move(fresh);
        return;
      }
    }
    if (step.scale) {
      const Matmul plain = unscaled(step);
      const std::vector<std::size_t> left = matmul_axes(plain, true);
      multiply(plain, window(a, step.a.axes, step.extents, left) * window(scale, step.scale->axes, step.extents, left), b);
    } else {
      multiply(step, window(a, step.a.axes, step.extents, matmul_axes(step, true)), b);
    }
  }

  void run(const Take& step) {
    count_take();
    slots_[step.out] = accumulate::take(on_device(made(step.source)), on_device(made(step.index)), step.axis);
  }

  void run(const PutAdd& step) {
    at::Tensor& out = slots_[step.out];
    const Slot& slot = plan_.slots[step.out];
    const bool first = !out.defined(), sums = launches_ && !step.distinct;
    if (first) out = sums ? empty(slot, tape_.device) : zeros(slot, tape_.device);
    const at::Tensor& index = on_device(made(step.puts_rows() ? step.axis->index.slot : step.index.slot));
    const RowSum sum = row_sum(step, on_device(made(step.value.slot)), index, out);
    if (sums) {
      if (first && !sum.covers) out.zero_();
      if (launch_segment_sum(sum, !first)) return;
      if (first && sum.covers) out.zero_();
    }
    if (tape_.device.is_cpu() || step.distinct) {
      sum.out.index_add_(0, sum.index, sum.values);
    } else {
      sum.out.index_put_({sum.index}, sum.values, true);  // sorts first: index_add_ on CUDA adds in any order
    }
  }

  void run(const blocks::Arange& step) {
    slots_[step.out] = at::arange(plan_.slots[step.out].shape[0], at::TensorOptions().dtype(at::kLong).device(tape_.device));
  }

 private:
  // By the library; `a` is a view over the left side's loops.
  void multiply(const Matmul& step, const at::Tensor& a, const at::Tensor& b) {
    slots_[step.out] =
        accumulate::matmul(step, plan_.slots[step.out].shape, a, window(b, step.b.axes, step.extents, matmul_axes(step, false)));
  }

  // Copies into an array of zeros that no step has written to.
  bool is_first_copy(const Evaluate& step) const {
    const std::int32_t out = step.targets[0].slot;
    return plan_.slots[out].zero_filled && !slots_[out].defined() && is_copy(step, plan_);
  }

  // Zeros and copies in one pass.
  bool materialized(const Evaluate& step) {
    std::vector<at::Tensor> operands;
    for (const Read& read : step.operands) {
      operands.push_back(made(read.slot));
      if (operands.back().device() != tape_.device) return false;  // a Python number, which PyTorch keeps on the host
    }
    const std::int32_t out = step.targets[0].slot;
    at::Tensor fresh = empty(plan_.slots[out], tape_.device);
    if (!launch_materialize(step, operands, fresh)) return false;
    slots_[out] = std::move(fresh);
    return true;
  }

  const bool launches_ = ops::can_launch(tape_.device);
  const at::Tensor none_;
};

}  // namespace

std::vector<at::Tensor> execute(const Plan& plan, const tape::Tape& tape, at::TensorList cotangents, Strides strides,
                                Calls& calls) {
  torch::autograd::AutoGradMode no_grad(false);
  return MemoryRun(plan, tape, cotangents, calls)(strides);
}

}  // namespace wengert::accumulate
