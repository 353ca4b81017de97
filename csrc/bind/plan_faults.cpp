#include "bind/plan_faults.h"

#include <utility>
#include <vector>

#include "accumulate/derivatives.h"
#include "blocks/verify.h"

namespace py = pybind11;

namespace wengert::bind {

namespace {

using blocks::Affine;
using blocks::Plan;

// Every list of coordinates of a step, with the slot it lies in.
std::vector<std::pair<std::int32_t, std::vector<Affine>*>> coordinates(blocks::Step& step) {
  std::vector<std::pair<std::int32_t, std::vector<Affine>*>> out;
  const auto add = [&](blocks::Read& read) {
    if (read.slot >= 0) out.emplace_back(read.slot, &read.axes);
  };
  if (auto* nest = std::get_if<blocks::Evaluate>(&step)) {
    for (blocks::Read& read : nest->operands) add(read);
    for (blocks::Target& target : nest->targets) out.emplace_back(target.slot, &target.axes);
  } else if (auto* product = std::get_if<blocks::Matmul>(&step)) {
    add(product->a), add(product->b);
    if (product->scale) add(*product->scale);
  } else if (auto* put = std::get_if<blocks::PutAdd>(&step)) {
    add(put->value), add(put->index);
    if (put->axis) add(put->axis->index);
  }
  return out;
}

// Moves one coordinate at a time by one place beyond its axis, at either end: (tried, refused).  Then leaves one step out.
std::pair<int, int> plan_faults(Plan plan) {
  if (const std::string why = blocks::violation(plan); !why.empty()) throw std::invalid_argument("an unsound plan: " + why);
  int tried = 0, refused = 0;
  const auto refuses = [&] {
    ++tried;
    refused += !blocks::violation(plan).empty();
  };
  for (blocks::Step& step : plan.steps) {
    const blocks::Shape* extents = nullptr;
    std::visit(
        [&](auto& s) {
          if constexpr (requires { s.extents; }) extents = &s.extents;
        },
        step);
    for (auto [slot, axes] : coordinates(step)) {
      for (std::size_t a = 0; a < axes->size(); ++a) {
        Affine& axis = (*axes)[a];
        const Affine sound = axis;
        axis.start += plan.slots[slot].shape[a] - sound.highest(*extents);
        refuses();
        axis.start = sound.start - 1 - sound.lowest(*extents);
        refuses();
        axis = sound;
      }
    }
  }
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const blocks::Step step = plan.steps[i];
    plan.steps.erase(plan.steps.begin() + static_cast<std::ptrdiff_t>(i));
    bool stores = false;  // additions to zeros may be left out unseen
    if (const auto* nest = std::get_if<blocks::Evaluate>(&step)) {
      for (const blocks::Target& target : nest->targets) stores = stores || !plan.slots[target.slot].zero_filled;
    }
    if (stores) refuses();
    plan.steps.insert(plan.steps.begin() + static_cast<std::ptrdiff_t>(i), step);
  }
  return {tried, refused};
}

}  // namespace

void define_plan_faults(py::module_& m) {
  m.def("plan_faults", [](const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& inputs) {
    return plan_faults(accumulate::jacobian_plan(outputs, inputs));
  });
}

}  // namespace wengert::bind
