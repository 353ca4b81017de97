// How nodes of PyTorch's graph are held: PyTorch 2.13 counts references in the node, 2.11 by shared_ptr.
#pragma once
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

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

// A node's number is higher than those of all it leads to.  PyTorch's own accessor writes a flag into the node, which threads
// that read one graph would do at once.
inline std::uint64_t topological_nr(const torch::autograd::Node& node) {
  struct Numbered : torch::autograd::Node {
    static std::uint64_t of(const torch::autograd::Node& node) { return node.*(&Numbered::topological_nr_); }
  };
  return Numbered::of(node);
}

}  // namespace wengert::common
