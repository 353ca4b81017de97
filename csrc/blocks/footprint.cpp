#include "blocks/footprint.h"

#include "fused/footprint.h"

namespace wengert::blocks {

namespace {

// What a list's elements point to is counted where the list is.
template <class T>
std::size_t list(const std::vector<T>& items) {
  return items.capacity() * sizeof(T);
}

std::size_t axes(const std::vector<Affine>& items) {
  std::size_t bytes = list(items);
  for (const Affine& axis : items) bytes += list(axis.step);
  return bytes;
}

std::size_t lists(const std::vector<std::vector<std::size_t>>& items) {
  std::size_t bytes = list(items);
  for (const auto& item : items) bytes += list(item);
  return bytes;
}

struct Below {
  std::size_t operator()(const Evaluate& step) const {
    std::size_t bytes = list(step.extents) + list(step.operands) + list(step.targets) + step.text.capacity();
    for (const Read& read : step.operands) bytes += axes(read.axes);
    for (const Target& target : step.targets) bytes += axes(target.axes);
    return bytes + fused::footprint(*step.program);
  }
  std::size_t operator()(const Matmul& step) const {
    return list(step.extents) + axes(step.a.axes) + axes(step.b.axes) + (step.scale ? axes(step.scale->axes) : 0) +
           list(step.batch) + list(step.m) + list(step.n) + list(step.k);
  }
  std::size_t operator()(const Take&) const { return 0; }
  std::size_t operator()(const PutAdd& step) const {
    const std::size_t along = step.axis ? axes(step.axis->index.axes) + lists(step.axis->loops) : 0;
    return list(step.extents) + axes(step.value.axes) + axes(step.index.axes) + along;
  }
  std::size_t operator()(const Arange&) const { return 0; }
  std::size_t operator()(const CallNode& step) const { return list(step.cotangents) + list(step.results) + list(step.zeros); }
};

}  // namespace

std::size_t footprint(const Plan& plan) {
  std::size_t bytes = sizeof(Plan) + list(plan.slots) + list(plan.steps) + list(plan.last_use) + list(plan.results) +
                      list(plan.result_shapes) + list(plan.reads);
  for (const Slot& slot : plan.slots) bytes += list(slot.shape) + list(slot.strides);
  for (const Step& step : plan.steps) bytes += std::visit(Below(), step);
  for (const auto& slots : plan.last_use) bytes += list(slots);
  for (const Shape& shape : plan.result_shapes) bytes += list(shape);
  return bytes;
}

}  // namespace wengert::blocks
