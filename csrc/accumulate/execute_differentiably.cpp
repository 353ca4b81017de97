// Running a plan through differentiable ops: reads become views, programs go through wengert::fused, arrays are put together from
// padded pieces.  PyTorch records all of it, so the results can be differentiated again.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/grad_mode.h>

#include <algorithm>

#include "accumulate/execute.h"
#include "accumulate/run.h"
#include "ops/backend.h"
#include "ops/fused.h"

namespace wengert::accumulate {

namespace {

using blocks::Affine;
using blocks::Evaluate;
using blocks::Plan;
using blocks::Read;
using blocks::Shape;
using blocks::Slot;
using blocks::Target;

// The flat position of the affine coordinates in a contiguous array of the given shape, over the given loops.
at::Tensor flat_index(const std::vector<Affine>& axes, at::IntArrayRef shape, const Shape& extents,
                      const std::vector<std::size_t>& loops, at::Device device) {
  const at::TensorOptions options = at::TensorOptions().dtype(at::kLong).device(device);
  std::int64_t start = 0;
  std::vector<std::int64_t> steps(extents.size(), 0);
  std::int64_t stride = 1;
  for (std::size_t a = axes.size(); a-- > 0;) {
    start += axes[a].start * stride;
    for (std::size_t k = 0; k < extents.size(); ++k) steps[k] += axes[a].step[k] * stride;
    stride *= shape[a];
  }
  at::Tensor index = at::full({}, start, options);
  for (std::size_t q = 0; q < loops.size(); ++q) {
    Shape sizes(loops.size(), 1);
    sizes[q] = extents[loops[q]];
    index = index + (at::arange(extents[loops[q]], options) * steps[loops[q]]).view(sizes);
  }
  Shape full;
  for (std::size_t k : loops) full.push_back(extents[k]);
  return index.expand(full);
}

// Whether what ATen adds at indices has to be sorted first for the same bits every time: elsewhere than on the CPU index_add and
// scatter_add, and so the derivative of index_select, add in any order.
bool sorts(at::Device device) { return !device.is_cpu() || ops::can_launch(device); }

at::Tensor taken(const at::Tensor& source, const at::Tensor& index, std::optional<std::size_t> axis = std::nullopt) {
  if (!sorts(source.device())) return accumulate::take(source, index, axis);
  if (axis) {
    c10::List<std::optional<at::Tensor>> indices;
    indices.resize(*axis);
    indices.push_back(index);
    return source.index(indices);
  }
  return source.reshape(-1).index({index.reshape(-1)}).view(index.sizes());
}

// The tensor's elements at affine coordinates, as a tensor with one axis per loop of `loops`; 1 where the read does not move.
at::Tensor read_window(const at::Tensor& tensor, const Read& read, const Shape& extents, const std::vector<std::size_t>& loops) {
  at::Tensor view = tensor;
  std::vector<std::size_t> owner;  // loop behind each remaining axis
  std::int64_t axis = 0;
  bool simple = true;
  for (const Affine& at : read.axes) {
    std::vector<std::size_t> movers;
    for (std::size_t k : loops) {
      if (at.moves(k)) movers.push_back(k);
    }
    if (movers.empty()) {
      view = view.select(axis, at.start);
      continue;
    }
    if (movers.size() > 1 || std::find(owner.begin(), owner.end(), movers[0]) != owner.end()) {
      simple = false;
      break;
    }
    const std::size_t k = movers[0];
    const std::int64_t step = at.step[k], last = at.start + step * (extents[k] - 1);
    if (step > 0) {
      if (at.start != 0 || step != 1 || extents[k] != view.size(axis)) view = view.slice(axis, at.start, last + 1, step);
    } else {
      view = view.slice(axis, last, at.start + 1, -step).flip(axis);
    }
    owner.push_back(k);
    ++axis;
  }
  if (!simple) {  // windows and diagonals: element by element
    std::vector<std::size_t> movers;
    for (std::size_t k : loops) {
      if (read.moves(k)) movers.push_back(k);
    }
    view = taken(tensor, flat_index(read.axes, tensor.sizes(), extents, movers, tensor.device()));
    owner = movers;
  }
  // Axes into loop order, size 1 for loops that do not move.
  std::vector<std::int64_t> order;
  Shape sizes;
  for (std::size_t k : loops) {
    const auto at = std::find(owner.begin(), owner.end(), k);
    sizes.push_back(at == owner.end() ? 1 : extents[k]);
    if (at != owner.end()) order.push_back(at - owner.begin());
  }
  if (!std::is_sorted(order.begin(), order.end())) view = view.permute(order);
  return view.sizes() == at::IntArrayRef(sizes) ? view : view.reshape(sizes);
}

class DifferentiableRun : public Run<DifferentiableRun> {
 public:
  using Run::Run;
  using Run::run;

