#include "ops/onwards.h"

#include <torch/csrc/autograd/generated/Functions.h>

#include <typeinfo>

#include "ops/fused_autograd.h"

namespace wengert::ops {

bool differentiates_a_convolution(const torch::autograd::Node& fn) {
  return typeid(fn) == typeid(torch::autograd::generated::ConvolutionBackwardBackward0);
}

bool has_parts(const torch::autograd::Node& fn) {
  return typeid(fn) == typeid(FusedBackward) || differentiates_a_convolution(fn);
}

std::optional<std::vector<bool>> onwards(const torch::autograd::Node& fn, std::uint32_t output) {
  if (typeid(fn) == typeid(FusedBackward)) {
    const auto effect = effects(static_cast<const FusedBackward&>(fn).program_);
    const auto first = effect->begin() + static_cast<std::ptrdiff_t>(output) * fn.num_outputs();
    return std::vector<bool>(first, first + fn.num_outputs());
  }
  if (differentiates_a_convolution(fn)) {  // linear in the cotangent, the data and the weight: each derivative has two of them
    std::vector<bool> some(fn.num_outputs(), true);
    some[1] = output == 1;
    some[2] = output == 0;
    return some;
  }
  return std::nullopt;
}

}  // namespace wengert::ops
