// How nodes of PyTorch's graph are held: PyTorch 2.13 counts references in the node, 2.11 by shared_ptr.
#pragma once
#include <ATen/SequenceNumber.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace wengert::common {

using NodePtr = std::decay_t<decltype(std::declval<torch::autograd::Edge>().function)>;

template <class Node, class Pointer = NodePtr>
Pointer share(Node* node) {
  if constexpr (requires { Pointer::reclaim_copy(node); }) {
    return Pointer::reclaim_copy(node);
  } else {
    return node->shared_from_this();
  }
}

// A new node of type T, as the pointer that PyTorch's functions take.
template <class T, class Pointer = NodePtr>
auto make_node() {
  if constexpr (requires { Pointer::reclaim_copy(nullptr); }) {
    return c10::make_intrusive<T>();
  } else {
    return std::shared_ptr<T>(new T, [](T* node) { deleteNode(node); });  // of torch::autograd; spares the stack in long chains
  }
}

struct Numbered : torch::autograd::Node {
  static constexpr std::uint64_t torch::autograd::Node::* kNumber = &Numbered::topological_nr_;
};

// A node's number is higher than those of all it leads to.  PyTorch's own accessor writes a flag into the node, which threads
// that read one graph would do at once.
inline std::uint64_t topological_nr(const torch::autograd::Node& node) { return node.*Numbered::kNumber; }

// Gives a node that nothing leads to yet a higher number than all nodes have that this thread made before.  Walks from later
// nodes to this one, PyTorch's too, then look at none of those.  A number exceeds those of what its node leads to by one at least
// and its sequence number exceeds theirs, so that twice the latter is enough, however often this is done.
inline void raise_topological_nr(torch::autograd::Node& node) {
  std::uint64_t& number = node.*Numbered::kNumber;
  number = std::max(number, 2 * at::sequence_number::peek());
}

// Of what the gradient of a tensor goes to; 0 where that is a leaf without a graph.
inline std::uint64_t topological_nr(const at::Tensor& tensor) {
  const NodePtr& fn = tensor.grad_fn();
  if (fn) return topological_nr(*fn);
  const NodePtr accumulator = torch::autograd::impl::try_get_grad_accumulator(tensor);
  return accumulator ? topological_nr(*accumulator) : 0;
}

}  // namespace wengert::common