  const at::Tensor& made(std::int32_t s) {
    if (!slots_[s].defined()) slots_[s] = at::zeros(plan_.slots[s].shape, options(plan_.slots[s]));
    return on_device(slots_[s]);
  }

  void run(const Evaluate& step) {
    std::vector<std::size_t> loops(step.extents.size());
    for (std::size_t k = 0; k < loops.size(); ++k) loops[k] = k;
    std::vector<at::Tensor> operands, values;
    for (const Read& read : step.operands) operands.push_back(read_window(made(read.slot), read, step.extents, loops));
    if (operands.empty()) {  // which leaves it to say what extents and which device
      values = numbers(step);
    } else {
      values = ops::fused(operands, step.text);
    }
    for (std::size_t i = 0; i < step.targets.size(); ++i) put(step.targets[i], step.extents, values[i]);
  }

  // What a program without operands gives: constants, and what is made of them where folding would not be exact.
  std::vector<at::Tensor> numbers(const Evaluate& step) const {
    std::vector<at::Tensor> values;
    std::vector<ops::OutputView> views;
    for (const fused::OutputSpec& output : step.program->outputs()) {
      Shape sizes = step.extents;
      for (std::size_t k = 0; k < sizes.size(); ++k) {
        if ((output.reduced >> k & 1) != 0) sizes[k] = 1;
      }
      values.push_back(at::empty(sizes, at::TensorOptions().dtype(ops::to_scalar_type(output.dtype)).device(tape_.device)));
      views.push_back({values.back().mutable_data_ptr(), output.dtype, values.back().strides().data(), false});
    }
    ops::evaluate(tape_.device, *step.program, step.extents, {}, views);
    return values;
  }

  // Adds the value (one axis per loop, size 1 = replicated or summed) into its slot.
  void put(const Target& target, const Shape& extents, at::Tensor value) {
    const Slot& slot = plan_.slots[target.slot];
    const std::size_t n = extents.size();
    // One loop per axis and one axis per loop: permute and pad.
    std::vector<std::int64_t> order;
    std::vector<bool> used(n, false);
    bool simple = true;
    for (const Affine& at : target.axes) {
      std::size_t count = 0;
      for (std::size_t k = 0; k < n; ++k) {
        if (!at.moves(k)) continue;
        ++count;
        simple = simple && !used[k] && at.step[k] == 1;
        used[k] = true;
        order.push_back(static_cast<std::int64_t>(k));
      }
      simple = simple && count <= 1;
    }
    Shape full = extents;  // summed loops stay at size 1
    for (std::size_t k = 0; k < n; ++k) {
      if (!used[k]) full[k] = 1;
    }
    value = value.expand(full);
    at::Tensor piece;
    if (simple) {
      for (std::size_t k = 0; k < n; ++k) {
        if (!used[k]) order.push_back(static_cast<std::int64_t>(k));
      }
      if (!std::is_sorted(order.begin(), order.end())) value = value.permute(order);
      Shape sizes;
      std::vector<std::int64_t> padding;
      std::size_t next = 0;
      for (std::size_t a = 0; a < target.axes.size(); ++a) {
        const bool moves = !target.axes[a].is_constant();
        const std::int64_t size = moves ? full[order[next++]] : 1;
        sizes.push_back(size);
        padding.insert(padding.begin(), {target.axes[a].start, slot.shape[a] - size - target.axes[a].start});
      }
      piece = value.reshape(sizes);
      if (std::any_of(padding.begin(), padding.end(), [](std::int64_t p) { return p != 0; }))
        piece = at::constant_pad_nd(piece, padding);
    } else {
      std::vector<std::size_t> loops;
      for (std::size_t k = 0; k < n; ++k) loops.push_back(k);
      const at::Tensor index = flat_index(target.axes, slot.shape, full, loops, tape_.device);
      piece = at::zeros({blocks::numel(slot.shape)}, options(slot))
                  .index_add(0, index.reshape(-1), value.reshape(-1))
                  .view(slot.shape);
    }
    at::Tensor& tensor = slots_[target.slot];
    tensor = tensor.defined() ? tensor + piece : piece;
  }

  void run(const blocks::Matmul& step) {
    count_matmul();
    if (step.scale) {
      const blocks::Matmul plain = unscaled(step);
      const std::vector<std::size_t> left = matmul_axes(plain, true);
      multiply(plain, read(step.a, plain, left) * read(*step.scale, plain, left));
    } else {
      multiply(step, read(step.a, step, matmul_axes(step, true)));
    }
  }

