// Nodes that run code of the user's: custom Functions, in Python or C++, and hooks.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <cstdint>
#include <exception>

namespace wengert::tape {

bool is_custom(const torch::autograd::Node& fn);
bool has_tensor_hooks(torch::autograd::Node& fn);  // of tensors that it computes, retain_grad included
bool has_node_hooks(const torch::autograd::Node& fn);

// Whether gradients of `outputs` pass code of the user's on their way to `inputs`.
bool passes_custom(at::TensorList outputs, at::TensorList inputs);
bool passes_hooks(at::TensorList outputs, at::TensorList inputs);  // of tensors or nodes, those of the inputs included

// Whether a node was made before `leaves`, whose sequence number in this thread would have been `begun`.  Threads number apart,
// and PyTorch's backward pass on a GPU has one of its own: of what another thread made, that which does not lead to the leaves.
bool is_older(const torch::autograd::Node& fn, at::TensorList leaves, std::uint64_t begun);

// Removes the hooks that passes_hooks finds, but for those on what is older than the inputs, and on leaves.
void drop_hooks(at::TensorList outputs, at::TensorList inputs, std::uint64_t begun);

// What takes Python to know.  The Python module sets it; without one there are no such nodes and no such errors.
struct PythonKnowledge {
  // Whether a custom Function's saved tensors are unpacked by hooks (checkpointing).
  bool (*saves_through_hooks)(const torch::autograd::Node& fn) = nullptr;
  // Whether a call that failed may be tried in another way: not after a KeyboardInterrupt, say.  Forgets the error if so.
  bool (*may_retry)(const std::exception& error) = nullptr;
};
void set_python_knowledge(const PythonKnowledge& knowledge);

bool saves_through_hooks(const torch::autograd::Node& fn);
bool may_retry(const std::exception& error);

}  // namespace wengert::tape
