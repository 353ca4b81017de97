// What both ways of running a plan have in common: slots, the order of the steps, and calling nodes.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>
#include <variant>
#include <vector>

#include "accumulate/calls.h"
#include "accumulate/execute.h"
#include "accumulate/steps.h"

namespace wengert::accumulate {

// Way::run(step) runs every other kind of step; Way::made(slot) gives a slot's tensor, making it at its first mention.
template <class Way>
class Run {
 public:
  Run(const blocks::Plan& plan, const tape::Tape& tape, at::TensorList cotangents, Calls& calls)
      : plan_(plan), tape_(tape), calls_(calls), slots_(plan.slots.size()) {
    std::size_t s = 0;
    for (const at::Tensor& tensor : tape.slots) slots_[s++] = tensor;
    for (const at::Tensor& tensor : cotangents) {
      if (tensor.defined()) slots_[s++] = tensor;
    }
  }

  std::vector<at::Tensor> operator()(Strides strides) {
    Way& way = static_cast<Way&>(*this);
    for (std::size_t i = 0; i < plan_.steps.size(); ++i) {
      std::visit([&way](const auto& step) { way.run(step); }, plan_.steps[i]);
      for (std::int32_t s : plan_.last_use[i]) slots_[s].reset();
    }
    std::vector<at::Tensor> results;
    for (std::size_t r = 0; r < plan_.results.size(); ++r) {
      const std::int32_t s = plan_.results[r];
      if (s < 0) {
        results.emplace_back();
        continue;
      }
      way.made(s);
      const bool kept = strides == Strides::dense && (slots_[s].is_contiguous() || node_gave(s));
      results.push_back(accumulate::result(std::move(slots_[s]), plan_.result_shapes[r], kept ? strides : Strides::contiguous));
    }
    return results;
  }

  void run(const blocks::CallNode& step) {
    std::vector<at::Tensor> cotangents;
    for (std::int32_t s : step.cotangents) cotangents.push_back(s < 0 ? at::Tensor() : static_cast<Way&>(*this).made(s));
    std::vector<at::Tensor> results = calls_(step, plan_, std::move(cotangents));
    for (std::size_t j = 0; j < step.results.size(); ++j) {
      if (step.results[j] >= 0) slots_[step.results[j]] = std::move(results[j]);
    }
  }

 private:
  bool node_gave(std::int32_t slot) const {
    return std::ranges::any_of(plan_.steps, [slot](const blocks::Step& step) {
      const auto* call = std::get_if<blocks::CallNode>(&step);
      return call != nullptr && std::ranges::find(call->results, slot) != call->results.end();
    });
  }

 protected:
  // A scalar that PyTorch keeps on the CPU goes where the others are: by a fill, which a CUDA graph can hold, as it cannot a copy
  // from pageable memory.
  at::Tensor& on_device(at::Tensor& tensor) const {
    if (tensor.device() == tape_.device) return tensor;
    if (tensor.requires_grad() && at::GradMode::is_enabled()) {
      tensor = tensor.to(tape_.device, tensor.scalar_type(), /*non_blocking=*/true);
    } else {
      tensor = at::empty(tensor.sizes(), tensor.options().device(tape_.device)).fill_(tensor.detach());
    }
    return tensor;
  }

  const blocks::Plan& plan_;
  const tape::Tape& tape_;
  Calls& calls_;
  std::vector<at::Tensor> slots_;
};

}  // namespace wengert::accumulate
