// A node that ties results to tensors that they do not change with.
#pragma once
#include <torch/csrc/autograd/function.h>

#include <vector>

namespace wengert::ops {

// Outputs are some results; input edges are the results before they were tied, then the tensors they are tied to.  Cotangents of
// the results pass through; the tensors receive zeros.
struct TetherBackward : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&& cotangents) override;
  std::string name() const override { return "wengert::TetherBackward"; }
};

// The results with one node of this kind.  They share memory with what was given.
std::vector<at::Tensor> tether(at::TensorList results, const std::vector<torch::autograd::Edge>& to);

}  // namespace wengert::ops