  void run(const blocks::Take& step) {
    count_take();
    slots_[step.out] = taken(made(step.source), made(step.index), step.axis);
  }

  void run(const blocks::PutAdd& step) {
    std::vector<std::size_t> loops(step.extents.size());
    for (std::size_t k = 0; k < loops.size(); ++k) loops[k] = k;
    const at::Tensor value = read_window(made(step.value.slot), step.value, step.extents, loops).expand(step.extents);
    const at::Tensor& old = made(step.out);
    const bool sorted = sorts(tape_.device) && !step.distinct;
    if (step.axis && (!sorted || step.puts_rows())) {  // along one axis, which keeps the structure of the others
      std::vector<std::int64_t> order;
      Shape sizes;
      for (const std::vector<std::size_t>& along : step.axis->loops) {
        sizes.push_back(1);
        for (std::size_t k : along) {
          order.push_back(static_cast<std::int64_t>(k));
          sizes.back() *= step.extents[k];
        }
      }
      const auto axis = static_cast<std::int64_t>(step.axis->axis);
      at::Tensor source = value.permute(order).reshape(sizes);
      if (sorted) {
        const std::vector<std::size_t>& positions = step.axis->loops[step.axis->axis];
        Shape extents;
        for (std::size_t k : positions) extents.push_back(step.extents[k]);
        c10::List<std::optional<at::Tensor>> at;
        for (std::int64_t a = 0; a < axis; ++a) at.push_back(std::nullopt);
        at.push_back(
            read_window(made(step.axis->index.slot), step.axis->index, step.extents, positions).expand(extents).reshape(-1));
        std::vector<std::int64_t> padding;  // the source may lie in a corner of the other axes
        for (std::int64_t a = old.dim(); a-- > 0;)
          padding.insert(padding.end(), {0, a == axis ? 0 : old.size(a) - source.size(a)});
        if (std::ranges::any_of(padding, [](std::int64_t p) { return p != 0; })) source = at::constant_pad_nd(source, padding);
        slots_[step.out] = old.index_put(at, source, /*accumulate=*/true);
        return;
      }
      // Written out: of an expanded index scatter_add (torch 2.13) takes the source for as large as the array along the other
      // axes.
      const at::Tensor at = read_window(made(step.axis->index.slot), step.axis->index, step.extents, loops).expand(step.extents);
      slots_[step.out] = old.scatter_add(axis, at.permute(order).reshape(sizes).contiguous(), source);
      return;
    }
    const at::Tensor index = read_window(made(step.index.slot), step.index, step.extents, loops).expand(step.extents).reshape(-1);
    const at::Tensor flat = old.reshape(-1), source = value.reshape(-1);
    slots_[step.out] =
        (sorted ? flat.index_put({index}, source, /*accumulate=*/true) : flat.index_add(0, index, source)).view(old.sizes());
  }

  void run(const blocks::Arange& step) {
    slots_[step.out] = at::arange(plan_.slots[step.out].shape[0], at::TensorOptions().dtype(at::kLong).device(tape_.device));
  }

 private:
  at::Tensor read(const Read& read, const blocks::Matmul& step, const std::vector<std::size_t>& loops) {
    return read_window(made(read.slot), read, step.extents, loops);
  }
  // One side may have moved along some loops only because of the scale.
  static at::Tensor spread(const at::Tensor& view, const blocks::Matmul& step, const std::vector<std::size_t>& loops) {
    Shape sizes;
    for (std::size_t k : loops) sizes.push_back(step.extents[k]);
    return view.sizes() == at::IntArrayRef(sizes) ? view : view.expand(sizes);
  }
  void multiply(const blocks::Matmul& step, const at::Tensor& a) {
    const std::vector<std::size_t> left = matmul_axes(step, true), right = matmul_axes(step, false);
    slots_[step.out] = accumulate::matmul(step, plan_.slots[step.out].shape, spread(a, step, left),
                                          spread(read(step.b, step, right), step, right));
  }
  at::TensorOptions options(const Slot& slot) const {
    return at::TensorOptions().dtype(ops::to_scalar_type(slot.dtype)).device(tape_.device);
  }
};

}  // namespace

std::vector<at::Tensor> execute_differentiably(const Plan& plan, const tape::Tape& tape, at::TensorList cotangents,
                                               Strides strides, Calls& calls) {
  torch::autograd::AutoGradMode with_grad(true);
  return DifferentiableRun(plan, tape, cotangents, calls)(strides);
}

}  // namespace wengert::accumulate
