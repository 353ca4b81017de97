// Backward passes of PyTorch's engine, which nodes consult while they run.
#pragma once
#include <torch/csrc/autograd/function.h>

#include <functional>
#include <vector>

namespace wengert::tape {

// Whether this thread is running a node of a backward pass: a custom Function's backward or a hook.
bool inside_pass();

// Runs `body` as the only node of a backward pass of its own, under the caller's grad mode.  A node that is called there asks
// this pass which gradients are wanted (all of them), whether the graph is kept and which callbacks to run at the end, not an
// outer pass that knows other nodes, nor none at all, as it may well refuse to.  The GIL must not be held.
// Throws Unsupported, having done nothing, where the engine only records (compiled autograd).
void in_own_pass(bool keep_graph, const std::function<void()>& body);

// While it lives, the pass that this thread runs asks a node for some of its gradients alone; outside of a pass a node computes
// all of them.
class Wanted {
 public:
  Wanted(const torch::autograd::Node& fn, const std::vector<bool>& wanted);
  ~Wanted();
  Wanted(const Wanted&) = delete;
  Wanted& operator=(const Wanted&) = delete;

  // Whether the node would compute others too.
  static bool are_some(const torch::autograd::Node& fn, const std::vector<bool>& wanted);
};

}  // namespace wengert::tape
