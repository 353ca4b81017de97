// Along which edges of a node a cotangent of one of its outputs goes on.
#pragma once
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace wengert::ops {

// Nodes that compute several results at once: wengert::fused and the derivatives of a convolution.
bool has_parts(const torch::autograd::Node& fn);

// None: along all, as of every other node.
std::optional<std::vector<bool>> onwards(const torch::autograd::Node& fn, std::uint32_t output);

bool differentiates_a_convolution(const torch::autograd::Node& fn);

}  // namespace wengert::ops
