#include "ops/tether.h"

#include <torch/csrc/autograd/functions/utils.h>

#include <atomic>
#include <utility>

#include "common/node_ptr.h"

namespace wengert::ops {

namespace ag = torch::autograd;

namespace {

std::atomic<std::int64_t> tethers{0};

}  // namespace

TetherBackward::TetherBackward() { tethers.fetch_add(1, std::memory_order_relaxed); }
TetherBackward::~TetherBackward() { tethers.fetch_sub(1, std::memory_order_relaxed); }

bool any_tethers() { return tethers.load(std::memory_order_relaxed) != 0; }

ag::variable_list TetherBackward::apply(ag::variable_list&& cotangents) {
  ag::variable_list gradients = std::move(cotangents);
  for (std::size_t k = gradients.size(); k < num_outputs(); ++k) {
    const ag::Edge& edge = next_edge(k);
    gradients.push_back(edge.is_valid() && task_should_compute_output(k)
                            ? edge.function->input_metadata(edge.input_nr).zeros_like()
                            : at::Tensor());
  }
  return gradients;
}

at::Tensor tether(const at::Tensor& result, const std::vector<ag::Edge>& to, Source source) {
  auto node = common::make_node<TetherBackward>();
  node->source = std::move(source);
  node->add_next_edge(result.requires_grad() ? ag::impl::gradient_edge(result) : ag::Edge());
  for (const ag::Edge& edge : to) node->add_next_edge(edge);
  at::Tensor tied = result.detach();
  ag::set_history(tied, node);
  return tied;
}

}  // namespace wengert::ops
