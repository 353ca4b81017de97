// Where PyTorch's forward mode does not compute the transpose of its reverse mode.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>

namespace wengert::tape {

struct ForwardMode {
  std::string differs;  // a node whose operator has another derivative in forward mode (at ties, in the part of a symmetric
                        // matrix that is not read, where a place is written twice, ...), if there is one
  bool masks = false;   // some operator leaves values out: with them go infinite derivatives, which reverse mode multiplies by 0
};

// What forward mode through the graph of `outputs` would make of it.
ForwardMode forward_mode(at::TensorList outputs, at::TensorList inputs);

}  // namespace wengert::tape
