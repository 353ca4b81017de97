// Walks of a graph that only look.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/node_ptr.h"
#include "common/pointer_index.h"

namespace wengert::common {

// The lowest number of a node that may lead to one of `ends`.  What has a lower one need not be looked at: what lies behind the
// graph in question can be much longer than it.
inline std::uint64_t least_number(at::TensorList ends) {
  std::uint64_t least = ends.empty() ? 0 : std::numeric_limits<std::uint64_t>::max();
  for (const at::Tensor& end : ends) least = std::min(least, topological_nr(end));
  return least;
}

// Calls `visit` for each node that gradients of `outputs` may pass on their way to `until`, those of `until` included but nothing
// behind them, as long as it returns true.  Whether it always did.  All nodes where `until` is empty.
template <class Visit>
bool visit_behind(at::TensorList outputs, at::TensorList until, Visit&& visit) {
  const std::uint64_t least = least_number(until);
  PointerIndex seen;
  std::vector<torch::autograd::Node*> stack;
  const auto is_new = [&](torch::autograd::Node* node) {
    if (topological_nr(*node) < least) return false;
    std::int32_t& mark = seen[node];
    return mark < 0 && (mark = 0, true);
  };
  for (const at::Tensor& end : until) {
    const auto& fn = end.grad_fn();
    if (fn && is_new(fn.get()) && !visit(*fn)) return false;
  }
  for (const at::Tensor& output : outputs) {
    const auto& fn = output.grad_fn();
    if (fn && is_new(fn.get())) stack.push_back(fn.get());
  }
  while (!stack.empty()) {
    torch::autograd::Node& node = *stack.back();
    stack.pop_back();
    if (!visit(node)) return false;
    for (const torch::autograd::Edge& edge : node.next_edges()) {
      if (edge.function && is_new(edge.function.get())) stack.push_back(edge.function.get());
    }
  }
  return true;
}

// Whether gradients that reach `fn` go on to one of `ends`.
inline bool leads_to(const torch::autograd::Node& fn, at::TensorList ends) {
  PointerIndex seen;  // 1: an end
  for (const at::Tensor& end : ends) {
    const NodePtr node = end.grad_fn() ? end.grad_fn() : torch::autograd::impl::try_get_grad_accumulator(end);
    if (node) seen[node.get()] = 1;
  }
  const std::uint64_t least = least_number(ends);
  std::vector<const torch::autograd::Node*> stack{&fn};
  while (!stack.empty()) {
    const torch::autograd::Node* node = stack.back();
    stack.pop_back();
    if (topological_nr(*node) < least) continue;
    std::int32_t& mark = seen[node];
    if (mark == 1) return true;
    if (mark == 0) continue;
    mark = 0;
    for (const torch::autograd::Edge& edge : node->next_edges()) {
      if (edge.function) stack.push_back(edge.function.get());
    }
  }
  return false;
}

}  // namespace wengert::common
