#include "bind/plan_faults.h"

#include <algorithm>
#include <string>
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

bool is_read(const Plan& plan, std::int32_t slot) {
  const auto holds = [slot](const std::vector<std::int32_t>& slots) { return std::ranges::find(slots, slot) != slots.end(); };
  return holds(plan.results) ||
         std::ranges::any_of(plan.steps, [&](const blocks::Step& s) { return holds(blocks::touched(s).read); });
}

// Moves one coordinate at a time one place beyond its axis, at either end, and leaves out one step at a time of which more is
// needed than additions: how many faults, and those that are not seen.
std::pair<int, std::vector<std::string>> plan_faults(Plan plan) {
  if (const std::string why = blocks::violation(plan); !why.empty()) throw std::invalid_argument("an unsound plan: " + why);
  int tried = 0;
  std::vector<std::string> passed;
  const auto attempt = [&](std::size_t step, const std::string& what) {
    ++tried;
    if (blocks::violation(plan).empty()) passed.push_back("step " + std::to_string(step) + ": " + what);
  };
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    blocks::Step& step = plan.steps[i];
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
        const std::string where = "axis " + std::to_string(a) + " of slot " + std::to_string(slot);
        axis.start += plan.slots[slot].shape[a] - sound.highest(*extents);
        attempt(i, where + ", beyond its end");
        axis.start = sound.start - 1 - sound.lowest(*extents);
        attempt(i, where + ", before its start");
        axis = sound;
      }
    }
  }
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const blocks::Step step = plan.steps[i];
    plan.steps.erase(plan.steps.begin() + static_cast<std::ptrdiff_t>(i));
    std::vector<std::int32_t> stored = blocks::touched(step).written;
    if (const auto* nest = std::get_if<blocks::Evaluate>(&step)) {
      for (const blocks::Target& target : nest->targets) {
        if (target.accumulate) std::erase(stored, target.slot);
      }
    }
    if (std::ranges::any_of(stored, [&](std::int32_t slot) {
          return !plan.slots[slot].zero_filled && blocks::numel(plan.slots[slot].shape) > 0 && is_read(plan, slot);
        })) {
      attempt(i, "left out");
    }
    plan.steps.insert(plan.steps.begin() + static_cast<std::ptrdiff_t>(i), step);
  }
  return {tried, passed};
}

}  // namespace

void define_plan_faults(py::module_& m) {
  m.def("plan_faults", [](const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& inputs) {
    return plan_faults(accumulate::jacobian_plan(outputs, inputs));
  });
}

}  // namespace wengert::bind
