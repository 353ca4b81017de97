// Where PyTorch's forward mode does not compute the transpose of its reverse mode.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>

namespace wengert::tape {

// The name of a node in the graph of `outputs` whose operator has another derivative in PyTorch's forward mode (at ties, in the
// part of a symmetric matrix that is not read, ...), or an empty string.
std::string forward_mode_differs(at::TensorList outputs);

}  // namespace wengert::tape
