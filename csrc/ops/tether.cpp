#include "ops/tether.h"

#include <torch/csrc/autograd/functions/utils.h>

#include "common/node_ptr.h"

namespace wengert::ops {

namespace ag = torch::autograd;

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

std::vector<at::Tensor> tether(at::TensorList results, const std::vector<ag::Edge>& to) {
  auto node = common::make_node<TetherBackward>();
  for (const at::Tensor& result : results)
    node->add_next_edge(result.requires_grad() ? ag::impl::gradient_edge(result) : ag::Edge());
  for (const ag::Edge& edge : to) node->add_next_edge(edge);
  std::vector<at::Tensor> tied;
  for (const at::Tensor& result : results) {
    tied.push_back(result.detach());
    ag::set_history(tied.back(), node);
  }
  return tied;
}

}  // namespace wengert::ops
