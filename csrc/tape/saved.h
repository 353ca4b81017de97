// What nodes saved, which other threads may read or free at the same time.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <vector>

#include "common/node_ptr.h"

namespace wengert::tape {

// With PyTorch's complaints where it was freed or changed since; throws Unsupported where hooks of the user's would run.
// `is_result`: of an output of the op.
at::Tensor unpack(const common::NodePtr& fn, const torch::autograd::SavedVariable& saved, bool is_result = false);
std::vector<at::Tensor> unpack(const common::NodePtr& fn, const std::vector<torch::autograd::SavedVariable>& saved,
                               const bool& released);

}  // namespace wengert::tape
